"""Linear layers: one product of rows and weights."""
