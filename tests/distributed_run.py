"""One process of a distributed quantization: python distributed_run.py PORT COUNT ID OUT BLOCKS.

Stops after BLOCKS blocks, as if it had been interrupted.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from slim_jax.calibrate import pipeline
from slim_jax.calibrate.events import BlockDone, Event
from slim_jax.config import SlimConfig
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.store.source import DecoderSource

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=112,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
)
SLIM = SlimConfig(bits=2.25, group_size=32, tune=False)
TOKENS = np.random.default_rng(0).integers(0, 64, (16, 32))


def main() -> None:
    """Joins the other processes, then quantizes together with them."""
    port, count, index, out, blocks = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    source = DecoderSource(Decoder(CONFIG, rngs=nnx.Rngs(0)))

    def stop(event: Event) -> None:
        report = event.report if isinstance(event, BlockDone) else None
        if report is not None and report.index + 1 == int(blocks) < report.total:
            jax.distributed.shutdown()
            sys.exit()

    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, Path(out), mesh=mesh, resume=True, on_event=stop)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
