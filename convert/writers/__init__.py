"""Writers of checkpoints for other programs."""
