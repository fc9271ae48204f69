"""The training loop and what it stands on: branches, optimizer, parallelism, checkpoints, sentinels."""
