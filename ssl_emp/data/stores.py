"""Where pixels live: a tensor, a raw file, or a file of JPEGs; and batches of them on the device, resident or
streamed.

A finished file is found again by its key; whoever builds one holds a lock on its `.part`, and others wait for
it.
"""

import fcntl
import functools
import hashlib
import json
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ssl_emp.data.decode import Encoded, cores, decode, decode_jpeg, map_runs, reason, to_jpeg
from ssl_emp.errors import UserError
from ssl_emp.text import quoted

PREFETCH_BATCHES = 3  # host batches held ahead of the one in use
SAVE_BYTES = 1 << 24  # of JPEGs between two points that a killed build can go on from
DIGEST_BYTES = 32
HASHED_BYTES = 1 << 22  # of a part that is hashed by itself, so that all cores share the work
# files from this size on keep their digest: a smaller one is hashed again in less than a third of a second
NOTED_BYTES = 1 << 28
DIM = 1 << 60  # added to the place in a file of JPEGs where a dim image ends

Progress = Callable[[int, int], None]
Read = Callable[[np.ndarray], Iterator[Encoded]]  # positions -> their images, in order


@dataclass
class Told:
    """What is to be said of rows. failed: {row left out: reason}. dim: rows of images that use little of
    their 16 bits.
    """

    failed: dict[int, str] = field(default_factory=dict)
    dim: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class EncodedPixels:
    """(N, 3, S, S) uint8 that lie as JPEGs in one mapped file and are decoded when indexed, in a thread a
    core.

    size: S. path: the file. data: (nbytes,) uint8, the file. spans: (N, 2) int64, where each JPEG begins and
    ends in it.
    """

    size: int
    path: Path
    data: Tensor
    spans: np.ndarray

    dtype = torch.uint8

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 3, self.size, self.size))

    @property
    def nbytes(self) -> int:
        """Size of the file, not of the pixels."""
        return len(self.data)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """uint8, shaped as a tensor's rows would be. Raises IndexError, or UserError where the file is
        damaged.
        """
        spans = self.spans[index.cpu().numpy() if isinstance(index, Tensor) else index]  # (..., 2)
        rows = spans.reshape(-1, 2)
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        self._decode(rows, images)
        return images.view(*spans.shape[:-1], *self.shape[1:])

    def content_hash(self) -> str:
        """`pixel_digest`, for `linear_eval`, which knows nothing of this class."""
        return pixel_digest(self)

    def gather(self, index: Tensor, out: Tensor) -> Tensor:
        """`self[index]` for index (B,), written to out (B, 3, S, S)."""
        self._decode(self.spans[index.numpy()], out)
        return out

    def _decode(self, spans: np.ndarray, out: Tensor) -> None:
        pixels = out.numpy()
        run = -(-len(spans) // (4 * cores()))  # rows a task: few enough for all threads to end together

        def decode_run(first: int) -> None:
            for row, (begin, end) in enumerate(spans[first : first + run].tolist(), first):
                try:
                    image = decode_jpeg(self.data[begin:end])
                    if image.shape != pixels.shape[1:]:
                        raise ValueError(f"an image of shape {image.shape}")
                except (OSError, RuntimeError, ValueError) as exc:
                    raise _damaged(self.path, reason(exc)) from exc
                pixels[row] = image

        for _ in _decoders().map(decode_run, range(0, len(spans), max(run, 1))):
            pass


Pixels = Tensor | EncodedPixels


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    """Threads shared by all encoded sets of the process, kept: starting them for each batch would cost as
    much as small images.
    """
    return ThreadPoolExecutor(cores(), "ssl_emp-decode")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why})", f"delete it (rm {quoted(path)}), and it is built again")


def available_memory() -> int:
    """Bytes of main memory a process may still take: what the kernel calls available, at most the container's
    limit.
    """
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Linux: free pages alone (sysconf) leave out the page cache, which yields
    with suppress(OSError, StopIteration):
        line = next(
            line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
        )
        available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # where there is no limit, the file is missing or says "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available


# ---------------------------------------------------------------------------------------------------------
# building


def decode_into(
    pixels: np.ndarray, read: Read, positions: np.ndarray, max_pixels: int, progress: Progress | None
) -> Told:
    """Decode positions into the first rows of pixels (len(positions), 3, S, S); what follows one that is left
    out moves up.
    """
    failed: dict[int, str] = {}
    dim: set[int] = set()

    def decode_run(first_row: int, run: list[Encoded]) -> int:
        for row, encoded in enumerate(run, first_row):
            try:
                pixels[row] = decode(encoded, pixels.shape[-1], max_pixels, functools.partial(dim.add, row))
            except Exception as exc:  # noqa: BLE001 - damaged files make Pillow raise a dozen types, SyntaxError among them
                failed[row] = reason(exc)
        return len(run)

    done = 0
    with closing(map_runs(decode_run, read(positions), len(positions))) as runs:
        for count in runs:
            done += count
            if progress:
                progress(done, len(positions))

    kept = np.delete(np.arange(len(positions)), sorted(failed))
    for target in np.flatnonzero(kept != np.arange(len(kept))):  # in place: a copy would double the memory
        pixels[target] = pixels[kept[target]]
    return Told(failed, sorted(dim))


def store_key(version: str, positions: np.ndarray, *numbers: int) -> str:
    """Name of the file for these positions of this version of a source, at these settings, decoded as this
    version decodes.
    """
    text = " ".join(["3", version, *map(str, numbers)])
    return hashlib.sha256(text.encode() + positions.astype("<i8").tobytes()).hexdigest()[:32]


def raw_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.u8"


def encoded_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.jpegs"


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """Open or create `path` for appending and hold its lock; waits until the lock is free."""
    while True:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # else renamed or removed meanwhile
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield file
                return


def _remove_stale(folder: Path) -> None:
    """Remove what killed builds of raw files left: nobody holds a lock on it. (A killed build of JPEGs goes
    on instead.)
    """
    for part in folder.glob("*.u8.part"):
        with suppress(OSError), open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def raw_pixels(
    folder: Path,
    key: str,
    size: int,
    read: Read,
    positions: np.ndarray,
    max_pixels: int,
    progress: Progress | None,
) -> tuple[np.ndarray, Told]:
    """`decode_into` a mapped file, which later calls with the same key open for reading only."""
    # the data comes last: where it is, both are complete
    data, note = raw_path(folder, key), folder / f"{key}.json"
    part, note_part = folder / f"{key}.u8.part", folder / f"{key}.json.part"
    shape = (len(positions), 3, size, size)
    num_bytes = int(np.prod(shape))
    if not data.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            with _alone(part) as file:
                try:
                    if data.is_file():  # another process built it while this one waited
                        part.unlink()
                    else:
                        file.truncate(num_bytes)
                        # a mapped file that meets a full disk kills the process with SIGBUS
                        if hasattr(os, "posix_fallocate"):
                            os.posix_fallocate(file.fileno(), 0, num_bytes)
                        mapped = np.memmap(part, np.uint8, "r+", shape=shape)
                        told = decode_into(mapped, read, positions, max_pixels, progress)
                        mapped.flush()
                        note_part.write_text(json.dumps(asdict(told)))
                        os.replace(note_part, note)
                        os.replace(part, data)
                except BaseException:
                    part.unlink(missing_ok=True)
                    note_part.unlink(missing_ok=True)
                    raise
        except OSError as exc:
            what = f"{num_bytes / 2**30:.1f} GiB of pixels cannot be written into {folder}: {reason(exc)}"
            raise UserError(
                what,
                "set cache_dir to a folder with room, store to encoded, or a smaller image_size "
                "or max_images",
            ) from exc
    elif progress:
        progress(len(positions), len(positions))
    if data.stat().st_size != num_bytes:
        raise _damaged(data, f"{data.stat().st_size:,} bytes instead of {num_bytes:,}")
    try:
        content = json.loads(note.read_text())
        told = Told(
            {int(row): str(why) for row, why in content["failed"].items()},
            [int(row) for row in content["dim"]],
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as exc:
        raise UserError(
            f"{note} is damaged ({reason(exc)})", f"delete {data} with it, and both are built again"
        ) from exc
    # "r": the folder may be only readable, and a private mapping ("c") counts in full against memory
    return np.memmap(data, np.uint8, "r", shape=shape), told


def encoded_pixels(
    folder: Path,
    key: str,
    size: int,
    read: Read,
    positions: np.ndarray,
    max_pixels: int,
    quality: int,
    progress: Progress | None,
) -> tuple[EncodedPixels, Told]:
    """JPEGs in one file that later calls with the same key find again; a killed build goes on where it was.

    The file: the records in the order of positions, each the JPEG of an image or, for one left out, the
    reason; then where each record ends, len(positions) int64, negative for reasons, plus DIM for dim images;
    then the sha256 of those numbers.
    """
    path, log_path = encoded_path(folder, key), folder / f"{key}.ends.part"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder / f"{key}.jpegs.part") as data:
                if path.is_file():  # another process built it while this one waited
                    os.unlink(data.name)
                else:
                    with open(log_path, "a+b") as log:
                        _append_records(data, log, size, read, positions, max_pixels, quality, progress)
                        log.seek(0)
                        ends = log.read()
                    data.write(ends + hashlib.sha256(ends).digest())
                    data.flush()
                    os.fsync(data.fileno())
                    os.replace(data.name, path)
                log_path.unlink(missing_ok=True)
        except OSError as exc:
            what = f"the images could not be stored as JPEG in {folder}: {reason(exc)}"
            raise UserError(
                what,
                "make room there and start again, it goes on where it was; "
                "or set cache_dir to another folder",
            ) from exc
    elif progress:
        progress(len(positions), len(positions))
    return _open_encoded(path, size, len(positions))


def _append_records(
    data: BinaryIO,
    log: BinaryIO,
    size: int,
    read: Read,
    positions: np.ndarray,
    max_pixels: int,
    quality: int,
    progress: Progress | None,
) -> None:
    """Write the records that are still missing to data, and where they end to log."""

    def encode_run(_: int, run: list[Encoded]) -> list[tuple[bool, bool, bytes]]:
        records = []
        for encoded in run:
            dim: list[bool] = []
            try:
                record = to_jpeg(encoded, size, max_pixels, quality, functools.partial(dim.append, True))
                records.append((True, bool(dim), record))
            except Exception as exc:  # noqa: BLE001 - as in decode_into
                records.append((False, False, reason(exc).encode()))
        return records

    log.seek(0)
    content = log.read()
    ends = np.frombuffer(content[: len(content) // 8 * 8], "<i8")[: len(positions)]
    places = _places(ends)
    begins = np.concatenate([[0], places[:-1]])[: len(ends)]
    whole = (places > begins) & (places <= os.fstat(data.fileno()).st_size)
    done = len(ends) if whole.all() else int(whole.argmin())
    end = saved = int(places[done - 1]) if done else 0
    data.truncate(end)
    log.truncate(8 * done)
    waiting: list[int] = []  # ends not in the log yet

    def save() -> None:
        data.flush()
        os.fsync(data.fileno())  # first the records, then the numbers that say they are there
        log.write(np.array(waiting, "<i8").tobytes())
        log.flush()
        waiting.clear()

    try:
        with closing(map_runs(encode_run, read(positions[done:]), len(positions) - done)) as runs:
            for records in runs:
                for is_image, is_dim, record in records:
                    data.write(record)
                    end += len(record)
                    waiting.append(end + DIM * is_dim if is_image else -end)
                done += len(records)
                if end - saved > SAVE_BYTES:
                    save()
                    saved = end
                if progress:
                    progress(done, len(positions))
    finally:
        save()


def _places(ends: np.ndarray) -> np.ndarray:
    """Where records end, of the numbers that a file of JPEGs keeps."""
    return np.abs(ends) & (DIM - 1)


def _open_encoded(path: Path, size: int, count: int) -> tuple[EncodedPixels, Told]:
    try:
        mapped = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as exc:  # ValueError: an empty file
        raise _damaged(path, reason(exc)) from exc
    num_records_bytes = len(mapped) - 8 * count - DIGEST_BYTES
    ends = mapped[max(num_records_bytes, 0) : -DIGEST_BYTES].tobytes()
    if hashlib.sha256(ends).digest() != mapped[-DIGEST_BYTES:].tobytes():
        raise _damaged(path, "its table of contents does not match its checksum")
    signed = np.frombuffer(ends, "<i8").astype(np.int64)
    places = _places(signed)
    if len(signed) != count or places[-1] != num_records_bytes:
        raise _damaged(path, "it is not of the size it was written in")
    spans = np.stack([np.concatenate([[0], places[:-1]]), places], axis=1)  # (count, 2)
    failed = {int(row): mapped[slice(*spans[row])].tobytes().decode() for row in np.flatnonzero(signed < 0)}
    return EncodedPixels(size, path, read_only(mapped), spans[signed > 0]), Told(
        failed, np.flatnonzero(signed >= DIM).tolist()
    )


def read_only(mapped: np.ndarray) -> Tensor:
    """The tensor in the same memory. torch warns that it must not be written to: nobody does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(mapped)


# ----------------------------------------------------------------------------------------------------------
# digests


def pixel_digest(pixels: Pixels, path: Path | None = None) -> str:
    """BLAKE2b (hex) over the shape and all pixels (N, 3, S, S), of `EncodedPixels` over the shape and the
    bytes of all JPEGs.

    A tenth of a second for 100 MB on one core, and all cores share the work. The digest of a large file is
    kept in the note beside it, with the file's size and time, so that a set larger than memory is read
    through once and not at every start (where the note cannot be written: at every start).

    Args:
        path: the raw file that the pixels are mapped from, if they are.
    """
    path = pixels.path if isinstance(pixels, EncodedPixels) else path
    if path is None or pixels.nbytes < NOTED_BYTES:
        return _digest(pixels)
    note, info = path.with_suffix(".json"), os.stat(path)
    state = [info.st_size, info.st_mtime_ns]
    known = _read_note(note)
    kept = known.get("digest")
    if isinstance(kept, dict) and kept.get("of") == state and isinstance(kept.get("blake2b"), str):
        return str(kept["blake2b"])
    digest = _digest(pixels)
    part = note.with_name(f"{note.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(known | {"digest": {"of": state, "blake2b": digest}}))
        os.replace(part, note)
    except OSError:  # a cache that is only readable, a full disk
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return digest


def _digest(pixels: Pixels) -> str:
    whole = hashlib.blake2b(f"{type(pixels).__name__} {tuple(pixels.shape)}".encode(), digest_size=32)
    rows = max(1, HASHED_BYTES // max(1, pixels.shape[1:].numel()))

    def part(start: int) -> bytes:
        if isinstance(pixels, Tensor):
            return hashlib.blake2b(pixels[start : start + rows].contiguous().numpy().data).digest()
        digest, content = hashlib.blake2b(), pixels.data.numpy()
        for begin, end in pixels.spans[start : start + rows].tolist():
            digest.update(f"{end - begin} ".encode())
            digest.update(content[begin:end].data)
        return digest.digest()

    for digest in _decoders().map(part, range(0, len(pixels), rows)):
        whole.update(digest)
    return whole.hexdigest()


def _read_note(path: Path) -> dict[str, Any]:
    """What stands beside a file of pixels: what is `Told` of it, and "digest". Empty where there is none that
    can be read.
    """
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text())
        return values if isinstance(values, dict) else {}
    return {}


# ----------------------------------------------------------------------------------------------------------
# serving


class DeviceImages:
    """Images resident on the device: a batch is one gather there."""

    def __init__(self, pixels: Tensor, device: torch.device | str) -> None:
        """pixels: (N, 3, S, S) uint8."""
        self.pixels = pixels.to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def stream(self, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index (B,), images (B, 3, S, S) uint8) for every row of index_batches (steps, B) int64;
        never waits for the device.
        """
        for index in index_batches:
            yield index, self.pixels[index]


class HostImages:
    """Images in main memory or a file: a thread gathers or decodes the next batches while the device works on
    this one.
    """

    def __init__(
        self, pixels: Pixels, device: torch.device | str, prefetch_batches: int = PREFETCH_BATCHES
    ) -> None:
        """pixels: (N, 3, S, S) uint8 on the CPU; device: where the batches go.

        prefetch_batches: so many batches are held in main memory, ready or in the making, besides the one
        handed over last.
        """
        self.pixels = pixels
        self.prefetch_batches = prefetch_batches
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())

    def __len__(self) -> int:
        return len(self.pixels)

    def stream(self, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As `DeviceImages.stream`. An error of the gathering thread is raised here; leaving early ends the
        thread.
        """
        table = index_batches.cpu()  # waits for the device, once an epoch: 8 bytes an image
        ready: queue.Queue[Tensor | Exception] = queue.Queue()
        room = threading.Semaphore(self.prefetch_batches)
        stop = threading.Event()

        def gather() -> None:
            try:
                if self.device.type == "cuda":
                    # a new thread starts on GPU 0, and pinning would take memory there
                    torch.cuda.set_device(self.device)
                for index in table:
                    room.acquire()
                    if stop.is_set():
                        return
                    images = torch.empty(
                        (len(index), *self.pixels.shape[1:]),
                        dtype=torch.uint8,
                        pin_memory=self.device.type == "cuda",
                    )
                    if isinstance(self.pixels, EncodedPixels):
                        ready.put(self.pixels.gather(index, images))
                    else:
                        ready.put(torch.index_select(self.pixels, 0, index, out=images))
            except Exception as exc:  # noqa: BLE001 - handed over to the consumer, whatever it is
                ready.put(exc)

        thread = threading.Thread(target=gather, name="ssl_emp-gather", daemon=True)
        thread.start()
        try:
            for index in index_batches:
                images = ready.get()
                if isinstance(images, Exception):
                    raise images
                room.release()
                yield index.to(self.device, non_blocking=True), images.to(self.device, non_blocking=True)
        finally:
            stop.set()
            room.release()
            thread.join()


def place_images(pixels: Pixels, device: torch.device | str) -> DeviceImages | HostImages:
    """(N, 3, S, S) uint8 on the device where it takes at most half of the free memory there, else kept on the
    host and streamed.

    JPEGs are decoded onto a GPU with that much room, once; on the CPU they always stream: they are JPEGs
    because memory is short.
    """
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if pixels.shape.numel() > free // 2 or (isinstance(pixels, EncodedPixels) and device.type != "cuda"):
        return HostImages(pixels, device)
    if isinstance(pixels, Tensor):
        return DeviceImages(pixels, device)
    resident = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), 1024):
        resident[start : start + 1024] = pixels[start : start + 1024].to(device)
    return DeviceImages(resident, device)
