"""The stages of `bench.device`: each is a generator of cases, a label and a function that runs the case.

A case returns a record: ``text`` for people, figures for programs, and ``failed``, the reason, if it failed.
An exception fails it too. Cases begin only while there is time.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import check as values
from bench import decode, fused, machine, matmul, timing
from bench.models import RandomSource, llama, random_decoder
from bench.quantize import peak_mib
from bench.results import Record, line
from convert import load_source
from convert.errors import ConvertError, first_line
from pallas_kernels import backends, chips
from pallas_kernels.layout import abstract_tensor
from pallas_kernels.tpu.config import checked
from slim_jax.calibrate.events import BlockDone, Event
from slim_jax.calibrate.pipeline import quantize
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.eval.windows import draw_windows
from slim_jax.infer.generate import Generator
from slim_jax.model.decoder import Decoder
from slim_jax.report import BlockReport
from slim_jax.store.source import read_decoder

Cases = Iterator[tuple[str, Callable[[], Record]]]

MOST_PROCESSES = 8
TEXT = Path(__file__).parent / "data" / "pride_and_prejudice.txt"


@dataclasses.dataclass
class Options:
    """Extent of the run: ``quick`` takes tiny shapes, ``deadline`` ends the stage, in monotonic seconds."""

    quick: bool = False
    deadline: float = math.inf

    @property
    def seconds(self) -> float:
        """Seconds that are left to the stage."""
        return self.deadline - time.monotonic()


def capability(options: Options) -> Cases:
    """The device, a first product, and the implementation that products take."""
    yield "the device", _describe
    yield "a first product", _first_product
    for m in (16,) if options.quick else (1, 16, 64, 2048):
        for group_size in (64, 128):
            yield f"M {m}, groups of {group_size}", partial(_implementation, m, group_size)


def _describe() -> Record:
    record = machine.describe_device()
    device = jax.devices()[0]
    for name in ("compute_capability", "core_count", "shared_memory_per_block_optin"):
        record[name] = getattr(device, name, None)
    try:
        memory = device.memory_stats() or {}
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError):
        memory = {}
    record["memory_bytes"] = memory.get("bytes_limit")
    record["devices"] = jax.device_count()
    record["known_as"] = dataclasses.asdict(chips.of_target())
    size = record["memory_bytes"]
    parts = [
        f"{record['devices']} x {record['kind']} ({record['platform']})",
        f"compute capability {record['compute_capability']}",
        f"{size / 2**30:.1f} GiB for JAX" if size else "memory unknown",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    if smi := record["nvidia_smi"]:
        parts.append(f"driver {smi['driver']}, {smi['sm_mhz']} of {smi['max_sm_mhz']} MHz, {smi['watts']} W")
    return record | {"text": "; ".join(parts)}


def _first_product() -> Record:
    x = jnp.full((256, 256), 0.5, jnp.bfloat16)
    start = time.monotonic()
    y = np.asarray(jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32))(x, x))
    seconds = time.monotonic() - start
    record: Record = {"seconds": seconds, "text": f"a dense bfloat16 product, compiled in {seconds:.1f} s"}
    return record if (y == 64).all() else record | {"failed": "a dense product of constants is wrong"}


def _implementation(m: int, group_size: int) -> Record:
    """Finds the implementation that a product of this size takes, and why the preferred ones refuse it."""
    groups = 4096 // group_size
    segments = (groups // 4, groups // 2, groups // 4)
    w = abstract_tensor((4096, 4096), widths=(1, 2, 3), segments=segments, group_size=group_size)
    x = jax.ShapeDtypeStruct((m, 4096), jnp.bfloat16)
    refused = []
    for name in backends.tried(m):
        try:
            jax.eval_shape(backends.BACKENDS[name].matmul, x, w)
        except NotImplementedError as error:
            refused.append(f"not {name}: {first_line(error)}")
            continue
        text = "; ".join([f"M {m}, groups of {group_size}: {name}", *refused])
        return {"m": m, "group_size": group_size, "implementation": name, "refused": refused, "text": text}
    return {"failed": "; ".join(refused), "text": f"M {m}: no implementation"}


def _likeliest(case: values.Case) -> bool:
    """True if a case is among the most informative, which run first because compiling takes seconds."""
    if case.n < 1024:
        return case.m == 17
    if case.joined:
        return case.m == 16 and (case.k, case.n) in ((4096, 4096), (11008, 1024))
    if case.split_k is not None:
        return case.m == 16 and case.bits == 2 and (case.k, case.n) in ((4096, 4096), (11008, 1024))
    if case.bits == 3:
        return case.m in (16, 2048) and (case.k, case.n) == (4096, 4096)
    return case.m in (1, 16, 33, 2048)


def check(options: Options) -> Cases:
    """Attention, MLPs and products compared with float64, the most informative cases first.

    TPUs first run the most informative cases with bounds and semaphores checked
    (`pallas_kernels.tpu.config.checked`).
    """
    if chips.of_target().platform == "cuda" and not options.quick:
        for kernel in fused.CASES:
            yield str(kernel), partial(_told, kernel.compare)
    wanted = list(values.CASES)
    if options.quick:
        wanted = [case for case in wanted if case.k == 192 and case.bits == 2 and case.m in (1, 17)]
    elif chips.of_target().platform != "cuda":
        wanted = [case for case in wanted if case.split_k is None]
    wanted.sort(key=lambda case: not _likeliest(case))
    # Only one process can hold a TPU. On a GPU, compiling a case takes much longer than running it.
    alone = options.quick or chips.of_target().platform != "cuda"
    processes = 1 if alone else min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))
    if chips.of_target().platform == "tpu":
        first = [case for case in wanted if options.quick or _likeliest(case)]
        with contextlib.closing(values.check(first)) as records:
            run = partial(_told, partial(next, records), checked)
            for case in first:
                yield f"{case}, bounds and semaphores checked", run
    records = values.check(wanted) if processes == 1 else values.check_in_processes(wanted, processes)
    with contextlib.closing(records):
        run = partial(_told, partial(next, records))
        for case in wanted:
            yield str(case) if processes == 1 else f"a case in {processes} processes", run


def _told(compare: Callable[[], Record], context: Any = contextlib.nullcontext) -> Record:
    with context():
        record = compare()
    return record | {"text": line(record)} | ({} if record["ok"] else {"failed": record["reason"]})


def table(options: Options) -> Cases:
    """Times of the packed product and of the products it is compared with."""
    shapes = ((128, 128),) if options.quick else ((4096, 4096), (4096, 11008), (11008, 4096))
    sizes = (1,) if options.quick else (16, 2048)
    wanted = [(m, k, n) for m in sizes for k, n in shapes]
    if not options.quick:
        wanted += [(m, 4096, 4096) for m in (1, 64, 8)]
    for m, k, n in wanted:
        yield f"M {m}, K {k}, N {n}", partial(_row, options, m, k, n)


def _settings(options: Options) -> argparse.Namespace:
    given = "--products packed,bf16,int4 --repeats 12 --seconds 4"
    if options.quick:
        given = "--products packed,f32 --repeats 3 --seconds 4 --group-size 32"
    return matmul.options(argparse.ArgumentParser(), given.split())


def _row(options: Options, m: int, k: int, n: int) -> Record:
    rows = matmul.measure(m, k, n, _settings(options))
    record = {"rows": rows, "nvidia_smi": machine.nvidia_smi(), "text": "\n".join(map(line, rows))}
    errors = [row["error"] for row in rows if row["product"] == "packed" and "error" in row]
    return record | {"failed": errors[0]} if errors else record


@cache
def _generators(quick: bool) -> dict[str, Generator]:
    """Generators of a random decoder, dense and packed: tiny, or eight equal blocks of Llama-2-7B's width."""
    config = llama(1, 64, 128, 2, 256, 4096) if quick else llama(8, 4096, 11008, 32, 4096, 4096)
    dtype = jnp.bfloat16 if timing.on_accelerator() else jnp.float32
    source = RandomSource(config, dtype=dtype, alike=True)
    packed = random_decoder(source, 2, 32 if quick else 128, alike=True)
    return {"dense": Generator(read_decoder(source)), "packed": Generator(packed)}


def decoding(options: Options) -> Cases:
    """Tokens per second of one sequence."""

    def measure(generators: dict[str, Generator]) -> dict[str, float]:
        speed = decode.measure(generators, *((4, 1) if options.quick else (64, 5)))
        return {name: 1 / found for name, found in speed.items()}

    return _compared(options, measure, "a token")


def prefill(options: Options) -> Cases:
    """Time to read a prompt."""
    length, rounds = (64, 1) if options.quick else (2048, 5)
    measure = partial(decode.measure_prefill, length=length, rounds=rounds)
    return _compared(options, measure, f"a prompt of {length} tokens")


def _compared(options: Options, measure: Callable[..., dict[str, float]], what: str) -> Cases:
    def build() -> Record:
        config = _generators(options.quick)["packed"].config
        return {"text": f"{config.num_layers} random blocks of {config.hidden_size}, dense and packed"}

    def compare() -> Record:
        generators = _generators(options.quick)
        seconds, layers = measure(generators), generators["packed"].config.num_layers
        ratio = seconds["dense"] / seconds["packed"]
        figures = ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in seconds.items())
        text = f"{what} through {layers} blocks: {figures}; packed is {ratio:.2f} times as fast"
        return {"seconds": seconds, "ratio": ratio, "layers": layers, "text": text}

    yield "a random decoder", build
    yield "both, taking turns", compare


class _OutOfTime(Exception):
    pass


def quantization(options: Options) -> Cases:
    """Quantization of SmolLM2 (a random decoder if its weights are not installed), and its perplexity."""
    yield "quantize", partial(_quantize, options)


def _model(options: Options) -> tuple[Any, np.ndarray, str]:
    """Returns a source, tokens of a text, and the model's name."""
    if not options.quick:
        try:
            source = load_source("smollm2")
            ids = source.tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
            return source, np.asarray(ids, np.int32), "SmolLM2"
        except ConvertError as error:
            print(f"a random decoder instead of SmolLM2: {error}", flush=True)
    small = llama(1, 64, 128, 1, 256, 2048)
    if not options.quick:
        small = llama(8, 576, 1536, 9, 256, 2048, num_kv_heads=3)
    tokens = np.random.default_rng(0).integers(0, 256, 1_000 if options.quick else 40_000)
    return RandomSource(small), tokens.astype(np.int32), f"a random decoder of {small.num_layers} blocks"


def _quantize(options: Options) -> Record:
    source, tokens, name = _model(options)
    samples, length, group_size = (4, 32, 32) if options.quick else (16, 512, 64)
    half = len(tokens) // 2
    blocks: list[BlockReport] = []

    def on_event(event: Event) -> None:
        if not isinstance(event, BlockDone):
            return
        block = event.report
        blocks.append(block)
        errors = [layer.error for layer in block.layers]
        if not np.isfinite(errors).all():
            raise ValueError(f"block {block.index} has errors that are not finite: {errors}")
        if block.index % 5 == 0 or block.index + 1 == block.total:
            print(f"  block {block.index + 1} of {block.total}: {block.seconds:.1f} s", flush=True)
        if options.seconds < 0 and block.index + 1 < block.total:
            raise _OutOfTime

    start = time.monotonic()
    config = SlimConfig(bits=2, group_size=group_size, method="rtn" if options.quick else "slim", tune=False)
    model = None
    try:
        windows = draw_windows(tokens[:half], samples, length, 0)
        model, report = quantize(source, windows, config, on_event=on_event)
    except _OutOfTime:
        pass
    seconds = time.monotonic() - start
    record: Record = {
        "model": name,
        "seconds": seconds,
        "block_seconds": [block.seconds for block in blocks],
        "mean_errors": [block.error for block in blocks],
        "host_peak_mib": peak_mib(),
        "text": f"{name}: {len(blocks)} of {blocks[0].total} blocks in {seconds:.1f} s",
    }
    if model is None:
        return record | {"text": record["text"] + ", then the time was up"}
    return (
        record
        | {"bits_per_weight": report.bits_per_weight}
        | _perplexities(source, model, tokens[half:], 32 if options.quick else 512, record["text"])
    )


def _perplexities(source: Any, model: Decoder, tokens: np.ndarray, window: int, text: str) -> Record:
    """Perplexity before and after, and after with XLA, which must agree with the platform's kernels."""
    found = {"dense": perplexity(read_decoder(source), tokens, window, 4).perplexity}
    found["packed"] = perplexity(model, tokens, window, 4).perplexity
    with backends.use_implementation("xla"):
        found["packed_by_xla"] = perplexity(model, tokens, window, 4).perplexity
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    record = {"perplexity": found, "text": f"{text}; perplexity {figures}"}
    if not np.isfinite(list(found.values())).all():
        return record | {"failed": f"a perplexity is not finite: {figures}"}
    apart = abs(math.log(found["packed"] / found["packed_by_xla"]))
    if apart > 0.02:
        return record | {"failed": f"the kernel's perplexity and XLA's differ by {math.exp(apart):.3f} times"}
    return record


def profile(options: Options) -> Cases:
    """Kernels that a product launches, from the profiler; the last stage, because it may fail on its own."""
    for m in (1,) if options.quick else (16, 2048):
        yield f"profile of M {m}", partial(_profile, options, m)
    yield "profile of tokens", partial(_profile_tokens, options)


def _profile_tokens(options: Options) -> Record:
    """Launches of a decoded token, and the time in kernels alone."""
    tokens, record, lines = 4 if options.quick else 32, dict[str, Any](), []
    for name, generator in _generators(options.quick).items():
        write = partial(generator.generate, [list(range(2, 18))], max_tokens=1 + tokens, stop=[])
        write()
        found = {kernel: (us / tokens, n / tokens) for kernel, (us, n) in timing.profiled(write).items()}
        us, launches = (sum(figures) for figures in zip(*found.values())) if found else (0.0, 0.0)
        record[name] = {"us_per_token": us, "launches_per_token": launches, "kernels": found}
        what = f"a token, {name}, {generator.config.num_layers} blocks"
        lines += [f"{what}: {us:.1f} us in {launches:.1f} launches"]
        lines += [
            f"    {us:8.2f} us {n:6.2f} x {kernel[:70]}" for kernel, (us, n) in list(found.items())[:24]
        ]
    return record | {"text": "\n".join(lines)}


def _profile(options: Options, m: int) -> Record:
    k = 128 if options.quick else 4096
    record: Record = {"m": m, "kernels_us": {}}
    lines = []
    for name, product in matmul.products(m, k, k, _settings(options)).items():
        record["kernels_us"][name] = found = timing.kernel_times(product)
        lines += [f"M {m}, K {k}, N {k}, {name}: {sum(found.values()):.2f} us in {len(found)} kernels"]
        lines += [f"    {us:.2f} us {kernel[:60]}" for kernel, us in list(found.items())[:12]]
    return record | {"text": "\n".join(lines)}


STAGES: dict[str, tuple[Callable[[Options], Cases], float]] = {
    "capability": (capability, 30),
    "check": (check, 150),
    "matmul": (table, 120),
    "decode": (decoding, 60),
    "prefill": (prefill, 20),
    "quantize": (quantization, 80),
    "profile": (profile, 20),
}
"""Name -> the stage and its seconds, eight minutes in total. Unused time goes to the stages that follow."""
