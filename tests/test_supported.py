"""Products that a kernel cannot serve go to XLA at trace time, with a reason; devices are described."""

import dataclasses
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import core as mosaic_core
from matmul_cases import MOSAIC_GPU, random_weight

from pallas_kernels import backends, chips, mixed_matmul, prepare, prepare_joined
from pallas_kernels.chips import BY_SHORT_NAME
from pallas_kernels.gpu import config as gpu_config
from pallas_kernels.gpu import kernel as gpu
from pallas_kernels.layout import abstract_tensor
from pallas_kernels.tpu import config as tpu_config
from pallas_kernels.tpu import decode as tpu

H100, L4 = BY_SHORT_NAME["h100"], BY_SHORT_NAME["l4"]
FITS_NOT = gpu.Config(stages=2, groups_per_step=4, split_k=4)


@pytest.mark.parametrize("name", ["rtx3090", "l4", "rtx4090", "a100-40", "h100", "h200", "b200"])
def test_gpus_that_are_served(name):
    device = BY_SHORT_NAME[name]
    for m, k, n in [(1, 4096, 1024), (16, 11008, 4096), (33, 4096, 4096), (2048, 4096, 11008)]:
        config = gpu.heuristic(device.name, m, k, n)
        config = gpu_config.fitted(config, device, 128)
        gpu_config.check_supported(device, jnp.dtype("bfloat16"), m, 128, config)


@pytest.mark.parametrize(
    ("device", "dtype", "m", "group_size", "config", "message"),
    [
        ("t4", "float32", 1, 64, None, "is for compute capability 8.0.*, Tesla T4 has 7.5"),
        ("rtx5090", "float32", 1, 64, None, "compute capability .* has 12.0"),
        ("mi300x", "float32", 1, 64, None, "NVIDIA GPUs, not on AMD Instinct MI300X"),
        ("h100", "float16", 1, 64, None, "bfloat16 or float32 activations, not float16"),
        ("h100", "float64", 1, 64, None, "bfloat16 or float32 activations, not float64"),
        ("h100", "float32", 0, 64, None, "without rows"),
        ("h100", "float32", 1, 256, None, "groups of 32, 64 or 128"),
        ("l4", "float32", 1, 128, FITS_NOT, "131120 bytes of shared memory .* has 101376"),
    ],
)
def test_gpu_refuses(device, dtype, m, group_size, config, message):
    with pytest.raises(NotImplementedError, match=message):
        gpu_config.check_supported(BY_SHORT_NAME[device], jnp.dtype(dtype), m, group_size, config)


@pytest.mark.parametrize(
    ("device", "dtype", "m", "group_size", "config", "message"),
    [
        ("v4", "float32", 1, 64, {}, "60 MiB of VMEM, TPU v4 has 16 MiB"),
        ("unknown", "float32", 1, 64, {}, "for TPUs v5e.*, not for TPU v9"),
        ("v7x", "float32", 1, 64, {"unpack": "int8"}, "int8 here, which TPU7x does not multiply"),
        ("v5e", "float16", 1, 64, {}, "bfloat16 or float32 activations, not float16"),
        ("v5e", "float64", 1, 64, {}, "bfloat16 or float32 activations, not float64"),
        ("v5e", "float32", 0, 64, {}, "without rows"),
        ("v5e", "float32", 1, 96, {}, "group size"),
    ],
)
def test_tpu_refuses(device, dtype, m, group_size, config, message):
    described = chips.describe("TPU v9" if device == "unknown" else device)
    config = dataclasses.replace(tpu_config.Config(unpack="bfloat16"), **config)
    with pytest.raises(NotImplementedError, match=message):
        tpu_config.check_supported(described, jnp.dtype(dtype), m, group_size, config)


def test_tpus_that_are_served():
    for name in ("v5e", "v5p", "v6e", "v7x"):
        config = tpu.heuristic(BY_SHORT_NAME[name].name, 16, 4096, 4096)
        tpu_config.check_supported(BY_SHORT_NAME[name], jnp.dtype("float32"), 16, 128, config)


def test_tpu_refuses_what_vmem_cannot_hold():
    groups = 65536 // 32
    w = abstract_tensor((65536, 8192), widths=(2,), segments=(groups,), group_size=32)
    with chips.target("v6e"), pytest.raises(NotImplementedError, match="VMEM"):
        jax.eval_shape(tpu.mixed_matmul, jax.ShapeDtypeStruct((32, 65536), jnp.bfloat16), w)


def test_a_config_is_made_to_fit():
    found = gpu_config.fitted(FITS_NOT, L4, 128)
    assert found == dataclasses.replace(FITS_NOT, groups_per_step=2)
    gpu_config.check_supported(L4, jnp.dtype("float32"), 1, 128, found)
    assert gpu_config.fitted(FITS_NOT, H100, 128) == FITS_NOT


@pytest.mark.parametrize(
    "config",
    [
        gpu.Config(stages=2, groups_per_step=2, split_k=2),
        gpu.Config(64, 64, 3, 1),
        gpu.Config(16, 256, 1, 1, 4),
    ],
)
def test_shared_memory_is_what_mosaic_says(config):
    w = abstract_tensor((128, 256), widths=(2,), segments=(4,), group_size=32)
    product = jax.jit(lambda x, w: gpu.mixed_matmul(x, w, config=config))
    traced = product.trace(jax.ShapeDtypeStruct((3, 128), jnp.bfloat16), w)
    with (
        mosaic_core.artificial_shared_memory_limit(0),
        pytest.raises(ValueError, match="exceeds available shared memory") as said,
    ):
        traced.lower(lowering_platforms=("cuda",))
    needed = int(re.search(r"smem_bytes=(\d+)", str(said.value))[1])
    assert needed <= gpu_config.shared_bytes(config, 32) <= needed + 64


def lowered(platform, dtype="bfloat16", **kwargs):
    """Program of a product that is small for the kernels, lowered for a platform that is not present."""
    w = abstract_tensor((64, 64), widths=(2,), segments=(2,), group_size=32)
    product = jax.jit(lambda x, w: mixed_matmul(x, w, **kwargs))
    traced = product.trace(jax.ShapeDtypeStruct((2, 64), dtype), w)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_cuda_and_rocm_are_told_apart():
    both = ("mosaic_gpu", "xla")
    assert ("mosaic_gpu" in lowered("cuda", implementation=both)) is MOSAIC_GPU
    assert "mosaic_gpu" not in lowered("rocm", implementation=both)
    with chips.target("mi300x"):
        assert "mosaic_gpu" not in lowered("rocm")
        with pytest.raises(NotImplementedError, match="NVIDIA"):
            lowered("rocm", implementation="mosaic_gpu")


def test_many_rows_are_not_the_gpu_kernels():
    """XLA takes them unless the kernel is named: on an H200, cuBLAS after dequantizing wins from 256 rows."""
    assert backends.tried(4096) == ("xla",)
    with chips.target("h100"):
        assert backends.tried(128) == ("mosaic_gpu", "xla")
        assert backends.tried(129) == ("xla",)
    with chips.target("v6e"):
        assert backends.tried(4096) == ("mosaic_tpu", "xla")


@pytest.mark.parametrize(
    ("target", "platform", "dtype", "kernel"),
    [
        ("h100", "cuda", "bfloat16", True),
        ("h100", "cuda", "float16", True),
        ("rtx5090", "cuda", "bfloat16", False),
        ("v4", "tpu", "bfloat16", False),
    ],
)
def test_the_target_decides(target, platform, dtype, kernel):
    with chips.target(target):
        found = lowered(platform, dtype)
    kernel = kernel and (platform != "cuda" or MOSAIC_GPU)
    assert ("mosaic_gpu" in found or "tpu_custom_call" in found) is kernel


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_without_what_a_kernel_stands_on(platform, monkeypatch):
    """A JAX version without the kernel's API: XLA computes the product, and nothing is prepared."""
    modules = ("pallas_kernels.gpu.kernel", "pallas_kernels.gpu.gated"), ("pallas_kernels.tpu.decode",)
    for module in itertools.chain(*modules):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "pallas_kernels.tpu.layers", None)
    w, dense = random_weight(64, 64, 32, [1, 2])
    name = f"mosaic_{'gpu' if platform == 'cuda' else 'tpu'}"
    device = BY_SHORT_NAME["h100" if platform == "cuda" else "v6e"]
    with chips.target(dataclasses.replace(device, name="for which nothing has been traced")):
        assert "mosaic_gpu" not in (text := lowered(platform))
        assert "tpu_custom_call" not in text
        assert prepare(w) is w
        assert prepare_joined([[w, w]]) is None
        np.testing.assert_allclose(mixed_matmul(jnp.ones((2, 64)), w), jnp.ones((2, 64)) @ dense, rtol=1e-5)
        with pytest.raises(NotImplementedError, match=f"{name} does not import with jax {jax.__version__}"):
            mixed_matmul(jnp.ones((2, 64)), w, implementation=name)


def test_one_jitted_function_takes_each_implementation(monkeypatch):
    """The function is traced once per implementation, and runs the requested one."""
    w, _ = random_weight(32, 4, 32, [2])
    traced = []

    def fake(value):
        def kernel(x, w, residual):
            traced.append(value)
            return jnp.full((x.shape[0], w.shape[1]), value)

        return kernel

    for name, value in (("one", 1.0), ("two", 2.0)):
        monkeypatch.setitem(
            backends.BACKENDS, name, dataclasses.replace(backends.XLA, name=name, matmul=fake(value))
        )
    product = jax.jit(lambda x: mixed_matmul(x, w))
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 1.0)):
        with backends.use_implementation(name):
            np.testing.assert_array_equal(product(jnp.ones((1, 32))), np.full((1, 4), value))
    assert traced == [1.0, 2.0]
    with pytest.raises(ValueError, match="implementation is"):
        backends.use_implementation("three")


def test_the_gpu_kernel_needs_a_version_of_jax(monkeypatch):
    """An older version of JAX leaves the product to XLA, and nothing is prepared for the kernel."""
    monkeypatch.setattr(gpu_config, "JAX", (99, 1))
    w, _ = random_weight(64, 64, 32, [1, 2])
    with chips.target(dataclasses.replace(H100, name="an H100 of another kind")):
        assert "mosaic_gpu" not in lowered("cuda")
        assert prepare(w) is w
        with pytest.raises(NotImplementedError, match=f"needs jax 99.1 or newer, this is {jax.__version__}"):
            gpu.mixed_matmul(jnp.ones((2, 64)), w)
