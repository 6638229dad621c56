"""Reads and writes models."""
