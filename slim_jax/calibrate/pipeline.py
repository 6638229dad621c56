"""Quantizes a model block by block.

The calibration tokens run through the model once. Apart from their activations, only one block's weights
are in memory: the source is read, and the result handed on, block by block. Each jitted step compiles once
per kind of block.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optax
from jax.sharding import Mesh

from slim_jax.calibrate.drawn_windows import Draw, Windows
from slim_jax.calibrate.embeddings import sizes
from slim_jax.calibrate.fine_tuning import OnStep, tune
from slim_jax.calibrate.learning import OnEpoch
from slim_jax.calibrate.quantizer import BlockQuantizer
from slim_jax.calibrate.sensitivity import OnSweep
from slim_jax.config import Settings, SlimConfig
from slim_jax.method.fine_tune import apply
from slim_jax.method.sba import Allocation
from slim_jax.model.block import linear_names
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder
from slim_jax.placement import Placement
from slim_jax.report import BlockReport, Report
from slim_jax.rules import check_rules
from slim_jax.store.checkpoint import CheckpointSource
from slim_jax.store.source import DecoderSource, FiniteSource, Source
from slim_jax.store.writer import CheckpointWriter

OnBlock = Callable[[BlockReport], None]


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


def _parts(tokens: np.ndarray, config: Settings, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples that layers are solved on, and samples for fine-tuning; all for both if none are reserved."""
    own = config.samples_to_tune(len(tokens), devices)
    return (tokens[:-own], tokens[-own:]) if own else (tokens, tokens)


def quantize(
    model: Decoder | Source,
    tokens: np.ndarray,
    config: SlimConfig,
    *,
    allocation: Allocation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    on_block: OnBlock | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    on_sweep: OnSweep | None = None,
) -> tuple[Decoder, Report]:
    """Quantizes the linear layers of a model's blocks, then embedding and LM head.

    Norms are not quantized; fine-tuning changes their gains.

    Args:
      model: a decoder in memory, or a source that is read block by block.
      tokens: calibration text, ``int[samples, length]``; part of it is reserved for fine-tuning, see
        `SlimConfig.tune_samples`.
      config: how to quantize.
      allocation: bit widths of every group; None searches for them.
      optimizer: for "slim-plus"; `slim_jax.calibrate.learning.default_optimizer` if None.
      mesh: the chips that split the work, of one process or several (then every process makes this call);
        its axes are flattened. The number of chips must divide that of the samples.
      on_block: called with every finished block's report.
      on_epoch: for "slim-plus": called after every epoch with its number, the total number, and the loss.
      on_sweep: called after every block of the gradient sweep with the number of blocks done, and of all.
      on_step: for fine-tuning: called after every step with its number, the total number, and the loss.

    Returns:
      The decoder with packed weights, and a report.

    Raises:
      ValueError: the tokens, the allocation or the rules do not fit the model, or a parameter, a calibration
        activation or a layer's error is not finite.
    """
    source = FiniteSource(DecoderSource(model) if isinstance(model, Decoder) else model)
    placement, config = Placement(mesh), config.resolved()
    tokens = _check(source, tokens, config, placement.devices)
    solving, tuning_on = _parts(tokens, config, placement.devices)
    quantizer = BlockQuantizer(source, solving, config, allocation, optimizer, None, placement, on_sweep)
    blocks, reports = [], []
    for index in range(source.config.num_layers):
        params, report = quantizer.quantize(index, on_epoch)
        blocks.append(params)
        reports.append(report)
        if on_block is not None:
            on_block(report)
    outer, ends = quantizer.ends()
    tuning = None
    if config.tune:
        reference = quantizer.reference if tuning_on is solving else None
        del quantizer
        learned, tuning = tune(
            source, tuning_on, config, outer, blocks, placement, reference, on_step=on_step
        )
        offset = source.config.norm_offset
        outer = apply(outer, learned.outer, offset)
        blocks = [apply(block, learned.of(i), offset) for i, block in enumerate(blocks)]
    whole = Report(reports, ends, *sizes(source.config, outer, blocks), tuning)
    return make_decoder(source.config, placement.told(outer), list(map(placement.told, blocks))), whole


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
    on_block: OnBlock | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    on_sweep: OnSweep | None = None,
    on_notice: Callable[[str], None] = warnings.warn,
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
      on_notice: called with a message for each part of an interrupted run that is damaged and made again.

    Raises:
      ValueError: as for :func:`quantize`; or ``path`` holds something else, a run with other settings, or
        one that another process is writing.
    """
    source, placement, config = FiniteSource(source), Placement(mesh), config.resolved()
    windows = Windows.of(tokens, allocation, path, resume)
    if windows.tokens is not None:
        _check(source, windows.tokens, config, placement.devices)
    settings = {**config.to_json(), "calibration": windows.fingerprint}
    with (
        CheckpointWriter(
            *(path, source.config, source.origin, settings),
            resume=resume,
            drafts=config.tune,
            placement=placement,
            notify=on_notice,
        ) as writer,
        _scratch(path if offload and not writer.complete else None) as folder,
    ):
        if windows.tokens is None or writer.complete:
            return writer.report()
        windows.keep(path)
        solving, tuning_on = _parts(windows.tokens, config, placement.devices)
        reference = None
        if not writer.all_written:
            swept = path / "drafts/sweep.npz"
            quantizer = BlockQuantizer(
                source, solving, config, allocation, optimizer, folder, placement, on_sweep, swept
            )
            _write_all(quantizer, writer, on_block, on_epoch)
            reference = quantizer.reference if tuning_on is solving else None
            del quantizer
        if config.tune:
            outer, blocks = writer.read_outer(), list(map(writer.read_block, range(source.config.num_layers)))
            file = path / "drafts/tuning.npz"
            learned, tuning = tune(
                source, tuning_on, config, outer, blocks, placement, reference, folder, file, on_step
            )
            offset = source.config.norm_offset
            tuned = apply(outer, learned.outer, offset)
            writer.write_tuned(tuned, lambda i: apply(blocks[i], learned.of(i), offset), tuning)
        writer.finish()
        return writer.report()


def _write_all(
    quantizer: BlockQuantizer, writer: CheckpointWriter, on_block: OnBlock | None, on_epoch: OnEpoch | None
) -> None:
    """Writes all blocks, then embedding and LM head, except blocks that an earlier run has written."""
    for index in range(quantizer.source.config.num_layers):
        if index < len(writer.blocks):
            report = writer.blocks[index].report
            assert report is not None
            quantizer.skip(index, writer.read_block(index))
        else:
            params, report = quantizer.quantize(index, on_epoch)
            writer.write_block(params, report)
        if on_block is not None:
            on_block(report)
    writer.write_outer(*quantizer.ends())


@contextlib.contextmanager
def _scratch(path: Path | None) -> Iterator[Path | None]:
    """Makes a temporary folder for this process in the folder ``path``; yields None if ``path`` is None."""
    if path is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="activations.", dir=path, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
