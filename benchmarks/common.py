"""What the benchmarks share: the machine, contenders in turn, ratios and goals, a table, a JSON file."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssl_emp.data.decode import cores
from ssl_emp.device import pick_device
from ssl_emp.errors import Parser, UserError

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = {name: (name,) for name in ("torch", "torchvision", "lightly", "kornia", "pillow")} | {
    "faiss": ("faiss-gpu", "faiss-cpu")
}


@dataclass(frozen=True)
class Ratio:
    """What a benchmark claims: `numerator / denominator / per` of one round, the median of it over the
    rounds.

    Args:
        numerator: a contender.
        denominator: another one, or None: the figure stands alone (for a goal in megabytes).
        goal: what it must reach, or stay under (`at_most`); None: stated without a goal.
        per: what theory promises, where the claim is the share of it that was reached.
        name: how the table calls it; empty: `numerator / denominator`.
    """

    numerator: str
    denominator: str | None = None
    goal: float | None = None
    at_most: bool = False
    per: float = 1.0
    name: str = ""

    def of(self, figures: dict[str, list[float]]) -> list[float]:
        """The ratio of each round."""
        above = figures[self.numerator]
        below = figures[self.denominator] if self.denominator else [1.0] * len(above)
        return [a / b / self.per for a, b in zip(above, below, strict=True)]

    def names(self) -> set[str]:
        return {self.numerator} | ({self.denominator} if self.denominator else set())


# ---- measuring ---------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the work it queued on a GPU included."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, where this process has used one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which one call raises this process's peak of resident memory; for a process of its own, which
    does nothing else.
    """
    unit = 1 if sys.platform == "darwin" else 1024

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # the peak may lie above what is in use now (imports, the parent's before exec): fill the gap, so that the
    # first new byte raises it
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[1]) * resource.getpagesize()
    filler = torch.ones(max(0, peak() - in_use), dtype=torch.uint8)
    before = peak()
    function()
    grown = peak() - before
    del filler
    return grown


def interleave(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure in turn, A B C A B C, so that a machine that becomes slower slows all contenders alike.

    Each callable returns the figure it measured (seconds, images/s); each name gets its `repeats` figures.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats):
        for name, measure in contenders.items():
            figures[name].append(measure())
            print(
                f"round {number + 1}/{repeats}  {name}  {_short(figures[name][-1])}",
                file=sys.stderr,
                flush=True,
            )
    return figures


def run_pretrain(
    config: str, overrides: Sequence[str], arguments: argparse.Namespace, root: Path = ROOT
) -> list[dict[str, Any]]:
    """Run `pretrain.py` of the checkout `root` as a user does, in a temporary run directory; the rows of its
    metrics.jsonl.

    Raises UserError with the last line it wrote where it did not end with 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_python(
            [
                "pretrain.py",
                "--config",
                config,
                *overrides,
                f"out={folder}/run",
                f"device={arguments.device}",
            ],
            arguments.quick,
            root,
        )
        return [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ]


def run_python(command: Sequence[str], quick: bool = False, root: Path = ROOT) -> str:
    """Run this Python with `command` in a checkout's root; its standard output. Raises UserError where it
    fails.
    """
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=process_environment(quick), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(
            f"{' '.join(command)} ended with {done.returncode}: {last}",
            "run it by hand to see all of its output",
        )
    return done.stdout


def process_environment(quick: bool) -> dict[str, str]:
    """The environment of a contender's process. A quick run does not compile: that alone takes a minute."""
    return os.environ | ({"TORCH_COMPILE_DISABLE": "1"} if quick else {})


# ---- reporting ---------------------------------------------------------------------------------------------


def summary(figures: dict[str, list[float]], ratios: Sequence[Ratio], unit: str) -> dict[str, Any]:
    """One case of a benchmark: per contender and per ratio the median, the extremes and every round.

    Ratios of contenders that were not measured (a peer that is not installed) are left out.
    """
    claims = {}
    for ratio in ratios:
        if ratio.names() <= figures.keys():
            row = _spread(ratio.of(figures)) | {"goal": ratio.goal, "at_most": ratio.at_most}
            met = (
                None
                if ratio.goal is None
                else row["median"] <= ratio.goal
                if ratio.at_most
                else row["median"] >= ratio.goal
            )
            claims[ratio.name or " / ".join(filter(None, (ratio.numerator, ratio.denominator)))] = row | {
                "met": met
            }
    return {
        "unit": unit,
        "contenders": {name: _spread(values) for name, values in figures.items()},
        "ratios": claims,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write(name: str, payload: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print one table of `payload["cases"]` (case -> `summary(...)`), and write the payload with the machine
    as JSON.

    The file is benchmarks/results/NAME.json or `--out`; a `--quick` run, whose figures mean nothing, writes
    to `--out` only.
    """
    table = Table(title=name, box=SIMPLE, title_justify="left")
    for column in ("case", "what", "median", "min", "max", "unit", "goal"):
        table.add_column(
            column, justify="right" if column in ("median", "min", "max") else "left", no_wrap=True
        )
    for case, result in payload["cases"].items():
        for what, row in result["contenders"].items():
            table.add_row(case, what, *(_short(row[key]) for key in ("median", "min", "max")), result["unit"])
        for what, row in result["ratios"].items():
            verdict = "not judged" if arguments.quick else "met" if row["met"] else "MISSED"
            goal = (
                "" if row["goal"] is None else f"{'<=' if row['at_most'] else '>='} {row['goal']:g} {verdict}"
            )
            table.add_row(case, what, *(_short(row[key]) for key in ("median", "min", "max")), "ratio", goal)
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    out = Path(arguments.out) if arguments.out else None if arguments.quick else RESULTS / f"{name}.json"
    if out is not None:
        whole = {
            "benchmark": name,
            "quick": arguments.quick,
            "repeats": arguments.repeats,
            "environment": environment(arguments.device),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(whole | payload, indent=2) + "\n")
        print(out)


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a figure depends on besides the code: machine, versions, revision, date, no paths."""
    device = torch.device(device)
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: _version(distributions) for name, distributions in PACKAGES.items()},
        "revision": revision(ROOT),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def revision(root: Path) -> str | None:
    """The commit of a checkout, "-dirty" where files differ from it; None: not under git."""
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    # without the results: writing one must not mark the next benchmark as changed code
    changed = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"], capture_output=True
    ).returncode
    return commit.strip() + ("-dirty" if changed else "") if commit else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


# ---- command line ------------------------------------------------------------------------------------------


def parser(description: str) -> Parser:
    """A parser with the options that every benchmark has; parse with `parse`."""
    options = Parser(description=description)
    options.add_argument(
        "--repeats", type=int, help="rounds, each contender once a round (default 3; 1 with --quick)"
    )
    options.add_argument(
        "--quick", action="store_true", help="a smoke test of seconds; its figures mean nothing"
    )
    options.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    options.add_argument(
        "--out", metavar="FILE", help="where the JSON goes (default benchmarks/results/NAME.json)"
    )
    return options


def parse(options: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, `device` as a torch.device and `repeats` as a number. Raises UserError."""
    arguments = options.parse_args(argv)
    arguments.device = pick_device(arguments.device)
    arguments.repeats = arguments.repeats if arguments.repeats is not None else 1 if arguments.quick else 3
    if arguments.repeats < 1:
        raise UserError(f"--repeats is {arguments.repeats}", "give 1 or more")
    return arguments


def run(main: Callable[[], None]) -> None:
    """Run a benchmark's main as a program: a UserError is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
