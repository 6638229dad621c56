"""Quantizes the linear layers of Flax NNX modules."""
