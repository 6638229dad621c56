"""Effect of the cache's dtype: next-token distributions compared with those of a float32 cache.

    python -m bench.cache --source smollm2 --text text.txt

Every context is read in one pass, so its tokens attend to keys and values as they are stored.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.cli.sources import encode, open_source, tokenizer_of, whole_decoder
from slim_jax.eval.windows import draw_windows
from slim_jax.infer.forward import forward
from slim_jax.infer.generate import CACHE_DTYPES, Generator
from slim_jax.model.decoder import Decoder

BATCH = 8
TEXT = Path(__file__).parent / "data" / "pride_and_prejudice.txt"


def distributions(model: Decoder, contexts: np.ndarray, dtype: Any) -> tuple[np.ndarray, float]:
    """Log-probabilities of the next token ``[contexts, vocab]``, and bytes stored per token."""
    generator = Generator(model, cache_dtype=dtype)
    outer, runs = jax.tree.unflatten(generator._structure.tree, generator._leaves)
    length = contexts.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (BATCH, length))

    @jax.jit
    def read(outer: Any, runs: Any, state: Any, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(forward(outer, runs, state, tokens, positions)[0])

    state = generator._empty(BATCH, length)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv)) / (BATCH * length)
    parts = [read(outer, runs, state, contexts[i : i + BATCH]) for i in range(0, len(contexts), BATCH)]
    return np.concatenate(parts), size


def main() -> None:
    """Prints a line for every dtype."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="smollm2", help="a source, or a quantized checkpoint")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--contexts", type=int, default=64, help=f"a multiple of {BATCH}")
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    source = open_source(arguments.source)
    model = whole_decoder(source)
    ids = encode(tokenizer_of(source), arguments.text.read_text(encoding="utf-8"))
    contexts = draw_windows(np.asarray(ids), arguments.contexts, arguments.length, 0)
    exact: np.ndarray | None = None
    for dtype in CACHE_DTYPES:
        found, size = distributions(model, contexts, dtype)
        exact = found if exact is None else exact
        divergence = float(np.mean(np.sum(np.exp(exact) * (exact - found), axis=1)))
        same = float(np.mean(exact.argmax(1) == found.argmax(1)))
        print(f"{dtype!s:9} {size:8.0f} bytes a token, KL {divergence:.1e} nats, same likeliest {same:.3f}")


if __name__ == "__main__":
    main()
