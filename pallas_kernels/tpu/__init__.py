"""The matmul on TPUs (Pallas Mosaic)."""
