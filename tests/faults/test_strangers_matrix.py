"""Run directories of strangers: what is in them writes nowhere else, forges no line and names no path of
ours.

The first line of a docstring is `row | injected fault | expected`.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from refused import main_refuses

from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.run.report import Report
from ssl_emp.text import home

OURS = "alias ls='ls --color'\n"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped, as somebody packs it."""
    out = tmp_path_factory.mktemp("packed") / "run"
    assert rig.run(rig.fresh(out, "checkpoint.every_steps=9"), "after_step:10:term").rc == 143
    return out


APPENDED = ["train.log", ".lock", "metrics.jsonl"]
# whole: a second name keeps what it has
REPLACED = ["config.yaml", "checkpoints/manifest.json", "environment.json"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in APPENDED + REPLACED for kind in ("link", "pipe")]
    + [(name, "second name") for name in APPENDED],
)
def test_links(
    packed: Path, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """I1 | a run directory of somebody else in which a file is a link, a second name of a file of ours, or a
    pipe; resumed | one line, exit 2, our file as it was
    """
    run, ours = tmp_path / "run", tmp_path / "bashrc"
    shutil.copytree(packed, run)
    ours.write_text(OURS)
    (run / name).unlink(missing_ok=True)
    if kind == "link":
        (run / name).symlink_to(ours)
    elif kind == "second name":
        os.link(ours, run / name)
    else:
        os.mkfifo(run / name)
    line = main_refuses(capsys, f"--resume={run}")
    assert str(run) in line and ours.read_text() == OURS


@pytest.mark.parametrize("part", ["checkpoints", "encoder", "pruning"])
def test_folders(packed: Path, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """I2 | a folder of a run directory is a link to a folder of ours; resumed | one line, exit 2, nothing
    written or removed there
    """
    run, ours = tmp_path / "run", tmp_path / "ours"
    shutil.copytree(packed, run)
    ours.mkdir()
    (ours / ".draft.tmp").touch()
    shutil.rmtree(run / part, ignore_errors=True)
    (run / part).symlink_to(ours)
    assert "is a link to another place" in main_refuses(capsys, f"--resume={run}")
    assert [path.name for path in ours.iterdir()] == [".draft.tmp"]


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": "x"},
        {"epoch": 10**6, "step_in_epoch": 0},
        {"step": -5},
        {"seconds": {}},
        {"norms": torch.tensor(float("nan"))},
        {"pruner": {"told": {"idle": "x"}}},
        {"config": {"a": {"b": {"c": {"d": {}}}}}},
    ],
)
def test_contents(
    packed: Path, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """I3 | entries of a checkpoint that no save could have written, the hash is right; resumed | one line,
    exit 2
    """
    run = tmp_path / "run"
    shutil.copytree(packed, run)
    state, _ = load_checkpoint(run / "checkpoints")
    assert state is not None
    del state["format"], state["written_by"]
    if "pruner" in changes:
        changes = {"pruner": state["pruner"] | changes["pruner"]}
    save_checkpoint(run / "checkpoints", state | changes, state["step"])
    assert "checkpoint in" in main_refuses(capsys, f"--resume={run}")


def test_forged_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """I4 | names with newlines, escape sequences, markup and letters that turn a line about | one line each
    on console and in train.log, escaped
    """
    report = Report()
    report.attach(tmp_path)
    names = [
        "a\n2026-01-01 00:00:00 done",
        "\x1b[2J",
        "\x9b2J",
        "a\u202egnp.exe",
        "[/b]",
        ":apple:",
        "\r",
        "\u2028x",
    ]
    for name in names:
        report.say(name)
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    for text in (log, capsys.readouterr().out):
        assert (
            text.count("\n") == len(names) == len(text.splitlines()) and "[/b]" in text and ":apple:" in text
        )
        assert not any(act in text for act in ("\x1b", "\x9b", "\u202e", "\r"))


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I5 | ~ in a path, ~ of nobody, a folder called ~ | the home folder, refused, that folder"""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home("~/runs") == str(tmp_path / "runs") and home("./~") == "./~"
    with pytest.raises(ValueError, match="nobody's home folder"):
        home("~nobody-here/x")
