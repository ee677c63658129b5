"""A markdown table of a results file: mean ± sample standard deviation over seeds.

python -m experiments.table experiments/results/cifar10_narrow.jsonl
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """`41.3 ± 0.4`; a single value stands alone."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def difference(group: list[dict[str, Any]], reference: list[dict[str, Any]], metric: str) -> str:
    """Mean ± std of the paired differences over the seeds that both have: runs of one seed share weights, views, images."""
    theirs = {row["cell"].get("seed"): row[metric] for row in reference}
    pairs = [row[metric] - theirs[row["cell"].get("seed")] for row in group if row["cell"].get("seed") in theirs]
    return "" if not pairs or group is reference else spread(pairs, 2, "+")


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each cell without its seed, by fraction, then in the order of first appearance."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        groups.setdefault((cell["prune.policy"], cell.get("prune.fraction", 0)), []).append(row)
    full = max(row["samples_seen"] for row in rows)
    heads = ("policy", "s", "samples seen", "of unpruned", "kNN %", "linear %", "kNN - none", "kNN - random", "training s", "n")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (policy, fraction), group in sorted(groups.items(), key=lambda item: item[0][1]):
        seen = group[0]["samples_seen"]
        metrics = [spread([row[name] for row in group], 2) for name in ("knn", "linear")]
        beside = [difference(group, groups.get(key, []), "knn") for key in (("none", 0), ("random", fraction))]
        seconds = spread([row["training_seconds"] for row in group], 0)
        columns = [policy, fraction, f"{seen:,}", f"{seen / full:.1%}", *metrics, *beside, seconds, len(group)]
        lines.append(f"| {' | '.join(str(column) for column in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
