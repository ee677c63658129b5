"""A step of configs/demo.yaml alone on the machine and beside busy programs, by how torch's threads wait.

    python -m benchmarks.shared_machine quiet   # on an idle machine: 7 minutes
    python -m benchmarks.shared_machine busy
    python -m benchmarks.shared_machine arrives

Contenders are whole processes of pretrain.py, in turn, and get SIGTERM after some seconds of training; the
figure is images a second of training, after the first epoch where there was one. `default` is torch as it
comes: a thread a core, and in GNU's OpenMP a thread looks 300,000 times for the others before it sleeps.
`spin N`: N times. `passive` is OMP_WAIT_POLICY=PASSIVE, `one thread` is threads=1, and `ours` sets nothing.
In `busy`, one busy program more than there are cores (`--programs`) run from before the start to the end; in
`arrives` they come after the first epoch, and the figure is of the steps from then on.

One line a run is appended to results/shared_machine.jsonl and is not run again, so the same command goes on
where it stopped. It notes how many cores the other programs on the machine kept busy meanwhile. A quiet run
that was not alone is told; `--again` drops such runs, and they are run anew.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.data.decode import cores
from ssl_emp.errors import UserError
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.report import read_metrics
from ssl_emp.run.threads import NUMBERS, SPIN_COUNT, SPINS, use

ALL = f"threads={cores()}"  # of the cores, whatever others do
CONTENDERS: dict[str, tuple[dict[str, str], list[str]]] = {  # name -> environment, keys
    "default": ({"GOMP_SPINCOUNT": "300000"}, [ALL]),
    "ours": ({}, []),
    f"spin {SPIN_COUNT:,}": ({"GOMP_SPINCOUNT": str(SPIN_COUNT)}, [ALL]),
    "spin 100,000": ({"GOMP_SPINCOUNT": "100000"}, [ALL]),
    "spin 1,000": ({"GOMP_SPINCOUNT": "1000"}, [ALL]),
    "passive": ({"OMP_WAIT_POLICY": "PASSIVE"}, [ALL]),
    "one thread": ({}, ["threads=1"]),
}
CASES = {  # the ratios that count
    "quiet": [Ratio("ours", "default", goal=0.97)],
    "busy": [Ratio("ours", "one thread", goal=0.9), Ratio("ours", "default")],
    "arrives": [Ratio("ours", "one thread"), Ratio("ours", "default")],
}
SECONDS = {"quiet": 12.0, "busy": 20.0, "arrives": 60.0}  # of training, until SIGTERM
SHARED = ["epochs=1000", "monitor.knn_every=0", "monitor.reliability_every=0", "monitor.tensorboard=false"]
ALONE_BELOW = 0.15  # cores that others may keep busy in a quiet run


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that compute as long as this one lives, each able to fill a core."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-S", "-c", program])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def wait_for(lines: Iterable[str], start: str) -> list[str]:
    """Lines up to the one that begins so, that included; all of them where none does."""
    said = []
    for line in lines:
        said.append(line)
        if line.startswith(start):
            break
    return said


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(out: Path) -> dict[str, Any]:
    """Images a second of a run that was stopped, after its first epoch where it came so far."""
    state, _ = load_checkpoint(out / "checkpoints")
    if state is None:
        raise UserError("a run left no checkpoint", "give more --seconds")
    first = next(iter(read_metrics(out)), {"step": 0, "training_seconds": 0.0})
    if state["step"] == first["step"]:
        raise UserError("a run made no step after its first epoch", "give more --seconds")
    seconds = state["seconds"]["training"] - first["training_seconds"]
    images = (state["step"] - first["step"]) * state["config"]["batch_size"]
    return {"images_per_second": round(images / seconds, 1), "steps": state["step"], "epochs": state["epoch"]}


def measure(case: str, contender: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: images a second, what it said of threads, and cores that all others kept busy meanwhile."""
    variables, keys = CONTENDERS[contender]
    environment = {k: v for k, v in os.environ.items() if k not in (*SPINS, *NUMBERS)} | variables
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out = Path(folder) / "run"
        words = ["pretrain.py", "--config", "configs/demo.yaml", f"out={out}", "device=cpu", *SHARED, *keys]
        if case == "busy":
            stack.enter_context(busy_programs(arguments.programs))
        command, pipe = [sys.executable, *words], subprocess.PIPE
        started = subprocess.Popen(command, cwd=common.ROOT, env=environment, text=True, stdout=pipe)
        process = stack.enter_context(started)  # which waits, and closes the pipe
        stack.callback(process.kill)
        assert process.stdout is not None
        said = wait_for(process.stdout, "epoch 1/" if case == "arrives" else "plan ")
        if case == "arrives":
            stack.enter_context(busy_programs(arguments.programs))
        while process.poll() is None and not (out / "train.log").is_file():
            time.sleep(0.05)  # from then on it hears SIGTERM
        if process.poll() is None:
            before, spent = use(), cpu_seconds(process.pid)
            time.sleep(arguments.seconds or SECONDS[case])
            after, spent = use(), cpu_seconds(process.pid) - spent
            process.send_signal(signal.SIGTERM)
        said += process.stdout.readlines()
        if process.wait() != 128 + signal.SIGTERM:
            raise UserError(f"{contender} ended with {process.returncode}", "run it by hand to see why")
        row = {"case": case, "contender": contender, **figures(out)}
    if before is not None and after is not None:
        everybody = after.busy - before.busy - (after.own - before.own)
        row["cores_of_others"] = round((everybody - spent) / (after.at - before.at), 2)
    return row | {"said": [line.strip() for line in said if line.startswith("threads ")]}


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def disturbed(row: dict[str, Any]) -> bool:
    return row["case"] == "quiet" and row.get("cores_of_others", 0.0) > ALONE_BELOW


def of(rows: list[dict[str, Any]], case: str, contender: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["case"], row["contender"]) == (case, contender)]


def to_run(rows: list[dict[str, Any]], case: str, rounds: int) -> str | None:
    """The contender whose turn it is; None: all had theirs."""
    return min(
        (name for name in CONTENDERS if len(of(rows, case, name)) < rounds),
        key=lambda name: len(of(rows, case, name)),
        default=None,
    )


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The table, and shared_machine.json, of the rounds that every contender had."""
    cases = {}
    for case, ratios in CASES.items():
        found = {name: [row["images_per_second"] for row in of(rows, case, name)] for name in CONTENDERS}
        rounds = min(map(len, found.values()))
        if rounds:
            found = {name: values[:rounds] for name, values in found.items()}
            cases[case] = common.summary(found, ratios, "images/s")
    common.write("shared_machine", {"cases": cases}, arguments)


def main(argv: list[str] | None = None) -> None:
    options = common.parser("A step on a machine that others use, by how torch's threads wait.")
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    options.add_argument("--programs", type=int, default=cores() + 1, help="busy ones (default: cores + 1)")
    options.add_argument("--seconds", type=float, help="of training a run (default: as suits the case)")
    options.add_argument("--rows", metavar="FILE", help="the runs (default benchmarks/results/NAME.jsonl)")
    options.add_argument("--again", action="store_true", help="drop the quiet runs that were not alone")
    arguments = common.parse(options, argv)
    if unknown := set(arguments.cases) - CASES.keys():
        raise UserError(f"there is no case {min(unknown)!r}", f"use {', '.join(CASES)}")
    if arguments.quick:
        arguments.seconds = arguments.seconds or 1.0
    path = Path(arguments.rows) if arguments.rows else common.RESULTS / "shared_machine.jsonl"
    if arguments.again:
        path.write_text("".join(json.dumps(row) + "\n" for row in read(path) if not disturbed(row)))
    for case in arguments.cases or CASES:
        while (contender := to_run(read(path), case, arguments.repeats)) is not None:
            row = measure(case, contender, arguments)
            row |= {"programs": 0 if case == "quiet" else arguments.programs}
            row |= {"began": time.strftime("%Y-%m-%d %H:%M"), "revision": common.revision(common.ROOT)}
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            others = row.get("cores_of_others", "?")
            what = f"{case}, {contender}: {row['images_per_second']:,.0f} images/s, others {others} cores"
            what += ", NOT ALONE: the figure is not that of a quiet machine" if disturbed(row) else ""
            print("; ".join([what, *row["said"]]), file=sys.stderr, flush=True)
    show(read(path), arguments)


if __name__ == "__main__":
    common.run(main)
