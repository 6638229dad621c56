"""The XLA back end, and features of the public function: batches, gradients, argument checks."""

import itertools
import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import ALLOCATIONS, SWEPT, MatmulCases, random_weight, random_x, slow, swept_in_pairs

from pallas_kernels import InputNorm, mixed_matmul, prepare, prepare_joined, use_implementation
from pallas_kernels.gpu.config import Config
from pallas_kernels.layout import stack
from pallas_kernels.xla import prepared


class TestXla(MatmulCases):
    implementation = "xla"

    @pytest.mark.parametrize("bits", [slow(2), 5, slow(6), slow(7)])
    def test_the_other_widths_in_prefill(self, bits):
        self.check(16, 70, 9, 32, [bits] * 3)

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("mean_bits", [2, slow(3), slow(4)])
    @pytest.mark.parametrize("m", [1, slow(17)])
    def test_every_allocation(self, allocation, mean_bits, m):
        self.check(m, 180, 17, 32, ALLOCATIONS[allocation](6, mean_bits), seed=mean_bits)

    def test_dense_product_when_rows_are_many(self):
        w, _ = random_weight(130, 24, 32, [1, 2, 3, 2, 2], dtype=jnp.bfloat16)
        x = random_x(64, 130)
        dense = jnp.dot(x.astype(jnp.bfloat16), jax.jit(w.dequantize)(), preferred_element_type=jnp.float32)
        np.testing.assert_array_equal(np.asarray(self.matmul(x, w)), np.asarray(dense))

    @pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 3, 96), (0, 96), (4, 5, 96)])
    def test_leading_axes_and_bias(self, shape):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        x, bias = random_x(*shape), random_x(6)
        found = self.matmul(x, w, bias=bias)
        np.testing.assert_allclose(found, np.asarray(x) @ dense + np.asarray(bias), rtol=1e-4, atol=1e-5)
        assert found.shape == (*shape[:-1], 6)

    @pytest.mark.parametrize("shape", [slow((96,)), (2, 3, 96)])
    def test_what_a_product_is_added_to(self, shape):
        w, _ = random_weight(96, 6, 32, [1, 2, 3])
        x, residual = random_x(*shape), random_x(*shape[:-1], 6, seed=1)
        both = jax.grad(lambda x, h: jnp.sum(jnp.sin(self.matmul(x, w, residual=h))), argnums=(0, 1))
        apart = jax.grad(lambda x, h: jnp.sum(jnp.sin(h + self.matmul(x, w))), argnums=(0, 1))
        np.testing.assert_array_equal(self.matmul(x, w, residual=residual), residual + self.matmul(x, w))
        for found, expected in zip(both(x, residual), apart(x, residual)):
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        ("m", "dtype"), [(2, jnp.bfloat16), (20, jnp.float32), slow(2, jnp.float32), slow(20, jnp.bfloat16)]
    )
    def test_gradient_is_the_dense_one(self, m, dtype):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        dense = jnp.asarray(dense, jnp.float32)
        x, bias = random_x(m, 96, dtype=dtype), random_x(6)

        def loss(x, bias, product):
            return jnp.sum(jnp.sin(product(x) + jnp.broadcast_to(bias, (m, 6))))

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        found = grad(x, bias, lambda x: self.matmul(x, w))
        expected = grad(x, bias, lambda x: x.astype(jnp.float32) @ dense)
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype
            tolerance = 2e-2 if a.dtype == jnp.bfloat16 else 1e-4
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance / 10
            )

    @pytest.mark.parametrize("m", [2, 12])
    def test_derivatives_forwards_and_of_derivatives(self, m):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        dense, (x, v) = jnp.asarray(dense, jnp.float32), random_x(2, m, 96)

        def derivatives(product):
            def loss(x):
                return jnp.sum(jnp.sin(product(x)))

            grad = jax.grad(loss)
            both = jnp.stack([x, v])
            return (
                jax.jvp(loss, (x,), (v,))[1],
                jax.jvp(grad, (x,), (v,))[1],
                jax.grad(lambda x: jnp.vdot(grad(x), v))(x),
                jax.vmap(grad)(both),
                jax.grad(lambda both: jnp.sum(jax.vmap(loss)(both)))(both),
            )

        found = jax.jit(lambda: derivatives(lambda x: mixed_matmul(x, w)))()
        for one, wanted in zip(found, jax.jit(lambda: derivatives(lambda x: x @ dense))()):
            np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("m", [4, 12])
    def test_the_gradient_is_taken_in_the_weights_dtype(self, m):
        """A bfloat16 weight is not converted to float32 for the backward pass, nor kept dense until then."""
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        w, x = w.astype(jnp.bfloat16), random_x(m, 96)
        dy = random_x(m, 6, seed=2)
        forwards, back = jax.vjp(lambda x: self.matmul(x, w), x)
        text = jax.jit(back).lower(forwards).as_text()
        assert re.findall(r"dot_general.*: \((.*)\) ->", text) == [f"tensor<{m}x6xbf16>, tensor<96x6xbf16>"]
        assert {leaf.shape for leaf in jax.tree.leaves(back)} & {(96, 6)} == set()
        error = np.abs(back(dy)[0] - np.asarray(dy) @ dense.T)
        assert np.max(error / (np.abs(dy) @ np.abs(dense.T))) < 2.0**-7

    def test_weight_is_a_constant_of_the_gradient(self):
        w, _ = random_weight(96, 6, 32, [1, 2, 3], scales_in_bytes=False)
        grad = jax.grad(lambda w: self.matmul(random_x(2, 96), w).sum(), allow_int=True)(w)
        assert not np.any(np.asarray(grad.scale, np.float32))
        assert grad.words.dtype == jax.dtypes.float0

    @pytest.mark.parametrize("m", [1, 12])
    def test_vmap(self, m):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        x = random_x(3, m, 96)
        self.assert_close(jax.vmap(lambda x: self.matmul(x, w))(x), x, dense)

    @pytest.mark.parametrize("several", ["weights", "both", "residuals"])
    def test_vmap_over_others(self, several):
        pairs = [
            random_weight(96, 6, 32, bits, i, widths=(1, 2, 3)) for i, bits in enumerate(([1, 2, 3], [2] * 3))
        ]
        ws, denses = stack([w for w, _ in pairs]), np.stack([dense for _, dense in pairs])
        x, residual = random_x(2, 3, 96), random_x(2, 3, 6, seed=2)
        if several == "residuals":
            found = jax.vmap(lambda residual: self.matmul(x[0], ws[0], residual=residual))(residual)
            wanted = residual + (np.asarray(x[0]) @ denses[0])[None]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
            return
        axes = (None if several == "weights" else 0, 0, 0)
        run = jax.vmap(lambda x, w, residual: self.matmul(x, w, residual=residual), in_axes=axes)
        x = x[0] if several == "weights" else x
        np.testing.assert_allclose(
            run(x, ws, residual), residual + np.asarray(x) @ denses, rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("m", [1, 12])
    def test_scan_over_stacked_layers(self, m):
        allocations = [1, 2, 3], [2, 2, 2], [3, 2, 1]
        layers = [random_weight(96, 96, 32, bits, i, widths=(1, 2, 3)) for i, bits in enumerate(allocations)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in layers))
        x = random_x(m, 96)
        found, _ = jax.jit(lambda x, ws: jax.lax.scan(lambda x, w: (self.matmul(x, w), None), x, ws))(
            x, stacked
        )
        expected = np.asarray(x, np.float64)
        for _, dense in layers:
            expected = expected @ dense
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("m", [3, slow(1), slow(12)])
def test_weights_that_read_one_input_are_one_product(m):
    """Each weight has its own widths, order of groups and rows, which also differ between layers."""
    sizes, allocations = (64, 32, 96), ([1, 2, 3], [3, 2, 1], [4, 2, 2], [1, 1, 2])
    layers, denses = [], []
    for i in range(2):
        pairs = [
            random_weight(80, n, 32, allocations[i + j], 10 * i + j, widths=(1, 2, 3, 4))
            for j, n in enumerate(sizes)
        ]
        layers.append([w for w, _ in pairs])
        denses.append(np.concatenate([dense for _, dense in pairs], axis=1))
    joined = jax.jit(partial(prepare_joined, implementation="xla"))(layers)
    assert joined.sizes == sizes
    assert joined.words.shape[1] == 32  # a tile fits them all
    x = random_x(m, 80)
    dequantized = jax.jit(lambda i: joined.at(i).dequantize())
    product = jax.jit(lambda x, i: mixed_matmul(x, joined.at(i), implementation="xla"))
    for i, dense in enumerate(denses):
        TestXla().assert_close(product(x, jnp.int32(i)), x, dense)
        np.testing.assert_array_equal(dequantized(jnp.int32(i)), np.float32(dense))
    gradient = jax.jit(jax.grad(lambda x: product(x, jnp.int32(1)).sum()))(x)
    TestXla().assert_close(gradient, jnp.ones((m, sum(sizes))), denses[1].T)
    with pytest.raises(ValueError, match="scan over stacked"):
        mixed_matmul(x, joined, implementation="xla")


def test_a_group_size_that_is_no_power_of_two():
    w, dense = random_weight(192, 8, 96, [2, 3])
    x = random_x(1, 192)
    TestXla().assert_close(TestXla().matmul(x, w), x, dense)


def test_weights_that_do_not_fit_together_are_not_joined():
    w, _ = random_weight(96, 64, 32, [1, 2, 3])
    narrow, _ = random_weight(96, 6, 32, [1, 2, 3])
    other, _ = random_weight(64, 64, 32, [1, 2])
    for second in (narrow, other):
        assert prepare_joined([[w, second]], implementation="xla") is None
    assert prepare_joined([[w, other]], implementation="mosaic_tpu") is None
    for name in ("xla", "mosaic_tpu"):
        assert prepare_joined([[w, w]], implementation=name).shape == (96, 128)


def test_weights_joined_for_a_tpu_are_multiplied_elsewhere():
    """A program that was prepared for a TPU also runs on a CPU, including its gradient."""
    made = [random_weight(96, n, 32, bits, n) for n, bits in ((64, [1, 2, 3]), (40, [3, 2, 2]))]
    dense, x = np.concatenate([dense for _, dense in made], axis=1), random_x(3, 96)
    w = prepare_joined([[w for w, _ in made]], implementation="mosaic_tpu")
    product = jax.jit(lambda x: mixed_matmul(x, w, implementation=("mosaic_tpu", "xla")))
    TestXla().assert_close(product(x), x, dense)
    gradient = jax.jit(jax.grad(lambda x: product(x).sum()))(x)
    TestXla().assert_close(gradient, jnp.ones((3, 104)), dense.T)


def test_columns_of_a_weight_in_tiles(monkeypatch):
    monkeypatch.setattr(prepared, "TILE", 512)
    w, dense = random_weight(96, 1536, 32, [1, 2, 3])
    ready = prepare(w, implementation="xla")
    assert ready.words.shape[1] == 512
    index = jnp.asarray([[0, 511, 512], [1535, 7, 1024]])
    np.testing.assert_array_equal(jax.jit(ready.columns)(index), np.float32(dense).T[np.asarray(index)])
    TestXla().assert_close(TestXla().matmul(random_x(1, 96), ready), random_x(1, 96), dense)


@pytest.mark.parametrize("name", [None, "xla", "mosaic_gpu", "mosaic_tpu"])
def test_export_of_a_symbolic_batch(name):
    """Exports a packed weight, and the weights that back ends prepare; XLA multiplies all of them here."""
    w, dense = random_weight(64, 32, 32, [1, 2])
    w = w if name is None else prepare(w, implementation=name)
    assert name is None or w.implementation == name
    if name == "mosaic_gpu":
        w = w.behind(InputNorm(jnp.ones(64), 1e-6))
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    product = jax.jit(lambda x, w: mixed_matmul(x, w, bias=jnp.ones(32), residual=x[:, :32]))
    stored = jax.export.export(product, platforms=["cpu", "cuda", "tpu"])(x, w).serialize()
    call = jax.export.deserialize(stored).call
    for m in (1, 3, 20):
        x = random_x(m, 64)
        own = np.asarray(w.norm(x)) if name == "mosaic_gpu" else np.asarray(x)
        np.testing.assert_allclose(call(x, w), own @ dense + 1 + x[:, :32], rtol=1e-4, atol=1e-4)


def test_export_and_import():
    w, dense = random_weight(96, 6, 32, [1, 2, 3])
    x = random_x(2, 96)
    product = jax.jit(lambda x, w: mixed_matmul(x, w, implementation="xla"))
    stored = jax.export.export(product, platforms=["cpu", "cuda", "tpu"])(x, w).serialize()
    TestXla().assert_close(jax.export.deserialize(stored).call(x, w), x, dense)


@pytest.mark.parametrize(
    ("x_shape", "kwargs", "message"),
    [
        ((3, 95), {}, r"x has shape \(3, 95\), expected \[\.\.\., 96\]"),
        ((3, 96), {"bias": jnp.zeros(5)}, "bias has shape"),
        ((3, 96), {"residual": jnp.zeros((2, 6))}, r"residual has shape \(2, 6\), expected \(3, 6\)"),
        ((3, 96), {"implementation": "triton"}, "implementation is 'triton'"),
        ((3, 96), {"implementation": ("xla", "cuda")}, "expected one or more of"),
        ((3, 96), {"implementation": ()}, "expected one or more of"),
    ],
)
def test_rejects_what_the_caller_got_wrong(x_shape, kwargs, message):
    w, _ = random_weight(96, 6, 32, [1, 2, 3])
    with pytest.raises(ValueError, match=message):
        mixed_matmul(jnp.zeros(x_shape), w, **kwargs)


def test_rejects_integers_scalars_and_stacked_weights():
    w, _ = random_weight(96, 6, 32, [1, 2, 3])
    for x in (jnp.zeros((3, 96), jnp.int32), jnp.float32(1)):
        with pytest.raises((ValueError, TypeError)):  # TypeError from the annotations, checked in tests
            mixed_matmul(x, w)
    with pytest.raises(ValueError, match="scan over stacked"):
        mixed_matmul(jnp.zeros((3, 96)), jax.tree.map(lambda leaf: leaf[None], w))


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_a_back_end_of_another_platform_says_so_or_gives_way(name):
    w, dense = random_weight(96, 6, 32, [1, 2, 3])
    x = random_x(2, 96)
    with pytest.raises(ValueError, match="CPU"):
        mixed_matmul(x, w, implementation=name)
    TestXla().assert_close(mixed_matmul(x, w, implementation=(name, "xla")), x, dense)
    with use_implementation(name, "xla"):
        gradient = jax.jit(jax.grad(lambda x: mixed_matmul(x, w).sum()))(x)
    TestXla().assert_close(gradient, jnp.ones((2, 6)), dense.T)


def test_the_dtype_of_the_result_is_the_caller_s():
    w, _ = random_weight(64, 16, 32, [2, 2])
    x = random_x(3, 64)
    found = mixed_matmul(x, w, preferred_element_type=jnp.bfloat16)
    np.testing.assert_array_equal(found, mixed_matmul(x, w).astype(jnp.bfloat16))


def test_a_configuration_is_for_the_kernel_that_is_named():
    w, _ = random_weight(64, 128, 32, [2, 2])
    x, config = random_x(3, 64), Config(block_n=64)
    product = partial(mixed_matmul, x, w, config=config)
    jaxpr = str(jax.make_jaxpr(partial(product, implementation="mosaic_gpu"))())
    other = str(jax.make_jaxpr(partial(mixed_matmul, x, w, implementation="mosaic_gpu"))())
    assert jaxpr != other
    for names in (None, "xla", ("mosaic_gpu", "xla")):
        with pytest.raises(ValueError, match="config is for one of"):
            product(implementation=names)


def test_swept_pairs_meet():
    for (i, first), (j, second) in itertools.combinations(enumerate(SWEPT.values()), 2):
        met = {(case[i], case[j]) for case in swept_in_pairs()}
        assert met == set(itertools.product(first, second))
