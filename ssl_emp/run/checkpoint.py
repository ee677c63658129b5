"""Training state on disk: written whole or not at all, and read only if its hash is right.

`checkpoints/step_XXXXXXXX.pt` holds tensors and plain values only, so it loads with `weights_only=True`.
`checkpoints/manifest.json` and its copy hold the SHA-256 of each. The newest two are kept.
"""

import errno
import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from linear_eval.files import check_uncompressed
from ssl_emp._version import __version__
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.safe_files import inner_folder, read_json, replacing, write_atomically

FORMAT = 6
KEPT = 2
# two copies: a damaged byte in a single one would make every checkpoint unusable
MANIFESTS = ("manifest.json", "manifest.copy.json")


def cannot_write(path: Path, error: Exception, needed: int | None = None) -> RunFailed:
    """The error for a file of the run that could not be written. needed: its size in bytes, if known."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        # torch.save reports a full disk as "unexpected pos", with the OSError as its context
        cause = cause.__cause__ or cause.__context__
    number = cause.errno if cause else None
    what = f"cannot write {path}: {(cause.strerror if cause else '') or cause or error}"
    fix = "see to the disk and its permissions, then --resume"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        room = [] if needed is None else [f"it needs {needed / 1e6:.1f} MB"]
        with suppress(OSError):
            room.append(f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free")
        what, fix = f"{what} ({', '.join(room)})", "make room there, then --resume"
    elif number == errno.ENOENT:
        fix = "the directory is gone: put it back and --resume, or start again"
    return RunFailed(f"{what}; what was saved before is intact. fix: {fix}")


class _Hashed:
    """A file that hashes what is written to it, so that it need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifests(folder: Path) -> dict[str, list[str]]:
    """File name -> SHA-256 of the contents written under it; damaged or missing manifests are skipped."""
    known: dict[str, list[str]] = {}
    for name in MANIFESTS:
        with suppress(UserError, TypeError, AttributeError):
            for file, digests in read_json(folder / name).items():
                digests = [digests] if isinstance(digests, str) else map(str, digests)
                known.setdefault(str(file), []).extend(digests)
    return known


def num_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(num_bytes, branches))


def save_checkpoint(folder: Path, state: dict[str, Any], step: int) -> None:
    """Write `state` as `step_XXXXXXXX.pt`: temporary file, fsync, hash, manifests, rename, removals.

    The parent of `folder` must exist. Checkpoints of later steps are removed, too: the run went back.

    Raises:
        RunFailed: the disk is full or cannot be written; earlier checkpoints are intact.
    """
    path = folder / f"step_{step:08d}.pt"
    try:
        inner_folder(folder.parent, folder.name)
        with replacing(path) as file:
            hashed = _Hashed(file)
            content = {"format": FORMAT, "written_by": f"ssl_emp {__version__}", **state}
            torch.save(content, hashed)  # type: ignore[arg-type]  # it only writes
            known = _read_manifests(folder)
            older = [old for old in folder.glob("step_*.pt") if old.name in known and old.name < path.name]
            kept = [*sorted(older), path][-KEPT:]
            digests = {old.name: sorted(set(known[old.name])) for old in kept[:-1]}
            digests[path.name] = [hashed.sha256.hexdigest()]
            # saved before at this step: until the rename, the name belongs to that file
            if path.is_file():
                digests[path.name].append(_sha256(path))
            # manifests before the rename: a kill in between leaves the previous checkpoint as the newest
            for name in MANIFESTS:
                write_atomically(folder / name, json.dumps(digests, indent=1).encode())
    except (OSError, RuntimeError) as error:  # a full disk surfaces from torch.save as RuntimeError
        raise cannot_write(path, error, num_bytes(state)) from error
    for old in folder.glob("step_*.pt"):
        if old not in kept:
            # a file that cannot be removed only takes room; the next save tries again
            with suppress(OSError):
                old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint whose hash is right, on the CPU, and one warning for each newer one.

    Returns:
        (state, warnings); state is None if no checkpoint was ever written.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    known = _read_manifests(folder)
    paths = sorted(folder.glob("step_*.pt"), reverse=True)
    warnings: list[str] = []
    for path in paths:
        try:
            # not a regular file: reading a pipe would block for ever
            if not path.is_file() or _sha256(path) not in known.get(path.name, ()):
                warnings.append(f"warning: {path} is damaged or incomplete, passed over")
                continue
            check_uncompressed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError
        # torch.load raises pickle, zip, runtime and key errors; each means that this is not our checkpoint
        except Exception as error:
            warnings.append(f"warning: {path} cannot be loaded ({type(error).__name__}), passed over")
            continue
        if state.get("format") != FORMAT:
            writer = f"{state.get('written_by', 'another version')} in format {state.get('format')}"
            what = f"{path} was written by {writer}, this is ssl_emp {__version__} and reads format {FORMAT}"
            raise UserError(what, "resume with the version that wrote it")
        return state, warnings
    if paths:
        fix = "start again with another out=DIR"
        raise UserError(f"no usable checkpoint among {len(paths)} in {folder}", fix)
    return None, warnings
