"""Text generation: prefill in chunks, then decoding with a key-value cache, several tokens per dispatch.

The host does nothing while a chunk of tokens is written (:mod:`slim_jax.infer.decode_loop`). This module
handles token ids; chat templates and text are not its concern.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int32

from slim_jax.infer.decode_loop import CHUNK, Structure, Tokens, next_logits, read, write, write_text
from slim_jax.infer.fuse import ready
from slim_jax.infer.fused import FusedBlock
from slim_jax.infer.lengths import cache_sizes, round_up
from slim_jax.infer.sampling import Choice, Sampling
from slim_jax.infer.tensor_parallel import AXIS, cut, mesh_of, on_devices, placed, stages_for
from slim_jax.model.block import StagesOf, stages
from slim_jax.model.cache import Run, State
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear

SAMPLE_ROWS = 64

PROMPT_CHUNK = 512
"""Tokens of a prompt that are read at once, of each row. Memory for them does not grow with the prompt,
except for their attention scores, which grow with its length."""

OnToken = Callable[[int, int], bool | None]
"""``on_token(row, token)``: True ends the row."""

CACHE_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8)))
"""Dtypes that keys and values can be kept in."""

# Approximate limit of a chunk's time: its tokens appear, and an interrupt is seen, when it is done.
CHUNK_SECONDS = 0.2


class Generator:
    """A decoder prepared for generation: its weights as they are now, stacked once where they can be.

    Keys and values are kept in the dtype that the model multiplies in, unless another is given, and on the
    devices that hold the model. Packed weights are copied, dense ones shared with the model.

    Attributes:
      config: the model's config.
      stacked: for every scan segment (`Decoder.runs`), True if its blocks are scanned over.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        cache_dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        prompt_chunk: int = PROMPT_CHUNK,
        consume: bool = False,
    ) -> None:
        """Prepares the weights.

        Args:
          model: the decoder, dense or packed.
          cache_dtype: dtype of keys and values: float32, bfloat16, or int8 with a scale for each.
          mesh: devices that share the work of every token (`slim_jax.infer.tensor_parallel`), in any shape.
          prompt_chunk: tokens of a prompt that are read at once.
          consume: if True, the model's weights are deleted one by one as they are prepared, so that memory
            does not hold them twice. The model is unusable afterwards.

        Raises:
          ValueError: ``cache_dtype`` is none of these, ``prompt_chunk < 1``, or ``mesh`` is given for a model
            that is already split over one.
        """
        if prompt_chunk < 1:
            raise ValueError(f"prompt_chunk is {prompt_chunk}, expected at least 1")
        if cache_dtype is not None and jnp.dtype(cache_dtype) not in CACHE_DTYPES:
            known = ", ".join(map(str, CACHE_DTYPES))
            raise ValueError(f"cache_dtype is {jnp.dtype(cache_dtype)}, expected one of {known}")
        self.config: DecoderConfig = model.config
        self._prompt_chunk = prompt_chunk
        stages_of: StagesOf = stages
        parts, over = [model], mesh_of(model)
        layers = [getattr(block.mixer, name, None) for block in model.blocks for name in "qkvo"]
        linears = [
            m for layer in layers if layer for _, m in nnx.iter_modules(layer) if isinstance(m, Linear)
        ]
        dtype = cache_dtype or jnp.result_type(*[m.weight.get_value().dtype for m in linears])
        if mesh is not None:
            mesh = Mesh(mesh.devices.reshape(-1), (AXIS,))
            stages_of = stages_for(model, mesh.size)
            parts = cut(model, mesh.size, mesh.devices.tolist(), consume=consume)
        runs = parts[0].runs()
        made = [ready(part, consume=consume, stages_of=stages_of) for part in parts]
        _, _, self.stacked = made[0]
        weights = (
            made[0][:2] if mesh is None else on_devices([one[:2] for one in made], mesh, consume=consume)
        )
        empty = partial(
            State.empty,
            [Run(run[0].config, len(run), whole) for run, whole in zip(runs, self.stacked)],
            dtype=dtype,
        )
        self._empty = placed(empty, mesh, over)
        # Flat, since flattening hundreds of variables in Python at every token would take noticeable time.
        self._leaves, tree = jax.tree.flatten(weights)
        self._structure = Structure(tree, mesh)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        on_token: OnToken | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continues prompts, see :func:`generate`; ``sampling`` are the fields of :class:`Sampling`."""
        how = Sampling(**sampling)
        _check(self.config, prompts, max_tokens)
        stops = set(self.config.eos_token_ids if stop is None else stop)
        choice = how.start(seed, len(prompts), self.config.vocab_size)
        results: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for chunk in self._chunks(prompts, max_tokens, choice, sorted(stops)):
            for chosen in chunk.tolist():
                active = [row for row in active if chosen[row] not in stops]
                for row in active:
                    results[row].append(chosen[row])
                if on_token is not None:
                    active = [row for row in active if not on_token(row, chosen[row])]
            if not active:
                break
        return results

    def _chunks(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, choice: Choice, stops: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yields next tokens ``int32[n, B]`` until there are ``max_tokens`` or every row has a stop token."""
        batch = len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = round_up(int(lengths.max()))
        tokens = np.zeros((batch, width), np.int32)
        positions = np.full((batch, width), -1, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            positions[row, width - len(prompt) :] = np.arange(len(prompt))

        seen, border = [(tokens, positions)], _border(self.config)
        stop_tokens = np.full(round_up(len(stops)), -1, np.int32)  # few sizes, as each compiles
        stop_tokens[: len(stops)] = stops
        state, ended = None, np.zeros(batch, bool)
        done, size = 0, 1
        while done < max_tokens and not ended.all():
            next_position = int(lengths.max()) + done - 1
            if state is None or next_position == border:
                # As transformers does: tokens read with the short factors are read again with the long ones.
                tokens, positions = _joined(seen)
                state = self._empty(batch, round_up(tokens.shape[1] + max_tokens - 1 - done))
                chosen, state, choice = self._read(state, tokens, positions, choice)
            else:
                left = border - next_position if border is not None and next_position < border else max_tokens
                steps, start = min(size, left, max_tokens - done), time.perf_counter()
                at = Tokens(*map(jnp.asarray, (tokens[:, -1], positions[:, -1], ended)))
                chosen, count, state, choice = write(
                    self._structure, self._leaves, state, at, choice, stop_tokens, np.int32(steps)
                )
                chosen = np.asarray(chosen)[: int(count)]
                quick = time.perf_counter() - start < CHUNK_SECONDS / 2
                size = min(2 * size, CHUNK) if quick else max(size // 2, 1)
            tokens, positions = (
                chosen.T,
                (lengths + done)[:, None] + np.arange(len(chosen), dtype=np.int32)[None],
            )
            seen.append((tokens, positions))
            ended = ended | np.isin(tokens, stops).any(axis=1)
            done += len(chosen)
            yield chosen

    def _read(
        self, state: State, tokens: np.ndarray, positions: np.ndarray, choice: Choice
    ) -> tuple[np.ndarray, State, Choice]:
        """Runs :func:`slim_jax.infer.decode_loop.read` in chunks, of which the first has the remainder."""
        structure, size = self._structure_for(int(positions.max()) + 1), self._prompt_chunk
        ends = range(tokens.shape[1] % size or size, tokens.shape[1] + 1, size)
        for start, end in itertools.pairwise((0, *ends)):
            part = np.s_[:, start:end]
            found, state, choice = read(structure, self._leaves, state, tokens[part], positions[part], choice)
        return np.asarray(found)[None], state, choice

    def sample_text(self, *, samples: int, length: int, seed: int) -> Int32[np.ndarray, "samples length"]:
        """Writes text, see :func:`sample_text`."""
        config = self.config
        if samples < 1 or not 1 <= length <= config.max_positions:
            raise ValueError(
                f"cannot write {samples} samples of {length} tokens: expected at least one sample"
                f" of 1 to {config.max_positions} tokens"
            )
        key, structure = jax.random.key(seed), self._structure_for(length)
        start = config.bos_token_id
        column = [] if start is None else [np.full((samples, 1), start, np.int32)]
        first = self._first_tokens(samples, key)
        if length == len(column):
            return column[0]
        rows = [
            self._continue(
                structure, column, first[i : i + SAMPLE_ROWS], length, jax.random.fold_in(key, i + 1)
            )
            for i in range(0, samples, SAMPLE_ROWS)
        ]
        return np.concatenate([*column, np.concatenate(rows)], axis=1)

    def _structure_for(self, length: int) -> Structure:
        """Returns the structure whose program reads texts of ``length``; long ones use only long factors."""
        config, border = self.config, _border(self.config)
        if config.rope_scaling is None or border is None or length <= border:
            return self._structure
        scaling = dataclasses.replace(config.rope_scaling, short_factors=config.rope_scaling.long_factors)
        outer, runs = jax.tree.unflatten(self._structure.tree, self._leaves)
        for block in itertools.chain(*(run if isinstance(run, list) else [run] for run in runs)):
            mixer = (block.block if isinstance(block, FusedBlock) else block).mixer
            mixer.config = dataclasses.replace(mixer.config, rope_scaling=scaling)
        return self._structure._replace(tree=jax.tree.structure((outer, runs)))

    def _first_tokens(self, samples: int, key: jax.Array) -> np.ndarray:
        """Draws likely first tokens without replacement: all differ while the vocabulary lasts."""
        config = self.config
        starts = [*([] if config.bos_token_id is None else [config.bos_token_id]), *config.eos_token_ids]
        logits = jnp.zeros(config.vocab_size)
        if starts:
            state = self._empty(1, 1)
            token = jnp.full((1, 1), starts[0], jnp.int32)
            logits = next_logits(self._structure, self._leaves, state, token)[0]
        # Gumbel top-k: the order of perturbed logits is that of draws without replacement.
        order = np.argsort(-np.asarray(logits + jax.random.gumbel(key, logits.shape)), kind="stable")
        return np.resize(order, samples).astype(np.int32)

    def _continue(
        self, structure: Structure, column: list[np.ndarray], first: np.ndarray, length: int, key: jax.Array
    ) -> np.ndarray:
        """Returns ``int32[B, length - len(column)]``: ``first`` and the tokens the model writes after it."""
        batch, before = len(first), len(column)
        sizes = cache_sizes(length)
        state = self._empty(batch, sizes[0])
        written = [first[None]]
        token, done = jnp.asarray(first), before
        if before:
            start = np.ascontiguousarray(column[0][:batch])
            greedy = Sampling().start(0, batch, self.config.vocab_size)
            zeros = np.zeros((batch, 1), np.int32)
            _, state, _ = read(structure, self._leaves, state, start, zeros, greedy)
        for size in sizes:
            state = state.grown(size)
            steps = min(size, length - 1) - done
            if steps > 0:
                token, tokens, state = write_text(structure, self._leaves, state, token, key, steps=steps)
                written.append(np.asarray(tokens))
                done += steps
        return np.concatenate(written).T


def _border(config: DecoderConfig) -> int | None:
    """Number of tokens beyond which a model's rotary frequencies change, None if they never do."""
    scaling = config.rope_scaling
    return scaling.original_max_positions if scaling is not None and scaling.kind == "longrope" else None


def _joined(seen: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the tokens and positions of several calls, padded on the left to a size compiled for."""
    tokens, positions = (np.concatenate(parts, axis=1) for parts in zip(*seen))
    padding = ((0, 0), (round_up(tokens.shape[1]) - tokens.shape[1], 0))
    return np.pad(tokens, padding), np.pad(positions, padding, constant_values=-1)


def _check(config: DecoderConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if len(prompts) == 0:
        raise ValueError("prompts is empty, expected at least one prompt")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty, expected at least one token")
        if len(prompt) + max_tokens > config.max_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, which with max_tokens = {max_tokens}"
                f" is more than the model's {config.max_positions} positions"
            )
        outside = [int(token) for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {row} has token {outside[0]}, outside the vocabulary of {config.vocab_size}"
            )


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    cache_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues prompts, all in one batch. For repeated calls, make one :class:`Generator` and keep it.

    With "longrope" a batch changes to the long factors where its longest row does, and is then read again
    from the start, once; transformers does the same with Phi-3.

    Args:
      model: the decoder, dense or packed.
      prompts: token ids, one or more of each prompt; lengths may differ.
      max_tokens: maximum number of tokens to write for each prompt.
      temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled from.
      top_k: number of most likely tokens to sample from; 0 for all.
      top_p: sampling is limited to the fewest of these whose probabilities sum to at least this.
      min_p: minimum probability of the sampled token, as a fraction of the most likely token's.
      repetition_penalty: logits of tokens that the row has seen are divided by this where positive,
        multiplied where negative; at temperature 0 too.
      seed: seed of sampling; equal seeds and equal calls give equal results.
      stop: tokens that end a row, not returned; the config's ``eos_token_ids`` if None.
      on_token: called with ``(row, token)`` as tokens appear, several at a time: as many as take a fifth of a
        second, up to 16; the row ends after a token for which it returns True.
      cache_dtype: see :class:`Generator`.
      mesh: see :class:`Generator`.

    Returns:
      The new tokens of each prompt, without the prompt.

    Raises:
      ValueError: there are no prompts or an empty one, ``max_tokens < 1``, sampling is out of range
        (`slim_jax.infer.sampling.Sampling`), a prompt and ``max_tokens`` exceed the config's
        ``max_positions``, or a token is not in the vocabulary.
    """
    return Generator(model, cache_dtype=cache_dtype, mesh=mesh).generate(
        prompts,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop,
        on_token=on_token,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )


def sample_text(
    model: Decoder, *, samples: int, length: int, seed: int
) -> Int32[np.ndarray, "samples length"]:
    """Writes text with the model itself at temperature 1, for calibration without any data.

    Rows begin with the config's BOS token, if it has one, then a first token that is drawn without
    replacement, so that no two rows begin alike. It is drawn from the model's prediction after BOS, else
    after its end-of-text token, else uniformly. Stop tokens do not end a row. With "longrope", text that will
    be longer than the trained context is written with the long factors from the start, as it is read later.

    Args:
      model: the decoder, dense or packed.
      samples: rows to write.
      length: tokens of each row, BOS included.
      seed: equal seeds give equal text.

    Returns:
      ``int32[samples, length]``.

    Raises:
      ValueError: ``samples < 1``, or ``length`` is not in 1 to the config's ``max_positions``.
    """
    return Generator(model).sample_text(samples=samples, length=length, seed=seed)
