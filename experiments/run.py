"""Run a grid of cells, each a pretrain.py and an evaluate.py, and append one JSON line a cell.

    python -m experiments.run experiments/cifar10_narrow.yaml --jobs 2 data.source=/path/to/cifar10

A grid file holds `config` (path), `overrides` (keys for every cell), `evaluators` and `cells`: a list of dicts whose list
values are multiplied out. Finished cells are skipped and interrupted ones resumed, so the same command goes on where it
stopped. With `--jobs` above 1 each cell gets one thread, so that cells do not slow each other down.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
written = Lock()


def expand(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`[{policy: [a, b], seed: [0, 1]}]` -> four cells, in the order written, seeds outermost."""
    grid = []
    for cell in cells:
        options = [value if isinstance(value, list) else [value] for value in cell.values()]
        grid += [dict(zip(cell, values, strict=True)) for values in itertools.product(*options)]
    return sorted(grid, key=lambda cell: cell.get("seed", 0))


def name_of(cell: dict[str, Any]) -> str:
    return "-".join(str(value) for value in cell.values())


class CellFailed(Exception):
    """A cell ended with an error; the others go on."""


def run_cell(cell: dict[str, Any], grid: dict[str, Any], out: Path, extra: list[str], results: Path, threads: int | None) -> str:
    """Train (or resume) and evaluate one cell, then append its line to `results`."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    settings = {**grid.get("overrides", {}), **cell}
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()] + extra
    # a resumed cell gets the overrides too: pretrain.py refuses them where the grid has changed since
    start = ["--resume", str(out)] if (out / "config.yaml").exists() else ["--config", grid["config"], f"out={out}"]
    command = ["pretrain.py", *start, *overrides]
    for arguments in (command, ["evaluate.py", str(out), *grid["evaluators"]]):
        finished = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise CellFailed(f"{name_of(cell)}: exit code {finished.returncode}, {finished.stderr.strip().splitlines()[-1:]}")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    row = {
        "cell": cell,
        "samples_seen": last["samples_seen"],
        "training_seconds": last["training_seconds"],
        "scoring_seconds": last["scoring_seconds"],
        **{name: json.loads((out / "eval" / f"{name}.json").read_text())[0]["value"] for name in grid["evaluators"]},
        "config": grid["config"],
        "settings": settings,
        "environment": {key: value for key, value in json.loads((out / "environment.json").read_text()).items() if key != "command"},
        "revision": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    }
    with written, open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    figures = ", ".join(f"{name} {row[name]:.2f}" for name in grid["evaluators"])
    return f"{name_of(cell)}: {figures}, {row['samples_seen']:,} samples, {row['training_seconds']:.0f}s"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a grid of pretraining cells; see the file's head.")
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each where above 1")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run directories go")
    parser.add_argument("extra", nargs="*", metavar="key=value", help="for every cell, such as data.source=PATH")
    arguments = parser.parse_intermixed_args()
    grid = yaml.safe_load(arguments.grid.read_text())
    results = ROOT / "experiments" / "results" / f"{arguments.grid.stem}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = [(row["cell"], row["settings"], row["config"]) for row in rows]
    cells = expand(grid["cells"])
    todo = [cell for cell in cells if (cell, {**grid.get("overrides", {}), **cell}, grid["config"]) not in done]
    print(f"{len(cells) - len(todo)} cells done, {len(todo)} to do", flush=True)
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:

        def work(cell: dict[str, Any]) -> str | CellFailed:
            out = arguments.runs.resolve() / arguments.grid.stem / name_of(cell)
            try:
                return run_cell(cell, grid, out, arguments.extra, results, 1 if arguments.jobs > 1 else None)
            except CellFailed as error:
                return error

        for number, line in enumerate(pool.map(work, todo), 1):
            failed += isinstance(line, CellFailed)
            print(f"[{number}/{len(todo)}] {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
