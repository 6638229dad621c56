"""Checkpoints for others to read."""
