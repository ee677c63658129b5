"""A markdown table of a results file: mean ± sample standard deviation over seeds.

python -m experiments.table experiments/results/cifar10_narrow.jsonl
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def spread(values: list[float], digits: int = 1) -> str:
    """`41.3 ± 0.4`; a single value stands alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each cell without its seed, in the order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cell = {key.removeprefix("prune."): value for key, value in row["cell"].items() if key != "seed"}
        groups.setdefault(json.dumps(cell), []).append(row)
    full = max(row["samples_seen"] for row in rows)
    lines = ["| policy | s | samples seen | of unpruned | kNN % | linear % | training s | n |", "|---|---|---|---|---|---|---|---|"]
    for key, group in groups.items():
        cell, seen = json.loads(key), group[0]["samples_seen"]
        metrics = [spread([row[name] for row in group], 2) for name in ("knn", "linear")]
        seconds = spread([row["training_seconds"] for row in group], 0)
        columns = [cell["policy"], cell.get("fraction", 0), f"{seen:,}", f"{seen / full:.1%}", *metrics, seconds, len(group)]
        lines.append(f"| {' | '.join(str(column) for column in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
