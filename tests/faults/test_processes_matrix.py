"""Group D of the fault matrix: several processes. No rank waits for ever, none goes on alone, and one line
says what happened.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_emp.prune.plan import PrunePlan, shuffled_batches
from ssl_emp.prune.policies import select_kept
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
ONE_RANK = Path(__file__).parent / "one_rank.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
Note = Callable[[str, object], None]


def start(script: Sequence[str | Path], *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    } | variables
    words = [str(word) for word in (*script, *arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(words, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()  # a hang is a failure, and leaves nobody behind
    return process.returncode, out, err


def pretrain(*arguments: str | Path) -> tuple[int, str, str]:
    return finish(start([sys.executable, ROOT / "pretrain.py"], *arguments))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def children(process: subprocess.Popen[str]) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has_step(run: Path, step: int) -> bool:
    return any(int(path.stem[5:]) >= step for path in (run / "checkpoints").glob("step_*.pt"))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, which must be one of a finished run."""
    state, warnings = load_checkpoint(run / "checkpoints")
    assert state is not None and state["finished"] and not warnings
    flat: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat[name] = value
        for key, inner in value.items() if isinstance(value, dict) else ():
            walk(f"{name}/{key}", inner)

    walk("", state)
    return flat


def same_bits(a: Path, b: Path) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def error_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def uninterrupted(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes from end to end."""
    out = tmp_path_factory.mktemp("two") / "run"
    code, _, err = pretrain("--config", tiny_config, f"out={out}", "devices=2", "epochs=8")
    assert code == 0 and not error_lines(err), err
    return out


def begin(tiny_config: Path, out: Path, step: int, *arguments: str) -> subprocess.Popen[str]:
    """A run of two processes that is past its step `step`."""
    process = start(
        [sys.executable, ROOT / "pretrain.py"],
        "--config",
        tiny_config,
        f"out={out}",
        "devices=2",
        "epochs=8",
        *arguments,
    )
    wait_for(lambda: has_step(out, step) or process.poll() is not None)
    assert process.poll() is None
    return process


def test_D1_every_rank_gets_as_many() -> None:
    """D1 | every n in 1..64, 1 to 3 ranks, batches of 6 and 12, s = 0, 0.3, 0.7 | equal shapes on all ranks,
    nobody twice, nobody lost
    """
    for n in range(1, 65):
        for batch_size in (6, 12):
            for fraction in (0.0, 0.3, 0.7):
                steps = PrunePlan(4, fraction, 1, 0.0).epoch_steps(n, batch_size)
                for epoch, count in enumerate(steps):
                    if count == 0:
                        continue  # refused at the start
                    batches = shuffled_batches(
                        select_kept(torch.arange(n).float(), count * batch_size), batch_size, 0, epoch
                    )
                    for world_size in (1, 2, 3):
                        parts = [Ranks(rank, world_size).part(batches) for rank in range(world_size)]
                        assert {part.shape for part in parts} == {(count, batch_size // world_size)}
                        assert (
                            torch.cat(parts, 1).equal(batches) and len(batches.unique()) == count * batch_size
                        )


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_D2_a_rank_is_killed(
    rank: int, tiny_config: Path, uninterrupted: Path, tmp_path: Path, record_property: Note
) -> None:
    """D2 | kill -9 of rank 0 or rank 1 in the midst of training | nobody hangs, one line names it, code 3,
    resume is bit-identical
    """
    process = begin(tiny_config, tmp_path / "run", 5, "checkpoint.every_steps=1")
    (other,) = children(process)
    began = time.monotonic()
    os.kill(other if rank else process.pid, signal.SIGKILL)
    code, _, err = finish(process, 30)
    wait_for(lambda: not is_alive(other), 30)
    record_property("seconds", round(time.monotonic() - began, 1))
    assert code == (3 if rank else -9)
    (line,) = error_lines(err)
    assert f"rank {rank} is lost" in line and "--resume" in line
    code, _, err = pretrain("--resume", tmp_path / "run")
    assert code == 0, err
    assert same_bits(tmp_path / "run", uninterrupted)


@pytest.mark.faults
def test_D3_a_rank_hangs(tiny_config: Path, tmp_path: Path, record_property: Note) -> None:
    """D3 | SIGSTOP of rank 1, timeout_seconds=4 | after the timeout and 5 s of grace one line names it, code
    3
    """
    process = begin(tiny_config, tmp_path / "run", 3, "checkpoint.every_steps=1", "timeout_seconds=4")
    (other,) = children(process)
    began = time.monotonic()
    os.kill(other, signal.SIGSTOP)
    try:
        process.wait(40)
        seconds = time.monotonic() - began
    finally:
        with suppress(ProcessLookupError):  # rank 0 ended it
            os.kill(other, signal.SIGCONT)  # it holds the pipes open
    code, _, err = finish(process, 40)
    record_property("seconds", round(seconds, 1))
    assert code == 3 and 4 < seconds < 14
    (line,) = error_lines(err)
    assert "rank 1 is lost" in line
    wait_for(lambda: not is_alive(other), 30)
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] is not None


@pytest.mark.faults
def test_D3_the_first_rank_hangs(tiny_config: Path, tmp_path: Path, record_property: Note) -> None:
    """D3b | SIGSTOP of rank 0, timeout_seconds=4 | rank 1 names it and ends it, and neither is there any
    more; the last checkpoint is intact
    """
    process = begin(tiny_config, tmp_path / "run", 3, "checkpoint.every_steps=1", "timeout_seconds=4")
    (other,) = children(process)
    began = time.monotonic()
    process.send_signal(signal.SIGSTOP)
    code, _, err = finish(process, 60)
    record_property("seconds", round(time.monotonic() - began, 1))
    wait_for(lambda: not is_alive(other), 30)
    (line,) = error_lines(err)
    assert code == -signal.SIGKILL and "rank 0 is lost" in line and "--resume" in line
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] is not None


@pytest.mark.faults
def test_D15_a_rank_dies_while_starting(tiny_config: Path, tmp_path: Path) -> None:
    """D15 | kill -9 of rank 1 as soon as it is there | rank 0 names it and the signal at once, code 3,
    nothing left behind
    """
    process = start(
        [sys.executable, ROOT / "pretrain.py"],
        "--config",
        tiny_config,
        f"out={tmp_path / 'run'}",
        "devices=2",
    )
    found: list[int] = []

    def started() -> bool:
        """Whether rank 1 is there; an import of rank 0 may ask a program of the system something too."""
        for child in children(process):
            with suppress(OSError):
                found.extend(
                    [child] if b"SSL_EMP_LAUNCHED=" in Path(f"/proc/{child}/environ").read_bytes() else []
                )
        return bool(found)

    wait_for(started)
    os.kill(found[0], signal.SIGKILL)
    code, _, err = finish(process, 50)  # torch's import; it would be a minute more until nobody else came
    (line,) = error_lines(err)
    assert (
        code == 3
        and "rank 1 was lost while starting (killed by SIGKILL)" in line
        and not (tmp_path / "run").exists()
    )


@pytest.mark.faults
def test_D16_one_machine_listens_to_itself(tiny_config: Path, tmp_path: Path) -> None:
    """D16 | the ports of a run of two processes | all are on the loopback interface"""
    process = begin(tiny_config, tmp_path / "run", 1, "checkpoint.every_steps=1", "epochs=60")
    try:
        for pid in (process.pid, *children(process)):
            sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
            tables = [
                Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")
            ]
            rows = [line.split() for table in tables for line in table]
            addresses = {
                row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
            }
            assert addresses == {"0100007F"}
    finally:
        process.terminate()
    assert finish(process, 60)[0] == 143


@pytest.mark.faults
def test_D17_python_without_srun(tiny_config: Path, tmp_path: Path) -> None:
    """D17 | python in a batch script of four tasks; mpirun -n 2; RANK=0 WORLD_SIZE=1 | a line that names
    srun, one that names torchrun; runs alone
    """
    arguments: list[str | Path] = [
        sys.executable,
        ROOT / "pretrain.py",
        "--config",
        tiny_config,
        f"out={tmp_path / 'run'}",
        "epochs=2",
    ]
    batch = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "1",
    }
    for variables, word in ((batch, "srun"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "torchrun")):
        code, _, err = finish(start(arguments, **variables), 50)
        (line,) = error_lines(err)
        assert code == 2 and word in line.partition("fix: ")[2] and not (tmp_path / "run").exists()
    code, _, err = finish(start(arguments, RANK="0", WORLD_SIZE="1"))
    assert code == 0 and not error_lines(err), err


@pytest.mark.faults
def test_D4_ranks_that_disagree(tiny_config: Path, tmp_path: Path) -> None:
    """D4 | one score differs by 1e-6 on rank 1 | noticed before the next epoch, epoch and rank named,
    code 3
    """
    code, _, err = finish(
        start(
            [sys.executable, ONE_RANK, "scores", "1"],
            "--config",
            tiny_config,
            f"out={tmp_path / 'run'}",
            "devices=2",
        )
    )
    (line,) = error_lines(err)
    assert code == 3 and "rank 1 and rank 0 disagree about the samples of epoch 3" in line


@pytest.mark.faults
def test_D5_not_a_number_on_one_rank(tiny_config: Path, tmp_path: Path) -> None:
    """D5 | the loss of rank 1 is NaN in step 6 | both ranks skip it, and stay equal to the end"""
    run = tmp_path / "run"
    code, out, err = finish(
        start([sys.executable, ONE_RANK, "nan", "1"], "--config", tiny_config, f"out={run}", "devices=2")
    )
    assert code == 0 and not error_lines(err), err
    assert "epoch 1: 1 step was skipped for a loss or gradient that is not finite, the first is step 6" in out
    assert all(
        tensor.isfinite().all()
        for name, tensor in tensors(run).items()
        if "/model" in name or "/optimizer" in name
    )


def test_D6_one_rank_cannot_go_on(tiny_config: Path, tmp_path: Path) -> None:
    """D6 | the images are unreadable on rank 1 only | one line that names the rank and the file, code 2,
    nothing left behind
    """
    began = time.monotonic()
    code, _, err = finish(
        start(
            [sys.executable, ONE_RANK, "file", "1"],
            "--config",
            tiny_config,
            f"out={tmp_path / 'run'}",
            "devices=2",
        ),
        60,
    )
    (line,) = error_lines(err)
    assert code == 2 and line == "error: rank 1: images/7.jpg is a text file. fix: remove it"
    assert "Traceback" not in err and not (tmp_path / "run").exists() and time.monotonic() - began < 50


@pytest.mark.faults
def test_D6_a_bug_on_one_rank(tiny_config: Path, tmp_path: Path) -> None:
    """D6b | an exception of the program on rank 1 only | its traceback once, and one line of rank 0 that
    names it, code 3
    """
    code, _, err = finish(
        start(
            [sys.executable, ONE_RANK, "raise", "1"],
            "--config",
            tiny_config,
            f"out={tmp_path / 'run'}",
            "devices=2",
        ),
        60,
    )
    (line,) = error_lines(err)
    assert (
        code == 3 and "rank 1: ZeroDivisionError: a bug on one rank" in line and err.count("Traceback") == 1
    )


@pytest.mark.faults
def test_D8_as_one_process(tiny_config: Path, tmp_path: Path, record_property: Note) -> None:
    """D8 | the whole run in float64, five epochs, as one process and as two | the same samples kept, weights
    equal within 1e-3
    """
    arguments: list[str | Path] = ["--config", tiny_config, "prune.scoring=pruned", "monitor.knn_every=0"]
    for devices in (1, 2):
        run: list[str | Path] = [sys.executable, ONE_RANK, "double", "0"]
        code, _, err = finish(start(run, *arguments, f"out={tmp_path / str(devices)}", f"devices={devices}"))
        assert code == 0, err
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert (
        one["/pruner/record/times_trained"].equal(two["/pruner/record/times_trained"])
        and len(one["/pruner/record/times_trained"].unique()) > 2
    )
    largest = max(
        float((one[name].double() - two[name].double()).abs().max()) for name in one if "/model" in name
    )
    record_property("largest difference of a weight", f"{largest:.0e}")
    assert largest < 1e-3
    torch.testing.assert_close(one["/pruner/record/last"], two["/pruner/record/last"], rtol=1e-3, atol=1e-3)


@pytest.mark.faults
def test_D9_a_mistake_is_told_once(tiny_config: Path, tmp_path: Path) -> None:
    """D9 | a typo in the configuration under torchrun | its line once"""
    code, _, err = finish(
        start(
            [*TORCHRUN, ROOT / "pretrain.py"], "--config", tiny_config, f"out={tmp_path / 'run'}", "epoch=3"
        )
    )
    (line,) = error_lines(err)
    assert code == 1 and "did you mean epochs?" in line  # torchrun has one code for all failures


def test_D11_more_ranks_than_a_batch_has_shares(tiny_config: Path, tmp_path: Path) -> None:
    """D11 | batch_size=8 on 3 processes | one line, code 2"""
    code, _, err = pretrain("--config", tiny_config, f"out={tmp_path / 'run'}", "devices=3")
    assert code == 2 and error_lines(err) == [
        "error: batch_size=8 cannot be shared by 3 processes. fix: set batch_size=6, "
        "or change the number of processes"
    ]


@pytest.mark.faults
def test_D12_torchrun_restarts(tiny_config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """D12 | torchrun --max-restarts 3, a rank is killed | --auto-resume goes on by itself, bit-identical"""
    run = tmp_path / "run"
    arguments: list[str | Path] = [
        "--config",
        tiny_config,
        f"out={run}",
        "epochs=8",
        "checkpoint.every_steps=1",
        "--auto-resume",
    ]
    process = start([*TORCHRUN, "--max-restarts", "3", ROOT / "pretrain.py"], *arguments)
    wait_for(lambda: has_step(run, 5))
    os.kill(children(process)[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0 and re.search(r"resume    epoch \d+, step \d+", out), err
    assert same_bits(run, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("lost", [False, True], ids=["to the end", "one is lost"])
def test_D13_two_machines(
    lost: bool, tiny_config: Path, uninterrupted: Path, tmp_path: Path, record_property: Note
) -> None:
    """D13 | two torchrun of one process each, as on two machines; the second is killed with its process |
    both end with 0, bit-identical; the first names the lost rank, and --resume goes on
    """
    run, port = tmp_path / "run", free_port()
    address = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    machine: list[str | Path] = [
        *TORCHRUN[:3],
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        *address,
        ROOT / "pretrain.py",
    ]
    arguments: list[str | Path] = [
        "--config",
        tiny_config,
        f"out={run}",
        "epochs=8",
        "checkpoint.every_steps=1",
    ]
    first = start(machine, *arguments)
    wait_for(lambda: answers(port))  # it is the one where they meet
    second = start(machine, *arguments)
    if lost:
        wait_for(lambda: has_step(run, 5))
        process_of_it = children(second)
        began = time.monotonic()
        for pid in (second.pid, *process_of_it):
            os.kill(pid, signal.SIGKILL)
        ended = [finish(process, 60) for process in (first, second)]
        record_property("seconds", round(time.monotonic() - began, 1))
        assert ended[0][0] == 1
        code, _, err = pretrain("--resume", run, "devices=2")
        assert code == 0, err
    else:
        ended = [finish(process) for process in (first, second)]
        assert [code for code, _, _ in ended] == [0, 0], ended
    said = [line for _, _, err in ended for line in error_lines(err)]
    assert bool(said) == lost and all("rank" in line for line in said), ended
    assert same_bits(run, uninterrupted)


@pytest.mark.faults
def test_D14_srun(tiny_config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """D14 | two processes with the variables that srun gives them; one of its variables missing |
    bit-identical to devices=2; one line, code 2
    """
    task = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
    }
    task |= {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NAME": "train",
        "MASTER_PORT": str(free_port()),
    }
    arguments: list[str | Path] = [
        sys.executable,
        ROOT / "pretrain.py",
        "--config",
        tiny_config,
        f"out={tmp_path / 'run'}",
        "epochs=8",
    ]
    processes = [start(arguments, **task, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [0, 0] and not ended[1][1], ended
    assert same_bits(tmp_path / "run", uninterrupted)
    for missing in ("SLURM_NTASKS_PER_NODE", "SLURM_LOCALID"):
        variables = task | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        del variables[missing]
        code, _, err = finish(start([*arguments[:4], f"out={tmp_path / 'never'}"], **variables))
        (line,) = err.splitlines()
        assert code == 2 and line.startswith("error: SLURM's variables") and "--ntasks-per-node" in line, err


@pytest.mark.faults
@pytest.mark.parametrize("target", ["torchrun", "rank 0", "rank 1"])
def test_A7_a_signal_reaches_all_ranks(
    target: str, tiny_config: Path, uninterrupted: Path, tmp_path: Path, record_property: Note
) -> None:
    """A7 | SIGTERM to torchrun, to rank 0 or to rank 1 | all stop after the same step and save, code 143,
    resume is bit-identical
    """
    run = tmp_path / "run"
    if target == "torchrun":
        process = start(
            [*TORCHRUN, ROOT / "pretrain.py"],
            "--config",
            tiny_config,
            f"out={run}",
            "epochs=8",
            "checkpoint.every_steps=1",
        )
        wait_for(lambda: has_step(run, 4))
    else:
        process = begin(tiny_config, run, 4, "checkpoint.every_steps=1")
    began = time.monotonic()
    os.kill(process.pid if target != "rank 1" else children(process)[0], signal.SIGTERM)
    code, out, err = finish(process, 30)
    record_property("seconds", round(time.monotonic() - began, 1))
    assert not error_lines(err) and out.count("stopped by SIGTERM after step") == 1
    assert code == (1 if target == "torchrun" else 143) or code == -15
    code, _, err = pretrain("--resume", run, "devices=2")
    assert code == 0, err
    assert same_bits(run, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_B7_another_number_of_ranks(first: int, then: int, tiny_config: Path, tmp_path: Path) -> None:
    """B7 | a run begun by one process goes on with two, and the other way round, in float64 | the same
    samples, equal within 1e-3
    """
    script: list[str | Path] = [sys.executable, ONE_RANK, "double", "0"]
    out = tmp_path / "run"
    process = start(
        script,
        "--config",
        tiny_config,
        f"out={out}",
        f"devices={first}",
        "checkpoint.every_steps=1",
        "monitor.knn_every=0",
    )
    # within the second epoch, which is pruned
    wait_for(lambda: has_step(out, 11) or process.poll() is not None)
    process.terminate()
    code, _, err = finish(process)
    assert code == 143, err
    code, _, err = finish(start(script, "--resume", out, f"devices={then}"))
    assert code == 0, err
    whole = tmp_path / "whole"
    code, _, err = finish(start(script, "--config", tiny_config, f"out={whole}", "monitor.knn_every=0"))
    ours, theirs = tensors(out), tensors(whole)
    assert ours["/pruner/record/times_trained"].equal(theirs["/pruner/record/times_trained"])
    assert (
        max(
            float((ours[name].double() - theirs[name].double()).abs().max())
            for name in ours
            if "/model" in name
        )
        < 1e-3
    )
