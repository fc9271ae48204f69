"""From image files to batches of crops (`Views`): sources, crop policies, loaders and masks."""
