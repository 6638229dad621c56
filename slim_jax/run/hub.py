"""Models by their name on the Hugging Face hub, ``owner/model``; whatever exists locally is meant first."""

import re
from pathlib import Path

from slim_jax.run.manifest import CheckpointError

JSON_FILES = ("*.json", "*.jinja", "*.txt")
FILES = (*JSON_FILES, "*.safetensors", "tokenizer.model")
"""No pickles."""


def is_hub_name(spec: str | Path) -> bool:
    """Whether this can only be meant as ``owner/model``: nothing local has the name."""
    text = str(spec)
    return not Path(spec).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None


def download(name: str, files: tuple[str, ...] = FILES) -> Path:
    """The folder of hub model ``name`` in the cache of huggingface_hub; only what is new is fetched.

    Raises:
      CheckpointError: the hub did not give it; one line says why.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{name} is not a local path, and the hub did not give it: {reason}") from None


def find(spec: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """The folder or file that ``spec`` names, fetched first where it is ``owner/model`` on the hub.

    Raises:
      CheckpointError: as :func:`download`.
    """
    return download(str(spec), files) if is_hub_name(spec) else Path(spec)
