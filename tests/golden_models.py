"""The golden models of `goldens/` and how tests write them out again as Hugging Face directories."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from slim_jax.decoder import Decoder, make_decoder
from slim_jax.source import Source

HERE = Path(__file__).parent / "goldens"
NAMES = sorted(path.stem for path in HERE.glob("*.npz"))


@dataclasses.dataclass(frozen=True)
class Golden:
    """One model as `make_goldens.py` stored it. Tests change copies of ``config`` and ``weights``."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: np.ndarray  # [B, T]
    hidden: np.ndarray  # [layers + 1, B, T, hidden]
    logits: np.ndarray  # [B, T, vocab]


def load_golden(name: str) -> Golden:
    """The golden of this name."""
    with np.load(HERE / f"{name}.npz") as file:
        weights = {k.removeprefix("weight:"): file[k] for k in file.files if k.startswith("weight:")}
        config = json.loads(bytes(file["config"]))
        return Golden(config, weights, file["tokens"], file["hidden"], file["logits"])


def write_hf(golden: Golden, directory: Path, *, shards: int = 1, dtype: Any = np.float32) -> Path:
    """The golden as a Hugging Face directory, in one file or in shards with an index."""
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
    """The whole model in memory."""
    return make_decoder(
        source.config, source.outer(), [source.block(i) for i in range(source.config.num_layers)]
    )


def run(decoder: Decoder, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input of the first block and outputs of all ``[layers + 1, B, T, hidden]``, and logits."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = [decoder.embed_tokens(tokens, positions)]
    for block in decoder.blocks:
        hidden.append(block(hidden[-1], positions)[0])
    return np.stack(hidden), np.asarray(decoder(tokens))


def relative_error(value: Any, expected: Any) -> float:
    """Largest error over the largest magnitude."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    return float(np.abs(value - expected).max() / np.abs(expected).max())
