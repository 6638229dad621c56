"""Tokenizers, loaded from directories and rebuilt from the metadata of GGUF files."""

import importlib.util
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from golden_models import load_golden, write_hf
from test_gguf import write_gguf
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import GemmaTokenizer, GPT2Tokenizer, Qwen2Tokenizer
from transformers.tokenization_utils_base import generate_merges

from convert import ConvertError, load_source, load_tokenizer, save_tokenizer
from convert.tokenizer import gguf_tokenizer

TEXTS = ["the theme", "  two  spaces\nand 2024 lines\t", "naïve 日本 🙂", "it's a <|end|> here", ""]


def byte_level(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: all bytes, a few merges, two control tokens."""
    merges = ["t h", "th e", "Ġ the", "2 0", "20 2", "Ġ 2", "i t"]
    tokens = ["<|start|>", "<|end|>", *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    own = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in own.items() if value is not None}


def pieces(score: float = 0.0) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary with bytes, in which the best merge is not the longest."""
    words = {
        "▁": -9.0,
        "▁a": -1.0,
        "ab": -2.0,
        "bc": -0.5,
        "▁ab": -3.0,
        "abc": -4.0,
        "a": -6.0,
        "b": -7.0,
        "c": -8.0,
    }
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    own = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "scores": [0.0] * 259 + list(words.values()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()}


@pytest.mark.parametrize(
    "pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", None]
)
def test_byte_level_round_trip(pre: str | None, tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(byte_level(pre=pre), "x")
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert again(text, add_special_tokens=False).input_ids == ids
    assert (again.bos_token_id, again.eos_token_id) == (0, 1)
    assert tokenizer.tokenize("a<|end|>") == ["a", "<|end|>"]


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("gpt-2", ["Ġthe", "Ġ2", "0", "2", "4"]),  # the space belongs to the number
        ("smollm", ["Ġthe", "Ġ", "2", "0", "2", "4"]),  # each digit alone
        ("llama-bpe", ["Ġthe", "Ġ", "202", "4"]),  # three digits at most, and no space before them
        ("qwen2", ["Ġthe", "Ġ", "2", "0", "2", "4"]),
    ],
)
def test_cut_into_words(pre: str, cut: list[str]) -> None:
    merges = [m for m in byte_level()["tokenizer.ggml.merges"] if pre != "gpt-2" or m[0] != "2"]
    assert gguf_tokenizer(byte_level(pre=pre, merges=merges), "x").tokenize(" the 2024") == cut


def test_beginning_of_sequence() -> None:
    first = {
        "absent": gguf_tokenizer(byte_level(), "x"),
        "true": gguf_tokenizer(byte_level(add_bos_token=True), "x"),
        "llama3": gguf_tokenizer(byte_level(pre="llama-bpe"), "x"),
        "llama": gguf_tokenizer(pieces(), "x"),
        "false": gguf_tokenizer({**pieces(), "tokenizer.ggml.add_bos_token": False}, "x"),
    }
    added = {
        name: len(t("a").input_ids) - len(t("a", add_special_tokens=False).input_ids)
        for name, t in first.items()
    }
    assert added == {"absent": 0, "true": 1, "llama3": 1, "llama": 1, "false": 0}


def test_sentencepiece() -> None:
    tokenizer = gguf_tokenizer(pieces(), "x")
    assert tokenizer.tokenize("abc") == ["▁a", "bc"]  # bc first, then ▁a: best score, not longest
    assert tokenizer.tokenize("  ab") == ["▁", "▁", "▁ab"]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("abc", " ab c", "é\n🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    bare = gguf_tokenizer({**pieces(), "tokenizer.ggml.add_space_prefix": False}, "x")
    assert bare.tokenize("ab c") == ["ab", "▁", "c"]


SHIPPED = [
    (resources.files("convert") / "texts" / f"{name}.txt").read_text(encoding="utf-8")
    for name in ("languages", "code", "fiction")
]
LINES = [
    *("", " one", "  two  spaces", "\t\ttabs\t", "a\n\n\n b \n", "e\u0301tude Ａ", "x = 12345678  # it's"),
    *(
        "مرحبا بالعالم، كيف حالك؟",
        "안녕하세요 세계",
        "नमस्ते दुनिया",
        "def f(x):\n    return x\n",
        "日本語 🙂👍🏽",
    ),
    *(line for text in SHIPPED for line in text.splitlines()[:80]),
]


def trained(words: Any, **how: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE model that was trained on the shipped texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, **how)
    tokenizer.train_from_iterator(SHIPPED, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def same_tokens(metadata: dict[str, Any], reference: Any) -> None:
    tokenizer = gguf_tokenizer(metadata, "x")
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"])
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False).input_ids
        assert ids == reference(line, add_special_tokens=False).input_ids, line
        assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(("pre", "kind"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_level_tokens_are_those_of_transformers(pre: str, kind: Any) -> None:
    names = ["<|endoftext|>", "<｜User｜>"]
    byte_level_words = ByteLevel(add_prefix_space=False)
    vocab, merges = trained(byte_level_words, initial_alphabet=ByteLevel.alphabet(), special_tokens=names)
    metadata = byte_level(
        pre=pre,
        tokens=sorted(vocab, key=vocab.__getitem__),
        token_type=[3, 3] + [1] * (len(vocab) - 2),
        merges=[" ".join(merge) for merge in merges],
    )
    same_tokens(metadata, kind(vocab=vocab, merges=merges, unk_token=names[0]))
    ids = gguf_tokenizer(metadata, "x")("a<｜User｜>", add_special_tokens=False).input_ids
    assert ids == [vocab["a"], vocab["<｜User｜>"]]


def test_gemma_tokens_are_those_of_transformers() -> None:
    """Gemma's merges follow the order of the tokens, and its files have runs of blanks as they are."""
    names = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁▁",
        "▁▁▁▁",
    ]
    pieces, _ = trained(Split(" ", "merged_with_next"), limit_alphabet=60)
    words = [piece.replace(" ", "▁") for piece in sorted(pieces, key=pieces.__getitem__)]
    tokens = list(dict.fromkeys([*names, "▁", *words]))
    vocab = {token: i for i, token in enumerate(tokens)}
    stored = [" " * len(token) if set(token) == {"▁"} and len(token) > 1 else token for token in tokens]
    own = {
        "model": "llama",
        "tokens": stored,
        "token_type": [3, 3, 3, 2, 4] + [6] * 256 + [4, 4] + [1] * (len(tokens) - 263),
        "scores": [-float(i % 7) for i in range(len(tokens))],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "add_space_prefix": False,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    scores = {token: -i for token, i in vocab.items()}
    reference = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))
    same_tokens({**metadata, "general.architecture": "gemma3"}, reference)


def test_tokens_that_transformers_would_add_are_left_out() -> None:
    """transformers' Llama tokenizer adds its own special tokens to a vocabulary without them."""
    own = pieces()
    own["tokenizer.ggml.tokens"][:3] = ["[unk]", "[bos]", "[eos]"]
    tokenizer = gguf_tokenizer(own, "x")
    assert len(tokenizer) == len(own["tokenizer.ggml.tokens"])
    assert tokenizer.tokenize("[bos]a") == ["[bos]", "▁a"]
    assert tokenizer("a").input_ids[0] == 1


def test_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    save_tokenizer(gguf_tokenizer({**byte_level(), "tokenizer.chat_template": template}, "x"), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == template
    message = {"role": "user", "content": "Hi"}
    assert tokenizer.apply_chat_template([message], tokenize=False) == "[user]Hi"


@pytest.mark.parametrize(
    ("metadata", "culprit"),
    [
        ({}, "tokenizer.ggml.tokens"),
        (byte_level(model="bert"), "'bert'"),
        (byte_level(pre="qwen9"), "'qwen9'"),
        (byte_level(merges=["t nothere"]), "nothere"),
        (byte_level(merges=["nospace"]), "file.gguf"),
        (byte_level(bos_token_id=10**6), "file.gguf"),
    ],
)
def test_bad_metadata(metadata: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ConvertError) as caught:
        gguf_tokenizer(metadata, "file.gguf")
    assert culprit in str(caught.value)
    assert str(caught.value).startswith("file.gguf")
    assert "\n" not in str(caught.value)


# The warning comes from the oldest supported transformers with these two files.
@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")
def test_hf_directory(tmp_path: Path) -> None:
    source = load_source(write_hf(load_golden("opt_pre_norm"), tmp_path))
    with pytest.raises(ConvertError, match=r"has no tokenizer, expected one of tokenizer\.json"):
        _ = source.tokenizer
    own = byte_level()
    vocab = {token: i for i, token in enumerate(own["tokenizer.ggml.tokens"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))  # as OPT ships it
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *own["tokenizer.ggml.merges"]]))
    ids = load_source(tmp_path).tokenizer(" the", add_special_tokens=False).input_ids
    assert ids == [vocab["Ġthe"]]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConvertError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed"
)
def test_sentencepiece_model_needs_its_package(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ConvertError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("fast", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_python_of_a_folder_never_runs(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code is not run even if every question is answered with "y"."""
    save_tokenizer(gguf_tokenizer(byte_level(), "x"), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Own", "evil.Own"]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = {"model_type": "own", "auto_map": {"AutoConfig": "evil.Own", "AutoTokenizer": "evil.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
    if not fast:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if fast:
        tokenizer = load_tokenizer(tmp_path)
        save_tokenizer(tokenizer, tmp_path / "kept")
        assert "auto_map" not in (tmp_path / "kept" / "tokenizer_config.json").read_text()
    else:
        with pytest.raises(ConvertError, match=r"is a Python program \(auto_map .*expected tokenizer\.json"):
            load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


def test_gguf_without_vocabulary(tmp_path: Path) -> None:
    source = load_source(write_gguf(load_golden("llama_gqa_tied"), tmp_path / "model.gguf"))
    with pytest.raises(ConvertError, match=r"model\.gguf has no tokenizer\.ggml\.tokens"):
        _ = source.tokenizer
