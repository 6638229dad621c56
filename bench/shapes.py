"""The linear layers of well-known models, ``(K, N)``, and the bandwidth of devices."""

from pallas_kernels.chips import DEVICES

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2-135m": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-2-13b": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "llama-2-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}

BANDWIDTH = {device.name: device.bandwidth for device in DEVICES}
"""Memory bandwidth in bytes per second by `jax.Device.device_kind`."""
