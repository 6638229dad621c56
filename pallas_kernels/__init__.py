"""Packed mixed-precision weights and their matmul. Knows JAX, not models."""

from pallas_kernels.layout import MixedTensor as MixedTensor
from pallas_kernels.layout import pack as pack
from pallas_kernels.xla import mixed_matmul as mixed_matmul
