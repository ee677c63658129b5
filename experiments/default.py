"""Which policy is the shipped default: the rule of experiments/README.md, applied to the committed results.

    python -m experiments.default

For each policy, fraction and setting (from scratch: ssl_default, from weights: warm_start): the mean of kNN
and linear probe minus that of `random`, of the same seed. A policy's figure is the mean over the fractions
0.3, 0.5 and 0.7 and both settings. Its spread is over the seeds, and `best - policy` is paired by seed.
"""

import statistics
import sys
from pathlib import Path

from experiments.table import FRACTION, POLICY, SEED, Row, latest, markdown, read_rows, spread

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("ssl_default", "warm_start")
FRACTIONS = (0.3, 0.5, 0.7)
POLICIES = ("foresight", "ucb", "emp")
PLAIN = {POLICY, FRACTION, SEED, "model.init", "optimizer.lr"}  # rows with further keys are other experiments

Leads = dict[tuple[str, float], dict[int, float]]  # by setting and fraction, by seed, in points


def accuracy(row: Row) -> float:
    """The mean of kNN and linear probe, per cent."""
    return float(row["knn"] + row["linear"]) / 2


def leads(policy: str) -> Leads:
    """How far it is ahead of random, for every seed that has both."""
    found: Leads = {}
    for setting in SETTINGS:
        rows = [row for row in latest(read_rows(RESULTS / f"{setting}.jsonl")) if row["cell"].keys() <= PLAIN]
        of = {
            name: {
                (row["cell"][FRACTION], row["cell"][SEED]): accuracy(row)
                for row in rows
                if row["cell"][POLICY] == name
            }
            for name in ("random", policy)
        }
        for fraction, seed in of[policy].keys() & of["random"].keys():
            if fraction in FRACTIONS:
                lead = of[policy][fraction, seed] - of["random"][fraction, seed]
                found.setdefault((setting, fraction), {})[seed] = lead
    return found


def by_seed(found: Leads) -> dict[int, float]:
    """The mean over settings and fractions, for the seeds that all of them have."""
    seeds = set.intersection(*(set(values) for values in found.values()))
    return {seed: statistics.fmean(values[seed] for values in found.values()) for seed in sorted(seeds)}


def table() -> str:
    every = {policy: leads(policy) for policy in POLICIES}
    means = {policy: by_seed(found) for policy, found in every.items()}
    best = max(means, key=lambda policy: statistics.fmean(means[policy].values()))
    columns = {"policy": list(POLICIES)}
    for setting in SETTINGS:
        for fraction in FRACTIONS:
            cells = [list(every[policy][setting, fraction].values()) for policy in POLICIES]
            columns[f"{setting}, {fraction:g}"] = [spread(values, 2, "+") for values in cells]
    columns["mean"] = [spread(list(means[policy].values()), 2, "+") for policy in POLICIES]
    behind = {
        policy: [means[best][seed] - lead for seed, lead in means[policy].items() if seed in means[best]]
        for policy in POLICIES
    }
    columns[f"{best} - policy"] = [
        "" if policy == best else spread(behind[policy], 2, "+") for policy in POLICIES
    ]
    return markdown(columns)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
