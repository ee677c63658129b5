"""The grid: cells multiply out, finished ones are skipped, and the table says mean and spread."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import run
from experiments.table import spread, table


def test_cells_multiply_out_seeds_first() -> None:
    cells = run.expand([{"policy": "none", "seed": [0, 1]}, {"policy": ["emp", "loss"], "fraction": 0.3, "seed": [0, 1]}])
    assert [run.name_of(cell) for cell in cells] == ["none-0", "emp-0.3-0", "loss-0.3-0", "none-1", "emp-0.3-1", "loss-0.3-1"]


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00" and spread([4.26]) == "4.3"


def test_table() -> None:
    def row(policy: str, seed: int, seen: int, knn: float, **more: Any) -> dict[str, Any]:
        cell = {"prune.policy": policy, **more, "seed": seed}
        return {"cell": cell, "samples_seen": seen, "knn": knn, "linear": knn + 1, "training_seconds": 10.0}

    pruned = {"prune.fraction": 0.3}
    rows = [
        row("none", 0, 100, 40.0),
        row("none", 1, 100, 42.0),
        row("random", 0, 70, 39.5, **pruned),
        row("random", 1, 70, 40.5, **pruned),
    ]
    lines = table([*rows, row("emp", 1, 70, 41.0, **pruned)]).splitlines()
    assert lines[2] == "| none | 0 | 100 | 100.0% | 41.00 ± 1.41 | 42.00 ± 1.41 |  |  | 10 ± 0 | 2 |"
    assert lines[3] == "| random | 0.3 | 70 | 70.0% | 40.00 ± 0.71 | 41.00 ± 0.71 | -1.00 ± 0.71 |  | 10 ± 0 | 2 |"
    assert lines[4] == "| emp | 0.3 | 70 | 70.0% | 41.00 | 42.00 | -1.00 | +0.50 | 10 | 1 |", "paired with seed 1"


def test_a_grid_runs_and_goes_on_where_it_stopped(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    cells = [{"prune.policy": ["none", "emp"], "seed": 0}]
    overrides = {"epochs": 2, "monitor.knn_every": 0}
    grid.write_text(yaml.safe_dump({"config": str(tiny_config), "evaluators": ["knn"], "overrides": overrides, "cells": cells}))
    commands: list[list[str]] = []
    original = subprocess.run

    def noted(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return original(command, **options)

    monkeypatch.setattr(subprocess, "run", noted)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for name in ("pretrain.py", "evaluate.py"):
        (tmp_path / name).symlink_to(Path(__file__).parent.parent / name)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(sys, "argv", ["run", str(grid), "--runs", str(tmp_path / "runs"), "batch_size=16"])
    assert run.main() == 0
    results = tmp_path / "experiments" / "results" / "grid.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["cell"]["prune.policy"] for row in rows] == ["none", "emp"], capsys.readouterr().out
    assert [row["samples_seen"] for row in rows] == [2 * 4 * 16, (4 + 2) * 16] and all(0 <= row["knn"] <= 100 for row in rows)

    results.write_text(results.read_text().splitlines(keepends=True)[0])  # as if stopped before the second line
    shutil.rmtree(tmp_path / "runs" / "grid" / "emp-0" / "eval")
    commands.clear()
    assert run.main() == 0
    trained = [command for command in commands if "pretrain.py" in command]
    assert len(trained) == 1 and "--resume" in trained[0]
    assert [json.loads(line)["cell"] for line in results.read_text().splitlines()] == [row["cell"] for row in rows]
