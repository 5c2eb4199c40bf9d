"""Symmetric contrastive loss of two sets of embeddings."""
