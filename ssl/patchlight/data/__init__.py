"""From files to Views: sources, crop policies, loaders and masks."""
