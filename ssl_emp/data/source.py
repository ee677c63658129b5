"""A source of images before anything is decoded: names, labels, unused files, and how to read them."""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ssl_emp.data.decode import Encoded
from ssl_emp.errors import UserError
from ssl_emp.text import decodable

SHOWN_CLASSES = 4  # names in one line


class NoSplit(UserError):
    """The source holds images, but not the requested split."""


class Unused:
    """Files that are not images of the split: for each reason the count and the first name."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """`reason` stands after a number: `3 REASON (NAME)`."""
        before, first = self.counts.get(reason, (0, name))
        self.counts[reason] = (before + count, first)

    def listed(self) -> list[tuple[str, int, str]]:
        """(reason, count, first name), most frequent first; files of other suffixes last."""
        found = [(reason, count, decodable(first)) for reason, (count, first) in self.counts.items()]
        return sorted(found, key=lambda item: (item[0].startswith("."), -item[1], item[0]))


@dataclass(frozen=True)
class Source:
    """Images that are not decoded yet. `read(positions)` yields them; `version` changes with any image.

    `version` names files of the cache. Where it costs a pass over all images, it is a function.

    The fields from `labels_from` on are those of `ImageSet`.
    """

    names: list[str]
    labels: np.ndarray | None  # (N,) int64, or (N, C) where a sample has several
    class_names: list[str] | None
    version: str | Callable[[], str]
    read: Callable[[np.ndarray], Iterator[Encoded]]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    labels_from: str = ""
    unused: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stand_in: str = ""

    def version_now(self) -> str:
        """`version` as a text."""
        return self.version if isinstance(self.version, str) else self.version()


def counted(count: int, why: str) -> str:
    """`3 .txt files`, `1 .txt file`."""
    singular = (
        count == 1
        and why.endswith((" files", " links", "folders", "tables"))
        and not why.startswith("beside ")
    )
    return f"{count:,} {why[:-1] if singular else why}"


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: sorted as text, or by value if all are whole numbers."""
    distinct = sorted(set(names))
    values = as_numbers(distinct)
    return distinct if values is None else [name for _, name in sorted(zip(values, distinct, strict=True))]


def as_numbers(names: Sequence[str]) -> list[int] | None:
    """The values of names such as `0`, `7`, `010`; None if one is not a whole number or two are equal."""
    if not all(name.isascii() and name.isdigit() and len(name) <= 18 for name in names):  # 18 digits: int64
        return None
    values = [int(name) for name in names]
    return values if len(set(values)) == len(values) else None


def normal(name: str) -> str:
    """A class name in Unicode's form NFC: macOS writes `é` as `e` and an accent (NFD)."""
    return unicodedata.normalize("NFC", name)


def some_of(names: Sequence[str], most: int = SHOWN_CLASSES) -> str:
    """`a, b, c`, with an ellipsis where there are more than `most`."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def version_of(files: Iterable[tuple[str, list[int]]]) -> str:
    """sha256 (hex) of names and numbers; the numbers of a file change with it."""
    found = hashlib.sha256()
    for name, numbers in files:
        found.update(f"{decodable(name)}\0{numbers}\0".encode())
    return found.hexdigest()
