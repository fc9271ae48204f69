"""Patch-level self-supervised pretraining of vision models."""
