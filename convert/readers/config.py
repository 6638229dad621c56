"""Configs of Hugging Face models, resolved by transformers' configuration classes.

The classes import without PyTorch, and no code of a repository is run. They rename older keys, fill in what a
file leaves out (`layer_types`, `rope_parameters`) and check types. A family's table reads the resolved
fields; a field of the file that it does not read must have the class's default.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from convert.errors import ConvertError, listed
from convert.families.family import HFFormat, count
from slim_jax.model.config import DecoderConfig

POSITIVE = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers"),
    *("sliding_window_pattern", "no_rope_layer_interval", "full_attention_interval"),
)
"""Numbers by which the classes divide, or of which they make lists, before they are checked."""

MOST_LAYERS = 1 << 16

DROPPED = ("torch_dtype", "dtype", "quantization_config", "num_labels", "id2label", "label2id")
"""Fields that the classes do not get, besides the configs of other parts than the text."""

LINE = 300
"""Characters of another library's message that are told."""

TOWER = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
"""Fields of a model of several parts that hold for its text tower."""

UNUSED = frozenset((
    "architectures", "model_type", "transformers_version", "auto_map", "_name_or_path", "name_or_path",
    "dtype", "torch_dtype", "quantization_config", "use_cache", "tokenizer_class", "type",
    "return_dict", "pad_token_id", "cache_implementation", "bos_token_id", "eos_token_id",
    "sep_token_id", "cls_token_id", "unk_token_id", "decoder_start_token_id", "image_token_id",
    "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index",
    "initializer_range", "initializer_factor", "init_std", "attention_dropout", "hidden_dropout",
    "resid_pdrop", "embd_pdrop", "dropout", "layerdrop", "activation_dropout", "classifier_dropout",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux",
    "pretraining_tp", "gradient_checkpointing", "output_attentions", "output_hidden_states",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "id2label",
    "label2id", "num_labels", "problem_type", "prefix", "task_specific_params", "finetuning_task",
    "chunk_size_feed_forward", "pruned_heads", "torchscript", "tf_legacy_loss", "use_bfloat16",
    "unsloth_version", "unsloth_fixed", "ep_size", "num_nextn_predict_layers", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings", "is_llama_config", "compression_config",
))  # fmt: skip
"""Fields that do not change what a decoder computes; ``type`` is the older name of ``rope_type``."""


class Fields(dict[str, Any]):
    """Fields of a config, nested ones too, that record which of them have been read."""

    def __init__(self, values: Mapping[Any, Any], aliases: Mapping[str, str] | None = None) -> None:
        super().__init__({k: Fields(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.seen: set[str] = set()
        self._aliases = aliases or {}

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._seen(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._seen(str(key)))

    def _seen(self, key: str) -> str:
        """Records that a field is read; returns the name under which the class keeps it."""
        key = self._aliases.get(key, key)
        self.seen.add(key)
        return key

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(self._seen(key), default)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Yields the fields that were not read, with dotted names."""
        for key, value in self.items():
            if key not in self.seen:
                yield key, value
            elif isinstance(value, Fields):
                yield from ((f"{key}.{name}", inner) for name, inner in value.unread())


def read_resolved(hf: Mapping[str, Any], form: HFFormat) -> DecoderConfig:
    """Reads our config from config.json by a family's table.

    Args:
      hf: the file's dictionary; where it has a ``text_config``, that one is read.
      form: the family's format.

    Raises:
      ConvertError: a value is refused by transformers' class or by the table, or a field is neither read nor
        at its default.
    """
    whole = _made(hf)
    tower = getattr(whole, "text_config", None) or whole
    given = hf if tower is whole else hf.get("text_config") or {}
    shared = {**_of_whole(hf, given, whole), "model_type": type(tower).model_type}
    fields = Fields({**vars(tower), **shared}, type(tower).attribute_map)
    config = form.read_config(fields)
    _refuse_unread(fields, given, tower, form.unused)
    if tower is not whole:
        known = {*TOWER, *UNUSED, *_known(whole), *form.unused}
        _refuse([(k, v) for k, v in hf.items() if k in vars(whole) and k not in known], whole)
    return config


def sections(hf: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns config.json, and its part for the text tower if there is one."""
    text = hf.get("text_config")
    return [hf, text] if isinstance(text, dict) else [hf]


def _made(hf: Mapping[str, Any]) -> Any:
    """Makes transformers' configuration of the file."""
    from transformers import CONFIG_MAPPING, __version__

    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = ", and the repository's own code is not run" if hf.get("auto_map") else ""
        raise ConvertError(f"model_type is {kind!r}, for which transformers {__version__} has no class{code}")
    for part in sections(hf):
        for key in POSITIVE:
            if key == "sliding_window_pattern" and isinstance(part.get(key), str):
                continue  # EXAONE 4 has letters
            value = 1 if part.get(key) is None else count(part, key)
            if key == "num_hidden_layers" and value > MOST_LAYERS:
                raise ConvertError(f"{key} is {part[key]}, expected {MOST_LAYERS} at most")
        if part.get("per_layer_config") and part.get("model_type") != "gemma4_text":
            raise ConvertError("per_layer_config is given, expected one config for all blocks")
    return _make(CONFIG_MAPPING[kind], hf)


def _make(make: Any, given: Mapping[str, Any]) -> Any:
    """Makes a configuration; the class's own errors become one line."""
    fields = copy.deepcopy(dict(given))
    for key in {*DROPPED, *make.sub_configs} - {"text_config"}:
        fields.pop(key, None)
    for rope in (fields.get("rope_scaling"), fields.get("rope_parameters")):
        if isinstance(rope, dict) and rope.get("type", rope.get("rope_type")) == "su":
            rope["type"] = rope["rope_type"] = "longrope"  # its older name, which the class does not check
    try:
        with _quiet():
            return make(**fields)
    except Exception as error:  # whatever a class raises for a value that it does not expect
        told = (str(error).strip() or type(error).__name__).split("\n")[-1].strip()
        raise ConvertError(f"{make.__name__} refuses the config: {told[:LINE]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' logger, whose warnings are about fields that are checked here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _of_whole(hf: Mapping[str, Any], given: Mapping[str, Any], whole: Any) -> dict[str, Any]:
    """Returns the fields that the whole model decides for its text tower."""
    found = {key: hf[key] for key in ("architectures", *TOWER) if hf.get(key) is not None}
    if given is not hf and not {"tie_word_embeddings"} & (hf.keys() | given.keys()):
        found["tie_word_embeddings"] = getattr(whole, "tie_word_embeddings", False)
    return found


def _known(config: Any) -> set[str]:
    """Returns the names of the fields that a configuration's class declares."""
    made = (inspect.signature(kind.__init__).parameters for kind in type(config).__mro__)  # type: ignore[misc]
    return {name for names in made for name in names} | set(getattr(config, "__dataclass_fields__", ()))


def _refuse_unread(fields: Fields, given: Mapping[str, Any], config: Any, unused: tuple[str, ...]) -> None:
    """Refuses fields of the file that nobody has read, unless they have the value that the class gives.

    Fields that the class itself has taken, such as ``rope_theta``, are not among its attributes any more.
    """
    aliases, skipped = type(config).attribute_map, UNUSED | set(unused)
    named = {aliases.get(key, key): key for key in given}
    left = [
        (name, value)
        for name, value in fields.unread()
        if not {name, name.rpartition(".")[2]} & skipped and (name in named or "." in name)
    ]
    if not left:
        return
    unread = {named[name] for name, _ in left if name in named}
    default = vars(_make(type(config), {key: value for key, value in given.items() if key not in unread}))
    _refuse([(name, value) for name, value in left if name not in default or default[name] != value], config)


def _refuse(left: list[tuple[str, Any]], config: Any) -> None:
    """Raises an error for fields that have a value; null, false and empty lists are the absence of a feature.

    Raises:
      ConvertError: there are such fields.
    """
    wrong = [(name, value) for name, value in left if value is not None and value is not False]
    wrong = [(name, value) for name, value in wrong if value != [] and value != {}]
    if not wrong:
        return
    known = _known(config)
    foreign = [f"{name} = {value!r}" for name, value in wrong if name.partition(".")[0] not in known]
    if foreign:
        raise ConvertError(
            f"{listed(foreign)}: not known to {type(config).__name__}; remove it from config.json if the"
            " model does without it"
        )
    raise ConvertError(f"{listed([f'{n} = {v!r}' for n, v in wrong])} is not supported, only the default is")
