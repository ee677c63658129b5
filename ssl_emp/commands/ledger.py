"""What an evaluation found: every row on disk at once, all in a table at the end, and what went wrong."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linear_eval import EvalError
from ssl_emp.commands.row_tables import markdown_table, terminal_table
from ssl_emp.commands.rows import Row, row_key, write_rows
from ssl_emp.errors import RunFailed, UserError, printable
from ssl_emp.run.interrupts import Interrupts
from ssl_emp.run.report import show_progress
from ssl_emp.run.streams import is_shown, put

# what costs a row; RunFailed: another process failed in work that all do together
MISTAKES = (UserError, EvalError, RunFailed)


def say(line: str) -> None:
    """One line on standard error, if that can be written to, whatever the names in it hold."""
    put("stderr", f"{printable(line)}\n")


@dataclass(frozen=True)
class Voice:
    """What is said on standard error while it goes on: of several processes, only the first one speaks."""

    speaks: bool = True

    def note(self, line: str) -> None:
        if self.speaks:
            say(line)

    def progress(self, label: str) -> Callable[[int, int], None] | None:
        return show_progress(label) if self.speaks else None


@dataclass
class Ledger:
    """Rows are kept first and shown later: a table, evaluator or process that fails costs none."""

    interrupts: Interrupts
    voice: Voice = field(default_factory=Voice)
    prints: bool = True  # its tables; `ssl_emp.evaluate` returns one instead
    rows: list[Row] = field(default_factory=list)  # of the table, in order
    found: dict[tuple[Any, ...], Row] = field(default_factory=dict)  # all rows, in or out of the table
    error: Exception | None = None  # that of the first problem
    problems: list[str] = field(default_factory=list)  # `what. fix: how`, each once
    kept_in: list[Path] = field(default_factory=list)
    # rows that could not be written yet, and why
    waiting: dict[Path, list[Row]] = field(default_factory=dict)
    code: int = 0

    def keep(self, folder: Path | None, rows: list[Row], *, in_table: bool = True) -> None:
        """Write rows (None: nowhere), with those that could not be written before."""
        self.rows += rows if in_table else []
        self.found |= {(row["evaluator"], *row_key(row)): row for row in rows}
        if folder is None or not rows:
            return
        with self.interrupts.held():
            self.waiting.setdefault(folder, []).extend(rows)
            self._write(folder)

    def _write(self, folder: Path) -> UserError | None:
        try:
            write_rows(folder, self.waiting[folder], self.voice.note)
        except UserError as error:  # still in the table, and written with the next rows
            return error
        del self.waiting[folder]
        self.kept_in += [] if folder in self.kept_in else [folder]
        return None

    def refuse(self, row: Row, error: Exception) -> None:
        """A row without a value: why there is none stands in the place of its protocol."""
        reason = printable(str(error))
        refused = row | {"value": None, "std": None, "protocol": f"not judged: {reason}"}
        self.rows.append(refused)
        self.found |= {(row["evaluator"], *row_key(refused)): refused}
        self.error = self.error or error
        self._problem(reason, 2)

    def crash(self, row: Row, error: Exception) -> None:
        """As `refuse`, for what should not happen: the traceback is what helps."""
        self.error = self.error or error
        for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
            self.voice.note(line)
        self.refuse(
            row, RuntimeError(f"{type(error).__name__}: {error}. fix: report it with the traceback above")
        )
        self.code = 1

    def _problem(self, line: str, code: int) -> None:
        self.problems += [] if line in self.problems else [line]
        self.code = self.code or code

    def show(self) -> None:
        """Print the rows so far as one table, once what can be written is written."""
        with self.interrupts.held():
            for folder in list(self.waiting):
                error = self._write(folder)
                if error is not None:
                    self._problem(str(error), 2)
            if self.rows:
                self.print(terminal_table(self.rows) if sys.stdout.isatty() else markdown_table(self.rows))
            self.rows = []

    def print(self, text: str) -> None:
        """A table on standard output. If that fails, a line; an error if nothing else has the rows."""
        if not self.prints:
            return
        closed = not is_shown("stdout")
        error = None if closed else put("stdout", text)
        if error is None and not closed:
            return
        why = "standard output is closed" if error is None else error.strerror
        where = ", ".join(map(str, self.kept_in))
        # the reader left, which is no error as a full disk is
        left = closed or isinstance(error, BrokenPipeError)
        if left and where and not self.waiting:
            self.voice.note(f"warning: the table is not shown ({why}), its rows are in {where}")
        else:
            fix = f"its rows are in {where}" if where else "keep the rows with --out DIR"
            self._problem(f"the table cannot be shown ({why}). fix: {fix}", 2)

    def close(self) -> int:
        """One line for all that went wrong, and the exit code."""
        if self.problems:
            what, _, fix = self.problems[0].partition(". fix: ")
            more = f" (and {len(self.problems) - 1} more, see the table)" if len(self.problems) > 1 else ""
            self.voice.note(f"error: {what}{more}. fix: {fix}")
        return self.code
