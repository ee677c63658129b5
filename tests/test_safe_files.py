"""A run directory may be somebody else's: nothing is written through a link in it, and what is read is looked
at first.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_emp.commands import evaluate, pretrain
from ssl_emp.commands.samples_table import read_samples
from ssl_emp.errors import UserError
from ssl_emp.model import build_encoder, load_encoder, save_encoder
from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.run.lock import sole_writer
from ssl_emp.run.report import Report, write_samples
from ssl_emp.safe_files import check_own, inner_folder, open_own, read_bytes, read_json, read_text, replacing

APPENDED = ["train.log", "metrics.jsonl"]
WRITTEN = ["config.yaml", "environment.json", "result.json", "checkpoints/manifest.json"]
WRITTEN += ["encoder/model.safetensors", "encoder/config.json", "pruning/samples.parquet"]
PRECIOUS = b"my precious notes\n"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of ours beside a stranger's run directory; no test may change it."""
    path = tmp_path / "victim.txt"
    path.write_bytes(PRECIOUS)
    yield path
    assert path.read_bytes() == PRECIOUS


def strange(path: Path, kind: str, victim: Path) -> None:
    """What is not what its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "link":
            path.symlink_to(victim)
        case "link to nothing":
            path.symlink_to(victim.with_name("made by the link"))
        case "link to itself":
            path.symlink_to(path)
        case "second name":
            os.link(victim, path)
        case "pipe":
            os.mkfifo(path)
        case "device":
            if os.geteuid():
                pytest.skip("only root makes devices")
            os.mknod(path, 0o20666, os.makedev(1, 3))
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            try:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
            finally:
                os.chdir(here)


KINDS = ["link", "link to nothing", "link to itself", "pipe", "device", "socket"]


@pytest.mark.parametrize("kind", [*KINDS, "second name"])
@pytest.mark.parametrize("name", [".lock", *APPENDED, *WRITTEN])
def test_a_strange_file_is_refused_before_anything_is_written(
    tmp_path: Path, victim: Path, name: str, kind: str
) -> None:
    out = tmp_path / "run"
    strange(out / name, kind, victim)
    before = sorted(path.name for path in out.rglob("*"))
    if kind == "second name" and name in WRITTEN:  # replaced as a whole: the other name keeps what it has
        with sole_writer(out):
            pass
        return
    began = time.monotonic()
    with pytest.raises(UserError) as caught, sole_writer(out):
        pass
    assert name.rpartition("/")[2] in str(caught.value) and "remove it: rm " in str(caught.value)
    assert time.monotonic() - began < 5 and sorted(path.name for path in out.rglob("*")) == before
    assert not (tmp_path / "made by the link").exists()


@pytest.mark.parametrize("kind", [*KINDS, "second name"])
def test_a_strange_checkpoint_is_passed_over_and_replaced(tmp_path: Path, victim: Path, kind: str) -> None:
    """Its target is neither read as a checkpoint nor written: `victim` is compared at the end."""
    folder = tmp_path / "run" / "checkpoints"
    with sole_writer(tmp_path / "run"):
        save_checkpoint(folder, {"step": 1}, 1)
    strange(folder / "step_00000002.pt", kind, victim)
    with sole_writer(tmp_path / "run"):
        state, warnings = load_checkpoint(folder)
        assert state is not None and state["step"] == 1
        assert len(warnings) == 1 and "step_00000002.pt is damaged" in warnings[0]
        save_checkpoint(folder, {"step": 2}, 2)
    state, warnings = load_checkpoint(folder)
    assert state is not None and state["step"] == 2 and not warnings
    assert not (tmp_path / "made by the link").exists()


@pytest.mark.parametrize("part", ["checkpoints", "encoder", "pruning"])
def test_a_folder_that_is_a_link_is_refused_and_nothing_there_is_removed(tmp_path: Path, part: str) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / ".mine.tmp").touch()
    (out / part).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{part} is a link to another place"), sole_writer(out):
        pass
    writes = {
        "checkpoints": lambda: save_checkpoint(out / "checkpoints", {"a": 1}, 1),
        "pruning": lambda: write_samples(
            out / "pruning" / "samples.parquet", ["a"], {"score": torch.zeros(1)}
        ),
        "encoder": lambda: inner_folder(out, "encoder"),
    }
    with pytest.raises(UserError, match=f"{part} is a link to another place"):
        writes[part]()
    assert [path.name for path in elsewhere.iterdir()] == [".mine.tmp"]


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    with sole_writer(tmp_path / "run"):
        report = Report(silent=False)
        report.attach(tmp_path / "run")
        report.say("hello")
        save_checkpoint(tmp_path / "run" / "checkpoints", {"a": 1}, 1)
    assert "hello" in (tmp_path / "scratch" / "train.log").read_text()
    assert (tmp_path / "scratch" / "checkpoints" / "step_00000001.pt").is_file()


@pytest.mark.parametrize("kind", [*KINDS, "second name"])
def test_a_file_that_became_strange_meanwhile_is_not_written(tmp_path: Path, victim: Path, kind: str) -> None:
    """The look at the start is not the only one."""
    report = Report()
    report.attach(tmp_path)
    for name, write in (
        ("train.log", lambda: report.say("x")),
        ("metrics.jsonl", lambda: report.metrics({"epoch": 1})),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        strange(tmp_path / name, kind, victim)
        with pytest.raises(UserError, match=name):
            write()
        with pytest.raises(UserError):
            check_own(tmp_path / name)


@pytest.mark.parametrize("mode", ["a+b", "r+b"])
def test_an_own_file_is_opened(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with open_own(path, mode) as file:
        file.seek(0, os.SEEK_END)
        file.write(b" and new")
    assert path.read_bytes() == b"old and new"
    with pytest.raises(IsADirectoryError):
        open_own(tmp_path, mode)


@pytest.mark.parametrize("kind", [*KINDS, "second name"])
def test_the_temporary_sibling_is_made_anew(tmp_path: Path, victim: Path, kind: str) -> None:
    strange(tmp_path / ".x.tmp", kind, victim)
    strange(tmp_path / "x", kind, victim)
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert (
        (tmp_path / "x").read_bytes() == b"new"
        and not (tmp_path / "x").is_symlink()
        and not (tmp_path / ".x.tmp").exists()
    )


# ---- reading


@pytest.mark.parametrize(
    "kind", ["pipe", "device", "socket", "link to nothing", "link to itself", "folder", "missing"]
)
def test_only_regular_files_are_read(tmp_path: Path, victim: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    else:
        strange(path, kind, victim)
    with pytest.raises(UserError, match="x"):
        read_bytes(path)


def test_a_link_to_a_file_is_read_as_hubs_make_them(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "x").symlink_to(victim)
    assert read_bytes(tmp_path / "x") == PRECIOUS and read_text(tmp_path / "x").encode() == PRECIOUS


def test_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        read_bytes(tmp_path / "x")
    with pytest.raises(UserError, match="is not a regular file"):
        read_bytes("/dev/zero")


@pytest.mark.parametrize(
    "text", ["[NaN]", '{"a": -Infinity}', "[" * 100_000, "", "{", b"\xff\xfe", "9" * 10_000 + "x"]
)
def test_what_is_no_json_is_one_error(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "x").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="x is not"):
        read_json(tmp_path / "x")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "encoder"
    save_encoder(build_encoder("resnet18", 8, "cifar", 16, [0.5] * 3, [0.2] * 3), folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**9},
        {"width": 512},
        {"width": "8"},
        {"width": -8},
        {"arch": "__class__"},
        {"arch": ["resnet18"]},
        {"stem": "x\x1b[2J"},
        {"image_size": 10**12},
        {"image_size": 1.5},
        {"mean": [0.5]},
        {"mean": ["a", "b", "c"]},
        {"mean": [float("nan")] * 3},
        {"std": [0.0] * 3},
        {"std": None},
    ],
)
def test_an_encoder_is_built_once_its_description_was_looked_at(
    encoder_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = json.loads((encoder_folder / "config.json").read_text())
    values["ssl_emp"] |= changes
    (tmp_path / "model.safetensors").write_bytes((encoder_folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values))
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_encoder(tmp_path)
    assert str(caught.value).isprintable() and time.monotonic() - began < 10


@pytest.mark.parametrize("damage", ["shape", "kind", "name", "header", "pipe", "config list", "config text"])
def test_weights_are_compared_with_the_network_before_they_are_read(
    encoder_folder: Path, tmp_path: Path, damage: str
) -> None:
    weights, values = (
        load_file(encoder_folder / "model.safetensors"),
        json.loads((encoder_folder / "config.json").read_text()),
    )
    if damage == "shape":
        weights["conv1.weight"] = torch.zeros(8, 3, 5, 5)
    elif damage == "kind":
        weights["conv1.weight"] = weights["conv1.weight"].to(torch.int32)
    elif damage == "name":
        weights["\x1b[2Jmore"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    if damage == "header":
        (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    elif damage == "pipe":
        (tmp_path / "model.safetensors").unlink()
        os.mkfifo(tmp_path / "model.safetensors")
    text = {"config list": "[]", "config text": "ssl_emp"}.get(damage, json.dumps(values))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_encoder(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "kind",
    [
        "good",
        "number names",
        "text scores",
        "lists",
        "no times",
        "nulls",
        "twice",
        "long name",
        "many rows",
        "no table",
    ],
)
def test_a_table_of_samples_is_what_a_run_writes(tmp_path: Path, kind: str) -> None:
    path, count = tmp_path / "samples.parquet", 50
    columns: dict[str, Any] = {
        "name": [f"a/{number}" for number in range(count)],
        "score": pa.array([0.5] * count, pa.float32()),
    }
    columns["times_trained"] = pa.array([3] * count, pa.int32())
    match kind:
        case "number names":
            columns["name"] = list(range(count))
        case "text scores":
            columns["score"] = ["1.0"] * count
        case "lists":
            columns["times_trained"] = [[1]] * count
        case "no times":
            del columns["times_trained"]
        case "nulls":
            columns["name"] = [None] * count
        case "long name":
            columns["name"] = ["x" * 100_000] * count
        case "many rows":
            columns = {
                name: pa.chunked_array([pa.array([values[0]] * 400_000, pa.array(values).type)])
                for name, values in columns.items()
            }
    table = pa.table(columns)
    if kind == "twice":
        table = table.append_column("score", table["score"])
    pq.write_table(table, path)
    if kind == "no table":
        path.write_bytes(b"PAR1" + b"\xff" * 200 + b"PAR1")
    if kind == "good":
        assert read_samples(path)["name"].to_pylist()[:2] == ["a/0", "a/1"]
        return
    with pytest.raises((ValueError, pa.ArrowException, OSError, KeyError)):
        read_samples(path)


# ---- an evaluation of a stranger's run


@pytest.fixture(scope="module")
def made_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("strangers") / "run"
    keys = [f"out={out}", "epochs=1", "prune.policy=none", "monitor.knn_every=0"]
    assert pretrain.main(["--config", str(tiny_config), *keys]) == 0
    return out


@pytest.fixture
def stranger(made_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, for a stranger to pack."""
    return Path(shutil.copytree(made_run, tmp_path / "run"))


KNN = ["knn", "knn.num_neighbors=3", "cache_dir=null", "device=cpu"]


@pytest.mark.parametrize("which", ["eval", "eval/.rows.lock", "eval/random", "eval/knn.json"])
def test_an_evaluation_writes_through_no_link(
    stranger: Path, victim: Path, which: str, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = victim.parent / "elsewhere"
    elsewhere.mkdir()
    is_file = which.rpartition("/")[2] in (".rows.lock", "knn.json")
    (stranger / which).parent.mkdir(exist_ok=True)
    (stranger / which).symlink_to(victim if is_file else elsewhere)
    code = evaluate.main([str(stranger), "random", *KNN])
    said = capfd.readouterr().err
    assert not list(elsewhere.iterdir())
    if which == "eval/knn.json":  # replaced by a file, or refused: what it led to stays
        return
    assert code == 2 and "is a link to another place" in said, said


def test_a_resume_touches_nothing_outside(
    stranger: Path, victim: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (stranger / "train.log").unlink()
    (stranger / "train.log").symlink_to(victim)
    assert pretrain.main([f"--resume={stranger}"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "train.log is a link to another place" in said
