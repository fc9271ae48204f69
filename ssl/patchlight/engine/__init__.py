"""The training loop and its parts: branches, optimizer, parallelism, checkpoints, sentinels."""
