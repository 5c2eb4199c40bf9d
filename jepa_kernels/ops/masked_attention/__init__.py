"""Attention inside each sequence."""
