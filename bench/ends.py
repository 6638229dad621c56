"""Embedding and LM head: perplexity of a full-precision model in which only these two are packed.

    python -m bench.ends --calibration a.txt --text b.txt --bits 8,6,5,4 --group-sizes 32,64

Stored bits are those of embedding and LM head. ``--unseen`` also rounds the LM head to nearest, without
calibration.
"""

import argparse
import time

import numpy as np

import convert
from bench.quantize import tokens_of
from slim_jax.calibrate.activations import Activations
from slim_jax.calibrate.embeddings import observe_head, quantize_table
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.eval.windows import draw_windows
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder
from slim_jax.placement import ONE_DEVICE


def main() -> None:
    """Measures every setting that the options ask for, and prints a line for each."""
    parser = argparse.ArgumentParser(prog="python -m bench.ends", description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--calibration", required=True, help="text to draw samples from")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--bits", default="8,6,5,4")
    parser.add_argument("--group-sizes", default="32,64")
    parser.add_argument("--dampings", default="0.01")
    parser.add_argument("--unseen", action="store_true", help="round to nearest, without calibration")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=10)
    arguments = parser.parse_args()
    source = convert.load_source(arguments.source)
    samples = draw_windows(tokens_of(source, arguments.calibration), arguments.samples, arguments.length, 0)
    outer, blocks = dict(source.outer()), [source.block(i) for i in range(source.config.num_layers)]
    activations = Activations.of(source, samples)
    for index, block in enumerate(blocks):
        activations = activations.through(index, block)
    stride = max(1, samples.size // 2048)
    seen = observe_head(source.config, outer, activations, None, stride, ONE_DEVICE)
    text = tokens_of(source, arguments.text)

    def measure(model: Decoder) -> float:
        return perplexity(model, text, 2048, arguments.max_windows).perplexity

    full = measure(make_decoder(source.config, outer, blocks))
    print(f"as it is: perplexity {full:.4f}", flush=True)
    for bits in map(int, arguments.bits.split(",")):
        for group_size in map(int, arguments.group_sizes.split(",")):
            for damping in map(float, arguments.dampings.split(",")):
                settings = SlimConfig(
                    embedding_bits=bits, embedding_group_size=group_size, damping=damping
                ).resolved()
                start, tables, stored = time.process_time(), {}, []
                for name in {"embed", "head.weight"} & outer.keys():
                    read = name == "head.weight" or source.config.tied_head
                    read = read and not arguments.unseen
                    tables[name], report = quantize_table(name, outer[name], seen if read else None, settings)
                    stored.append(report.bits_per_weight)
                seconds = time.process_time() - start
                found = measure(make_decoder(source.config, {**outer, **tables}, blocks))
                print(
                    f"{bits} bits, g {group_size}, damping {damping:g}: stored {np.mean(stored):.3f}, "
                    f"perplexity {found:.4f} ({100 * (found / full - 1):+.2f} %), CPU {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
