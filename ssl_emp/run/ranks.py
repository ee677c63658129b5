"""The processes of a run: who they are, what they exchange, and how all of them end when one does.

One process a device. Every rank holds all images, all scores and the same kept list; a batch is cut by
position, rank r takes the r-th part, and what a rank found out about its part is gathered. So nothing depends
on how many there are, but for rounding.

Started by `devices=N` (`launch`), by torchrun or by srun. Letters: W ranks, B batch, b = B / W, C channels.
"""

import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from linear_eval.errors import EvalError, first_line
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.keyed import keyed_bits
from ssl_emp.run.liveness import GRACE_SECONDS, BoundedStore, Liveness, Lost, ending, leave_at_once
from ssl_emp.run.streams import put
from ssl_emp.text import command_line, printable, shorten

LAUNCHED = "SSL_EMP_LAUNCHED"  # process number of rank 0, in those that `launch` starts
PRIVATE_STORE = "SSL_EMP_STORE"  # the file that serves as the store of those processes
STARTED: dict[int, "subprocess.Popen[bytes]"] = {}  # by `launch`, by rank
START_SECONDS = 60.0  # from the first rank's start to the last one's
TIMEOUT_SECONDS = 600.0  # without a sign of life from a rank
LEAVE_SECONDS = 60.0  # for Python to end in the others, after the work
INTACT = "; the last checkpoint is intact. fix: --resume"
LAUNCHERS = (
    "start by torchrun (pretraining: or srun, or devices=N), or unset RANK and WORLD_SIZE for one process"
)
FINGERPRINT = 108  # first key of `Ranks.agree_on`
BYTES_AT_ONCE = 2**28  # of `Ranks.gather_rows`
FIXABLE = "!"  # before the text of a mistake that the user can fix, in `Ranks.together`


class LostRank(Exception):
    """Another rank is gone, hangs, or failed. Nothing can be done together any more: exit code 3.

    Args:
        speaks: whether this rank is the one that tells the user; the first may be the one that is lost.
        code: the exit code of this process.
        lost: the ranks that give no sign of life; none where one reported a failure.
    """

    def __init__(self, line: str, speaks: bool, code: int = 3, lost: Collection[int] = ()) -> None:
        super().__init__(line)
        self.speaks, self.code, self.lost = speaks, code, frozenset(lost)


class Ranks:
    """This process among the W of a run. With one process every method is what it says, without any
    communication. All ranks call those that communicate in the same order.

    Args:
        rank, world_size: who of how many.
        local_rank: which device of its machine.
        store: a key-value store that all ranks reach; None for one process.
        timeout_seconds: how long a rank waits for another that gives no sign of life before it calls it lost.
        advice: the end of the line that says that a rank is lost.
    """

    control: dist.ProcessGroup | None = None  # gloo, for what the hosts agree on
    # gloo, without a time limit: a rank that works is waited for, one that hangs is found by `liveness`
    patient: dist.ProcessGroup | None = None
    liveness: Liveness | None = None  # of several processes, from `watch` on
    failed: "Failed | None" = None  # the rank that was found to have failed

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        store: BoundedStore | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        advice: str = INTACT,
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.store, self.timeout_seconds, self.advice = store, timeout_seconds, advice

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This rank's share of the last dimension, (…, B) -> (…, b)."""
        size = batch.shape[-1] // self.world_size
        return batch[..., self.rank * size : (self.rank + 1) * size]

    def gather(self, part: Tensor) -> Tensor:
        """What all ranks hold, in the order of ranks: (b, …) -> (B, …). Not differentiable."""
        if self.world_size == 1:
            return part
        whole = part.new_empty(self.world_size * len(part), *part.shape[1:])
        # its name since torch 2.14, which warns of the old one
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, part.detach().contiguous())
        return whole

    def share_gradients(self, model: Any) -> Any:
        """`model` with gradients that are the mean over the ranks, exchanged during the backward pass."""
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option has a new name in newer torch
            return nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def highest(self, *numbers: int) -> list[int]:
        """The largest of each over the ranks; on the hosts, so that no device is waited for."""
        if self.world_size == 1:
            return list(numbers)
        self._raise_if_lost()  # else the exchange would wait for its whole time limit
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return cast(list[int], values.tolist())

    def agree_on(self, what: str, *tensors: Tensor) -> None:
        """RunFailed on all ranks where their bits differ. Reads one number from the device."""
        if self.world_size == 1:
            return
        total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
        for tensor in tensors:
            bits = tensor.flatten().view(torch.int32) if tensor.dtype == torch.float32 else tensor.flatten()
            # a sum of hashes may overflow: it wraps the same everywhere
            total += keyed_bits(FINGERPRINT, torch.arange(len(bits), device=bits.device), bits.long()).sum()
        sums = self._of_all_hosts(total.cpu().view(1))
        differing = [rank for rank in range(self.world_size) if sums[rank] != sums[0]]
        if differing:
            raise RunFailed(
                f"rank {', '.join(map(str, differing))} and rank 0 disagree about {what}; the last "
                "checkpoint is intact. fix: --resume; where it comes again, look for a faulty device"
            )

    def barrier(self, text: str = "") -> list[str]:
        """Wait for all ranks here, however long they work, and return the text that each of them gave.

        Neither pickle nor a device is involved.

        Raises:
            LostRank: one of them ended, hangs, or reported a failure.
        """
        if self.world_size == 1:
            return [text]
        own = text.encode(errors="replace")
        lengths = [int(length) for length in self._of_all_hosts(torch.tensor([len(own)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)  # all_gather takes tensors of one size
        padded[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        rows = self._of_all_hosts(padded) if len(padded) else [padded] * self.world_size
        pairs = zip(rows, lengths, strict=True)
        return [bytes(row[:length].tolist()).decode(errors="replace") for row, length in pairs]

    def _of_all_hosts(self, own: Tensor) -> list[Tensor]:
        """`own`, of one shape everywhere and on the CPU, of each rank. Signals are heard meanwhile."""
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        pause = 0.0005
        try:
            work = dist.all_gather(found, own, group=self.patient, async_op=True)
            while not work.is_completed():
                self._raise_if_failed()
                time.sleep(pause)
                pause = min(1.5 * pause, 0.1)
            work.wait()
        except RuntimeError as error:
            raise self.lost_rank(error) from error
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here on one rank fails on all of them: the first that failed raises its own error,
        the others one that names that rank. In here ranks do not communicate.

        Raises:
            UserError: another rank has a mistake that the user can fix.
            RunFailed: another rank failed otherwise.
        """
        if self.world_size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        line = "" if error is None else f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, UserError | EvalError):
            line = f"{FIXABLE}{error}"
        lines = self.barrier(" ".join(line.split())[:2000])
        first = next((rank for rank, line in enumerate(lines) if line), None)
        if first == self.rank and error is not None:
            raise error
        if first is not None:
            what, _, fix = lines[first].removeprefix(FIXABLE).partition(". fix: ")
            if not lines[first].startswith(FIXABLE):
                raise RunFailed(f"rank {first}: {what}") from error
            raise UserError(f"rank {first}: {what}", fix or f"see what rank {first} wrote") from error

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """`together`, on every machine its first rank alone and then the others, who find its downloads."""
        if self.local_rank:
            with self.together():  # wait for the first, which may have a million images to decode
                pass
        with self.together():
            yield
        if not self.local_rank and self.world_size > 1:
            with self.together():
                pass

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """The rows of all ranks in their order, (m, D) float32 on the CPU of any m each -> (total, D).

        Raises:
            UserError: D or the total differs. A rank with m = 0 may give any D.
        """
        if self.world_size == 1:
            return rows
        shapes = [[*map(int, text.split())] for text in self.barrier(f"{len(rows)} {rows.shape[1]} {total}")]
        counts = [count for count, _, _ in shapes]
        widths, totals = {width for count, width, _ in shapes if count}, {number for _, _, number in shapes}
        if len(widths) > 1 or len(totals) > 1:
            columns, numbers = (", ".join(map(str, sorted(found))) for found in (widths, totals))
            what = f"the processes have features of {columns} columns for {numbers} images"
            raise UserError(what, "give all of them the same encoder, images and settings")
        whole = torch.empty(sum(counts), max(widths, default=0))
        whole[(begin := sum(counts[: self.rank])) : begin + len(rows)] = rows if len(rows) else 0
        at_once = max(1, BYTES_AT_ONCE // (4 * max(1, whole.shape[1])))
        try:
            for rank, part in enumerate(whole.split(counts)):
                for chunk in part.split(at_once) if len(part) else ():
                    dist.broadcast(chunk, rank, group=self.patient)
        except RuntimeError as error:
            raise self.lost_rank(error) from error
        return whole

    def wait_for_start(self) -> None:
        """Wait until every rank has started; one that ends before is noticed by the rank that started it.

        Raises:
            LostRank: a rank ended, or failed.
            TimeoutError: they are not all there within START_SECONDS.
        """
        assert self.store is not None
        self._set(f"started/{self.rank}", "yes")
        deadline, missing = time.monotonic() + START_SECONDS, set(range(self.world_size))
        while missing := {rank for rank in missing if not self._is_set(f"started/{rank}")}:
            self._raise_if_failed()
            for rank in missing & STARTED.keys():
                if (code := STARTED[rank].poll()) is not None:
                    self._raise_if_failed()  # it may have reported why since the last look
                    fix = "see what it wrote above; where it was killed, memory may be short"
                    line = f"rank {rank} was lost while starting ({ending(code)}). fix: {fix}: "
                    line += "start fewer processes"
                    self.report_failure(line, 3)
                    raise LostRank(line, True)
            if time.monotonic() > deadline:
                names = ", ".join(map(str, sorted(missing)))
                raise TimeoutError(f"rank {names} did not start within {START_SECONDS:.0f} s")
            time.sleep(0.02)

    def watch(self, signs: dist.Store) -> None:
        """Give signs of life in `signs`, a connection of its own, and watch others', until `leave_ranks`."""
        if self.liveness is not None:
            self.liveness.stop()
        parent = os.environ.get(LAUNCHED)
        self.liveness = Liveness(
            signs,
            self.rank,
            self.world_size,
            self.timeout_seconds,
            self._end_in_c_code,
            local_rank=self.local_rank,
            children=dict(STARTED),
            parent=None if parent is None else int(parent),
        )
        self.liveness.start()

    def set_timeout(self, seconds: float) -> None:
        """Call a rank lost that gives no sign of life for so long. Every rank calls this with one number."""
        if self.liveness is not None and seconds != self.timeout_seconds:
            self.timeout_seconds = seconds
            self.watch(dist.PrefixStore(f"within {seconds:g} s", self.liveness.store))

    def _end_in_c_code(self, lost: Lost, speaks: bool) -> None:
        """Called from a thread where the main one does not come back."""
        end_lost(lost.ranks)
        leave_at_once(f"error: {printable(lost.why)}{self.advice}" if speaks else "", lost.code)

    def release_children(self, lost: Collection[int] = (), at_least: float = 0.0) -> None:
        """Before a rank ends early: see that those of one `launch` end too that cannot do so by themselves.

        Args:
            lost: who gives no sign of life.
            at_least: seconds that this takes where rank 0 started none: others read in its store why it ends.
        """
        end_lost(lost)
        if STARTED:
            # a rank that failed first gets time to write why; others may wait for this one in C code
            _wait_for(list(STARTED.values()), 1.0 if self.failed is None else GRACE_SECONDS)
        elif self.is_first:
            time.sleep(at_least)

    def _set(self, key: str, value: str) -> None:
        assert self.store is not None
        try:
            self.store.set(key, value)
        except RuntimeError as error:
            raise self._no_store() from error

    def _is_set(self, key: str) -> bool:
        assert self.store is not None
        try:
            return self.store.check([key])
        except RuntimeError as error:
            raise self._no_store() from error

    def _no_store(self) -> LostRank:
        line = f"rank 0 is lost (nothing answers for it any more){self.advice}"
        return LostRank(line, self.rank == 1 or self.local_rank == 0, lost=[0])

    def report_failure(self, line: str, code: int) -> None:
        """Tell the others why this rank ends, before it does."""
        if self.store is not None:
            with suppress(Exception):  # it may be the store that is gone
                self.store.set("failed", f"{self.rank}\0{code}\0{line}")

    def _raise_if_failed(self) -> None:
        assert self.store is not None
        if self._is_set("failed"):
            failed = Failed.parse(self.store.get("failed"))
            if failed.rank != self.rank:
                self.failed = failed
                # rank 0 needs no name: it is the one that speaks
                line = f"rank {failed.rank}: {failed.line}" if failed.rank else failed.line
                raise LostRank(line, self.rank == 0, failed.code)
        self._raise_if_lost()

    def _raise_if_lost(self) -> None:
        if self.liveness is not None and self.liveness.lost is not None:
            lost = self.liveness.lost
            raise LostRank(
                f"{lost.why}{self.advice}", self.liveness.speaks(lost.ranks), lost.code, lost.ranks
            )

    def lost_rank(self, error: Exception) -> LostRank:
        """Why an exchange failed with `error`: a rank reported a failure, or some give no sign of life."""
        assert self.store is not None
        lost = set(range(self.world_size))
        try:
            self._raise_if_failed()
            self.store.set(f"alive/{self.rank}", "yes")
            deadline = time.monotonic() + GRACE_SECONDS
            while lost and time.monotonic() < deadline:
                self._raise_if_failed()
                lost = {rank for rank in lost if not self._is_set(f"alive/{rank}")}
                if self.liveness is not None and lost <= self.liveness.ended():
                    break
                time.sleep(0.05)
        except LostRank as found:
            return found
        except Exception:  # no store: its host, rank 0, or the launcher is gone
            return self._no_store()
        names = f"rank {', '.join(map(str, sorted(lost)))} is lost" if lost else "the ranks lost each other"
        speaks = self.rank == min(set(range(self.world_size)) - lost, default=0)
        return LostRank(f"{names} ({first_line(error, 120)}){self.advice}", speaks, lost=lost)


@dataclass(frozen=True)
class Failed:
    """What a rank reported before it ended, as another finds it in the store."""

    rank: int
    code: int
    line: str

    @classmethod
    def parse(cls, report: bytes) -> "Failed":
        """Of `rank, code, line` with zero bytes between; in an open store, anything else is rank 0's."""
        text = report[:4000].decode(errors="replace")
        found = re.fullmatch("([0-9]{1,9})\0([0-9]{1,3})\0(.*)", text, re.DOTALL)
        if not found or not 0 < int(found[2]) < 256:
            return cls(0, 3, "the store of the ranks holds what none of them wrote. fix: --resume")
        return cls(int(found[1]), int(found[2]), printable(found[3]))


ALONE = Ranks()


def count_devices(devices: int | str) -> int:
    """`auto` is every GPU, or one process without any."""
    return max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)


def join_ranks(
    devices: int | str,
    timeout_seconds: float,
    needs_gpu: bool,
    command: Sequence[str] = (),
    call: int = 0,
) -> Ranks:
    """Become one of the ranks that torchrun, srun or `launch` started; alone where none of them did.

    Args:
        devices: processes to start on this machine where nobody started any yet.
        timeout_seconds: how long a rank may give no sign of life, and an exchange may take.
        needs_gpu: whether each rank takes a GPU (then tensors travel by NCCL, else by gloo).
        command: what starts the other processes: that which started this one.
        call: how often these processes have met and left before.

    Raises:
        UserError: the environment is not complete, the address does not answer, or there are fewer GPUs
            than ranks.
        LostRank: another rank ended, or failed, before all were there.
    """
    if "RANK" not in os.environ:
        if started_by_srun(count_devices(devices)):
            _take_slurm_for_torchrun()
        elif count_devices(devices) == 1:
            return Ranks()
        else:
            launch(count_devices(devices), command)
    end_with_launcher()

    def take_device(place: Place) -> None:
        if needs_gpu:
            if place.local_rank >= torch.cuda.device_count():
                what = f"rank {place.rank} wants GPU {place.local_rank}, "
                what += f"this machine has {torch.cuda.device_count()}"
                raise UserError(what, "start fewer processes")
            torch.cuda.set_device(place.local_rank)
        elif "OMP_NUM_THREADS" not in os.environ:
            here = place.local_world_size or place.world_size
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))

    backend = "nccl" if needs_gpu else "gloo"
    return connect(timeout_seconds, backend=backend, prepare=take_device, call=call)


def connect(
    timeout_seconds: float,
    *,
    backend: str = "gloo",
    prepare: "Callable[[Place], None]" = lambda place: None,
    advice: str = INTACT,
    call: int = 0,
) -> Ranks:
    """Become the rank that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say. See `join_ranks`.

    Args:
        prepare: called once the others can hear of its UserError, and before they are connected.
        advice: of `Ranks`.
        call: how often these processes have met and left before.
    """
    place = place_in_environment()
    if place.world_size == 1:
        return Ranks()
    if place.is_one_machine:
        listen_on_loopback()
    where = (
        "the launcher's store"
        if PRIVATE_STORE in os.environ
        else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )
    try:
        store = _open_store(place)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise _not_connected(place, where, error) from error
    # torchrun's store survives a restart: a prefix for each attempt
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = dist.PrefixStore(f"{attempt}, call {call}" if call else attempt, store)
    bounded = BoundedStore(dist.PrefixStore("run", store))
    ranks = Ranks(place.rank, place.world_size, place.local_rank, bounded, timeout_seconds, advice)
    try:
        prepare(place)
        ranks.wait_for_start()
        ranks.watch(dist.PrefixStore("signs", store.clone()))
        timeout = timedelta(seconds=timeout_seconds)
        of_group: dict[str, Any] = {"store": dist.PrefixStore("group", store), "timeout": timeout}
        dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, **of_group)
        ranks.control, ranks.patient = (
            cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
            for limit in (timeout, timedelta(days=30))
        )
    except (UserError, LostRank) as error:
        if isinstance(error, UserError):
            ranks.report_failure(str(error), 2)
        ranks.release_children()
        raise
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        refusal = _not_connected(place, where, error)
        ranks.report_failure(str(refusal), 2)
        ranks.release_children()
        raise refusal from error
    return ranks


def listen_on_loopback() -> None:
    """Before a group is made: let gloo and NCCL, which ask no password, listen to this machine alone."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


class NoPlace(UserError):
    """The environment does not say which rank this is: it may be the only one, and must tell the user."""


@dataclass(frozen=True)
class Place:
    """Which rank the environment makes of this process; `local_world_size` where it says so."""

    rank: int
    world_size: int
    local_rank: int = 0
    local_world_size: int | None = None

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks are known to be on this machine."""
        address = os.environ.get("MASTER_ADDR", "")
        here = address == "localhost" or address.startswith("127.") or address == "::1"
        return PRIVATE_STORE in os.environ or self.local_world_size == self.world_size or here


def place_in_environment() -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK, for several processes MASTER_ADDR and MASTER_PORT. Raises NoPlace."""
    fix, numbers = LAUNCHERS, {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if text := os.environ.get(name):
            if not re.fullmatch("[0-9]{1,9}", text.strip()):
                what = "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers"
                raise NoPlace(f"{what} ({name} is {shorten(text)})", fix)
            numbers[name] = int(text)
    if numbers.get("WORLD_SIZE") == 1 and numbers.get("RANK", 0) == 0:
        return Place(0, 1)
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    needed += [] if PRIVATE_STORE in os.environ else ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        present = ", ".join(name for name in ("RANK", "WORLD_SIZE") if name in numbers) or "RANK"
        raise NoPlace(f"{present} is set, but not {', '.join(missing)}", fix)
    place = Place(
        numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers.get("LOCAL_WORLD_SIZE")
    )
    for name, value in (("RANK", place.rank), ("LOCAL_RANK", place.local_rank)):
        if value >= place.world_size:
            raise NoPlace(
                f"{name} is {value} and WORLD_SIZE is {place.world_size}: ranks are counted from 0", fix
            )
    if not 0 < numbers.get("MASTER_PORT", 1) < 2**16:
        raise NoPlace(f"MASTER_PORT is {numbers['MASTER_PORT']}", "give a port between 1 and 65535")
    return place


def started_by_srun(devices: int) -> bool:
    """Whether srun started this process as one of several, which then takes SLURM's numbers.

    Raises:
        NoPlace: SLURM or mpirun was asked for several processes, and this is the only one, or cannot tell.
    """
    environ = os.environ
    # set by srun, not in a batch script nor in salloc's shell
    in_step = "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    asked = environ.get("SLURM_NTASKS", "1") or "1"
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "") or asked if in_step else asked
    if "SLURM_PROCID" in environ:
        if not tasks.isdecimal():
            raise NoPlace(
                f"SLURM_NTASKS or SLURM_STEP_NUM_TASKS is {shorten(tasks)}", "unset it for one process"
            )
        if in_step and int(tasks) > 1:
            return True
        if not in_step and int(tasks) > 1 and devices == 1:
            what = f"this job has {tasks} tasks, and python was started without srun: it is the only process"
            fix = f"start `srun {command_line('pretrain')} …`, or give devices={tasks}"
            raise NoPlace(what, f"{fix}, or set --ntasks=1 for one process")
    if environ.get("WORLD_SIZE"):
        place_in_environment()  # raises, where it is not 1
    if not in_step and devices == 1:
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
            if environ.get(name, "1").isdecimal() and int(environ.get(name, "1")) > 1:
                what = f"mpirun started {environ[name]} processes ({name}), and its numbers are not read"
                names = "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
                raise NoPlace(what, f"start by torchrun or srun, or set {names}")
    return False


def _open_store(place: Place) -> dist.Store:
    """The key-value store that all ranks reach: the launcher's own, torchrun's, or one in rank 0."""
    if PRIVATE_STORE in os.environ:
        return dist.FileStore(os.environ[PRIVATE_STORE])
    port, within = int(os.environ["MASTER_PORT"]), timedelta(seconds=START_SECONDS)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not place.is_one_machine:
        return next(dist.rendezvous("env://", timeout=within))[0]
    if place.rank:
        return dist.TCPStore("127.0.0.1", port, place.world_size, False, within)
    with socket.socket() as listening:  # a socket of ours: torch's would listen on all interfaces
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(place.world_size + 128)
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            place.world_size,
            True,
            within,
            wait_for_workers=False,
            master_listen_fd=listening.fileno(),
        )
        listening.detach()
    return store


def _not_connected(place: Place, where: str, error: Exception) -> UserError:
    what = f"rank {place.rank} of {place.world_size} does not meet the others at {where} "
    what += f"({first_line(error, 120)})"
    fix = "see that MASTER_ADDR and MASTER_PORT are rank 0's, the port is free, and all are started"
    return UserError(what, f"{fix} (by srun, not by python alone)" if "SLURM_JOB_ID" in os.environ else fix)


def _take_slurm_for_torchrun() -> None:
    """srun starts one process a task: the names that torchrun would have given them."""
    # parses SLURM's node lists; imported here, for it takes seconds
    from lightning_fabric.plugins.environments import SLURMEnvironment

    try:
        slurm = SLURMEnvironment()
        os.environ.setdefault("MASTER_ADDR", slurm.main_address)
        os.environ.setdefault("MASTER_PORT", str(slurm.main_port))
        os.environ |= {
            "RANK": str(slurm.global_rank()),
            "WORLD_SIZE": str(slurm.world_size()),
            "LOCAL_RANK": str(slurm.local_rank()),
        }
    except (RuntimeError, KeyError, ValueError) as error:
        what = f"SLURM's variables are not those of srun with several tasks ({error})"
        fix = "give sbatch --ntasks-per-node and start by srun, or unset SLURM_NTASKS for one process"
        raise UserError(what, fix) from error
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES", "")
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "")  # an upper bound
    if nodes == "1":
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    elif nodes.isdecimal() and per_node.isdecimal() and int(nodes) * int(per_node) == slurm.world_size():
        os.environ.setdefault("LOCAL_WORLD_SIZE", per_node)


def launch(count: int, command: Sequence[str]) -> None:
    """Start `command` as the ranks 1 to count - 1 of this machine, and become rank 0.

    Their store is a file without a name, which only these processes can open: no port, no password, and
    nothing to clean up. (Lightning Fabric's launcher kills rank 0 before that can say what happened.)
    """
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    handed: tuple[int, ...] = ()
    if hasattr(os, "memfd_create"):
        handed = (os.memfd_create("ssl_emp", 0),)
        common[PRIVATE_STORE] = f"/proc/self/fd/{handed[0]}"
    else:  # macOS: a file in a folder that only this user can open
        common[PRIVATE_STORE] = os.path.join(tempfile.mkdtemp(prefix="ssl_emp-"), "store")
    for rank in range(1, count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), LAUNCHED: str(os.getpid())}
        environment = os.environ | common | own
        STARTED[rank] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=handed)
    os.environ |= common | {"RANK": "0", "LOCAL_RANK": "0"}


def leave_ranks(ranks: Ranks) -> None:
    """Wait for the others, then close the connections; rank 0, which may host the store, goes last."""
    if ranks.store is None:
        return
    ranks.barrier()
    if ranks.is_first:
        keys = [f"left/{rank}" for rank in range(1, ranks.world_size)]
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not ranks.store.check(keys):
            time.sleep(0.02)
    else:
        ranks.store.set(f"left/{ranks.rank}", "yes")
    if ranks.liveness is not None:
        ranks.liveness.stop()
    dist.destroy_process_group()
    _wait_for(list(STARTED.values()), LEAVE_SECONDS)


def end_with_line(
    line: str, code: int, ranks: Ranks, speaks: bool | None = None, lost: Collection[int] = ()
) -> int:
    """One line on standard error from all ranks; the exit code, or the end of one of several processes.

    Args:
        speaks: whether this process is the one that writes it; None where the mistake is its own, of which
            the others are told.
        lost: the ranks that hang.
    """
    if speaks is None:
        ranks.report_failure(line, code)
        speaks = ranks.is_first and os.environ.get("LOCAL_RANK", "0") == "0"
    if speaks:
        put("stderr", f"error: {printable(line)}\n")
    end_abruptly(ranks, code, lost)
    return code


def end_abruptly(ranks: Ranks, code: int, lost: Collection[int] = ()) -> None:
    """End this process, where it is one of several, without an exchange that nobody else comes to."""
    if ranks.world_size > 1:
        put("stdout", "")
        ranks.release_children(lost, at_least=1.0)  # the store in which the others read why may be here
        os._exit(code)


def end_lost(ranks: Collection[int]) -> None:
    """End the hanging ranks of one `launch`: stopped, they would keep memory and terminal for ever."""
    for rank in set(ranks) & STARTED.keys():
        STARTED[rank].kill()  # does nothing where it has ended
    parent = os.environ.get(LAUNCHED)
    if 0 in ranks and parent is not None and os.getppid() == int(parent):
        with suppress(ProcessLookupError):
            os.kill(int(parent), signal.SIGKILL)


def _wait_for(processes: list["subprocess.Popen[bytes]"], seconds: float) -> None:
    """Until they have ended; those that have not by then are killed, which also ends one that is stopped."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        if process.poll() is None:
            process.kill()


def is_exchange(error: Exception, ranks: Ranks) -> bool:
    """Whether an exception comes from an exchange between ranks that did not come about."""
    words = ("gloo", "NCCL", "Connection closed", "Timed out", "Broken pipe")
    return ranks.world_size > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def end_with_launcher() -> None:
    """In a process that `launch` started: end when rank 0 has ended, also in the midst of an exchange."""
    parent = os.environ.get(LAUNCHED)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        time.sleep(2 * GRACE_SECONDS)  # time to end by itself, with a message
        os._exit(3)

    threading.Thread(target=watch, name="ssl_emp-orphan", daemon=True).start()


# ---- BatchNorm


def share_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of `model` take the statistics of the whole batch, in place, as one process would.

    On a GPU that is torch's SyncBatchNorm, which does not run on a CPU; there it is `SharedBatchNorm`.
    """
    if ranks.world_size == 1:
        return
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            on_gpu = child.running_mean is not None and child.running_mean.is_cuda
            to_sync = nn.SyncBatchNorm.convert_sync_batchnorm
            shared: Any = to_sync(child) if on_gpu else SharedBatchNorm(child, ranks)
            if isinstance(act := getattr(child, "act", None), nn.Module):  # timm's has its activation inside
                shared.drop, shared.act = getattr(child, "drop", nn.Identity()), act
                shared.register_forward_hook(_activate)
            setattr(model, name, shared)
        else:
            share_batch_norm(child, ranks)


def _activate(norm: Any, _: Any, normalised: Tensor) -> Tensor:
    return cast(Tensor, norm.act(norm.drop(normalised)))


class SharedBatchNorm(_BatchNorm):
    """A BatchNorm over the parts of all ranks, of equal size; parameters and buffers are those of `norm`."""

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.ranks = ranks
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2, input.shape

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        normalised, mean, variance = _Normalise.apply(input, self.eps, self.ranks)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None and self.num_batches_tracked is not None
            count = self.ranks.world_size * input.numel() // input.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype) * count / (count - 1), self.momentum)
        if self.affine:
            shape = (1, -1, *[1] * (input.dim() - 2))
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return cast(Tensor, normalised.to(input.dtype))


class _Normalise(torch.autograd.Function):
    """x (b, C, …) of every rank -> x normalised over all ranks; mean and biased variance (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        over = [0, *range(2, x.dim())]
        wide = x if x.dtype == torch.float64 else x.float()
        spread, centre = torch.var_mean(wide, over, correction=0)  # (C,), of this part
        spreads, centres = ranks.gather(torch.stack([spread, centre])[None]).unbind(1)  # (W, C)
        mean = centres.mean(0)
        variance = spreads.mean(0) + (centres - mean).square().mean(0)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = (variance + eps).rsqrt().view(shape)
        normalised = (wide - mean.view(shape)) * scale
        ctx.save_for_backward(normalised, scale)
        ctx.over, ctx.ranks, ctx.dtype = over, ranks, x.dtype
        ctx.mark_non_differentiable(mean, variance)
        return normalised, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        normalised, scale = ctx.saved_tensors
        # (2, C), of this part
        means = torch.stack([upstream.mean(ctx.over), (upstream * normalised).mean(ctx.over)])
        of_g, of_product = ctx.ranks.gather(means[None]).mean(0).view(2, *scale.shape)
        return ((upstream - of_g - normalised * of_product) * scale).to(ctx.dtype), None, None
