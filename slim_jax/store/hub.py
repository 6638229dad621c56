"""Downloads models by their name on the Hugging Face hub, ``owner/model`` or ``owner/model@revision``.

A local path of that name takes precedence. Only the files that a model is read from are fetched: no pickles,
and no other copies of the model that a repository may hold (``original/``, ``consolidated.safetensors``).
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
"""Files other than the weights."""
ORBAX = ("outer/*", "blocks/*", "tokenizer/*")
"""Folders of a checkpoint whose manifest lists no safetensors files."""


def is_hub_name(spec: str | Path) -> bool:
    """True if this has the form of a name on the hub and no such path exists locally."""
    text = str(spec)
    return not Path(spec).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", text) is not None


def download(spec: str, *, weights: bool = True) -> Path:
    """Downloads a hub model; returns its folder in the cache of huggingface_hub. Only new files are fetched.

    Args:
      spec: ``owner/model`` or ``owner/model@revision``.
      weights: if True, the weights are fetched too, as the manifest or the index lists them.

    Raises:
      CheckpointError: the hub did not provide it; the one-line message says why.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = spec.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(SMALL)))
        if weights and (files := _weights(folder)):  # from the same commit, which is the folder's name
            snapshot_download(name, revision=folder.name, allow_patterns=files)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{spec} is not a local path, and {_reason(error, name, revision)}") from None
    return folder


def find(spec: str | Path, *, weights: bool = True) -> Path:
    """Returns the folder or file that ``spec`` names; downloads it first if it is a name on the hub.

    Raises:
      CheckpointError: as for :func:`download`.
    """
    return download(str(spec), weights=weights) if is_hub_name(spec) else Path(spec)


def _weights(folder: Path) -> list[str]:
    """Patterns of the files that hold a model's weights; none if the index that lists them cannot be read."""
    if is_checkpoint(folder):
        files = read_manifest(folder).files
        return list(ORBAX) if files is None else sorted(map(glob.escape, files))
    try:
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(map(glob.escape, shards))
    except FileNotFoundError:
        return [SINGLE]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return []  # the reader of the index reports the error


def _reason(error: BaseException, name: str, revision: str) -> str:
    """Explains why the hub did not provide a model."""
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
