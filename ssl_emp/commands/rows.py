"""Rows of evaluations on disk: lists in FOLDER/EVALUATOR.json, merged with those of earlier evaluations.

Several processes may write into one folder at once. Each holds the folder's lock while it reads, merges and
replaces a file, so that none overwrites what another has just written; a file is replaced whole or not at
all.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_emp.errors import UserError
from ssl_emp.run.lock import CANNOT_LOCK
from ssl_emp.safe_files import LARGE, as_json, open_own, read_json, write_atomically

Row = dict[str, Any]
# columns of the table
COLUMNS = ("encoder", "evaluator", "data", "protocol", "metric", "value", "std", "n_test", "seed")
# A new row replaces the one that agrees with it in these. `weights` and `images` are short hashes: an encoder
# that was trained further, or a folder with other images in it, keeps its name.
ROW_KEY = ("encoder", "weights", "data", "images", "suite", "protocol", "metric", "seed", "draws")
LOCK = ".rows.lock"
PATIENCE_SECONDS = 60.0  # another process holds the lock for milliseconds


def row_key(row: Row) -> tuple[Any, ...]:
    """Its values of `ROW_KEY`; an evaluator that has no such column has None there."""
    return tuple(row.get(name) for name in ROW_KEY)


def write_rows(folder: Path, rows: list[Row], note: Callable[[str], None] = lambda line: None) -> None:
    """Merge rows into FOLDER/EVALUATOR.json: equal ROW_KEYs are replaced, and failures by what was judged.

    A file that holds no rows (damaged, of something else) is moved aside, and `note` is told.

    Raises:
        UserError: the folder or a file cannot be written, or another process keeps it locked.
    """
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            for evaluator in dict.fromkeys(row["evaluator"] for row in rows):
                path = folder / f"{evaluator}.json"
                new = [row for row in rows if row["evaluator"] == evaluator]
                keys, judged = {row_key(row) for row in new}, {_subject(row) for row in new}
                kept = [row for row in _read(path, note) if row_key(row) not in keys]
                kept = [row for row in kept if row.get("value") is not None or _subject(row) not in judged]
                write_atomically(path, (as_json(kept + new, 2) + "\n").encode())
    except OSError as error:
        fix = "make it writable, or give --out DIR"
        raise UserError(f"cannot write {path} ({error.strerror or error})", fix) from error


def _subject(row: Row) -> tuple[Any, ...]:
    """What was to be judged on what, however."""
    return tuple(row.get(name) for name in ("encoder", "data", "suite", "metric"))


def _read(path: Path, note: Callable[[str], None]) -> list[Row]:
    if not os.path.lexists(path):
        return []
    try:
        rows = read_json(path, LARGE)
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and hash(row_key(row)) is not None for row in rows
        ):
            raise TypeError
        return rows
    except (UserError, TypeError):  # TypeError: not a list of rows, or a value that cannot be hashed
        aside = next(
            place
            for n in range(1, 1_000_000)
            if not os.path.lexists(place := path.with_name(f"{path.name}.damaged-{n}"))
        )
        os.rename(path, aside)
        note(f"warning: {path} does not hold rows of earlier evaluations, and was moved to {aside.name}")
        return []


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; waits for it. The kernel frees the lock of a process that dies, however it dies."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        file = open_own(path, "a+b")  # stays open while the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            file.close()  # its holder removed it between our open and our lock
        except OSError as error:
            if error.errno in CANNOT_LOCK:
                break
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() > until:
                fix = "wait for it, or end it if it hangs"
                raise UserError(f"{path} is locked by another process", fix) from error
            time.sleep(0.005)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked, so that nobody holds a lock on a removed file
        with suppress(OSError):
            file.close()
