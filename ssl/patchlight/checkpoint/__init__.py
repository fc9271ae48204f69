"""Checkpoints on the disk: safetensors files, and a manifest with the checksums of all their bytes."""
