"""The matmul on NVIDIA GPUs (Pallas Mosaic GPU)."""
