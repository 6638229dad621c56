"""Training next to packed weights: these are constants, without gradient or optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_generate import packed, tiny

from pallas_kernels import MixedTensor, pack
from slim_jax.infer.generate import Generator
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed
from slim_jax.model.params import make_decoder, split_params
from slim_jax.modules.quantize import PackedLinear

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


def codes(model: nnx.Module) -> list[np.ndarray]:
    """Copies of every leaf of every packed weight."""
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(nnx.state(model, Packed))]


def train(model: nnx.Module, loss, steps: int = 3, rate: float = 3e-3) -> list[float]:
    """Losses of a few steps; checks that every packed weight stays the same, bit for bit."""
    before = codes(model)
    assert any(leaf.dtype == np.uint32 for leaf in before)
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    for a, b in zip(before, codes(model), strict=True):
        np.testing.assert_array_equal(a, b)
    return losses


def next_token_loss(model: Decoder) -> jax.Array:
    logits = model(jnp.asarray(TOKENS[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS[:, 1:])).mean()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """A decoder rebuilt from its parameters, as `load` and `quantize` build one."""
    model = packed(tiny(qkv_bias=True, num_layers=1, intermediate_size=64), bits=(1, 2))
    return make_decoder(model.config, *split_params(model))


def test_norms_biases_embeddings_and_lora_of_a_packed_decoder(decoder):
    attn = decoder.blocks[0].attn
    for layer, n in (("q", 64), ("v", 32)):
        lora = nnx.LoRA(64, 4, n, base_module=getattr(attn, layer), rngs=nnx.Rngs(1))
        setattr(attn, layer, lora)
    params = jax.tree.leaves(nnx.state(decoder, nnx.Param))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in params)
    assert len(params) == 1 + 2 + 1 + 3 + 4  # embedding, norms of the block, final norm, biases, LoRA
    start = [np.asarray(leaf).copy() for leaf in params]
    losses = train(decoder, next_token_loss)
    assert np.all(np.diff(losses) < 0), losses
    assert all(np.any(a != b) for a, b in zip(start, jax.tree.leaves(nnx.state(decoder, nnx.Param))))
    assert Generator(decoder).stacked == [True]  # finds its packed layers inside the LoRA modules


def test_the_bias_of_a_packed_linear_and_a_layer_before_it():
    rng = np.random.default_rng(1)
    weight = pack(
        rng.integers(0, 4, (32, 8)),
        rng.random((1, 8)) * 0.1 + 0.1,
        rng.integers(0, 16, (1, 8)),
        np.array([2]),
        group_size=32,
    )

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(4, 32, rngs=nnx.Rngs(0))
            self.second = PackedLinear(nnx.Linear(32, 8, rngs=nnx.Rngs(1)), weight)

    x, y = jax.random.normal(jax.random.key(0), (16, 4)), jax.random.normal(jax.random.key(1), (16, 8))
    net = Net()
    losses = train(net, lambda net: jnp.mean((net.second(net.first(x)) - y) ** 2), rate=1e-2)
    assert np.all(np.diff(losses) < 0), losses
    assert np.any(net.second.bias[...] != 0)


def test_parameters_of_both_kinds_are_split_and_filled():
    model = packed(tiny(num_layers=1, intermediate_size=64), bits=(1, 2))
    outer, (block,) = split_params(model)
    assert isinstance(block["attn.q.weight"], MixedTensor)
    block["attn.q.weight"] = block["attn.q.weight"].dequantize()
    again = make_decoder(model.config, outer, [block]).blocks[0].attn
    assert (type(again.q.weight), type(again.k.weight)) == (nnx.Param, Packed)
