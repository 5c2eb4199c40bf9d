"""Kept patches of images to tokens."""
