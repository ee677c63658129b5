"""Fine-tune MiniLM on GLUE tasks, one cell of a grid after the other, and append one JSON line a cell.

    python -m experiments.glue experiments/glue.yaml --data DIR [--until 03:25]

A cell is a run of `examples/glue.py`'s trainer with the grid's `training` (arguments of the Trainer),
`pruning` (of `Pruner`) and `samples`; its keys are `task`, `seed`, `prune.policy`, `prune.fraction`,
`prune.` with a key of the policy, and what it has instead of a key in `pruning`. Started several times, each
process passes over the cells that another one works on. Finished cells are skipped. At the time `--until`,
and after a crash, a run goes on from its last checkpoint when the same command is given again.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from examples.glue import METRICS, make_trainer
from experiments.run import ROOT, Cell, expand, git_revision, name_of
from experiments.table import read_rows
from ssl_emp.errors import Parser, UserError, path_argument
from ssl_emp.prune import POLICIES

SAVE_STEPS = 100


class Stopwatch(TrainerCallback):
    """CPU and wall seconds of a run over all its attempts, noted in its folder; ends it at a time of day."""

    def __init__(self, path: Path, until: float) -> None:
        self.path, self.until = path, until
        self.spent = json.loads(path.read_text()) if path.exists() else {"cpu": 0.0, "wall": 0.0}
        self.began = {"cpu": time.process_time(), "wall": time.monotonic()}

    def total(self) -> dict[str, float]:
        now = {"cpu": time.process_time(), "wall": time.monotonic()}
        return {name: self.spent[name] + now[name] - self.began[name] for name in now}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.path.write_text(json.dumps(self.total()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if time.time() > self.until:
            control.should_save = control.should_training_stop = True


def run_cell(cell: Cell, grid: dict[str, Any], data: Path, out: Path, until: float) -> dict[str, Any] | None:
    """The row of a finished run; None where the time was over before it."""
    keys = {key.removeprefix("prune."): value for key, value in cell.items() if key.startswith("prune.")}
    policy, fraction = POLICIES[keys.pop("policy")], keys.pop("fraction", 0.3)
    pruning = {name: cell.get(name, value) for name, value in grid["pruning"].items()}
    pruning |= {"policy": policy(**keys), "fraction": fraction}
    trainer = make_trainer(
        cell["task"], data, pruning, grid["samples"], output_dir=str(out), seed=cell["seed"],
        save_steps=SAVE_STEPS, save_total_limit=1, disable_tqdm=True, report_to="none", use_cpu=True,
        per_device_eval_batch_size=64, dataloader_pin_memory=False, **grid["training"],
    )  # fmt: skip
    watch = Stopwatch(out / "seconds.json", until)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) is not None)
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    spent, pruner = watch.total(), trainer.pruner
    found = trainer.evaluate()
    times = Counter(pruner.table()["times_trained"].tolist())
    return {
        "cell": cell,
        "samples_seen": pruner.step * pruner.batch_size,
        "asked_share": pruner.plan.asked_share(),
        "training_seconds": spent["wall"],
        "cpu_seconds": spent["cpu"],
        METRICS[cell["task"]]: found[f"eval_{METRICS[cell['task']]}"],
        "eval_loss": found["eval_loss"],
        "times_trained": {str(count): times[count] for count in sorted(times)},
        "log": {
            name: value for name, value in trainer.state.log_history[-2].items() if isinstance(value, float)
        },
        "settings": settings_of(cell, grid),
        "environment": {
            "device": f"cpu ({torch.get_num_threads()} threads)",
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    }


def settings_of(cell: Cell, grid: dict[str, Any]) -> Cell:
    """Everything that makes a run what it is."""
    return {"samples": grid["samples"], **grid["pruning"], **grid["training"], **cell}


def append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")  # one write: a line is there or not
        os.fsync(file.fileno())


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--data", type=path_argument, required=True, help="folder of TASK-SPLIT.parquet")
    parser.add_argument("--until", metavar="HH:MM", help="save and leave at this time of today")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results")
    try:
        arguments = parser.parse_args(argv)
        grid = yaml.safe_load(arguments.grid.read_text(encoding="utf-8"))
        until = math.inf if arguments.until is None else time_today(arguments.until)
    except (UserError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    results = arguments.results / f"{arguments.grid.stem}.jsonl"
    for cell in (cell for group in grid["groups"] for cell in expand(group)):
        out = arguments.runs / arguments.grid.stem / name_of(cell, settings_of(cell, grid), "")
        out.mkdir(parents=True, exist_ok=True)
        with open(out.parent / f"{out.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # another process works on it
            finished = [row["settings"] for row in (read_rows(results) if results.exists() else [])]
            if settings_of(cell, grid) in finished:
                continue
            revision = git_revision()
            row = run_cell(cell, grid, Path(arguments.data), out, until)
            if row is None:
                return 0
            append(results, row | {"revision": revision})
            shutil.rmtree(out)
            score = row[METRICS[cell["task"]]]
            print(f"{out.name}: {score:.2f}, {row['samples_seen']:,} samples, {row['cpu_seconds']:.0f} CPU s")
    return 0


def time_today(text: str) -> float:
    """Seconds since 1970 of `HH:MM`. Raises UserError."""
    try:
        clock = time.strptime(text, "%H:%M")
    except ValueError as error:
        raise UserError(f"--until is {text!r}", "give such as 03:25") from error
    now = time.localtime()
    return time.mktime((*now[:3], clock.tm_hour, clock.tm_min, 0, 0, 0, now.tm_isdst))


if __name__ == "__main__":
    sys.exit(main())
