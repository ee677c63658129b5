"""Images that are objects in Python (arrays, data sets of torch and of Hugging Face) -> `ImageSet`.

Their pixels go the way of files: the same resizing, the same stores, an unreadable image is left out and
listed. An object is read by position, `len(data)` and `data[i]`; nothing is imported to know its kind.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from linear_eval.errors import did_you_mean, first_line
from ssl_emp.data.decode import Encoded, detached
from ssl_emp.data.images import ImageSet, load_source
from ssl_emp.data.source import Source, normal, version_of
from ssl_emp.data.tables import IMAGE_COLUMNS, LABEL_COLUMNS, ColumnLabels, Unusable, joined
from ssl_emp.errors import UserError
from ssl_emp.text import shorten

IN_MEMORY = "<in memory>"  # data.source of images that no file has; data.kind is object
KIND = "object"
PROBED = 8  # items that are read twice: a random flip is missed once in 256 times
NONE = object()  # an item without a label
DRAWS_OWN = "leave random and other transforms out of it: views are drawn here, from the whole image"
AS_BYTES = (
    "give PIL images or uint8 pixels of 0 to 255: without ToTensor and Normalize, or (x * 255).round().byte()"
)
KINDS_OF_DATA = (
    "give a path or name, a data set of PIL images or uint8 tensors with len(data) and data[i], or an array "
    "(N, 3, H, W) or (N, H, W, 3) of uint8"
)


def load_object(
    data: Any,
    name: str = "data",
    *,
    labels: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    download_dir: str = "",
    **options: Any,
) -> ImageSet:
    """Bring an object to (N, 3, S, S) uint8, as `load_images` does a folder.

    Args:
        data: one of
            an array or tensor of uint8, (N, 3, H, W), (N, H, W, 3), or (N, H, W) for grey ones;
            a pair (images, labels), a tuple of any of these and N labels;
            a Hugging Face `Dataset` (one split, by its columns);
            anything with `len(data)` and `data[i]`, such as torch's map-style data sets or a list. An item is
            an image, a tuple that begins with the image, or a dict. An image is a PIL image or uint8 pixels,
            (3, H, W), (H, W, 3) or (H, W).
        name: samples are called `NAME#17`.
        labels: `auto` or `none`. The label is the second part of a tuple, or the column or key `label`,
            `labels` or `fine_label`: a whole number or a text. Where they cannot be used, there are none and
            `labels_from` says why. `data.classes`, or the feature of a Hugging Face column, names classes.
        image_column, label_column: of columns and dicts, instead of those found by name.
        download_dir: not used; an argument of `load_images`, whose options these are.
        options: further arguments of `load_source`. A set that memory cannot hold is read twice, once for
            the name of its file in the cache.

    Raises:
        UserError: none of these, or empty; an item that is not such an image, or another one when it is read
            again; labels of another number; what `load_source` raises.
    """
    pair = data if isinstance(data, tuple) and len(data) == 2 else None
    items = open_items(data if pair is None else pair[0], image_column, label_column)
    if pair is not None:
        items = replace(items, labels=_given_labels(pair[1], len(items)), label_source="the labels given")
    reader = Reader(items, name, remembers=labels != "none")
    reader.probe()
    names = [f"{name}#{row}" for row in range(reader.count)]
    why = "labels are off" if labels == "none" else ""
    source = Source(names, None, None, reader.version, reader.read, labels_from=why)
    images = load_source(source, IN_MEMORY, **options)
    if labels == "none":
        return images
    rows = np.array([int(kept.rpartition("#")[2]) for kept in images.names])
    try:
        numbers, class_names, where = reader.labels_of(rows)
    except Unusable as why_not:
        return replace(images, labels_from=str(why_not))
    values = None if numbers is None else torch.from_numpy(numbers)
    return replace(images, labels=values, class_names=class_names, labels_from=where)


def is_labelled(data: Any) -> bool:
    """Whether data is a pair (images, labels), and not one of two sets of images."""
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    labels = data[1]
    if isinstance(labels, Tensor | np.ndarray):
        return labels.ndim == 1
    return isinstance(labels, list | tuple) and bool(labels) and isinstance(labels[0], int | str | np.integer)


# ---- what an object holds


@dataclass(frozen=True)
class Items:
    """An object by position: `data[i]` is split into an image and its label by `parts`.

    Attributes:
        parts: item -> (image, label or NONE).
        labels: those of all samples, where they are known without reading the images.
        class_names: of the labels 0, 1, ...
        label_source: where the labels are from, as a line of the plan says it.
    """

    data: Any
    parts: Any = staticmethod(lambda item: (item, NONE))
    labels: Sequence[Any] | None = None
    class_names: list[str] | None = None
    label_source: str = "the items of the data set"

    def __len__(self) -> int:
        return len(self.data)


def open_items(data: Any, image_column: str | None = None, label_column: str | None = None) -> Items:
    """What `data` is. Raises UserError where it is nothing that has images by position."""
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        raise UserError(f"data is a {kind}, which gives batches", "give its data set, loader.dataset")
    if isinstance(data, Mapping) or isinstance(getattr(data, "column_names", None), Mapping):
        found = ", ".join(map(str, list(data)[:5]))
        raise UserError(f"data is a {kind} of several parts ({shorten(found)})", "give one, data['train']")
    by_position = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not by_position):
        fix = "give a map-style one, with len(data) and data[i]"
        raise UserError(f"data is a {kind}, which has no samples by number to choose from", fix)
    if isinstance(data, str | bytes) or not by_position:
        raise UserError(f"data is of type {kind}", KINDS_OF_DATA)
    items = _array(data) if isinstance(data, Tensor | np.ndarray) else None
    if items is None and hasattr(data, "column_names"):
        items = _columns(data, image_column, label_column)
    if items is None:
        parts = partial(_parts, image_column=image_column, label_column=label_column)
        items = Items(data, parts, class_names=_class_names(data))
    try:
        count = len(items)
    except Exception as error:  # a length may raise whatever its author chose
        what = f"len(data) of the {kind} cannot be had ({first_line(error)})"
        raise UserError(what, KINDS_OF_DATA) from error
    if not count:
        raise UserError(f"the {kind} is empty", "give at least two images")
    return items


def _array(data: Tensor | np.ndarray) -> Items:
    array = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
    shape, kind = tuple(array.shape), array.dtype
    if kind != np.uint8:
        raise UserError(f"data is {kind} of shape {shape}", AS_BYTES)
    if array.ndim not in (3, 4):
        fix = "give (N, 3, H, W), (N, H, W, 3), or (N, H, W) for grey images"
        raise UserError(f"data is an array of shape {shape}", fix)
    return Items(array)


def _columns(data: Any, image_column: str | None, label_column: str | None) -> Items:
    """A Hugging Face `Dataset`. Where it has no format, images are read as the bytes that it keeps."""
    names = list(data.column_names)
    for key, wanted in (("image_column", image_column), ("label_column", label_column)):
        if wanted is not None and wanted not in names:
            near = did_you_mean(wanted, names, f"use one of {', '.join(names)}", 0.4, f"data.{key}=")
            raise UserError(f"data has no column {wanted} (data.{key})", near)
    features = getattr(data, "features", None) or {}
    by_type = [name for name in names if type(features.get(name)).__name__ == "Image"]
    images = [name for name in IMAGE_COLUMNS if name in names] + by_type
    if image_column is None and not images:
        fix = f"name it: {{'data.image_column': …}}, one of {', '.join(names)}"
        raise UserError("data has no column image or img", fix)
    image = image_column or images[0]
    label = label_column or next((name for name in LABEL_COLUMNS if name in names), None)
    # Hugging Face decodes an image to pixels; its bytes go the way of a file's, as a parquet's do
    feature, form = features.get(image), getattr(data, "format", None)
    is_plain = not isinstance(form, Mapping) or form.get("type") is None
    if is_plain and getattr(feature, "decode", False) is True and hasattr(data, "cast_column"):
        data = data.cast_column(image, dataclasses.replace(feature, decode=False))  # type: ignore[type-var]  # theirs
    declared = getattr(features.get(label), "names", None)
    return Items(
        data,
        lambda item: (item[image], NONE),
        None if label is None else list(data[label]),
        [normal(str(name)) for name in declared] if declared else None,
        f"column {label}",
    )


def _parts(item: Any, image_column: str | None, label_column: str | None) -> tuple[Any, Any]:
    """(image, label or NONE) of an item: of a tuple the first two parts, of a dict those of these names."""
    if isinstance(item, Mapping) and "bytes" not in item:
        image = image_column or next((name for name in IMAGE_COLUMNS if name in item), None)
        label = label_column or next((name for name in LABEL_COLUMNS if name in item), None)
        missing = [name for name in (image, label_column) if name is not None and name not in item]
        if image is None or missing:
            there = ", ".join(map(str, item))
            fix = f"name the key of the image: {{'data.image_column': …}}, one of {shorten(there)}"
            raise UserError(f"an item has no key {missing[0] if missing else 'image'}", fix)
        return item[image], NONE if label is None else item[label]
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else NONE
    return item, NONE


def _class_names(data: Any) -> list[str] | None:
    """`classes` of a torch data set, or of the one that a Subset is of."""
    for _ in range(10):
        names = getattr(data, "classes", None)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return [normal(name) for name in names]
        data = getattr(data, "dataset", None)
    return None


def _given_labels(labels: Any, count: int) -> list[Any]:
    if isinstance(labels, str | bytes | Mapping) or not hasattr(labels, "__len__"):
        fix = "give (images, labels), with a label for each image"
        raise UserError(f"data is a pair, and its second part is of type {type(labels).__name__}", fix)
    if len(labels) != count:
        raise UserError(f"there are {len(labels):,} labels for {count:,} images", "give one for each image")
    return list(labels)


# ---- reading


def encoded(image: Any, where: str) -> Encoded:
    """An image as `decode` takes it: the file of a PIL image that is not decoded yet, else its pixels.

    Args:
        image: PIL image; uint8 (3, H, W), (H, W, 3), (H, W, 4), (1, H, W), (H, W, 1) or (H, W); a dict with
            `bytes` or `path`, as Hugging Face keeps images.
        where: such as `data[17]`, for messages.

    Raises:
        UserError: it is something else.
    """
    if image is None:
        return ValueError("no image (None)")
    if isinstance(image, Image.Image):
        return detached(image)
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        content = image.get("bytes")
        return content if content is not None else image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        several = isinstance(image, tuple | list)
        what = f"{where} has an image of type {type(image).__name__}"
        raise UserError(what, DRAWS_OWN if several else AS_BYTES)
    shape = image.shape
    if image.dtype != np.uint8:
        raise UserError(f"{where} is {image.dtype} of shape {tuple(shape)}", AS_BYTES)
    if image.ndim == 3 and shape[0] in (1, 3) and not (shape[2] in (1, 3) and shape[0] == shape[1]):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        fix = "give (3, H, W) or (H, W, 3), or (H, W) for a grey image"
        raise UserError(f"{where} is of shape {tuple(shape)}", fix)
    return np.array(image)  # a copy: images are read ahead, and a data set may use one buffer for all


@dataclass
class Reader:
    """Reads items one by one, in the calling thread: a data set need not bear threads.

    Attributes:
        remembers: keep the labels that come with images.
        sizes: (N, 2) what an image measured when it was first read; 0 where it was not.
    """

    items: Items
    name: str
    remembers: bool
    count: int = field(init=False)
    sizes: np.ndarray = field(init=False)
    seen: dict[int, Any] = field(init=False, default_factory=dict)  # position -> label

    def __post_init__(self) -> None:
        self.count = len(self.items)
        self.sizes = np.zeros((self.count, 2), np.int32)

    def at(self, position: int) -> Encoded:
        """One image. What it cannot read is an exception, as a value: the image is left out for it."""
        where = f"{self.name}[{position}]"
        try:
            item = self.items.data[position]
        except OSError as error:  # a missing or damaged file, PIL's UnidentifiedImageError
            return error
        except Exception as error:  # whatever the data set's own code raises
            what = f"{where} raised {type(error).__name__}: {first_line(error)}"
            raise UserError(what, "correct the data set; the error's cause has the rest") from error
        image, label = self.items.parts(item)
        if self.remembers and self.items.labels is None:
            self.seen[position] = label
        try:
            found = encoded(image, where)
        except (OSError, ValueError) as error:  # of a PIL image that was closed before it was decoded
            return error
        size = found.size if isinstance(found, Image.Image) else getattr(found, "shape", (0, 0))[:2]
        before = tuple(self.sizes[position].tolist())
        if any(before) and tuple(size) != before:
            what = f"{where} changes when it is read again: {before} pixels, and then {tuple(size)}"
            raise UserError(what, DRAWS_OWN)
        self.sizes[position] = size
        return found

    def read(self, positions: np.ndarray) -> Iterator[Encoded]:
        """`Source.read`. Raises UserError where the object has another length than it had."""
        self._check_length()
        yield from map(self.at, positions.tolist())
        self._check_length()

    def _check_length(self) -> None:
        if len(self.items) != self.count:
            what = f"data had {self.count:,} items, and has {len(self.items):,} now"
            raise UserError(what, "give a data set of a fixed length")

    def probe(self) -> None:
        """Read a few items twice: where they are drawn at random, a score is not that of an image."""
        for position in sorted(set(np.linspace(0, self.count - 1, PROBED).astype(int).tolist())):
            first, second = (digest_of(self.at(position)) for _ in range(2))
            if first != second:
                what = f"{self.name}[{position}] is another image each time it is read"
                raise UserError(what, DRAWS_OWN)

    def version(self) -> str:
        """A digest (hex) of every image: another pass over all, for a set that is kept in a file."""
        positions = np.arange(self.count)
        digests = map(digest_of, self.read(positions))
        return version_of((digest, [row]) for row, digest in enumerate(digests))

    def labels_of(self, rows: np.ndarray) -> tuple[np.ndarray | None, list[str] | None, str]:
        """(labels (len(rows),) int64, class names, where they are from). Raises Unusable."""
        items, positions = self.items, np.arange(self.count)
        if items.labels is None:
            for row in rows.tolist():
                if row not in self.seen:  # its pixels came from a file of an earlier call
                    self.at(row)
            # those of images that were left out count as classes too, as in a table
            positions = np.array(sorted({*self.seen, *rows.tolist()}))
            values = [self.seen.get(row, NONE) for row in positions.tolist()]
        else:
            values = list(items.labels)
        if all(value is NONE for value in values):
            raise Unusable("the items have none")
        column = as_column(values, items.label_source)
        declared = None if column.names else items.class_names
        numbers, class_names, where = joined([column], declared, items.label_source, IN_MEMORY)
        chosen = None if numbers is None else numbers[np.searchsorted(positions, rows)]
        return chosen, class_names, where


def digest_of(image: Encoded) -> str:
    """Of the pixels of an image, or of the file that it is."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(image, Image.Image):
        try:
            found.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        except (OSError, ValueError) as error:  # it was closed: left out when it is read
            found.update(repr(error).encode())
    elif isinstance(image, np.ndarray):
        found.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    else:
        found.update(image if isinstance(image, bytes) else repr(image).encode(errors="surrogateescape"))
    return found.hexdigest()


def as_column(values: list[Any], where: str) -> ColumnLabels:
    """Labels of any kind -> numbers, -1 where missing, or texts. Raises Unusable for what is no class."""
    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain if value is not None}
    if kinds <= {int, bool}:
        numbers = np.array([-1 if value is None else int(value) for value in plain], dtype=object)
        if (numbers >= 2**63).any():
            raise Unusable(f"{where} have numbers of more than 63 bits")
        return ColumnLabels(np.maximum(numbers, -1).astype(np.int64), None)
    if kinds != {str}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise Unusable(f"{where} have labels of type {found}, not whole numbers or text")
    texts = [normal(value or "") for value in plain]
    distinct = sorted(set(texts))
    if len(distinct) == len(texts) > 2:
        raise Unusable(f"{where} have another text for each image, which are no classes")
    number = {text: place for place, text in enumerate(distinct)} | {"": -1}
    return ColumnLabels(np.array([number[text] for text in texts], np.int64), distinct)


def _plain(label: Any) -> Any:
    """A label as a value of Python; None where it is missing."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.item() if np.prod(label.shape) == 1 else label
    is_missing = label is NONE or (isinstance(label, float) and label != label)
    return None if is_missing else label
