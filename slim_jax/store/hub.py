"""Models by their name on the Hugging Face hub, ``owner/model`` or ``owner/model@revision``.

Whatever exists locally is meant first. Only the files that a model is read from are fetched: no pickles, and
none of the other forms of it that a repository may hold (``original/``, ``consolidated.safetensors``).
"""

import glob
import json
import re
from pathlib import Path

from slim_jax.store.manifest import MANIFEST, CheckpointError, is_checkpoint, read_manifest

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = (
    *(MANIFEST, INDEX, "config.json", "generation_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""Files beside the weights."""
ORBAX = ("outer/*", "blocks/*", "tokenizer/*")
"""Folders of a checkpoint whose manifest lists no safetensors."""


def is_hub_name(spec: str | Path) -> bool:
    """Whether this can only be meant as a name on the hub: nothing local has it."""
    text = str(spec)
    return not Path(spec).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", text) is not None


def download(spec: str, *, weights: bool = True) -> Path:
    """The folder of a hub model in the cache of huggingface_hub; only what is new is fetched.

    Args:
      spec: ``owner/model`` or ``owner/model@revision``.
      weights: the weights too, as the manifest or the index lists them.

    Raises:
      CheckpointError: the hub did not give it; one line says why.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = spec.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(SMALL)))
        if weights and (files := _weights(folder)):  # of the same commit, which the folder is named by
            snapshot_download(name, revision=folder.name, allow_patterns=files)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{spec} is not a local path, and {_reason(error, name, revision)}") from None
    return folder


def find(spec: str | Path, *, weights: bool = True) -> Path:
    """The folder or file that ``spec`` names, fetched first where it is a name on the hub.

    Raises:
      CheckpointError: as :func:`download`.
    """
    return download(str(spec), weights=weights) if is_hub_name(spec) else Path(spec)


def _weights(folder: Path) -> list[str]:
    """Patterns of the files that hold a model's weights; none where what lists them cannot be read."""
    if is_checkpoint(folder):
        files = read_manifest(folder).files
        return list(ORBAX) if files is None else sorted(map(glob.escape, files))
    try:
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(map(glob.escape, shards))
    except FileNotFoundError:
        return [SINGLE]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return []  # who reads the index says what is wrong


def _reason(error: BaseException, name: str, revision: str) -> str:
    """Why the hub did not give a model."""
    from huggingface_hub import errors

    causes = [error, *filter(None, [error.__cause__])]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated on the hub: ask for access on its page there, then log in with: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision or 'main'} on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private: log in with hf auth login"
    if status in (401, 403):
        return f"the hub gives no access to {name} (HTTP {status}): log in with hf auth login"
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "the hub is not asked, since HF_HUB_OFFLINE is set; the cache has not all of it"
    told = str(causes[-1]).strip().split("\n")[0] or type(causes[-1]).__name__
    if status is None and isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return f"the hub cannot be reached: {told}"
    return f"the hub did not give it: {told}"
