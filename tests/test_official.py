"""Configs of published models (`official/`): read, planned, built in shapes, and a decode step lowered."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import use_abstract_mesh
from test_lowering import lowered, mesh_of

from convert.readers.load import load_config
from pallas_kernels.layout import abstract_tensor
from slim_jax.config import SlimConfig
from slim_jax.infer.forward import forward, stackable
from slim_jax.infer.fuse import ready
from slim_jax.model.block import linear_groups
from slim_jax.model.cache import Run, State
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import block_params, make_decoder, outer_params
from slim_jax.plan import make_plan

FILES = (Path(__file__).parent / "official").glob("*.json")
CONFIGS = {name: config for file in sorted(FILES) for name, config in json.loads(file.read_text()).items()}
G, EXPERTS = 64, 4


@cache
def config_of(name: str, folder: Path) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return load_config(folder)


LARGE = (
    *("Qwen/Qwen3.5-397B-A17B", "Qwen/Qwen3.5-122B-A10B", "Qwen/Qwen3.5-35B-A3B"),
    *("zai-org/GLM-4.6 355B", "MiniMaxAI/MiniMax-M2 230B"),
)
"""Models whose plan takes seconds, and that are others' larger kin."""

LIKE_OTHERS = re.compile(r"O[Ll][Mm]o-|granite|phi-4|MiniMax|Seed|EXAONE|starcoder|Ministral|GLM-4|Qwen3.5-0")
"""Models whose blocks are compiled like others'."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in CONFIGS]
)
def test_its_plan_has_the_parameters_of_its_name(name, tmp_path):
    config = config_of(name, tmp_path)
    plan = make_plan(config, SlimConfig(bits=2, method="gptq"), "h100", samples=0)
    billions = float(re.search(r"([0-9.]+)B", name, re.I)[1])
    assert plan.parameters / 1e9 == pytest.approx(billions, rel=0.07)
    assert plan.quantized > 0.97 * plan.parameters
    assert plan.cache_bytes_per_token > 0


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """A packed decoder in shapes."""

    def packed(shape: tuple[int, int]):
        w = abstract_tensor(shape, widths=(2,), segments=(-(-shape[0] // G),), group_size=G)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), w)

    blocks = []
    for kind in config.blocks():
        names = {f"{name}.weight" for group in linear_groups(kind) for name in group}
        shapes = block_params(kind)
        blocks.append({name: packed(s.shape) if name in names else s for name, s in shapes.items()})
    return jax.eval_shape(
        lambda outer, blocks: make_decoder(config, outer, blocks), outer_params(config), blocks
    )


def first_of_each_kind(config: DecoderConfig) -> DecoderConfig:
    """The config with one block of every kind, two of the first, and fewer experts."""
    kinds = [*dict.fromkeys(config.block_kinds or (0,))]
    small = {"num_layers": len(kinds) + 1, "block_kinds": (kinds[0], *kinds) if config.kinds else ()}
    if config.num_experts:
        small |= {"num_experts": EXPERTS, "experts_per_token": min(EXPERTS, config.experts_per_token)}
    return dataclasses.replace(config, **small)


def decode_step(config: DecoderConfig, target: str) -> str:
    """Lowers one step of a packed model."""
    model = abstract_decoder(config)

    def step(outer, blocks, state, tokens):
        return forward(outer, blocks, state, tokens, jnp.broadcast_to(state.length, tokens.shape))

    def arguments():
        runs = [Run(run[0].config, len(run), stackable(run)) for run in model.runs()]
        outer, blocks = jax.eval_shape(lambda model: ready(model)[:2], model)
        state = jax.eval_shape(lambda: State.empty(runs, 1, 256, dtype=jnp.bfloat16))
        return outer, blocks, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)

    if target == "cpu":
        return jax.jit(step).trace(*arguments()).lower().as_text()
    with use_abstract_mesh(mesh_of(target)):
        given = arguments()
    return lowered(target, step, *given)


def cases():
    """Yields all models and targets; one size of every architecture is quick, on one chip."""
    seen = set()
    for name, config in CONFIGS.items():
        for target in ("cpu", "v6e", "h100", "v5e"):
            quick = (
                config["architectures"][0] not in seen and target == "h100" and not LIKE_OTHERS.search(name)
            )
            marks = [] if quick else [pytest.mark.slow]
            if target == "h100":
                marks.append(pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"))
            yield pytest.param(name, target, marks=marks)
        seen.add(config["architectures"][0])


@pytest.mark.parametrize(("name", "target"), list(cases()))
def test_a_decode_step_lowers(name, target, tmp_path):
    text = decode_step(first_of_each_kind(config_of(name, tmp_path)), target)
    kernel = {"cpu": "stablehlo", "h100": "mosaic_gpu"}.get(target, "tpu_custom_call")
    assert kernel in text
