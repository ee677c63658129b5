"""What is on disk is whole, hashed and free of code."""

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_emp.errors import RunFailed, UserError
from ssl_emp.prune import Pruner
from ssl_emp.run.checkpoint import FORMAT, cannot_write, load_checkpoint, save_checkpoint
from ssl_emp.run.lock import is_unused, sole_writer
from ssl_emp.run.report import Report
from ssl_emp.run.state_check import check_state
from ssl_emp.safe_files import replacing


def state(value: float) -> dict[str, Any]:
    return {
        "weights": torch.full((100,), value),
        "step": int(value),
        "seconds": {"training": value},
        "batches": None,
    }


def test_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, state(step), step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.copy.json",
        "manifest.json",
        "step_00000002.pt",
        "step_00000010.pt",
    ]
    loaded, warnings = load_checkpoint(tmp_path)
    assert loaded is not None and not warnings
    assert (
        loaded["weights"].equal(torch.full((100,), 10.0))
        and loaded["seconds"] == {"training": 10.0}
        and loaded["batches"] is None
    )


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no hash"])
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), step)
    path = tmp_path / "step_00000002.pt"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        data = data[:-1]
    elif damage == "empty":
        data = bytearray()
    else:  # killed between the rename and the manifest
        (tmp_path / "step_00000003.pt").write_bytes(data)
        path = tmp_path / "step_00000003.pt"
    path.write_bytes(data)
    loaded, warnings = load_checkpoint(tmp_path)
    assert loaded is not None and loaded["step"] == (2 if damage == "no hash" else 1)
    assert len(warnings) == 1 and path.name in warnings[0]


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    (tmp_path / "step_00000001.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_checkpoint(tmp_path)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, state(1), 1)
    path = folder / "step_00000001.pt"
    for payload in (pickle.dumps(Evil(marker)), None):
        if payload is None:
            torch.save({"format": 1, "model": Evil(marker)}, path)
        else:
            path.write_bytes(payload)
        (folder / "manifest.json").write_text(
            json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
        )
        with pytest.raises(UserError):
            load_checkpoint(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # the control: this payload does run where it is let
    assert marker.exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(1), 1)

    def full(obj: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 768 vs 662")  # how torch.save reports a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFailed, match="cannot write"):
        save_checkpoint(tmp_path, state(2), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.copy.json",
        "manifest.json",
        "step_00000001.pt",
    ]
    loaded, warnings = load_checkpoint(tmp_path)
    assert loaded is not None and loaded["step"] == 1 and not warnings


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"format": 99}, 1)
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path)


def test_a_run_that_went_back_does_not_keep_the_damaged_future(tmp_path: Path) -> None:
    """After a fall back from step 9 to 6, two good checkpoints must exist again after two saves, and 9 must
    not count as one.
    """
    for step in (3, 6, 9):
        save_checkpoint(tmp_path, state(step), step)
    (tmp_path / "step_00000009.pt").write_bytes(b"damaged")
    for step in (7, 8):
        save_checkpoint(tmp_path, state(step), step)
    assert sorted(path.stem for path in tmp_path.glob("step_*.pt")) == ["step_00000007", "step_00000008"]
    (tmp_path / "step_00000008.pt").write_bytes(b"damaged")
    loaded, warnings = load_checkpoint(tmp_path)
    assert loaded is not None and loaded["step"] == 7 and len(warnings) == 1


def test_a_manifest_of_single_hashes_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    digest = hashlib.sha256((tmp_path / "step_00000001.pt").read_bytes()).hexdigest()
    (tmp_path / "manifest.copy.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({"step_00000001.pt": digest}))
    assert load_checkpoint(tmp_path)[0] is not None


def test_a_file_that_is_replaced_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"new, half")
        raise KeyError
    assert path.read_bytes() == b"old" and [found.name for found in tmp_path.iterdir()] == ["x"]
    with pytest.raises(OSError) as caught, replacing(tmp_path / "missing" / "x"):
        pass
    assert str(tmp_path / "missing") in str(caught.value.filename)


def test_a_name_is_given_to_what_is_on_disk_and_put_on_disk_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss cannot be had here; the order that survives it can: content synced, renamed, directory
    synced.
    """
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        done.append(("replace", str(old)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save_checkpoint(tmp_path, state(1), 1)
    files = [
        tmp_path / f".{name}.tmp" for name in ("manifest.json", "manifest.copy.json", "step_00000001.pt")
    ]
    assert done == [
        step
        for file in files
        for step in (("fsync", str(file)), ("replace", str(file)), ("fsync", str(tmp_path)))
    ]


def test_the_line_about_a_full_disk_says_how_much(tmp_path: Path) -> None:
    outer = RuntimeError("unexpected pos 768 vs 662")
    outer.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    line = str(cannot_write(tmp_path / "x", outer, 12_300_000))
    assert (
        "No space left on device" in line
        and "needs 12.3 MB" in line
        and "MB are free" in line
        and "768" not in line
    )
    assert "MB" not in str(
        cannot_write(tmp_path / "x", OSError(errno.EIO, os.strerror(errno.EIO)), 12_300_000)
    )


def test_what_does_not_fit_is_named() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    pruner = Pruner(5, batch_size=5, epochs=2, policy="none")  # an epoch is one step
    everyone = pruner.batches(0).flatten()
    pruner.observe(pruner.gather(everyone, torch.ones(5)))
    good: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pruner": pruner.state_dict(),
        "norms": None,
        "bad_in_a_row": torch.tensor(0),
        "epoch": 1,
        "step_in_epoch": 0,
        "step": 1,
        "finished": False,
        "seconds": {"training": 1.0},
        "config": {},
        "fingerprint": "x",
        "bf16": False,
        "threads": 1,
    }
    fresh = torch.optim.SGD(model.parameters(), momentum=0.9)

    def problem(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_state({"format": FORMAT, **good, **changes}, good, fresh, pruner, Path("run"))
        return str(caught.value)

    check_state({"format": FORMAT, "written_by": "x", **good}, good, fresh, pruner, Path("run"))
    assert "'more' is not known" in problem(more=1)
    record = good["pruner"]["record"]
    without = {name: value for name, value in record.items() if name != "last"}
    assert "record.last is missing" in problem(pruner=good["pruner"] | {"record": without})
    longer = record | {"last": torch.ones(2, 6)}
    assert "record.last is torch.float32 (2, 6) and should be torch.float32 (2, 5)" in problem(
        pruner=good["pruner"] | {"record": longer}
    )
    assert "model.bias is not finite" in problem(
        model={**good["model"], "bias": torch.tensor([1.0, torch.nan, 1.0])}
    )
    assert "model is of type int" in problem(model=3) and "model.bias is of type int" in problem(
        model={**good["model"], "bias": 3}
    )
    edited = {**optimizer.state_dict(), "state": {0: {"momentum_buffer": torch.ones(7)}}}
    assert (
        "optimizer.state.0.momentum_buffer is torch.float32 (7,) and should be torch.float32 (3, 2)"
        in problem(optimizer=edited)
    )


def test_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    assert is_unused(out)
    with sole_writer(out):
        assert is_unused(out)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), sole_writer(out):
            pass
        assert (out / ".lock").exists(), "the one that was refused must not take it away"
    assert not (tmp_path / "a").exists(), "what was made for nothing goes"
    out.mkdir(parents=True)
    for name in (".config.yaml.tmp", ".knn.json.123.tmp", "mine.tmp", ".lock"):
        (out / name).touch()
    assert not is_unused(out)
    with sole_writer(out):
        (out / "config.yaml").touch()
    assert sorted(path.name for path in out.iterdir()) == [".knn.json.123.tmp", "config.yaml", "mine.tmp"]
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        assert not is_unused(tmp_path / "file")
        with pytest.raises(UserError, match="cannot write into"), sole_writer(wrong):
            pass


def test_a_log_that_cannot_be_written_waits(tmp_path: Path) -> None:
    report = Report()
    (tmp_path / "train.log").mkdir()  # where the log should be
    report.attach(tmp_path)
    report.say("first")
    (tmp_path / "train.log").rmdir()
    (tmp_path / "train.log").write_text("cut off by a cra")
    report.say("second")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0] == "cut off by a cra" and [line[20:] for line in lines[1:]] == ["first", "second"]
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFailed, match="metrics.jsonl"):
        report.metrics({"epoch": 1})
