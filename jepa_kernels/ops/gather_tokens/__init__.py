"""Kept tokens of each image."""
