"""Semantic segmentation: a head on patch features gives every pixel a class."""
