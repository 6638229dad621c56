"""Quantizes a decoder block by block."""
