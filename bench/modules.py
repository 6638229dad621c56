"""Quantization of Flax modules that are not language models: vision transformer, encoder-decoder, MLP.

    python -m bench.modules [--seconds 100] [--bits 2,3,4] [--json]

Each module is trained for the given CPU seconds (a minute on two cores) on synthetic data, then quantized on
a few batches of it. Accuracy is measured on fresh data: of classes for the transformer and the MLP, of pixels
for the encoder-decoder.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from slim_jax import SlimConfig, quantize_module

Data = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
SIZE, SHAPES = 24, 6


def shapes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images ``[count, 24, 24, 1]`` of one shape each, and their masks: 0 outside, 1 + kind inside."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    kind = rng.integers(0, SHAPES, count)
    centre, radius = rng.uniform(8, SIZE - 8, (2, count)), rng.uniform(4, 7, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    dx, dy = (axis[None] - c[:, None, None] for axis, c in zip((x, y), centre))
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = (dx * cos + dy * sin), (dy * cos - dx * sin)
    u, v = u / radius[:, None, None], v / radius[:, None, None]
    r = np.hypot(u, v)
    inside = np.stack(
        [
            r < 1,
            (r < 1) & (r > 0.55),
            np.maximum(abs(u), abs(v)) < 0.8,
            (abs(u) < 0.3) & (abs(v) < 1) | (abs(v) < 0.3) & (abs(u) < 1),
            (v > -0.6) & (v < 1 - 2 * abs(u)),
            (abs(u) < 1) & (abs(v) < 0.3),
        ]
    )
    mask = inside[kind, np.arange(count)]
    image = mask * rng.uniform(0.6, 1.4, (count, 1, 1)) + rng.normal(0, 0.35, mask.shape)
    return image[..., None].astype(np.float32), mask * (1 + kind[:, None, None])


def kinds(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same images, and the kind of shape in each."""
    images, masks = shapes(rng, count)
    return images, masks.max(axis=(1, 2)) - 1


def spirals(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points ``[count, 32]`` on five spirals in a plane of a 32-dimensional space, and their spirals."""
    arm, t = rng.integers(0, 5, count), rng.uniform(0.2, 1, count)
    angle = 2 * np.pi * (arm / 5 + 1.5 * t)
    plane = np.stack([t * np.cos(angle), t * np.sin(angle)], axis=1) + rng.normal(0, 0.02, (count, 2))
    basis = np.random.default_rng(0).normal(size=(2, 32))
    return (plane @ basis).astype(np.float32), arm


class MLP(nnx.Module):
    """An MLP that classifies points into five classes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes = (32, 256, 256, 256)
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.out = nnx.Linear(sizes[-1], 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x)


class ViTBlock(nnx.Module):
    """Attention and MLP, each preceded by a norm."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.attn_norm, self.mlp_norm = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """A vision transformer on patches of 4 x 4 pixels."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128, depth: int = 3) -> None:
        self.patches = nnx.Conv(1, width, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), ((SIZE // 4) ** 2, width)))
        self.blocks = nnx.List([ViTBlock(width, rngs) for _ in range(depth)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, SHAPES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...][None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(axis=1)))


class EncoderDecoder(nnx.Module):
    """Convolutions down to a sixteenth of the pixels and up again, with a skip connection."""

    def __init__(self, rngs: nnx.Rngs, width: int = 32) -> None:
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.encode = nnx.List(
            [conv(1, width), conv(width, 2 * width, strides=2), conv(2 * width, 4 * width, strides=2)]
        )
        self.middle = conv(4 * width, 4 * width)
        self.decode = nnx.List([conv(4 * width, 2 * width), conv(2 * width, width)])
        self.out = nnx.Conv(2 * width, SHAPES + 1, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x = nnx.relu(self.encode[0](x))
        for layer in list(self.encode)[1:]:
            x = nnx.relu(layer(x))
        x = nnx.relu(self.middle(x))
        for layer in self.decode:
            b, h, w, c = x.shape
            x = nnx.relu(layer(jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest")))
        return self.out(jnp.concatenate([x, shortcut], axis=-1))


EXAMPLES: dict[str, tuple[Callable[[nnx.Rngs], Any], Data]] = {
    "vision transformer": (ViT, kinds),
    "encoder-decoder": (EncoderDecoder, shapes),
    "MLP": (MLP, spirals),
}


def train(module: Any, data: Data, seconds: float, batch: int = 128) -> None:
    """Trains with AdamW on fresh data for the given CPU seconds, which other load does not shorten."""
    optimizer = nnx.Optimizer(module, optax.adamw(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        def loss(module: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(module(x), y).mean()

        optimizer.update(module, nnx.grad(loss)(module))

    rng, end = np.random.default_rng(1), time.process_time() + seconds
    while time.process_time() < end:
        step(module, optimizer, *data(rng, batch))


def accuracy(module: Any, data: Data) -> float:
    """Percentage of correct answers, on data that is the same for every module."""
    run = nnx.jit(lambda module, x: jnp.argmax(module(x), axis=-1))
    rng, right = np.random.default_rng(2), []
    for _ in range(8):
        x, y = data(rng, 256)
        right.append(np.mean(np.asarray(run(module, x)) == y))
    return 100 * float(np.mean(right))


def example(name: str, seconds: float, widths: list[int], group_size: int) -> dict[str, Any]:
    """Trains and quantizes one module; returns its accuracies."""
    make, data = EXAMPLES[name]
    module = make(nnx.Rngs(0))
    train(module, data, seconds)
    rng = np.random.default_rng(3)
    batches = [data(rng, 64)[0] for _ in range(8)]
    row: dict[str, Any] = {"module": name, "full_precision": accuracy(module, data)}
    for bits in widths:
        for method in ("slim-plus", "slim", "rtn"):
            config = SlimConfig(bits=bits, group_size=group_size, method=method)
            quantized, report = quantize_module(module, batches, config)
            size = sum(layer.bits_per_weight * np.prod(layer.shape) for layer in report.layers)
            weights = sum(np.prod(layer.shape) for layer in report.layers)
            row[f"{method} {bits}"] = {
                "accuracy": accuracy(quantized, data),
                "bits_per_weight": size / weights,
            }
    return row


def main() -> None:
    """Prints a line per module and bit width."""
    parser = argparse.ArgumentParser(prog="python -m bench.modules", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100, help="of training, each, in CPU time")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--only", choices=EXAMPLES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    say = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    rows = []
    for name in [arguments.only] if arguments.only else EXAMPLES:
        widths = [int(bits) for bits in arguments.bits.split(",")]
        rows.append(row := example(name, arguments.seconds, widths, arguments.group_size))
        say(f"{name}: full precision {row['full_precision']:.1f} %")
        for key, found in row.items():
            if isinstance(found, dict):
                say(f"  {key} bits: {found['accuracy']:.1f} %, stored {found['bits_per_weight']:.2f}")
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
