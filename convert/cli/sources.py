"""Opening the model that a command's SOURCE names, and its tokenizer; checks of options against them."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.display import say

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from slim_jax.model.config import DecoderConfig
    from slim_jax.model.decoder import Decoder
    from slim_jax.store.source import Source


def at_revision(spec: str, revision: str | None) -> str:
    """Returns SOURCE with the ``--revision`` appended.

    Raises:
      ValueError: the SOURCE is not a name on the hub.
    """
    from slim_jax.store.hub import is_hub_name

    if revision is None:
        return spec
    if not is_hub_name(named := f"{spec}@{revision}") or "@" in spec:
        raise ValueError(f"--revision {revision} needs a model on the hub, SOURCE is {spec}")
    return named


def open_source(spec: str, dtype: str | None = None) -> "Source":
    """Opens the model that a SOURCE argument names; reads no weights yet."""
    from convert.readers.load import open_model

    return open_model(spec, dtype)


def describe(spec: str) -> "tuple[DecoderConfig, dict[str, Any]]":
    """Reads the config of the model that a SOURCE argument names, and notes about its checkpoint."""
    from convert.readers.load import describe

    return describe(spec)


def whole_decoder(source: "Source", *, rounded: bool = False) -> "Decoder":
    """Reads the whole model into memory; see `slim_jax.store.source.read_decoder`."""
    from slim_jax.store.source import read_decoder

    return read_decoder(source, rounded=rounded)


def tokenizer_of(source: "Source") -> Any:
    from convert.readers.load import source_tokenizer

    return source_tokenizer(source)


def optional_tokenizer(source: "Source") -> Any:
    """Returns the tokenizer; where the model has none, prints a note and returns None."""
    try:
        return tokenizer_of(source)
    except ValueError as error:
        say(f"note: continuing without a tokenizer: {error}")
        return None


def devices_mesh(devices: int, *, cores: bool = False) -> "Mesh | None":
    """Mesh of the first ``devices`` devices, or None for one.

    Args:
      devices: number of devices.
      cores: if True and there is no accelerator, that many CPU cores serve as devices.

    Raises:
      ValueError: there are fewer devices.
    """
    import jax

    if cores and devices > 1:
        with contextlib.suppress(RuntimeError):  # JAX has already been initialized
            jax.config.update("jax_num_cpu_devices", devices)
    found = jax.devices()
    has = min(len(found), os.cpu_count() or 1) if cores and found[0].platform == "cpu" else len(found)
    if devices > has:
        raise ValueError(f"--devices is {devices}, this machine has {has} ({found[0].platform})")
    return jax.make_mesh((devices,), ("devices",), devices=found[:devices]) if devices > 1 else None


def keep_tokenizer(tokenizer: Any, out: Path) -> None:
    from convert.tokenizer import save_tokenizer

    if tokenizer is not None:
        save_tokenizer(tokenizer, out / "tokenizer")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text, including those that the model's tokenizer puts before it."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def require_folder(option: str, file: Path | None) -> None:
    if file is not None and not file.resolve().parent.is_dir():
        raise ValueError(f"{option}: {file.parent} is not a directory")


def require_positions(name: str, tokens: int, config: "DecoderConfig") -> None:
    if tokens > config.max_positions:
        raise ValueError(f"{name} is {tokens}, but the model has {config.max_positions} positions")


def window_length(length: int | None, config: "DecoderConfig") -> int:
    """Tokens of a calibration window: ``length``, else the default or the model's positions if fewer.

    Raises:
      ValueError: the model has fewer positions than ``length``.
    """
    from slim_jax.config import LENGTH

    if length is None:
        return min(LENGTH, config.max_positions)
    require_positions("--length", length, config)
    return length
