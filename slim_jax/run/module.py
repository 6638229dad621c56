"""Quantizing any Flax NNX module: its linear layers and convolutions, found in its graph.

The module runs as it is, outside of jit, on the calibration batches, once for every stage: layers none of
which reads what comes of another (`slim_jax.run.calls`). Those that were given the same share its Hessian and
one solve. A convolution is quantized as the matrix ``[height * width * channels, out]`` that multiplies its
patches.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import MixedTensor, mixed_matmul
from slim_jax.config import Settings, SlimConfig
from slim_jax.method.layer import LayerSolvers
from slim_jax.model.linear import Packed
from slim_jax.report import LayerReport, LearningReport
from slim_jax.rules import check_rules
from slim_jax.run.activations import Inputs, observe
from slim_jax.run.calls import Forward, Layer, find_stages, layers_of, shared_inputs, watch
from slim_jax.run.kept import Finished, Kept, digest_of
from slim_jax.run.learning import OnEpoch
from slim_jax.run.module_learning import improve
from slim_jax.run.source import check_finite


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """What was done to a module.

    Attributes:
      layers: the quantized ones, stage by stage, otherwise in the order in which the module calls them.
      skipped: path -> why a layer that was selected is as it was.
      unmatched: patterns of ``select`` that no layer's path matches.
      learning: how "slim-plus" went on from there, where it did: the squared difference of the module's
        outputs from the full-precision ones, over these squared.
    """

    layers: list[LayerReport]
    skipped: dict[str, str]
    unmatched: list[str]
    learning: LearningReport | None = None


class PackedLinear(nnx.Module):
    """A quantized `nnx.Linear` or `nnx.LinearGeneral`.

    Attributes:
      weight: the packed matrix ``[K, N]``.
      bias: of the shape of an output, or None.
      axes: how many of the last axes of an input make up ``K``.
      out_shape: what ``N`` is in an output.
    """

    def __init__(self, weight: MixedTensor, bias: jax.Array | None, axes: int, out_shape: tuple[int, ...]):
        self.weight = Packed(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.axes, self.out_shape = axes, out_shape

    def __call__(self, x: jax.Array | np.ndarray, out_sharding: Any = None) -> jax.Array:
        """``[..., K]`` -> ``[..., N]`` in the dtype of ``x``; ``out_sharding`` as `nnx.Linear` takes it."""
        x = jnp.asarray(x)
        batch = x.shape[: x.ndim - self.axes]
        y = mixed_matmul(x.reshape(*batch, -1), self.weight.get_value()).reshape(*batch, *self.out_shape)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)
        y = y.astype(x.dtype)
        return y if out_sharding is None else jax.reshard(y, out_sharding)


class PackedKernel(Packed):
    """The packed kernel of a convolution; indexing it, as `nnx.Conv` does, gives the dense one."""

    def __getitem__(self, key: Any) -> jax.Array:
        return self.get_value().dequantize().reshape(self.kernel_shape)[key]  # type: ignore[attr-defined]


def quantize_module(
    module: Any,
    batches: Iterable[Any],
    config: SlimConfig,
    *,
    select: Sequence[str] | None = None,
    forward: Forward | None = None,
    resume: str | Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[Any, ModuleReport]:
    """Quantizes the `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Conv` layers of a module.

    Each layer is calibrated on what the quantized layers before it give, unless ``config.sequential`` is
    False; that costs a run of the module for every stage of its graph.

    Args:
      module: an NNX module that runs outside of jit; it is not changed.
      batches: inputs, one a call; they must fit in memory.
      config: how to quantize. Bits are allocated within each layer: criterion "model", which needs a
        decoder's loss, stands for "kl" here. "slim-plus" goes on from what all layers then are and learns, by
        the module's outputs, for ``config.epochs`` over the batches; nothing is tuned after that. Rules are
        over the layers' paths.
      select: patterns such as ``"blocks.*.mlp.*"`` (`fnmatch`) of the paths to quantize; all by default.
      forward: ``forward(module, batch)``; by default ``module(batch)``.
      resume: a folder that keeps the layers of every finished stage. The same call goes on after the last of
        them and gives the same; nothing is kept without. Learning begins anew.
      on_epoch: called after every epoch of learning: its number, the number of all, the held-out loss.

    Returns:
      A copy with packed layers, and a report.

    Raises:
      ValueError: there are no batches, no layer is selected, a rule holds for none, a selected layer is
        called inside a transformation such as jit or scan, where its inputs have no values, a kernel or
        what a layer reads is not finite, ``resume`` holds something else or a run with other settings,
        weights or batches, or "slim-plus" is to learn of a module that JAX cannot trace.
    """
    config = _for_module(config)
    full, module, batches = module, nnx.clone(module), list(batches)
    if not batches:
        raise ValueError("there are no batches, expected at least one to calibrate on")
    run = forward or (lambda module, batch: module(batch))
    chosen, skipped, unmatched = _choose(layers_of(module), select, config)
    kept = None if resume is None else Kept(Path(resume), _settings(module, chosen, batches, config))
    check_finite({f"{path}.kernel": layer.kernel[...] for path, layer in chosen.items()})
    calls = watch(chosen, partial(run, module, batches[0]))
    skipped |= {path: "it is not called" for path in chosen if path not in calls}
    finished: Finished = {}
    stages = find_stages(chosen, partial(run, module, batches[0])) if config.sequential else [list(calls)]
    for stage, paths in enumerate(stages):
        own = {path: chosen[path] for path in paths}
        found = None if kept is None else kept.read(stage)
        if found is None:
            found = {}
            for same, x in shared_inputs(module, own, batches, run, calls):
                found |= _quantize_layers({path: own[path] for path in same}, x, config)
            if kept is not None:
                kept.write(stage, found)
        for path, (tensor, _) in found.items():
            _put(module, own[path], tensor)
        finished |= found
    reports = [report for _, report in finished.values()]
    if config.method != "slim-plus":
        return module, ModuleReport(reports, skipped, unmatched)
    solved = {path: tensor for path, (tensor, _) in finished.items()}
    tensors, learning = improve(full, solved, batches, run, config, on_epoch)
    return _packed(full, tensors), ModuleReport(reports, skipped, unmatched, learning)


def _for_module(config: SlimConfig) -> Settings:
    """The settings as they hold where there is no decoder."""
    if config.guide or not float(config.bits).is_integer():
        raise ValueError("guide and fractional bits need a decoder's loss, expected neither for a module")
    if config.method == "slim-plus" and config.learn == "clip-gptq":
        raise ValueError("learn is 'clip-gptq', expected rounding, grid or clip for a module")
    return config.resolved(decoder=False)


def _choose(
    layers: dict[str, Layer], select: Sequence[str] | None, config: Settings
) -> tuple[dict[str, Layer], dict[str, str], list[str]]:
    """The layers to quantize, why others that are selected stay, and the patterns that match none."""
    patterns = ["*"] if select is None else list(select)
    chosen = {p: layer for p, layer in layers.items() if any(fnmatch.fnmatchcase(p, s) for s in patterns)}
    if not chosen:
        raise ValueError(f"select is {patterns}, which matches none of {', '.join(layers) or 'no layers'}")
    check_rules(config.rules, list(layers))
    skipped = {path: "a rule skips it" for path in chosen if config.of_layer(path) is None}
    skipped |= {path: why for path, layer in chosen.items() if (why := _refusal(layer))}
    unmatched = [s for s in patterns if not any(fnmatch.fnmatchcase(p, s) for p in layers)]
    return {path: layer for path, layer in chosen.items() if path not in skipped}, skipped, unmatched


def _refusal(layer: Layer) -> str | None:
    """Why a layer cannot be quantized."""
    if isinstance(layer, nnx.Conv) and layer.feature_group_count != 1:
        return f"its channels are in {layer.feature_group_count} groups, expected 1"
    if isinstance(layer, nnx.Conv) and layer.mask is not None:
        return "it has a mask"
    if isinstance(layer, nnx.LinearGeneral):
        axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
        if layer.batch_axis or tuple(axes) != tuple(range(-len(axes), 0)):
            return f"it multiplies the axes {axes}, expected the last ones, in order"
    return None


def _settings(module: Any, chosen: dict[str, Layer], batches: list[Any], config: Settings) -> dict[str, Any]:
    """What the parts of a resumed run have in common."""
    return {
        "settings": config.to_json(),
        "layers": list(chosen),
        "weights": digest_of([nnx.state(module, nnx.Not(nnx.RngState))]),
        "batches": digest_of(batches),
    }


def _quantize_layers(layers: dict[str, Layer], x: list[jax.Array], config: Settings) -> Finished:
    """Quantizes layers that read one input."""
    found: Finished = {}
    tokens = sum(len(rows) for rows in x)
    seen = observe(Inputs([rows[None] for rows in x]), max(1, tokens // config.search_tokens))
    for solver, paths in LayerSolvers(config, None).of(list(layers)):
        kernels = [layers[path].kernel[...] for path in paths]
        weights = [jnp.asarray(kernel, jnp.float32).reshape(x[0].shape[1], -1) for kernel in kernels]
        found |= dict(zip(paths, solver.solve(paths, weights, seen)))
    return found


def _packed(module: Any, tensors: Mapping[str, MixedTensor]) -> Any:
    """A copy with packed layers."""
    module = nnx.clone(module)
    layers = layers_of(module)
    for path, tensor in tensors.items():
        _put(module, layers[path], tensor)
    return module


def _put(module: Any, layer: Layer, tensor: MixedTensor) -> None:
    """Packs a layer, wherever it is in ``module``."""
    kernel = layer.kernel[...]
    tensor = dataclasses.replace(tensor, dtype=kernel.dtype)
    if isinstance(layer, nnx.Conv):
        layer.kernel = PackedKernel(tensor, kernel_shape=kernel.shape)  # type: ignore[assignment]
        return
    out_shape = layer.out_features if isinstance(layer.out_features, tuple) else (layer.out_features,)
    bias = None if layer.bias is None else layer.bias[...]
    packed = PackedLinear(tensor, bias, kernel.ndim - len(out_shape), tuple(out_shape))
    _replace(module, layer, packed)


def _replace(module: Any, old: Any, new: Any) -> None:
    """Puts ``new`` wherever ``old`` is."""
    for _, node in list(nnx.iter_graph(module)):
        if not isinstance(node, nnx.Module):
            continue
        for key, child in list(nnx.iter_children(node)):
            if child is old:
                if isinstance(key, int):
                    node[key] = new  # type: ignore[index]
                else:
                    setattr(node, str(key), new)
