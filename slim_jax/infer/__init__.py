"""Running decoders: fused for speed, generating, sharing devices."""
