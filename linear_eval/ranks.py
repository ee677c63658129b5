"""Several processes that share the work: which one this is, mistakes that all of them learn of, rows put
together in order.

They are torch.distributed's default group, on gloo: what travels is on the CPU, and nothing is pickled.
Without a group this is process 0 of 1. Every process must call these functions in the same order.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from linear_eval.errors import EvalError
from linear_eval.liveness import Liveness, Lost, leave_at_once

Made = TypeVar("Made")
ELEMENTS = 2**26  # numbers sent at once: 256 MiB
TIMEOUT_SECONDS = 600.0  # without a sign of life from a process, until `watch_for`
AGAIN = "see what it wrote, and start all of them again"
_watching: Liveness | None = None  # the others, while there is a group


class PeerLost(RuntimeError):
    """Another process ended, or does not answer. The message is one line, `what. fix: how`.

    Args:
        speaks: whether this process is to tell it although it is not the first, which may be the one that
            is lost.
    """

    def __init__(self, message: str, speaks: bool = False) -> None:
        super().__init__(message)
        self.speaks = speaks


def listen_on_loopback() -> None:
    """Let gloo and NCCL, whose connections have no password, listen to this machine alone. Before a group is
    made.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


def watch_for(seconds: float) -> None:
    """Call a process lost that gives no sign of life for so long. To be called by every process with the same
    number.
    """
    if _watching is not None and seconds != _watching.timeout_seconds:
        store = _watching.store
        _watching.stop()
        _watch(dist.PrefixStore(f"within {seconds:g} s", store), seconds)


def _watch(store: dist.Store, seconds: float) -> None:
    global _watching
    local_rank = os.environ.get("LOCAL_RANK", "")
    local = int(local_rank) if local_rank.isdecimal() else dist.get_rank()
    _watching = Liveness(store, dist.get_rank(), dist.get_world_size(), seconds, _leave, local_rank=local)
    _watching.start()


def _leave(lost: Lost, speaks: bool) -> None:
    """Called from a thread where the main one does not come back from an exchange."""
    leave_at_once(f"error: {lost.why}. fix: {AGAIN}" if speaks else "", lost.code)


@contextmanager
def process_group() -> Iterator[None]:
    """The group that torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) asks for; none where it asks for
    no more than one process.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 1:
        raise EvalError(
            f"of RANK and WORLD_SIZE only {given[0]} is set",
            f"start with torchrun, which sets both, or unset {given[0]}",
        )
    if not given or dist.is_initialized():
        yield
        return
    for name in given:
        if not (os.environ[name].isascii() and os.environ[name].strip().isdecimal()):
            raise EvalError(
                f"{name} is {os.environ[name][:60]!r}, and no number",
                "start with torchrun, or unset RANK and WORLD_SIZE",
            )
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if number >= count:
        what = f"RANK is {number} and WORLD_SIZE is {count}: ranks are counted from 0"
        raise EvalError(what, "start with torchrun, or unset RANK and WORLD_SIZE")
    if count == 1:
        yield
        return
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        listen_on_loopback()
    try:
        store, number, count = next(rendezvous("env://", timeout=timedelta(minutes=2)))
        # As long as the slowest evaluator of the first process may take: it is by its signs of life that one
        # that hangs is noticed.
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=timedelta(days=7))
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = (str(error).splitlines() or [""])[0][:200]
        raise EvalError(
            f"the processes do not find each other ({reason})",
            "start with torchrun, or set MASTER_ADDR and MASTER_PORT",
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    _watch(dist.PrefixStore(f"signs of attempt {attempt}", store.clone()), TIMEOUT_SECONDS)
    try:
        yield
    finally:
        global _watching
        watching, _watching = _watching, None
        if watching is not None:
            watching.stop()
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, one each."""
    if device.type != "cuda" or num_ranks() == 1:
        return device
    here, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if device.index is not None or here >= count:
        raise EvalError(
            f"{num_ranks()} processes share device={device} ({count} here)",
            "start one process a GPU, or set device=cpu",
        )
    return torch.device("cuda", here)


def in_turn(work: Callable[[], Made]) -> Made:
    """`work()` by every process, by the first of a machine before its others: those then find what it
    downloaded or built.
    """
    if num_ranks() == 1:
        return work()
    found: list[Made] = []
    goes_first = os.environ.get("LOCAL_RANK", str(rank())) == "0"
    for turn in (True, False):
        error = None
        if turn == goes_first:
            try:
                found.append(work())
            except Exception as caught:
                error = caught
        raise_together(error)
    return found[0]


def share_of(number: int, num_items: int) -> range:
    """The items of process `number`: contiguous, in the order of the processes, and every item in exactly one
    share.
    """
    return range(num_items * number // num_ranks(), num_items * (number + 1) // num_ranks())


def raise_together(error: Exception | None) -> None:
    """Called by every process with the mistake in its own part, or None: if there was any, all of them raise.

    The first process that has one raises it as it is, the others raise an EvalError that names that process.
    """
    if num_ranks() == 1:
        if error is not None:
            raise error
        return
    text = b"" if error is None else (" ".join(str(error).split()) or type(error).__name__).encode()[:2000]
    lengths = _all_numbers(len(text))
    first = next((number for number, length in enumerate(lengths) if length), None)
    if first is None:
        return
    if first == rank():
        message = torch.tensor(list(text), dtype=torch.uint8)
    else:
        message = torch.zeros(lengths[first], dtype=torch.uint8)
    with _peers():
        dist.broadcast(message, first)
    if first == rank() and error is not None:
        raise error
    what, _, fix = bytes(message.tolist()).decode("utf-8", "replace").partition(". fix: ")
    raise EvalError(f"process {first}: {what}", fix or f"see what process {first} wrote") from error


def first_says(answer: bool) -> bool:
    """The answer of process 0, to every process."""
    return bool(_all_numbers(int(answer))[0])


def gather_rows(rows: Tensor | None, counts: list[int]) -> Tensor:
    """The rows of all processes in their order, (sum of counts, D) float32, to every process.

    Args:
        rows: this process's (M, D) float32 on the CPU; None where M = 0.
        counts: M of every process, the same list everywhere.
    """
    if num_ranks() == 1:
        assert rows is not None and len(rows) == counts[0]
        return rows
    widths = set(_all_numbers(0 if rows is None else rows.shape[1])) - {0}
    sizes = set(_all_numbers(sum(counts)))
    if len(widths) != 1 or len(sizes) != 1:
        what = f"the processes have features of {sorted(widths)} columns for {sorted(sizes)} images"
        raise EvalError(what, "give all of them the same encoder, images and settings")
    gathered = torch.empty(sum(counts), widths.pop())
    own = sum(counts[: rank()])
    if rows is not None:
        gathered[own : own + len(rows)] = rows
    step, begin = max(1, ELEMENTS // gathered.shape[1]), 0
    with _peers():
        for number, count in enumerate(counts):
            for part in gathered[begin : begin + count].split(step) if count else ():
                dist.broadcast(part, number)
            begin += count
    return gathered


def _all_numbers(own: int) -> list[int]:
    """One whole number of every process, in their order."""
    if num_ranks() == 1:
        return [own]
    numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks())]
    with _peers():
        dist.all_gather(numbers, torch.tensor([own]))
    return [int(number) for number in numbers]


@contextmanager
def _peers() -> Iterator[None]:
    if _watching is not None and _watching.lost is not None:
        lost = _watching.lost
        raise PeerLost(f"{lost.why}. fix: {AGAIN}", _watching.speaks(lost.ranks))
    try:
        with nullcontext() if _watching is None else _watching.waiting():
            yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise PeerLost(f"another process ended or does not answer ({reason}). fix: {AGAIN}") from error
