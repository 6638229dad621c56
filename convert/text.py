"""Text that grows token by token, and conversations as a model's chat template writes them."""

from collections.abc import Sequence
from typing import Any

from convert.errors import ConvertError, first_line


class Text:
    """The text of one row as its tokens come: never half a character, and nothing from a stop string on.

    Attributes:
      ids: the tokens so far.
      text: what they say, up to the first of the stop strings.
      stopped: whether there was one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.text, self.stopped, self.told = "", False, 0

    def take(self, token: int) -> bool:
        """The next token; whether the row ends with it."""
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        ends = [at for at in map(self.text.find, self.stop) if at >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        return self.stopped

    def news(self, *, final: bool = False) -> str:
        """What has come since the last call; what may yet change is held back, unless this is the last."""
        end = len(self.text)
        if not final and not self.stopped:
            if self.text.endswith("\ufffd"):
                return ""
            end -= max((_begun(self.text, stop) for stop in self.stop), default=0)
        new = self.text[self.told : end]
        self.told = max(self.told, end)
        return new


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``stop``."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def as_template(tokenizer: Any, messages: Sequence[dict[str, str]], **how: bool) -> str:
    """A conversation as a model's chat template writes it; ``how`` as transformers names it.

    Raises:
      ConvertError: the template refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template raises what it likes
        raise ConvertError(f"the chat template refuses: {first_line(error)}") from None


class Conversation:
    """Messages, and the tokens that a model is to continue.

    Args:
      tokenizer: with a chat template.
      name: of the model, for messages.
      system: what the model is told first.

    Raises:
      ConvertError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, name: str, system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise ConvertError(f"{name} has no chat template, expected one; generate --prompt does without")
        self.tokenizer = tokenizer
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []

    def say(self, role: str, content: str) -> None:
        """Adds a message."""
        self.messages.append({"role": role, "content": content})

    def prompt(self) -> list[int]:
        """The conversation so far, and the beginning of an answer.

        Raises:
          ConvertError: the template refuses the conversation.
        """
        return self._encode(self._write([*self.system, *self.messages], answer=True))

    def end_of_turn(self) -> list[int]:
        """The token that the template writes after an answer, where it is a special one.

        Raises:
          ConvertError: the template refuses the conversation, such as one with a system's message.
        """
        mark = "-answer-"
        turns = [{"role": "user", "content": "-question-"}, {"role": "assistant", "content": mark}]
        after = self._encode(self._write([*self.system, *turns], answer=False).rpartition(mark)[2])
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return [token for token in after[:1] if token in special]

    def _write(self, messages: list[dict[str, str]], *, answer: bool) -> str:
        return as_template(self.tokenizer, messages, add_generation_prompt=answer)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
