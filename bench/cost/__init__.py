"""What a training step would cost on a GPU, counted without one: `python -m bench cost`. See docs/cost.md."""
