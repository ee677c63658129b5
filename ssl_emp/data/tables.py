"""Parquet files with encoded images in a column of bytes -> a `Source`. Only one file is open at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from linear_eval.errors import did_you_mean
from ssl_emp.data.decode import Encoded, reason
from ssl_emp.data.sniff import HEAD_BYTES, image_format
from ssl_emp.data.source import NoSplit, Source, Unused, normal, some_of, sorted_classes, version_of
from ssl_emp.data.splits import check_shards, split_named, split_of_table
from ssl_emp.errors import UserError
from ssl_emp.text import decodable

if TYPE_CHECKING:
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("image", "img")  # preferred to other columns of images
LABEL_COLUMNS = ("label", "labels", "fine_label")  # the first that exists is read
PROBED_CELLS = 16  # of a column of bytes, to see whether they are images
MAX_CLASSES = 1_000_000  # a column with more values numbers images, not classes
READ_ROWS = 64


class Unusable(Exception):
    """A column of labels cannot be used; the message says why."""


@dataclass(frozen=True)
class ColumnLabels:
    """Labels of a file or an object: (rows,) int64, -1 where missing. With `names`, they index these."""

    labels: np.ndarray
    names: list[str] | None


# ---- which files make a split


@dataclass(frozen=True)
class Tables:
    """The parquet files of a source.

    Attributes:
        base: folder that `paths` are relative to.
        paths: of the files, sorted.
        name: the source as the user wrote it, for messages.
        by_name: the user named the files, by a path or a glob, so no other file is missing.
    """

    base: str
    paths: list[str]
    name: str
    by_name: bool = False

    def at(self, path: str) -> str:
        return os.path.join(self.base, path)


def hold_images(tables: Tables, at_least: int) -> bool:
    """Whether the files with a column of images have that many rows; unreadable files count as none.

    Judged by content: hashes and embeddings are bytes, too.
    """
    rows = 0
    for path in tables.paths:
        # an unreadable file, whatever the error, adds no rows
        with suppress(Exception), _opened(tables.at(path)) as table:
            names = [column.name for column in table.schema_arrow if _holds_bytes(column.type)]
            rows += table.metadata.num_rows if any(_looks_like_images(table, name) for name in names) else 0
        if rows >= at_least:
            return True
    return False


def find_splits(tables: Tables) -> tuple[dict[str, list[str]], str]:
    """(split -> files, with "" for files of no split), and a note if a split is held back from train.

    There is a `train` split unless all files are test files.
    """
    parts: dict[str, list[str]] = {}
    for path in tables.paths:
        parts.setdefault(split_of_table(path) or "", []).append(path)
    if tables.by_name and len(parts) == 1:  # the user named these files: they are the split asked for
        return {**parts, "train": tables.paths, "": []}, ""
    rest = parts.pop("", [])
    if not rest or ("train" in parts and len(parts) > 1):
        return {**parts, **({"": rest} if rest else {})}, ""
    held = [path for kind in ("test", "val") for path in parts.get(kind, [])]
    note = f"held back as a test split, and not trained on: {some_of(held, 2)}" if held else ""
    return {**parts, "train": sorted([*parts.get("train", []), *rest])}, note


def _check_one_data_set(tables: Tables, paths: Sequence[str]) -> None:
    """Raise UserError if a split's files are of several data sets: `a/train/0.parquet`, `b/train/0.parquet`.

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


def table_source(
    tables: Tables,
    split: str,
    labels: str,
    image_column: str | None,
    label_column: str | None,
    unused: Unused,
    skipped: list[tuple[str, str]],
) -> Source:
    """The images of a split: `train`, `test` or `all`. A val split with labels replaces a test split without.

    Args:
        image_column, label_column: names of columns; None: found by name and content.
        unused, skipped: files that were left out so far, and files that could not be read.

    Raises:
        NoSplit, or UserError for unreadable files, missing or duplicate shards, and missing columns.
    """
    parts, note = ({"all": tables.paths}, "") if split == "all" else find_splits(tables)
    kinds = [kind for kind in (("test", "val") if split == "test" else (split,)) if parts.get(kind)]
    if not kinds:
        raise _no_split(tables, split, parts)
    wanted = _Wanted(labels != "none", image_column, label_column)
    chosen = _read_split(tables, parts, kinds[0], wanted)
    notes, stand_in = ([note] if note and split == "train" else []), ""
    if len(kinds) > 1 and labels != "none" and chosen.labels is None and not chosen.unusable:
        val = _read_split(tables, parts, "val", wanted)
        if val.labels is not None:
            chosen, stand_in = val, some_of(parts["val"], 1)
            notes.append(f"{parts['test'][0]} has no labels, so {stand_in} is the test split")
    for path in chosen.without_images:
        unused.add("tables without a column of images", path)
    if parts.get("") and "train" in parts:
        unused.add("outside of the splits", parts[""][0], len(parts[""]))
    return replace(chosen.source(unused, notes, skipped), stand_in=stand_in)


@dataclass(frozen=True)
class _Wanted:
    """Whether labels are asked for, and columns that the user named."""

    labels: bool
    image_column: str | None
    label_column: str | None


@dataclass
class _Split:
    """The files of a split, read one after the other by `add`.

    Attributes:
        several: there are several files, so that one without a column of images can be left out.
        paths, groups, stats: of every file that is used its path, the rows of its row groups, and the numbers
            that change with it (size and times).
        image, other_images: the column of images, and further columns that hold some.
        label, parts, declared: the column of labels, the labels of every file, class names in the metadata.
        unusable: why the labels cannot be used, or "".
        labels, class_names, labels_from: those of `Source`.
    """

    tables: Tables
    wanted: _Wanted
    several: bool
    paths: list[str] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    stats: list[list[int]] = field(default_factory=list)
    without_images: list[str] = field(default_factory=list)
    image: str = ""
    other_images: list[str] = field(default_factory=list)
    label: str | None = None
    parts: list[ColumnLabels] = field(default_factory=list)
    declared: list[str] | None = None
    unusable: str = ""
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    labels_from: str = ""

    def add(self, path: str) -> None:
        """Read the metadata and the labels of a file."""
        file = self.tables.at(path)
        try:
            with _opened(file) as table:
                if not self._has_images(table, path):
                    self.without_images.append(path)
                    return
                rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
                if sum(rows) != table.metadata.num_rows:
                    what = f"{file} is damaged: it does not hold the rows that it lists"
                    raise UserError(what, "fetch the file again")
                if self.label and self.wanted.labels and not self.unusable:
                    self._add_labels(table, self.label, sum(rows), path)
            info = os.stat(file)
        except UserError:
            raise
        except Exception as exc:  # noqa: BLE001 - pyarrow raises half a dozen types, and UnicodeDecodeError
            what = f"{file} cannot be read as parquet: {reason(exc)}"
            raise UserError(what, "check that the file is whole: fetch or write it again") from exc
        self.paths.append(path)
        self.groups.append(rows)
        self.stats.append([info.st_size, info.st_mtime_ns, info.st_ctime_ns])

    def _has_images(self, table: "pq.ParquetFile", path: str) -> bool:
        """False for a file to leave out. The first file with images determines the columns."""
        file, schema = self.tables.at(path), table.schema_arrow
        can_be_left = not (split_of_table(path) or self.tables.by_name or self.wanted.image_column)
        if self.paths:
            if _column(schema, self.image) is None and not can_be_left:
                what = f"{file} has no column {self.image} of images, as {self.paths[0]} has"
                raise UserError(what, "give files that share one schema")
            return _column(schema, self.image) is not None
        image, self.other_images = _image_column(table, self.wanted.image_column, file)
        if self.several and can_be_left and (image is None or not _looks_like_images(table, image)):
            return False
        if image is None:
            columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
            fix = "write one of type struct<bytes, path> or binary"
            raise UserError(f"{file} has no column of images, only {columns}", fix)
        self.image, self.label = image, _label_column(schema, self.wanted.label_column, file)
        return True

    def _add_labels(self, table: "pq.ParquetFile", label: str, rows: int, path: str) -> None:
        own = _declared_names(table.schema_arrow, label)
        if own and self.declared and own != self.declared:
            self.unusable = f"column {label} numbers other classes in {path} than in {self.paths[0]}"
        self.declared = self.declared or own
        try:
            self.parts.append(_read_labels(table, label, rows, path))
        except Unusable as exc:
            self.unusable = str(exc)

    def join_labels(self, other_splits: Iterable[list[str]]) -> None:
        """Set `labels` and `class_names`, or say in `labels_from` why there are none.

        other_splits: paths of the files of the source; one of them may declare the class names.
        """
        if not self.wanted.labels:
            self.labels_from = "labels are off"
        elif not self.label:
            self.labels_from = f"there is no column {LABEL_COLUMNS[0]}; data.label_column names another"
        elif self.unusable:
            self.labels_from = self.unusable
        else:
            try:
                names = self.declared
                for paths in other_splits:
                    names = names or _names_of_others(self.tables, paths, self.label)
                found = joined(self.parts, names, f"column {self.label}", self.tables.name)
                self.labels, self.class_names, self.labels_from = found
            except Unusable as exc:
                self.unusable = self.labels_from = str(exc)

    def source(self, unused: Unused, notes: list[str], skipped: list[tuple[str, str]]) -> Source:
        if self.other_images:
            others = f"data.image_column can name {some_of(self.other_images)}"
            notes = [*notes, f"images are those of column {self.image}; {others}"]
        kept = zip(map(_portable, self.paths), self.stats, strict=True)
        version = version_of([*kept, (self.image, [])])  # the same files may hold two columns of images
        names = [
            f"{decodable(_portable(path))}#{row}"
            for path, groups in zip(self.paths, self.groups, strict=True)
            for row in range(sum(groups))
        ]
        return Source(
            names=names,
            labels=self.labels,
            class_names=self.class_names,
            version=version,
            read=self._read,
            skipped=skipped,
            labels_from=self.labels_from,
            unused=unused.listed(),
            notes=notes,
        )

    def _read(self, positions: np.ndarray) -> Iterator[Encoded]:
        first = 0  # position of the first row of a file
        for path, groups in zip(self.paths, self.groups, strict=True):
            if len(_in_range(positions, first, first + sum(groups))):
                file = self.tables.at(path)
                try:
                    yield from _read_file(file, groups, self.image, positions - first)
                except Exception as exc:  # noqa: BLE001 - pyarrow raises half a dozen types
                    raise UserError(f"{file} is damaged: {reason(exc)}", "fetch the file again") from exc
            first += sum(groups)


def _read_split(tables: Tables, parts: dict[str, list[str]], kind: str, wanted: _Wanted) -> _Split:
    """Metadata and labels of all files of the split `kind`. parts: split -> files."""
    paths = parts[kind]
    if not tables.by_name and kind != "all":
        _check_one_data_set(tables, paths)
    check_shards(paths, tables.name, complete=not tables.by_name)
    split = _Split(tables, wanted, several=len(paths) > 1)
    for path in paths:
        split.add(path)
    if not split.paths:
        raise UserError(
            f"{tables.name} holds no column of images in any of its {len(paths):,} parquet files",
            "write one of type struct<bytes, path> or binary, "
            "or, for a folder of image files, set data.kind=folder",
        )
    if not any(map(sum, split.groups)):
        raise UserError(f"no images in {tables.name}", "name another parquet file")
    split.join_labels(parts.values())
    return split


def _read_file(path: str, groups: list[int], image: str, positions: np.ndarray) -> Iterator[Encoded]:
    """Cells of the rows of one file that are among `positions`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with _opened(path) as table:
        first = 0  # row of the file at which the group begins; `start`: the batch
        for group, rows in enumerate(groups):
            if len(_in_range(positions, first, first + rows)):
                start = first
                for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[image]):
                    column = batch.column(0)
                    column = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
                    for position in _in_range(positions, start, start + len(column)):
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


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type may hold encoded images.

    Bytes only: a text would be taken for the path of a file, and that file opened.
    """
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    kinds = "binary large_binary binary_view fixed_size_binary"
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds.split())


def _column(schema: Any, name: str | None) -> Any | None:
    """The field of that name, if it holds bytes."""
    place = -1 if name is None else schema.get_field_index(name)
    return schema.field(place) if place >= 0 and _holds_bytes(schema.field(place).type) else None


def _image_column(table: "pq.ParquetFile", wanted: str | None, path: str) -> tuple[str | None, list[str]]:
    """(the column of images, other columns that hold some).

    wanted: the column that the user named; None: found by content, those of IMAGE_COLUMNS first.
    """
    schema = table.schema_arrow
    if wanted is not None:
        _check_name(schema, "image_column", wanted, path)
        if _column(schema, wanted) is None:
            kind = schema.field(schema.get_field_index(wanted)).type
            fix = _image_columns_fix(schema)
            raise UserError(f"column {wanted} of {path} is {kind}, which holds no encoded images", fix)
        return wanted, []
    names = [column.name for column in schema if _holds_bytes(column.type)]
    names.sort(key=lambda name: IMAGE_COLUMNS.index(name) if name in IMAGE_COLUMNS else len(IMAGE_COLUMNS))
    if len(names) < 2:
        return (names or [None])[0], []
    with_images = [name for name in names if _looks_like_images(table, name)]
    return (with_images or names)[0], with_images[1:]


def _looks_like_images(table: "pq.ParquetFile", name: str) -> bool:
    """Whether one of the first cells begins with the signature of an image."""
    if not table.metadata.num_rows:
        return False
    first = next(
        (group for group in range(table.num_row_groups) if table.metadata.row_group(group).num_rows), 0
    )
    rows = table.metadata.row_group(first).num_rows
    batch = next(table.iter_batches(min(rows, PROBED_CELLS), row_groups=[first], columns=[name]))
    cells = [cell["bytes"] if isinstance(cell, dict) else cell for cell in batch.column(0).to_pylist()]
    return any(isinstance(cell, bytes) and image_format(cell[:HEAD_BYTES]) for cell in cells)


def _image_columns_fix(schema: Any) -> str:
    names = [column.name for column in schema if _holds_bytes(column.type)]
    if not names:
        return "write a column of type struct<bytes, path> or binary"
    return f"set data.image_column to one of {', '.join(names)}"


def _check_name(schema: Any, key: str, name: str, path: str) -> None:
    if schema.get_field_index(name) >= 0:
        return
    twice = schema.names.count(name) > 1
    found = f"{path} has {'two columns' if twice else 'no column'} {name} (data.{key})"
    fix = f"name one of them, or leave data.{key} out"
    if not twice:
        fix = did_you_mean(name, schema.names, fix, cutoff=0.4, prefix=f"data.{key}=")
    raise UserError(f"{found}, only {', '.join(schema.names)}", fix)


# ---- the column of labels


def _label_column(schema: Any, wanted: str | None, path: str) -> str | None:
    if wanted is not None:
        _check_name(schema, "label_column", wanted, path)
        return wanted
    return next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _read_labels(table: "pq.ParquetFile", label: str, rows: int, path: str) -> ColumnLabels:
    """Labels of one file: integers as they are; text, booleans and categories by name. Else Unusable."""
    import pyarrow as pa

    place = table.schema_arrow.get_field_index(label)
    if place < 0:
        found = "two columns" if label in table.schema_arrow.names else "no column"
        raise Unusable(f"{path} has {found} {label}")
    kind = table.schema_arrow.field(place).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if pa.types.is_floating(value) and _all_missing(table, label):
        return ColumnLabels(np.full(rows, -1), None)
    if not (is_text or pa.types.is_integer(value) or pa.types.is_boolean(value) or pa.types.is_null(value)):
        raise Unusable(f"column {label} is {kind}, not whole numbers, text, truth values or categories")
    column = table.read([label])[label]
    if len(column) != rows:
        raise UserError(f"{path} is damaged: {len(column)} labels for {rows} rows", "fetch the file again")
    if pa.types.is_null(value):
        return ColumnLabels(np.full(rows, -1), None)
    if pa.types.is_integer(value):
        try:
            whole = column.cast(value).cast(pa.int64()).fill_null(-1).to_numpy()
        except pa.ArrowInvalid as exc:  # an unsigned integer above the largest int64
            raise Unusable(f"column {label} holds numbers of more than 63 bits") from exc
        return ColumnLabels(np.maximum(whole, -1), None)
    coded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    names = [normal(name or "") for name in coded.dictionary.to_pylist()]
    numbers = coded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False).copy()
    if "" in names:  # an empty cell is a missing label
        numbers[numbers == names.index("")] = -1
    return ColumnLabels(numbers, names)


def _all_missing(table: "pq.ParquetFile", label: str) -> bool:
    """Whether all of a column of floats are NaN, null or -1: pandas turns integers with gaps into floats."""
    values = table.read([label])[label].cast("float64").to_numpy()
    return bool((np.isnan(values) | (values == -1)).all())


def joined(
    parts: list[ColumnLabels], declared: list[str] | None, where: str, name: str
) -> tuple[np.ndarray | None, list[str] | None, str]:
    """((N,) labels 0 .. C - 1, class names, where they are from) of a split, which are in `where`.

    Integers without gaps stay as they are and have names only if the metadata declares some. Integers with
    gaps are renumbered and their values become the names. Texts are numbered like names of folders.

    Raises:
        Unusable: labels are missing, of mixed kinds, or of too many values.
    """
    is_named = [part.names is not None for part in parts if (part.labels >= 0).any()]
    if not is_named:
        return None, None, f"all labels in {where} are missing"
    if any(is_named) and not all(is_named):
        raise Unusable(f"{where} holds numbers in one file and text in another")
    class_names: list[str] | None
    if all(is_named):
        class_names = sorted_classes(text for part in parts for text in _occurring(part))
        number = {text: place for place, text in enumerate(class_names)}
        # the last entry, -1, is the one that missing labels (-1) index
        codes = [
            np.array([*(number.get(text, -1) for text in part.names or ()), -1])[part.labels]
            for part in parts
        ]
        numbers, how = np.concatenate(codes), f"the text in {where}, in sorted order"
    else:
        class_names = declared
        numbers, how = np.concatenate([part.labels for part in parts]), where
    missing = int((numbers < 0).sum())
    if missing:
        raise Unusable(f"{missing:,} of {len(numbers):,} labels of {name} are missing")
    if not all(is_named):
        values, dense = np.unique(numbers, return_inverse=True)
        if declared and values[-1] >= len(declared):
            raise Unusable(f"{name} has label {values[-1]}, but names for {len(declared)} classes only")
        if not declared and (values[0] != 0 or values[-1] != len(values) - 1):
            numbers, class_names = dense.reshape(-1).astype(np.int64), list(map(str, values.tolist()))
    count = len(class_names) if class_names else int(numbers.max()) + 1
    if count > MAX_CLASSES:
        raise Unusable(f"{where} holds {count:,} different values, which are no classes")
    return numbers, class_names, how


def _occurring(part: ColumnLabels) -> Iterator[str]:
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
    """Class names that the first of these files declares: the splits of a data set share their classes."""
    # a damaged file is reported when its own split is read
    with suppress(Exception), _opened(tables.at(paths[0])) as table:
        return _declared_names(table.schema_arrow, label)
    return None


def _in_range(positions: np.ndarray, low: int, high: int) -> np.ndarray:
    """Those of the ascending positions that are in [low, high)."""
    start, end = np.searchsorted(positions, [low, high])
    return positions[start:end]


def _portable(path: str) -> str:
    return path.replace(os.sep, "/")
