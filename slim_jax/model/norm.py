"""Norms, and what stands in their place in models without one."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from slim_jax.model.config import DecoderConfig


def rms_normed(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """Returns ``x`` over its root mean square along the last axis."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size)) if config.norm == "layer" else None
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        along_last = (1,) * (x.ndim - 1) + (-1,)
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = rms_normed(x, self.eps) * (self.scale[...].astype(jnp.float32) + self.offset).reshape(along_last)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape(along_last)


class GatedNorm(nnx.Module):
    """RMSNorm over the last axis, times the SiLU of a gate; no offset is added to its scale."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight, self.eps = nnx.Param(jnp.ones(size)), eps

    def __call__(self, x: Float[Array, "... d"], gate: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return rms_normed(x, self.eps) * scale * jax.nn.silu(gate)


class Scaled(nnx.Module):
    """Multiplication by a constant, in place of a norm."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return x if self.factor == 1 else x * self.factor


class Factor(nnx.Module):
    """Multiplication by a number that is a parameter."""

    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.ones(1))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return x * self.factor[...].astype(jnp.float32)[0]


def input_norm(config: DecoderConfig) -> Norm | Scaled:
    """Makes the norm before attention or MLP."""
    return Norm(config.hidden_size, config) if config.input_norms else Scaled()


def output_norm(config: DecoderConfig) -> Norm | Scaled | None:
    """Makes the norm after attention or MLP, or what scales their output; None for neither."""
    if config.output_norms:
        return Norm(config.hidden_size, config)
    return None if config.residual_scale == 1 else Scaled(config.residual_scale)
