"""Packed mixed-precision weights and their matmul. Depends on JAX; knows nothing of models."""

from pallas_kernels.api import mixed_matmul as mixed_matmul
from pallas_kernels.backends import by_kernel as by_kernel
from pallas_kernels.backends import use_implementation as use_implementation
from pallas_kernels.layout import MixedTensor as MixedTensor
from pallas_kernels.packing import pack as pack
from pallas_kernels.preparation import prepare as prepare
from pallas_kernels.preparation import prepare_joined as prepare_joined
from pallas_kernels.prepared import InputNorm as InputNorm
from pallas_kernels.prepared import Prepared as Prepared
from pallas_kernels.products import matmul as matmul
from pallas_kernels.ragged import mixed_ragged_dot as mixed_ragged_dot
from pallas_kernels.sharding import part as part
from pallas_kernels.sharding import sharded_matmul as sharded_matmul
from pallas_kernels.sharding import side_by_side as side_by_side
from pallas_kernels.sharding import stack_parts as stack_parts
from pallas_kernels.xla.attention import attention as attention
