"""The product on NVIDIA GPUs (Pallas Mosaic GPU)."""
