"""The linear layers of well-known models, ``(K, N)``, and what a device can do at best."""

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2-135m": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-2-13b": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "llama-2-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}

BANDWIDTH = {
    "TPU v5 lite": 819e9,
    "TPU v5": 2765e9,
    "TPU v5p": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU7x": 7380e9,
    "NVIDIA A100-SXM4-40GB": 1555e9,
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA H100 80GB HBM3": 3350e9,
    "NVIDIA H100 PCIe": 2000e9,
    "NVIDIA B200": 8000e9,
}
"""Memory bandwidth in bytes per second by `jax.Device.device_kind`, from the vendors' datasheets."""
