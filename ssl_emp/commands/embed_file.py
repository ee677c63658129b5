"""What `ssl-emp embed` does: images -> chunks of rows beside the file -> the file.

Memory holds the pixels of two batches and the rows of one chunk; of all images only the names. Chunks are cut
by position, so that a batch holds the same images however often the command was interrupted and whichever
process makes it.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from linear_eval.errors import first_line
from linear_eval.finetune import state_hash
from ssl_emp._version import __version__
from ssl_emp.commands.eval_config import EvalConfig, check, parse_overrides
from ssl_emp.commands.evaluate import own_device
from ssl_emp.commands.evaluators import build
from ssl_emp.commands.subjects import find_subjects
from ssl_emp.config import LARGEST_BATCH, Place, Section
from ssl_emp.data.decode import MAX_PIXELS, Encoded, pillow_limits
from ssl_emp.data.images import Source, find_images
from ssl_emp.data.source import version_of
from ssl_emp.data.stores import decode_into
from ssl_emp.device import pick_device
from ssl_emp.embedding import FeatureReader, uses_bf16
from ssl_emp.errors import RunFailed, UserError, printable
from ssl_emp.run.lock import sole_writer
from ssl_emp.run.ranks import Ranks
from ssl_emp.run.report import duration, show_progress
from ssl_emp.run.streams import put
from ssl_emp.safe_files import as_json, inner_folder, read_json, replacing, write_atomically
from ssl_emp.text import quoted

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
KEY = b"ssl_emp"  # of the file's metadata
CHUNK_ROWS = 1024  # a killed command has lost as many at most, in each process
CHUNK_BYTES = 64 << 20  # fewer where the rows are larger, but a batch
LISTED = 1000  # names of unreadable images that the file's metadata holds


class EmbedData(Section):
    """Keys of pretrain.py's section `data` that say which images there are and what is seen of them."""

    kind: Literal["auto", "folder", "parquet", "torchvision", "mnist5k"] = "auto"
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    image_column: Annotated[str, Field(min_length=1)] | None = None
    download_dir: Place = "data"
    max_pixels: Annotated[int, Field(ge=1, le=10_000_000_000)] = MAX_PIXELS


class EmbedConfig(Section):
    data: EmbedData = EmbedData()
    split: Literal["all", "train", "test"] = "all"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    features: Literal["pooled", "patches", "stages"] = "pooled"
    batch_size: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = 256


def embed(
    arguments: argparse.Namespace, encoder_name: str, images: str, given: list[str], ranks: Ranks
) -> None:
    """The whole command. Raises UserError; RunFailed where a disk is full, with all whole chunks kept."""
    started, out = time.monotonic(), Path(arguments.out)
    with ranks.first_then_others():
        config = settings(arguments, given)
        if out.is_dir():
            raise UserError(f"{out} is a folder", f"give --out {quoted(out / 'embeddings.parquet')}")
        source = one_source(find_images_of(images, config))
        device = own_device(pick_device(arguments.device), ranks)
        encoder, size, weights = load(encoder_name, config, device)
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and uses_bf16(device))
        reader = FeatureReader(encoder, config.features, image_size=size, bf16=bf16)
        job = Job(config, source, reader, size, about(encoder, encoder_name, source, reader, config, size))
    if len(set(ranks.barrier(as_json(job.same)))) > 1:
        what = "the processes do not see the same images, encoder and settings"
        raise UserError(what, "give all of them the same command, on a file system that they share")

    with ExitStack() as stack:
        parts = out.with_name(f"{out.name}.parts")
        with ranks.together():
            finished = ranks.is_first and is_finished(out, job, arguments.overwrite)
            if ranks.is_first and not finished:
                make_folder(out.parent, parts.name)
                stack.enter_context(_disk(out))
                stack.callback(remove_empty, parts)  # once it is no longer locked
                stack.enter_context(sole_writer(parts, "give another --out"))
                begin(parts, job, arguments.overwrite)
        if ranks.barrier("finished" if finished else "")[0]:
            _say(ranks, f"{out} is there already, with these images by this encoder")
            return
        with ranks.together():
            mine = share(missing(parts, job), ranks)
        ranks.barrier()  # all have looked before one writes
        with ranks.together(), _disk(out):
            write_chunks(parts, job, mine, f"images of process {ranks.rank}" if ranks.rank else "images")
        named = {"encoder": encoder_name, "weights": weights, "images": images}
        with ranks.together(), _disk(out):
            if ranks.is_first:
                rows, unread = join(parts, out, job, named)
                remove(parts)
    if ranks.is_first:
        _say(ranks, summary(out, job, rows, unread, time.monotonic() - started))


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_first:
        put("stdout", f"{printable(line)}\n")


# ---- what is asked for


def settings(arguments: argparse.Namespace, given: list[str]) -> EmbedConfig:
    flags = {"features": arguments.features, "batch_size": arguments.batch_size}
    for word in given:
        name = word.partition("=")[0]
        if name in flags:
            raise UserError(f"{name} is no key", f"give --{name.replace('_', '-')}")
    return check(EmbedConfig, parse_overrides(given, EmbedConfig) | flags, "the command line")


def find_images_of(images: str, config: EmbedConfig) -> list[Source]:
    data = config.data
    return find_images(images, config.split, data.download_dir, data.kind, data.image_column)


def one_source(sources: Sequence[Source]) -> Source:
    """Several sources in one, in their order."""
    if len(sources) == 1:
        return sources[0]
    ends = np.cumsum([len(source.names) for source in sources])

    def read(positions: np.ndarray) -> Iterator[Encoded]:
        for source, end in zip(sources, ends, strict=True):
            first = int(end) - len(source.names)
            yield from source.read(positions[(positions >= first) & (positions < end)] - first)

    return Source(
        names=[name for source in sources for name in source.names],
        labels=None,
        class_names=None,
        version=version_of((source.version_now(), [len(source.names)]) for source in sources),
        read=read,
        skipped=[item for source in sources for item in source.skipped],
    )


def load(name: str, config: EmbedConfig, device: torch.device) -> tuple[nn.Module, int, str]:
    """(encoder on the device, S, what its weights are)."""
    if name in ("random", "pixels"):
        what = f"{name} has learned nothing: evaluate judges encoders beside it"
        raise UserError(what, f"name an encoder, or the folder ./{name}")
    # a run's own data is not asked for
    data = {"source": "mnist5k", "image_size": config.data.image_size}
    (subject,) = find_subjects([name], check(EvalConfig, {"data": data}, name), {"data": data}, [])
    subject.check()
    size = config.data.image_size or subject.image_size
    assert size is not None, name
    return build(subject, size, device), size, subject.weights


def about(
    encoder: nn.Module, name: str, source: Source, reader: FeatureReader, config: EmbedConfig, size: int
) -> dict[str, Any]:
    """All that the rows depend on, but for rounding: plain values for the metadata of the file.

    What is not finished goes on where this is the same.
    """
    names = hashlib.sha256()
    for image in source.names:
        names.update(f"{len(image)} {image}".encode())
    mean, std = (
        [round(value, 6) for value in getattr(encoder, key).flatten().tolist()] for key in ("mean", "std")
    )
    return {
        "format": FORMAT,
        "version": __version__,
        # of timm and torchvision a name says it; how a network of theirs pools shows in no weight
        "architecture": dict(getattr(encoder, "spec", {"arch": name})),
        "encoder_sha256": state_hash(encoder),
        "images_sha256": version_of([(source.version_now(), [len(source.names)]), (names.hexdigest(), [])]),
        "num_images": len(source.names),
        "image_size": size,
        "preprocessing": {
            "resize": "EXIF rotation, short side to image_size, bicubic, antialiased",
            "crop": "centre",
            "mean": mean,
            "std": std,
            "max_pixels": config.data.max_pixels,
        },
        "features": config.features,
        "precision": "bfloat16" if reader.bf16 else "float32",
        "batch_size": config.batch_size,
        "shapes": {name: list(shape) for name, shape in reader.shapes.items()},
        "grid": None if reader.grid is None else list(reader.grid),
    }


@dataclass(frozen=True)
class Job:
    config: EmbedConfig
    source: Source
    reader: FeatureReader
    size: int
    same: dict[str, Any]  # see `about`

    @property
    def chunk_rows(self) -> int:
        """Positions in a chunk, a multiple of the batch size."""
        row_bytes = 4 * sum(math.prod(shape) for shape in self.reader.shapes.values())
        rows = min(CHUNK_ROWS, CHUNK_BYTES // row_bytes)
        return max(1, rows // self.config.batch_size) * self.config.batch_size

    @property
    def num_chunks(self) -> int:
        return -(-len(self.source.names) // self.chunk_rows)

    def positions(self, chunk: int) -> range:
        start = chunk * self.chunk_rows
        return range(start, min(start + self.chunk_rows, len(self.source.names)))

    def schema(self, metadata: dict[bytes, bytes] | None = None) -> "pa.Schema":
        import pyarrow as pa

        columns = {
            name: pa.list_(pa.float32(), math.prod(shape)) for name, shape in self.reader.shapes.items()
        }
        return pa.schema({"path": pa.string(), **columns}, metadata)


# ---- chunks


def make_folder(folder: Path, parts: str) -> None:
    """The folder of the file, and in it that of the chunks. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inner_folder(folder, parts)
    except OSError as error:
        what = f"cannot make the folder {folder / parts} ({error.strerror})"
        raise UserError(what, "give another --out") from error


def is_finished(out: Path, job: Job, overwrite: bool) -> bool:
    """Whether the file is there, of the same images and encoder. Raises UserError where another one is."""
    import pyarrow.parquet as pq

    if not os.path.lexists(out):
        return False
    if os.path.exists(out) and not out.is_file():
        raise UserError(f"{out} is no regular file, and would be replaced", "give another --out")
    found: Any = None
    with suppress(Exception):  # whatever cannot be read is another file
        found = json.loads((pq.read_schema(out).metadata or {})[KEY])
    differing = difference(found, job)
    if not differing:
        return True
    if not overwrite:
        what = f"{out} is there, and is {'another file' if found is None else f'of {differing}'}"
        raise UserError(what, "give --overwrite to replace it, or another --out")
    return False


def difference(found: Any, job: Job) -> str:
    """What differs between an earlier `about` and that of now, in words; empty where nothing does."""
    if not isinstance(found, dict):
        return "another kind"
    words = {
        "architecture": "another encoder",
        "encoder_sha256": "another encoder",
        "images_sha256": "other images",
        "num_images": "other images",
    }
    for key, value in job.same.items():
        if found.get(key) != value:
            return words.get(key) or f"another {key.replace('_', ' ')} ({found.get(key)}, now {value})"
    return ""


def begin(parts: Path, job: Job, overwrite: bool) -> None:
    """Leave in `parts` the description of the work, and no chunk of other work. Raises UserError."""
    plan = parts / "plan.json"
    if plan.is_file() or chunks(parts):
        try:
            differing = difference(read_json(plan), job)
        except UserError:
            differing = "another kind"
        if not differing:
            return
        if not overwrite:
            what = f"{parts} is unfinished, and of {differing}"
            raise UserError(
                what, "give --overwrite to begin anew, the same words as before to go on, or another --out"
            )
        remove(parts)
    write_atomically(plan, as_json(job.same, indent=1).encode())


def chunk_path(parts: Path, chunk: int) -> Path:
    return parts / f"chunk-{chunk:07d}.parquet"


def chunks(parts: Path) -> list[Path]:
    return sorted(parts.glob("chunk-*.parquet"))


def missing(parts: Path, job: Job) -> list[int]:
    """Chunks that are not there yet, or not whole."""
    return [chunk for chunk in range(job.num_chunks) if not is_whole(chunk_path(parts, chunk), job, chunk)]


def is_whole(path: Path, job: Job, chunk: int) -> bool:
    import pyarrow.parquet as pq

    # whatever is wrong with it, it is made again
    with suppress(Exception), pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows + len(unreadable_of(file.schema_arrow))
        return rows == len(job.positions(chunk)) and file.schema_arrow.equals(job.schema())
    return False


def unreadable_of(schema: "pa.Schema") -> list[tuple[str, str]]:
    """(name, reason) of the images that a chunk lacks."""
    return [(name, why) for name, why in json.loads((schema.metadata or {})[KEY])["unreadable"]]


def share(chunks: list[int], ranks: Ranks) -> list[int]:
    """A contiguous part of the chunks for each process: a table is read by row groups."""
    begin, end = (len(chunks) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return chunks[begin:end]


def write_chunks(parts: Path, job: Job, numbers: list[int], label: str) -> None:
    """The chunks of these numbers, one after the other."""
    if not numbers:
        return
    positions = np.concatenate([np.array(job.positions(number)) for number in numbers])
    progress, done = show_progress(label), 0
    with closing(decoded(job, positions)) as batches:
        for number in numbers:
            left, rows, failed = len(job.positions(number)), [], []
            while left:
                part, pixels, why = next(batches)
                names = [job.source.names[position] for position in part]
                failed += [(names[row], reason) for row, reason in sorted(why.items())]
                names = [name for row, name in enumerate(names) if row not in why]
                if names:
                    rows.append((names, read_features(job.reader, pixels, names)))
                left, done = left - len(part), done + len(part)
                if progress is not None:
                    progress(done, len(positions))
            write_chunk(chunk_path(parts, number), job, rows, failed)


def decoded(
    job: Job, positions: np.ndarray
) -> Generator[tuple[np.ndarray, Tensor, dict[int, str]], None, None]:
    """(positions, pixels (b, 3, S, S) uint8 of those that can be read, row -> why not) of every batch.

    Batches end with chunks. The next one is decoded while the encoder works on one.
    """
    size, max_pixels = job.config.batch_size, job.config.data.max_pixels
    ends = np.flatnonzero((positions[1:] // job.chunk_rows) != (positions[:-1] // job.chunk_rows)) + 1
    parts = [
        chunk[start : start + size]
        for chunk in np.split(positions, ends)
        for start in range(0, len(chunk), size)
    ]
    try:
        buffers = np.empty((2, min(size, len(positions)), 3, job.size, job.size), np.uint8)
    except MemoryError as error:
        raise too_large(min(size, len(positions)), "this machine") from error

    with pillow_limits(max_pixels), ThreadPoolExecutor(1) as ahead:
        stream = job.source.read(positions)

        def decode(turn: int) -> dict[int, str]:
            def read(part: np.ndarray) -> Iterator[Encoded]:
                return islice(stream, len(part))

            return decode_into(buffers[turn % 2], read, parts[turn], max_pixels, None).failed

        waiting = ahead.submit(decode, 0)
        for turn, part in enumerate(parts):
            failed = waiting.result()
            if turn + 1 < len(parts):
                waiting = ahead.submit(decode, turn + 1)
            yield part, torch.from_numpy(buffers[turn % 2][: len(part) - len(failed)]), failed


def too_large(batch_size: int, where: str) -> UserError:
    what = f"a batch of {batch_size} images does not fit into the memory of {where}"
    return UserError(what, f"give --batch-size {max(1, batch_size // 4)}")


def read_features(reader: FeatureReader, pixels: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Column -> rows of a batch. Raises UserError where one is not finite, or the batch is too large."""
    try:
        found = reader(pixels)
    except (RuntimeError, MemoryError) as error:
        # the second is the message of torch on a CPU
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        ):
            raise
        raise too_large(len(pixels), str(reader.device)) from error
    for column, rows in found.items():
        bad = (~rows.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            what = f"the {column} of {names[bad[0]]} is not finite"
            raise UserError(what, "use another checkpoint: this encoder has diverged")
    return found


def write_chunk(
    path: Path, job: Job, rows: list[tuple[list[str], dict[str, Tensor]]], failed: list[tuple[str, str]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = job.schema({KEY: as_json({"unreadable": failed}).encode()})
    arrays = [pa.array(chain.from_iterable(names for names, _ in rows), pa.string())]
    for column, shape in job.reader.shapes.items():
        empty = torch.empty(0, *shape)
        flat = torch.cat([empty, *(found[column] for _, found in rows)]).flatten().numpy()
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), math.prod(shape)))
    with replacing(path) as file:
        pq.write_table(pa.table(arrays, schema=schema), file, **HOW)


# numbers do not repeat: a dictionary of them costs more than it saves
HOW: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}


# ---- the file


def join(parts: Path, out: Path, job: Job, named: dict[str, str]) -> tuple[int, list[tuple[str, str]]]:
    """Write the file from its chunks, a row group each; (rows, unreadable images).

    Raises:
        UserError: not one image could be read.
    """
    import pyarrow.parquet as pq

    unread = list(job.source.skipped)
    for chunk in range(job.num_chunks):
        unread += unreadable_of(pq.read_schema(chunk_path(parts, chunk)))
    rows = len(job.source.names) + len(job.source.skipped) - len(unread)
    if not rows:
        remove(parts)
        what = f"none of {len(unread):,} images could be read ({unread[0][0]}: {unread[0][1]})"
        raise UserError(what, "check the files, or name others")
    text = job.same | named | {"num_unreadable": len(unread), "unreadable": unread[:LISTED]}
    metadata = {KEY: as_json(text).encode()}
    with replacing(out) as file, pq.ParquetWriter(file, job.schema(metadata), **HOW) as writer:
        for chunk in range(job.num_chunks):
            table = pq.read_table(chunk_path(parts, chunk), partitioning=None)
            if len(table):
                writer.write_table(table.replace_schema_metadata(metadata), row_group_size=len(table))
    return rows, unread


def remove(parts: Path) -> None:
    """Chunks first: without its plan a chunk is of unknown work."""
    for path in [*chunks(parts), parts / "plan.json"]:
        path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    with suppress(OSError):  # chunks are in it
        folder.rmdir()


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """What the disk refuses, as RunFailed."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise RunFailed(
            f"cannot write {where} ({error.strerror or first_line(error)}); whole chunks are kept. "
            "fix: make room there, and start the same command again"
        ) from error


def summary(out: Path, job: Job, rows: int, unread: list[tuple[str, str]], seconds: float) -> str:
    if unread:
        name, why = unread[0]
        total = rows + len(unread)
        line = f"{len(unread):,} of {total:,} images could not be read ({name}: {why}); they have no row"
        print(printable(line), file=sys.stderr)
    columns = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in job.reader.shapes.items())
    return f"{out}: {rows:,} images, {columns}, {duration(seconds)}"
