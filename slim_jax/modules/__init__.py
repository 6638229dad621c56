"""Quantizing the linear layers of Flax NNX modules."""
