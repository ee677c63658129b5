"""Only one process writes into a run directory at a time; temporary files of a killed one are removed."""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ssl_emp.errors import RunFailed, UserError
from ssl_emp.safe_files import check_own, inner_folder, open_own

LOCK = ".lock"
# errors of file systems without locks, as on some clusters: there the run goes on without one
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
TRIES = 1000  # to open a lock that other processes create and remove
START = "start"  # the encoder before its first step, of a run with model.init
WRITTEN_INTO = (".", "checkpoints", "encoder", "pruning", START, "loggers")
WRITTEN = ("config.yaml", "environment.json", "train.log", "metrics.jsonl", "result.json")


def is_unused(folder: Path) -> bool:
    """Whether a new run may start in `folder`: it does not exist, or a killed start left what is in it."""
    if not os.path.isdir(folder):
        return not os.path.lexists(folder)
    return all(path.name == LOCK or _is_leftover(path) for path in folder.iterdir())


def _is_leftover(path: Path) -> bool:
    """Whether it is a temporary file of pretrain.py, `.NAME.tmp`; other programs write `.NAME.PID.tmp`."""
    return path.name.startswith(".") and path.suffix == ".tmp" and not path.stem.rpartition(".")[2].isdigit()


def refuse_strange(folder: Path) -> None:
    """Raise UserError if a file that a run writes is a link, a pipe, a device, or has a second name.

    Every file is checked again when it is opened; this checks all of them before the first byte is written.
    Files that are only replaced as a whole (checkpoints, the encoder) may have second names, which keep the
    old content. Anything in the place of a checkpoint is allowed: loading skips it with a warning, and saving
    replaces the name without writing through it.
    """
    for name in WRITTEN:
        check_own(folder / name, replaced=name not in ("train.log", "metrics.jsonl"))
    for part in WRITTEN_INTO[1:]:
        if os.path.lexists(folder / part):
            inner_folder(folder, part)
            for path in sorted((folder / part).iterdir()):
                if not path.match("checkpoints/step_*.pt"):
                    check_own(path, replaced=True)


@dataclass(frozen=True)
class Held:
    """A run directory while its lock is held, so that another directory of the same name is noticed."""

    folder: Path
    directory: os.stat_result
    lock: os.stat_result

    def is_ours(self) -> bool:
        """Whether the folder's name still leads to the folder that was locked.

        A lock file that was removed does not matter; one that was replaced belongs to another run.
        """
        with suppress(FileNotFoundError):
            if not os.path.samestat(os.stat(self.folder), self.directory):
                return False
            with suppress(FileNotFoundError):
                return os.path.samestat(os.lstat(self.folder / LOCK), self.lock)
            return True
        return False

    def check(self) -> None:
        """Call before writing a file by its name. Raises RunFailed if the folder was moved."""
        if not self.is_ours():
            raise RunFailed(
                f"the directory {self.folder} is gone, or another is in its place, so nothing more is "
                "written into it; what was saved before is intact. fix: put it back, or --resume it by "
                "the name that it has now"
            )


@contextmanager
def sole_writer(folder: Path, otherwise: str = "choose another out=DIR") -> Iterator[Held]:
    """Hold `folder/.lock`, creating it and the folder if needed. The kernel frees it when the process dies.

    For the process that writes (rank 0 of several), before anything that takes time. Temporary files of
    killed processes are removed. Folders created here are removed at the end if they are empty. `otherwise`
    ends the advice where that cannot be.

    Raises:
        UserError: another process holds the lock, the folder cannot be written, or see `refuse_strange`.
    """
    path = folder / LOCK
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        file = _locked(folder, path, otherwise)
        with suppress(OSError):  # for the next process's message; a full disk makes that message shorter
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        for part in WRITTEN_INTO:
            for left in filter(_is_leftover, (folder / part).glob(".*.tmp")):
                left.unlink(missing_ok=True)
    except OSError as error:
        fix = f"see to its permissions, or {otherwise}"
        raise UserError(f"cannot write into {folder} ({error.strerror})", fix) from error
    held = Held(folder, os.stat(folder), os.fstat(file.fileno()))
    try:
        yield held
    finally:
        ours = False
        with suppress(OSError):
            ours = held.is_ours()
        with suppress(OSError):
            if ours:
                path.unlink()  # still locked, so no other process can hold it
        with suppress(OSError):
            file.close()
        with suppress(OSError):  # not empty
            for place in made if ours else ():
                place.rmdir()


def _locked(folder: Path, path: Path, otherwise: str) -> IO[bytes]:
    """The lock file `path`, open and locked. Raises UserError if another process holds it."""
    for tries_left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_strange(folder)
            file = open_own(path, "a+b")  # stays open until the lock is released
        # the previous holder has just removed the folder that it had created, perhaps between the two looks
        # of mkdir, which then says that something else is there
        except (FileNotFoundError, FileExistsError):
            if not tries_left:
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            fix = f"wait for it, or {otherwise}"
            raise UserError(f"{folder} is in use by {holder}", fix) from None
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the previous holder removed it between our open and our lock: try again
    fix = f"wait for the processes that use it, or {otherwise}"
    raise UserError(f"the lock of {folder} comes and goes", fix)


def _holder(file: IO[bytes]) -> str:
    """What the process that holds the lock wrote into it; that takes it a moment."""
    for _ in range(20):
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip()
        if holder:
            return holder
        time.sleep(0.05)
    return "another process"
