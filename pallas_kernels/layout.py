"""The packed weight: memory layout of mixed-width codes.

Only this file and `planes.py` know the layout; kernels, solvers and checkpoints ask them. Nothing here
depends on models or on how codes were chosen.

A linear layer computes ``y[M, N] = x[M, K] @ W[K, N]``. Input channels are divided into ``G`` groups of
``g``; all output channels of a group share one bit width ``b`` and

    W[k, n] = scale[G(k), n] * (code[k, n] - zero[G(k), n]).

*Planes.* Codes are stored as planes of 4, 2 and 1 bits: `pallas_kernels.planes`.

*Order.* Groups are stored by ascending width; a group's planes are adjacent rows of one flat buffer.

*Zero points* are stored in ``z`` bits (4, or 8 if a width above 4 occurs) as
``zero = zero_code * 2**(b - z)``: whole numbers are exact at every width, and narrow widths, which need them,
have fractions.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels import scales
from pallas_kernels.planes import WORD_BITS, shifted_planes, unpack_group, unpack_plane


def zero_bits(widths: tuple[int, ...]) -> int:
    """Bits of a stored zero point in a tensor whose groups have these widths: 4, or 8 above 4 bits."""
    return 4 if max(widths) <= 4 else 8


def zero_step(bits: int, widths: tuple[int, ...]) -> float:
    """Value of one unit of the zero code of a ``bits``-wide group, in units of the scale: ``2**(b - z)``."""
    return 2.0 ** (bits - zero_bits(widths))


def group_count(k: int, group_size: int) -> int:
    """Number of groups of ``k`` input channels, a shorter last one included."""
    return -(-k // group_size)


def vary_like(value: jax.Array, like: Any) -> jax.Array:
    """``value``, typed as varying between devices if a leaf of ``like`` does.

    Inside `jax.shard_map` the carry of a loop must start with the type that it ends with. A selection between
    equal values has that type in every version of JAX, and XLA removes it.
    """
    for leaf in jax.tree.leaves(like):
        if leaf.size:
            first = leaf[(0,) * leaf.ndim]
            value = lax.select(first == first, value, value)
    return value


def result_type(shape: tuple[int, ...], like: Any) -> Any:
    """Type of a kernel's float32 result, which varies between devices if ``like`` does."""
    return jax.typeof(vary_like(jnp.zeros(shape, jnp.float32), like))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale", "zero", "order", "segments"],
    meta_fields=["shape", "group_size", "widths", "dtype", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class MixedTensor:
    """A weight ``[K, N]`` in packed codes whose bit width differs from group to group.

    Invariants, with ``G = ceil(K / group_size)`` and ``position`` a group's index in storage:

    * ``order[position]`` is the original index of that group; groups are sorted by width;
    * ``segments[i]`` groups have width ``widths[i]``; ``sum(segments) == G``;
    * group ``position`` of width ``b`` fills ``group_size * b / 32`` rows of ``words``;
    * ``scale[position]``, and the ``position``-th zero code, belong to it;
    * channels past ``K`` in a short last group have code 0 and are never read back.

    Sizes of segments are data, not metadata: all layers of one shape and mean width share one compiled
    program, and their leaves can be stacked on a leading axis and scanned over.

    Attributes:
      words: ``uint32[R, N]``, the planes of all groups.
      scale: ``uint8[G, N]`` in storage order, 8-bit floats (`pallas_kernels.scales`), or ``bfloat16[G, N]``.
      zero: ``uint8[ceil(G / 2), N]`` (two 4-bit codes per byte, planar) or ``uint8[G, N]``.
      order: ``int32[G]``.
      segments: ``int32[len(widths)]``.
      shape: ``(K, N)``, static.
      group_size: input channels per group, a multiple of 32, static.
      widths: the bit widths that may occur, ascending, static.
      dtype: dtype of products and of the result of :meth:`dequantize`, static.
      mesh: the mesh over which the output channels are split, static, for :func:`~pallas_kernels.matmul`: in
        traced code the arrays themselves do not tell. None on one device.
    """

    words: jax.Array
    scale: jax.Array
    zero: jax.Array
    order: jax.Array
    segments: jax.Array
    shape: tuple[int, int]
    group_size: int
    widths: tuple[int, ...]
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    mesh: Mesh | None = None

    @property
    def ndim(self) -> int:
        """Number of axes of ``words``: 2, or more if leaves are stacked."""
        return self.words.ndim

    def __len__(self) -> int:
        """Number of layers of a stack."""
        if self.ndim < 3:
            raise TypeError(f"a weight of shape {self.shape} is no stack of layers")
        return int(self.words.shape[0])

    def __getitem__(self, layer: int | jax.Array) -> "MixedTensor":
        """One layer of a stack; a Python integer must be in ``-len(self) .. len(self) - 1``."""
        count = len(self)
        if isinstance(layer, int) and not -count <= layer < count:
            raise IndexError(f"layer is {layer}, expected one of {count}")
        return jax.tree.map(lambda leaf: leaf[layer], self)

    def __iter__(self) -> Iterator["MixedTensor"]:
        """Iterates over the layers of a stack."""
        return (self[layer] for layer in range(len(self)))

    def astype(self, dtype: DTypeLike) -> "MixedTensor":
        """The same codes and scales, dequantized and multiplied in another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def with_bfloat16_scales(self) -> "MixedTensor":
        """The same weight with its scales in bfloat16, which holds the value of every byte."""
        return dataclasses.replace(self, scale=self.scales().astype(jnp.bfloat16))

    @property
    def groups(self) -> int:
        """``G``, the number of groups."""
        return group_count(self.shape[0], self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays: codes, scales, zeros, order and segments."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """``8 * nbytes`` over the number of weights (of all layers, if leaves are stacked)."""
        layers = math.prod(self.words.shape[:-2])
        return 8.0 * self.nbytes / (layers * self.shape[0] * self.shape[1])

    def scales(self) -> jax.Array:
        """Scales ``float32[G, N]`` in storage order."""
        return scales.decoded(self.scale)

    def zero_codes(self) -> jax.Array:
        """Zero codes ``uint8[G, N]`` in storage order."""
        return unpack_plane(self.zero, zero_bits(self.widths))[: self.groups]

    def zero_points(self) -> jax.Array:
        """Zero points ``float32[G, N]`` in storage order, in units of the scale."""
        return self.zero_codes().astype(jnp.float32) * self.zero_steps()[:, None]

    def zero_steps(self) -> jax.Array:
        """`zero_step` of every group in storage order, ``float32[G]``, by comparisons, which XLA fuses."""
        position, end = jnp.arange(self.groups), jnp.int32(0)
        steps = jnp.full(self.groups, zero_step(self.widths[0], self.widths), jnp.float32)
        for i, b in enumerate(self.widths[1:]):
            end = end + self.segments[i]
            steps = jnp.where(position >= end, jnp.float32(zero_step(b, self.widths)), steps)
        return steps

    def segment_starts(self) -> tuple[jax.Array, jax.Array]:
        """First group and first row of ``words`` of each segment, both ``int32[len(widths)]``."""
        rows = self.segments * jnp.asarray([self.group_size * b // WORD_BITS for b in self.widths], jnp.int32)
        return jnp.cumsum(self.segments) - self.segments, jnp.cumsum(rows) - rows

    def bits(self) -> np.ndarray:
        """Bit width of every group in the original order, ``int[G]``; needs concrete leaves."""
        bits = np.empty(self.groups, np.int64)
        bits[np.asarray(self.order)] = np.repeat(self.widths, np.asarray(self.segments))
        return bits

    def with_rows(self, rows: int) -> "MixedTensor":
        """The same weight with its words padded to ``rows`` rows; the padding is never read.

        Compiled programs depend on the number of rows, which depends on the mean width.
        """
        missing = rows - self.words.shape[-2]
        if not missing:
            return self
        return dataclasses.replace(self, words=jnp.pad(self.words, ((0, missing), (0, 0))))

    def codes(self) -> jax.Array:
        """The codes without scales and zeros, ``uint8[K, N]``."""
        ones = jnp.ones(self.scale.shape, jnp.bfloat16)
        plain = dataclasses.replace(self, scale=ones, zero=jnp.zeros_like(self.zero))
        return plain.dequantize(jnp.float32).astype(jnp.uint8)

    @partial(jax.jit, static_argnames="dtype")
    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The dense weight ``[K, N]``, computed in float32 and cast to ``dtype`` (default ``self.dtype``)."""
        out_dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        by_elements = partial(_dequantize_elements, dtype=out_dtype)
        by_groups = partial(_dequantize_groups, dtype=out_dtype)
        return lax.platform_dependent(self, cuda=by_elements, rocm=by_elements, default=by_groups)

    def columns(self, index: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """``dequantize(dtype)[:, index]`` as ``[*index.shape, K]``; other columns are not dequantized."""
        flat = index.reshape(-1)
        own = {name: getattr(self, name)[:, flat] for name in ("words", "scale", "zero")}
        some = dataclasses.replace(self, **own, shape=(self.shape[0], flat.size))
        return some.dequantize(dtype).T.reshape(*index.shape, self.shape[0])


FEW_COLUMNS = 8
"""Number of columns up to which a GPU recomputes for every column where its elements lie."""


def _dequantize_groups(w: MixedTensor, dtype: jnp.dtype) -> jax.Array:
    """Dequantizes group by group, in one loop per width: whole rows of words, which suits CPUs and TPUs."""
    g, n = w.group_size, w.shape[1]
    zero = w.zero_points()
    first_group, first_row = w.segment_starts()
    dense = vary_like(jnp.zeros((w.groups * g, n), dtype), w)

    for i, b in enumerate(w.widths):
        rows = g * b // WORD_BITS
        if rows > w.words.shape[0]:
            continue  # too few words for even one group of this width

        def body(position, dense, i=i, b=b, rows=rows):
            row = first_row[i] + (position - first_group[i]) * rows
            words = lax.dynamic_slice_in_dim(w.words, row, rows)
            code = unpack_group(words, b).astype(jnp.float32)
            weight = scales.decoded(w.scale[position])[None] * (code - zero[position][None])
            return lax.dynamic_update_slice_in_dim(dense, weight.astype(dtype), w.order[position] * g, axis=0)

        dense = lax.fori_loop(first_group[i], first_group[i] + w.segments[i], body, dense)
    return dense[: w.shape[0]]


def _dequantize_elements(w: MixedTensor, dtype: jnp.dtype) -> jax.Array:
    """Dequantizes every element by itself in one pass: on GPUs each iteration of a loop is several launches.

    The rows that hold a channel's codes, scale and zero code are computed beforehand, per channel.
    """
    g, (k, _) = w.group_size, w.shape
    channel = jnp.arange(k, dtype=jnp.int32)
    position = jnp.argsort(w.order).astype(jnp.int32)[channel // g]
    kind = (position[:, None] >= jnp.cumsum(w.segments)[None]).sum(axis=1, dtype=jnp.int32)
    first_group, first_row = w.segment_starts()

    def of_width(values: Sequence[float], dtype: DTypeLike = jnp.int32) -> jax.Array:
        return jnp.asarray(values, dtype)[kind]

    bits = of_width(w.widths)
    start = first_row[kind] + (position - first_group[kind]) * (g * bits // WORD_BITS)
    planes = [shifted_planes(b) for b in w.widths]
    rows, downs, masks, ups = [], [], [], []
    for t in range(max(map(len, planes))):
        # A width with fewer planes reads an arbitrary word and masks all of it.
        n, up = (of_width([(p[t] if t < len(p) else (1, 0))[i] for p in planes]) for i in range(2))
        height = g * n // WORD_BITS
        within = channel % g
        rows.append(start + g * up // WORD_BITS + within % height)
        downs.append((n * (within // height)).astype(jnp.uint32))
        masks.append(of_width([(1 << p[t][0]) - 1 if t < len(p) else 0 for p in planes], jnp.uint32))
        ups.append(up.astype(jnp.uint32))
    z = zero_bits(w.widths)
    zero_rows = w.zero.shape[0]
    zero_down = (z * (position // zero_rows)).astype(jnp.uint8)
    step = w.zero_steps()[position]
    if w.shape[1] > FEW_COLUMNS:  # for fewer columns, one launch without the barrier is better than several
        # Without the barrier XLA would recompute all this for every element.
        position, rows, downs, masks, ups, zero_down, step = lax.optimization_barrier(
            (position, rows, downs, masks, ups, zero_down, step)
        )
    code = jnp.uint32(0)
    for row, down, mask, up in zip(rows, downs, masks, ups):
        word = w.words.at[row].get(mode="promise_in_bounds")
        code = code | ((word >> down[:, None]) & mask[:, None]) << up[:, None]
    zero = w.zero.at[position % zero_rows].get(mode="promise_in_bounds") >> zero_down[:, None]
    zero = (zero & jnp.uint8((1 << z) - 1)).astype(jnp.float32) * step[:, None]
    scale = scales.decoded(w.scale.at[position].get(mode="promise_in_bounds"))
    return (scale * (code.astype(jnp.int32).astype(jnp.float32) - zero)).astype(dtype)


def exported[T: type](record: T) -> T:
    """Registers a record of arrays for `jax.export`, so that serialized programs may take it.

    The record's static fields must be numbers, tuples of numbers and dtypes.
    """

    def to_bytes(static: tuple[Any, ...]) -> bytes:
        return json.dumps(static, default=lambda dtype: dtype.name).encode()

    def value(found: Any) -> Any:
        if isinstance(found, list):
            return tuple(map(value, found))
        return jnp.dtype(found) if isinstance(found, str) else found

    jax.export.register_pytree_node_serialization(
        record,
        serialized_name=f"pallas_kernels.{record.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=lambda data: value(json.loads(data)),
    )
    return record


exported(MixedTensor)


def stack(layers: Sequence[MixedTensor]) -> MixedTensor:
    """Stacks weights that differ only in values and rows of words, on a new leading axis of every leaf."""
    most = max(w.words.shape[0] for w in layers)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[w.with_rows(most) for w in layers])


def abstract_tensor(
    shape: tuple[int, int],
    *,
    widths: tuple[int, ...],
    segments: tuple[int, ...],
    group_size: int,
    scale_dtype: DTypeLike = jnp.uint8,
    dtype: DTypeLike = jnp.float32,
) -> MixedTensor:
    """A packed weight of this layout without values: its leaves are `jax.ShapeDtypeStruct`.

    Args:
      shape: ``(K, N)``.
      widths: the widths that may occur, ascending.
      segments: number of groups of each width; they add up to ``ceil(K / group_size)``.
      group_size: input channels per group.
      scale_dtype: dtype of the scales: uint8 or bfloat16.
      dtype: dtype of the dequantized weight.

    Raises:
      ValueError: the segments do not add up.
    """
    (k, n), g = shape, group_size
    groups = group_count(k, g)
    if len(segments) != len(widths) or sum(segments) != groups:
        raise ValueError(f"segments {segments} of widths {widths} do not add up to {groups} groups")
    rows = sum(count * b for count, b in zip(segments, widths)) * g // WORD_BITS
    zero_rows = -(-groups // 2) if zero_bits(widths) == 4 else groups
    leaf: Any = jax.ShapeDtypeStruct
    return MixedTensor(
        words=leaf((rows, n), jnp.uint32),
        scale=leaf((groups, n), jnp.dtype(scale_dtype)),
        zero=leaf((zero_rows, n), jnp.uint8),
        order=leaf((groups,), jnp.int32),
        segments=leaf((len(widths),), jnp.int32),
        shape=shape,
        group_size=g,
        widths=widths,
        dtype=jnp.dtype(dtype),
    )
