"""Crashes: a run that is killed, stopped or starved at any moment and started again ends bit for bit as if
nothing had happened.

"Bit for bit" is `rig.assert_same`: SHA-256 over the final checkpoint, encoder, samples and metrics, and the
loss in hex and the sorted samples of every step that was ever done. The first line of a docstring is `row |
injected fault | expected`.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inject
import pytest
import rig
import torch

from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.run.lock import is_unused, sole_writer

Record = Callable[[str, Any], None]
long = pytest.mark.faults
EVERY = 3
SAVES = f"checkpoint.every_steps={EVERY}"
STORE = ("data.store=encoded", f"data.cache_dir={rig.scratch() / 'cache'}")


def finish(out: Path, record: Path, *overrides: str) -> int:
    """Go on to the end, and compare. -> steps that had to be done twice."""
    result = rig.run(rig.go_on(out, SAVES, *overrides), record=record)
    assert result.rc == 0 and not result.stderr, result.stderr
    return rig.assert_same(out, record, *overrides)


@long
@pytest.mark.parametrize("number", range(20))
def test_A1_kill_at_random_moments(number: int, tmp_path: Path, record_property: Record) -> None:
    """A1 | SIGKILL at 1 to 3 random moments of each of 20 runs | each run, started again, ends bit-identical
    to an uninterrupted one
    """
    rig.reference()
    rng, out, record = random.Random(number), tmp_path / "run", tmp_path / "record"
    kills = killed = 0
    for _ in range(rng.randint(1, 3)):
        process = rig.start(rig.go_on(out, SAVES), record=record)
        time.sleep(rng.uniform(0, 1.2))
        alive = process.running()
        process.signal(signal.SIGKILL)
        kills += alive
        killed += process.end().rc == -signal.SIGKILL
    twice = finish(out, record)
    assert twice <= EVERY * kills, "more steps lost than lie between two saves"
    record_property("kills survived", f"{killed}/{kills}")
    record_property("steps lost per run", twice)


def save_in_a_child(folder: Path, fault: str, *saves: tuple[int, float]) -> int:
    """Fork; the child writes checkpoints with a fault in it. -> its wait status as an exit code."""
    pid = os.fork()
    if pid == 0:
        faults = inject.Faults(fault, str(folder.parent), None)
        inject.patch_files(faults)
        with sole_writer(folder.parent):
            for step, value in saves:
                save_checkpoint(folder, {"step": step, "weights": torch.full((5000,), value)}, step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("before", "saved"),
    [
        pytest.param([], (1, 1.0), id="first", marks=long),
        pytest.param([(1, 1.0)], (2, 2.0), id="second", marks=long),
        pytest.param([(1, 1.0), (2, 2.0)], (3, 3.0), id="third"),
        pytest.param([(1, 1.0)], (1, 9.0), id="the only one again"),
        pytest.param([(1, 1.0), (2, 2.0)], (2, 9.0), id="the newest again", marks=long),
    ],
)
def test_A2_kill_at_every_io_point_of_a_save(
    before: list[tuple[int, float]], saved: tuple[int, float], tmp_path: Path, record_property: Record
) -> None:
    """A2 | SIGKILL before and in the middle of every file operation of a save | what was saved before, or the
    new one, loads without a warning; no temporary file is left at the next start
    """
    point = 0
    while True:
        point += 1
        out = tmp_path / str(point)
        folder = out / "checkpoints"
        out.mkdir()
        for step, value in before:
            save_checkpoint(folder, {"step": step, "weights": torch.full((5000,), value)}, step)
        code = save_in_a_child(folder, f"io:{point}:kill", saved)
        state, warnings = load_checkpoint(folder)
        assert not warnings
        allowed = [*([before[-1]] if before else [None]), saved]
        assert (None if state is None else (state["step"], float(state["weights"].mean()))) in allowed
        with sole_writer(out):
            assert not list(out.rglob(".*.tmp"))
        if code == 0:
            assert state is not None and state["step"] == saved[0] and (state["weights"] == saved[1]).all()
            break
        assert code == -signal.SIGKILL
    assert point > 15, "the points were not found"
    record_property("kills survived", f"{point - 1}/{point - 1}")


# 3 steps, two saves, then the exports
SHORT = ("epochs=2", "batch_size=32", "prune.anneal_fraction=0", "checkpoint.every_steps=2")


def short_run_points() -> int:
    """How many file operations a short run has."""
    note = rig.scratch() / "points"
    if not note.exists():
        assert rig.run(rig.fresh(rig.scratch() / "all points", *SHORT), note=note).rc == 0
    return len(note.read_text().splitlines())


@long
@pytest.mark.parametrize("part", range(8))
def test_A2_kill_at_every_io_point_of_a_run(part: int, tmp_path: Path, record_property: Record) -> None:
    """A2 | SIGKILL before and in the middle of every file operation of a whole run, from the first folder to
    the last export | started again it ends bit-identical; no temporary file or lock is left
    """
    count, survived = 0, 0
    for point in range(1 + part, short_run_points() + 1, 8):
        out, record = tmp_path / f"run {point}", tmp_path / f"record {point}"
        assert rig.run(rig.fresh(out, *SHORT), f"io:{point}:kill", record=record).rc == -signal.SIGKILL
        count += 1
        result = rig.run(rig.go_on(out, *SHORT), record=record)
        assert result.rc == 0 and not result.stderr, (point, result.stderr)
        assert rig.assert_same(out, record, *SHORT) <= 2
        survived += 1
        shutil.rmtree(out)
    record_property("kills survived", f"{survived}/{count}")


POINTS = ["before_forward", "after_forward", "before_backward", "after_backward", "before_step", "after_step",
          "before_observe", "after_observe", "after_save"]  # fmt: skip
MOMENTS = [1, 2, rig.STEPS[0], rig.STEPS[0] + 1, rig.TOTAL]


@long
@pytest.mark.parametrize(("point", "step"), [(point, step) for point in POINTS for step in MOMENTS])
def test_A3_kill_at_named_points(point: str, step: int, tmp_path: Path, record_property: Record) -> None:
    """A3 | SIGKILL at 9 points of the step, in the first and second step, the last of an epoch, the first of
    the next, the last of all | bit-identical after --resume
    """
    out, record = tmp_path / "run", tmp_path / "record"
    every = "checkpoint.every_steps=1" if point == "after_save" else SAVES
    assert rig.run(rig.fresh(out, every), f"{point}:{step}:kill", record=record).rc == -signal.SIGKILL
    twice = finish(out, record)
    assert twice <= EVERY
    record_property("kills survived", "1/1")
    record_property("steps lost", twice)


def test_A4_two_kills_in_one_epoch(tmp_path: Path, record_property: Record) -> None:
    """A4 | SIGKILL at step 3 and, after a resume, at step 6 of one epoch | bit-identical"""
    out, record = tmp_path / "run", tmp_path / "record"
    assert (
        rig.run(rig.fresh(out, "checkpoint.every_steps=2"), "after_step:3:kill", record=record).rc
        == -signal.SIGKILL
    )
    assert (
        rig.run(rig.go_on(out, "checkpoint.every_steps=2"), "after_step:4:kill", record=record).rc
        == -signal.SIGKILL
    )
    assert [step for step, *_ in rig.steps_of(record)] == [1, 2, 3, 3, 4, 5, 6]
    assert finish(out, record) == 3, "steps 3, 5 and 6: the saves were at 2 and 4"
    record_property("kills survived", "2/2")


@long
@pytest.mark.parametrize(
    ("point", "count"), [(f"{when}_choose", n) for when in ("before", "after") for n in (2, 3, 4)]
)
def test_A5_kill_at_the_epoch_boundary(
    point: str, count: int, tmp_path: Path, record_property: Record
) -> None:
    """A5 | SIGKILL between two epochs, before and after the kept set is chosen | bit-identical: the same
    samples and learning rates
    """
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out, SAVES), f"{point}:{count}:kill", record=record).rc == -signal.SIGKILL
    done = [step for step, *_ in rig.steps_of(record)]
    assert done[-1] == sum(rig.STEPS[: count - 1])
    finish(out, record)
    record_property("kills survived", "1/1")


def test_A6_signals_from_outside(tmp_path: Path, record_property: Record) -> None:
    """A6 | SIGTERM, SIGKILL and SIGINT from outside in the middle of one run, resumed after each | SIGTERM
    and SIGINT: the step is finished and saved, exit codes 143 and 130, no step lost; after SIGKILL at most
    the steps since the last save are done again; bit-identical
    """
    # so many that the signals come in time
    out, record, epochs = tmp_path / "run", tmp_path / "record", "epochs=16"
    twice = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = len(rig.steps_of(record)) if record.exists() else 0
        process = rig.start(rig.go_on(out, epochs, SAVES), record=record)
        while not record.exists() or len(record.read_text().splitlines()) < before + 5:
            assert process.running()
            time.sleep(0.005)
        process.signal(number)
        result = process.end()
        assert result.rc == code and not result.stderr, result.stderr
        if number != signal.SIGKILL:
            assert "--resume" in result.stdout and rig.newest_step(out) == len(rig.steps_of(record)) - twice
            record_property(f"seconds from {number.name} to exit", round(result.seconds, 3))
        else:
            twice = len(rig.steps_of(record)) - rig.newest_step(out)
    assert finish(out, record, epochs) == twice <= EVERY
    record_property("steps lost", twice)


STOPS = {"term": {143}, "int": {130}, "hup": {129}, "usr1": {138, 143}}
TIMINGS = ["after_forward:4", "fsync_checkpoint:1", "after_choose:2"]


@long
@pytest.mark.parametrize(
    ("kind", "timing"),
    [(kind, timing) for kind in STOPS for timing in TIMINGS],
)
def test_A8_every_signal_at_three_moments(
    kind: str, timing: str, tmp_path: Path, record_property: Record
) -> None:
    """A8 | SIGTERM, SIGINT, SIGHUP, SIGUSR1, each within a step, within a save and between epochs | saved,
    its exit code, no step lost, bit-identical after --resume
    """
    out, record = tmp_path / "run", tmp_path / "record"
    result = rig.run(rig.fresh(out, SAVES), f"{timing}:{kind}", record=record)
    assert result.rc in STOPS[kind] and not result.stderr, (result.rc, result.stderr)
    assert rig.newest_step(out) == len(rig.steps_of(record)) < rig.TOTAL
    assert finish(out, record) == 0
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
@pytest.mark.parametrize("fault", rig.some(["after_forward:4:term;write_checkpoint:2:term"], [
    "after_forward:4:twice", "after_forward:4:term;write_checkpoint:2:term",
    "after_forward:4:term;fsync_checkpoint:1:int",
    "after_forward:4:term;replace_checkpoint:1:term"]))  # fmt: skip
def test_A8_a_second_signal(fault: str, tmp_path: Path, record_property: Record) -> None:
    """A8 | a second signal: at once, and in the middle of the save that the first one caused | the process is
    gone at once, no half file is ever loaded, bit-identical after --resume
    """
    out, record = tmp_path / "run", tmp_path / "record"
    result = rig.run(rig.fresh(out, SAVES), fault, record=record)
    assert result.rc in (-signal.SIGTERM, -signal.SIGINT, 143, 130) and "Traceback" not in result.stderr, (
        result.rc,
        result.stderr,
    )
    assert result.seconds < 2
    assert finish(out, record) <= EVERY
    record_property("kills survived", "1/1")
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
@pytest.mark.parametrize("cores", ["1", "2", "4"])
def test_A9_resume_with_other_decoding_threads(cores: str, tmp_path: Path) -> None:
    """A9 | JPEGs from a file: stopped with 2 decoding threads, resumed with 1, 2 and 4 (there are no worker
    processes) | bit-identical
    """
    rig.reference(*STORE)
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out, *STORE), "after_step:6:term", record=record, env={"CORES": "2"}).rc == 143
    result = rig.run(rig.go_on(out), record=record, env={"CORES": cores})
    assert result.rc == 0, result.stderr
    rig.assert_same(out, record, *STORE)


@long
def test_A9_resume_from_another_store(tmp_path: Path) -> None:
    """A9 | stopped with the pixels in memory, resumed with them in a raw file, and the other way round |
    bit-identical
    """
    raw = ("data.store=raw", f"data.cache_dir={rig.scratch() / 'cache'}")
    for name, first, second in (("a", (), raw), ("b", raw, ("data.store=memory",))):
        out, record = tmp_path / name, tmp_path / f"record {name}"
        assert rig.run(rig.fresh(out, *first), "after_step:6:term", record=record).rc == 143
        assert rig.run(rig.go_on(out, *second), record=record).rc == 0
        rig.assert_same(out, record)


@long
def test_A10_resume_of_a_finished_run(tmp_path: Path) -> None:
    """A10 | --resume of a run that is finished | exit code 0, "nothing to do", no file touched"""
    out = tmp_path / "run"
    before = rig.run(rig.fresh(out))
    after = rig.run(["--resume", str(out)])
    assert before.rc == after.rc == 0 and "nothing to do" in after.stdout and not after.stderr
    assert after.tree == before.tree != ""


@long
def test_A11_a_clock_that_jumps(tmp_path: Path) -> None:
    """A11 | the newest checkpoint gets the oldest modification time, the older one a time in the future | the
    step decides, not the clock; bit-identical
    """
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out, SAVES), "after_step:7:term", record=record).rc == 143
    older, newer = sorted(out.glob("checkpoints/step_*.pt"))
    os.utime(older, (4e9, 4e9))
    os.utime(newer, (0, 0))
    assert finish(out, record) == 0, "it went on from the older one"


@long
def test_A12_the_decoding_thread_fails(tmp_path: Path, record_property: Record) -> None:
    """A12 | the thread that decodes the next batches cannot read (there are no worker processes to kill) |
    one line with the cause, exit code 3, bit-identical after --resume
    """
    rig.reference(*STORE)
    out, record = tmp_path / "run", tmp_path / "record"
    result = rig.run(rig.fresh(out, SAVES, *STORE), "gather:5:eio", record=record)
    rig.assert_one_line(result, 3, os.strerror(errno.EIO))
    finish(out, record, *STORE)
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
def test_A12_the_decoding_thread_meets_a_damaged_file(tmp_path: Path) -> None:
    """A12 | the file of JPEGs is damaged between two parts of a run | one line with the file and what to do;
    after that, bit-identical
    """
    store = ("data.store=encoded", f"data.cache_dir={tmp_path / 'cache'}")
    out, record = tmp_path / "run", tmp_path / "record"
    assert rig.run(rig.fresh(out, *store), "after_step:6:term", record=record).rc == 143
    (file,) = (tmp_path / "cache").glob("*.jpegs")
    with open(file, "r+b") as opened:
        opened.write(b"no JPEG" * 50)
    rig.assert_one_line(rig.run(rig.go_on(out), record=record), 2, "damaged", str(file))
    file.unlink()
    finish(out, record, *store)


@long
def test_A13_out_of_memory_in_a_step(tmp_path: Path, record_property: Record) -> None:
    """A13 | torch cannot allocate memory in a step | one line with what to lower, exit code 3, the last
    checkpoint is intact, bit-identical after --resume
    """
    out, record = tmp_path / "run", tmp_path / "record"
    result = rig.run(rig.fresh(out, SAVES), "after_forward:8:oom", record=record)
    rig.assert_one_line(result, 3, "memory", "batch_size")
    finish(out, record)
    record_property("seconds from fault to exit", round(result.seconds, 3))


@long
def test_A13_a_memory_limit(tmp_path: Path) -> None:
    """A13 | the process may have 1.5 GB more than it starts with (ulimit -v), the batch needs more | one line
    with what to lower, exit code 3
    """
    out = tmp_path / "run"
    started = int(Path(f"/proc/{rig.server().process.pid}/statm").read_text().split()[0]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    overrides = [
        "model.width=512",
        "model.stem=cifar",
        "batch_size=64",
        "prune.policy=none",
        "augment.size=64",
    ]
    result = rig.run(rig.fresh(out, *overrides), limits={"RLIMIT_AS": started + 1_500_000_000}, timeout=120)
    rig.assert_one_line(result, 3, "memory", "batch_size")


@long
@pytest.mark.parametrize("policy", ["loss", "foresight", "epsilon_greedy", "ucb"])
def test_A14_kills_within_epochs_under_other_scores(
    policy: str, tmp_path: Path, record_property: Record
) -> None:
    """A14 | SIGKILL within each of two pruned epochs, under the policies whose score is one of the stored
    terms | bit-identical, the figures of the epochs that were cut in two included
    """
    out, record, chosen = tmp_path / "run", tmp_path / "record", f"prune.policy={policy}"
    for count in (2, 3):
        inside = sum(rig.STEPS[: count - 1]) + 2 - rig.newest_step(out)
        assert (
            rig.run(rig.go_on(out, SAVES, chosen), f"after_step:{inside}:kill", record=record).rc
            == -signal.SIGKILL
        )
    finish(out, record, chosen)
    record_property("kills survived", "2/2")


@long
def test_a_plain_process_gives_the_same_exit_codes(tmp_path: Path) -> None:
    """control | no forked process: `python pretrain.py` as a person types it, with and without --resume | the
    exit codes of the forked ones, one line of error
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(rig.ROOT / "pretrain.py")]
    wrong = subprocess.run(
        [*command, "--resume", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (
        wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and wrong.stderr.startswith("error: ")
    ), wrong.stderr
    assert is_unused(tmp_path)
