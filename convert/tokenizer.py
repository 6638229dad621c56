"""Tokenizers as transformers' ``PreTrainedTokenizerFast``, from directories or rebuilt from GGUF metadata."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from convert.errors import ConvertError, first_line, listed

# transformers warns at import that PyTorch is missing, which is intended here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SPACE = "▁"
CONTROL, USER_DEFINED = 3, 4
"""Values of ``token_type``: tokens that are never split."""

GPT2_WORDS = ("default", "gpt-2", "olmo")
DIGIT_WORDS = ("smollm", "starcoder", "refact")
"""Pre-tokenizers that split as GPT-2's does, the latter with every digit alone."""
NORMALIZED = ("qwen2", "qwen35")
"""Pre-tokenizers of models that compose letters and accents first."""
IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken")
"""Pre-tokenizers of models that look a word up before they merge, and that begin a text with a BOS token."""


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
    tokens, kind = own.get("tokens"), own.get("model")
    if not tokens:
        raise ConvertError(f"{name} has no tokenizer.ggml.tokens")
    template = metadata.get("tokenizer.chat_template")
    try:
        if template is not None and not isinstance(template, str):
            raise ConvertError(f"tokenizer.chat_template is {template!r}, expected a string")
        if kind not in ("gpt2", "llama", "gemma4"):
            raise ConvertError(f"tokenizer.ggml.model is {kind!r}, expected gpt2, llama or gemma4")
        # Gemma 4's chat template writes BOS itself; its files ask for another, transformers does not
        bos = kind != "gemma4" and own.get(
            "add_bos_token", kind == "llama" or own.get("pre") in IGNORE_MERGES
        )
        special = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {f"{ours}_token": own.get(f"{theirs}_token_id") for theirs, ours in special.items()}
        fast = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(own) if kind == "gpt2" else _sentencepiece(own),
            clean_up_tokenization_spaces=False,
            add_bos_token=bool(bos),
            **{token: tokens[id] for token, id in ids.items() if id is not None},
        )
    except Exception as error:  # the tokenizers package raises no narrower type
        raise ConvertError(f"{name}: {first_line(error)}") from None
    fast.chat_template = template
    return fast


def _byte_level(own: Mapping[str, Any]) -> Tokenizer:
    """Builds byte-level BPE from tokens, merges and the name of the pre-tokenizer.

    transformers' converter of GGUF files is not used here: it does not compose Qwen's letters, does not look
    words up before it merges them for Llama 3, keeps SmolLM's digits together, and splits special tokens that
    are not ASCII.
    """
    pre = own.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in own.get("merges") or ()]
    vocab = {token: i for i, token in enumerate(own["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in IGNORE_MERGES))
    tokenizer.pre_tokenizer = _words(pre)
    if pre in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=type == CONTROL)
            for token, type in zip(own["tokens"], own.get("token_type") or ())
            if type in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def _words(pre: str) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer that splits text into words, by llama.cpp's name.

    Raises:
      ConvertError: the name is not known.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in GPT2_WORDS:
        return gpt2
    if pre in DIGIT_WORDS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre not in GGUF_PRE_TOKENIZER_SPLITS:
        known = [*GPT2_WORDS, *DIGIT_WORDS, *GGUF_PRE_TOKENIZER_SPLITS]
        raise ConvertError(f"tokenizer.ggml.pre is {pre!r}, expected one of {listed(known, len(known))}")
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])


def _sentencepiece(own: Mapping[str, Any]) -> Tokenizer:
    """Builds SentencePiece's BPE with byte fallback, by transformers' converter.

    All but Gemma's are built as Phi-3's. The converter's tokenizer for Llama drops a blank at the beginning
    of a text, which SentencePiece and llama.cpp keep. As in transformers, and unlike SentencePiece, ``<unk>``
    or ``<s>`` in a text becomes that token.
    """
    from transformers.integrations.gguf import convert_gguf_tokenizer

    tokens, family = own["tokens"], str(own.get("general.architecture"))
    described = {"scores": [0.0] * len(tokens), **own, "tokenizer_type": own["model"]}
    gemma = family.startswith("gemma")
    tokenizer, _ = convert_gguf_tokenizer(family if gemma else "phi3", described)
    if not gemma and not own.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    if tokenizer.get_vocab_size() > len(tokens):  # special tokens of the class that the model does not have
        described = json.loads(tokenizer.to_str())
        described["added_tokens"] = [t for t in described["added_tokens"] if t["id"] < len(tokens)]
        tokenizer = Tokenizer.from_str(json.dumps(described))
    return tokenizer
