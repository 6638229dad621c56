"""Streamed text with stop strings; conversations."""

import random
import sys
from importlib import resources
from typing import Any

import pytest
from command_line import write_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from convert import text as growing
from convert.errors import ConvertError
from convert.readers.load import load_source
from convert.text import Conversation, Text, as_template


class Characters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **how: bool) -> str:
        return bytes(ids).decode(errors="replace")


def grown(text: str, *stop: str) -> tuple[list[str], Text]:
    """Feeds a text byte by byte; returns the text emitted after every byte and at the end, and the row."""
    row, told = Text(Characters(), stop), []
    for byte in text.encode():
        stopped = row.take(byte)
        told.append(row.delta())
        if stopped:
            break
    return [*told, row.delta(final=True)], row


def test_half_a_character_is_held_back():
    assert grown("aé!")[0] == ["a", "", "é", "!", ""]
    row = Text(Characters())
    row.take("é".encode()[0])
    assert (row.delta(), row.delta(final=True)) == ("", "\ufffd")


def test_what_may_be_a_stop_string_is_held_back():
    told, row = grown("ab ac abd", "abd", "x")
    assert "".join(told) == row.text == "ab ac "
    assert row.stopped
    assert told[:4] == ["", "", "ab ", ""]
    told, row = grown("ab", "abd")
    assert (told, row.stopped) == (["", "", "ab"], False)


def test_the_first_stop_string_counts():
    _, row = grown("one two three", "two", "one two", "three")
    assert row.text == ""


LANGUAGES = (resources.files("convert") / "texts" / "languages.txt").read_text(encoding="utf-8")


def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer as of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([LANGUAGES], trainer)
    return tokenizer


def sentencepiece(*, metaspace: bool) -> Tokenizer:
    """A tokenizer as of Llama 2, Mistral and Phi-3, or with Metaspace; rare characters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [LANGUAGES], trainers.BpeTrainer(vocab_size=400, limit_alphabet=60, show_progress=False)
    )
    pieces = trained.get_vocab()
    words = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(pieces, key=pieces.get)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, "▁"]))}
    merges = [
        (a, piece[len(a) :])
        for piece in sorted(pieces, key=pieces.get)
        for a in (piece[:cut] for cut in range(1, len(piece)))
        if a in vocab and piece[len(a) :] in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    back = [decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), *back])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *back, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>"])
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)]
    )
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "llama": lambda: sentencepiece(metaspace=False),
    "metaspace": lambda: sentencepiece(metaspace=True),
}


class Counted:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: list[int], **how: bool) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **how)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_and_stream_are_the_text_of_all_tokens(kind: str) -> None:
    """Samples every language, with the prompt's end anywhere and special tokens in between."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), bos_token="<s>")
    draw, partial = random.Random(0), 0
    for _ in range(60):
        start = draw.randrange(len(LANGUAGES) - 300)
        text = LANGUAGES[start : start + draw.randrange(2, 300)]
        text += draw.choice(["", " ", "  🙂", "\n 日本", "é"])
        ids = tokenizer(text).input_ids
        if draw.random() < 0.5:  # special tokens must change nothing
            ids.insert(draw.randrange(len(ids)), tokenizer.bos_token_id)
        cut = draw.randrange(1, len(ids) + 1)
        while "\ufffd" in (prompt := tokenizer.decode(ids[:cut], skip_special_tokens=True)):
            cut -= 1  # a prompt is text of whole characters
        row, told = Text(tokenizer, prompt=ids[:cut]), []
        for token in ids[cut:]:
            row.take(token)
            told.append(row.delta())
            partial += told[-1] == ""
            assert "\ufffd" not in told[-1]
        told.append(row.delta(final=True))
        assert prompt + "".join(told) == tokenizer.decode(ids, skip_special_tokens=True)
        assert row.text == "".join(told)
    assert partial > 0


def test_the_space_after_a_prompt() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece(metaspace=False), bos_token="<s>")
    prompt, both = tokenizer("a").input_ids, tokenizer("a a").input_ids
    assert both[: len(prompt)] == prompt
    row = Text(tokenizer, prompt=prompt)
    answer = Text(tokenizer)  # an answer on its own, as in a chat
    for token in both[len(prompt) :]:
        row.take(token)
        answer.take(token)
    assert (row.text, answer.text) == (" a", "a")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_work_is_linear(kind: str) -> None:
    counted = Counted(PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), bos_token="<s>"))
    tokenizer = counted.tokenizer
    invalid = tokenizer.convert_tokens_to_ids("ÿ" if kind == "byte-level" else "<0xFF>")
    for ids in (
        tokenizer(LANGUAGES[:3000]).input_ids,
        [tokenizer.bos_token_id] * 1000,
        [invalid] * 1000,  # never a character
    ):
        row, counted.decoded = Text(counted, ["never comes"], ids[:100]), 0
        for token in ids[100:]:
            row.take(token)
            row.delta()
        assert counted.decoded < 30 * len(ids)


def test_a_chat_template_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    monkeypatch.setattr(growing, "TEMPLATE_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = loop * 3 + "{% endfor %}" * 3
    with pytest.raises(ConvertError, match=r"the chat template refuses: it has not ended after 0\.2 s"):
        as_template(tokenizer, [{"role": "user", "content": "Hi"}])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_a_chat_template_that_fills_the_memory() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    tokenizer.chat_template = "{{ 'x' * 4_000_000_000 }}"
    with pytest.raises(ConvertError, match="the chat template refuses: it takes more than 1024 MiB"):
        as_template(tokenizer, [{"role": "user", "content": "Hi"}])
    tokenizer.chat_template = "{{ 'x' * 1_000_000 }}"
    assert len(as_template(tokenizer, [{"role": "user", "content": "Hi"}])) == 1_000_000


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ messages[5].content.x }}",
        5,
    ],
)
def test_a_chat_template_has_no_python(template: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = template
    with pytest.raises(ConvertError, match="the chat template refuses: ") as caught:
        as_template(tokenizer, [{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)


def test_a_conversation(tmp_path):
    tokenizer = load_source(write_model(tmp_path / "hf")).tokenizer
    with pytest.raises(ConvertError, match="tiny has no chat template"):
        Conversation(tokenizer, "tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role == 'user' and 'w3 ' or 'w4 ' }}{{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}w4 {% endif %}"
    )
    talk = Conversation(tokenizer, "tiny")
    talk.say("user", "w5 w6")
    assert talk.prompt() == [3, 5, 6, 2, 4]
    talk.say("assistant", "w7")
    talk.say("user", "w8")
    assert talk.prompt() == [3, 5, 6, 2, 4, 7, 2, 3, 8, 2, 4]
    assert talk.end_of_turn() == [2]
    with pytest.raises(ConvertError, match="the chat template refuses: no system"):
        Conversation(tokenizer, "tiny", "w9").prompt()
