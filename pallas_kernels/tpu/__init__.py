"""The product on TPUs (Pallas Mosaic)."""
