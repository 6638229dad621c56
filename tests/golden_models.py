"""The golden models of `goldens/`, and functions that write them as Hugging Face directories and run them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from slim_jax.infer.forward import forward
from slim_jax.model.block import Block, sequence_positions
from slim_jax.model.cache import Run, State
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder, make_outer, split_params
from slim_jax.store.source import Source

HERE = Path(__file__).parent / "goldens"
NAMES = sorted(path.stem for path in HERE.glob("*.npz"))


@dataclasses.dataclass(frozen=True)
class Golden:
    """A model as `make_goldens.py` stored it. Tests change copies of ``config`` and ``weights``."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: np.ndarray  # [B, T]
    hidden: np.ndarray  # [layers + 1, B, T, hidden]
    logits: np.ndarray  # [B, T, vocab]


def load_golden(name: str) -> Golden:
    """Loads a golden model."""
    with np.load(HERE / f"{name}.npz") as file:
        weights = {k.removeprefix("weight:"): file[k] for k in file.files if k.startswith("weight:")}
        config = json.loads(bytes(file["config"]))
        return Golden(config, weights, file["tokens"], file["hidden"], file["logits"])


def write_hf(golden: Golden, directory: Path, *, shards: int = 1, dtype: Any = np.float32) -> Path:
    """Writes a golden model as a Hugging Face directory, in one file or in shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(golden.config))
    weights = {k: np.ascontiguousarray(v, dtype) for k, v in golden.weights.items()}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(weights)}
    for file in files:
        save_file({k: v for k, v in weights.items() if weight_map[k] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def decoder_of(source: Source) -> Decoder:
    """Reads the whole model into memory."""
    return make_decoder(
        source.config, source.outer(), [source.block(i) for i in range(source.config.num_layers)]
    )


@jax.jit
def _pass(block: Block, h: jax.Array, positions: jax.Array) -> jax.Array:
    return block(h, positions)[0]


def run(decoder: Decoder, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input of the first block and outputs of all blocks ``[layers + 1, B, T, hidden]``, and the logits."""
    tokens = jnp.asarray(tokens)
    positions = sequence_positions(tokens)
    hidden = [decoder.embed_tokens(tokens, positions)]
    for block in decoder.blocks:
        hidden.append(_pass(block, hidden[-1], positions))
    return np.stack(hidden), np.asarray(decoder.logits(hidden[-1]))


def run_cached(decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray, steps: int) -> np.ndarray:
    """Logits ``[steps + 1, B, vocab]`` of a run with a cache.

    The first logits follow the first ``lengths`` tokens of each row, padded on the left to the longest; the
    others follow each of the next ``steps`` tokens.
    """
    rows, width = len(lengths), int(lengths.max())
    outer = make_outer(decoder.config, split_params(decoder)[0])
    state = State.empty([Run(r[0].config, len(r), False) for r in decoder.runs()], rows, width + steps)
    start = lengths[:, None] - width
    logits = []
    for first, count in [(0, width), *((width + i, 1) for i in range(steps))]:
        positions = start + np.arange(first, first + count)[None]
        piece = np.take_along_axis(tokens, np.maximum(positions, 0), axis=1)
        found, state = _forward(
            outer, decoder.runs(), state, piece, np.maximum(positions, -1).astype(np.int32)
        )
        logits.append(np.asarray(found))
    return np.stack(logits)


_forward = jax.jit(forward)


def relative_error(value: Any, expected: Any) -> float:
    """Largest error divided by the largest magnitude."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    return float(np.abs(value - expected).max() / np.abs(expected).max())
