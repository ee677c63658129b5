"""The processes of a run: who they are, what they exchange, and how all of them end when one does.

One process a device. Every rank holds all images, all scores and the same kept list; a batch is cut by position, rank r takes the
r-th part, and what a rank found out about its part is gathered. So nothing depends on how many there are, but for rounding.

Started by `devices=N` (`launch`), by torchrun or by srun. Letters: W ranks, B batch, b = B / W, C channels.
"""

import os
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_emp.errors import RunFailed, UserError
from ssl_emp.keyed import keyed_bits

LAUNCHED = "SSL_EMP_LAUNCHED"  # set for the processes that `launch` starts
STARTED: list[subprocess.Popen[bytes]] = []  # by `launch`
MEET_SECONDS = 60.0  # from the first rank's start to the last one's
GRACE_SECONDS = 5.0  # for the ranks that live to say so, before the others are called lost
FINGERPRINT = 108  # first key of `Ranks.agree_on`


class LostRank(RunFailed):
    """Another rank is gone, hangs, or failed; `speaks` is whether this rank is the one that tells the user."""

    def __init__(self, line: str, speaks: bool, code: int = 3) -> None:
        super().__init__(line)
        self.speaks, self.code = speaks, code


class Ranks:
    """This process among the W of a run. With one process every method is what it says, without any communication.

    Args:
        rank, world_size: who of how many.
        local_rank: which device of its machine.
        store: a key-value store that all ranks reach; None for one process.
        control: a gloo group, for what the hosts agree on.
        timeout_seconds: how long a rank waits for another before it calls it lost.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        store: dist.Store | None = None,
        control: dist.ProcessGroup | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.store, self.control, self.timeout_seconds = store, control, timeout_seconds
        self.meetings = 0

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
        """`model` with gradients that are the mean over the ranks, exchanged while the backward pass goes on."""
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option has a new name in newer torch
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def highest(self, *numbers: int) -> list[int]:
        """The largest of each over the ranks; on the hosts, so that no device is waited for."""
        if self.world_size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return cast(list[int], values.tolist())

    def agree_on(self, what: str, *tensors: Tensor) -> None:
        """Raise RunFailed on all ranks where they do not hold the same bits. Reads one number from the device."""
        if self.world_size == 1:
            return
        total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
        for tensor in tensors:
            bits = tensor.flatten().view(torch.int32) if tensor.dtype == torch.float32 else tensor.flatten()
            total = total + keyed_bits(FINGERPRINT, torch.arange(len(bits), device=bits.device), bits.long()).sum()  # wraps, and may
        sums = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sums, total.cpu().view(1), group=self.control)
        differing = [rank for rank in range(self.world_size) if sums[rank] != sums[0]]
        if differing:
            raise RunFailed(
                f"rank {', '.join(map(str, differing))} and rank 0 disagree about {what}; the last checkpoint is intact. "
                "fix: --resume; where it comes again, look for a faulty device"
            )

    def meet(self, word: str = "", patient: bool = False) -> list[str]:
        """Wait for all ranks here and hear the word of each: without limit where `patient`. No pickle, and no device, is involved."""
        if self.store is None:
            return [word]
        self.meetings += 1
        keys = [f"meeting/{self.meetings}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], word)
        words = []
        for rank, key in enumerate(keys):
            deadline = time.monotonic() + self.timeout_seconds
            while not self._heard(key):  # and not store.wait(): a rank that fails says so, and is not waited for
                self._raise_if_failed()
                if time.monotonic() > deadline and not patient:
                    raise LostRank(f"rank {rank} did not come within {self.timeout_seconds:.0f} s. fix: --resume", self.rank == 0)
                time.sleep(0.02)
            words.append(self.store.get(key).decode())
        return words

    def _heard(self, key: str) -> bool:
        assert self.store is not None
        try:
            return bool(self.store.check([key]))
        except RuntimeError as error:
            raise LostRank("rank 0 is lost: nothing answers for it any more. fix: --resume", self.rank == 1) from error

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """The first rank of every machine alone, then its others: what the first one downloads or caches is there for them."""
        if self.local_rank:
            self.meet(patient=True)  # to decode a million images takes its time
        yield
        if not self.local_rank:
            self.meet(patient=True)

    def confess(self, line: str, code: int) -> None:
        """Tell the others why this rank ends, before it does."""
        if self.store is not None:
            with suppress(Exception):  # the store may be what is gone
                self.store.set("failed", f"{self.rank}\0{code}\0{line}")

    def _raise_if_failed(self) -> None:
        assert self.store is not None
        if self.store.check(["failed"]):
            rank, code, line = self.store.get("failed").decode().split("\0")
            if int(rank) != self.rank:
                # rank 0 says itself why it ends
                raise LostRank(f"rank {rank}: {line}" if int(rank) else line, self.rank == 0, int(code))

    def _speaks(self, lost: set[int]) -> bool:
        return self.rank == min(set(range(self.world_size)) - lost, default=0)

    def explain(self, error: Exception) -> LostRank:
        """Whose fault an exchange is that did not come about: the rank that confessed, or those that give no sign of life."""
        assert self.store is not None
        try:
            self._raise_if_failed()
            self.store.set(f"alive/{self.rank}", "yes")
            deadline = time.monotonic() + GRACE_SECONDS
            lost = set(range(self.world_size))
            while lost and time.monotonic() < deadline:
                self._raise_if_failed()
                lost = {rank for rank in lost if not self.store.check([f"alive/{rank}"])}
                time.sleep(0.05)
        except LostRank as found:
            return found
        except Exception:  # no store: its host, rank 0, or the launcher is gone
            lost = {0}
        names = f"rank {', '.join(map(str, sorted(lost)))} is lost" if lost else "the ranks lost each other"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return LostRank(f"{names} ({said[:120]}); the last checkpoint is intact. fix: --resume", self._speaks(lost))


ALONE = Ranks()


def count_devices(devices: int | str) -> int:
    """`auto` is every GPU, or one process without any."""
    return max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)


def join_ranks(devices: int | str, timeout_seconds: float, needs_gpu: bool, command: Sequence[str] = ()) -> Ranks:
    """Become one of the ranks that torchrun, srun or `launch` started; alone where none of them did.

    Args:
        devices: processes to start on this machine where nobody started any yet.
        timeout_seconds: of every exchange.
        needs_gpu: whether each rank takes a GPU (then tensors travel by NCCL, else by gloo).
        command: what starts the other processes: that which started this one.

    Raises:
        UserError: the environment is not complete, the address does not answer, or there are fewer GPUs than ranks.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        _take_slurm_for_torchrun()
    if "RANK" not in os.environ:
        if count_devices(devices) == 1:
            return Ranks()
        launch(count_devices(devices), command)
    end_with_launcher()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}", "start by torchrun, srun or devices=N, or unset RANK for one process")
    try:
        rank, world_size, local_rank, port = (int(os.environ[name]) for name in (*names[:3], names[4]))
    except ValueError as error:
        what = f"RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers ({error})"
        raise UserError(what, "start by torchrun, srun or devices=N") from error
    if world_size == 1:
        return Ranks()
    if needs_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank} wants GPU {local_rank}, this machine has {torch.cuda.device_count()}", "start fewer processes")
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    timeout = timedelta(seconds=timeout_seconds)
    where = f"{os.environ['MASTER_ADDR']}:{port}"
    try:
        meet_within = timedelta(seconds=MEET_SECONDS)
        store, *_ = next(dist.rendezvous("env://", timeout=meet_within))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # torchrun's outlives a restart
        run_store = dist.PrefixStore("run", store)
        run_store.set_timeout(timeout)
        run_store.set(f"here/{rank}", "yes")
        run_store.wait([f"here/{other}" for other in range(world_size)], meet_within)
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group("nccl" if needs_gpu else "gloo", store=group_store, rank=rank, world_size=world_size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"rank {rank} of {world_size} does not meet the others at {where} ({said[:120]})"
        raise UserError(what, "see that MASTER_ADDR and MASTER_PORT are rank 0's, the port is free, and all are started") from error
    assert isinstance(control, dist.ProcessGroup)
    return Ranks(rank, world_size, local_rank, run_store, control, timeout_seconds)


def _take_slurm_for_torchrun() -> None:
    """srun starts one process a task: the names that torchrun would have given them."""
    from lightning_fabric.plugins.environments import SLURMEnvironment  # it reads SLURM's lists of nodes; seconds to import

    try:
        slurm = SLURMEnvironment()
        os.environ.setdefault("MASTER_ADDR", slurm.main_address)
        os.environ.setdefault("MASTER_PORT", str(slurm.main_port))
        os.environ |= {"RANK": str(slurm.global_rank()), "WORLD_SIZE": str(slurm.world_size()), "LOCAL_RANK": str(slurm.local_rank())}
    except (RuntimeError, KeyError, ValueError) as error:
        what = f"SLURM's variables are not those of srun with several tasks ({error})"
        raise UserError(what, "give sbatch --ntasks-per-node and start by srun, or unset SLURM_NTASKS for one process") from error
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["SLURM_NTASKS_PER_NODE"])


def launch(count: int, command: Sequence[str]) -> None:
    """Start `command` as the ranks 1 to count - 1 of this machine, and become rank 0.

    Lightning Fabric's launcher would do, but it kills rank 0 before that can say what happened.
    """
    with socket.socket() as probe:  # asks the system for a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in range(1, count):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), LAUNCHED: str(os.getpid())}
        STARTED.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
    os.environ |= common | {"RANK": "0", "LOCAL_RANK": "0"}


def leave_ranks(ranks: Ranks) -> None:
    """After the work: wait for the others, then close the connections. Rank 0, in whose process the store may live, goes last."""
    if ranks.store is None:
        return
    ranks.meet(patient=True)
    if ranks.is_first:
        keys, deadline = [f"left/{rank}" for rank in range(1, ranks.world_size)], time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not ranks.store.check(keys):
            time.sleep(0.02)
    else:
        ranks.store.set(f"left/{ranks.rank}", "yes")
    dist.destroy_process_group()
    for process in STARTED:
        process.wait()


def is_exchange(error: Exception, ranks: Ranks) -> bool:
    """Whether an exception comes from an exchange between ranks that did not come about."""
    words = ("gloo", "NCCL", "Connection closed", "Timed out", "Broken pipe")
    return ranks.world_size > 1 and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


def end_with_launcher() -> None:
    """In a process that `launch` started: end when rank 0 has ended, however it did, and be it in the midst of an exchange."""
    parent = os.environ.get(LAUNCHED)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        time.sleep(2 * GRACE_SECONDS)  # an orphan that ends by itself says more
        os._exit(3)

    threading.Thread(target=watch, name="ssl_emp-orphan", daemon=True).start()


# --------------------------------------------------------------------------------------------------------- BatchNorm


def share_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of `model` take the statistics of the whole batch, in place: what one process would.

    On a GPU that is torch's SyncBatchNorm, which does not run on a CPU; there it is `SharedBatchNorm`.
    """
    if ranks.world_size == 1:
        return
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            on_gpu = child.running_mean is not None and child.running_mean.is_cuda
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child) if on_gpu else SharedBatchNorm(child, ranks))
        else:
            share_batch_norm(child, ranks)


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
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
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
    """x (b, C, …) of every rank -> x normalised over the batch of all, float32 or float64; its mean and biased variance (C,)."""

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
        means = torch.stack([upstream.mean(ctx.over), (upstream * normalised).mean(ctx.over)])  # (2, C), of this part
        of_g, of_product = ctx.ranks.gather(means[None]).mean(0).view(2, *scale.shape)
        return ((upstream - of_g - normalised * of_product) * scale).to(ctx.dtype), None, None
