"""Quantizes a Flax NNX module: its `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv` and `nnx.Einsum` layers.

The module runs unchanged, outside of jit, on the calibration batches, once for every stage, which is a set of
layers whose inputs do not depend on each other's outputs (`slim_jax.modules.capture`). Layers with the same
inputs share one Hessian and one solve. A convolution is quantized as the matrix
``[height * width * channels, out]`` that multiplies its patches.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from pallas_kernels import MixedTensor, mixed_matmul
from slim_jax.calibrate.activations import Inputs, observe
from slim_jax.calibrate.events import OnEvent, warn_of_notices
from slim_jax.config import Settings, SlimConfig
from slim_jax.method.layer import LayerSolvers
from slim_jax.model.linear import Packed
from slim_jax.modules.capture import KINDS, MULTIPLIES, Forward, find_stages, layers_of, shared_inputs, watch
from slim_jax.modules.learning import improve
from slim_jax.modules.products import Layer, product_of
from slim_jax.report import LayerReport, LearningReport
from slim_jax.rules import check_rules
from slim_jax.store.source import check_finite

Finished = dict[str, tuple[MixedTensor, LayerReport]]
"""Packed weight and report of each layer, by its path."""


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """Report of a module's quantization.

    Attributes:
      layers: reports of the quantized layers, stage by stage; within a stage, in the module's call order.
      skipped: path -> description and reason, for every layer that was not quantized and every other
        parameter of two or more axes.
      unmatched: patterns of ``select`` that no layer's path matches.
      learning: report of "slim-plus", if it ran; its losses are the squared difference of the module's
        outputs from the full-precision ones, over the squared full-precision outputs.
    """

    layers: list[LayerReport]
    skipped: dict[str, str]
    unmatched: list[str]
    learning: LearningReport | None = None


class PackedLinear(nnx.Module):
    """A quantized `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`.

    Attributes:
      weight: the packed matrix ``[K, N]``.
      bias: the bias, in the shape in which it is added to an output, or None.
      product: the axes of inputs and outputs.
      dtype: dtype of inputs and outputs; if None, the result type of input, kernel and bias.
      preferred: dtype of outputs that takes precedence over ``dtype``, if not None.
    """

    def __init__(self, layer: nnx.Linear | nnx.LinearGeneral | nnx.Einsum, weight: MixedTensor) -> None:
        self.weight, self.product = Packed(weight), product_of(layer)
        bias = None if layer.bias is None else layer.bias[...].reshape(self.product.bias_shape)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype, self.preferred = layer.dtype, layer.preferred_element_type

    def __call__(self, x: jax.Array | np.ndarray, out_sharding: Any = None) -> jax.Array:
        """Applies the layer; shapes and dtypes of input and output are those of the full-precision layer.

        ``out_sharding`` is that of `nnx.Linear`.
        """
        x, weight = jnp.asarray(x), self.weight.get_value()
        bias = None if self.bias is None else self.bias[...]
        dtype = self.dtype or jnp.result_type(x, weight.dtype, weight.dtype if bias is None else bias.dtype)
        y = self.product.output(mixed_matmul(self.product.rows(x.astype(dtype)), weight))
        if bias is not None:
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        given = self.preferred or dtype
        y = y.astype(given if bias is None else jnp.result_type(given, dtype))
        return y if out_sharding is None else jax.reshard(y, out_sharding)


class PackedKernel(Packed):
    """Packed kernel of a convolution; indexing it, as `nnx.Conv` does, returns the dense kernel."""

    def __getitem__(self, key: Any) -> jax.Array:
        return self.get_value().dequantize().reshape(self.kernel_shape)[key]  # type: ignore[attr-defined]


def quantize_module(
    module: Any,
    batches: Iterable[Any],
    config: SlimConfig,
    *,
    select: Sequence[str] | None = None,
    forward: Forward | None = None,
    on_event: OnEvent = warn_of_notices,
) -> tuple[Any, ModuleReport]:
    """Quantizes the `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv` and `nnx.Einsum` layers of a module.

    Layers of other classes, including subclasses, are not quantized, nor are an `nnx.Einsum` that is not a
    single matrix product and a layer with its own function for multiplication; the report names them.
    Each layer is calibrated on the outputs of the quantized layers before it, unless ``config.sequential`` is
    False; this costs a run of the module for every stage of its graph.

    Args:
      module: an NNX module that runs outside of jit; it is not changed.
      batches: inputs, one per call; they must fit in memory.
      config: how to quantize. Bits are allocated within each layer: criterion "model", which needs a
        decoder's loss, is replaced by "kl". "slim-plus" starts after all layers are quantized and trains them
        on the module's outputs, for ``config.epochs`` over the batches; there is no fine-tuning after that.
        Rules match the layers' paths.
      select: patterns such as ``"blocks.*.mlp.*"`` (`fnmatch`) of the paths to quantize; all by default.
      forward: ``forward(module, batch)``; by default ``module(batch)``.
      on_event: called with every event, such as a `LearningEpoch` of "slim-plus".

    Returns:
      A copy with packed layers, and a report.

    Raises:
      ValueError: there are no batches; no layer is selected; a rule applies to none; a selected layer is
        called inside a transformation such as jit or scan, where its inputs have no values; a kernel or an
        input of a layer is not finite; or the method is "slim-plus" and JAX cannot trace the module.
    """
    config = _for_module(config)
    full, module, batches = module, nnx.clone(module), list(batches)
    if not batches:
        raise ValueError("there are no batches, expected at least one to calibrate on")
    run = forward or (lambda module, batch: module(batch))
    chosen, skipped, unmatched = _choose(module, select, config)
    check_finite({f"{path}.kernel": layer.kernel[...] for path, layer in chosen.items()})
    calls = watch(chosen, partial(run, module, batches[0]))
    skipped |= {path: "it is not called" for path in chosen if path not in calls}
    finished: Finished = {}
    stages = find_stages(chosen, partial(run, module, batches[0])) if config.sequential else [list(calls)]
    for paths in stages:
        own, found = {path: chosen[path] for path in paths}, Finished()
        for same, x in shared_inputs(module, own, batches, run, calls):
            found |= _quantize_layers({path: own[path] for path in same}, x, config)
        for path, (tensor, _) in found.items():
            _put(module, own[path], tensor)
        finished |= found
    reports = [report for _, report in finished.values()]
    skipped = _described(full, skipped)
    if config.method != "slim-plus":
        return module, ModuleReport(reports, skipped, unmatched)
    solved = {path: tensor for path, (tensor, _) in finished.items()}
    tensors, learning = improve(full, solved, batches, run, config, on_event)
    return _packed(full, tensors), ModuleReport(reports, skipped, unmatched, learning)


def _for_module(config: SlimConfig) -> Settings:
    """Resolves the settings for a module; raises an error for settings that need a decoder."""
    if not float(config.bits).is_integer():
        raise ValueError(f"bits is {config.bits}, expected a whole number: more needs a decoder's loss")
    return config.resolved(decoder=False)


def _choose(
    module: Any, select: Sequence[str] | None, config: Settings
) -> tuple[dict[str, Layer], dict[str, str], list[str]]:
    """Selects the layers to quantize; also returns why others are skipped, and patterns that match none."""
    layers, patterns = layers_of(module), ["*"] if select is None else list(select)
    chosen = {p: layer for p, layer in layers.items() if any(fnmatch.fnmatchcase(p, s) for s in patterns)}
    if not chosen:
        others = "; ".join(f"{path} is {told}" for path, told in list(_described(module, {}).items())[:2])
        names = ", ".join(layers) or f"no layers; {others or 'there are no matrices'}"
        raise ValueError(f"select is {patterns}, which matches none of {names}")
    check_rules(config.rules, list(layers))
    skipped = {path: "it is not selected" for path in layers if path not in chosen}
    skipped |= {path: "a rule skips it" for path in chosen if config.of_layer(path) is None}
    skipped |= {path: why for path, layer in chosen.items() if (why := _refusal(layer))}
    unmatched = [s for s in patterns if not any(fnmatch.fnmatchcase(p, s) for p in layers)]
    return {path: layer for path, layer in chosen.items() if path not in skipped}, skipped, unmatched


def _described(module: Any, skipped: Mapping[str, str]) -> dict[str, str]:
    """Class, dtype, shape and reason of skipped layers and of other parameters of two or more axes."""
    nodes, layers = dict(nnx.iter_graph(module)), layers_of(module)
    found = {
        path: (type(layers[path]).__name__, layers[path].kernel[...], why) for path, why in skipped.items()
    }
    for path, node in nodes.items():
        owner = nodes.get(path[:-1], module)
        if isinstance(node, nnx.Param) and node.ndim >= 2 and type(owner) not in (*KINDS, PackedLinear):
            expected = f"its class is none of {', '.join(kind.__name__ for kind in KINDS)}"
            found[".".join(map(str, path))] = type(owner).__name__, node[...], expected
    return {p: f"{kind} {w.dtype}{list(w.shape)}: {why}" for p, (kind, w, why) in found.items()}


def _refusal(layer: Layer) -> str | None:
    """Reason why a layer cannot be quantized; None if it can."""
    usual = (None, lax.dot_general, lax.conv_general_dilated, jnp.einsum, promote_dtype)
    for name in (MULTIPLIES.get(type(layer), "dot_general"), "dot_general_cls", "promote_dtype"):
        if getattr(layer, name, None) not in usual:
            return f"its {name} is a function of its own"
    if isinstance(layer, nnx.Einsum):
        try:
            product_of(layer)
        except ValueError as error:
            return str(error)
    if isinstance(layer, nnx.Conv) and layer.feature_group_count != 1:
        return f"its channels are in {layer.feature_group_count} groups, expected 1"
    if isinstance(layer, nnx.Conv) and layer.mask is not None:
        return "it has a mask"
    if isinstance(layer, nnx.LinearGeneral):
        axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
        if layer.batch_axis or tuple(axes) != tuple(range(-len(axes), 0)):
            return f"it multiplies the axes {axes}, expected the last ones, in order"
    return None


def _quantize_layers(layers: dict[str, Layer], x: list[jax.Array], config: Settings) -> Finished:
    """Quantizes layers that share an input."""
    found: Finished = {}
    tokens = sum(len(rows) for rows in x)
    seen = observe(Inputs([rows[None] for rows in x]), max(1, tokens // config.search_tokens))
    for solver, paths in LayerSolvers(config, None).of(list(layers)):
        own = [layers[path] for path in paths]
        weights = [product_of(layer).matrix(jnp.asarray(layer.kernel[...], jnp.float32)) for layer in own]
        found |= dict(zip(paths, solver.solve(paths, weights, seen)))
    return found


def _packed(module: Any, tensors: Mapping[str, MixedTensor]) -> Any:
    """Returns a copy with packed layers."""
    module = nnx.clone(module)
    layers = layers_of(module)
    for path, tensor in tensors.items():
        _put(module, layers[path], tensor)
    return module


def _put(module: Any, layer: Layer, tensor: MixedTensor) -> None:
    """Replaces a layer by its packed form, in all its places in ``module``."""
    kernel = layer.kernel[...]
    tensor = dataclasses.replace(tensor, dtype=kernel.dtype)
    if isinstance(layer, nnx.Conv):
        layer.kernel = PackedKernel(tensor, kernel_shape=kernel.shape)  # type: ignore[assignment]
        return
    _replace(module, layer, PackedLinear(layer, tensor))


def _replace(module: Any, old: Any, new: Any) -> None:
    """Puts ``new`` in all places of ``old``."""
    for _, node in list(nnx.iter_graph(module)):
        if not isinstance(node, nnx.Module):
            continue
        for key, child in list(nnx.iter_children(node)):
            if child is old:
                if isinstance(key, int):
                    node[key] = new  # type: ignore[index]
                else:
                    setattr(node, str(key), new)
