"""Judging decoders: perplexity and likelihoods of text."""
