"""Files of run directories, perhaps of strangers: written through no link, read only if what they should be.

A run directory's own path may be a link (`runs -> /scratch/runs`). What lies inside and is written to may
not: a link called train.log would let whoever packed the directory choose which file of ours is written. The
same holds for a second name of a file of ours (a hard link), for pipes and for devices. Reading follows
links, as the snapshots of model hubs are made of them, but ends at a regular file and at a number of bytes.
"""

import json
import math
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from linear_eval.files import replacing as replacing
from linear_eval.files import sync_directory as sync_directory
from linear_eval.files import write_atomically as write_atomically
from ssl_emp.errors import UserError
from ssl_emp.text import quoted

SMALL = 16 << 20  # bytes; configs, manifests, an encoder's description: kilobytes where we wrote them
LARGE = 1 << 30  # for files that grow with a run: metrics, rows of evaluations


# ---- writing


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain values; numbers that are not finite, for which JSON has no word, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_own(path: Path, mode: str) -> IO[bytes]:
    """Open for appending or in-place changes (`a+b`, `r+b`), unbuffered; never waits for a pipe.

    Raises:
        UserError: it is a link, has a second name, or is no regular file.
        OSError: as of `open`.
    """

    def opener(name: str, flags: int) -> int:
        with suppress(FileNotFoundError):
            _check_own(path, os.lstat(name))  # before opening: to open a device may have effects
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            _check_own(path, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    return open(path, mode, buffering=0, opener=opener)


def check_own(path: Path, replaced: bool = False) -> None:
    """Raise UserError where a name in a run directory must not be written to: see the head of this file.

    Args:
        replaced: the file is only ever replaced as a whole, so that its second names keep what they have.
    """
    with suppress(OSError):  # missing or unreadable: opening it raises
        _check_own(path, os.lstat(path), replaced)


def _check_own(path: Path, info: os.stat_result, replaced: bool = False) -> None:
    if stat.S_ISDIR(info.st_mode):
        return
    what = None
    if stat.S_ISLNK(info.st_mode):
        what = "is a link to another place"
    elif not stat.S_ISREG(info.st_mode):
        what = "is a pipe, socket or device"
    elif info.st_nlink > 1 and not replaced:
        what = "is a file that has other names too (hard links)"
    if what:
        fix = f"look at it, and remove it: rm {quoted(path)}"
        raise UserError(f"{path} {what}, and would be written to", fix)


def check_inner(root: Path, *names: str) -> Path:
    """root/name/..., there or not. Raises UserError where a folder below `root` (itself free) is a link."""
    folder = root
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            fix = f"remove it: rm {quoted(folder)}"
            raise UserError(f"{folder} is a link to another place, and would be written to", fix)
    return folder


def inner_folder(root: Path, *names: str) -> Path:
    """root/name/..., missing folders below `root` made. `root` may be a link, those below may not.

    Raises:
        UserError: one of them is a link.
        OSError: as of `mkdir`; FileNotFoundError where `root` is not there.
    """
    folder = root
    for name in names:
        folder = check_inner(folder, name)
        folder.mkdir(exist_ok=True)
    return folder


# ---- reading


def check_regular(path: str | Path, limit: int = LARGE) -> int:
    """Size of a regular file, links followed. UserError where it is none, above `limit` bytes or missing."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        fix = "give the path of a file that is there"
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})", fix) from error
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path} is not a regular file", "give a file")
    if info.st_size > limit:
        fix = "give the file that was written under this name"
        raise UserError(f"{path} has {info.st_size:,} bytes, more than {limit:,}", fix)
    return info.st_size


def read_bytes(path: str | Path, limit: int = SMALL) -> bytes:
    """All of a regular file of at most `limit` bytes, links followed. UserError, also where it is missing."""
    check_regular(path, limit)
    try:
        # O_NONBLOCK: should it be a pipe by now
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "see to its permissions") from error
    if len(data) > limit:  # it grew since it was measured
        fix = "give the file that was written under this name"
        raise UserError(f"{path} has more than {limit:,} bytes", fix)
    return data


def read_text(path: str | Path, limit: int = SMALL) -> str:
    """`read_bytes` as UTF-8 text. Raises UserError."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = "give the file that was written under this name"
        raise UserError(f"{path} is not a text file", fix) from error


def read_json(path: str | Path, limit: int = SMALL) -> Any:
    """What a JSON file holds; NaN and Infinity, which JSON lacks, are errors too. Raises UserError."""
    try:
        return json.loads(read_text(path, limit), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        fix = "give the file that was written there"
        raise UserError(f"{path} is not valid JSON ({type(error).__name__}: {error})", fix) from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
