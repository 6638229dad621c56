"""Scaling of quantization over processes: the first blocks of SmolLM2 by one process, then by two.

    python -m bench.devices [--blocks 4]

Every process is pinned to its own core and has one CPU device; the processes communicate over the loopback
interface. Prints wall seconds of the blocks after the first, which includes compilation, and the number of
codes that differ. Run it on an otherwise idle machine.
"""

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

import convert
from pallas_kernels import MixedTensor
from slim_jax.calibrate.pipeline import quantize_to_checkpoint
from slim_jax.config import SlimConfig
from slim_jax.model.params import Params
from slim_jax.store.checkpoint import CheckpointSource, read_manifest


class _FirstBlocks:
    """The first blocks of a model, as a `slim_jax.store.source.Source`."""

    def __init__(self, blocks: int) -> None:
        self._source = convert.load_source("smollm2")
        self.config = dataclasses.replace(self._source.config, num_layers=blocks)
        self.origin = self._source.origin

    def outer(self) -> Params:
        return self._source.outer()

    def block(self, index: int) -> Params:
        return self._source.block(index)


def work(blocks: int, out: Path, processes: int, index: int, port: int) -> None:
    """Runs one of several processes."""
    os.sched_setaffinity(0, [index])
    mesh = None
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
        mesh = jax.make_mesh((processes,), ("devices",))
    source = _FirstBlocks(blocks)
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (64, 512))
    quantize_to_checkpoint(source, tokens, SlimConfig(group_size=64, tune=False), out, mesh=mesh)
    if mesh is not None:
        jax.distributed.shutdown()


def measure(blocks: int, out: Path, processes: int) -> float:
    """Mean wall seconds of a block, without the first block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(processes):
        call = f"work({blocks}, Path({str(out)!r}), {processes}, {index}, {port})"
        command = [sys.executable, "-c", f"from bench.devices import Path, work; {call}"]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    if sum(process.wait() for process in running):
        raise SystemExit(1)
    blocks_after_first = read_manifest(out).blocks[1:]
    return float(np.mean([block.report.seconds for block in blocks_after_first]))


def differing(one: Path, other: Path) -> tuple[int, int]:
    """Number of codes that differ between two checkpoints, and number of all codes."""
    sources, found = (CheckpointSource(one), CheckpointSource(other)), [0, 0]
    for index in range(sources[0].config.num_layers):
        a, b = (source.block(index) for source in sources)
        for name, tensor in a.items():
            if isinstance(tensor, MixedTensor):
                found[0] += int((tensor.codes() != b[name].codes()).sum())
                found[1] += tensor.shape[0] * tensor.shape[1]
    return found[0], found[1]


def main() -> None:
    """Measures both runs and prints the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.devices", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    blocks = parser.parse_args().blocks
    with TemporaryDirectory() as folder:
        one, two = Path(folder) / "1", Path(folder) / "2"
        alone, together = measure(blocks, one, 1), measure(blocks, two, 2)
        wrong, of = differing(one, two)
    print(f"one process {alone:.2f} s a block, two {together:.2f} s: {alone / together:.2f} times as fast")
    print(f"{wrong} of {of} codes differ")


if __name__ == "__main__":
    main()
