"""Markdown tables and plots of a results file: mean ± sample standard deviation over seeds, and paired
differences.

    python -m experiments.table experiments/results/ssl_policies.jsonl
    python -m experiments.table RESULTS.jsonl --metric knn --by prune.policy prune.fraction --plots DIR --out
    FILE.md
    python -m experiments.table RESULTS.jsonl OTHERS.jsonl --where optimizer.lr=0.24 prune.fraction=0.5

Rows are grouped by every key in which they differ, except the seed. A difference to a policy is taken row by
row, to the row of that policy with the same seed, the same fraction (so the same samples seen) and the same
of everything else; p is that of a two-sided paired t-test over the seeds.
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_emp.config import parse_yaml
from ssl_emp.errors import Parser, UserError

Row = dict[str, Any]
POLICY, FRACTION, BETA, MEMORY, SEED = "prune.policy", "prune.fraction", "prune.beta", "prune.memory", "seed"
AGAINST = ("random", "shorter")
SHORT = {FRACTION: "s", BETA: "β"}
NAMES = {"knn": "kNN %", "linear": "linear %"}
MISSING = ""
NOTE = (
    "A difference is ours minus theirs, paired over the n seeds that both have; p: two-sided paired "
    "t-test, not corrected for many."
)


# ---- rows --------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The lines of a results file. Raises UserError with the number of a line that is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({error})", "give a file such as experiments/results/demo.jsonl"
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is damaged or cut off", "delete that line; its cell will run again"
            ) from error
    if not all(isinstance(row, dict) and "cell" in row for row in rows):
        raise UserError(
            f"{path} does not hold the results of a grid", "give a file that experiments.run wrote"
        )
    return rows


def keys_of(row: Row) -> Row:
    """Settings of a row, {key: value}; lists as text, so that they can be compared and hashed."""
    keys = {**row.get("settings", {}), **row["cell"]} | ({"config": row["config"]} if "config" in row else {})
    return {
        key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in keys.items()
    }


def latest(rows: list[Row]) -> list[Row]:
    """One row for each set of keys, the last: it was run again."""
    return list({frozenset(keys_of(row).items()): row for row in rows}.values())


def where(rows: list[Row], conditions: Row) -> list[Row]:
    """The rows with these values, and those that lack the key: `none` has no fraction."""
    return [
        row for row in rows if all(keys_of(row).get(key, value) == value for key, value in conditions.items())
    ]


def read_conditions(words: list[str]) -> Row:
    """`key=value` words; the values are read as YAML. Raises UserError."""
    if wrong := [word for word in words if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not key=value", "write such as prune.fraction=0.5")
    return {key: parse_yaml(text, word) for word in words for key, _, text in [word.partition("=")]}


def varying(rows: list[Row]) -> list[str]:
    """The keys that are not the same in all rows, without the seed: policy and fraction first, then as they
    appear.
    """
    every = [keys_of(row) for row in rows]
    names = dict.fromkeys(key for keys in (*(row["cell"] for row in rows), *every) for key in keys)
    found = [key for key in names if key != SEED and len({keys.get(key, MISSING) for keys in every}) > 1]
    return sorted(found, key=lambda key: (key != POLICY, key != FRACTION))  # stable


def grouped(rows: list[Row], by: list[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of the keys `by`; smaller fractions first, then in the order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        keys = keys_of(row)
        groups.setdefault(tuple(keys.get(key, MISSING) for key in by), []).append(row)
    return dict(
        sorted(groups.items(), key=lambda item: keys_of(item[1][0]).get(FRACTION, 0) if FRACTION in by else 0)
    )


def counterpart(row: Row, policy: str, rows: list[Row], same_seed: bool = True) -> Row | None:
    """The row of `policy` that agrees with `row` in everything it has; it may lack keys of pruning, as
    `random` lacks a β.
    """
    ours = keys_of(row)
    best, most = None, -1
    for other in rows:
        theirs = keys_of(other)
        if theirs.get(POLICY) != policy:
            continue
        ignored = {POLICY} if same_seed else {POLICY, SEED}
        ignored |= {key for key in ours if key.startswith("prune.") and key not in theirs}
        agree = all(
            ours.get(key, MISSING) == theirs.get(key, MISSING)
            for key in (ours.keys() | theirs.keys()) - ignored
        )
        if agree and len(theirs) > most:  # of several the one that says most
            best, most = other, len(theirs)
    return best


def figure(row: Row, name: str) -> float | None:
    value = row.get(name, row.get("log", {}).get(name))
    return float(value) if isinstance(value, int | float) else None


def metrics_of(rows: list[Row]) -> list[str]:
    """Names of the numbers from evaluators and result.json, without costs and counts."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float))
    return [name for name in names if not name.endswith(("_seconds", "_share"))]


def over_seeds(group: list[Row], name: str) -> dict[Any, float]:
    """{seed: value}, the mean where the group holds several rows of a seed."""
    values: dict[Any, list[float]] = {}
    for row in group:
        if (value := figure(row, name)) is not None:
            values.setdefault(row["cell"].get(SEED), []).append(value)
    return {seed: statistics.mean(several) for seed, several in values.items()}


def pairs(group: list[Row], policy: str, name: str, rows: list[Row]) -> list[tuple[float, float]]:
    """(ours, theirs) for each seed that has both, the mean over a seed's rows."""
    found: dict[Any, list[tuple[float, float]]] = {}
    for row in group:
        other = None if keys_of(row).get(POLICY) == policy else counterpart(row, policy, rows)
        values = figure(row, name), None if other is None else figure(other, name)
        if values[0] is not None and values[1] is not None:
            found.setdefault(row["cell"].get(SEED), []).append((values[0], values[1]))
    return [
        (statistics.mean(ours), statistics.mean(theirs))
        for ours, theirs in (zip(*several, strict=True) for several in found.values())
    ]


def ways(rows: list[Row], name: str) -> list[str]:
    """Protocols of the metric, without each run's choices. Rows of different protocols are not comparable."""
    said = [row.get("protocols", {}).get(name, "not recorded") for row in rows if name in row]
    return sorted({re.sub(r"\b(l2|lr|wd)=[\d.e+-]+", r"\1", protocol) for protocol in said})


# ---- text --------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """`41.3 ± 0.4`; a single value stands alone."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def p_value(both: list[tuple[float, float]]) -> float | None:
    """Two-sided paired t-test; None below two pairs, and where the differences do not vary at all."""
    if len(both) < 2 or statistics.stdev([ours - theirs for ours, theirs in both]) < 1e-9:
        return None
    from scipy.stats import ttest_rel  # of the extra `experiments`; the runner goes without

    return float(ttest_rel(*zip(*both, strict=True)).pvalue)


def difference(both: list[tuple[float, float]], digits: int = 2) -> str:
    """`+0.62 ± 0.46 (p=0.14, n=3)`; nothing where there is no pair."""
    if not both:
        return ""
    p = p_value(both)
    tested = "" if p is None else "p<0.001, " if p < 0.001 else f"p={p:.3f}, " if p < 0.1 else f"p={p:.2f}, "
    return f"{spread([ours - theirs for ours, theirs in both], digits, '+')} ({tested}n={len(both)})"


def head(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def short_names(keys: list[str]) -> list[str]:
    """The last part of each key, `s` and `β`; whole where two keys end alike."""
    ends = [SHORT.get(key, key.rpartition(".")[2]) for key in keys]
    return [key if ends.count(end) > 1 else end for key, end in zip(keys, ends, strict=True)]


def digits_of(rows: list[Row], name: str) -> int:
    """Two for percentages, four for shares and the like."""
    return 2 if max((abs(figure(row, name) or 0) for row in rows), default=0) > 1.5 else 4


def markdown(columns: dict[str, list[str]]) -> str:
    """{head: cells} -> a table; a column that is empty all the way down is left out."""
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    return "\n".join(
        f"| {' | '.join(line)} |" if line[0] != "---" else "|---" * len(line) + "|" for line in lines
    )


def table(
    rows: list[Row],
    by: list[str] | None = None,
    metrics: list[str] | None = None,
    against: Sequence[str] = AGAINST,
) -> str:
    """One line for each cell without its seed; behind it, where there are several fractions, the means over
    them.
    """
    rows = latest(rows)
    by = varying(rows) if by is None else by
    metrics = metrics or metrics_of(rows)
    groups = grouped(rows, by)
    columns = {name: [str(key[i]) for key in groups] for i, name in enumerate(short_names(by))}
    add = columns.setdefault
    for group in groups.values():
        seen = statistics.mean(row["samples_seen"] for row in group)
        full = [
            other["samples_seen"]
            for row in group
            if (other := counterpart(row, "none", rows, same_seed=False))
        ]
        add("samples seen", []).append(f"{seen:,.0f}")
        add("of unpruned", []).append(f"{seen / statistics.mean(full):.1%}" if full else "")
        for name in metrics:
            values = list(over_seeds(group, name).values())
            add(head(name), []).append(spread(values, digits_of(rows, name)) if values else "")
        for name in metrics:
            for policy in against:
                both = pairs(group, policy, name, rows)
                add(f"{head(name).removesuffix(' %')} - {policy}", []).append(
                    difference(both, digits_of(rows, name))
                )
        cost, said = cost_of(rows)
        seconds = [row[cost] for row in group if row.get(cost) is not None]
        add(said, []).append(f"{statistics.median(seconds):,.0f}" if seconds else "")
        add("n", []).append(str(len({row["cell"].get(SEED) for row in group})))
    parts = [markdown(columns)]
    if any(difference for name, cells in columns.items() if " - " in name for difference in cells):
        parts.append(NOTE)
    for name in metrics:
        if len(found := ways(rows, name)) > 1:
            parts.append(
                f"Do not compare: {head(name)} was measured in {len(found)} ways "
                f"({'; '.join(found)}). Evaluate those runs again."
            )
    if metrics and FRACTION in by and (summary := over_fractions(rows, by, metrics)):
        parts.append(summary)
    return "\n\n".join(parts)


def cost_of(rows: list[Row]) -> tuple[str, str]:
    """(key, head): CPU seconds where they were taken, else wall seconds, which depend on what else ran."""
    taken = any(row.get("cpu_seconds") is not None for row in rows)
    return ("cpu_seconds", "CPU s") if taken else ("training_seconds", "training s")


def over_fractions(rows: list[Row], by: list[str], metrics: list[str]) -> str:
    """The mean over the fractions of each policy's paired difference to random; of the seeds that have all of
    them.
    """
    rest = [key for key in by if key != FRACTION]
    columns: dict[str, list[str]] = {}
    several = False
    for key, group in grouped(rows, rest).items():
        paired = [
            row for row in group if keys_of(row).get(POLICY) != "random" and counterpart(row, "random", rows)
        ]
        fractions = sorted({keys_of(row)[FRACTION] for row in paired})
        of_seed = {
            seed: {keys_of(row)[FRACTION] for row in paired if row["cell"].get(SEED) == seed}
            for seed in over_seeds(paired, metrics[0])
        }
        whole = [row for row in paired if len(of_seed.get(row["cell"].get(SEED), ())) == len(fractions)]
        if not whole:
            continue
        several |= len(fractions) > 1
        for name, value in zip(short_names(rest), key, strict=True):
            columns.setdefault(name, []).append(str(value))
        columns.setdefault("s", []).append(", ".join(map(str, fractions)))
        for name in metrics:
            both = pairs(whole, "random", name, rows)
            columns.setdefault(f"{head(name).removesuffix(' %')} - random", []).append(
                difference(both, digits_of(rows, name))
            )
    return f"Mean over fractions:\n\n{markdown(columns)}" if several else ""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS.jsonl", help="one, or several of the same setting"
    )
    parser.add_argument(
        "--by",
        nargs="+",
        metavar="KEY",
        help="group by these keys instead, such as prune.policy prune.fraction",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="leave out the rows that have another value",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help="such as knn linear, or a key of the grid's log; all by default",
    )
    parser.add_argument(
        "--against", nargs="+", metavar="POLICY", default=AGAINST, help="differences to these: random shorter"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw PNG files there")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="write the table there instead of printing it"
    )
    try:
        arguments = parser.parse_args(argv)
        rows = [row for path in arguments.results for row in read_rows(path)]
        if not rows:
            raise UserError(f"{arguments.results[0]} is empty", "run the grid first")
        conditions = read_conditions(arguments.where)
        check_names(rows, [*(arguments.by or []), *conditions], arguments.metric or [])
        if not (rows := where(rows, conditions)):
            raise UserError(
                f"no row has {' and '.join(arguments.where)}",
                "leave one of them out, or see the values without --where",
            )
        text = table(rows, arguments.by, arguments.metric, arguments.against)
        if arguments.out:
            arguments.out.write_text(text + "\n", encoding="utf-8")
        else:
            print(text, flush=True)
        if arguments.plots:
            from experiments.plots import (
                draw_all,  # matplotlib takes a second to import, so only where it is asked for
            )

            for path in draw_all(
                latest(rows), arguments.plots, arguments.metric or metrics_of(rows), arguments.results[0].stem
            ):
                print(path, file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed. fix: pip install -e '.[experiments]'", file=sys.stderr)
        return 2
    # its reader, such as head, has seen enough; what is left in the buffer goes nowhere
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def check_names(rows: list[Row], by: list[str], metrics: list[str]) -> None:
    """Raises UserError for a key or a metric that no row has."""
    keys = sorted({key for row in rows for key in keys_of(row)})
    names = metrics_of(rows) + sorted({key for row in rows for key in row.get("log", {})})
    for wanted, known, what in ((by, keys, "key"), (metrics, names, "metric")):
        if unknown := [name for name in wanted if name not in known]:
            raise UserError(f"no row has the {what} {unknown[0]}", f"use one of {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
