"""Short convolution in place of a block's attention, gated before and after it (LFM2, arXiv:2511.23404)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slim_jax.model.cache import Recurrent
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear
from slim_jax.model.linear_attention import Convolution, empty_state


class ShortConv(nnx.Module):
    """``o(outof(x) * conv(into(x) * value(x)))``, where the convolution sees ``conv_size`` tokens."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d = config.hidden_size
        self.into, self.outof, self.value, self.o = (Linear(d, d, bias=False, rngs=rngs) for _ in range(4))
        self.conv = Convolution(config.conv_size, d, activated=False)
        self.config = config

    def attend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"] | None = None,
        cache: Recurrent | None = None,
    ) -> tuple[Float[Array, "b t d"], Recurrent | None]:
        """Computes the input of the last layer, ``o``.

        Args:
          x: the tokens, which follow those of the cache.
          positions: positions of the tokens; those of padding are -1, and count as zeros. All tokens count
            without them.
          cache: the last tokens before; None where these are the first.
        """
        gated, outof = self.into(x) * self.value(x), self.outof(x)
        if positions is not None:
            gated = jnp.where((positions >= 0)[..., None], gated, 0)
        state, before = empty_state(self.config, x) if cache is None else cache.read()
        y, before = self.conv(gated, before)
        return outof * y, None if cache is None else cache.write(state, before)
