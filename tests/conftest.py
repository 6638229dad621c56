"""Strict settings for every test: no rank promotion; type annotations are checked at run time.

Tests compile hundreds of programs and run each a few times. To save time, LLVM's expensive optimizations are
off (`XLA_FLAGS`, if set, takes precedence), and processes share a compilation cache in a folder that is
deleted when the session ends.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

UNCHECKED = (
    # JAX rebuilds the array records in these modules with other leaves (shardings, shapes, untyped
    # gradients), which the fields' annotations would refuse.
    "pallas_kernels.layout",
    "pallas_kernels.prepared",
    "pallas_kernels.xla.prepared",
    "pallas_kernels.gpu.joined",
    "pallas_kernels.tpu.layers",
    "slim_jax.model.cache",
    "slim_jax.infer.sampling",
    # Tests describe devices that are not present with records that resemble JAX's.
    "pallas_kernels.chips",
    # Inside a kernel, these functions receive Mosaic's registers where interpret mode gives arrays.
    "pallas_kernels.gpu.registers",
    # Typer parses by these annotations, and passes other objects (its own click's Context).
    "convert.cli",
)


QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def modules(package: str) -> list[str]:
    """Names of the modules of a package, without importing them."""
    root = Path(find_spec(package).origin).parent
    files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    return sorted(".".join(file.parts) for file in files if file.name != "__init__")


CHECKED = [name for package in ("pallas_kernels", "slim_jax", "convert") for name in modules(package)]
install_import_hook([name for name in CHECKED if not name.startswith(UNCHECKED)], "typecheck.check")

jax.config.update("jax_num_cpu_devices", 8)  # tests of sharding need several; no other test sees them

# Examples compile, so a deadline for one would measure the machine, not the code.
settings.register_profile("slim", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("slim")


def pytest_configure(config: pytest.Config) -> None:
    """Configures compilation before any, for this process and those that tests start."""
    if config.option.markexpr == "aot":
        return  # these tests measure the output of the compilers of other devices
    if "not slow" in config.option.markexpr:  # slow tests spend more time computing than compiling
        os.environ.setdefault("XLA_FLAGS", QUICK)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="slim-jax-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips a test that needs a kernel which the lowest supported version of JAX cannot build."""
    try:
        return (yield)
    except NotImplementedError as error:
        if str(error).startswith("mosaic_gpu needs jax"):
            pytest.skip(str(error))
        raise


LONG = ("test_matmul_xla", "test_matmul_gpu", "test_matmul_tpu", "test_rules", "test_tune", "test_cli")
"""The longest files. They run first, so that no process runs one alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the long files to the front; the others keep their order (`--no-loadscope-reorder`)."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _no_rank_promotion():
    jax.config.update("jax_numpy_rank_promotion", "raise")


MAPS = Path("/proc/self/maps")
MANY_MAPS = 15_000
"""Limit on a process's memory maps, of the 65,530 that Linux allows.

A compiled program holds several maps; a worker that kept all the tests' programs ran out of them and died.
"""


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
