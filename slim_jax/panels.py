"""Output channels in panels of one width.

The sums in XLA's CPU code for a matrix differ in their last bits with its number of columns, and GPTQ
turns such a bit into other codes further on. In panels of one width a channel's result does not depend
on how many others stand beside it, so neither on how many devices share a layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PANEL = 192
"""Output channels of a panel on CPUs, where this width costs no time. Accelerators take all at once."""


def in_panels(function: Callable[[Any], Any], channels: Any) -> Any:
    """``function`` of arrays that all end in the same output channels, ``[..., N]``, a panel at a time.

    Its results end in them too. The last panel is filled up with copies of the last channel.
    """
    n = jax.tree.leaves(channels)[0].shape[-1]
    width = PANEL if jax.default_backend() == "cpu" else n

    def split(a: jax.Array) -> jax.Array:
        filled = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -n % width)], mode="edge")
        return jnp.moveaxis(filled.reshape(*a.shape[:-1], -1, width), -2, 0)

    def join(a: jax.Array) -> jax.Array:
        a = jnp.moveaxis(a, 0, -2)
        return a.reshape(*a.shape[:-2], -1)[..., :n]

    return jax.tree.map(join, lax.map(function, jax.tree.map(split, channels)))
