"""Storage that fails: full, slow to free, read-only, gone, or used by two at once. The last good checkpoint
always survives.

The first line of a docstring is `row | injected fault | expected`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig
import torch
from PIL import Image

from ssl_emp.data.images import fingerprint, load_images
from ssl_emp.errors import UserError
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.lock import sole_writer

Record = Callable[[str, Any], None]
long = pytest.mark.faults
EVERY = "checkpoint.every_steps=3"
NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, a checkpoint of the tiny run takes 1.5 MB of it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk up to `leave` bytes. -> the file to remove."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    with open(ballast, "ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - leave, 1))
    return ballast


def checkpoint_is_good(out: Path, step: int) -> None:
    state, warnings = load_checkpoint(out / "checkpoints")
    assert state is not None and state["step"] == step and not warnings
    assert not list(out.rglob(".*.tmp")), "temporary files are left"


def finish(out: Path, record: Path) -> int:
    result = rig.run(rig.go_on(out), record=record)
    assert result.rc == 0 and not result.stderr, result.stderr
    return rig.assert_same(out, record)


def test_C1_full_disk_in_a_save(small_disk: Path, tmp_path: Path, record_property: Record) -> None:
    """C1 | the disk (8 MiB) is full when the second checkpoint is written | exit code 3, one line with what
    is needed and what is free, the checkpoint before loads, no temporary file; with room again
    bit-identical
    """
    out, record = small_disk / "run", tmp_path / "record"
    ballast = fill(small_disk, 2_400_000)
    result = rig.run(rig.fresh(out, EVERY), record=record)
    rig.assert_one_line(result, 3, "cannot write", "No space left", "MB are free", "make room")
    needed, free = map(float, re.findall(r"([\d.]+) MB", result.stderr))
    assert 1 < needed < 2 and free < needed, result.stderr
    checkpoint_is_good(out, 3)
    ballast.unlink()
    assert finish(out, record) == 3, "steps 4 to 6"
    record_property("steps lost", 3)


@long
@pytest.mark.parametrize("size", [20_000, 700_000, 1_500_000])
def test_C1_a_limit_on_file_sizes(size: int, tmp_path: Path) -> None:
    """C1 | no file may be larger than so many bytes (ulimit -f), which stops the next save near its begin,
    within and near its end | exit code 3, one line, no temporary file; without the limit bit-identical
    """
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out), "after_step:3:term", record=record).rc == 143
    (out / "train.log").unlink()
    result = rig.run(rig.go_on(out, EVERY), record=record, limits={"RLIMIT_FSIZE": size})
    rig.assert_one_line(result, 3, "File too large")
    checkpoint_is_good(out, 3)
    (out / "train.log").touch()
    finish(out, record)


@long
def test_C1_full_at_every_write(small_disk: Path, tmp_path: Path, record_property: Record) -> None:
    """C1 | the disk fills up at every point of a whole run: 0 to 7.5 MB are left, in steps of 500 kB | each
    time one line and exit code 2 or 3, or success; with room again bit-identical
    """
    seen = []
    for number, leave in enumerate([*range(0, 8_000_000, 500_000), 10_000, 3_000]):
        out, record = small_disk / "run", tmp_path / f"record {number}"
        ballast = fill(small_disk, leave)
        result = rig.run(rig.fresh(out, EVERY), record=record)
        seen.append(result.rc)
        if result.rc:
            rig.assert_one_line(result, result.rc, "No space left")
            assert result.rc in (2, 3)
        assert not list(small_disk.rglob(".*.tmp"))
        ballast.unlink()
        if not record.exists():
            record.touch()
        finish(out, record)
        shutil.rmtree(out)
    assert seen.count(3) > 3 and 0 in seen, seen
    record_property("full disks survived", f"{len(seen)}/{len(seen)}")


@long
def test_C2_full_disk_in_the_logs(small_disk: Path, tmp_path: Path) -> None:
    """C2 | the disk is full when log lines are written, a sibling has filled it | no half line in train.log
    or metrics.jsonl; exit code 3 at the first metrics that would be lost; with room again bit-identical
    """
    out, record = small_disk / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out), "after_step:3:term", record=record).rc == 143
    # up to the last byte of a page: the next line begins in it and does not fit
    for name in ("train.log", "metrics.jsonl"):
        path = out / name
        old = path.read_bytes() if path.exists() else b""
        line = json.dumps({"epoch": 0, "x": ""})
        room = 4096 - 10 - (len(old) % 4096) - len(line) - 1
        path.write_bytes(old + (json.dumps({"epoch": 0, "x": "." * room}) + "\n").encode())
        assert path.stat().st_size % 4096 == 4086
    before = {name: (out / name).read_bytes() for name in ("train.log", "metrics.jsonl")}
    result = rig.run(rig.go_on(out), "after_step:2:fill", record=record)
    rig.assert_one_line(result, 3, "metrics.jsonl", "No space left")
    assert (out / "metrics.jsonl").read_bytes() == before["metrics.jsonl"], "a half line"
    assert (out / "train.log").read_bytes().startswith(before["train.log"]) and (
        out / "train.log"
    ).read_text().endswith("\n")
    (small_disk / "ballast").unlink()
    result = rig.run(rig.go_on(out), record=record)
    assert result.rc == 0, result.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    rig.assert_same(out, record)


@long
@pytest.mark.parametrize("events", [False, pytest.param(True, marks=long)])
def test_C2_full_for_the_log_alone(events: bool, tmp_path: Path) -> None:
    """C2 | every write to train.log fails with a full disk, then so does every TensorBoard event | the run
    goes on to its end, exit code 0
    """
    out, record = tmp_path / "run", tmp_path / "record"
    (out / "train.log").parent.mkdir()
    overrides = ["monitor.tensorboard=true"] if events else []
    process = rig.start(
        rig.fresh(out, *overrides),
        "write_log:0:enospc" + (";write_events:0:enospc" if events else ""),
        record=record,
    )
    result = process.end()
    assert result.rc == 0 and not result.stderr, result.stderr
    rig.assert_same(out, record)


@long
@pytest.mark.parametrize("reader", ["gone", "full"])
def test_C2_a_console_that_fails(reader: str, tmp_path: Path) -> None:
    """C2 | the reader of the output leaves after one line (`| head -1`); the output goes to a full disk
    (/dev/full) | the run goes on to its end, exit code 0, train.log has every line
    """
    out = tmp_path / "run"
    command = [sys.executable, str(rig.INJECT), *rig.fresh(out, "epochs=2")]
    with open("/dev/full", "w") as full:
        output = subprocess.PIPE if reader == "gone" else full
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, env=environment) as process:
            if process.stdout is not None:
                process.stdout.readline()
                process.stdout.close()
            assert process.stderr is not None
            said = process.stderr.read().decode()
            assert process.wait(timeout=60) == 0 and not said, said
    assert "done" in (out / "train.log").read_text() and "epoch 2/2" in (out / "train.log").read_text()


def no_place(kind: str, tmp_path: Path) -> tuple[Path, int]:
    """An out directory that cannot be, and the user to be."""
    closed = tmp_path / "closed"
    closed.mkdir()
    if kind == "on a file":
        (tmp_path / "file").write_text("mine")
        return tmp_path / "file", 0
    if kind == "below a file":
        (tmp_path / "file").write_text("mine")
        return tmp_path / "file" / "run", 0
    if kind == "not permitted":
        closed.chmod(0o555)
        return closed / "run", 0 if os.geteuid() else NOBODY
    if kind == "read-only":
        return Path("/proc/run"), 0
    if kind == "too long":
        return closed / ("x" * 300), 0
    (closed / "thesis.tex").write_text("mine")
    return closed, 0


@pytest.mark.parametrize(
    "kind",
    rig.some(
        ["not permitted"], ["on a file", "below a file", "not permitted", "read-only", "too long", "in use"]
    ),
)
def test_C3_no_place_to_write(kind: str, tmp_path: Path, record_property: Record) -> None:
    """C3 | out is a file, below a file, not permitted, on a read-only file system, 300 letters long, or full
    of other things | one line and exit code 2 before the images are read, nothing changed
    """
    out, user = no_place(kind, tmp_path)
    if user:
        rig.open_to_all(tmp_path)
    before = rig.tree_hash(tmp_path)
    result = rig.run(rig.fresh(out, "data.source=/no/such/images"), user=user)
    assert "/no/such/images" not in result.stderr, "the images were looked for first"
    fix = "longer than a path can be" if kind == "too long" else "out=DIR"
    rig.assert_one_line(result, 2, str(out)[:50], fix)
    assert rig.tree_hash(tmp_path) == before and result.seconds < 5
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
def test_C3_a_parent_that_is_missing(tmp_path: Path) -> None:
    """C3 | out lies in folders that are not there yet; and a mistake in the config comes with it | they are
    made; with the mistake, nothing is left of them
    """
    out = tmp_path / "a" / "b" / "run"
    rig.assert_one_line(rig.run(rig.fresh(out, "data.source=/no/such/images")), 2, "/no/such/images")
    assert not (tmp_path / "a").exists()
    assert rig.run(rig.fresh(out, "epochs=1")).rc == 0


@pytest.mark.parametrize(
    "point",
    rig.some(
        ["after_step:5"],
        ["after_step:5", "after_step:10", "after_choose:3", "before_save:2", "after_step:26"],
    ),
)
def test_C4_out_is_removed_during_the_run(point: str, tmp_path: Path, record_property: Record) -> None:
    """C4 | the run directory is removed in a step, between epochs, before a save, after the last step | exit
    code 3, one line, no half directory comes back
    """
    out = tmp_path / "run"
    result = rig.run(rig.fresh(out, EVERY), f"{point}:clear")
    rig.assert_one_line(result, 3, str(out))
    assert not out.exists(), list(out.rglob("*"))
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
@pytest.mark.parametrize("number", range(10))
def test_C5_two_runs_in_one_directory(number: int, tmp_path: Path, record_property: Record) -> None:
    """C5 | a second run is started in the same directory, at the same moment or up to 1 s later, new or with
    --resume, 10 times | it ends with one line that names the other's process, exit code 2; the first is
    bit-identical
    """
    rig.reference()
    out = tmp_path / "run"
    records = [tmp_path / "record 0", tmp_path / "record 1"]
    first = rig.start(rig.fresh(out), record=records[0])
    if number >= 3:
        while not (out / "config.yaml").exists():
            assert first.running()
            time.sleep(0.005)
    time.sleep((0, 0.005, 0.02, 0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)[number] if number else 0)
    second = rig.start(rig.go_on(out), record=records[1])
    results = [first.end(), second.end()]
    if results[0].rc == 0 and results[1].rc == 0:
        # the first was through before the second began
        assert "nothing to do" in results[1].stdout, "both wrote"
    else:
        winner = 0 if results[0].rc == 0 else 1
        assert results[winner].rc == 0, [result.stderr for result in results]
        assert winner == 0 or number < 3
        rig.assert_one_line(results[1 - winner], 2, "in use by process", str((first, second)[winner].pid))
        assert not records[1 - winner].exists() or not records[1 - winner].read_text(), "it took a step"
        records[0] = records[winner]
    rig.assert_same(out, records[0])
    record_property(
        "second runs "
        + ("refused" if any(result.rc == 2 for result in results) else "that found it finished"),
        1,
    )


@long
def test_C5_the_lock_of_a_dead_process(tmp_path: Path) -> None:
    """C5 | the lock of a process that was killed lies there, with its number; so does one of a number that is
    in use again | taken over without a word, bit-identical
    """
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out, EVERY), "after_step:5:kill", record=record).rc == -signal.SIGKILL
    assert (out / ".lock").exists()
    (out / ".lock").write_text(f"process {os.getpid()} on this very machine\n")
    assert finish(out, record) == 2


def test_C5_a_folder_that_goes_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C5 | its last owner removes the folder between the two looks of mkdir; a file stands there for good |
    taken; one line
    """
    mkdir, turns = Path.mkdir, iter([True])

    def between(self: Path, *arguments: object, **keys: object) -> None:
        if next(turns, False):
            raise FileExistsError(17, "File exists")
        mkdir(self, *arguments, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", between)
    with sole_writer(tmp_path / "run") as held:
        assert held.is_ours()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into .*file"), sole_writer(tmp_path / "file"):
        pass


def test_C5_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    """C5 | 4 threads, 200 turns each: the lock of a folder that comes and goes is asked for all the time |
    never two have it
    """
    inside, worst, taken = 0, 0, 0

    def ask() -> None:
        nonlocal inside, worst, taken
        for _ in range(200):
            try:
                with sole_writer(tmp_path / "a" / "run"):
                    inside += 1
                    worst, taken = max(worst, inside), taken + 1
                    time.sleep(0.0001)
                    inside -= 1
            except UserError as error:
                assert "in use" in str(error), error

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1 and taken > 10


@pytest.mark.parametrize(("point", "kind"), rig.some([], [
    (f"{operation}_checkpoint:2", kind)
    for operation in ("open", "fsync", "replace") for kind in ("eio", "enospc", "eacces", "erofs")
] + [("write_checkpoint:14", "eio"), ("write_checkpoint:14", "enospc")]))  # fmt: skip
def test_C7_a_file_operation_of_a_save_fails(
    point: str, kind: str, tmp_path: Path, record_property: Record
) -> None:
    """C7 | open, write, fsync or rename of the second checkpoint fails with an I/O error, a full disk, no
    permission, a read-only disk | exit code 3, one line, the checkpoint before loads, no temporary file;
    later bit-identical
    """
    out, record = tmp_path / "run", tmp_path / "record"
    result = rig.run(rig.fresh(out, EVERY), f"{point}:{kind}", record=record)
    rig.assert_one_line(result, 3, "cannot write", "step_00000006.pt", "intact")
    checkpoint_is_good(out, 3)
    finish(out, record)
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace", "mkdir", "unlink"])
def test_C7_every_file_operation_of_a_run_fails_once(
    operation: str, tmp_path: Path, record_property: Record
) -> None:
    """C7 | every open, write, fsync, rename, mkdir and unlink of a whole run fails once with an I/O error,
    each in a run of its own | exit code 0, 2 or 3, at most one line, never a traceback; later
    bit-identical
    """
    short = ("epochs=2", "batch_size=32", "prune.anneal_fraction=0", "checkpoint.every_steps=2")
    note, codes = tmp_path / "note", []
    assert rig.run(rig.fresh(tmp_path / "all", *short), note=note).rc == 0
    for number in range(
        1, sum(line.startswith(operation + " ") for line in note.read_text().splitlines()) + 1
    ):
        out, record = tmp_path / f"run {number}", tmp_path / f"record {number}"
        result = rig.run(rig.fresh(out, *short), f"{operation}:{number}:eio", record=record)
        codes.append(result.rc)
        if result.rc:
            assert result.rc in (2, 3), (number, result.stderr)
            rig.assert_one_line(result, result.rc)
            assert not list(out.rglob(".*.tmp")), number
            again = rig.run(rig.go_on(out, *short), record=record)
            assert again.rc == 0, (number, again.stderr)
        if operation == "unlink":  # the lock's own removal among them: free, for nobody holds it
            (out / ".lock").unlink(missing_ok=True)
        rig.assert_same(out, record, *short)
        shutil.rmtree(out)
    assert 3 in codes or operation in ("mkdir", "unlink")
    record_property("failing file operations survived", f"{len(codes)}/{len(codes)}")


@long
def test_C8_temporary_files_are_siblings(tmp_path: Path) -> None:
    """C8 | TMPDIR does not exist, the run directory is on another file system than /tmp | every renamed file
    was written in the folder where it ends; the run succeeds
    """
    shm = Path("/dev/shm")
    out = (shm if os.access(shm, os.W_OK) else tmp_path) / f"faults-{os.getpid()}" / "run"
    note = tmp_path / "note"
    try:
        result = rig.run(
            rig.fresh(out, "epochs=2"), note=note, env={"TMPDIR": "/no/such/folder", "TMP": "/no/such/folder"}
        )
        assert result.rc == 0, result.stderr
    finally:
        shutil.rmtree(out.parent, ignore_errors=True)
    renamed = [
        line.removeprefix("replace ") for line in note.read_text().splitlines() if line.startswith("replace ")
    ]
    assert len(renamed) >= 8 and all(
        Path(name).name.startswith(".") and name.endswith(".tmp") for name in renamed
    ), renamed
    assert {str(Path(name).parent) for name in renamed} == {".", "checkpoints", "encoder", "pruning"}


@long
def test_C8_a_hundred_thousand_files(tmp_path: Path, record_property: Record) -> None:
    """C8 | 100,000 other files lie in the run directory's checkpoints | resumed, bit-identical, in less than
    20 s
    """
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out), "after_step:5:term", record=record).rc == 143
    for number in range(100_000):
        os.close(os.open(out / "checkpoints" / f"other {number}", os.O_CREAT))
    result = rig.run(rig.go_on(out, EVERY), record=record)
    assert result.rc == 0 and result.seconds < 20, result.stderr
    rig.assert_same(out, record)
    assert len(os.listdir(out / "checkpoints")) == 100_000 + 4, "they are somebody's"
    record_property("seconds", round(result.seconds, 1))


@pytest.mark.parametrize("store", ["raw", "encoded"])
def test_C9_a_cache_that_is_only_readable(store: str, small_disk: Path, tmp_path: Path) -> None:
    """C9 | the file of pixels lies on a file system that has become read-only; then it is missing there |
    read, nothing opened for writing, same pixels and fingerprint; where it is missing, one line that names
    cache_dir
    """
    (tmp_path / "in").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number:02d}.png")
    (tmp_path / "in/bad.png").write_bytes(b"")
    options: dict[str, Any] = {"store": store, "cache_dir": str(small_disk / "cache")}
    first = load_images(str(tmp_path / "in"), **options)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    again = load_images(str(tmp_path / "in"), **options)
    assert (
        torch.equal(again.pixels[:], first.pixels[:])
        and again.names == first.names
        and fingerprint(again) == fingerprint(first)
    )
    assert again.skipped == first.skipped == [("bad.png", "empty file")]
    with pytest.raises(UserError, match="Read-only file system.*cache_dir"):
        load_images(str(tmp_path / "in"), image_size=15, **options)
