"""Method "slim-plus" over a module: trains its packed layers to reproduce the full-precision outputs.

The learned parameters of a layer, and the quantized weight that they give, are as for a decoder's blocks
(`slim_jax.method.learnable`); here all layers are trained together, on the outputs of the whole module.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import MixedTensor
from slim_jax.calibrate.events import OnEvent
from slim_jax.calibrate.fit import fit, gradient_step, split_samples
from slim_jax.calibrate.learning import epoch_event, learning_optimizer, packed_result, start
from slim_jax.config import Settings
from slim_jax.method.learnable import Layer, Learned, dense_weights
from slim_jax.modules.capture import Forward, layers_of
from slim_jax.modules.products import product_of
from slim_jax.placement import ONE_DEVICE
from slim_jax.report import LearningReport


def improve(
    module: Any,
    packed: Mapping[str, MixedTensor],
    batches: Sequence[Any],
    run: Forward,
    settings: Settings,
    on_event: OnEvent,
) -> tuple[dict[str, MixedTensor], LearningReport]:
    """Trains the packed layers of a module; returns their packed weights and a report.

    For a training that does not lower the validation loss see `slim_jax.calibrate.learning.packed_result`.
    Every batch is one step. If there are two or more, every eighth, beginning with the first, is a validation
    batch.

    Args:
      module: the module in full precision; every call of it begins with the state that it has here.
      packed: its quantized layers, by path.
      batches: trees of arrays.
      run: ``run(module, batch)``, which JAX can trace and differentiate.
      settings: the quantization's settings.
      on_event: told of every epoch.

    Raises:
      ValueError: the module cannot be traced, or outputs no floating-point array.
    """
    given = {path: layer for path, layer in layers_of(module).items() if path in packed}
    dense = {p: product_of(layer).matrix(jnp.asarray(layer.kernel[...])) for p, layer in given.items()}
    learned, layers = start(dense, packed, settings, ONE_DEVICE)
    validation, training = split_samples(len(batches), 1)
    graph, weights = nnx.split(module)
    targets = [_floats(run(nnx.merge(graph, weights), batch)) for batch in batches]
    if not targets[0]:
        raise ValueError("the module gives no floating-point array, expected one for slim-plus to learn from")
    optimizer = learning_optimizer(settings, settings.epochs * len(training))

    def loss(learned: Learned, layers: dict[str, Layer], weights: Any, batch: Any, target: list[jax.Array]):
        found = _floats(run(_with_weights(nnx.merge(graph, weights), dense_weights(learned, layers)), batch))
        return sum(_difference(*pair) for pair in zip(found, target, strict=True))

    @jax.jit
    def step(learned: Learned, state: Any, *rest: Any) -> tuple[Learned, Any, jax.Array]:
        return gradient_step(loss, optimizer, learned, state, *rest)

    def epoch(learned: Learned, state: Any, order: np.ndarray) -> tuple[Learned, Any, None]:
        for i in order:
            learned, state, _ = step(learned, state, *fixed, batches[i], targets[i])
        return learned, state, None

    def validation_loss(learned: Learned) -> float:
        return float(np.mean([evaluate(learned, *fixed, batches[i], targets[i]) for i in validation]))

    fixed, evaluate, rng = (layers, weights), jax.jit(loss), np.random.default_rng(0)
    orders = [rng.permutation(training) for _ in range(settings.epochs)]
    told = epoch_event(on_event, settings.epochs)
    try:
        best, history = fit(learned, epoch, validation_loss, orders, optimizer.init(learned), on_step=told)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"slim-plus needs a module that JAX can trace, but this one: {reason}") from error
    return packed_result(best, layers, packed, history, settings)


def _floats(outputs: Any) -> list[jax.Array]:
    """Floating-point arrays of a module's outputs, in float32."""
    leaves = map(jnp.asarray, jax.tree.leaves(outputs))
    return [leaf.astype(jnp.float32) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _difference(y: jax.Array, target: jax.Array) -> jax.Array:
    """Squared difference of ``y`` from ``target``, over the squared target."""
    return jnp.sum((y - target) ** 2) / jnp.maximum(jnp.sum(target**2), jnp.finfo(jnp.float32).tiny)


def _with_weights(module: Any, weights: Mapping[str, jax.Array]) -> Any:
    """Puts matrices ``[K', N]`` (rows beyond ``K`` are padding) into the layers of ``module``; returns it."""
    for path, layer in layers_of(module).items():
        if path in weights:
            kernel, w = layer.kernel[...], weights[path]
            rows = kernel.size // w.shape[1]
            layer.kernel = nnx.Param(product_of(layer).kernel(w[:rows]).astype(kernel.dtype))
    return module
