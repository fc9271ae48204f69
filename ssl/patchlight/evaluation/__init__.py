"""What a backbone has learned: measured and drawn."""
