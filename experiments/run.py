"""Run a grid of cells, each a pretrain.py and an evaluate.py, and append one JSON line a cell.

    python -m experiments.run experiments/ssl_policies.yaml --jobs 2 data.source=/path/to/cifar10

A grid file holds `config` (path), `overrides` (keys for every cell), `evaluators` (may be empty), `cells`: a
list of dicts whose list values are multiplied out (a value that is a list itself stands in a list: `[[layer3,
layer4]]`), and `log`: keys of metrics.jsonl, averaged over the pruned epochs. Lines go to
experiments/results/NAME.jsonl, what a cell says on standard error to RUNS/NAME/CELL.log. Finished cells are
skipped and interrupted ones resumed, so the same command goes on where it stopped. A cell is not finished
where the config file has another value for a key that neither grid nor cell sets, or the grid one evaluator
more. Ctrl-C lets the running cells save. With `--jobs` above 1 each cell gets one thread, so that cells do
not slow each other down. Exit codes: 0 done, 1 a cell failed (the others went on), 2 the user can fix it, 130
stopped.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.table import read_rows
from ssl_emp.config import flatten, parse_yaml
from ssl_emp.errors import Parser, UserError
from ssl_emp.run.report import duration

ROOT = Path(__file__).parent.parent
Cell = dict[str, Any]
# keys of paths, which differ between machines: they do not identify a cell
IMAGE_PATHS = ("data.source", "data.test_source")
OTHER_PATHS = ("out", "data.download_dir", "data.cache_dir")


class CellFailed(Exception):
    """A cell ended with an error; the others go on."""


class Stopped(Exception):
    """Ctrl-C: the cell saved and stopped, or was not started."""


# ---- the grid ----------------------------------------------------------------------------------------------


def expand(cells: list[Cell]) -> list[Cell]:
    """`[{policy: [a, b], seed: [0, 1]}]` -> four cells, each once, in the order written, seeds first. `[[a,
    b]]` is one value, a list.
    """
    grid: list[Cell] = []
    for cell in cells:
        options = [value if isinstance(value, list) else [value] for value in cell.values()]
        grid += [dict(zip(cell, values, strict=True)) for values in itertools.product(*options)]
    once = {json.dumps(cell, sort_keys=True): cell for cell in grid}  # lines of a grid may overlap
    return sorted(once.values(), key=lambda cell: cell.get("seed", 0))


def words_of(settings: Cell) -> list[str]:
    """`key=value`, as pretrain.py takes them."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    ]


def name_of(cell: Cell, settings: Cell, config: str) -> str:
    """A folder name: the cell's values for a reader, and a hash of everything that makes it another cell."""
    readable = re.sub(r"[^\w.+-]+", "_", "-".join(str(value) for value in cell.values()))[:80].strip("._-")
    digest = hashlib.sha256(json.dumps([cell, settings, config], sort_keys=True).encode()).hexdigest()
    return f"{readable}-{digest[:6]}".lstrip("-")


def read_grid(path: Path) -> dict[str, Any]:
    """The grid file, its optional parts filled in. Raises UserError."""
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read {path} ({' '.join(str(error).split())[:200]})",
            "give a grid such as experiments/demo.yaml",
        ) from error
    known: dict[str, Any] = {"config": None, "overrides": {}, "evaluators": [], "cells": None, "log": []}
    if (
        not isinstance(grid, dict)
        or not grid.keys() <= known.keys()
        or not {"config", "cells"} <= grid.keys()
    ):
        raise UserError(
            f"{path} is not a grid", f"its keys are {', '.join(known)}; config and cells must be there"
        )
    return known | {key: value for key, value in grid.items() if value is not None}


def read_extra(words: list[str], cells: list[Cell]) -> Cell:
    """`key=value` words of the command line. Raises UserError where one has no value, or would overwrite a
    key of the cells.
    """
    extra = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or any(key in cell for cell in cells):
            what = f"{key} is a key of the cells" if equals else f"{word!r} is not key=value"
            raise UserError(what, "write it into the grid" if equals else "write such as data.source=PATH")
        extra[key] = text if key in (*IMAGE_PATHS, *OTHER_PATHS) else parse_yaml(text, word)
    return extra


def planned_work(settings: Cell, base: Cell) -> float:
    """Relative cost of a cell, for the ETA: its samples seen, in epochs with views of their last size."""
    epochs = settings.get("epochs", base.get("epochs", 1))
    size = settings.get("augment.size", base.get("augment", {}).get("size"))
    share = 1.0  # of the pixels, with which the cost of a step goes
    if isinstance(size, list) and size:
        with suppress(TypeError, ValueError, IndexError, ZeroDivisionError):  # pretrain.py says what is wrong
            ends = [0, *(end for _, end in size)]
            share = sum(
                (end - begin) * (side / size[-1][0]) ** 2
                for begin, (side, end) in zip(ends, size, strict=False)
            )
    return float(epochs * (1 - settings.get("prune.fraction", 0)) * share)


# ---- one cell ----------------------------------------------------------------------------------------------


@dataclass
class Children:
    """Running processes, each in a process group of its own, so Ctrl-C reaches them only through here."""

    held: int  # descriptor of the lock; a child that outlives the runner still holds it
    stopping: bool = False
    pids: set[int] = field(default_factory=set)
    guard: Lock = field(default_factory=Lock)

    def run(self, command: list[str], log: Path, environment: dict[str, str]) -> tuple[int, float]:
        """Run `python COMMAND`, standard error into `log`. Returns (exit code, CPU seconds)."""
        with self.guard, open(log, "wb") as errors:
            if self.stopping:
                raise Stopped
            words, quiet = [sys.executable, *command], subprocess.DEVNULL
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdin=quiet,
                stdout=quiet,
                stderr=errors,
                process_group=0,
                pass_fds=[self.held],
            )
            self.pids.add(process.pid)
        # CPU time of this child and of the processes it waited for
        _, status, usage = os.wait4(process.pid, 0)
        with self.guard:
            self.pids.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_utime + usage.ru_stime

    def interrupt(self) -> None:
        """Send SIGINT to all. pretrain.py finishes its step and saves; a second SIGINT ends it at once."""
        with self.guard:
            self.stopping = True
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)


@dataclass(frozen=True)
class Lab:
    """What all cells of a grid share."""

    grid: dict[str, Any]
    extra: Cell  # key=value of the command line
    runs: Path  # folder of the run directories
    results: Path
    threads: int | None
    keep_checkpoints: bool
    children: Children
    base: Cell  # values of the grid's config file
    written: Lock = field(default_factory=Lock)

    def settings(self, cell: Cell) -> Cell:
        """All settings beyond the config file that define the cell; paths on the command line do not."""
        return {**self.grid["overrides"], **cell} | {
            key: v for key, v in self.extra.items() if key not in (*IMAGE_PATHS, *OTHER_PATHS)
        }

    def base_hash(self, cell: Cell) -> str:
        """Hash of the config file's values that the cell does not set itself; part of its key and of its run
        directory's name.
        """
        own = self.settings(cell)
        rest = {key: value for key, value in flatten(self.base).items() if key not in own}
        return hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def name(self, cell: Cell) -> str:
        return name_of(cell, self.settings(cell), f"{self.grid['config']} {self.base_hash(cell)}")

    def is_row_of(self, row: Cell, cell: Cell) -> bool:
        """Whether a row is this cell with every evaluator's figure. Old rows have no config hash."""
        base_hash = self.base_hash(cell)
        same = (row["cell"], row["settings"], row["config"]) == (
            cell,
            self.settings(cell),
            self.grid["config"],
        )
        return (
            same
            and row.get("base_hash", base_hash) == base_hash
            and all(name in row for name in self.grid["evaluators"])
        )


def run_cell(cell: Cell, lab: Lab) -> str:
    """Train or resume and evaluate a cell, append its row. Returns a summary. Raises CellFailed, Stopped."""
    out, log = lab.runs / lab.name(cell), lab.runs / f"{lab.name(cell)}.log"
    evaluators = lab.grid["evaluators"]
    environment = os.environ | ({} if lab.threads is None else {"OMP_NUM_THREADS": str(lab.threads)})
    overrides = words_of(lab.settings(cell) | lab.extra)
    revision = git_revision()  # now, because the tree may change while the cell runs
    out.parent.mkdir(parents=True, exist_ok=True)

    def check(code: int, script: str) -> None:
        if code and lab.children.stopping:
            raise Stopped
        if code:
            said = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise CellFailed(
                f"{script} ended with {code}: {said[0] if said else 'it said nothing'} (log: {log})"
            )

    # a resumed cell gets the overrides too: pretrain.py refuses them where the config file has changed since
    resumes = (out / "config.yaml").exists()
    start = ["--resume", str(out)] if resumes else ["--config", lab.grid["config"], f"out={out}"]
    # CPU seconds of each attempt; null for one that was killed together with this runner
    spent = out / "cpu_seconds.json"
    before = json.loads(spent.read_text()) if spent.exists() else [None] * resumes
    if resumes:
        spent.write_text(json.dumps([*before, None]))
    code, cpu_seconds = lab.children.run(["pretrain.py", *start, *overrides], log, environment)
    if out.is_dir():
        spent.write_text(json.dumps([*before, cpu_seconds]))
    check(code, "pretrain.py")
    if evaluators:
        check(lab.children.run(["evaluate.py", str(out), *evaluators], log, environment)[0], "evaluate.py")

    row = {"cell": cell, **read_run(out, evaluators, lab.grid["log"])}
    row["cpu_seconds"] = None if None in before else sum(before, cpu_seconds)
    row |= {
        "config": lab.grid["config"],
        "base_hash": lab.base_hash(cell),
        "settings": lab.settings(cell),
        **config_hash(out, lab.extra),
    }
    row["environment"] = {
        key: value
        for key, value in json.loads((out / "environment.json").read_text()).items()
        if key != "command"
    }
    row["revision"] = revision
    with lab.written, open(lab.results, "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")  # one write, so that no half line is left
        os.fsync(file.fileno())
    if not lab.keep_checkpoints:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    figures = "".join(f"{name} {row[name]:.2f}, " for name in evaluators)
    return f"{figures}{row['samples_seen']:,} samples, {duration(cpu_seconds)} of CPU"


def read_run(out: Path, evaluators: list[str], logged: list[str]) -> dict[str, Any]:
    """The figures that a finished run left in its directory."""
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = ("samples_seen", "asked_share", "real_share")
    row = {key: value for key, value in epochs[-1].items() if key in wanted or key.endswith("_seconds")}
    if (out / "result.json").exists():  # of a supervised run
        row |= {
            key: value
            for key, value in json.loads((out / "result.json").read_text()).items()
            if isinstance(value, int | float)
        }
    for name in evaluators:
        # the newest: there may be rows of earlier protocols. What the run began from has rows, too
        rows = json.loads((out / "eval" / f"{name}.json").read_text())
        began = [line for line in rows if Path(line.get("encoder", "")).name == "start"]
        found = [line for line in rows if line not in began][-1]
        row[name] = found["value"]
        if began:
            row.setdefault("start", {})[name] = began[-1]["value"]
        row.setdefault("protocols", {})[name] = found["protocol"]
    # below 1 in a full epoch with a remainder; the first epoch is never pruned
    full = max((epoch["kept_share"] for epoch in epochs if "kept_share" in epoch), default=1)
    pruned = [epoch for epoch in epochs if epoch.get("kept_share", 1) < full]
    values = {
        key: [epoch[key] for epoch in pruned if isinstance(epoch.get(key), int | float)] for key in logged
    }
    row["log"] = {key: sum(numbers) / len(numbers) for key, numbers in values.items() if numbers}
    samples = out / "pruning" / "samples.parquet"
    if samples.exists() and "times_trained" in pq.read_schema(samples).names:
        counts = Counter(pq.read_table(samples, columns=["times_trained"])["times_trained"].to_pylist())
        row["times_trained"] = {str(times): counts[times] for times in sorted(counts)}  # times -> samples
    return row


def config_hash(out: Path, extra: Cell) -> dict[str, Any]:
    """RUN/config.yaml without the paths that differ between machines, and the keys of those paths."""
    without = [*OTHER_PATHS, *(key for key in IMAGE_PATHS if key in extra)]
    config = {
        key: value
        for key, value in flatten(yaml.safe_load((out / "config.yaml").read_text())).items()
        if key not in without
    }
    return {
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
        "config_hash_without": without,
    }


def git_revision() -> str:
    """Such as `d57057f`, or `d57057f-dirty` where tracked files differ: the results, which grow meanwhile, do
    not count.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    # an untracked file takes part only through a tracked one that was changed to import it
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)experiments/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


# ---- all of them -------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Lock `path`; returns the descriptor. Raises UserError if another runner or its cell holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            what = f"another runner, or a cell that it left behind, works on this grid ({path})"
            raise UserError(what, "wait for its end, or stop it") from error
        yield file.fileno()


@contextmanager
def watched(total: int, done: int) -> Iterator[Callable[[str, str], None]]:
    """Give a function to call with (line, eta) after each cell: a bar over the grid on a terminal, numbered
    lines elsewhere.
    """
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        columns = (
            TextColumn("cells"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total, completed=done, eta="")

            def advance(line: str, eta: str) -> None:
                console.print(line, markup=False)
                bar.update(task, advance=1, eta=eta)

            yield advance
    else:
        numbers = itertools.count(done + 1)
        yield lambda line, eta: print(f"[{next(numbers)}/{total}] {line} {eta}".rstrip(), flush=True)


def run_cells(todo: list[Cell], total: int, jobs: int, lab: Lab) -> int:
    """Run the cells, `jobs` at a time. Returns how many failed; raises KeyboardInterrupt when the running
    ones have saved.
    """
    base = lab.base
    left, done, failed, began = (
        sum(planned_work(lab.settings(cell), base) for cell in todo),
        0.0,
        0,
        time.monotonic(),
    )
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(run_cell, cell, lab): cell for cell in todo}
    try:
        with watched(total, total - len(todo)) as advance:
            for future in as_completed(futures):
                cell = futures[future]
                left -= (work := planned_work(lab.settings(cell), base))
                try:
                    line, done = future.result(), done + work
                # the latter: a file of the run is not as it should be
                except (CellFailed, OSError, ValueError, LookupError) as error:
                    line = f"FAILED {error if isinstance(error, CellFailed) else repr(error)}"
                    failed += 1
                eta = f"eta {duration((time.monotonic() - began) * left / done)}" if done and left else ""
                advance(f"{lab.name(cell)}: {line}", eta)
    except KeyboardInterrupt:
        lab.children.interrupt()
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:  # a second Ctrl-C
            lab.children.interrupt()
            pool.shutdown()
        raise
    return failed


def read_base(path: Path) -> Cell:
    """The values of the grid's config file. Raises UserError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read {path}, the grid's config", "name a file such as configs/demo.yaml"
        ) from error


def run(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs} runs nothing", "give 1 or more")
    grid = read_grid(arguments.grid)
    cells = expand(grid["cells"])
    results = ROOT / "experiments" / "results" / f"{arguments.grid.stem}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    with locked(ROOT / ".cache" / "experiments" / f"{arguments.grid.stem}.lock") as held:
        runs = arguments.runs.resolve() / arguments.grid.stem
        threads = 1 if arguments.jobs > 1 else None
        extra = read_extra(arguments.extra, cells)
        lab = Lab(
            grid,
            extra,
            runs,
            results,
            threads,
            arguments.keep_checkpoints,
            Children(held),
            read_base(ROOT / grid["config"]),
        )
        done = read_rows(results) if results.exists() else []
        todo = [cell for cell in cells if not any(lab.is_row_of(row, cell) for row in done)]
        print(f"{len(cells) - len(todo)} of {len(cells)} cells done, {len(todo)} to do", flush=True)
        try:
            failed = run_cells(todo, len(cells), arguments.jobs, lab)
        except KeyboardInterrupt:
            print(
                "stopped; the running cells saved what they had. go on with the same command", file=sys.stderr
            )
            return 130
    if failed:
        print(f"{failed} cells failed. the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="cells at a time, one thread each where above 1"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run directories go")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished cells too")
    parser.add_argument(
        "extra", nargs="*", metavar="key=value", help="for every cell, such as data.source=PATH"
    )
    try:
        return run(parser.parse_intermixed_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running cells save
    sys.exit(main())
