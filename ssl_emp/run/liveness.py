"""Whether the processes of a group live: each gives a sign every few seconds, or is lost.

A process that is gone closes its connections, and an exchange with it fails at once. One that hangs (stopped,
waiting for a disk that does not answer, caught in code that never gives control back to Python) keeps them
open. Whoever waits for it then waits in C code, where no signal of the system is heard and, in a store that
the hanging process serves, for ever. So the signs are given and watched by two threads beside the main one,
and no wait of the main thread for a store is without end.
"""

import atexit
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist

GRACE_SECONDS = 5.0  # for the main thread to notice and report it, before it is ended
TICK_SECONDS = 0.2
LONGEST_INTERVAL = 5.0  # seconds between two signs
LEFT = b"left"  # the last sign of a process that is done


class StoreSilent(RuntimeError):
    """A store gave no answer in time: the process that serves it hangs."""


class BoundedStore:
    """A key-value store: no operation takes longer than `seconds`, and signals are heard meanwhile.

    Args:
        store: torch's, whose own waits are in C code and may have no end.
        seconds: after which StoreSilent is raised.
    """

    def __init__(self, store: dist.Store, seconds: float = GRACE_SECONDS) -> None:
        self.store, self.seconds = store, seconds

    def set(self, key: str, value: str) -> None:
        self._within(self.store.set, key, value)

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return cast(bytes, self._within(self.store.get, key))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them are there."""
        return bool(self._within(self.store.check, list(keys)))

    def _within(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((operation(*arguments), None))
            except Exception as error:  # noqa: BLE001 - raised below, by who asked
                answers.put((None, error))

        threading.Thread(target=ask, name="store-operation", daemon=True).start()
        try:
            value, error = answers.get(timeout=self.seconds)
        except queue.Empty:
            raise StoreSilent(f"the store gave no answer within {self.seconds:g} s") from None
        if error is not None:
            raise error
        return value


@dataclass(frozen=True)
class Lost:
    """Which processes are lost, why (`rank 1 is lost (killed by SIGKILL)`), and the others' exit code."""

    ranks: frozenset[int]
    why: str
    code: int = 3


def named(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"


def ending(code: int) -> str:
    """How a process ended, from its exit code as `subprocess` gives it."""
    if code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def main_thread_clock() -> Callable[[], int]:
    """CPU time of the main thread in ns: stands still while it sleeps, waits for others, or is stopped.

    Without clocks of threads (macOS), that of the process: a main thread that hangs is not noticed.
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time_ns
    identity = threading.main_thread().ident
    assert identity is not None
    clock = time.pthread_getcpuclockid(identity)
    return lambda: time.clock_gettime_ns(clock)


class Liveness:
    """Gives this process's signs and watches others: process 0 watches all, all others process 0.

    A sign has two counters: one goes up as long as the process runs at all, the other as long as its main
    thread does something, be it to look again and again for others. If either stands still for
    `timeout_seconds` (and two intervals), the process is lost.

    Args:
        store: reached by all, with a connection of its own.
        rank, world_size, local_rank: who of how many, and the number on its machine.
        timeout_seconds: see above; may be set later too.
        leave: called as `leave(lost, speaks)` from a thread where the main thread has not left by itself
            within GRACE_SECONDS; it must end the process. `speaks`: whether this is the process that tells
            the user.
        children: processes that this one started, by rank.
        parent: the process number of rank 0, where that one started this one.
        clock: of what the main thread does.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        leave: Callable[[Lost, bool], None],
        *,
        local_rank: int = 0,
        children: dict[int, "subprocess.Popen[bytes]"] | None = None,
        parent: int | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.store, self.rank, self.world_size, self.local_rank = store, rank, world_size, local_rank
        self.timeout_seconds, self.leave = timeout_seconds, leave
        self.children, self.parent = children or {}, parent
        self.clock = clock or main_thread_clock()
        self.watched = [other for other in range(world_size) if other != rank] if rank == 0 else [0]
        self.lost: Lost | None = None
        now = time.monotonic()
        self.signs = {other: (b"", b"") for other in self.watched}  # the two counters as last heard
        self.runs_at = dict.fromkeys(self.watched, now)  # when the first counter last went up
        self.moves_at = dict.fromkeys(self.watched, now)  # when the second did
        self.gone: set[int] = set()  # left, and not watched any more
        self.answered_at = now  # when the store last answered
        self.runs = self.moves = 0
        self.told_clock = self.seen_clock = 0
        self.still_since = now
        self.lost_at = now
        self.signals: list[tuple[int, float]] = []  # number, and when it came
        self.pipe: tuple[int, int] | None = None
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    @property
    def interval(self) -> float:
        """Seconds between two signs."""
        return min(LONGEST_INTERVAL, self.timeout_seconds / 8)

    @property
    def limit(self) -> float:
        """Seconds without a sign until a process is lost; an exchange of `timeout_seconds` fails before."""
        return self.timeout_seconds + 2 * self.interval

    def start(self) -> None:
        """Begin. In the main thread, the system's signals are watched too."""
        if threading.current_thread() is threading.main_thread():
            self.pipe = os.pipe()
            for end in self.pipe:
                os.set_blocking(end, False)
            signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        with suppress(Exception):  # a sign that is not given is made up for by the next
            self._round()
        self.threads = [
            threading.Thread(target=work, name=f"liveness-{work.__name__}", daemon=True)
            for work in (self._give, self._watch)
        ]
        for thread in self.threads:
            thread.start()
        # a thread that comes out of C code while Python ends would abort the process
        atexit.register(self.stop)

    def stop(self) -> None:
        """Tell the others that this process is done, and end the threads."""
        if self.over.is_set():
            return
        self.over.set()
        for thread in self.threads:
            thread.join(2 * TICK_SECONDS + 1)
        with suppress(Exception):
            BoundedStore(self.store).set(f"sign/{self.rank}", LEFT.decode())
        if self.pipe is not None:
            with suppress(ValueError):  # not the main thread
                signal.set_wakeup_fd(-1)
            for end in self.pipe:
                os.close(end)
            self.pipe = None
        atexit.unregister(self.stop)

    def ended(self) -> set[int]:
        """Ranks of which this process knows from the system that they are no more."""
        found = {rank for rank, process in self.children.items() if process.poll() is not None}
        return found | ({0} if self.parent is not None and os.getppid() != self.parent else set())

    def speaks(self, lost: frozenset[int] | set[int]) -> bool:
        """Whether this process tells the user: the first alive; of each machine if the first's is gone."""
        return self.rank == min(set(range(self.world_size)) - lost, default=0) or (
            0 in lost and self.local_rank == 0
        )

    # ---- in the first thread: whatever may wait for the store

    def _give(self) -> None:
        while not self.over.wait(self.interval):
            with suppress(Exception):  # `_watch` measures how long nothing answers
                self._round()

    def _round(self) -> None:
        """Give a sign and hear those of others."""
        clock = self.clock()
        self.runs += 1
        self.moves += clock != self.told_clock
        self.told_clock = clock
        self.store.set(f"sign/{self.rank}", f"{self.runs} {self.moves}")
        for rank in self.watched:
            key = f"sign/{rank}"
            sign = self.store.get(key) if self.store.check([key]) else b""
            runs, _, moves = sign.partition(b" ")
            now, (old_runs, old_moves) = time.monotonic(), self.signs[rank]
            if sign == LEFT:
                self.gone.add(rank)
            if runs != old_runs:
                self.runs_at[rank] = now
            if moves != old_moves:
                self.moves_at[rank] = now
            self.signs[rank] = (runs, moves)
        self.answered_at = time.monotonic()

    # ---- in the second thread: what never waits

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.over.wait(TICK_SECONDS):
            now = time.monotonic()
            # this process itself was stopped: its silence is not that of others
            if now - before > GRACE_SECONDS:
                self._shift(now - before)
            before = now
            clock = self.clock()
            if clock != self.seen_clock:
                self.seen_clock, self.still_since = clock, now
            self._hear_signals(now)
            if self.lost is None:
                self.lost = self._find_lost(now)
                self.lost_at = now
            still = now - self.still_since
            if self.lost is not None and min(still, now - self.lost_at) > GRACE_SECONDS:
                self.leave(self.lost, self.speaks(self.lost.ranks))
            elif stopped := self._stopped_by(now, still):
                self.leave(stopped, True)

    def _shift(self, seconds: float) -> None:
        for times in (self.runs_at, self.moves_at):
            for rank in times:
                times[rank] += seconds
        self.answered_at += seconds
        self.still_since += seconds

    def _find_lost(self, now: float) -> Lost | None:
        for rank, process in self.children.items():
            code = process.poll()
            if code:
                return Lost(frozenset({rank}), f"{named([rank])} is lost ({ending(code)})")
        if 0 not in self.gone and 0 in self.ended():
            return Lost(frozenset({0}), "rank 0 is lost (its process is no more)")
        if now - self.answered_at > self.limit:
            return Lost(frozenset({0}), "rank 0 is lost (nothing answers for it any more)")
        for words, times in (("no sign of life", self.runs_at), ("it has not moved", self.moves_at)):
            silent = frozenset(
                rank for rank in self.watched if rank not in self.gone and now - times[rank] > self.limit
            )
            if silent:
                seconds = now - min(times[rank] for rank in silent)
                return Lost(silent, f"{named(silent)} is lost ({words} for {seconds:.0f} s)")
        return None

    def _hear_signals(self, now: float) -> None:
        if self.pipe is not None:
            with suppress(BlockingIOError):
                self.signals += [(number, now) for number in os.read(self.pipe[0], 64) if number in ENDING]

    def _stopped_by(self, now: float, still: float) -> Lost | None:
        """The signal that ends this process, where its main thread sits in C code and cannot hear it.

        A first one only where others give no sign of life, else the step is finished; a second one anyway.
        """
        if not self.signals:
            return None
        number, at = self.signals[0]
        overdue = max(GRACE_SECONDS, 2 * self.interval)
        silent = {
            rank for rank in self.watched if rank not in self.gone and now - self.runs_at[rank] > overdue
        }
        silent |= {0} if now - self.answered_at > overdue else set()
        first = silent and min(still, now - at) > GRACE_SECONDS
        again = len(self.signals) > 1 and min(still, now - self.signals[1][1]) > 1
        if not (first or again):
            return None
        those = frozenset(silent or self.watched)
        return Lost(
            those, f"stopped by {signal.Signals(number).name} while waiting for {named(those)}", 128 + number
        )


ENDING = {int(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}


def leave_at_once(line: str, code: int) -> None:
    """Write `line` to standard error, if any, and end the process, whatever its main thread does."""
    if line:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    # the main thread may hold the stream's lock
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1)
    os._exit(code)
