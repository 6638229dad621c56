"""Strictness for every test: shapes never broadcast by rank, annotations are checked as the code runs."""

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# The modules that name shapes. Not pallas_kernels.layout: JAX rebuilds a MixedTensor with whatever stands
# for its leaves (shardings, shapes, gradients without a type), which its fields' annotations would refuse.
CHECKED = ["pallas_kernels.api", "pallas_kernels.xla"]
CHECKED += [f"slim_jax.{m}" for m in ["allocation", "calibration", "decoder", "generate", "gptq", "hessian"]]
CHECKED += ["slim_jax.cache", "slim_jax.linear", "slim_jax.rotary"]
install_import_hook(CHECKED, "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)  # tests of sharding need several, no other test sees them

# Examples compile; a time limit on one would measure the machine, not the code.
settings.register_profile("slim", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("slim")


@pytest.fixture(scope="session", autouse=True)
def _no_rank_promotion():
    jax.config.update("jax_numpy_rank_promotion", "raise")
