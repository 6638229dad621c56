"""Evaluation of decoders: perplexity and likelihoods of text."""
