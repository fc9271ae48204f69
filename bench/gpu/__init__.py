"""Everything worth measuring on a rented GPU, the most important first: `python -m bench gpu`. See docs/gpu_hour.md."""
