"""What is on disk is whole, hashed and free of code."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_emp.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.errors import RunFailed, UserError


def state(value: float) -> dict[str, Any]:
    return {"weights": torch.full((100,), value), "step": int(value), "seconds": {"training": value}, "batches": None}


def test_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, state(step), step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step_00000002.pt", "step_00000010.pt"]
    loaded, warnings = load_checkpoint(tmp_path)
    assert loaded is not None and not warnings
    assert loaded["weights"].equal(torch.full((100,), 10.0)) and loaded["seconds"] == {"training": 10.0} and loaded["batches"] is None


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
        (folder / "manifest.json").write_text(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest()}))
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step_00000001.pt"]
    loaded, warnings = load_checkpoint(tmp_path)
    assert loaded is not None and loaded["step"] == 1 and not warnings


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"format": 99}, 1)
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path)
