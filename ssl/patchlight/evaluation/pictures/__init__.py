"""Pictures of attention, of patch features and of self-relations."""
