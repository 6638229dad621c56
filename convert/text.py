"""Text that grows token by token, and conversations as a model's chat template writes them."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from convert.errors import ConvertError, first_line

TEMPLATE_SECONDS = 5.0
"""So long a chat template may take, which is a program of the model's."""
HELD = 8
"""Tokens that wait for the rest of a character, at most: one has four bytes."""
CONTEXTS = (16, 256)
"""Tokens of a prompt that are looked at, from its end; all of it where these begin inside a character."""
PARTIAL = "\ufffd"


class Text:
    """The text of one row as its tokens come: never half a character, and nothing from a stop string on.

    A token's text depends on its neighbours (spaces, characters of several tokens), so it is what it adds to
    that of the few tokens before it. Together with the prompt's text it is that of all tokens.

    Args:
      tokenizer: of the model.
      stop: strings that end the text.
      prompt: the tokens that the text continues; where there are none, it begins a text of its own.

    Attributes:
      ids: the tokens so far.
      stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._window = self._context(list(prompt))  # tokens that are told, then those that wait
        self._known, self._given = len(self._window), len(self._decode(self._window))
        self._parts: list[str] = []  # of the text, `_told` of them told
        self._told, self._tail, self._partial = 0, "", ""

    @property
    def text(self) -> str:
        """All so far, up to the first of the stop strings."""
        return "".join([*self._parts, self._tail, self._partial])

    def take(self, token: int) -> bool:
        """The next token; whether the row ends with it."""
        self.ids.append(token)
        text = self._tail + self._added(token)
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        held = max((_begun(text, stop) for stop in self.stop), default=0)
        if ends:
            text, held, self.stopped, self._partial = text[: min(ends)], 0, True, ""
        self._parts.append(text[: len(text) - held])
        self._tail = text[len(text) - held :]
        return self.stopped

    def news(self, *, final: bool = False) -> str:
        """The text since the last call; what may yet change is held back, unless this is the last."""
        if final:
            self._parts += [self._tail, self._partial]
            self._tail = self._partial = ""
        new = "".join(self._parts[self._told :])
        self._told = len(self._parts)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **how) if ids else ""

    def _context(self, prompt: list[int]) -> list[int]:
        """The end of a prompt, from a character's beginning on."""
        ends = (prompt[-count:] for count in CONTEXTS)
        return next((end for end in ends if not self._decode(end).startswith(PARTIAL)), prompt)

    def _added(self, token: int) -> str:
        """Whole characters that ``token`` adds."""
        self._window.append(token)
        now = self._decode(self._window)
        whole = now.rstrip(PARTIAL) if len(self._window) - self._known < HELD else now
        new, self._partial = whole[self._given :], now[max(self._given, len(whole)) :]
        if self._partial:
            self._given += len(new)
        elif new:
            del self._window[: self._known]
            self._known, self._given = len(self._window), len(self._decode(self._window))
        elif not self._decode([token, token]):  # such as a special one; a space may be seen by the next
            self._window.pop()
        return new


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``stop``."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in the block after so long, in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"it has not ended after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_template(tokenizer: Any, messages: Sequence[dict[str, str]], **how: bool) -> str:
    """A conversation as a model's chat template writes it, in jinja's sandbox; ``how`` as in transformers.

    Raises:
      ConvertError: the template refuses the conversation, or does not end.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS):
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
