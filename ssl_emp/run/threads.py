"""How many threads torch computes with on a CPU that other programs use as well.

The threads of an operation share it in equal parts and wait for the slowest. Where another program has the
core of one of them, that is the slowest by far, and with GNU's OpenMP, which torch comes with, the others
spin meanwhile: on two cores with three busy programs beside it a step took many times as long with two
threads as with one (docs/shared_machine.md). So there is a thread for each core that others leave: at
the start, and every few seconds of a run. What others use is seen in /proc/stat, so on Linux only.

Nothing here imports torch before it is needed: `spin_briefly` has to come first.
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

# a thread that waits for another looks so often before it sleeps, where the user says nothing: under a
# millisecond instead of several. GNU's OpenMP has 300,000
SPIN_COUNT = 30_000
SPINS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch takes its number from them
WINDOW_SECONDS = 10.0  # what others use is the mean over so long
START_SECONDS = 0.5  # at the start at least so long
RECENT_SECONDS = 60.0  # and not more than so long ago
# Cores in use by others from which on one is theirs, and up to which it is ours again. Between the two the
# number stays. A program that computes all the time has half a core even where it shares that with a thread
# of ours; an idle desktop takes a few hundredths.
TAKEN, LEFT = 0.3, 0.15
# that all is quiet for so long makes the number rise; twice as long after each time it had to fall again
QUIET_SECONDS = 30.0


def spin_briefly() -> None:
    """Have waiting OpenMP threads sleep sooner. Before torch is imported: its OpenMP reads this once."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SPINS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


# ---- what others use ---------------------------------------------------------------------------------------


class Use(NamedTuple):
    """Of the cores that this process may use, in seconds since some time in the past."""

    at: float
    busy: float  # CPU time of everybody, and what a virtual machine's host gave to others
    own: float  # of this process


def use(stat: Path = Path("/proc/stat")) -> Use | None:
    """Now; None where the system does not say."""
    try:
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user and nice
        ticks = [list(map(int, line[1:9])) for line in lines if line[0] in mine]
        busy = sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # no Linux, or a sandbox that hides it
        return None
    return Use(time.monotonic(), busy, time.process_time()) if ticks else None


FIRST = use()  # the commands import this module first, so that it is how they began


def others(before: Use, now: Use) -> float:
    """Cores that other processes kept busy between the two, a mean."""
    return max(0.0, (now.busy - before.busy - (now.own - before.own)) / (now.at - before.at))


def recent() -> tuple[Use, Use] | None:
    """Of the last moments; waits for half a second where there was no earlier look that will do."""
    now = use()
    if FIRST is not None and now is not None and START_SECONDS <= now.at - FIRST.at <= RECENT_SECONDS:
        return FIRST, now
    time.sleep(START_SECONDS)
    then = use()
    return None if now is None or then is None else (now, then)


def quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores that a container may use at a time, however many it sees; None: no such limit."""
    try:
        if (root / "cpu.max").is_file():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit, period = ((root / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(1, math.ceil(int(limit) / int(period))) if int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return None


# ---- the number --------------------------------------------------------------------------------------------


class Fit:
    """The number of threads that fits what others use, and when to change it.

    Args:
        most: threads that there may be.
        cores: that this process may use.
    """

    def __init__(self, most: int, cores: int) -> None:
        self.most, self.cores, self.number = most, max(cores, most), most
        self.quiet_since: float | None = None
        self.quiet_seconds = QUIET_SECONDS

    def fall(self, taken: float) -> bool:
        """Fewer threads, where others use so many cores that some of ours would wait. Whether it is so."""
        free = self.cores - taken
        if self.number == 1 or free >= self.number - TAKEN:
            return False
        self.number = max(1, math.floor(free + TAKEN))
        return True

    def change(self, taken: float, at: float) -> bool:
        """Another number where others used `taken` cores in the window that ends `at`. Whether it is one."""
        if self.fall(taken):
            self.quiet_since, self.quiet_seconds = None, 2 * self.quiet_seconds
            return True
        room = min(self.most, math.floor(self.cores - taken + LEFT))
        if room <= self.number:
            self.quiet_since = None
            return False
        if self.quiet_since is None:
            self.quiet_since = at - WINDOW_SECONDS
        if at - self.quiet_since < self.quiet_seconds:
            return False
        self.number, self.quiet_since = room, None
        return True


class Threads:
    """The threads of torch in this process, set for a run on the CPU.

    Args:
        wanted: so many; or `auto`: those that torch has, less the cores that others use, unless the
            environment gives a number.
        moves: the number may change during the run, with `auto`.
        key: how the user keeps one number, such as `threads=N`.
    """

    def __init__(self, wanted: int | Literal["auto"], *, moves: bool, key: str = "threads=N") -> None:
        import torch

        if wanted != "auto":
            torch.set_num_threads(wanted)
        self.most = torch.get_num_threads()
        self.key, self.line = key, ""
        self.fit: Fit | None = None
        self.last: Use | None = None
        if wanted != "auto" or self.most == 1 or any(name in os.environ for name in NUMBERS):
            return
        found, limit = recent(), quota()
        if limit is not None and limit < self.most:
            self.line = f"{limit} of {self.most}: this container may use {limit} cores at a time ({key})"
            self.most = limit
        fit = Fit(self.most, len(os.sched_getaffinity(0)) if found else self.most)
        if found and fit.fall(taken := others(*found)):
            self.line = f"{fit.number} of {self.most}: {_busy(taken, fit)} ({key} uses N nevertheless)"
        if fit.number != torch.get_num_threads():
            torch.set_num_threads(fit.number)
        if moves and found:
            self.fit, self.last = fit, found[1]

    def look(self, step: int) -> str:
        """Between two steps: set another number where others came or left. What to say then, else empty.

        Costs a look at the clock, and every ten seconds one at /proc/stat.
        """
        if self.fit is None or self.last is None or time.monotonic() - self.last.at < WINDOW_SECONDS:
            return ""
        now, before, was = use(), self.last, self.fit.number
        self.last = now
        if now is None or not self.fit.change(taken := others(before, now), now.at):
            return ""
        import torch

        torch.set_num_threads(self.fit.number)
        return (
            f"{self.fit.number} from step {step} on, before {was}: {_busy(taken, self.fit)}. Rounding is "
            f"another from here; {self.key} keeps one number"
        )


def _busy(taken: float, fit: Fit) -> str:
    return f"other programs keep {taken:.1f} of {fit.cores} cores busy"
