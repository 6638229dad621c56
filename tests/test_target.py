"""The table of chips: names are found as JAX prints them, and a program's target is part of jit's key."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import chips
from pallas_kernels.chips import BY_SHORT_NAME, find


@pytest.mark.parametrize(
    ("kind", "short"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("TPU7x", "v7x"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("H100", "h100"),
    ],
)
def test_names(kind, short):
    assert find(kind) is chips.BY_SHORT_NAME[short]


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v3", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 NVL", ""]
)
def test_unknown_names(kind):
    assert find(kind) is None
    with pytest.raises(ValueError, match="expected one of v4"):
        chips.target(kind)


def test_the_table_is_whole():
    """Every name finds its own record, and the fields that all chips have are set, in plausible units."""
    for device in chips.DEVICES:
        assert find(device.name) is find(device.short) is device
        assert 2**34 <= device.memory_bytes < 2**38
        assert 1e11 < device.bandwidth < 1e13
        assert device.bfloat16_flops is None or 1e13 < device.bfloat16_flops < 1e16
        assert (device.l2_bytes is None) == (device.platform == "tpu")
        assert 2**16 <= device.scratch_bytes <= 2**27
        assert device.processors >= 1


def test_what_the_table_lacks_the_device_says():
    gpu = SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA RTX A6000",
        compute_capability="8.6",
        shared_memory_per_block_optin=101376,
        core_count=84,
    )
    found = chips.describe(gpu)
    assert (found.platform, found.scratch_bytes, found.processors) == ("cuda", 101376, 84)
    assert found.bandwidth is None
    amd = SimpleNamespace(platform="gpu", device_kind="AMD Radeon", compute_capability="gfx1100")
    assert chips.describe(amd).platform == "rocm"
    assert chips.describe(jax.devices()[0]).platform == "cpu"


def test_the_target_is_part_of_the_key():
    names = []

    @jax.jit
    def program(x):
        names.append(chips.of_target().short)
        return x + 1

    for device in ("h100", "TPU v5 lite", chips.BY_SHORT_NAME["h100"]):
        with chips.target(device):
            program(jnp.ones(3))
            program(jnp.ones(3))
    assert names == ["h100", "v5e"]
    assert chips.of_target().platform == "cpu"


def test_the_target_of_an_abstract_mesh():
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    with use_abstract_mesh(mesh):
        assert chips.of_target().short == "v6e"
        with chips.target("l4"):
            assert chips.of_target().short == "l4"


@pytest.mark.parametrize(("short", "platform"), [("mi300x", "rocm"), ("h100", "cuda")])
def test_a_gpu_in_an_abstract_mesh(short, platform):
    """The mesh's platform is "gpu" for every vendor."""
    device = AbstractDevice(device_kind=BY_SHORT_NAME[short].name, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        assert chips.of_target() is BY_SHORT_NAME[short]
        assert chips.of_target().platform == platform


def test_what_an_abstract_mesh_lacks_the_device_says(monkeypatch):
    """The mesh's device has only a name; the present one also has a compute capability."""
    here = SimpleNamespace(device_kind="NVIDIA RTX 9", platform="gpu", compute_capability="12.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    device = AbstractDevice(device_kind=here.device_kind, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        assert chips.of_target().compute_capability == "12.0"


def test_a_described_device_is_a_target():
    small = dataclasses.replace(chips.BY_SHORT_NAME["h100"], scratch_bytes=1000)
    with chips.target(small):
        assert chips.of_target() is small
