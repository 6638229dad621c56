"""Calibration windows of a resumable run: drawn once, and kept in its folder until it is finished."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slim_jax.store.files import json_digest, write_arrays
from slim_jax.store.manifest import is_checkpoint, read_manifest

KEPT = "drafts/calibration.npz"


class Draw(NamedTuple):
    """Recipe for calibration windows, drawn only if a run needs them and has not kept them from before.

    Attributes:
      recipe: JSON value; for one model, equal recipes give equal windows.
      make: draws the windows, ``int[samples, length]``.
    """

    recipe: Any
    make: Callable[[], np.ndarray]


class Windows(NamedTuple):
    """Calibration windows of a run.

    Attributes:
      tokens: ``int[samples, length]``; None if the run is finished and needs none.
      fingerprint: JSON values that a resumed run must share.
    """

    tokens: np.ndarray | None
    fingerprint: dict[str, Any]

    @classmethod
    def of(
        cls, given: np.ndarray | Draw, allocation: Mapping[str, list[int]] | None, path: Path, resume: bool
    ) -> "Windows":
        """Returns the windows of a run that writes to ``path``; draws them only if none are kept there."""
        recipe = json_digest(given.recipe) if isinstance(given, Draw) else None
        asked = {"recipe": recipe, "allocation": None if allocation is None else json_digest(allocation)}
        if not isinstance(given, Draw):
            tokens = np.asarray(given)
        else:
            found = read_manifest(path, complete=False) if resume and is_checkpoint(path) else None
            before = ((found and found.quantization) or {}).get("calibration") or {}
            same = asked.items() <= before.items()
            if found is not None and found.complete and same:
                return cls(None, before)
            kept = _read(path / KEPT) if same else None
            tokens = kept if kept is not None else np.asarray(given.make())
        shape = dict(zip(("samples", "length"), tokens.shape))
        digest = hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()
        return cls(tokens, {**shape, "sha256": digest, **asked})

    def keep(self, path: Path) -> None:
        """Writes the windows to the run's folder, if they were drawn."""
        if self.tokens is not None and self.fingerprint["recipe"]:
            write_arrays(path / KEPT, {"tokens": self.tokens})


def _read(file: Path) -> np.ndarray | None:
    try:
        with np.load(file) as saved:
            return saved["tokens"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # the caller draws them again
        return None
