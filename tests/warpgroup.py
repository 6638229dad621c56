"""A warpgroup in NumPy: executes the register code that GPU kernels emit, for all 128 threads at once.

``Warps`` and Mosaic's ``mma`` emit MLIR. This module executes the emitted operations one by one on arrays
``[128]`` (``[128, n]`` for a vector), one row per thread. :func:`elements` computes from the layout which
matrix elements a thread holds, by the definition of a tiling; :func:`mma_sync` computes what the tensor-core
instruction does with the registers of a warp, by the PTX manual.

This is no simulator of a GPU: memory, control flow and everything that the tests do not emit are missing.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils

THREADS, LANES = 128, 32


def elements(layout: fa.TiledLayout, shape: tuple[int, ...]) -> np.ndarray:
    """Flat positions ``int[128, registers, vector]`` of the array elements that the threads hold."""
    index = np.arange(math.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        whole, rank = index.shape[: -len(tile)], len(tile)
        pairs = [n for d, t in zip(index.shape[-rank:], tile) for n in (d // t, t)]
        first = len(whole)
        order = (*range(first), *range(first, first + 2 * rank, 2), *range(first + 1, first + 2 * rank, 2))
        index = index.reshape(*whole, *pairs).transpose(order)
    held = []
    for thread in range(THREADS):
        own: list[Any] = [slice(None)] * index.ndim
        for number, dims in ((thread // LANES, layout.warp_dims), (thread % LANES, layout.lane_dims)):
            sizes = [index.shape[d] if isinstance(d, int) else d.times for d in dims]
            for d, i in zip(dims, np.unravel_index(number, sizes)):
                if isinstance(d, int):
                    own[index.ndim + d] = slice(i, i + 1)
        held.append(np.moveaxis(index[tuple(own)], layout.vector_dim, -1).reshape(-1, layout.vector_length))
    return np.stack(held)


def mma_sync(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``mma.sync.aligned.m16n8k16`` of bfloat16: the PTX manual's fragments, multiplied as matrices.

    Takes ``uint32[4, 128]``, ``uint32[2, 128]`` and ``float32[4, 128]``, and returns an array like the last.
    A 32-bit register has two bfloat16, the first in its low half.
    """
    group, thread = np.divmod(np.arange(LANES), 4)

    def matrix(registers: np.ndarray, shape: tuple[int, int], place: Any) -> np.ndarray:
        halves = np.stack([registers & 0xFFFF, registers >> 16], 1).reshape(-1, THREADS)
        values = halves.astype(np.uint16).view(jnp.bfloat16).astype(np.float32)
        found = np.zeros((THREADS // LANES, *shape), np.float32)
        for i, value in enumerate(values):
            found[:, *place(i)] = value.reshape(-1, LANES)
        return found

    left = matrix(a, (16, 16), lambda i: (group + i // 2 % 2 * 8, 2 * thread + i % 2 + i // 4 * 8))
    right = matrix(b, (16, 8), lambda i: (2 * thread + i % 2 + i // 2 * 8, group))
    product = left @ right
    return c + np.stack(
        [product[:, group + i // 2 * 8, 2 * thread + i % 2].reshape(THREADS) for i in range(4)]
    )


class Warpgroup:
    """Computes the values of operations emitted since :func:`warpgroup` was entered."""

    def __init__(self, body: ir.Block) -> None:
        self._body, self._done = body, 0
        self._values: dict[ir.Value, Any] = {}

    def load(self, array: np.ndarray, layout: Any, owner: np.ndarray | None = None) -> fa.FragmentedArray:
        """Loads an array into registers. With ``owner``, each thread loads ``array[owner[thread]]``."""
        layout = layout.to_mgpu() if hasattr(layout, "to_mgpu") else layout
        shape = array.shape if owner is None else array.shape[1:]
        held = elements(layout, shape)
        flat = np.broadcast_to(array.reshape(-1), (THREADS, array.size)) if owner is None else None
        flat = array.reshape(len(array), -1)[owner] if flat is None else flat
        values = np.take_along_axis(flat, held.reshape(THREADS, -1), 1).reshape(held.shape)
        element = utils.dtype_to_ir_type(array.dtype)
        registers = np.empty(held.shape[1], object)
        for i in range(held.shape[1]):
            kind = ir.VectorType.get((layout.vector_length,), element)
            registers[i] = self._body.add_argument(kind, ir.Location.unknown())
            self._values[registers[i]] = values[:, i]
        signed = False if isinstance(element, ir.IntegerType) else None
        registers = registers.reshape(layout.registers_shape(shape))
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    def store(self, array: fa.FragmentedArray) -> np.ndarray:
        """Returns the array that the registers hold; threads that hold the same element must agree."""
        held = elements(array.layout, array.shape)
        values = np.stack([self.value(register) for register in array.registers.flat], 1)
        found = np.zeros(math.prod(array.shape), values.dtype)
        found[held] = values
        assert np.array_equal(np.unique(held), np.arange(found.size)), "elements that no thread holds"
        np.testing.assert_array_equal(found[held], values, "threads differ in an element that they share")
        return found.reshape(array.shape)

    def map(self, function: Any, *arrays: fa.FragmentedArray) -> fa.FragmentedArray:
        """Applies ``function`` to arrays of one layout, register by register, in NumPy."""
        first = arrays[0]
        registers = np.empty_like(first.registers)
        for i, old in enumerate(zip(*(array.registers.flat for array in arrays))):
            value = function(*map(self.value, old))
            kind = ir.VectorType.get((first.layout.vector_length,), utils.dtype_to_ir_type(value.dtype))
            registers.flat[i] = self._body.add_argument(kind, ir.Location.unknown())
            self._values[registers.flat[i]] = value
        return fa.FragmentedArray(_registers=registers, _layout=first.layout, _is_signed=first.is_signed)

    def value(self, value: ir.Value) -> np.ndarray:
        """Returns the threads' values: ``[128]``, or ``[128, n]`` for a vector."""
        if value not in self._values:
            operations = list(self._body.operations)
            for operation in operations[self._done :]:
                operands = [self._values[operand] for operand in operation.operands]
                self._values[operation.results[0]] = _compute(operation, operation.attributes, *operands)
            self._done = len(operations)
        return self._values[value]


@contextmanager
def warpgroup() -> Iterator[Warpgroup]:
    """Context in which GPU code can be emitted, for compute capability 9.0, and executed."""
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        i32 = ir.IntegerType.get_signless(32)
        module.operation.attributes["mosaic_gpu.arch_major"] = ir.IntegerAttr.get(i32, 9)
        module.operation.attributes["mosaic_gpu.arch_minor"] = ir.IntegerAttr.get(i32, 0)
        with ir.InsertionPoint(module.body):
            yield Warpgroup(module.body)


INTEGER = {
    "arith.addi": np.add,
    "arith.muli": np.multiply,
    "arith.divui": np.floor_divide,
    "arith.remui": np.remainder,
    "arith.shli": np.left_shift,
    "arith.shrui": np.right_shift,
    "arith.andi": np.bitwise_and,
}


def _dtype(kind: ir.Type) -> np.dtype:
    kind = ir.VectorType(kind).element_type if isinstance(kind, ir.VectorType) else kind
    if isinstance(kind, ir.IndexType):
        return np.dtype(np.uint64)
    if isinstance(kind, ir.IntegerType):
        return np.dtype(f"uint{kind.width}")
    return np.dtype({"bf16": jnp.bfloat16, "f32": np.float32}[str(kind)])


def _along_x(attributes: Any) -> bool:
    return "x" in re.findall(r"\w+", str(attributes["dimension"]))


def _compute(operation: Any, attributes: Any, *operands: Any) -> Any:
    """Computes one operation; an instruction with several results gives ``[results, 128]``."""
    name = operation.name
    kind = operation.results[0].type
    if name in INTEGER:
        return INTEGER[name](*operands)
    match name:
        case "arith.constant":
            value = attributes["value"].value % 2 ** (8 * _dtype(kind).itemsize)
            return np.full(THREADS, value, _dtype(kind))
        case "gpu.thread_id":
            return np.arange(THREADS, dtype=np.uint64) * _along_x(attributes)
        case "gpu.block_dim":
            return np.full(THREADS, THREADS if _along_x(attributes) else 1, np.uint64)
        case "arith.index_cast" | "arith.index_castui":
            return operands[0].astype(_dtype(kind))
        case "nvvm.shfl.sync":  # only broadcasts: each thread reads a thread of its warp
            assert "idx" in str(attributes["kind"])
            return operands[1].reshape(-1, LANES)[np.arange(THREADS) // LANES, operands[2]]
        case "arith.bitcast" | "vector.bitcast":
            return np.ascontiguousarray(operands[0]).view(_dtype(kind))
        case "vector.broadcast":
            return np.broadcast_to(operands[0][:, None], (THREADS, *ir.VectorType(kind).shape))
        case "vector.extract":
            return operands[0][:, next(iter(attributes["static_position"]))]
        case "vector.shuffle":
            return np.concatenate(operands, 1)[:, list(attributes["mask"])]
        case "vector.from_elements":
            return np.stack(operands, 1)
        case "llvm.mlir.undef":
            return np.zeros((THREADS, *ir.VectorType(kind).shape), _dtype(kind))
        case "llvm.insertelement":
            vector = np.array(operands[0])
            vector[np.arange(THREADS), operands[2]] = operands[1]
            return vector
        case "llvm.inline_asm":
            text = attributes["asm_string"].value
            assert text.startswith("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "), text
            numbers = [f"${i}" for i in range(14)]  # results, left, right, accumulator
            groups = ["{" + ",".join(numbers[i:j]) + "}" for i, j in ((0, 4), (4, 8), (8, 10), (10, 14))]
            assert text.endswith(" " + ", ".join(groups) + ";"), text
            return mma_sync(*(np.stack(operands[i:j]) for i, j in ((0, 4), (4, 6), (6, 10))))
        case "llvm.extractvalue":
            return operands[0][next(iter(attributes["position"]))]
    raise NotImplementedError(f"the tests' warpgroup does not know {name}")
