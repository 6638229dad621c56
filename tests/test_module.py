"""Quantization of Flax modules that are not decoders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slim_jax import LearningEpoch, SlimConfig, quantize_module
from slim_jax.calibrate import activations
from slim_jax.modules import capture, quantize
from slim_jax.modules.quantize import PackedKernel, PackedLinear

CONFIG = SlimConfig(bits=4, group_size=32)
PLUS = SlimConfig(bits=2, group_size=32, method="slim-plus", refine=0, epochs=5)


class Net(nnx.Module):
    """A convolution with stride and dilation, attention, a layer that is used twice, and one that is not."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 16, (3, 5), strides=(2, 1), kernel_dilation=(1, 2), rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.twice = nnx.List([nnx.Linear(16, 16, rngs=rngs)])
        self.again = self.twice[0]
        self.named = nnx.Dict(head=nnx.Linear(16, 4, use_bias=False, rngs=rngs))
        self.unused = nnx.Linear(3, 3, rngs=rngs)
        self.grouped = nnx.Conv(16, 16, (1,), feature_group_count=2, rngs=rngs)
        self.table = nnx.Param(jnp.eye(4))  # a parameter of no known layer class

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        x = x.reshape(x.shape[0], -1, 16)
        x = x + self.attn(x)
        x = self.grouped(self.again(nnx.relu(self.twice[0](x))))
        return self.named["head"](x)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches() -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(4, 6, 5, 3)).astype(np.float32) for i in range(3)]


@pytest.fixture(scope="module")
def quantized(net, batches):
    return quantize_module(net, batches, CONFIG)


def test_what_was_quantized_and_what_not(net, quantized):
    found, report = quantized
    names = [layer.name for layer in report.layers]
    assert names[0] == "conv"
    assert names[-1] == "named.head"
    assert names.index("attn.out") > max(names.index(f"attn.{n}") for n in ("query", "key", "value"))
    assert len(names) == len(set(names)) == 7
    assert report.skipped == {
        "grouped": "Conv float32[1, 8, 16]: its channels are in 2 groups, expected 1",
        "unused": "Linear float32[3, 3]: it is not called",
        "table": "Net float32[4, 4]: its class is none of Linear, LinearGeneral, Conv, Einsum",
    }
    assert isinstance(found.conv.kernel, PackedKernel)
    assert isinstance(found.attn.out, PackedLinear)
    assert found.again is found.twice[0]
    assert isinstance(found.again, PackedLinear)
    assert type(net.again) is nnx.Linear  # the given module is unchanged


def test_outputs_are_near(net, quantized, batches):
    found, _ = quantized
    expected = net(batches[0])
    for run in (lambda x: found(x), nnx.jit(lambda x: found(x))):
        error = jnp.sqrt(jnp.mean((run(batches[0]) - expected) ** 2) / jnp.mean(expected**2))
        assert 0 < error < 0.2


def test_eight_bits_are_almost_exact(net, batches):
    """If the order of a patch's entries or the shapes of attention were wrong, this would be far off."""
    found, report = quantize_module(net, batches, SlimConfig(bits=8, group_size=32, method="gptq"))
    expected = net(batches[0])
    np.testing.assert_allclose(found(batches[0]), expected, atol=0.02 * float(jnp.abs(expected).max()))
    assert max(layer.error for layer in report.layers) < 1e-3


def test_calibration_sees_the_patches(net, batches):
    """GPTQ propagates errors along the inputs' correlations: it beats rounding on smooth images."""
    smooth = [np.cumsum(np.cumsum(x, axis=1), axis=2) for x in batches]
    errors = {}
    for method in ("gptq", "rtn"):
        config = SlimConfig(bits=2, group_size=32, method=method, sqc="search")
        found, _ = quantize_module(net, smooth, config, select=["conv"])
        errors[method] = sum(float(jnp.sum((found.conv(x) - net.conv(x)) ** 2)) for x in smooth)
    assert errors["gptq"] < 0.8 * errors["rtn"]


class Twice(nnx.Module):
    """A module with one layer in two places, called in both."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.once = self.again = nnx.Linear(32, 32, rngs=rngs)
        self.out = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.again(nnx.relu(self.once(x)))))


def test_slim_plus_learns_by_the_outputs():
    """The packed weights have the validation loss that is reported for the kept epoch."""
    net, rng, losses, seen = Twice(nnx.Rngs(0)), np.random.default_rng(0), [], []
    batches = [rng.normal(size=(64, 32)).astype(np.float32) for _ in range(16)]
    found, report = quantize_module(net, batches, PLUS, on_event=seen.append)
    plain, _ = quantize_module(net, batches, dataclasses.replace(PLUS, method="slim"))
    for made in (plain, found):
        outputs = [(made(x), net(x)) for x in batches[::8]]  # the validation batches
        losses.append(np.mean([jnp.sum((y - t) ** 2) / jnp.sum(t**2) for y, t in outputs]))
    learning = report.learning
    assert learning.losses[0] == pytest.approx(losses[0], rel=1e-2)
    assert learning.losses[learning.kept_epoch] == pytest.approx(losses[1], rel=1e-2)
    assert losses[1] < 0.8 * losses[0]
    assert seen == [LearningEpoch(i, 5, loss) for i, loss in enumerate(learning.losses[1:], 1)]
    assert len(seen) == 5
    assert found.again is found.once
    assert isinstance(found.again, PackedLinear)


def test_selection(net, batches):
    found, report = quantize_module(net, batches, CONFIG, select=["attn.*", "heads.*"])
    assert {layer.name for layer in report.layers} == {f"attn.{n}" for n in ("query", "key", "value", "out")}
    assert report.unmatched == ["heads.*"]
    assert report.skipped["again"] == "Linear float32[16, 16]: it is not selected"
    assert type(found.again) is nnx.Linear


def test_state_passes_through_split_and_merge(quantized, batches):
    found, _ = quantized
    merged = nnx.merge(*nnx.split(found))
    np.testing.assert_array_equal(merged(batches[0]), found(batches[0]))


class Jitted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.jit(lambda layer, x: layer(x))(self.inner, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "no batches"),
        ({"select": ["head.*"]}, "matches none of again, attn.key"),
        ({"config": SlimConfig(bits=2.5)}, "bits is 2.5, expected a whole number"),
        ({"config": PLUS, "forward": lambda net, x: [bool(net(x).sum() > 0)]}, "no floating-point array"),
        ({"config": PLUS, "forward": lambda net, x: net(x) if net(x).sum() > 0 else x}, "JAX can trace"),
        ({"module": Jitted(nnx.Rngs(0)), "batches": [jnp.ones((1, 4))]}, "inside a JAX transformation"),
    ],
)
def test_mistakes(net, batches, change, message):
    arguments = {"module": net, "batches": batches, "config": CONFIG, **change}
    with pytest.raises(ValueError, match=message):
        quantize_module(**arguments)


def test_rules(net, batches):
    rules = [
        ("attn.out", "skip"),
        ("attn.*", {"bits": 3}),
        ("re:twice.*|again", {"method": "rtn", "bits": 8}),
    ]
    config = SlimConfig(bits=4, group_size=64, rules=[*rules, ("conv", {"group_size": 32})])
    found, report = quantize_module(net, batches, config)
    layers = {layer.name: layer for layer in report.layers}
    assert report.skipped["attn.out"] == "LinearGeneral float32[2, 8, 16]: a rule skips it"
    assert type(found.attn.out) is nnx.LinearGeneral
    bits = {name: layer.bits for name, layer in layers.items()}
    assert bits["again"] == {"8": 1}
    assert all(bits[f"attn.{name}"] == {"3": 1} for name in ("query", "key", "value"))
    assert {layer.group_size for name, layer in layers.items() if name != "conv"} == {64}
    assert layers["conv"].group_size == 32
    assert sum(int(width) * count for width, count in bits["conv"].items()) == 4 * 2
    with pytest.raises(
        ValueError, match=r"'attn\.q': it matches none of the 9 layers, near names: attn\.query"
    ):
        quantize_module(net, batches, SlimConfig(rules=[("attn.q", "skip")]))
    with pytest.raises(ValueError, match=r"rule 'conv': bits is 2\.5, expected a whole number"):
        quantize_module(net, batches, SlimConfig(rules=[("conv", {"bits": 2.5})]))


STAGES = [["conv"], ["attn.key", "attn.query", "attn.value"], ["attn.out"], ["again"], ["named.head"]]


def test_a_stage_is_what_does_not_depend_on_one_another(net, batches, monkeypatch):
    runs, observed = [], []

    def forward(module, batch):
        runs.append(len(batch))
        return module(batch)

    found = []
    monkeypatch.setattr(quantize, "find_stages", lambda *a: found.extend(capture.find_stages(*a)) or found)
    monkeypatch.setattr(quantize, "observe", lambda *a: observed.append(a) or activations.observe(*a))
    quantized, _ = quantize_module(net, batches, CONFIG, forward=forward)
    assert [sorted(stage) for stage in found] == STAGES
    assert len(observed) == len(STAGES)  # query, key and value share their input
    # One run to see what is called and one before the search for stages; one per stage, and one per stage and
    # batch.
    assert len(runs) == 2 + len(STAGES) + len(STAGES) * len(batches)
    one_by_one = [[path] for stage in found for path in stage]
    monkeypatch.setattr(quantize, "find_stages", lambda *a: one_by_one)
    expected, _ = quantize_module(net, batches, CONFIG)
    for a, b in zip(jax.tree.leaves(nnx.state(quantized)), jax.tree.leaves(nnx.state(expected)), strict=True):
        np.testing.assert_array_equal(a, b)


class Noisy(nnx.Module):
    """A module that never returns the same value twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(3)])
        self.count = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count += 1
        return sum(layer(x + self.count) for layer in self.layers)


def test_layers_of_a_noisy_module_are_stages_of_their_own(monkeypatch):
    found = []
    monkeypatch.setattr(quantize, "find_stages", lambda *a: found.extend(capture.find_stages(*a)) or found)
    _, report = quantize_module(
        Noisy(nnx.Rngs(0)), [jnp.ones((4, 32))], SlimConfig(method="rtn", group_size=32)
    )
    assert found == [["layers.0"], ["layers.1"], ["layers.2"]]
    assert len(report.layers) == 3
