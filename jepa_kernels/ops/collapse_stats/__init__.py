"""Whether embeddings have collapsed: spread, effective rank, likeness of rows."""
