"""What a person reads while a run goes on and at its end: on terminals of any width, in a pipe, in a log."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pretrain

from ssl_emp.commands import pretrain
from ssl_emp.run.guard import Guard
from ssl_emp.run.report import INDENT, Report, folded
from ssl_emp.run.run import epoch_line, figures_line

ROW: dict[str, Any] = {
    "epoch": 7,
    "loss": 12.3456,
    "kept_share": 0.7,
    "images_per_second": 12345.6,
    "std_loss": 0.5,
    "rank_correlation": 0.25,
}


def test_an_epoch_is_one_line_of_80_columns() -> None:
    assert epoch_line(ROW, 12, 75) == "epoch 7/12   loss 12.346  kept  70%  12,346 images/s  eta 1m15s"
    measured = ROW | {"knn_train_split": 0.9412, "epoch": 112}
    line = epoch_line(measured, 200, 40_000)
    assert line.endswith("  eta 11h06m  kNN 94.1%") and len(line) <= 80
    last = epoch_line(ROW | {"epoch": 12, "skipped_steps": 3}, 12, 0)
    assert "eta" not in last and last.endswith("  3 steps skipped")
    columns = [epoch_line(ROW | {"epoch": epoch}, 12, 9).index("eta") for epoch in (1, 9, 10)]
    assert len(set(columns)) == 1, "the columns stand below each other"
    assert figures_line(ROW | {"class": "x"}) == (
        "loss 12.35  kept_share 0.7  images_per_second 1.235e+04  std_loss 0.5  rank_correlation 0.25"
    )


def test_what_a_run_prints(pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    """Piped: no escape codes; a line an epoch, its columns explained before it, and what was saved."""
    run = pretrain_run("run", "prune.policy=random", "epochs=6")
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "\x1b" not in said and "\r" not in said
    epochs = [number for number, line in enumerate(lines) if line.startswith("epoch")]
    assert len(epochs) == 6 and epochs[-1] - epochs[0] == 5, lines
    assert lines[epochs[0] - 1].startswith("columns   ") and all("std" not in lines[n] for n in epochs)
    assert [line[:10].strip() for line in lines[epochs[-1] + 1 :]] == [
        *("done", "saved", "encoder", "evaluate", "report")
    ]
    assert lines[-3] == f"encoder   {run / 'encoder'}" and f" {run} " in lines[-2]
    assert lines[-1] == f"report    ssl-emp report {run}"
    log = [line[20:] for line in (run / "train.log").read_text().splitlines()]
    assert log == lines
    verbose = pretrain_run("verbose", "prune.policy=random", "epochs=6", "monitor.verbose=true")
    more = capsys.readouterr().out.splitlines()
    figures = [line for line in more if line.startswith(f"{INDENT}step ")]
    rows = [json.loads(line) for line in (verbose / "metrics.jsonl").read_text().splitlines()]
    assert len(figures) == 6 and len(more) == len(lines) + 6
    for line, row in zip(figures, rows, strict=True):
        names = line.split()[::2]
        assert names == [
            name for name, value in row.items() if name != "epoch" and not isinstance(value, list)
        ]


def test_rows_of_a_narrow_terminal_hold_words_and_commands_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    report, shown = Report(), io.StringIO()
    report.console.file = shown
    report.attach(tmp_path)
    words = "warning   the learning rate is as long as the run, which ends before its peak"
    command = f"evaluate  ssl-emp evaluate {'long/' * 20} knn linear"
    report.say(words)
    report.say(command, folds=False)
    rows = shown.getvalue().splitlines()
    assert len(rows) > 2 and all(len(row) <= 40 for row in rows[:-1]) and rows[-1] == command
    assert all(row.startswith(INDENT) for row in rows[1:-1])
    assert " ".join(" ".join(rows[:-1]).split()) == " ".join(words.split()), "nothing is lost"
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == [words, command]
    assert folded("x" * 90, 40) == f"{'x' * 90}", "a long word is not cut"
    assert folded("a b " * 20, 12) == "a b " * 20, "nor is anything where no room is left beside the indent"


def test_skipped_steps_are_explained_once_a_run(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of every epoch is bad; stopped and resumed, the explanation does not come again."""
    step = Guard.step

    def sick(self: Guard, terms: torch.Tensor, number: int, batches: torch.Tensor) -> torch.Tensor:
        return step(self, terms * (torch.nan if number == 0 else 1), number, batches)

    monkeypatch.setattr(Guard, "step", sick)
    out, said = tmp_path / "run", []
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", "epochs=3"]) == 0
    said += capsys.readouterr().out.splitlines()
    assert pretrain.main(["--resume", str(out), "epochs=5"]) == 0
    said += capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.endswith("  1 steps skipped")]) == 5
    (line,) = [line for line in said if "was skipped for" in line]
    assert line.startswith("warning   epoch 1: 1 step was skipped for a loss or gradient that is not finite")
    assert "lower optimizer.lr" in line
