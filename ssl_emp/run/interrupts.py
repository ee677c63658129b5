"""Signals that end a command, as an exception; the exit code is then 128 + the number of the signal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end. A KeyboardInterrupt, so that `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Here SIGTERM, SIGINT and SIGHUP raise `Stopped`, in `held()` at its end; a second one ends the process.

    Signals that are ignored stay ignored: nohup ignores SIGHUP, and shells SIGINT for background jobs. In
    other threads than the main one, which get no signals, this does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self._depth, self._waiting = 0, 0

    def __enter__(self) -> "Interrupts":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in self.SIGNALS}
            # None: set by C code, Python cannot restore it
            ignored = (signal.SIG_IGN, None)
            self._before = {number: handler for number, handler in found.items() if handler not in ignored}
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
        """Delay signals until this block has ended, so that rows are written and a table is printed whole."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._waiting and not self._depth:
            number, self._waiting = self._waiting, 0
            raise Stopped(number)
