"""Memory use while a model is prepared for decoding: it is not held twice."""

import operator
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_step
from test_generate import PROMPTS, packed, tiny

from pallas_kernels import chips, prepared
from pallas_kernels.tpu import layers
from slim_jax.infer import fuse as module
from slim_jax.infer.generate import Generator
from slim_jax.model.params import split_params

MIXTURE = {"num_experts": 4, "experts_per_token": 2}


def live() -> int:
    """Bytes of all live arrays."""
    return sum(array.nbytes for array in jax.live_arrays())


def sampled(monkeypatch, before: int) -> list[int]:
    """Samples the bytes in excess of ``before``, including the host's, as weights are written."""
    seen, written = [], []
    one_by_one = prepared.one_by_one

    def watched(parts, rows):
        def through():
            for part in parts:
                written.append(sum(leaf.nbytes for leaf in jax.tree.leaves(part)))
                seen.append(live() + sum(written) - before)
                yield part

        found = one_by_one(through(), rows)
        written.clear()
        return found

    for place in (prepared, layers, module):
        monkeypatch.setattr(place, "one_by_one", watched)
    return seen


@pytest.mark.parametrize("target", [None, "v6e", pytest.param("mi300x", marks=pytest.mark.slow)])
def test_no_more_than_the_model_and_a_block_is_in_memory(target, monkeypatch):
    with chips.target(target or chips.of_target()):
        wanted = module.ready(test_step.packed_model(8))[1]  # constants of compiled programs stay
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(wanted))
        model = test_step.packed_model(8)
        stored = sum(value.nbytes for params in split_params(model)[1] for value in params.values())
        seen = sampled(monkeypatch, live() - stored)
        _, found, stacked = module.ready(model, consume=True)
    assert stacked == [True]
    assert len(seen) > 20
    assert max(seen) <= 1.05 * max(stored, size) + size / 8
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_blocks_that_stay_apart_go_one_by_one(monkeypatch):
    """As on NVIDIA GPUs, blocks are not stacked; a block's dense parts are shared with the model."""
    seen, prepared_block = [], module._with_weights_prepared
    with chips.target("h100"):
        model = test_step.packed_model()
        norm = model.blocks[0].attn.q.bias

        def watched(block, stages_of):
            seen.append([one.attn.q.weight.get_value().words.is_deleted() for one in model.blocks])
            return prepared_block(block, stages_of)

        monkeypatch.setattr(module, "_with_weights_prepared", watched)
        module.ready(model, consume=True)
    assert norm is None
    assert seen == [[False] * 3, [True, False, False], [True, True, False]]


def test_a_dense_model_is_there_once():
    model = tiny()
    _, (blocks,), _ = module.ready(model)
    for name in ("attn.q.weight", "mlp.down.weight"):
        found, own = (operator.attrgetter(name)(block)[...] for block in (blocks[1], model.blocks[1]))
        assert found.unsafe_buffer_pointer() == own.unsafe_buffer_pointer()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, MIXTURE])
def test_a_model_that_is_given_up_writes_the_same(changes):
    model = packed(tiny(**changes), unlike="rows")
    kept = Generator(model)
    gone = Generator(model, consume=True)
    jax.tree.map(np.testing.assert_array_equal, gone._leaves, kept._leaves)
    assert gone._structure == kept._structure
    assert gone.generate(PROMPTS, max_tokens=4) == kept.generate(PROMPTS, max_tokens=4)


PROGRAM = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.layout import abstract_tensor
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import block_params, make_decoder, outer_params
from slim_jax.infer.fuse import ready

LAYERS = 10
config = DecoderConfig("llama", 64, 2048, 8192, LAYERS, 16, 4, 128, 64)
rng = np.random.default_rng(0)


def packed(shape):
    groups = shape[0] // 128
    w = abstract_tensor(shape, widths=(4,), segments=(groups,), group_size=128)
    leaves = {"order": np.arange(groups, dtype=np.int32), "segments": np.array([groups], np.int32)}
    for name in ("words", "scale", "zero"):
        kind = getattr(w, name)
        size = kind.size * kind.dtype.itemsize
        leaves[name] = rng.integers(0, 1 << 8, size, np.uint8).view(kind.dtype).reshape(kind.shape)
    return type(w)(**{**vars(w), **{name: jnp.asarray(a) for name, a in leaves.items()}})


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


linears = {f"{name}.weight" for group in linear_groups(config) for name in group}
shapes = block_params(config)
blocks = [
    {n: packed(s.shape) if n in linears else jnp.ones(s.shape) for n, s in shapes.items()}
    for _ in range(LAYERS)
]
outer = {n: jnp.ones(s.shape) for n, s in outer_params(config).items()}
model = make_decoder(config, outer, blocks)
size = sum(value.nbytes for block in blocks for value in block.values())
del blocks
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
found = ready(model, consume=sys.argv[1] == "consume")
jax.block_until_ready(jax.tree.leaves(found))
print(size, memory("VmHWM") - before)
"""


def peak(how: str) -> tuple[int, int]:
    """Bytes of a model, and the peak increase of resident memory while it is prepared."""
    command = [sys.executable, "-c", PROGRAM, how]
    as_commands_have_it = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # convert.cli.program
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=as_commands_have_it
    )
    size, more = map(int, run.stdout.split())
    return size, more


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory():
    size, more = peak("consume")
    assert size > 300e6
    assert more < 0.35 * size
    assert peak("keep")[1] > 0.9 * size
