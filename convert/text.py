"""Streamed text, token by token, and conversations rendered with a model's chat template."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, first_line

TEMPLATE_SECONDS = 5.0
"""Time limit of a chat template, which is a program that comes with the model."""
TEMPLATE_BYTES = 1 << 30
"""Memory that a chat template may take."""
HELD = 8
"""Tokens that wait for the rest of a character, at most; a character has at most four bytes."""
CONTEXTS = (16, 256)
"""Numbers of last prompt tokens to try as context; the whole prompt if both begin inside a character."""
PARTIAL = "\ufffd"


class Text:
    """The text of one row as its tokens arrive: never half a character, never a stop string.

    A token's text depends on its neighbours (spaces, characters that span tokens), so each token's text is
    the difference that it makes to the text of the few tokens before it. The prompt's text followed by this
    text is the text of all tokens.

    Args:
      tokenizer: the model's tokenizer.
      stop: strings that end the text.
      prompt: the tokens that the text continues; if empty, the text stands on its own.

    Attributes:
      ids: the tokens so far.
      stopped: True if a stop string came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._window = self._context(list(prompt))  # tokens already emitted, then pending ones
        self._known, self._given = len(self._window), len(self._decode(self._window))
        self._parts: list[str] = []  # of the text; `_told` of them were returned by `news`
        self._told, self._tail, self._partial = 0, "", ""

    @property
    def text(self) -> str:
        """The whole text so far, up to the first stop string."""
        return "".join([*self._parts, self._tail, self._partial])

    def take(self, token: int) -> bool:
        """Takes the next token; returns True if a stop string ended the row."""
        self.ids.append(token)
        text = self._tail + self._added(token)
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        held = max((_begun(text, stop) for stop in self.stop), default=0)
        if ends:
            text, held, self.stopped, self._partial = text[: min(ends)], 0, True, ""
        self._parts.append(text[: len(text) - held])
        self._tail = text[len(text) - held :]
        return self.stopped

    def delta(self, *, final: bool = False) -> str:
        """Returns the text since the last call; text that may still change is held back unless ``final``."""
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
        """Returns the end of a prompt, beginning at a character boundary."""
        ends = (prompt[-count:] for count in CONTEXTS)
        return next((end for end in ends if not self._decode(end).startswith(PARTIAL)), prompt)

    def _added(self, token: int) -> str:
        """Returns the whole characters that ``token`` adds."""
        self._window.append(token)
        now = self._decode(self._window)
        whole = now.rstrip(PARTIAL) if len(self._window) - self._known < HELD else now
        new, self._partial = whole[self._given :], now[max(self._given, len(whole)) :]
        if self._partial:
            self._given += len(new)
        elif new:
            del self._window[: self._known]
            self._known, self._given = len(self._window), len(self._decode(self._window))
        elif not self._decode([token, token]):  # such as a special token
            self._window.pop()
        return new


def _begun(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` that may begin ``stop``."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Raises ``MemoryError`` in the block if the process grows by more than ``size`` bytes; on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    if before == resource.RLIM_INFINITY or now + size < before:
        resource.setrlimit(resource.RLIMIT_AS, (now + size, most))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {size >> 20} MiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in the block after ``seconds``; only in the main thread, which gets signals."""
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
    """Renders a conversation with a model's chat template, in jinja's sandbox; ``how`` as in transformers.

    Raises:
      ConvertError: the template raises an error, takes too long or too much memory.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS), _memory_limit(TEMPLATE_BYTES):
            return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template can raise anything
        raise ConvertError(f"the chat template refuses: {first_line(error)}") from None


class Conversation:
    """Messages of a conversation, and the prompt tokens that the model is to continue.

    Args:
      tokenizer: a tokenizer with a chat template.
      name: the model's name, for messages.
      system: the system message, if any.

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
        """Returns the tokens of the conversation so far, followed by the beginning of an answer.

        Raises:
          ConvertError: the template fails on the conversation.
        """
        return self._encode(self._write([*self.system, *self.messages], answer=True))

    def end_of_turn(self) -> list[int]:
        """Returns the token that the template writes after an answer, if it is a special token.

        Raises:
          ConvertError: the template fails, for instance because it allows no system message.
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
