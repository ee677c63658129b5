"""metrics.jsonl read back, without torch: one row an epoch."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_emp.safe_files import LARGE, read_bytes


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one an epoch, without lines that a crash cut off; [] without a file.

    Raises:
        UserError: it is no regular file, or too large to be one of ours.
    """
    path, rows = folder / "metrics.jsonl", []
    if path.exists():
        for line in read_bytes(path, LARGE).decode("utf-8", "replace").splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("epoch"), int):
                    rows.append(row)
    return rows


def scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of the finite numbers of a row, without the epoch: the curves of a logger."""
    for name, value in row.items():
        if isinstance(value, int | float) and math.isfinite(value) and name != "epoch":
            yield name, value
