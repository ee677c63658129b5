"""One process writes into a run directory at a time, and what a killed one left half written goes."""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ssl_emp.errors import RunFailed, UserError
from ssl_emp.safe_files import check_own, inner_folder, open_own

LOCK = ".lock"
# some cluster file systems: better without than not at all
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
TRIES = 1000  # at a lock that others make and remove all the time
WRITTEN_INTO = (".", "checkpoints", "encoder", "pruning")
WRITTEN = ("config.yaml", "environment.json", "train.log", "metrics.jsonl", "result.json")


def is_unused(folder: Path) -> bool:
    """Whether a new run may start in `folder`: it is not there, or holds at most what a killed start left."""
    if not os.path.isdir(folder):
        return not os.path.lexists(folder)
    return all(path.name == LOCK or _is_leftover(path) for path in folder.iterdir())


def _is_leftover(path: Path) -> bool:
    """`.NAME.tmp` is pretrain.py's; other programs put their process number before `.tmp`."""
    return path.name.startswith(".") and path.suffix == ".tmp" and not path.stem.rpartition(".")[2].isdigit()


def refuse_strange(folder: Path) -> None:
    """Raise UserError where a name that a run writes stands for something else: a link, a pipe, a file with a
    second name.

    Each file is looked at again as it is opened; here all of them are, before the first byte is written. What
    is only ever replaced whole (checkpoints, the encoder) may have second names: they keep what they had. A
    strange thing in the place of a checkpoint is passed over with a warning when one is loaded, and a save
    takes its name without touching what it leads to.
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
    """A run directory while its lock is held: it, and no other that came by its name."""

    folder: Path
    directory: os.stat_result
    lock: os.stat_result

    def is_ours(self) -> bool:
        """Whether the folder's name still leads to the folder that was locked. A lock that was only removed
        is no other run's.
        """
        with suppress(FileNotFoundError):
            if not os.path.samestat(os.stat(self.folder), self.directory):
                return False
            with suppress(FileNotFoundError):
                return os.path.samestat(os.lstat(self.folder / LOCK), self.lock)
            return True
        return False

    def check(self) -> None:
        """Before a file is written by its name. Raises RunFailed where it would land in another's folder, or
        nowhere.
        """
        if not self.is_ours():
            what = (
                f"the directory {self.folder} is gone, or another is in its place, so nothing more is "
                "written into it"
            )
            raise RunFailed(
                f"{what}; what was saved before is intact. fix: put it back, or --resume it by "
                "the name that it has now"
            )


@contextmanager
def sole_writer(folder: Path) -> Iterator[Held]:
    """Hold `folder/.lock`, made with its folder where missing. The kernel frees the lock of a process that
    dies, however it dies.

    For the process that writes (rank 0 of several), before anything that takes time. Temporary files that a
    killed process left are removed; folders made here go again where nothing was put into them.

    Raises:
        UserError: another process holds it, the folder cannot be written, or names in it stand for what
            must not be written to.
    """
    path = folder / LOCK
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        for tries_left in reversed(range(TRIES)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                refuse_strange(folder)
                file = open_own(path, "a+b")  # open until the lock is given back
            except FileNotFoundError:  # the process that had it has just removed the folder that it had made
                if not tries_left:
                    raise
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder, patience = "", 20
                while not holder and patience:  # it has the lock, and writes its name in a moment
                    file.seek(0)
                    holder, patience = file.read(200).decode("utf-8", "replace").strip(), patience - 1
                    time.sleep(0 if holder else 0.05)
                file.close()
                raise UserError(
                    f"{folder} is in use by {holder or 'another process'}",
                    "wait for it, or choose another out=DIR",
                ) from None
            except OSError as error:
                if error.errno not in CANNOT_LOCK:
                    raise
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            file.close()  # removed by the process that had it, between our open and our lock: once more
        else:
            raise UserError(
                f"the lock of {folder} comes and goes",
                "wait for the processes that use it, or choose another out=DIR",
            )
        with suppress(OSError):  # for the message to the next one: on a full disk it is shorter
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        for part in WRITTEN_INTO:
            for left in filter(_is_leftover, (folder / part).glob(".*.tmp")):
                left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror})",
            "see to its permissions, or choose another out=DIR",
        ) from error
    held = Held(folder, os.stat(folder), os.fstat(file.fileno()))
    try:
        yield held
    finally:
        ours = False
        with suppress(OSError):
            ours = held.is_ours()
        with suppress(OSError):
            if ours:
                path.unlink()  # while it is locked: nobody else can have it by this name
        with suppress(OSError):
            file.close()
        with suppress(OSError):  # not empty
            for place in made if ours else ():
                place.rmdir()
