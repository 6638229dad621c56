"""The decoder: blocks, attention, generation, perplexity. Knows no quantizer."""
