"""The products that XLA compiles, on every platform."""
