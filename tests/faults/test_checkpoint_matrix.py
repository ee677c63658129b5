"""Bad checkpoints: damaged ones are found and passed over, foreign ones refused in one line, and none of them
runs code.

The first line of a docstring is `row | injected fault | expected`.
"""

import collections
import functools
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig
import torch
from conftest import striped_images

from ssl_emp.commands import evaluate
from ssl_emp.errors import UserError
from ssl_emp.prune import Pruner
from ssl_emp.run.checkpoint import FORMAT, MANIFESTS, load_checkpoint, save_checkpoint
from ssl_emp.run.state_check import check_state

Record = Callable[[str, Any], None]
long = pytest.mark.faults


def two_saves(folder: Path) -> Path:
    """Checkpoints of steps 1 and 2; -> the newer one."""
    for step in (1, 2):
        save_checkpoint(folder, {"step": step, "weights": torch.arange(200.0) + step, "nothing": None}, step)
    return folder / "step_00000002.pt"


@functools.cache
def stopped() -> Path:
    """A tiny run that was stopped at step 10, with checkpoints of steps 9 and 10, and all labels in place."""
    out = rig.scratch() / "stopped"
    assert (
        rig.run(
            rig.fresh(out, "checkpoint.every_steps=9"),
            "after_step:10:term",
            record=rig.scratch() / "stopped record",
        ).rc
        == 143
    )
    return out


def copy_of_stopped(place: Path) -> tuple[Path, Path]:
    """-> (run directory, record of its steps), to damage."""
    shutil.copytree(stopped(), place / "run")
    shutil.copy(rig.scratch() / "stopped record", place / "record")
    return place / "run", place / "record"


def sign(path: Path) -> None:
    """Enter a file into the manifests as it is now: what someone does who edits a checkpoint on purpose."""
    for name in MANIFESTS:
        manifest = path.with_name(name)
        digests = json.loads(manifest.read_text()) if manifest.exists() else {}
        manifest.write_text(
            json.dumps(digests | {path.name: [hashlib.sha256(path.read_bytes()).hexdigest()]})
        )


SHARES = [0, 0.01, 0.5, 0.99, 0.9999]


@pytest.mark.parametrize("share", SHARES)
def test_B1_truncated(share: float, tmp_path: Path, record_property: Record) -> None:
    """B1 | the newest checkpoint is cut at 0, 1, 50, 99 and 99.99 % of its length; then the other one too |
    the one before is used with one warning; with none left, one line and exit code 2
    """
    newest = two_saves(tmp_path)
    for path, step in ((newest, 1), (tmp_path / "step_00000001.pt", None)):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        if step:
            state, warnings = load_checkpoint(tmp_path)
            assert (
                state is not None
                and state["step"] == step
                and len(warnings) == 1
                and path.name in warnings[0]
            )
    with pytest.raises(UserError, match="no usable checkpoint among 2"):
        load_checkpoint(tmp_path)
    record_property("truncations found", "2/2")


@long
def test_B1_truncated_in_a_run(tmp_path: Path) -> None:
    """B1 | a stopped run whose newest checkpoint is cut to a half | --resume goes on from the one before with
    one warning line, bit-identical
    """
    out, record = copy_of_stopped(tmp_path)
    newest = out / "checkpoints" / "step_00000010.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    result = rig.run(rig.go_on(out), record=record)
    assert (
        result.rc == 0
        and not result.stderr
        and result.stdout.count("warning:") == 1
        and newest.name in result.stdout
    )
    assert rig.assert_same(out, record) == 1, "step 10 once more"


@long
def test_B2_flipped_bytes(tmp_path: Path, record_property: Record) -> None:
    """B2 | one byte of a real checkpoint is changed, at 200 random places, each time anew | found 200 times
    of 200, the one before is used with one warning
    """
    out, _ = copy_of_stopped(tmp_path)
    path = out / "checkpoints" / "step_00000010.pt"
    data, rng, found = bytearray(path.read_bytes()), random.Random(0), 0
    for _ in range(200):
        place, bit = rng.randrange(len(data)), rng.randrange(1, 256)
        data[place] ^= bit
        path.write_bytes(data)
        data[place] ^= bit
        state, warnings = load_checkpoint(out / "checkpoints")
        found += state is not None and state["step"] == 9 and len(warnings) == 1
    record_property("flipped bytes found", f"{found}/200")
    assert found == 200
    path.write_bytes(data)
    state, warnings = load_checkpoint(out / "checkpoints")
    assert state is not None and state["step"] == 10 and not warnings, "the control: as it was"


@pytest.mark.parametrize("name", MANIFESTS)
def test_B2_flipped_bytes_of_a_manifest(name: str, tmp_path: Path, record_property: Record) -> None:
    """B2 | one bit of every byte of a manifest is changed, each time anew; or the manifest is gone, empty, or
    no dictionary | the newest checkpoint still loads: the other copy knows it
    """
    two_saves(tmp_path)
    path = tmp_path / name
    data, survived = path.read_bytes(), 0
    damaged = [data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] for place in range(len(data))]
    for content in (*damaged, b"", b"[1]", b"{", b'{"step_00000002.pt": 7}', b"\xff"):
        path.write_bytes(content)
        state, warnings = load_checkpoint(tmp_path)
        survived += state is not None and state["step"] == 2 and not warnings
    record_property("damaged manifests survived", f"{survived}/{len(damaged) + 5}")
    assert survived == len(damaged) + 5


class Call:
    """Unpickles by calling `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def evil(kind: str, path: Path, marker: Path) -> None:
    """Write an attack of this kind to `path`: where it is run, `marker` appears."""
    touch = f"open({str(marker)!r}, 'w').close()"
    call = {
        "os.system": Call(os.system, f"touch '{marker}'"),
        "eval": Call(eval, f"__import__('io').{touch}"),
        "exec": Call(exec, touch),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "open": Call(open, str(marker), "w"),
        "shutil.copy": Call(shutil.copy, __file__, str(marker)),
        "plain pickle": Call(os.system, f"touch '{marker}'"),
        "in the optimizer": Call(os.system, f"touch '{marker}'"),
        "in the scores": Call(exec, touch),
        "as a key": Call(os.system, f"touch '{marker}'"),
    }[kind]
    good: dict[str, Any] = {
        "format": FORMAT,
        "step": 3,
        "model": {"w": torch.ones(3)},
        "optimizer": {"state": {}},
        "pruner": {"record": {"last": torch.ones(3)}},
    }
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({**good, "model": call}))
        return
    parts: dict[str, dict[str, Any]] = {
        "in the optimizer": {"optimizer": {"state": {0: {"momentum_buffer": call}}}},
        "in the scores": {"pruner": {"record": {"last": [[call]]}}},
        "as a key": {"model": collections.OrderedDict({"w": torch.ones(3)}) | {"x": {0: call}}},
    }
    torch.save({**good, **parts.get(kind, {"model": call})}, path)


KINDS = [
    "os.system",
    "eval",
    "exec",
    "subprocess",
    "open",
    "shutil.copy",
    "plain pickle",
    "in the optimizer",
    "in the scores",
    "as a key",
]


def test_B3_pickles_that_run_code(tmp_path: Path, record_property: Record) -> None:
    """B3 | ten kinds of checkpoint that run code when they are unpickled, with the right hash in the manifest
    | none of them is run, none is used
    """
    executed = refused = works = 0
    for number, kind in enumerate(KINDS):
        folder, marker = tmp_path / str(number), tmp_path / f"executed {number}"
        folder.mkdir()
        path = folder / "step_00000001.pt"
        evil(kind, path, marker)
        sign(path)
        with pytest.raises(UserError, match="no usable checkpoint"):
            load_checkpoint(folder)
        refused += 1
        executed += marker.exists()
        works += (ran := runs_where_it_may(path, marker))
        assert ran, kind
    record_property("pickles executed", executed)
    record_property("pickles refused", f"{refused}/{len(KINDS)}")
    assert executed == 0
    assert works == len(KINDS), "the control: every one of them runs where it is let"


def runs_where_it_may(path: Path, marker: Path) -> bool:
    """The control: the same file, read by someone careless."""
    with suppress(Exception), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # what it unpickles to, a file left open, is nobody's business
        patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        torch.load(path, weights_only=False)
    deadline = time.monotonic() + 5  # some of them start a process
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return marker.exists()


@long
def test_B3_pickles_under_other_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    """B3 | the same as prune.indices=x.npy of pretrain.py, and as encoder/model.safetensors of a run for
    evaluate.py | none is run, one line, exit code 2
    """
    marker = tmp_path / "executed"
    np.save(
        tmp_path / "x.npy", np.array([Call(os.system, f"touch '{marker}'")], dtype=object), allow_pickle=True
    )
    result = rig.run(
        rig.fresh(tmp_path / "run", "prune.policy=indices", f"prune.indices={tmp_path / 'x.npy'}")
    )
    rig.assert_one_line(result, 2, "x.npy")
    encoder = tmp_path / "other" / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(
        json.dumps(
            {
                "ssl_emp": dict(
                    arch="resnet18", width=8, stem="cifar", image_size=16, mean=[0] * 3, std=[1] * 3
                )
            }
        )
    )
    evil("os.system", encoder / "model.safetensors", marker)
    assert_evaluate_refuses(str(tmp_path / "other"), capsys)
    assert not marker.exists()
    record_property("pickles executed", int(marker.exists()))


def assert_evaluate_refuses(path: str, capsys: pytest.CaptureFixture[str]) -> float:
    """evaluate.py with this path: one line, exit code 2. -> the seconds it took."""
    began = time.monotonic()
    assert evaluate.main([path, "knn"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "fix: " in lines[0], lines
    return time.monotonic() - began


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> None:
    """The archive `source` with its parts changed, as `target`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for part in old.infolist():
            new.writestr(zipfile.ZipInfo(part.filename), change(part.filename, old.read(part)), method)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("zip bomb", marks=long),
        "a billion numbers declared",
        "one storage, a billion views of it",
        "parts that overlap",
    ],
)
def test_B4_bombs(kind: str, tmp_path: Path, record_property: Record) -> None:
    """B4 | a zip bomb of 1 GB, a tensor of a billion numbers that are not there, a billion numbers from one,
    overlapping parts; hashes right | refused in one line, less than 500 MB of memory
    """
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_checkpoint(folder, {"step": 1, "weights": torch.ones(16)}, 1)
    path = folder / "step_00000001.pt"
    source = Path(shutil.copy(path, tmp_path / "source.pt"))
    if kind == "zip bomb":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
            zipfile.ZipFile(source) as old,
        ):
            for part in old.infolist():
                info = zipfile.ZipInfo(part.filename)
                info.compress_type = zipfile.ZIP_DEFLATED
                with new.open(info, "w") as entry:
                    for _ in range(1024 if part.filename.endswith("data/0") else 0):
                        entry.write(bytes(2**20))
                    entry.write(old.read(part))
        assert path.stat().st_size < 1e7
    elif kind == "a billion numbers declared":
        number = 10**9  # where the pickle says 16: of the storage, and of the size
        rewritten(
            source,
            path,
            lambda name, data: (
                data.replace(b"K\x10", b"J" + number.to_bytes(4, "little")) if name.endswith(".pkl") else data
            ),
        )
    elif kind == "one storage, a billion views of it":
        save_checkpoint(folder, {**MINIMAL, "model": {"w": torch.ones(1).expand(10**9)}}, 1)
    else:
        data = bytearray(path.read_bytes())
        names = [part for part in zipfile.ZipFile(path).infolist()]
        first, second = names[0], next(part for part in names if part.filename.endswith("data/0"))
        # its entry in the table at the end: the same place as another part's
        where = data.rindex(second.filename.encode()) - 46
        # compressed and plain size: two gigabytes
        data[where + 20 : where + 28] = (2**31).to_bytes(4, "little") * 2
        data[where + 42 : where + 46] = first.header_offset.to_bytes(4, "little")
        path.write_bytes(data)
    sign(path)
    kilobytes, said = in_a_child(lambda: load_and_check(folder))
    record_property("megabytes more", round(int(kilobytes) / 1000))
    assert int(kilobytes) < 500_000 and said == "refused", (kilobytes, said)


def load_and_check(folder: Path) -> tuple[str, str]:
    """-> (kilobytes of memory that it took at its peak, what came of it)."""
    start, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "accepted"
    try:
        state, _ = load_checkpoint(folder)
        assert state is not None
        like = {**state, "model": {"w": torch.ones(1)}}
        pruner = Pruner(5, batch_size=5, epochs=2, policy="none")
        check_state(state, like, torch.optim.SGD(torch.nn.Linear(1, 1).parameters()), pruner, folder)
    except UserError as error:  # what is fine has no pruner in it either, but that is looked at later
        said = str(error) if "pruner" in str(error) else "refused"
    return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start), said


def in_a_child(function: Callable[[], tuple[str, str]]) -> list[str]:
    """What `function` gives in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, "\n".join(function()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0
    return said


MINIMAL: dict[str, Any] = {
    "step": 1,
    "pruner": {},
    "norms": None,
    "bad_in_a_row": torch.tensor(0),
    "epoch": 0,
    "step_in_epoch": 0,
    "finished": False,
    "fingerprint": "",
    "bf16": False,
    "threads": 1,
    "config": {},
    "seconds": {},
    "optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]},
}

OTHER_CONFIGS = {
    "model.width=16": ("model.width", "8", "16"),
    "model.projection_dim=32": ("model.projection_dim", "16", "32"),
    "temperature=0.2": ("temperature", "0.5", "0.2"),
    "batch_size=16": ("batch_size", "8", "16"),
    "prune.fraction=0.3": ("prune.fraction", "0.4", "0.3"),
    "data.source=elsewhere": ("data.source", "elsewhere"),
}


@long
@pytest.mark.parametrize("override", list(OTHER_CONFIGS))
def test_B5_another_config(override: str, tmp_path: Path) -> None:
    """B5 | --resume with another width, projection, temperature, batch, pruned share or data set | one line
    that names the key and both values, exit code 2, nothing changed
    """
    out, _ = copy_of_stopped(tmp_path)
    before = rig.tree_hash(out)
    result = rig.run(["--resume", str(out), override])
    rig.assert_one_line(result, 2, *OTHER_CONFIGS[override])
    assert result.tree == before


@long
@pytest.mark.parametrize("change", ["one more", "one less", "renamed"])
def test_B6_other_images(change: str, tmp_path: Path) -> None:
    """B6 | --resume after an image came, went or was renamed: scores belong to positions | one line, exit
    code 2, nothing changed; with the images as they were, bit-identical
    """
    images, record, out = tmp_path / "images", tmp_path / "record", tmp_path / "run"
    images.mkdir()
    for number, data in enumerate(striped_images(64)[0]):
        (images / f"{number:03}.png").write_bytes(data)
    source = f"data.source={images}"
    assert rig.run(rig.fresh(out, source), "after_step:3:term", record=record).rc == 143
    before = rig.tree_hash(out)
    kept = shutil.copytree(images, tmp_path / "kept")
    if change == "one more":
        shutil.copy(images / "000.png", images / "0005.png")
    elif change == "one less":
        (images / "063.png").unlink()
    else:
        (images / "063.png").rename(images / "064.png")
    result = rig.run(rig.go_on(out))
    rig.assert_one_line(result, 2, "images", str(images))
    assert result.tree == before
    shutil.rmtree(images)
    shutil.copytree(kept, images)
    assert rig.run(rig.go_on(out), record=record).rc == 0
    rig.assert_same(out, record, source)


def drop(*path: str) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return change


def sick(state: Any) -> None:
    name = next(name for name in state["model"] if name.endswith("weight"))
    state["model"][name][0] = float("nan")


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no model": (drop("model"), "model"),
    "no scores": (drop("pruner"), "pruner"),
    "no position": (drop("step_in_epoch"), "step_in_epoch"),
    "one more entry": (put(1, "more"), "more"),
    "one more weight": (put(torch.ones(3), "model", "more"), "model.'more'"),
    "scores too long": (put(torch.ones(2, 65), "pruner", "record", "last"), "record.last"),
    "scores of another type": (
        put(torch.ones(64), "pruner", "record", "times_trained"),
        "record.times_trained",
    ),
    "optimizer of another shape": (
        put(torch.ones(5), "optimizer", "state", 0, "momentum_buffer"),
        "momentum_buffer",
    ),
    "weights not a number": (sick, "not finite"),
    "model is a list": (put([1, 2], "model"), "model"),
}


@pytest.mark.parametrize("edit", rig.some(["scores too long"], list(EDITS)))
def test_B8_a_checkpoint_that_does_not_fit(edit: str, tmp_path: Path) -> None:
    """B8 | a checkpoint with a missing or additional entry, a wrong shape, length or type, weights that are
    not numbers; hash right | one line that names the entry, exit code 2, nothing changed
    """
    out, _ = copy_of_stopped(tmp_path)
    path = out / "checkpoints" / "step_00000010.pt"
    state = torch.load(path, weights_only=True)
    change, named = EDITS[edit]
    change(state)
    torch.save(state, path)
    sign(path)
    before = rig.tree_hash(out)
    result = rig.run(["--resume", str(out)])
    rig.assert_one_line(result, 2, named)
    assert result.tree == before


@long
@pytest.mark.parametrize("version", [FORMAT - 1, FORMAT + 1, None])
def test_B9_another_format(version: int | None, tmp_path: Path) -> None:
    """B9 | a checkpoint of an older format, of a newer one, of none | one line with both versions, exit code
    2, nothing changed
    """
    out, _ = copy_of_stopped(tmp_path)
    path = out / "checkpoints" / "step_00000010.pt"
    state = torch.load(path, weights_only=True)
    state["format"], state["written_by"] = version, "ssl_emp 7.7"
    torch.save(state, path)
    sign(path)
    before = rig.tree_hash(out)
    result = rig.run(["--resume", str(out)])
    rig.assert_one_line(result, 2, "ssl_emp 7.7", f"format {version}", f"format {FORMAT}", "this is ssl_emp")
    assert result.tree == before


def strange(kind: str, place: Path) -> Path:
    """A path that is no run."""
    if kind == "empty directory":
        place.mkdir()
    elif kind == "text file":
        place.write_text("not a run")
    elif kind == "optimizer only":
        torch.save({"optimizer": {"state": {}}}, place)
    elif kind == "symlink to /dev/zero":
        place.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "encoder that is a pipe":
        (place / "encoder").mkdir(parents=True)
        os.mkfifo(place / "encoder" / "config.json")
        os.mkfifo(place / "encoder" / "model.safetensors")
    elif kind == "encoder that is /dev/zero":
        (place / "encoder").mkdir(parents=True)
        (place / "encoder" / "config.json").write_text("{}")
        (place / "encoder" / "model.safetensors").symlink_to("/dev/zero")
    return place


STRANGE = ["missing", "empty directory", "text file", "optimizer only", "symlink to /dev/zero", "pipe",
           "encoder that is a pipe", "encoder that is /dev/zero"]  # fmt: skip


@pytest.mark.parametrize("kind", rig.some(["pipe"], STRANGE))
def test_B10_paths_that_are_no_run(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    """B10 | evaluate.py and --resume given a directory, a text file, an optimizer alone, a link to /dev/zero,
    a pipe | one line, exit code 2, in less than 5 seconds
    """
    path = strange(kind, tmp_path / "x")
    seconds = assert_evaluate_refuses(str(path), capsys)
    result = rig.run(["--resume", str(path)], timeout=10)
    rig.assert_one_line(result, 2)
    assert max(seconds, result.seconds) < 5
    record_property("seconds from fault to exit", round(max(seconds, result.seconds), 3))


@long
@pytest.mark.parametrize("kind", ["pipe", "symlink to /dev/zero", "empty directory"])
def test_B10_checkpoints_that_are_no_files(kind: str, tmp_path: Path) -> None:
    """B10 | a pipe, a link to /dev/zero, a directory in the place of the newest checkpoint of a stopped run |
    passed over with one warning, bit-identical; no endless read
    """
    out, record = copy_of_stopped(tmp_path)
    path = out / "checkpoints" / "step_00000010.pt"
    path.unlink()
    strange(kind, path)
    result = rig.run(rig.go_on(out), record=record, timeout=30)
    assert not result.hung and result.rc == 0 and result.stdout.count("warning:") == 1, (
        result.rc,
        result.stderr,
    )
    if path.is_dir():
        path.rmdir()
    rig.assert_same(out, record)
