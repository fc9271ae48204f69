"""Vision backbones that turn images into patch tokens."""
