"""Quantizing a decoder block by block."""
