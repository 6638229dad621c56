"""Products that XLA compiles, on every platform."""
