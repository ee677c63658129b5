"""`ssl-emp doctor`: is this machine ready, and what to do where it is not.

A library that does not fit this machine may crash the process or hang it, so the checks
(ssl_emp/commands/checks.py) run in a process of their own, each with a limit on its time. After a crash or a
hang a new process goes on with the next check.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_emp.errors import Parser, UserError
from ssl_emp.run.interrupts import Interrupts, Stopped
from ssl_emp.run.streams import is_shown, prepare_streams, put
from ssl_emp.text import command_line, printable, shorten

# check -> seconds that it may take; importing torch from a cold disk may take a minute
LIMITS = {
    "python": 60.0,
    "packages": 60.0,
    "extras": 60.0,
    "torch": 180.0,
    "device": 120.0,
    "bf16": 60.0,
    "threads": 60.0,
    "space": 20.0,
    "images": 120.0,
    "faiss": 120.0,
    "compile": 300.0,
}
WHAT_THEY_ARE = """
python    the interpreter                   threads   how many, and the cores that may be used
packages  versions, against what is needed  space     on the disks of this folder and of temporary files
extras    what is optional                  images    which decoder reads JPEGs, and which formats are read
torch     whether torch and torchvision     faiss     a search with it, compared with torch's
          load and fit each other           compile   torch.compile, which needs a C++ compiler
device    GPU or CPU                                  (Triton on a GPU): up to a minute
bf16      whether it is in hardware
"""
CHILD = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
    "from ssl_emp.commands.checks import main; main(sys.argv[1:])"
)


@dataclass(frozen=True)
class Finding:
    """What a check found. `fix` says what to do where something is not as it should be."""

    text: str
    fix: str | None = None


def parser() -> Parser:
    made = Parser(
        prog=command_line("doctor"),
        description=f"Check this machine, and say what to do where something is missing.\n{WHAT_THEY_ARE}\n"
        "Exit codes: 0 all is well, 2 there is something to see to.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("checks", nargs="*", metavar="CHECK", help="only these; all without a name")
    return made


def main(argv: list[str] | None = None) -> int:
    prepare_streams()
    try:
        names = parser().parse_intermixed_args(argv).checks
        for name in names:
            if name not in LIMITS:
                from linear_eval.errors import did_you_mean

                fix = did_you_mean(name, LIMITS, f"name one of {', '.join(LIMITS)}")
                raise UserError(f"there is no check {shorten(name)!r}", fix)
    except UserError as error:
        put("stderr", f"error: {printable(str(error))}\n")
        return 2
    limits = {name: limit for name, limit in LIMITS.items() if not names or name in names}
    try:
        with Interrupts():  # a check that hangs is ended with this process
            return report(examine(limits, [sys.executable, "-P", "-c", CHILD]))
    except Stopped as stopped:
        return 128 + stopped.number


def report(findings: Iterator[tuple[str, Finding]]) -> int:
    """Print a line a check, and its fix; the exit code."""
    warned, width = 0, max(map(len, LIMITS))
    for name, found in findings:
        warned += found.fix is not None
        put("stdout", f"{'ok  ' if found.fix is None else 'warn'}  {name:{width}}  {printable(found.text)}\n")
        if found.fix is not None:
            put("stdout", f"{'':{width + 8}}fix: {printable(found.fix)}\n")
    what = f"{warned} thing{'s' if warned > 1 else ''} to see to" if warned else "all is well"
    put("stdout", f"{what}\n")
    return 2 if warned else 0


def examine(limits: Mapping[str, float], command: Sequence[str]) -> Iterator[tuple[str, Finding]]:
    """Run the checks of these names, in order, in processes beside this one.

    Args:
        limits: check -> seconds that it may take.
        command: starts such a process; the names of the checks are appended. It writes a line of JSON a
            check: the fields of `Finding`.
    """
    left = list(limits)
    while left:
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [*command, *left],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # what it starts is ended with it
            )
            lines: queue.Queue[bytes] = queue.Queue()
            threading.Thread(target=_read, args=(child, lines), daemon=True).start()
            try:
                while left:
                    name = left.pop(0)
                    with _waiting(name):
                        found = _next(lines, limits[name], child)
                    if found is None:
                        yield name, _lost(child, limits[name], _last_line(errors))
                        break
                    yield name, found
            finally:
                _end(child)


def _read(child: "subprocess.Popen[bytes]", lines: "queue.Queue[bytes]") -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put(b"")


def _next(lines: "queue.Queue[bytes]", limit: float, child: "subprocess.Popen[bytes]") -> Finding | None:
    """The next finding; None where the process has ended without one, or takes too long."""
    try:
        line = lines.get(timeout=limit)
    except queue.Empty:
        return None
    if not line:
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)  # for its exit code
        return None
    try:
        values: Any = json.loads(line)
        return Finding(str(values["text"]), None if values["fix"] is None else str(values["fix"]))
    except (ValueError, KeyError, TypeError):
        return Finding("cannot be checked: a library wrote into the answer", "report this as a bug")


def _lost(child: "subprocess.Popen[bytes]", limit: float, said: str) -> Finding:
    said = f" ({said})" if said else ""
    code = child.poll()
    if code is None:
        return Finding(f"no answer in {limit:g} seconds", "see whether a disk or a GPU hangs, and try again")
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        fix = "a package does not fit this machine or another package: install it anew"
        return Finding(f"the check was ended by {name}{said}", fix)
    return Finding(f"the check ended with exit code {code}{said}", "install what it names anew")


def _last_line(errors: Any) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 4096))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return shorten(lines[-1], 200) if lines else ""


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the process and what it started; not waited for where a dead disk holds it."""
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(2)


class _waiting:
    """On a terminal, the name of the check that is under way."""

    def __init__(self, name: str) -> None:
        self.text = f"      {name} ..."
        self.shown = is_shown("stderr") and sys.stderr.isatty()

    def __enter__(self) -> None:
        if self.shown:
            put("stderr", self.text)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            put("stderr", f"\r{' ' * len(self.text)}\r")
