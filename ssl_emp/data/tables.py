"""Parquet files with encoded images in a column of bytes -> a `Source`. One file is open at a time, however
many there are.
"""

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl_emp.data.decode import Encoded, reason
from ssl_emp.data.sniff import HEAD_BYTES, image_format
from ssl_emp.data.source import NoSplit, Source, Unused, normal, some_of, sorted_classes, version_of
from ssl_emp.data.splits import check_shards, split_named, split_of_table
from ssl_emp.errors import UserError
from ssl_emp.text import decodable

if TYPE_CHECKING:
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("image", "img")  # taken first where they hold images
LABEL_COLUMNS = ("label", "labels", "fine_label")  # the first that is there
LOOKED_AT = 16  # cells of a column of bytes, to see whether they are images
MAX_CLASSES = 1_000_000  # more are no classes but numbers of images
READ_ROWS = 64


class _Unusable(Exception):
    """Why a column of labels cannot be used, in words that stand alone."""


@dataclass(frozen=True)
class _Part:
    """What one file holds of the labels: (rows,) int64, -1 where missing; into `names` where those are not
    None.
    """

    labels: np.ndarray
    names: list[str] | None


# ---- which files make a split
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Parquet files that were named together.

    Attributes:
        base: folder that `paths` are relative to.
        paths: of the files, sorted.
        name: what the user calls them, for messages.
        by_name: the files themselves were named, by a path or a glob: what is not among them is not missing.
    """

    base: str
    paths: list[str]
    name: str
    by_name: bool = False

    def at(self, path: str) -> str:
        return os.path.join(self.base, path)


def hold_images(tables: Tables, at_least: int) -> bool:
    """Whether those of the files that have a column of images have so many rows; files that cannot be read
    have none.

    By content: thumbnails' hashes and embeddings are bytes too.
    """
    rows = 0
    for path in tables.paths:
        # whatever is wrong with it, there are no images to be had
        with suppress(Exception), _opened(tables.at(path)) as table:
            names = [column.name for column in table.schema_arrow if _holds_bytes(column.type)]
            rows += table.metadata.num_rows if any(_looks_like_images(table, name) for name in names) else 0
        if rows >= at_least:
            return True
    return False


def find_splits(tables: Tables) -> tuple[dict[str, list[str]], str]:
    """(split -> files, the rest under ""), and a line where a split is held back. `train` is there unless
    only test files are.
    """
    parts: dict[str, list[str]] = {}
    for path in tables.paths:
        parts.setdefault(split_of_table(path) or "", []).append(path)
    if tables.by_name and len(parts) == 1:  # whoever names test files means them, for whatever he asks
        return {**parts, "train": tables.paths, "": []}, ""
    rest = parts.pop("", [])
    if not rest or ("train" in parts and len(parts) > 1):
        return {**parts, **({"": rest} if rest else {})}, ""
    held = [path for kind in ("test", "val") for path in parts.get(kind, [])]
    note = f"held back as a test split, and not trained on: {some_of(held, 2)}" if held else ""
    return {**parts, "train": sorted([*parts.get("train", []), *rest])}, note


def _check_one_data_set(tables: Tables, paths: Sequence[str]) -> None:
    """Raise UserError where the files of a split lie in folders of several data sets, as
    `fruit/train/0.parquet`, `all/train/0.parquet`.

    On the Hub these are configurations of one data set, often with the same images.
    """
    tops = set()
    for path in paths:
        *folders, name = path.split("/")
        depth = next(
            (place for place, part in enumerate([*folders, name.rpartition(".")[0]]) if split_named(part)),
            None,
        )
        if depth is not None:
            tops.add("/".join(folders[:depth]))
    if len(tops) > 1:
        first, *_ = several = sorted(tops)
        what = f"{tables.name} holds several data sets: {some_of([top or '.' for top in several])}"
        raise UserError(
            what,
            f"give one of them, such as {os.path.join(tables.name, first or several[1])}, "
            "or the files of all by a glob",
        )


# ---- a split as a source
# ---------------------------------------------------------------------------------------------


def table_source(
    tables: Tables,
    split: str,
    labels: str,
    image_column: str | None,
    label_column: str | None,
    unused: Unused,
    skipped: list[tuple[str, str]],
) -> Source:
    """The images of a split, `train` or `test`, or `all`. A test split without labels gives way to a val
    split that has some.

    Args:
        image_column, label_column: names of columns; None: found by name and content.
        unused, skipped: what was left aside already, and what could not be looked at.

    Raises:
        NoSplit, or UserError for files that cannot be read, shards that are missing or there twice, and a
        column that is not there.
    """
    parts, note = ({"all": tables.paths}, "") if split == "all" else find_splits(tables)
    kinds = [kind for kind in (("test", "val") if split == "test" else (split,)) if parts.get(kind)]
    if not kinds:
        raise _no_split(tables, split, parts)
    chosen = _read_split(tables, parts, kinds[0], labels, image_column, label_column)
    notes, stand_in = ([note] if note and split == "train" else []), ""
    if (
        split == "test"
        and labels != "none"
        and len(kinds) > 1
        and chosen.labels is None
        and not chosen.unusable
    ):
        val = _read_split(tables, parts, "val", labels, image_column, label_column)
        if val.labels is not None:
            chosen, stand_in = val, some_of(parts["val"], 1)
            notes.append(f"{parts['test'][0]} has no labels, so {stand_in} is the test split")
    for path in chosen.without_images:
        unused.add("tables without a column of images", path)
    if parts.get("") and "train" in parts:
        unused.add("outside of the splits", parts[""][0], len(parts[""]))
    return replace(chosen.source(tables, unused, notes, skipped), stand_in=stand_in)


@dataclass(frozen=True)
class _Split:
    """The files of a split, as they were listed."""

    paths: list[str]
    groups: list[list[int]]  # of every file, rows of its row groups
    stats: list[list[int]]  # of every file, what tells that it changed
    image: str
    labels: np.ndarray | None
    class_names: list[str] | None
    labels_from: str
    unusable: bool  # there are labels, but not such as can be used
    without_images: list[str]
    other_images: list[str]  # further columns of images

    def source(
        self, tables: Tables, unused: Unused, notes: list[str], skipped: list[tuple[str, str]]
    ) -> Source:
        def read(positions: np.ndarray) -> Iterator[Encoded]:
            first = 0  # position of the first row of a file, of a group, of a batch
            for path, groups in zip(self.paths, self.groups, strict=True):
                if len(_between(positions, first, first + sum(groups))):
                    try:
                        yield from _read_file(tables.at(path), groups, self.image, positions - first)
                    except Exception as exc:  # noqa: BLE001 - damaged files make pyarrow raise half a dozen types
                        raise UserError(
                            f"{tables.at(path)} is damaged: {reason(exc)}", "fetch the file again"
                        ) from exc
                first += sum(groups)

        if self.other_images:
            notes = [
                *notes,
                f"images are those of column {self.image}; "
                f"data.image_column can name {some_of(self.other_images)}",
            ]
        kept = zip(map(_portable, self.paths), self.stats, strict=True)
        names = [
            f"{decodable(_portable(path))}#{row}"
            for path, groups in zip(self.paths, self.groups, strict=True)
            for row in range(sum(groups))
        ]
        version = version_of([*kept, (self.image, [])])  # the same files may hold two columns of images
        return Source(
            names,
            self.labels,
            self.class_names,
            version,
            read,
            skipped,
            self.labels_from,
            unused.listed(),
            notes,
        )


def _read_split(
    tables: Tables,
    parts: dict[str, list[str]],
    kind: str,
    labels: str,
    image_column: str | None,
    label_column: str | None,
) -> _Split:
    """Metadata and labels of all files of a split, one after the other."""
    paths = parts[kind]
    if not tables.by_name and kind != "all":
        _check_one_data_set(tables, paths)
    check_shards(paths, tables.name, complete=not tables.by_name)
    used: list[str] = []
    groups: list[list[int]] = []
    stats: list[list[int]] = []
    found_labels: list[_Part] = []
    without_images: list[str] = []
    other_images: list[str] = []
    image, label = image_column, label_column
    names: list[str] | None = None
    unusable = ""
    for path in paths:
        try:
            with _opened(tables.at(path)) as table:
                schema = table.schema_arrow
                if not used:
                    image, other_images = _image_column(table, image_column, tables.at(path))
                    can_be_left = len(paths) > 1 and not (
                        split_of_table(path) or tables.by_name or image_column
                    )
                    if can_be_left and (image is None or not _looks_like_images(table, image)):
                        without_images.append(path)
                        continue
                    if image is None:
                        raise _no_image_column(schema, tables.at(path))
                    label = _label_column(schema, label_column, tables.at(path))
                elif _column(schema, image) is None and not (
                    split_of_table(path) or tables.by_name or image_column
                ):
                    without_images.append(path)
                    continue
                elif _column(schema, image) is None:
                    raise UserError(
                        f"{tables.at(path)} has no column {image} of images, as {used[0]} has",
                        "give files that share one schema",
                    )
                rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
                if sum(rows) != table.metadata.num_rows:
                    raise UserError(
                        f"{tables.at(path)} is damaged: it does not hold the rows that it lists",
                        "fetch the file again",
                    )
                if label and labels != "none" and not unusable:
                    own_names = _declared_names(schema, label)
                    if own_names and names and own_names != names:
                        unusable = f"column {label} numbers other classes in {path} than in {used[0]}"
                    names = names or own_names
                    try:
                        found_labels.append(_read_labels(table, label, sum(rows), path))
                    except _Unusable as exc:
                        unusable = str(exc)
            info = os.stat(tables.at(path))
        except UserError:
            raise
        except Exception as exc:  # noqa: BLE001 - damaged files make pyarrow raise half a dozen types, UnicodeDecodeError among them
            what = f"{tables.at(path)} cannot be read as parquet: {reason(exc)}"
            raise UserError(what, "check that the file is whole: fetch or write it again") from exc
        used.append(path)
        groups.append(rows)
        stats.append([info.st_size, info.st_mtime_ns, info.st_ctime_ns])
    if not used:
        raise UserError(
            f"{tables.name} holds no column of images in any of its {len(paths):,} parquet files",
            "write one of type struct<bytes, path> or binary, "
            "or, for a folder of image files, set data.kind=folder",
        )
    if not any(map(sum, groups)):
        raise UserError(f"no images in {tables.name}", "name another parquet file")
    assert image is not None
    numbers, class_names, labels_from = None, None, ""
    if labels == "none":
        labels_from = "labels are off"
    elif not label:
        labels_from = f"there is no column {LABEL_COLUMNS[0]}; data.label_column names another"
    else:
        try:
            if unusable:
                raise _Unusable(unusable)
            names = names or next(
                (found for other in parts if (found := _names_of_others(tables, parts[other], label))), None
            )
            numbers, class_names, labels_from = _joined(found_labels, names, label, tables.name)
        except _Unusable as exc:
            unusable = labels_from = str(exc)
    return _Split(
        used,
        groups,
        stats,
        image,
        numbers,
        class_names,
        labels_from,
        bool(unusable),
        without_images,
        other_images,
    )


def _read_file(path: str, groups: list[int], image: str, positions: np.ndarray) -> Iterator[Encoded]:
    """Cells of the rows of one file that are among `positions`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with _opened(path) as table:
        first = 0
        for group, rows in enumerate(groups):
            if len(_between(positions, first, first + rows)):
                start = first
                for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[image]):
                    column = batch.column(0)
                    column = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
                    for position in _between(positions, start, start + len(column)):
                        yield column[int(position) - start].as_py()
                    start += len(column)
                if start != first + rows:
                    raise ValueError(f"{start - first} rows in a group of {rows}")
            first += rows


def _opened(path: str) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _no_split(tables: Tables, split: str, parts: dict[str, list[str]]) -> NoSplit:
    if split == "train":
        there = [path for paths in parts.values() for path in paths]
        fix = f"a test split is not trained on; to do so anyway, name the file: {tables.at(there[0])}"
        return NoSplit(f"{tables.name} has no train split, only {some_of(there, 2)}", fix)
    fix = (
        f"give a folder that holds {split}*.parquet, or the file of the {split} images as a source of its own"
    )
    return NoSplit(f"{tables.name} has no {split} split", fix)


# ---- the column of images
# --------------------------------------------------------------------------------------------


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type may hold encoded images. Bytes only: text would be opened as a path, and
    the file read.
    """
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    types = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _column(schema: Any, name: str | None) -> Any | None:
    """The field of that name, if it is one of bytes."""
    place = -1 if name is None else schema.get_field_index(name)
    return schema.field(place) if place >= 0 and _holds_bytes(schema.field(place).type) else None


def _image_column(table: "pq.ParquetFile", wanted: str | None, path: str) -> tuple[str | None, list[str]]:
    """(the column of images, other columns that hold some): the named one, else by content, those of
    IMAGE_COLUMNS first.
    """
    schema = table.schema_arrow
    if wanted is not None:
        _check_name(schema, "image_column", wanted, path)
        if _column(schema, wanted) is None:
            kind = schema.field(schema.get_field_index(wanted)).type
            raise UserError(
                f"column {wanted} of {path} is {kind}, which holds no encoded images",
                _image_columns_fix(schema),
            )
        return wanted, []
    names = [column.name for column in schema if _holds_bytes(column.type)]
    names = [
        *(name for name in IMAGE_COLUMNS if name in names),
        *(name for name in names if name not in IMAGE_COLUMNS),
    ]
    if len(names) < 2:
        return (names or [None])[0], []
    with_images = [name for name in names if _looks_like_images(table, name)]
    return (with_images or names)[0], with_images[1:]


def _looks_like_images(table: "pq.ParquetFile", name: str) -> bool:
    """Whether one of the first cells begins as an image does."""
    if not table.metadata.num_rows:
        return False
    first = next(
        (group for group in range(table.num_row_groups) if table.metadata.row_group(group).num_rows), 0
    )
    rows = table.metadata.row_group(first).num_rows
    cells = _read_rows(table, first, name, min(rows, LOOKED_AT))
    return any(isinstance(cell, bytes) and image_format(cell[:HEAD_BYTES]) for cell in cells)


def _read_rows(table: "pq.ParquetFile", group: int, name: str, count: int) -> list[Any]:
    batch = next(table.iter_batches(count, row_groups=[group], columns=[name]))
    return [cell["bytes"] if isinstance(cell, dict) else cell for cell in batch.column(0).to_pylist()]


def _no_image_column(schema: Any, path: str) -> UserError:
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
    fix = "write one of type struct<bytes, path> or binary"
    return UserError(f"{path} has no column of images, only {columns}", fix)


def _image_columns_fix(schema: Any) -> str:
    names = [column.name for column in schema if _holds_bytes(column.type)]
    return (
        f"set data.image_column to one of {', '.join(names)}"
        if names
        else "write a column of type struct<bytes, path> or binary"
    )


def _check_name(schema: Any, key: str, name: str, path: str) -> None:
    if schema.get_field_index(name) >= 0:
        return
    near = difflib.get_close_matches(name, schema.names, n=1, cutoff=0.4)
    twice = schema.names.count(name) > 1
    found = f"{path} has {'two columns' if twice else 'no column'} {name} (data.{key})"
    what = f"{found}, only {', '.join(schema.names)}"
    raise UserError(
        what,
        f"did you mean data.{key}={near[0]}?"
        if near and not twice
        else f"name one of them, or leave data.{key} out",
    )


# ---- the column of labels
# --------------------------------------------------------------------------------------------


def _label_column(schema: Any, wanted: str | None, path: str) -> str | None:
    if wanted is not None:
        _check_name(schema, "label_column", wanted, path)
        return wanted
    return next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _read_labels(table: "pq.ParquetFile", label: str, rows: int, path: str) -> _Part:
    """Labels of one file: whole numbers as they are, text, truth values and categories by name. Raises
    _Unusable for all else.
    """
    import pyarrow as pa

    place = table.schema_arrow.get_field_index(label)
    if place < 0:
        raise _Unusable(
            f"{path} has {'two columns' if label in table.schema_arrow.names else 'no column'} {label}"
        )
    kind = table.schema_arrow.field(place).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if pa.types.is_floating(value) and _all_missing(table, label):
        return _Part(np.full(rows, -1), None)
    if not (is_text or pa.types.is_integer(value) or pa.types.is_boolean(value) or pa.types.is_null(value)):
        raise _Unusable(f"column {label} is {kind}, not whole numbers, text, truth values or categories")
    column = table.read([label])[label]
    if len(column) != rows:
        raise UserError(f"{path} is damaged: {len(column)} labels for {rows} rows", "fetch the file again")
    if pa.types.is_null(value):
        return _Part(np.full(rows, -1), None)
    if pa.types.is_integer(value):
        try:
            whole = column.cast(value).cast(pa.int64()).fill_null(-1).to_numpy()
        except pa.ArrowInvalid as exc:  # unsigned, and beyond
            raise _Unusable(f"column {label} holds numbers of more than 63 bits") from exc
        return _Part(np.maximum(whole, -1), None)
    coded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    names = [normal(name or "") for name in coded.dictionary.to_pylist()]
    numbers = coded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False).copy()
    if "" in names:  # an empty cell names no class
        numbers[numbers == names.index("")] = -1
    return _Part(numbers, names)


def _all_missing(table: "pq.ParquetFile", label: str) -> bool:
    """Whether floats are NaN, null or -1, one and all: pandas makes floats of whole numbers where any of them
    is missing.
    """
    values = table.read([label])[label].cast("float64").to_numpy()
    return bool((np.isnan(values) | (values == -1)).all())


def _joined(
    parts: list[_Part], declared: list[str] | None, label: str, name: str
) -> tuple[np.ndarray | None, list[str] | None, str]:
    """((N,) labels 0 .. C - 1, class names, where they are from) of all files of a split.

    Numbers without gaps stay as they are, and have no names unless the file declares some; others are
    numbered anew, and their values are the names. Texts are numbered as names of folders are. Raises
    _Unusable.
    """
    is_named = [part.names is not None for part in parts if (part.labels >= 0).any()]
    if not is_named:
        return None, None, f"all labels in column {label} are missing"
    if any(is_named) and not all(is_named):
        raise _Unusable(f"column {label} holds numbers in one file and text in another")
    class_names: list[str] | None
    if all(is_named):
        class_names = sorted_classes(text for part in parts for text in _occurring(part))
        number = {text: place for place, text in enumerate(class_names)}
        # the last: missing
        codes = [
            np.array([*(number.get(text, -1) for text in part.names or ()), -1])[part.labels]
            for part in parts
        ]
        numbers, how = np.concatenate(codes), f"the text in column {label}, in sorted order"
    else:
        class_names = declared
        numbers, how = np.concatenate([part.labels for part in parts]), f"column {label}"
    missing = int((numbers < 0).sum())
    if missing:
        raise _Unusable(f"{missing:,} of {len(numbers):,} labels of {name} are missing")
    if not all(is_named):
        values, dense = np.unique(numbers, return_inverse=True)
        if declared and values[-1] >= len(declared):
            raise _Unusable(f"{name} has label {values[-1]}, but names for {len(declared)} classes only")
        if not declared and (values[0] != 0 or values[-1] != len(values) - 1):
            numbers, class_names = (
                dense.reshape(-1).astype(np.int64),
                [str(value) for value in values.tolist()],
            )
    count = len(class_names) if class_names else int(numbers.max()) + 1
    if count > MAX_CLASSES:
        raise _Unusable(f"column {label} holds {count:,} different values, which are no classes")
    return numbers, class_names, how


def _occurring(part: _Part) -> Iterator[str]:
    names = part.names or []
    return (names[place] for place in np.unique(part.labels[part.labels >= 0]).tolist())


def _declared_names(schema: Any, label: str) -> list[str] | None:
    """Names of the classes 0, 1, ... as the `datasets` library writes them into a file's metadata."""
    with suppress(KeyError, TypeError, ValueError, RecursionError):  # metadata of another writer
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return [normal(name) for name in names]
    return None


def _names_of_others(tables: Tables, paths: Sequence[str], label: str) -> list[str] | None:
    """What the first of these files declares: the splits of one data set share their classes."""
    # what is wrong with it is told when it is used
    with suppress(Exception), _opened(tables.at(paths[0])) as table:
        return _declared_names(table.schema_arrow, label)
    return None


# ---- small parts
# -----------------------------------------------------------------------------------------------------


def _between(positions: np.ndarray, low: int, high: int) -> np.ndarray:
    start, end = np.searchsorted(positions, [low, high])
    return positions[start:end]


def _portable(path: str) -> str:
    return path.replace(os.sep, "/")
