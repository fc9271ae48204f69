"""Benchmarks: ops against their peers and their floor. `python -m bench ops`, `python -m bench report`."""
