"""The number of torch's threads beside other programs: what these use, what is made of it, what is said."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Pretrain

from ssl_emp.commands import pretrain
from ssl_emp.config import load_config
from ssl_emp.run import threads
from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.run.threads import Fit, Threads, Use, others, quota, use

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in (*threads.SPINS, *threads.NUMBERS)}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch has two, as on two cores; the process gets back what it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---- what others use


def test_of_the_cores_of_this_process_all_but_idle_time_counts(tmp_path: Path) -> None:
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    mine = min(os.sched_getaffinity(0))
    there = {core: 999_999 for core in os.sched_getaffinity(0)}  # another core of the machine
    other = max(there) + 1
    rows = [f"cpu{core} {' '.join(['0'] * 10)}" for core in there if core != mine]
    # user nice system idle iowait irq softirq steal guest guest_nice: guests are in user and nice
    rows += [f"cpu{mine} 1 2 4 1000 1000 8 16 32 1 2", f"cpu{other} 500 0 0 0 0 0 0 0 0 0"]
    stat.write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *rows, "ctxt 7"]))
    found = use(stat)
    assert found is not None and found.busy == pytest.approx(63 / ticks)
    for broken in ("", "cpu0 1 2", "cpu0 a b c d e f g h"):
        stat.write_text(broken)
        assert use(stat) is None
    assert use(tmp_path / "nowhere") is None, "macOS"


def test_others_are_all_but_this_process() -> None:
    assert others(Use(10.0, 100.0, 5.0), Use(14.0, 107.0, 6.0)) == pytest.approx(1.5)
    assert others(Use(10.0, 100.0, 5.0), Use(14.0, 100.5, 6.0)) == 0.0, "ticks are coarser than our clock"


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_what_the_system_says_is_what_a_busy_program_used() -> None:
    """Against the CPU time that the kernel reports of a child itself; others only add to it."""
    before = use()
    start = os.times()
    subprocess.run([sys.executable, "-S", "-c", "x = 0\nfor i in range(6_000_000): x += i"], check=True)
    spent = os.times().children_user - start.children_user
    after = use()
    assert before and after and spent > 0.1
    assert others(before, after) * (after.at - before.at) > 0.8 * spent - 0.05


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_what_a_container_may_use(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == cores


# ---- the number


@pytest.mark.parametrize(
    ("cores", "most", "taken", "number"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.25, 2),  # an idle desktop
        (2, 2, 0.5, 1),  # a busy program that shares its core with a thread of ours
        (2, 2, 1.9, 1),
        (16, 16, 1.0, 15),
        (16, 16, 3.0, 13),
        (16, 16, 20.0, 1),
        (16, 8, 3.0, 8),  # torch takes a thread for each of 8 real cores: there is room for all
        (16, 8, 9.0, 7),
    ],
)
def test_a_thread_for_each_core_that_others_leave(cores: int, most: int, taken: float, number: int) -> None:
    fit = Fit(most, cores)
    assert fit.fall(taken) == (number < most) and fit.number == number
    assert not fit.fall(taken), "once is enough"


def numbers(taken: Iterator[float] | list[float]) -> list[int]:
    """After each window of ten seconds on two cores."""
    fit, found = Fit(2, 2), []
    for window, value in enumerate(taken):
        before = fit.number
        assert fit.change(value, 10.0 * (window + 1)) == (fit.number != before)
        found.append(fit.number)
    return found


def test_it_falls_at_once_and_rises_when_all_is_quiet_for_a_while() -> None:
    assert numbers([0.1, 1.0, 0.2, 0.1, 0.1, 0.1, 0.1]) == [2, 1, 1, 1, 1, 1, 1], "not yet: a minute"
    assert numbers([1.0, *[0.1] * 6]) == [1, 1, 1, 1, 1, 1, 2]
    assert numbers([1.0, *[0.1] * 5, 0.2, *[0.1] * 6]) == [1] * 12 + [2], "a minute without a break"
    coming_and_going = [1.0, *[0.0] * 6] * 200
    changes = sum(
        a != b for a, b in zip(numbers(coming_and_going), numbers(coming_and_going)[1:], strict=False)
    )
    assert changes <= 2, "and then ever longer: who comes and goes does not change it every time"


# ---- of torch


@pytest.mark.parametrize("name", threads.NUMBERS)
def test_a_number_that_the_user_gave_stays(
    name: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(threads, "FIRST", None)
    chosen = Threads("auto", moves=True)
    assert (torch.get_num_threads(), chosen.line, chosen.fit) == (2, "", None)
    fixed = Threads(1, moves=True)
    assert (torch.get_num_threads(), fixed.fit) == (1, None), "the key is nearer than the environment"


def follow(monkeypatch: pytest.MonkeyPatch, readings: list[Use], first: Use | None = None) -> None:
    """The system says these, in turn; `first` when the command began. No number is in the environment."""
    for name in threads.NUMBERS:
        monkeypatch.delenv(name, raising=False)
    turn = iter(readings)
    monkeypatch.setattr(threads, "FIRST", first)
    monkeypatch.setattr(threads, "use", lambda: next(turn))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def test_the_start_looks_back_to_where_the_command_began(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, [Use(4.0, 7.0, 3.0)], first=Use(0.0, 0.0, 0.0))
    chosen = Threads("auto", moves=False)
    assert torch.get_num_threads() == 1 and chosen.fit is None
    assert chosen.line == "1 of 2: other programs keep 1.0 of 2 cores busy (threads=N uses N nevertheless)"
    # in a notebook that was started an hour ago it looks for itself
    torch.set_num_threads(2)
    follow(monkeypatch, [Use(3600.0, 4000.0, 9.0), Use(3600.5, 4000.5, 9.5)], first=Use(0.0, 0.0, 0.0))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    assert Threads("auto", moves=False).line == "" and torch.get_num_threads() == 2


def test_a_run_gives_way_and_says_so_once(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = threads.time.monotonic()
    quiet, busy = Use(now - 15, 0.0, 0.0), Use(now, 20.0, 10.0)
    follow(monkeypatch, [quiet, busy], first=Use(now - 17, 0.0, 0.0))
    chosen = Threads("auto", moves=True)
    assert chosen.line == "" and torch.get_num_threads() == 2
    line = chosen.look(step=340)
    assert torch.get_num_threads() == 1
    assert line.startswith("1 from step 340 on, before 2: other programs keep 0.7 of 2 cores busy. ")
    assert line.endswith("threads=N keeps one number")
    assert chosen.look(341) == "", "no reading is left: the next look is ten seconds away"


# ---- of a run


def test_a_run_has_the_number_asked_for_and_says_where_a_resumed_one_has_another(
    pretrain_run: Pretrain,
    two_threads: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["epochs=2", "checkpoint.every_steps=3", "monitor.knn_every=0", "monitor.reliability_every=0"]
    out = pretrain_run("run", *keys, "threads=1")
    assert "cpu (1 thread)" in (out / "environment.json").read_text()
    max((out / "checkpoints").glob("step_*.pt")).unlink()  # of its end
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out), "threads=2"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("threads ")]
    assert len(said) == 1 and said[0].startswith("threads   2, and 1 when it was saved: ")
    assert said[0].endswith("threads=1 keeps it")
    assert load_config(out / "config.yaml", []).threads == 1, "the run's own word stays"
    # earlier versions noted no number
    state, _ = load_checkpoint(out / "checkpoints")
    assert state is not None and state["threads"] == 2
    older = {key: value for key, value in state.items() if key not in ("threads", "format", "written_by")}
    save_checkpoint(out / "checkpoints", older, state["step"])
    assert pretrain.main(["--resume", str(out), "epochs=3", "threads=1"]) == 0
    said_now = capsys.readouterr().out
    assert "epoch 3/3" in said_now and "when it was saved" not in said_now


PROGRAM = """
import os, sys
before = dict(os.environ)
{first}
import {module}
print([value for name, value in os.environ.items() if "SPIN" in name and before.get(name) != value])
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("module", "first", "variables", "spins"),
    [
        ("pretrain", "", {}, [str(threads.SPIN_COUNT)]),
        ("ssl_emp.__main__", "", {}, [str(threads.SPIN_COUNT)]),
        ("ssl_emp.commands", "", {"GOMP_SPINCOUNT": "5"}, []),
        ("ssl_emp.commands", "", {"OMP_WAIT_POLICY": "PASSIVE"}, []),
        ("ssl_emp.commands", "import torch", {}, []),  # too late
        ("ssl_emp.prune", "", {}, []),  # a part of somebody else's program
    ],
)
def test_waiting_threads_sleep_sooner_where_nothing_else_is_set(
    module: str, first: str, variables: dict[str, str], spins: list[str]
) -> None:
    """And torch's OpenMP, which says what it has read, has read it."""
    command = [sys.executable, "-c", PROGRAM.format(module=module, first=first)]
    environment = ENVIRONMENT | variables | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(spins)
    read = {line.strip() for line in done.stderr.splitlines() if "SPINCOUNT" in line}
    if module == "pretrain" and read:  # GNU's OpenMP
        assert read == {f"GOMP_SPINCOUNT = '{threads.SPIN_COUNT}'"}
