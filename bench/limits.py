"""Time limits for what may never end: a kernel that hangs on a device cannot be interrupted, only left."""

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
    """Ends the process, with status 1, when something takes longer than it may.

    Attributes:
      on_expiry: called first, from another thread, with a sentence that says what took too long.
    """

    def __init__(self, on_expiry: Callable[[str], None], leave: Callable[[], None] = _leave) -> None:
        self.on_expiry, self._leave = on_expiry, leave

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """What runs inside must end within so many seconds."""
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
