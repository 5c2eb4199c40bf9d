"""Distance of embeddings from an isotropic Gaussian."""
