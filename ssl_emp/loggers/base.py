"""What a logger is told of a run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ssl_emp.safe_files import check_inner, check_own, inner_folder

PROJECT = "ssl_emp"  # the project or experiment that runs are in, where the user's environment names none


@dataclass(frozen=True)
class About:
    """A run as a logger sees it; without secrets, see `ssl_emp.loggers.secrets`.

    Attributes:
        name: of the run directory.
        config: RUN/config.yaml, nested.
        environment: RUN/environment.json.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]


class Logger(Protocol):
    """One of them, in a process of its own: it may take its time, print and raise. Made with the folder
    RUN/loggers, which it writes below.
    """

    def open(self, about: About, known: str | None) -> tuple[str, int | None]:
        """Begin a run, or go on with the one whose id is `known`, where the logger still has it.

        Returns:
            (id, the last epoch that it has; -1: none; None: it cannot say)
        """

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        """The figures of an epoch, which are new to it."""

    def evaluation(self, scalars: dict[str, float], rows: list[dict[str, Any]], epoch: int) -> None:
        """What evaluations found after `epoch`: numbers by name, and all rows of the tables."""

    def file(self, path: Path, name: str, kind: str) -> None:
        """A file or folder of the run, under a name, in the place of what it has under this name."""

    def close(self, finished: bool) -> None:
        """Keep everything, and end. `finished`: the run came to its end, and was not stopped."""


def own_place(folder: Path, name: str) -> Path:
    """folder/name, absolute, made if it is missing, for a package that writes into it as it likes.

    Raises:
        UserError: there is a link in it, which would lead what is written elsewhere. A run directory may be a
            stranger's.
    """
    place = inner_folder(folder, name).resolve()
    for inner, folders, files in os.walk(place):
        for link in (*folders, *files):
            check_inner(Path(inner), link)
        for file in files:
            check_own(Path(inner, file))
    return place


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys. (That of ssl_emp.config comes with torch.)"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
