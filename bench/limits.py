"""Time limits for kernels that may hang: the device cannot interrupt them, so the process exits."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Limit:
    """Ends the process, with status 1, when an operation exceeds its time limit.

    Attributes:
      on_expiry: called first, from another thread, with a sentence that names what took too long.
    """

    def __init__(self, on_expiry: Callable[[str], None], leave: Callable[[], None] = _leave) -> None:
        self.on_expiry, self._leave = on_expiry, leave

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Limits the duration of the block to this many seconds."""
        timer = threading.Timer(seconds, self._expire, [f"{what} did not end within {seconds:.0f} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self, sentence: str) -> None:
        try:
            self.on_expiry(sentence)
        finally:
            self._leave()
