"""The signals that ask a run to finish its step, save and leave."""

import signal
import threading
from types import FrameType


class Stop:
    """In its context SIGTERM, SIGINT, SIGUSR1 and SIGHUP are noted in `signal`. A second one ends at once.

    In other threads than the main one, which get no signals, it does nothing.

    Attributes:
        ends_process: a second signal ends the process. Else it does what it did before: Ctrl-C in a notebook
            raises KeyboardInterrupt, and the kernel lives.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    ends_process = True

    def __init__(self) -> None:
        self.signal: int = 0

    def __enter__(self) -> "Stop":
        is_main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS if is_main}
        for number, handler in self._before.items():
            # nohup ignores SIGHUP, so that a run outlives its terminal
            if number != signal.SIGHUP or handler != signal.SIG_IGN:
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for again, before in self._before.items():
            if signal.getsignal(again) == self._note:
                signal.signal(again, signal.SIG_DFL if self.ends_process or before is None else before)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: set by C code, Python cannot restore it
                signal.signal(number, handler)
