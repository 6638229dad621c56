"""Other quantizers, measured on the same model, calibration windows and evaluation as our own figures.

Runs in its own environment, with PyTorch and without JAX; nothing else here imports it. The linear layers of
the blocks are quantized; embedding, LM head and norms stay as they are and count 16 bits.

    python3.11 -m venv /tmp/peers && /tmp/peers/bin/pip install torch==2.13.0 transformers hqq auto-round
    /tmp/peers/bin/pip install --no-deps gptqmodel==7.7.0   # asks for a newer PyTorch and does not need it
    /tmp/peers/bin/pip install threadpoolctl device-smi pypcre tokenicer logbar ninja datasets dill torchao \\
        defuser accelerate protobuf pillow rich

    slim-jax export smollm2 out/dense --format hf --dtype float32
    python -c "import convert, numpy; from bench.quantize import tokens_of; \\
        from slim_jax.eval.windows import draw_windows; \\
        tokens = tokens_of(convert.load_source('smollm2'), 'wt2_calib.txt'); \\
        numpy.save('out/tokens.npy', draw_windows(tokens, 64, 512, 0))"

    OMP_NUM_THREADS=1 GPTQMODEL_CPU_WORKERS=2 taskset -c 1 /tmp/peers/bin/python -m bench peers out/dense \\
        --method gptq --bits 2 --group-size 64 --calibration out/tokens.npy --out out/gptq-2
    slim-jax eval out/gptq-2 --against smollm2 --text wt2_test.txt --max-windows 38 --json

The weights of each method are written dequantized, as a Hugging Face directory, so that all are evaluated
alike. A table, stored there as ``peers.json``, has stored bits and the CPU seconds of
quantization alone, including child processes. gptqmodel compiles an extension on its first run; use the
seconds of the second run.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.results import Results, write_json

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the linear layers of a llama-like block."""


class Quantized(NamedTuple):
    """A method's result for the blocks.

    Attributes:
      weights: ``[N, K]`` of each layer by its name, dequantized.
      stored: number of bits of all that the method stores for them.
      settings: the method's settings, for the record.
    """

    weights: dict[str, torch.Tensor]
    stored: int
    settings: dict[str, Any]


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers of the blocks, or their replacements, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if ".layers." in name and name.rpartition(".")[2] in LINEARS
    }


def load(folder: Path) -> torch.nn.Module:
    """Loads the model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def size_of(*tensors: torch.Tensor) -> int:
    """Number of bits that tensors take in their own dtypes."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)


def run_hqq(arguments: argparse.Namespace, _: np.ndarray) -> Quantized:
    """Half-quadratic quantization with the package's defaults, without calibration.

    Three-bit codes are packed ten to a 32-bit word. Scales and zeros are 16-bit.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = {"nbits": arguments.bits, "group_size": arguments.group_size, "axis": arguments.axis}
    weights, stored = {}, 0
    for name, layer in layers_of(load(arguments.source)).items():
        packed = HQQLinear(layer, BaseQuantizeConfig(**settings), compute_dtype=torch.float16, device="cpu")
        weights[name] = packed.dequantize()
        stored += size_of(packed.W_q, packed.meta["scale"], packed.meta["zero"])
    return Quantized(weights, stored, settings)


def run_gptqmodel(arguments: argparse.Namespace, tokens: np.ndarray) -> Quantized:
    """GPTQ, GPTAQ or FOEM with the package's defaults, except for zero points (its default is symmetric).

    Stored bits count codes, scales, zero points and each channel's group, as in the files that it writes.
    """
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    variants = {"gptq": {}, "gptaq": {"gptaq": GPTAQConfig()}, "foem": {"foem": FOEMConfig()}}
    settings = {"bits": arguments.bits, "group_size": arguments.group_size, "sym": False}
    # The older format stores zero points minus one, in memory too, which dequantizing does not expect.
    how = {"format": "gptq_v2", "offload_to_disk": False}
    config = QuantizeConfig(**settings, **variants[arguments.method], **how)
    model = GPTQModel.load(str(arguments.source), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in _rows(tokens)]
    model.quantize(rows, batch_size=arguments.batch_size, backend=BACKEND.TORCH)
    packed = layers_of(model.model)
    stored = sum(size_of(one.qweight, one.qzeros, one.scales, one.g_idx) for one in packed.values())
    settings |= {"damp_percent": config.damp_percent, "act_group_aware": config.act_group_aware}
    return Quantized({name: one.dequantize_weight().T for name, one in packed.items()}, stored, settings)


def run_autoround(arguments: argparse.Namespace, tokens: np.ndarray) -> Quantized:
    """AutoRound's signed gradient descent; a recipe is the package's, except for the windows.

    Stored bits count codes and zero points of the given width, and 16-bit scales.
    """
    from auto_round import AutoRound

    recipe = {"autoround-light": (50, 5e-3), "autoround": (200, None), "autoround-best": (1000, None)}
    iters, lr = recipe[arguments.method]
    settings = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "sym": False,
        "iters": arguments.iters or iters,
        "lr": lr,
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "batch_size": arguments.batch_size,
    }
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in _rows(tokens)]
    tokenizer = AutoTokenizer.from_pretrained(arguments.source, trust_remote_code=False)
    rounding = AutoRound(load(arguments.source), tokenizer, dataset=rows, device_map="cpu", **settings)
    layers = layers_of(rounding.quantize()[0])
    stored = sum(
        arguments.bits * (layer.weight.numel() + layer.scale.numel()) + size_of(layer.scale.half())
        for layer in layers.values()
    )
    return Quantized({name: layer.weight for name, layer in layers.items()}, stored, settings)


def _rows(tokens: np.ndarray) -> list[torch.Tensor]:
    """Windows ``int[S, T]`` as batches of one."""
    return list(torch.from_numpy(tokens.astype(np.int64))[:, None])


METHODS: dict[str, tuple[str, Callable[[argparse.Namespace, np.ndarray], Quantized]]] = {
    "hqq": ("hqq", run_hqq),
    **dict.fromkeys(("gptq", "gptaq", "foem"), ("gptqmodel", run_gptqmodel)),
    **dict.fromkeys(("autoround-light", "autoround", "autoround-best"), ("auto-round", run_autoround)),
}
"""The package of each method, and the function that runs it."""


def write(source: Path, weights: dict[str, torch.Tensor], out: Path) -> torch.nn.Module:
    """Writes the source with other weights in its blocks, and returns the model.

    Raises:
      ValueError: a layer of the blocks lacks weights, or they have another shape.
    """
    model = load(source)
    layers = layers_of(model)
    if missing := layers.keys() ^ weights.keys():
        raise ValueError(f"layers and weights differ in {sorted(missing)}")
    for name, layer in layers.items():
        if weights[name].shape != layer.weight.shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, expected {tuple(layer.weight.shape)}")
        layer.weight.data = weights[name].detach().float().contiguous()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(out)
    return model


def stored_bits(model: torch.nn.Module, stored: int) -> dict[str, float]:
    """Bits per weight of the blocks and per parameter of the model, and its size; a tied head counts once."""
    blocks = sum(layer.weight.numel() for layer in layers_of(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    whole = stored + 16 * (every - blocks)
    return {"block_bits": stored / blocks, "model_bits": whole / every, "model_mb": whole / 8e6}


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Quantizes as the options say, writes the result and shows a row."""
    parser.add_argument("source", type=Path, help="Hugging Face directory of a llama-like model")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", type=Path, required=True, help="windows, .npy of int[S, T]")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time")
    parser.add_argument("--axis", type=int, default=1, help="of hqq: 1 groups inputs, 0 outputs")
    parser.add_argument("--iters", type=int, help="of autoround: other than the recipe's")
    arguments = parser.parse_args(given)
    tokens = np.load(arguments.calibration)
    package, run = METHODS[arguments.method]
    start = sum(os.times()[:4])  # with the children that this process has waited for
    found = run(arguments, tokens)
    seconds = sum(os.times()[:4]) - start
    row = {
        "method": arguments.method,
        "bits": arguments.bits,
        **stored_bits(write(arguments.source, found.weights, arguments.out), found.stored),
        "cpu_s": seconds,
        "settings": found.settings,
        "versions": {name: version(name) for name in (package, "torch", "transformers")},
    }
    write_json(arguments.out / "peers.json", row)
    print()  # a progress bar may have left its line open
    Results(arguments.json).show("rows", [row])
