"""What a resumed run notices, repairs and keeps: its directory, its files, its images, its plan."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import pretrain
from ssl_emp.checkpoint import load_checkpoint


class AtStep(pretrain.Stop):
    """Stands in for `pretrain.Stop`: `act` happens within step `step`, and a signal comes in the step where `stop` says so."""

    step, stop = 0, 0
    act: Callable[[], None] | None = None

    def __init__(self) -> None:
        self.reads = 0

    @property
    def signal(self) -> int:  # type: ignore[override]  # each step reads it once
        self.reads += 1
        if self.reads == AtStep.step and AtStep.act is not None:
            AtStep.act()
        return int(signal.SIGTERM) if self.reads == AtStep.stop else 0


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> type[AtStep]:
    monkeypatch.setattr(pretrain, "Stop", AtStep)
    monkeypatch.setattr(AtStep, "step", 0)
    monkeypatch.setattr(AtStep, "stop", 0)
    monkeypatch.setattr(AtStep, "act", None)
    return AtStep


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the run's own directory -----------------------------------------------------------------------------------------


def stranger(out: Path) -> None:
    """Another run's directory under the name `out`."""
    (out / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", ".lock", "metrics.jsonl", "train.log", "checkpoints/step_00000002.pt", "checkpoints/manifest.json"):
        (out / name).write_text(f"{name} of another\n")


def moved(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def replaced(out: Path) -> None:
    moved(out)
    stranger(out)


def replaced_by_a_link(out: Path) -> None:
    moved(out)
    stranger(out.with_name("target"))
    out.symlink_to("target")


def emptied(out: Path) -> None:
    moved(out)
    out.mkdir()


def taken_over(out: Path) -> None:
    """Somebody removed the lock, and a second run holds a new one."""
    (out / ".lock").unlink()
    (out / ".lock").write_text("process 1 on elsewhere\n")


@pytest.mark.parametrize(("change", "step"), [(moved, 8), (replaced, 3), (replaced_by_a_link, 4), (emptied, 13), (taken_over, 3)])
def test_a_directory_that_is_another_gets_nothing(
    change: Callable[[Path], None], step: int, tiny_config: Path, tmp_path: Path, at_step: type[AtStep], capsys: pytest.CaptureFixture[str]
) -> None:
    out, after = tmp_path / "run", {}

    def act() -> None:
        change(out)
        after.update(content(out) if out.exists() else {})

    at_step.step, at_step.act = step, act
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", "epochs=2", "checkpoint.every_steps=2"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line and "another is in its place" in line and "fix: " in line
    assert (content(out) if out.exists() else {}) == after, "the other's files are as they were"
    at_step.act = None
    now = out if change is taken_over else tmp_path / "elsewhere"
    if change is taken_over:
        (out / ".lock").unlink()
    state, warnings = load_checkpoint(now / "checkpoints")
    assert (state is None or state["step"] < step) and not warnings
    if change is replaced:
        assert pretrain.main(["--resume", str(now)]) == 0, "it goes on where it went"


def test_a_lock_that_was_only_removed_ends_no_run(tiny_config: Path, tmp_path: Path, at_step: type[AtStep]) -> None:
    out = tmp_path / "run"
    at_step.step, at_step.act = 3, (out / ".lock").unlink
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", "epochs=2", "checkpoint.every_steps=2"]) == 0


def test_a_directory_moved_while_images_are_read_is_noticed(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    prepare = pretrain.prepare

    def slow(*arguments: object) -> object:
        replaced(out)
        return prepare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "prepare", slow)
    assert pretrain.main(["--config", str(tiny_config), f"out={out}"]) == 3
    assert (out / "config.yaml").read_text() == "config.yaml of another\n" and (out / ".lock").read_text() == ".lock of another\n"
