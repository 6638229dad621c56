"""Quantization of a checkpoint that is larger than the memory that quantizing takes.

    python -m bench.streaming /tmp/streaming       # 12 GB of random float32 weights, in a llama's shape

Writes the checkpoint as sharded safetensors unless it exists, quantizes it block by block with the
activations on disk, and prints the peak resident memory of the process.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file

import convert
from bench.quantize import peak_mib
from slim_jax.calibrate.events import BlockDone, Event
from slim_jax.calibrate.pipeline import quantize_to_checkpoint
from slim_jax.config import SlimConfig

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, LENGTH = 2048, 5632, 16, 32_000, 256


def write_checkpoint(folder: Path, layers: int) -> None:
    """Writes a Hugging Face directory with random weights, one shard per block, about 205 MB each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * columns**-0.5

    def ones() -> np.ndarray:
        return np.ones(HIDDEN, np.float32)

    index: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / name)
        index.update(dict.fromkeys(tensors, name))

    outer = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": ones()}
    shard("outer.safetensors", {**outer, "lm_head.weight": matrix(VOCABULARY, HIDDEN)})
    for i in track(range(layers), "writing", console=Console(stderr=True)):
        at = f"model.layers.{i}"
        tensors = {f"{at}.self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
        tensors |= {f"{at}.mlp.{name}_proj.weight": matrix(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        tensors |= {f"{at}.{name}_layernorm.weight": ones() for name in ("input", "post_attention")}
        shard(f"block-{i:03}.safetensors", tensors)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))  # last: it marks a complete folder


def _print_block(event: Event) -> None:
    if isinstance(event, BlockDone):
        block = event.report
        progress = f"block {block.index + 1} of {block.total}: {block.seconds:.0f} s"
        print(f"{progress}, peak {peak_mib():.0f} MiB", flush=True)


def main() -> None:
    """Runs the quantization that the options ask for and prints the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the checkpoint and the result")
    parser.add_argument("--layers", type=int, default=56, help="blocks of 205 MB")
    parser.add_argument("--method", default="slim")
    parser.add_argument("--samples", type=int, default=8, help=f"of {LENGTH} random tokens")
    arguments = parser.parse_args()
    dense = arguments.folder / f"dense-{arguments.layers}"
    if not (dense / "config.json").exists():
        write_checkpoint(dense, arguments.layers)
    size = sum(file.stat().st_size for file in dense.iterdir())
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (arguments.samples, LENGTH))
    out = arguments.folder / f"{arguments.method}-{arguments.layers}"
    before, start = peak_mib(), time.monotonic()
    report = quantize_to_checkpoint(
        convert.load_source(dense),
        tokens,
        SlimConfig(bits=2, method=arguments.method, tune=arguments.method == "slim-plus"),
        out,
        resume=True,
        offload=True,
        on_event=_print_block,
    )
    print(
        f"{size / 1e9:.2f} GB at {report.bits_per_weight:.3f} bits per weight in "
        f"{time.monotonic() - start:.0f} s (wall), peak resident memory {peak_mib():.0f} MiB "
        f"({before:.0f} MiB before)"
    )


if __name__ == "__main__":
    main()
