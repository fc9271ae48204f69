"""Measures and draws what a backbone has learned."""
