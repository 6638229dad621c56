"""Inference with decoders: fusing for speed, generation, tensor parallelism."""
