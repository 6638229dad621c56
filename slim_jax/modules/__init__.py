"""Quantizing the linear layers of any NNX module."""
