"""Quantizes a model block by block.

The calibration tokens run through the model once. Apart from their activations, only one block's weights
are in memory: the source is read, and the result handed to a sink, block by block. Each jitted step compiles
once per kind of block.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import optax
from jax.sharding import Mesh

from slim_jax.calibrate.drawn_windows import Draw, Windows
from slim_jax.calibrate.events import BlockDone, Notice, OnEvent, warn_of_notices
from slim_jax.calibrate.fine_tuning import fine_tune
from slim_jax.calibrate.quantizer import BlockQuantizer
from slim_jax.calibrate.sensitivity import Sensitivity, allocate_bits
from slim_jax.config import Settings, SlimConfig
from slim_jax.method.fine_tune import apply
from slim_jax.method.sba import Allocation
from slim_jax.model.block import linear_names
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params, block_buffers, make_decoder
from slim_jax.placement import Placement
from slim_jax.report import BlockReport, LayerReport, Report, TuningReport
from slim_jax.rules import check_rules
from slim_jax.store.checkpoint import CheckpointSource
from slim_jax.store.checkpoint_sink import CheckpointSink
from slim_jax.store.source import DecoderSource, FiniteSource, Source


def check_dense(source: Source) -> None:
    """Checks that a model is not packed already, as far as its source tells without reading weights.

    Raises:
      ValueError: a layer of its blocks is packed.
    """
    inside = source.source if isinstance(source, FiniteSource) else source
    packed = inside.packed if isinstance(inside, CheckpointSource | DecoderSource) else []
    if packed:
        raise ValueError(f"{packed[0]} is already quantized, expected a dense model")


def _check(source: Source, tokens: np.ndarray, config: Settings, devices: int) -> np.ndarray:
    check_dense(source)
    check_rules(config.rules, linear_names(source.config))
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"calibration tokens are {tokens.dtype}{list(tokens.shape)}, expected int[samples, length]"
        )
    if tokens.min() < 0 or tokens.max() >= source.config.vocab_size:
        raise ValueError(
            f"calibration tokens range from {tokens.min()} to {tokens.max()}, "
            f"expected 0 to {source.config.vocab_size - 1}"
        )
    if tokens.shape[1] > source.config.max_positions:
        raise ValueError(
            f"samples are {tokens.shape[1]} tokens long, expected at most {source.config.max_positions}"
        )
    if tokens.shape[0] % devices:
        raise ValueError(f"there are {tokens.shape[0]} samples, expected a multiple of the {devices} devices")
    return tokens


class MemorySink:
    """Keeps the model that a run writes in memory; has the methods of a `CheckpointSink`.

    Args:
      config: the decoder's config.

    Attributes:
      blocks: parameters of the blocks written so far.
      outer: parameters outside the blocks.
      reports: reports of the blocks.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.blocks: list[Params] = []
        self.outer: Params = {}
        self.reports: list[BlockReport] = []
        self._reports: Sequence[LayerReport] = ()
        self._tuning: TuningReport | None = None

    @property
    def all_written(self) -> bool:
        """True if all parameters are written."""
        return bool(self.outer)

    def draft(self, name: str) -> Path | None:
        """Returns None: nothing is kept of an unfinished run."""
        return None

    def write_block(self, params: Params, report: BlockReport) -> None:
        """Adds the next block."""
        self.blocks.append(params)
        self.reports.append(report)

    def read(self, index: int | None) -> Params:
        """Returns the parameters of a block, or those outside the blocks for None."""
        return self.outer if index is None else self.blocks[index]

    def write_outer(self, params: Params, reports: Sequence[LayerReport]) -> None:
        """Takes the parameters outside the blocks, and the reports of embedding and LM head."""
        self.outer, self._reports = params, reports

    def write_tuned(self, outer: Params, block: Callable[[int], Params], report: TuningReport) -> None:
        """Replaces all parameters by the fine-tuned ``outer`` and ``block(index)``."""
        self.outer, self._tuning = outer, report
        self.blocks = [block(index) for index in range(len(self.blocks))]

    def finish(self) -> Report:
        """Returns the report of the run."""
        buffers = block_buffers(self.config, 0)
        found = [item for part in (self.outer, *self.blocks) for item in part.items()]
        count = sum(math.prod(value.shape) for name, value in found if name not in buffers)
        size = sum(value.nbytes for _, value in found)
        return Report(self.reports, list(self._reports), count, size, self._tuning)


Sink = MemorySink | CheckpointSink


def run(
    source: FiniteSource,
    tokens: np.ndarray,
    settings: Settings,
    sink: Sink,
    allocation: Allocation | None,
    optimizer: optax.GradientTransformation | None,
    placement: Placement,
    offload: Path | None,
    on_event: OnEvent,
) -> Report:
    """Quantizes a model into a sink; continues after the blocks that the sink has already.

    Arguments that are not listed here are those of :func:`quantize`.

    Args:
      source: the full-precision model.
      tokens: calibration text that fits the model, ``int[samples, length]``.
      settings: how to quantize.
      sink: takes the result.
      placement: the chips that split the work.
      offload: a folder for activations; None keeps them in memory.
    """
    own = settings.samples_to_tune(len(tokens), placement.devices)  # none: both use all samples
    solving, tuning = (tokens[:-own], tokens[-own:]) if own else (tokens, tokens)
    reference = None
    if not sink.all_written:
        found = None if allocation is None else Sensitivity(allocation, {})
        if found is None:
            file = sink.draft("sweep.npz")
            found = allocate_bits(source, solving, settings, offload, placement, file, on_event)
        given = allocation is not None
        quantizer = BlockQuantizer(source, solving, settings, found, given, optimizer, offload, placement)
        _quantize_into(quantizer, sink, on_event)
        reference = None if own else quantizer.reference
        del quantizer
    if settings.tune:
        layers, offset = source.config.num_layers, source.config.norm_offset
        outer, blocks = sink.read(None), list(map(sink.read, range(layers)))
        file = sink.draft("tuning.npz")
        learned, report = fine_tune(
            source, tuning, settings, outer, blocks, placement, reference, offload, file, on_event
        )
        tuned = apply(outer, learned.outer, offset)
        sink.write_tuned(tuned, lambda i: apply(blocks[i], learned.of(i), offset), report)
    return sink.finish()


def _quantize_into(quantizer: BlockQuantizer, sink: Sink, on_event: OnEvent) -> None:
    """Quantizes all blocks that the sink does not have, then embedding and LM head."""
    for index in range(quantizer.source.config.num_layers):
        if index < len(sink.blocks):
            quantizer.skip(index, sink.read(index))
        else:
            sink.write_block(*quantizer.quantize(index, on_event))
        on_event(BlockDone(sink.reports[index]))
    sink.write_outer(*quantizer.quantize_embeddings())


def quantize(
    model: Decoder | Source,
    tokens: np.ndarray,
    config: SlimConfig,
    *,
    allocation: Allocation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    on_event: OnEvent = warn_of_notices,
) -> tuple[Decoder, Report]:
    """Quantizes the linear layers of a model's blocks, then embedding and LM head.

    Norms are not quantized; fine-tuning changes their gains.

    Args:
      model: a decoder in memory, or a source that is read block by block.
      tokens: calibration text, ``int[samples, length]``; part of it is reserved for fine-tuning, see
        `SlimConfig.tune_samples`.
      config: how to quantize.
      allocation: bit widths of every group; None searches for them.
      optimizer: for "slim-plus"; `slim_jax.calibrate.learning.learning_optimizer` if None.
      mesh: the chips that split the work, of one process or several (then every process makes this call);
        its axes are flattened. The number of chips must divide that of the samples.
      on_event: called with every event, a record of `slim_jax.calibrate.events`; by default notices become
        warnings.

    Returns:
      The decoder with packed weights, and a report.

    Raises:
      ValueError: the tokens, the allocation or the rules do not fit the model, or a parameter, a calibration
        activation or a layer's error is not finite.
    """
    source = FiniteSource(DecoderSource(model) if isinstance(model, Decoder) else model)
    placement, settings, sink = Placement(mesh), config.resolved(), MemorySink(source.config)
    tokens = _check(source, tokens, settings, placement.devices)
    report = run(source, tokens, settings, sink, allocation, optimizer, placement, None, on_event)
    blocks = list(map(placement.told, sink.blocks))
    return make_decoder(source.config, placement.told(sink.outer), blocks), report


def quantize_to_checkpoint(
    source: Source,
    tokens: np.ndarray | Draw,
    config: SlimConfig,
    path: Path,
    *,
    allocation: Allocation | None = None,
    resume: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    offload: bool = False,
    mesh: Mesh | None = None,
    on_event: OnEvent = warn_of_notices,
) -> Report:
    """Quantizes a model that is larger than memory: every block is on disk before the next one starts.

    Arguments that are not listed here are those of :func:`quantize`.

    Args:
      source: a model that is read block by block.
      tokens: as for :func:`quantize`, or a `Draw`: a resumed run reads the windows that it has kept, and a
        finished run draws none.
      path: the checkpoint's folder; it must not exist or be empty, unless ``resume``.
      resume: if True, an interrupted run with the same model, tokens and settings is continued; the result
        is bit-identical to that of an uninterrupted run.
      offload: if True, the calibration activations are kept in files in the checkpoint's folder and not in
        memory ("slim-plus" still has those of one block in memory).

    Raises:
      ValueError: as for :func:`quantize`; or ``path`` holds something else, a run with other settings, or
        one that another process is writing.
    """
    source, placement, settings = FiniteSource(source), Placement(mesh), config.resolved()
    with CheckpointSink(path, placement, lambda message: on_event(Notice(message))) as sink:
        windows = Windows.of(tokens, allocation, path, resume)
        if windows.tokens is not None:
            _check(source, windows.tokens, settings, placement.devices)
        asked = {**settings.to_json(), "calibration": windows.fingerprint}
        sink.begin(source.config, source.origin, asked, resume=resume, drafts=settings.tune)
        if windows.tokens is None or sink.complete:
            return sink.report()
        windows.keep(path)
        with _scratch(path if offload else None) as folder:
            return run(
                source, windows.tokens, settings, sink, allocation, optimizer, placement, folder, on_event
            )


@contextlib.contextmanager
def _scratch(path: Path | None) -> Iterator[Path | None]:
    """Makes a temporary folder for this process in the folder ``path``; yields None if ``path`` is None."""
    if path is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="activations.", dir=path, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
