"""Signals that end a command, as an exception: what was done is kept, and the exit code is 128 + the signal's
number.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal asked for the end. As a KeyboardInterrupt it passes by whatever catches ordinary errors."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """In its context SIGTERM, SIGINT and SIGHUP raise `Stopped`, but not while `held()`. A second one ends
    the process at once.

    What is ignored stays so: nohup ignores SIGHUP, and a shell SIGINT for what it runs in the background.
    Only the main thread gets signals; in another one this does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self._depth, self._waiting = 0, 0

    def __enter__(self) -> "Interrupts":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in self.SIGNALS}
            self._before = {
                number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)
            }
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        if not self._depth:
            raise Stopped(number)
        self._waiting = number

    @contextmanager
    def held(self) -> Iterator[None]:
        """What happens in here is finished first: rows that are computed are written, a table is printed."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._waiting and not self._depth:
            number, self._waiting = self._waiting, 0
            raise Stopped(number)
