"""Tokenizers as transformers' ``PreTrainedTokenizerFast``, from directories or rebuilt from GGUF metadata."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from convert.errors import ConvertError, first_line, listed

# transformers warns at import that PyTorch is missing, which is intended here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def load_tokenizer(directory: str | Path) -> Any:
    """Loads the tokenizer of a Hugging Face directory or of one of our checkpoints.

    No Python code from the directory runs, and the user is not asked: where ``auto_map`` names some code,
    ``tokenizer.json`` is used without it.

    Raises:
      ConvertError: there is no tokenizer, it cannot be read, or it needs Python code from the directory.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = Path(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConvertError(f"{directory} has no tokenizer, expected one of {', '.join(TOKENIZER_FILES)}")
    only_model = not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if only_model and importlib.util.find_spec("sentencepiece") is None:
        raise ConvertError(f"{directory} has only tokenizer.model, which needs: pip install sentencepiece")
    # tokenizer.json is complete; a tokenizer class may deviate from it
    loader = PreTrainedTokenizerFast if (directory / "tokenizer.json").is_file() else AutoTokenizer
    try:
        found = loader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConvertError(
                f"{directory}: the tokenizer is a Python program (auto_map in tokenizer_config.json), which"
                " is not run, expected tokenizer.json"
            ) from None
        raise ConvertError(f"{directory}: the tokenizer cannot be read: {first_line(error)}") from None
    found.init_kwargs.pop("auto_map", None)  # we do not write that file
    return found


def save_tokenizer(tokenizer: Any, directory: str | Path) -> None:
    """Writes a tokenizer's files, for :func:`load_tokenizer` to read."""
    tokenizer.save_pretrained(str(directory))


def gguf_tokenizer(metadata: Mapping[str, Any], name: str) -> Any:
    """Builds the tokenizer that a GGUF's metadata describes.

    Args:
      metadata: the file's key-value pairs, including ``tokenizer.ggml.*``.
      name: the file's name, for messages.

    Raises:
      ConvertError: the vocabulary is missing or of an unsupported kind.
    """
    from transformers import PreTrainedTokenizerFast

    own = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if not own.get("tokens"):
        raise ConvertError(f"{name} has no tokenizer.ggml.tokens")
    template = metadata.get("tokenizer.chat_template")
    try:
        if template is not None and not isinstance(template, str):
            raise ConvertError(f"tokenizer.chat_template is {template!r}, expected a string")
        tokenizer, special = _build(own)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
        )
    except Exception as error:  # the tokenizers package raises no narrower type
        raise ConvertError(f"{name}: {first_line(error)}") from None
    fast.chat_template = template
    return fast


def _build(own: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Returns the tokenizer and its special tokens."""
    tokens, kind = own["tokens"], own.get("model")
    if kind == "gpt2":
        tokenizer = _byte_level(own)
    elif kind == "llama":
        tokenizer = _sentencepiece(own)
    else:
        raise ConvertError(f"tokenizer.ggml.model is {kind!r}, expected gpt2 or llama")
    special = _special_tokens(own)
    types = own.get("token_type") or [NORMAL] * len(tokens)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=type == CONTROL)
            for token, type in zip(tokens, types)
            if type in (CONTROL, USER_DEFINED)
        ]
    )
    bos = special.get("bos_token")
    if bos and own.get("add_bos_token", kind == "llama" or own.get("pre") == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, own["bos_token_id"])]
        )
    return tokenizer, special


def _special_tokens(own: Mapping[str, Any]) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {ours: own.get(f"{theirs}_token_id") for theirs, ours in keys.items()}
    return {f"{ours}_token": own["tokens"][id] for ours, id in ids.items() if id is not None}


def _words(pre: str) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer that splits text into words, by llama.cpp's name.

    Raises:
      ConvertError: the name is not known.
    """
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": gpt2,
        "default": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"), bytes_only]
        ),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"), bytes_only]
        ),
    }
    if pre not in known:
        raise ConvertError(f"tokenizer.ggml.pre is {pre!r}, expected one of {listed(list(known))}")
    return known[pre]


def _byte_level(own: Mapping[str, Any]) -> Tokenizer:
    """Builds GPT-2's byte-level BPE from tokens, merges and the name of the pre-tokenizer."""
    pre = own.get("pre", "default")
    words = _words(pre)
    merges = [tuple(merge.split(" ", 1)) for merge in own.get("merges") or ()]
    vocab = {token: i for i, token in enumerate(own["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = words
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(own: Mapping[str, Any]) -> Tokenizer:
    """Builds SentencePiece's BPE with byte fallback; merges are ranked by the scores of their results.

    As in transformers' Llama tokenizer, and unlike SentencePiece, ``<unk>`` or ``<s>`` in a text becomes that
    token, and text after a special token begins with a space of its own.
    """
    tokens, types = own["tokens"], own.get("token_type") or [NORMAL] * len(own["tokens"])
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {t: i for t, i in vocab.items() if types[i] in (NORMAL, UNUSED)}
    unknown = next((t for t, i in vocab.items() if types[i] == UNKNOWN), None)
    model = models.BPE(
        vocab=vocab,
        merges=_merges(pieces, own.get("scores") or [0.0] * len(tokens)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = own.get("add_space_prefix", True)
    spaces = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


def _merges(pieces: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best score first, in SentencePiece's order."""
    ranked = [
        (-scores[i], i, cut, (piece[:cut], piece[cut:]))
        for piece, i in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [pair for *_, pair in sorted(ranked)]
