"""Text that grows, with stop strings; conversations."""

import pytest
from command_line import write_model

from convert.errors import ConvertError
from convert.load import load_source
from convert.text import Conversation, Text


class Characters:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


def grown(text: str, *stop: str) -> tuple[list[str], Text]:
    """What is told after every byte and in the end."""
    row, told = Text(Characters(), stop), []
    for byte in text.encode():
        stopped = row.take(byte)
        told.append(row.news())
        if stopped:
            break
    return [*told, row.news(final=True)], row


def test_half_a_character_is_held_back():
    assert grown("aé!")[0] == ["a", "", "é", "!", ""]
    row = Text(Characters())
    row.take("é".encode()[0])
    assert (row.news(), row.news(final=True)) == ("", "\ufffd")


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
