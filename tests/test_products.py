"""Layers of Flax modules as matrix products: einsums, dtypes, and layers that are no products."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import pack
from slim_jax import SlimConfig, quantize_module
from slim_jax.modules import capture, products
from slim_jax.modules import learning as module_learning
from slim_jax.modules.quantize import PackedLinear

EINSUMS = [
    ("BTD,DNH->BTNH", (8, 4, 32), (32, 2, 16), (2, 16), {}),
    ("BTD, NDH -> NTBH", (8, 4, 32), (2, 32, 16), (2, 1, 16), {}),
    (
        "BTNH,NHD->BTD",
        (8, 4, 2, 16),
        (2, 16, 32),
        None,
        {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
    ),
    ("...d,fd->...f", (2, 8, 4, 32), (32, 32), (32,), {"param_dtype": jnp.bfloat16}),
    ("BTD,FTD->FB", (8, 4, 8), (32, 4, 8), (32,), {}),
]


@pytest.mark.parametrize(("equation", "given", "shape", "bias", "options"), EINSUMS)
def test_a_packed_einsum_is_the_einsum(equation, given, shape, bias, options):
    """A packed einsum equals the einsum of its kernel in float64; calibration sees the rows of the input."""
    rng, ones = np.random.default_rng(0), nnx.initializers.ones_init()
    layer = nnx.Einsum(equation, shape, bias, bias_init=ones, rngs=nnx.Rngs(0), **options)
    scale, bits = np.full((1, 32), 0.01), np.array([8])
    tensor = pack(rng.integers(0, 256, (32, 32)), scale, np.full((1, 32), 128), bits, group_size=32)
    packed = PackedLinear(layer, dataclasses.replace(tensor, dtype=layer.kernel.dtype))
    x = rng.normal(size=given).astype(np.float32)
    layer.kernel[...] = packed.product.kernel(tensor.dequantize()).astype(layer.kernel.dtype)
    exact = np.einsum(equation, x.astype(np.float64), np.asarray(layer.kernel[...], np.float64))
    tolerance = {"rtol": 0.02, "atol": 0.05} if options else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(packed(x), exact + (bias is not None), **tolerance)
    assert packed(x).dtype == layer(x).dtype
    seen = []
    capture.watch({"layer": layer}, lambda: layer(x), lambda _, rows: seen.append(rows))
    rows = np.asarray(seen[0], np.float64) @ np.asarray(tensor.dequantize(), np.float64)
    np.testing.assert_allclose(np.sort(rows, axis=None), np.sort(exact, axis=None), **tolerance)


class Einsums(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.Einsum("BTD,DNH->BTNH", (32, 2, 16), (2, 16), rngs=rngs)
        self.o = nnx.Einsum("BTNH,NHD->BTD", (2, 16, 32), rngs=rngs)
        self.experts = nnx.Einsum("BTD,TDF->BTF", (4, 32, 8), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.experts(self.o(nnx.relu(self.q(x))))


def test_einsums_are_quantized():
    net, x = Einsums(nnx.Rngs(0)), np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    found, report = quantize_module(net, [x], SlimConfig(bits=8, group_size=32, method="rtn"))
    assert [layer.name for layer in report.layers] == ["q", "o"]
    reason = "its equation is BTD,TDF->BTF, expected one matrix, not one for each T"
    assert report.skipped == {"experts": f"Einsum float32[4, 32, 8]: {reason}"}
    np.testing.assert_allclose(found(x), net(x), atol=0.02 * float(jnp.abs(net(x)).max()))
    assert type(found.q) is type(found.o) is PackedLinear
    weight = found.o.product.matrix(net.o.kernel[...])
    learning = module_learning._with_weights(nnx.clone(net), {"o": jnp.pad(2 * weight, ((0, 3), (0, 0)))})
    np.testing.assert_array_equal(learning.o.kernel[...], 2 * net.o.kernel[...])


@pytest.mark.parametrize(
    ("equation", "shape", "says"),
    [
        ("ECD,EDF->ECF", (2, 32, 8), "expected one matrix, not one for each E"),
        ("ab,bcd->ad", (4, 3, 2), "over no others"),
        ("abc,cd->bd", (4, 3), "over no others"),
        ("ab,cd->abcd", (4, 3), "a sum over axes that input and kernel share"),
        ("aab,bc->ac", (4, 3), "every axis by name, once"),
        ("ab,...bc->...ac", (2, 4, 3), "every axis by name, once"),
        ("a...b,bc->a...c", (4, 3), "... for an output's first axes alone"),
    ],
)
def test_einsums_that_are_none(equation, shape, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        products.einsum_product(equation, shape)


class Kinds(nnx.Module):
    """Layers with their own compute and output dtypes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        half = jnp.bfloat16
        self.layers = nnx.List(
            [
                nnx.Linear(32, 8, rngs=rngs),
                nnx.Linear(32, 8, param_dtype=half, rngs=rngs),
                nnx.Linear(32, 8, use_bias=False, dtype=half, rngs=rngs),
                nnx.Linear(32, 8, dtype=half, preferred_element_type=jnp.float32, rngs=rngs),
                nnx.LinearGeneral(32, (2, 4), rngs=rngs),
            ]
        )
        self.own = nnx.Linear(32, 8, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        return [self.own(x), *(layer(x) for layer in self.layers)]


def test_dtypes_are_those_of_the_layers():
    """Integer inputs are accepted too, as by the layers."""
    net, x = Kinds(nnx.Rngs(0)), np.random.default_rng(0).integers(-3, 4, (16, 32))
    found, report = quantize_module(net, [x], SlimConfig(bits=8, group_size=32, method="rtn"))
    assert report.skipped == {"own": "Linear float32[32, 8]: its dot_general is a function of its own"}
    for kind in (jnp.int32, jnp.int8, jnp.bfloat16, jnp.float32):
        for y, wanted in zip(found(x.astype(kind)), net(x.astype(kind)), strict=True):
            assert y.dtype == wanted.dtype
            np.testing.assert_allclose(y.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.1)


def test_a_module_of_other_layers_alone():
    with pytest.raises(ValueError, match=r"none of no layers; embedding is Embed float32\[8, 4\]: its class"):
        quantize_module(nnx.Embed(8, 4, rngs=nnx.Rngs(0)), [np.zeros((2, 3), np.int32)], SlimConfig(bits=4))
