"""The decoder model: config, parameters, blocks, attention, cache. Independent of any quantizer."""
