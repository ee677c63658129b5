"""A file appears under its name whole, or not at all."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` once it is whole on disk; until then, what has the name stays.

    A temporary sibling, fsync, rename, fsync of the directory. A link called `path` is replaced itself.

    Args:
        shared: others may write the file at the same time; the temporary sibling carries the process number.

    Raises:
        OSError: with the path.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        try:
            file = open(tmp, "xb")  # x: made here, so it is no link and has no other name
        except FileExistsError:  # left by a killed process
            tmp.unlink()
            file = open(tmp, "xb")
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, data: bytes, shared: bool = False) -> None:
    """Write a small file whole or not at all, see `replacing`."""
    with replacing(path, shared) as file:
        file.write(data)


def check_uncompressed(path: Path) -> None:
    """Raise ValueError if a zip archive, as of `torch.save`, would unpack to more than its size."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    is_compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if is_compressed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("it unpacks to more than it is")


def sync_directory(folder: Path) -> None:
    """A rename is on disk when its directory is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
