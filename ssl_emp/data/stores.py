"""Where pixels are kept (a tensor, a raw file, a file of JPEGs), and batches of them on the device.

A finished file is found again by its key. A process that builds one locks its `.part`; others wait for it.
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
SAVE_BYTES = 1 << 24  # JPEG bytes between two points from which a killed build can be continued
DIGEST_BYTES = 32
HASH_CHUNK_BYTES = 1 << 22  # hashed as one piece, so that all cores share the work
# from this size on the digest is kept in a file; hashing a smaller set takes less than a third of a second
NOTED_BYTES = 1 << 28
DIM = 1 << 60  # flag, added to the end offset of a dim image in a file of JPEGs

Progress = Callable[[int, int], None]
Read = Callable[[np.ndarray], Iterator[Encoded]]  # positions -> their images, in order


@dataclass
class DecodeResult:
    """Rows to report. failed: row that was left out -> reason. dim: rows that use little of their 16 bits."""

    failed: dict[int, str] = field(default_factory=dict)
    dim: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StoreRequest:
    """Images for a file of the cache: `positions` of a source at `size` pixels a side, in file `folder/key`.

    read, max_pixels and progress are those of `decode_into`.
    """

    folder: Path
    key: str
    size: int
    read: Read
    positions: np.ndarray
    max_pixels: int
    progress: Progress | None = None


@dataclass(frozen=True, eq=False)
class EncodedPixels:
    """(N, 3, S, S) uint8, kept as JPEGs in one mapped file and decoded when indexed, one thread per core.

    Attributes:
        size: S.
        path: the file.
        data: (nbytes,) uint8, the mapped file.
        spans: (N, 2) int64, offsets in the file at which each JPEG begins and ends.
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
        """uint8, shaped as `tensor[index]` would be. Raises IndexError; UserError for a damaged file."""
        spans = self.spans[index.cpu().numpy() if isinstance(index, Tensor) else index]  # (..., 2)
        rows = spans.reshape(-1, 2)
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        self._decode(rows, images)
        return images.view(*spans.shape[:-1], *self.shape[1:])

    def content_hash(self) -> str:
        """`pixel_digest`, under the name that `linear_eval` looks for: it does not import this class."""
        return pixel_digest(self)

    def gather(self, index: Tensor, out: Tensor) -> Tensor:
        """`self[index]` for index (B,), written to out (B, 3, S, S)."""
        self._decode(self.spans[index.numpy()], out)
        return out

    def _decode(self, spans: np.ndarray, out: Tensor) -> None:
        pixels = out.numpy()
        run = -(-len(spans) // (4 * cores()))  # rows per task: four tasks a thread even out their times

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
    """Threads shared by all encoded sets. Starting them anew would double the time of a small batch."""
    return ThreadPoolExecutor(cores(), "ssl_emp-decode")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why})", f"delete it (rm {quoted(path)}), and it is built again")


def available_memory() -> int:
    """Bytes of main memory that are available to the process, by the kernel and the container's limit."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Linux: MemAvailable counts the page cache too, which the kernel frees on demand
    with suppress(OSError, StopIteration):
        line = next(
            line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
        )
        available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # no limit: the file is missing or says "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available


# ---- building


def decode_into(
    pixels: np.ndarray, read: Read, positions: np.ndarray, max_pixels: int, progress: Progress | None
) -> DecodeResult:
    """Decode `positions` into the first rows of pixels (len(positions), 3, S, S), those that fail left out.

    Args:
        read: yields the encoded images at given positions, in order.
        max_pixels: images that declare more are left out.
        progress: called with (done, total).
    """
    failed: dict[int, str] = {}
    dim: set[int] = set()

    def decode_run(first_row: int, run: list[Encoded]) -> int:
        for row, encoded in enumerate(run, first_row):
            try:
                pixels[row] = decode(encoded, pixels.shape[-1], max_pixels, functools.partial(dim.add, row))
            except Exception as exc:  # noqa: BLE001 - Pillow raises a dozen types, even SyntaxError
                failed[row] = reason(exc)
        return len(run)

    done = 0
    with closing(map_runs(decode_run, read(positions), len(positions))) as runs:
        for count in runs:
            done += count
            if progress:
                progress(done, len(positions))

    kept = np.delete(np.arange(len(positions)), sorted(failed))
    # rows after a failed one move up, one by one: a copy would double the memory
    for target in np.flatnonzero(kept != np.arange(len(kept))):
        pixels[target] = pixels[kept[target]]
    return DecodeResult(failed, sorted(dim))


def store_key(version: str, positions: np.ndarray, *numbers: int) -> str:
    """Name of the file for these positions of this version of a source, decoded with these settings."""
    text = " ".join(["3", version, *map(str, numbers)])  # "3": the version of our decoding
    return hashlib.sha256(text.encode() + positions.astype("<i8").tobytes()).hexdigest()[:32]


def raw_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.u8"


def encoded_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.jpegs"


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether `path` still names the open `file`; another process may remove or rename it at any moment."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open or create `path` for appending and hold its lock; waits until the lock is free."""
    while True:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # false where the file was renamed or removed while we waited: open it again
            if _is_at(file, path):
                yield file
                return


def _remove_stale(folder: Path) -> None:
    """Remove raw files that killed builds left, which nobody locks. (Builds of JPEGs are continued.)"""
    for part in folder.glob("*.u8.part"):
        with suppress(OSError), open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def raw_pixels(request: StoreRequest) -> tuple[np.ndarray, DecodeResult]:
    """Decode into a mapped file, which later calls with the same key open read-only.

    Returns:
        (len(positions), 3, S, S) uint8, of which the first rows hold the images that could be decoded.
    """
    data, note = raw_path(request.folder, request.key), request.folder / f"{request.key}.json"
    shape = (len(request.positions), 3, request.size, request.size)
    num_bytes = int(np.prod(shape))
    if not data.is_file():
        try:
            request.folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(request.folder)
            _build_raw(request, data, note, shape)
        except OSError as exc:
            size, folder = f"{num_bytes / 2**30:.1f} GiB", request.folder
            fix = (
                "set cache_dir to a folder with room, store to encoded, or a smaller image_size or max_images"
            )
            raise UserError(f"{size} of pixels cannot be written into {folder}: {reason(exc)}", fix) from exc
    elif request.progress:
        request.progress(shape[0], shape[0])
    if data.stat().st_size != num_bytes:
        raise _damaged(data, f"{data.stat().st_size:,} bytes instead of {num_bytes:,}")
    # "r": the folder may be only readable, and a private mapping ("c") counts in full against memory
    return np.memmap(data, np.uint8, "r", shape=shape), _read_result(note, data)


def _build_raw(request: StoreRequest, data: Path, note: Path, shape: tuple[int, ...]) -> None:
    part, note_part = data.with_name(f"{data.name}.part"), note.with_name(f"{note.name}.part")
    with _locked(part) as file:
        try:
            if data.is_file():  # another process built it while this one waited
                part.unlink()
                return
            num_bytes = int(np.prod(shape))
            file.truncate(num_bytes)
            # reserve the room: a full disk under a mapped file ends the process with SIGBUS
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            mapped = np.memmap(part, np.uint8, "r+", shape=shape)
            result = decode_into(
                mapped, request.read, request.positions, request.max_pixels, request.progress
            )
            mapped.flush()
            note_part.write_text(json.dumps(asdict(result)))
            os.replace(note_part, note)
            os.replace(part, data)  # last: where the data is, the note is too
        except BaseException:
            part.unlink(missing_ok=True)
            note_part.unlink(missing_ok=True)
            raise


def _read_result(note: Path, data: Path) -> DecodeResult:
    try:
        content = json.loads(note.read_text())
        failed = {int(row): str(why) for row, why in content["failed"].items()}
        return DecodeResult(failed, [int(row) for row in content["dim"]])
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as exc:
        fix = f"delete {data} with it, and both are built again"
        raise UserError(f"{note} is damaged ({reason(exc)})", fix) from exc


def encoded_pixels(request: StoreRequest, quality: int) -> tuple[EncodedPixels, DecodeResult]:
    """JPEGs in one file, which later calls with the same key find again; a killed build is continued.

    Format of the file: one record per position, in order: the image's JPEG or, where it was left out, the
    reason. Then the offset at which each record ends, len(positions) int64: negative for a reason, plus DIM
    for a dim image. Then the sha256 of these numbers.
    """
    path = encoded_path(request.folder, request.key)
    if not path.is_file():
        try:
            request.folder.mkdir(parents=True, exist_ok=True)
            _build_encoded(request, path, quality)
        except OSError as exc:
            raise UserError(
                f"the images could not be stored as JPEG in {request.folder}: {reason(exc)}",
                "make room there and start again, it goes on where it was; "
                "or set cache_dir to another folder",
            ) from exc
    elif request.progress:
        request.progress(len(request.positions), len(request.positions))
    return _open_encoded(path, request.size, len(request.positions))


def _build_encoded(request: StoreRequest, path: Path, quality: int) -> None:
    log_path = path.with_name(f"{request.key}.ends.part")
    with _locked(path.with_name(f"{path.name}.part")) as data:
        if path.is_file():  # another process built it while this one waited
            os.unlink(data.name)
        else:
            with open(log_path, "a+b") as log:
                _append_records(data, log, request, quality)
                log.seek(0)
                ends = log.read()
            data.write(ends + hashlib.sha256(ends).digest())
            data.flush()
            os.fsync(data.fileno())
            os.replace(data.name, path)
        log_path.unlink(missing_ok=True)


def _append_records(data: BinaryIO, log: BinaryIO, request: StoreRequest, quality: int) -> None:
    """Append the missing records to `data` and the offsets of their ends to `log`."""

    def encode_run(_: int, run: list[Encoded]) -> list[tuple[int, bytes]]:
        return [_record(encoded, request, quality) for encoded in run]

    done, end = _resume_records(data, log, len(request.positions))
    saved = end
    waiting: list[int] = []  # ends that are not in the log yet

    def save() -> None:
        data.flush()
        os.fsync(data.fileno())  # the records are on disk before the numbers that say so
        log.write(np.array(waiting, "<i8").tobytes())
        log.flush()
        waiting.clear()

    total = len(request.positions)
    try:
        with closing(map_runs(encode_run, request.read(request.positions[done:]), total - done)) as runs:
            for records in runs:
                for kind, record in records:
                    data.write(record)
                    end += len(record)
                    waiting.append(-end if kind < 0 else end + kind)
                done += len(records)
                if end - saved > SAVE_BYTES:
                    save()
                    saved = end
                if request.progress:
                    request.progress(done, total)
    finally:
        save()


def _record(encoded: Encoded, request: StoreRequest, quality: int) -> tuple[int, bytes]:
    """(0, JPEG), (DIM, JPEG of a dim image) or (-1, reason why there is none)."""
    dim: list[bool] = []
    try:
        record = to_jpeg(
            encoded, request.size, request.max_pixels, quality, functools.partial(dim.append, True)
        )
        return DIM if dim else 0, record
    except Exception as exc:  # noqa: BLE001 - as in decode_into
        return -1, reason(exc).encode()


def _resume_records(data: BinaryIO, log: BinaryIO, count: int) -> tuple[int, int]:
    """(number of whole records, offset at which they end); the rest of both files is cut off."""
    log.seek(0)
    content = log.read()
    offsets = _offsets(np.frombuffer(content[: len(content) // 8 * 8], "<i8")[:count])
    begins = np.concatenate([[0], offsets[:-1]])[: len(offsets)]
    whole = (offsets > begins) & (offsets <= os.fstat(data.fileno()).st_size)
    done = len(offsets) if whole.all() else int(whole.argmin())
    end = int(offsets[done - 1]) if done else 0
    data.truncate(end)
    log.truncate(8 * done)
    return done, end


def _offsets(ends: np.ndarray) -> np.ndarray:
    """The numbers in a file of JPEGs without sign and flag: offsets at which the records end."""
    return np.abs(ends) & (DIM - 1)


def _open_encoded(path: Path, size: int, count: int) -> tuple[EncodedPixels, DecodeResult]:
    try:
        mapped = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as exc:  # ValueError: an empty file
        raise _damaged(path, reason(exc)) from exc
    num_records_bytes = len(mapped) - 8 * count - DIGEST_BYTES
    ends = mapped[max(num_records_bytes, 0) : -DIGEST_BYTES].tobytes()
    if hashlib.sha256(ends).digest() != mapped[-DIGEST_BYTES:].tobytes():
        raise _damaged(path, "its table of contents does not match its checksum")
    signed = np.frombuffer(ends, "<i8").astype(np.int64)
    offsets = _offsets(signed)
    if len(signed) != count or offsets[-1] != num_records_bytes:
        raise _damaged(path, "it is not of the size it was written in")
    spans = np.stack([np.concatenate([[0], offsets[:-1]]), offsets], axis=1)  # (count, 2)
    failed = {int(row): mapped[slice(*spans[row])].tobytes().decode() for row in np.flatnonzero(signed < 0)}
    return EncodedPixels(size, path, read_only(mapped), spans[signed > 0]), DecodeResult(
        failed, np.flatnonzero(signed >= DIM).tolist()
    )


def read_only(mapped: np.ndarray) -> Tensor:
    """The tensor in the same memory, without torch's warning about read-only arrays: nobody writes to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(mapped)


# ---- digests


def pixel_digest(pixels: Pixels, path: Path | None = None) -> str:
    """BLAKE2b (hex) of the shape and all pixels (N, 3, S, S), or of the shape and the bytes of all JPEGs.

    Takes a tenth of a second for 100 MB on one core; all cores share the work. The digest of a large file,
    and of each part of its JPEGs that was asked for, is kept in the JSON file beside it, with the file's size
    and time, so that a set larger than memory is read once and not at every start (unless that JSON file
    cannot be written).

    Args:
        path: the raw file that the pixels are mapped from, if any.
    """
    path = pixels.path if isinstance(pixels, EncodedPixels) else path
    if path is None or pixels.nbytes < NOTED_BYTES:
        return _digest(pixels)
    note, info = path.with_suffix(".json"), os.stat(path)
    state = [info.st_size, info.st_mtime_ns]
    which = "all"
    if isinstance(pixels, EncodedPixels):  # what is held out, and the rest, are mapped from the same file
        which = hashlib.blake2b(pixels.spans.tobytes(), digest_size=16).hexdigest()
    known = _read_note(note)
    kept = known.get("digests")
    digests = kept.get("blake2b") if isinstance(kept, dict) and kept.get("of") == state else None
    digests = digests if isinstance(digests, dict) else {}
    if isinstance(digests.get(which), str):
        return str(digests[which])
    digest = _digest(pixels)
    kept = {"of": state, "blake2b": digests | {which: digest}}
    part = note.with_name(f"{note.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(known | {"digests": kept}))
        os.replace(part, note)
    except OSError:  # a cache that is only readable, a full disk
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return digest


def _digest(pixels: Pixels) -> str:
    whole = hashlib.blake2b(f"{type(pixels).__name__} {tuple(pixels.shape)}".encode(), digest_size=32)
    rows = max(1, HASH_CHUNK_BYTES // max(1, pixels.shape[1:].numel()))

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
    """The JSON file beside a file of pixels: the fields of `DecodeResult`, and "digests"; {}: unreadable."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text())
        return values if isinstance(values, dict) else {}
    return {}


# ---- serving


class DeviceImages:
    """Images resident on the device: a batch is one gather there."""

    def __init__(self, pixels: Tensor, device: torch.device | str) -> None:
        """pixels: (N, 3, S, S) uint8."""
        self.pixels = pixels.to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def stream(self, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index (B,), images (B, 3, S, S) uint8) for every row of index_batches (steps, B) int64.

        Never waits for the device.
        """
        for index in index_batches:
            yield index, self.pixels[index]


class HostImages:
    """Images in main memory or a file; a thread gathers or decodes the next batches during a step."""

    def __init__(
        self, pixels: Pixels, device: torch.device | str, prefetch_batches: int = PREFETCH_BATCHES
    ) -> None:
        """
        Args:
            pixels: (N, 3, S, S) uint8 on the CPU.
            device: where the batches go.
            prefetch_batches: batches held in main memory beside the one yielded last.
        """
        self.pixels = pixels
        self.prefetch_batches = prefetch_batches
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())

    def __len__(self) -> int:
        return len(self.pixels)

    def stream(self, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As `DeviceImages.stream`. Errors of the gathering thread are raised here; closing ends it."""
        table = index_batches.cpu()  # waits for the device, once per epoch
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
                    shape, pin = (len(index), *self.pixels.shape[1:]), self.device.type == "cuda"
                    images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
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
    """Put (N, 3, S, S) uint8 on the device if it takes at most half of its free memory, else stream them.

    JPEGs are decoded once onto a GPU with that much room; on the CPU always streamed: memory is short there.
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
