"""The model-wide bit budget against brute force, and the gradient sweep that computes its costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slim_jax.calibrate import activations, sensitivity
from slim_jax.calibrate.pipeline import quantize
from slim_jax.config import SlimConfig
from slim_jax.method.budget import LayerCosts, group_errors, spend
from slim_jax.method.scale_search import fit_search
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear
from slim_jax.store.source import DecoderSource
from tests.test_pipeline import CONFIG, TOKENS

WIDTHS = (1, 2, 3, 4)


def random_costs(rng, groups: int, weights: int) -> LayerCosts:
    """Random costs that fall about fourfold per bit, as rounding errors do."""
    rise = rng.exponential(size=(groups, 1)) * 4.0 ** -np.arange(4) * rng.uniform(0.7, 1.3, (groups, 4))
    return LayerCosts(rise * weights, weights)


def cost(layers, allocation) -> float:
    return sum(
        np.minimum.accumulate(layer.rise, axis=1)[g, WIDTHS.index(b)]
        for name, layer in layers.items()
        for g, b in enumerate(allocation[name])
    )


def spent(layers, allocation) -> int:
    return sum(layer.weights * sum(allocation[name]) for name, layer in layers.items())


@pytest.mark.parametrize("seed", range(4))
def test_one_layer_is_exact(seed):
    layers = {"a": random_costs(np.random.default_rng(seed), 3, 64)}
    found = spend(layers, WIDTHS, 2.0)
    every = ({"a": list(bits)} for bits in itertools.product(WIDTHS, repeat=3) if sum(bits) <= 6)
    assert cost(layers, found) == pytest.approx(min(cost(layers, one) for one in every))


@pytest.mark.parametrize("seed", range(6))
def test_layers_share_the_budget_nearly_as_brute_force_does(seed):
    rng = np.random.default_rng(seed)
    layers = {"a": random_costs(rng, 3, 64), "b": random_costs(rng, 2, 192)}
    found = spend(layers, WIDTHS, 2.25)
    budget = 2.25 * (3 * 64 + 2 * 192)
    every = [
        {"a": list(bits[:3]), "b": list(bits[3:])}
        for bits in itertools.product(WIDTHS, repeat=5)
        if 64 * sum(bits[:3]) + 192 * sum(bits[3:]) <= budget
    ]
    best = min(cost(layers, one) for one in every)
    assert spent(layers, found) <= budget
    # One bit weight finds the best of all allocations that spend as much as it does.
    assert cost(layers, found) <= min(
        cost(layers, one) for one in every if spent(layers, one) <= budget - 192
    ) * (1 + 1e-9)
    assert cost(layers, found) >= best * (1 - 1e-9)


def test_few_mean_widths_and_the_whole_budget():
    rng = np.random.default_rng(0)
    layers = {f"{i}": random_costs(rng, 24, 64) for i in range(40)}
    found = spend(layers, WIDTHS, 2.25)
    assert {sum(bits) % 6 for bits in found.values()} == {0}
    budget = 2.25 * 40 * 24 * 64
    assert budget - 6 * 64 < spent(layers, found) <= budget
    assert cost(layers, found) < 0.8 * cost(layers, {name: [2] * 18 + [3] * 6 for name in layers})
    with pytest.raises(ValueError, match="expected at least 1, the smallest width"):
        spend(layers, WIDTHS, 0.5)


def test_errors_are_those_of_the_grids():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((64, 48)).astype(np.float32)
    importance = rng.exponential(size=64).astype(np.float32)
    found = group_errors(
        jnp.asarray(w), jnp.asarray(importance), widths=WIDTHS, group_size=32, zero_bits=4, sqc="search"
    )
    for group, (i, bits) in itertools.product(range(2), enumerate(WIDTHS)):
        rows = slice(32 * group, 32 * group + 32)
        grid = fit_search(
            jnp.asarray(w[rows]), jnp.asarray(importance[rows]), jnp.full(48, bits, jnp.float32), 4
        )
        error = np.asarray(w[rows] - grid.value(grid.code(jnp.asarray(w[rows]))), np.float64)
        wanted = np.sum(error**2 * importance[rows, None])
        assert found[group, i] == pytest.approx(wanted, rel=1e-4)


def test_layers_of_a_unit_have_one_width():
    rng = np.random.default_rng(0)
    groups = {"blocks.0.attn.q": 4, "blocks.0.attn.k": 4, "blocks.0.attn.o": 2, "blocks.1.attn.q": 4}
    costs = {
        name: LayerCosts(-np.sort(-rng.random((count, 3)), axis=1), 64 * count)
        for name, count in groups.items()
    }
    config = SlimConfig(bits=2.5, unit="layer", group_size=32).resolved()
    found, _ = sensitivity.spend_all(costs, config)
    assert {name: len(bits) for name, bits in found.items()} == groups
    assert all(len(set(bits)) == 1 for bits in found.values())
    assert found["blocks.0.attn.q"] == found["blocks.0.attn.k"]
    left = 2.5 * sum(layer.weights * groups[name] for name, layer in costs.items()) - spent(costs, found)
    assert left >= 0
    for unit in [("blocks.0.attn.q", "blocks.0.attn.k"), ("blocks.0.attn.o",), ("blocks.1.attn.q",)]:
        if found[unit[0]][0] < 4:  # what is left does not pay for one more bit
            assert sum(costs[name].weights * groups[name] for name in unit) > left
    assert len({bits[0] for bits in found.values()}) > 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bits": 2.5}, (2, 3, 4)),
        ({"bits": 5.5}, (5, 6, 8)),
        ({"bits": 3}, (3,)),
        ({"bits": 8, "method": "rtn"}, (8,)),
    ],
)
def test_widths_of_layers_are_those_of_engines(fields, expected):
    assert SlimConfig(unit="layer", **fields).resolved().widths == expected


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def test_token_weights_are_squared_differences_of_the_loss(model, monkeypatch):
    """Compares with central differences of the whole loss, moving each output of a layer at one token."""
    monkeypatch.setattr(activations, "COMPUTE_DTYPE", jnp.dtype(jnp.float32))
    tokens = TOKENS[:2]
    found = sensitivity.Sweep(DecoderSource(model), tokens, SlimConfig(group_size=32).resolved())
    inputs = found._inputs()
    gradients = found._loss_gradients(inputs.pop())
    raw = {}
    monkeypatch.setattr(sensitivity, "limited", lambda w: (raw.setdefault(len(raw), w), 1.0))
    for index in reversed(range(CONFIG.num_layers)):
        raw.clear()
        found._importance(index, inputs.pop(), gradients)
    weights = dict(zip(found.names[0], raw.values()))  # of block 0

    class Moved(Linear):
        def __init__(self, linear, by) -> None:
            self.weight, self.bias, self.by = linear.weight, linear.bias, by

        def __call__(self, x):
            return super().__call__(x) + self.by

    @jax.jit
    def loss(by):
        moved = nnx.merge(*nnx.split(model))
        moved.blocks[0].attn.v = Moved(moved.blocks[0].attn.v, by)
        logits = moved(jnp.asarray(tokens))[:, :-1]
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)

    token, step, n = (1, 5), 0.05, CONFIG.num_kv_heads * CONFIG.head_dim
    square = 0.0
    for channel in range(n):
        by = np.zeros((*tokens.shape, n), np.float32)
        by[(*token, channel)] = step
        square += ((float(loss(by)) - float(loss(-by))) / (2 * step)) ** 2
    assert weights["attn.v"][token] == pytest.approx(square / n, rel=0.05)
    assert weights["attn.v"][0, -1] == 0  # no token follows the last one


def test_limited():
    weights, mean = sensitivity.limited(np.r_[np.ones(99), 1e6])
    assert weights.max() / weights.min() == pytest.approx(sensitivity.LIMIT * (99 + 1e6) / 100, rel=1e-3)
    assert weights.mean() == pytest.approx(1)
    assert mean == pytest.approx((99 + 0.3 * (99 + 1e6)) / 100)
    assert np.all(sensitivity.limited(np.zeros(4))[0] == 1)


def test_without_a_choice_nothing_is_weighed(model):
    config = SlimConfig(bits=2, group_size=32, rules=[("*.attn.k", "skip"), ("*.attn.v", {"group_size": 64})])
    config = config.resolved()
    found = sensitivity.without_choice(model.config, config)
    assert found == sensitivity.Sweep(DecoderSource(model), TOKENS, config).run().allocation
    assert sensitivity.without_choice(model.config, SlimConfig(bits=2.25, group_size=32).resolved()) is None
    other = SlimConfig(bits=2, group_size=32, rules=[("blocks.1.attn.q", {"bits": 3})])
    assert set(sensitivity.without_choice(model.config, other.resolved())["blocks.1.attn.q"]) == {3}
    one_may_choose = SlimConfig(bits=2, group_size=32, rules=[("blocks.1.attn.q", {"bits": 2.5})])
    assert sensitivity.without_choice(model.config, one_may_choose.resolved()) is None


@pytest.mark.slow
def test_model_budget_quantizes_and_generates(model):
    config = SlimConfig(bits=2.25, group_size=32, criterion="model", tune=False)
    packed, report = quantize(model, TOKENS, config)
    sizes = [(sum(bits), len(bits)) for bits in report.allocation.values()]
    assert len({total / groups for total, groups in sizes}) > 1  # layers differ
    weights = {layer.name: layer.shape[1] for layer in report.layers}
    mean = sum(weights[n] * sum(b) for n, b in report.allocation.items())
    mean /= sum(weights[n] * len(b) for n, b in report.allocation.items())
    assert 2.0 < mean <= 2.25
    again, _ = quantize(model, TOKENS, config)
    for one, other in zip(jax.tree.leaves(nnx.state(packed)), jax.tree.leaves(nnx.state(again))):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2.25, "criterion": "kl"}, "expected a whole number unless criterion is 'model'"),
        ({"bits": 0.5, "criterion": "model"}, "bits is 0.5, expected 1 to 7"),
        ({"bits": 1.5, "unit": "layer"}, "bits is 1.5, expected 2 to 6"),
        ({"bits": 3, "unit": "layer", "criterion": "kl"}, "expected 'model' where unit is 'layer'"),
        ({"unit": "row"}, "unit is 'row', expected one of group, layer"),
    ],
)
def test_bits_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        SlimConfig(**fields)
