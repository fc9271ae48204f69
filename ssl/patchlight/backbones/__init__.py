"""Vision backbones, which turn images into patch tokens."""
