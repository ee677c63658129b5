"""Who hangs is noticed, and who waits for it ends and can be ended, be it in C code."""

import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ssl_emp.run import liveness as module
from ssl_emp.run.liveness import BoundedStore, Liveness, Lost, StoreSilent, ending
from ssl_emp.run.ranks import LostRank, connect

FORK = multiprocessing.get_context("fork")  # torch is imported already: seconds a process


def watched(rank: int, store: dist.Store, count: int = 3, **options: Any) -> Liveness:
    """One that is not started: its rounds are called by the test, and its clock is a list's first number."""

    def leave(lost: Lost, speaks: bool) -> None:
        raise AssertionError("nobody leaves here")

    return Liveness(store, rank, count, 80.0, leave, **options)


def find(liveness: Liveness, seconds: float) -> Lost | None:
    """Who is lost so many seconds from now."""
    return liveness._find_lost(time.monotonic() + seconds)


def test_who_gives_signs_is_not_lost() -> None:
    store, clock = dist.HashStore(), [0]
    first, second = watched(0, store, 2), watched(1, store, 2, clock=lambda: clock[0])
    assert first.limit == 90 and find(first, 89) is None and find(first, 91) is not None
    for _ in range(3):
        clock[0] += 1
        second._round()
        first._round()
    later = time.monotonic() + 200
    first.runs_at[1] = first.moves_at[1] = later - 200  # long ago
    clock[0] += 1
    second._round()
    first._round()
    assert find(first, 80) is None


@pytest.mark.parametrize("silent", ["process", "main thread"])
def test_a_process_and_a_main_thread_that_hang_are_lost(silent: str) -> None:
    store, clock = dist.HashStore(), [0]
    first, second = watched(0, store, 2), watched(1, store, 2, clock=lambda: clock[0])
    second._round()
    first._round()
    first.runs_at[1] -= 91
    first.moves_at[1] -= 91
    if silent == "main thread":
        second._round()  # the process runs, and gives its sign; the clock of its main thread stands still
    first._round()
    lost = find(first, 0)
    assert lost is not None and lost.ranks == {1} and lost.code == 3
    assert (
        "it has not moved for 91 s" if silent == "main thread" else "no sign of life for 91 s"
    ) in lost.why
    assert lost.why.startswith("rank 1 is lost")


def test_who_is_done_is_not_lost() -> None:
    store = dist.HashStore()
    first, second = watched(0, store, 2), watched(1, store, 2)
    second._round()
    second.stop()
    second.stop()
    first._round()
    assert find(first, 10_000) is not None, "the store itself has not answered"
    first.answered_at += 10_000
    assert find(first, 10_000) is None


def test_all_are_watched_by_the_first_and_the_first_by_all() -> None:
    store = dist.HashStore()
    several = [watched(rank, store, 4, local_rank=rank) for rank in range(4)]
    assert [liveness.watched for liveness in several] == [[1, 2, 3], [0], [0], [0]]
    for liveness in several:
        liveness.answered_at += 1000
    assert (lost := find(several[0], 91)) and lost.ranks == {1, 2, 3} and "rank 1, 2, 3 is lost" in lost.why
    assert (lost := find(several[2], 91)) and lost.ranks == {0}
    assert [several[rank].speaks({0, 3}) for rank in (1, 2)] == [True, False]
    assert watched(2, store, 4, local_rank=0).speaks({0, 1}) and not watched(
        3, store, 4, local_rank=1
    ).speaks({0, 1})


def test_a_store_that_does_not_answer_is_told_as_such() -> None:
    first = watched(1, dist.HashStore(), 2)
    first._round()
    first.runs_at[0] = first.moves_at[0] = time.monotonic() + 1000
    lost = find(first, 91)
    assert lost is not None and lost.ranks == {0} and "nothing answers for it" in lost.why


@pytest.mark.parametrize(
    ("command", "said"), [("exit 7", "exit code 7"), ("kill -9 $$", "killed by SIGKILL"), ("exit 0", None)]
)
def test_a_child_that_ends_is_noticed_at_once(command: str, said: str | None) -> None:
    child = subprocess.Popen(["/bin/sh", "-c", command])
    child.wait(60)
    first = watched(0, dist.HashStore(), 2, children={1: child})
    lost = find(first, 0)
    assert (lost is None) if said is None else (lost is not None and said in lost.why and lost.ranks == {1})
    assert first.ended() == {1}


def test_a_parent_that_ends_is_noticed_at_once() -> None:
    orphan = watched(1, dist.HashStore(), 2, parent=os.getppid() + 1)
    assert (lost := find(orphan, 0)) and lost.ranks == {0} and orphan.ended() == {0}
    assert find(watched(1, dist.HashStore(), 2, parent=os.getppid()), 0) is None


def test_how_a_process_ended_in_words() -> None:
    assert [ending(code) for code in (-9, -6, 1, -200)] == [
        "killed by SIGKILL", "killed by SIGABRT", "ended with exit code 1", "ended with exit code -200",
    ]  # fmt: skip


def test_a_stop_of_this_process_is_nobody_elses_silence() -> None:
    first = watched(0, dist.HashStore(), 2)
    first._shift(500)
    assert find(first, 580) is None and find(first, 600) is not None


@pytest.mark.parametrize(
    ("signals", "silent_for", "still", "code"),
    [
        ([], 1000.0, 1000.0, None),
        ([(signal.SIGTERM, 100.0)], 0.0, 1000.0, None),  # the others live: the exchange will come about
        ([(signal.SIGTERM, 100.0)], 50.0, 100.0, 143),
        ([(signal.SIGTERM, 100.0)], 50.0, 0.0, None),  # the main thread works: it will hear it
        ([(signal.SIGINT, 100.0)], 50.0, 100.0, 130),
        # twice: whatever the others do
        ([(signal.SIGTERM, 100.0), (signal.SIGTERM, 100.0)], 0.0, 100.0, 143),
        ([(signal.SIGHUP, 0.1)], 50.0, 100.0, None),  # a moment ago
    ],
)
def test_a_signal_that_the_main_thread_cannot_hear(
    signals: list[tuple[int, float]], silent_for: float, still: float, code: int | None
) -> None:
    first, now = watched(0, dist.HashStore(), 2), time.monotonic()
    first.runs_at[1] = now - silent_for
    first.signals = [(number, now - ago) for number, ago in signals]
    stopped = first._stopped_by(now, still)
    assert (stopped.code if stopped else None) == code
    assert stopped is None or (signal.Signals(signals[0][0]).name in stopped.why and "rank 1" in stopped.why)


# ---- with real processes


def ends(process: Any, seconds: float = 60) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("it hangs")
    return int(process.exitcode)


@pytest.fixture
def stopped_server() -> Iterator[Callable[[], dist.Store]]:
    """A store's client, and how to stop the process that serves it."""
    ports = FORK.SimpleQueue()

    def serve() -> None:
        server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), False)
        server.set("there", "yes")
        ports.put(server.port)
        time.sleep(60)

    process = FORK.Process(target=serve, daemon=True)
    process.start()
    client = dist.TCPStore("127.0.0.1", ports.get(), None, False, timedelta(seconds=20), False)
    assert client.get("there") == b"yes"

    def stop() -> dist.Store:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
        return client

    yield stop
    process.kill()
    process.join()


def test_a_store_whose_server_is_stopped_blocks_nobody(stopped_server: Callable[[], dist.Store]) -> None:
    store = BoundedStore(stopped_server(), 0.3)
    for operation in (
        lambda: store.check(["there"]),
        lambda: store.set("a", "b"),
        lambda: store.get("there"),
    ):
        with pytest.raises(StoreSilent, match="no answer within 0.3 s"):
            operation()


def test_a_signal_is_heard_while_a_store_is_silent(stopped_server: Callable[[], dist.Store]) -> None:
    store, heard = BoundedStore(stopped_server(), 60), []

    class Heard(Exception):
        pass

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        raise Heard

    before = signal.signal(signal.SIGALRM, hear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Heard):
            store.check(["there"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert heard == [signal.SIGALRM]


def test_errors_and_answers_of_a_store_come_through() -> None:
    store = BoundedStore(dist.HashStore(), 5)
    store.set("a", "b\0c")
    assert store.check(["a"]) and not store.check(["a", "z"]) and store.get("a") == b"b\0c"
    broken = BoundedStore(None, 5)  # type: ignore[arg-type]
    broken.store = type("Broken", (), {"check": lambda self, keys: 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        broken.check(["a"])


def in_c_code(path: Path, signs: Path, peer_lives: bool, ready: Any) -> None:
    """Its main thread waits for a pipe that nobody writes to, as for a disk that does not answer."""
    module.GRACE_SECONDS, module.TICK_SECONDS = 0.4, 0.05
    signal.signal(signal.SIGTERM, lambda *_: None)  # Python's, which C code does not hear
    store = dist.FileStore(str(signs), -1)
    store.set("sign/1", "1 1")
    alive = Liveness(
        store, 0, 2, 60.0 if peer_lives else 1.0, lambda lost, speaks: module.leave_at_once("", lost.code)
    )
    alive.start()
    ready.put(1)
    while True:
        os.open(path, os.O_RDONLY)  # Python goes back to it after every signal


@pytest.mark.whole
@pytest.mark.parametrize(("peer_lives", "code"), [(False, 3), (True, 143)])
def test_a_main_thread_in_c_code_is_ended(peer_lives: bool, code: int, tmp_path: Path) -> None:
    """Where the others hang, by itself; where they live, by the second SIGTERM."""
    os.mkfifo(tmp_path / "pipe")
    ready = FORK.SimpleQueue()
    process = FORK.Process(target=in_c_code, args=(tmp_path / "pipe", tmp_path / "signs", peer_lives, ready))
    process.start()
    ready.get()
    if peer_lives:
        for _ in range(2):
            os.kill(process.pid or 0, signal.SIGTERM)
            time.sleep(0.3)  # one at a time, else the kernel makes one of them
    assert ends(process) == code


def in_group(number: int, port: int, hangs: str) -> None:
    """A process of an evaluation; the first one hangs, or works for longer than a sign may take."""
    module.GRACE_SECONDS, module.TICK_SECONDS = 0.4, 0.05
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = connect(600.0)
    try:
        ranks.set_timeout(1.5)
        assert ranks.barrier("first" if number == 0 else "")[0] == "first"
        if number == 0:
            if hangs == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif hangs == "sleeps":
                time.sleep(60)
            until = time.monotonic() + 4
            while time.monotonic() < until:
                sum(range(1000))
        ranks.barrier()
    except LostRank as error:
        os._exit(error.code)
    os._exit(0)


@pytest.mark.whole
@pytest.mark.parametrize(("hangs", "code"), [("stopped", 3), ("sleeps", 3), ("works", 0)])
def test_an_evaluation_does_not_wait_for_a_first_process_that_hangs(hangs: str, code: int) -> None:
    """Nor does it end while that one works, however long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = [
        FORK.Process(target=in_group, args=(number, port, hangs), daemon=True) for number in (0, 1)
    ]
    first.start()
    second.start()
    try:
        assert ends(second) == code
    finally:
        first.kill()
        first.join()
