"""Rows of RUN/eval as numbers with names, the same for every run, so that a logger can compare runs."""

import os
import re
from pathlib import Path
from typing import Any

from ssl_emp.errors import UserError
from ssl_emp.safe_files import LARGE, check_inner, read_json

Row = dict[str, Any]
# what a user asks for several of in one evaluation; the rest of a protocol may differ from run to run
ASKED = re.compile(r"\bk=\d+|\b\d+ a class|\bfine-tuned")


def evaluation_rows(folder: Path) -> list[Row]:
    """All rows of the run's eval/EVALUATOR.json; files that hold none are left out."""
    rows: list[Row] = []
    for path in sorted(check_inner(folder, "eval").glob("*.json")):
        try:
            found = read_json(path, LARGE)
        except UserError:
            continue
        rows += [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return rows


def evaluated(rows: list[Row], folder: Path) -> dict[str, float]:
    """Name -> value, such as `eval/knn/k20/top1_percent`, of the run itself and of its start.

    A transfer table holds other encoders too, which are left out. Of rows with one name the last one counts.
    """
    run, found = folder.resolve().name, {}
    for row in rows:
        value, encoder = row.get("value"), os.path.normpath(str(row.get("encoder")))
        is_start = encoder.endswith(f"{os.sep}start") and os.path.basename(os.path.dirname(encoder)) == run
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not is_start and Path(encoder).resolve().name != run:
            continue
        evaluator, protocol = str(row.get("evaluator")), str(row.get("protocol"))
        asked = [] if evaluator == "finetune" else ASKED.findall(protocol)
        target = [str(row.get("data"))] if evaluator == "transfer" else []
        parts = ["eval", *(["start"] if is_start else []), evaluator, *target, *asked, str(row.get("metric"))]
        found["/".join(map(_word, parts))] = float(value)
    return found


def _word(text: str) -> str:
    """Letters that every logger takes: `top1 %` becomes top1_percent, `k=20` k20."""
    text = text.replace("%", "percent").replace("=", "")
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")[:80] or "_"
