"""What sits on a backbone: projections, prototypes and image summaries."""
