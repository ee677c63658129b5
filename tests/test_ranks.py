"""Several processes do what one does: loss, gradients, BatchNorm, scores, kept lists, files; and all of them
end when one does.
"""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_linear_eval import images, small_encoder
from torch import Tensor, nn

from linear_eval import EvalError, extract_features
from ssl_emp.augment import cut_views
from ssl_emp.commands import pretrain
from ssl_emp.commands.evaluators import distribute
from ssl_emp.commands.job import Job
from ssl_emp.commands.ledger import MISTAKES
from ssl_emp.config import load_config
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.loss import dcl, nt_xent, nt_xent_and_dcl
from ssl_emp.loss import nt_xent as nt_xent_alone
from ssl_emp.model import SimCLR, build_encoder, save_encoder
from ssl_emp.run import ranks as ranks_module
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.liveness import BoundedStore, Liveness
from ssl_emp.run.ranks import (
    ALONE,
    Failed,
    NoPlace,
    Ranks,
    SharedBatchNorm,
    join_ranks,
    share_batch_norm,
    started_by_srun,
)
from ssl_emp.run.report import Report


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_rank(
    work: Callable[[Ranks], Any], rank: int, world_size: int, port: int, answers: Any, all_answered: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ |= {"MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # a forkserver imported torch without conftest
    try:
        answers.put((rank, work(join_ranks(1, 30.0, needs_gpu=False))))
    except Exception as error:  # noqa: BLE001 - told to the test
        answers.put((rank, error))
    all_answered.wait(60)  # rank 0 has the store, which the others may be reading


def on_ranks(world_size: int, work: Callable[[Ranks], Any], backward: bool = False) -> list[Any]:
    """What `work(ranks)` gives in each of `world_size` forked processes that talk by gloo.

    They are forked from this one, where torch is imported already. A backward pass may not run in the child
    of a process whose autograd has threads, and another test may have given it some: `backward` forks from a
    process that has only imported this module.
    """
    context: Any = multiprocessing.get_context("forkserver" if backward else "fork")
    if backward:
        context.set_forkserver_preload([__name__])
        with pytest.MonkeyPatch.context() as patch:
            # where it finds this module; it starts once
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
    answers, all_answered, port = context.Queue(), context.Event(), free_port()
    shared = (world_size, port, answers, all_answered)
    processes = [context.Process(target=_as_rank, args=(work, rank, *shared)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    all_answered.set()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for answer in found.values():
        if isinstance(answer, Exception):
            raise answer
    return [found[rank] for rank in range(world_size)]


def step(ranks: Ranks, arch: str = "resnet18") -> dict[str, list[float]]:
    """Loss, gradients and BatchNorm buffers of one training step on twelve images in float64, and the
    features in eval mode after it.
    """
    torch.manual_seed(0)
    width, stem = (8, "cifar") if arch == "resnet18" else (None, None)
    encoder = build_encoder(arch, width, stem, 8, [0.5] * 3, [0.5] * 3)
    model = SimCLR(encoder, 16, 8).double()
    view_a, view_b, weight = (
        torch.randn(12, 3, 8, 8).double(),
        torch.randn(12, 3, 8, 8).double(),
        torch.rand(12).double(),
    )
    index = ranks.part(torch.arange(12))
    share_batch_norm(model, ranks)
    trained = ranks.share_gradients(model)
    _, z = trained(torch.cat([view_a[index], view_b[index]]))
    z_a, z_b = z.chunk(2)
    loss = nt_xent(z_a, z_b, 0.5, ranks)
    (loss * weight[index]).mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    after = model.eval()(view_a[index])[0]
    return {
        "loss": ranks.gather(loss).tolist(),
        "gradients": torch.cat([g.flatten() for g in gradients]).tolist(),
        "buffers": torch.cat([buffer.double().flatten() for buffer in model.buffers()]).tolist(),
        "features": ranks.gather(after).flatten().tolist(),
    }


def differ(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> dict[str, float]:
    """Largest difference of each, over the largest value."""
    pairs = {
        name: (
            torch.tensor(found[name], dtype=torch.float64),
            torch.tensor(wanted[name], dtype=torch.float64),
        )
        for name in wanted
    }
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def contrast(ranks: Ranks) -> dict[str, list[float]]:
    """Both contrastive losses of six pairs in float64, alone and from one pass, and the gradients of a
    weighted sum. A rank may hold a single pair: all its negatives are on the others.
    """
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    index = ranks.part(torch.arange(6))
    views = z_a[index].requires_grad_(), z_b[index].requires_grad_()
    alone = nt_xent(*views, 0.2, ranks), dcl(*views, 0.2, ranks)
    together = nt_xent_and_dcl(*views, 0.2, ranks)
    found = {}
    for name, losses in (("alone", alone), ("together", together)):
        total = (torch.stack(losses) * weight[:, index]).sum()
        gradients = torch.autograd.grad(total, views, retain_graph=True)
        found[name] = ranks.gather(torch.stack(losses, 1).detach()).flatten().tolist()
        found[f"{name}, gradient"] = ranks.gather(torch.cat(gradients, 1)).flatten().tolist()
    return found


@pytest.mark.whole
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_losses_of_several_ranks_are_those_of_one(world_size: int) -> None:
    wanted = contrast(ALONE)
    for found in on_ranks(world_size, contrast, backward=True):
        assert max(differ(found, wanted).values()) < 1e-12, differ(found, wanted)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("world_size", "arch"), [(2, "resnet18"), (3, "resnet18"), (2, "timm:test_efficientnet")]
)
def test_a_step_of_several_ranks_is_the_step_of_one(world_size: int, arch: str) -> None:
    """timm's EfficientNet has its activations inside its BatchNorms."""
    work = partial(step, arch=arch)
    wanted = work(ALONE)
    for found in on_ranks(world_size, work, backward=True):
        assert max(differ(found, wanted).values()) < 1e-10, differ(found, wanted)


def step_without_gather(ranks: Ranks) -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules[__name__],
            "nt_xent",
            lambda z_a, z_b, temperature, ranks: nt_xent_alone(z_a, z_b, temperature),
        )
        return step(ranks)


def step_without_statistics(ranks: Ranks) -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "share_batch_norm", lambda model, ranks: None)
        return step(ranks)


def step_without_sum(ranks: Ranks) -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "share_gradients", lambda self, model: model)
        return step(ranks)


@pytest.mark.whole
def test_the_controls_fail() -> None:
    """Without the gathered negatives, without shared statistics or without summed gradients it is another
    step.
    """
    wanted, controls = step(ALONE), (step_without_gather, step_without_statistics, step_without_sum)
    without_gather, without_statistics, without_sum = (
        differ(on_ranks(2, work, backward=True)[0], wanted) for work in controls
    )
    assert without_gather["loss"] > 1e-3 and without_gather["gradients"] > 1e-3
    assert without_statistics["buffers"] > 1e-3 and without_statistics["loss"] > 1e-3
    assert without_sum["gradients"] > 1e-3 and without_sum["loss"] < 1e-10


def whole_run(ranks: Ranks, config: Path, out: Path, words: list[str]) -> dict[str, list[float]]:
    """A run with its network in float64: weights, statistics, what each sample was trained and scored."""

    prepare = pretrain.prepare

    def prepare_double(*given: Any, **options: Any) -> Job:
        job = prepare(*given, **options)
        job.model.double()  # before the optimizer, whose state has the type of the weights
        return job

    def double(job: Job, report: Report) -> tuple[Any, Any]:
        return job.model, lambda *given: tuple(view.double() for view in cut_views(*given))

    short = [
        "data.max_images=24",
        "epochs=3",
        "prune.anneal_fraction=0",
        "prune.fraction=0.34",
    ]  # 3 + 2 + 2 steps
    short += ["monitor.knn_every=0", "monitor.reliability_every=0"]
    settings = load_config(config, [f"out={out}", *words, *short])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "prepare", prepare_double)
        patch.setattr(pretrain, "compiled", double)
        assert pretrain.start_or_resume(settings, out, False, ranks) == 0
    ranks.barrier()  # the first one writes
    state, _ = load_checkpoint(out / "checkpoints")
    assert state is not None and state["finished"]
    record = state["pruner"]["record"]
    backbone = {name: value for name, value in state["model"].items() if name.startswith("backbone.")}
    return {
        "weights": torch.cat([value.double().flatten() for value in backbone.values()]).tolist(),
        "stem": state["model"]["backbone.conv1.weight"].flatten().tolist(),
        "times trained": record["times_trained"].tolist(),
        "scores": record["last"].flatten().tolist(),
    }


@pytest.mark.whole
@pytest.mark.parametrize(
    "words",
    [
        ["model.init={start}", "model.freeze=1", "optimizer.layer_decay=0.5"],
        [
            "augment.size=[[8,0.34],[16,1]]",
            "prune.policy=foresight",
            "loss=dcl",
            "prune.scoring_loss=nt_xent",
        ],
    ],
)
def test_a_run_of_two_ranks_is_the_run_of_one(words: list[str], tiny_config: Path, tmp_path: Path) -> None:
    """The same samples are kept, of a start with a frozen part and rates by part, and of views that grow;
    weights differ by rounding.
    """
    start = build_encoder("resnet18", 8, "imagenet", 16, [0.5] * 3, [0.5] * 3)
    save_encoder(start, tmp_path / "start")
    words = [word.format(start=tmp_path / "start") for word in words]
    alone = whole_run(ALONE, tiny_config, tmp_path / "1", words)
    work = partial(whole_run, config=tiny_config, out=tmp_path / "2", words=words)
    shared, other = on_ranks(2, work, backward=True)
    assert shared == other
    assert shared["times trained"] == alone["times trained"] and len(set(alone["times trained"])) > 1
    assert max(differ(shared, alone).values()) < 1e-4, differ(shared, alone)
    is_stem = torch.tensor(alone["stem"]).allclose(start.backbone.get_parameter("conv1.weight").flatten())
    assert is_stem is any("freeze" in word for word in words)


def test_shared_batch_norm_of_one_rank_is_batch_norm() -> None:
    x = torch.randn(6, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    plain = nn.BatchNorm2d(5).double()
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
    shared = SharedBatchNorm(plain, ALONE)
    (wanted,) = torch.autograd.grad((plain(x).sigmoid()).sum(), x)
    buffers = [buffer.clone() for buffer in plain.buffers()]
    plain.reset_running_stats()
    (found,) = torch.autograd.grad((shared(x).sigmoid()).sum(), x)
    torch.testing.assert_close(found, wanted)
    for buffer, before in zip(shared.buffers(), buffers, strict=True):
        torch.testing.assert_close(buffer, before)
    assert shared.eval()(x).equal(
        F.batch_norm(x, shared.running_mean, shared.running_var, shared.weight, shared.bias)
    )
    shared.train().track_running_stats = False  # as a scoring pass does
    shared(x)
    torch.testing.assert_close(list(shared.buffers()), list(shared.eval().buffers()))


def test_parts_and_gathering_are_each_others_inverse() -> None:
    def work(ranks: Ranks) -> Any:
        table = torch.arange(24).view(2, 12)
        parts = ranks.part(table)
        return (
            parts.shape,
            [ranks.gather(row).tolist() for row in parts],
            ranks.highest(ranks.rank, -ranks.rank),
        )

    for shape, rows, highest in on_ranks(3, work):
        assert shape == (2, 4) and rows == [list(range(12)), list(range(12, 24))] and highest == [2, 0]


def test_ranks_that_disagree_are_named() -> None:
    def work(ranks: Ranks) -> str:
        kept, scores = torch.arange(5), torch.tensor([1.0, torch.inf, 2.0])
        ranks.agree_on("nothing yet", kept, scores)
        if ranks.rank == 1:
            scores[2] = torch.nextafter(scores[2], torch.tensor(3.0))
        try:
            ranks.agree_on("the samples of epoch 7", kept, scores)
        except RunFailed as error:
            return str(error)
        return "nobody noticed"

    for said in on_ranks(3, work):
        assert said.startswith("rank 1 and rank 0 disagree about the samples of epoch 7")


def test_the_first_goes_first_and_every_text_is_heard() -> None:
    def work(ranks: Ranks) -> tuple[float, float, list[str]]:
        with ranks.first_then_others():
            began = time.monotonic()
            time.sleep(0.2)
            ended = time.monotonic()
        return began, ended, ranks.barrier(f"word {ranks.rank}")

    times = on_ranks(3, work)
    assert all(began >= times[0][1] for began, _, _ in times[1:])
    assert all(words == ["word 0", "word 1", "word 2"] for _, _, words in times)


def test_rank_0_leaves_last(tmp_path: Path) -> None:
    """The store may live in its process: a rank that is slow to leave still finds it."""
    mark = tmp_path / "rank 0 has left"

    def work(ranks: Ranks) -> bool:
        too_early = False
        if ranks.rank == 2:
            assert ranks.store is not None
            tell = ranks.store.set

            def slowly(key: str, value: str) -> None:
                nonlocal too_early
                time.sleep(0.3)
                too_early |= mark.exists()
                tell(key, value)

            ranks.store.set = slowly  # type: ignore[method-assign]
        ranks_module.leave_ranks(ranks)
        if ranks.is_first:
            mark.touch()
        return too_early

    assert on_ranks(3, work) == [False] * 3 and mark.exists()


def test_a_reported_failure_reaches_who_waits() -> None:
    def work(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            ranks.report_failure("the file a.jpg is bad", 2)
            return None
        try:
            ranks.barrier()
        except ranks_module.LostRank as error:
            return str(error), error.code, error.speaks
        return "nothing heard"

    found = on_ranks(3, work)
    assert found[0] == ("rank 1: the file a.jpg is bad", 2, True) and found[2] == (
        "rank 1: the file a.jpg is bad",
        2,
        False,
    )


def test_what_fails_on_one_fails_on_all() -> None:
    def work(ranks: Ranks) -> list[str]:
        lines = []
        for failing, error in ((2, UserError("a.jpg is bad", "remove it")), (1, ValueError("two\nlines"))):
            for how in (ranks.together, ranks.first_then_others):
                try:
                    with how():
                        if ranks.rank == failing:
                            raise error
                    lines.append("nobody noticed")
                except Exception as found:
                    lines.append(f"{type(found).__name__}: {found}")
        with ranks.together():
            pass
        return lines

    first, second, third = on_ranks(3, work)
    assert first == [
        *["UserError: rank 2: a.jpg is bad. fix: remove it"] * 2,
        *["RunFailed: rank 1: ValueError: two"] * 2,
    ]
    assert second == [*first[:2], *["ValueError: two\nlines"] * 2]
    assert third == [*["UserError: a.jpg is bad. fix: remove it"] * 2, *first[2:]]


def test_rows_of_any_number_are_gathered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "BYTES_AT_ONCE", 16)  # a row at once

    def work(ranks: Ranks) -> Any:
        found = []
        for counts in ([2, 0, 3], [0, 1, 0], [0, 0, 0]):
            begin = sum(counts[: ranks.rank])
            rows = torch.arange(begin, begin + counts[ranks.rank])[:, None].expand(-1, 4).float()
            found.append(ranks.gather_rows(rows if len(rows) else torch.empty(0, 0), sum(counts)).tolist())
        return found

    rows = [[float(number)] * 4 for number in range(5)]
    assert on_ranks(3, work) == [[rows, rows[:1], []]] * 3


def test_rows_of_other_images_or_widths_are_refused() -> None:
    def work(ranks: Ranks) -> list[str]:
        lines = []
        for total, width in ((3, 4 + (ranks.rank == 1)), (2 + ranks.rank, 4)):
            with pytest.raises(UserError) as error:
                ranks.gather_rows(torch.zeros(1, width), total)
            lines.append(str(error.value))
        return lines

    for first, second in on_ranks(2, work):
        assert "features of 4, 5 columns for 3 images. fix: " in first
        assert "features of 4 columns for 2, 3 images. fix: " in second


def share_features(ranks: Ranks) -> Any:
    """Features of images by their number, how many of them this rank computed, and what it refuses."""

    def extract(encoder: nn.Module, pixels: Tensor) -> Tensor:
        given: dict[str, Any] = {} if ranks is ALONE else {"distribute": partial(distribute, ranks, 4)}
        return extract_features(encoder, pixels, torch.arange(len(pixels)), batch_size=4, **given).x

    found = {}
    for num in (1, 2, 4, 5, 8, 9, 12, 13, 23, 24):
        seen: list[int] = []
        counted = small_encoder()
        counted.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(output)))
        found[num] = (extract(counted, images(num)).tolist(), sum(seen))
    if ranks is ALONE:
        return found, []

    class Picky(nn.Module):  # cannot stand the last image, which the last rank has
        def forward(self, x: Tensor) -> Tensor:
            if (x[:, 0, 0, 0] * 255).round().int().eq(7).any():
                raise EvalError("the seventh shade came", "leave it out")
            return x.flatten(1)

    pixels, lines = torch.zeros(9, 3, 2, 2, dtype=torch.uint8), []
    pixels[-1] = 7
    tries: list[tuple[nn.Module, int]] = [(Picky(), 9), (nn.Flatten(), 5 if ranks.rank == 1 else 9)]
    for encoder, num in tries:
        with pytest.raises((EvalError, UserError)) as error:
            extract(encoder.eval(), pixels[:num])
        lines.append(str(error.value))
    return found, lines


@pytest.mark.whole
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_and_get_the_features_of_one(world_size: int) -> None:
    """To the bit, every sample once, for numbers that do not divide and for fewer batches than ranks."""
    threads = torch.get_num_threads()
    alone, _ = share_features(ALONE)
    torch.set_num_threads(threads)
    answers = on_ranks(world_size, share_features, backward=True)
    for num, (features, _) in alone.items():
        assert all(found[num][0] == features for found, _ in answers)
        counts = [found[num][1] for found, _ in answers]
        assert sum(counts) == num, "images were encoded twice, or not at all"
        assert max(counts) <= -(-num // 4 // world_size) * 4 + 4
    for rank, (_, (picky, differing)) in enumerate(answers):
        before = "" if rank == world_size - 1 else f"rank {world_size - 1}: "
        assert picky == f"{before}the seventh shade came. fix: leave it out"
        assert "columns for 5, 9 images" in differing


def test_a_lost_rank_ends_the_command_and_does_not_cost_a_row() -> None:
    assert not issubclass(ranks_module.LostRank, MISTAKES)


LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what a launcher would; nothing else of any launcher is there."""
    for name in (
        *LAUNCHERS,
        *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_"))),
    ):
        monkeypatch.setenv(name, "")  # so that it is taken away again, whoever sets it
        monkeypatch.delenv(name)

    def give(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK, LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", **HERE}, "but not LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **HERE}, "must be numbers"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **HERE}, "does not meet"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **HERE}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5", **HERE}, "LOCAL_RANK is 5"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **HERE}, "RANK is -1"),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **HERE}, "RANK is 1 and WORLD_SIZE is 1"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", **HERE}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "0", "WORLD_SIZE": "2.0", "LOCAL_RANK": "0", **HERE}, "WORLD_SIZE is 2.0"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 30, "LOCAL_RANK": "0", **HERE}, "WORLD_SIZE is 999"),
        ({"RANK": "\u0663", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **HERE}, "RANK is"),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "70000",
            },
            "MASTER_PORT is 70000",
        ),
    ],
)
def test_an_environment_that_is_not_complete_is_a_line(
    environment: Callable[..., None], variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(**variables)
    monkeypatch.setattr(ranks_module, "START_SECONDS", 2.0)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        join_ranks(1, 2.0, needs_gpu=False)
    assert "\n" not in str(error.value) and "fix: " in str(error.value)


SBATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "1",
}


@pytest.mark.parametrize(
    "variables",
    [
        SBATCH,
        SBATCH | {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"},
        SBATCH | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},  # the script sets them, and forgets srun
        SBATCH | {"SLURM_JOB_NAME": "bash"},
    ],
)
def test_python_in_a_batch_script_names_srun(
    environment: Callable[..., None], variables: dict[str, str]
) -> None:
    environment(**variables)
    began = time.monotonic()
    with pytest.raises(
        NoPlace,
        match=f"has {variables['SLURM_NTASKS']} tasks, and python was started without srun.*fix: start `srun",
    ):
        join_ranks(1, 2.0, needs_gpu=False)
    assert time.monotonic() - began < 30  # and not when nobody else has come


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_mpirun_is_named(environment: Callable[..., None], name: str) -> None:
    environment(**{name: "4"})
    with pytest.raises(NoPlace, match=rf"mpirun started 4 processes \({name}\).*torchrun"):
        join_ranks(1, 2.0, needs_gpu=False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **HERE},
        SBATCH | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"},  # salloc's shell
        # its newer kind
        SBATCH
        | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "interactive"},
        SBATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun --pty bash
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "many"},
    ],
)
def test_one_process_runs_alone(environment: Callable[..., None], variables: dict[str, str]) -> None:
    environment(**variables)
    ranks = join_ranks(1, 2.0, needs_gpu=False)
    assert (ranks.rank, ranks.world_size, ranks.store) == (0, 1, None)


@pytest.mark.parametrize("variables", [{}, SBATCH, {"OMPI_COMM_WORLD_SIZE": "4"}])
def test_devices_starts_them_whatever_the_job_has(
    environment: Callable[..., None], variables: dict[str, str]
) -> None:
    environment(**variables)
    assert not started_by_srun(4)
    environment(**(SBATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}))
    assert started_by_srun(1) and started_by_srun(4)


def test_a_task_count_that_is_no_number_is_a_line(environment: Callable[..., None]) -> None:
    environment(**(SBATCH | {"SLURM_NTASKS": "4(x2)"}))
    with pytest.raises(NoPlace, match="SLURM_NTASKS"):
        join_ranks(1, 2.0, needs_gpu=False)


@pytest.mark.parametrize(
    "said",
    [
        b"", b"1", b"1\x002", b"1\x00two\x00line", b"-1\x003\x00line", b"1\x000\x00line", b"1\x00999\x00line",
        b"\xff\xfe\x00",
        "\u0661\x003\x00line".encode(), b"1" * 100_000, b"1.0\x003\x00line",
    ],
)  # fmt: skip
def test_what_is_no_report_of_a_failure_ends_with_one_line(said: bytes) -> None:
    failed = Failed.parse(said)
    assert (
        (failed.rank, failed.code) == (0, 3)
        and "none of them wrote" in failed.line
        and failed.line.isprintable()
    )


def test_a_reported_failure_is_text() -> None:
    assert Failed.parse(b"2\x0017\x00a\x1b[31mb\nc\x00d") == Failed(2, 17, "a\\x1b[31mb\\nc\\x00d")


@pytest.mark.parametrize(
    ("command", "said"),
    [("exit 7", "exit code 7"), ("kill -9 $$", "killed by SIGKILL"), ("exit 0", "exit code 0")],
)
def test_a_rank_that_ends_while_starting_is_named_at_once(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ranks_module.STARTED, 2, subprocess.Popen(["/bin/sh", "-c", command]))
    store = BoundedStore(torch.distributed.HashStore())
    store.set("started/1", "yes")
    with pytest.raises(ranks_module.LostRank, match=f"rank 2 was lost while starting .*{said}"):
        Ranks(0, 3, 0, store).wait_for_start()
    with pytest.raises(ranks_module.LostRank, match=said) as other:  # and the others hear it
        Ranks(1, 3, 1, store).wait_for_start()
    assert not other.value.speaks


def listening() -> list[str]:
    """Addresses, in hexadecimal, on which this process listens."""
    sockets = {
        os.readlink(path) for path in map(str, Path("/proc/self/fd").iterdir()) if os.path.lexists(path)
    }
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
    ]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")
def test_one_machine_listens_on_its_loopback_only() -> None:
    """What torch's store and gloo's connections listen on; the first has no password, the others neither."""
    found = on_ranks(2, lambda ranks: listening())
    assert all(found), found
    assert {address for addresses in found for address in addresses} == {"0100007F"}


def watch_closely(ranks: Ranks) -> Liveness:
    """Call lost who gives no sign for a second and a quarter."""
    assert ranks.liveness is not None and ranks.store is not None
    ranks.liveness.stop()
    ranks.timeout_seconds = 1.0
    ranks.watch(torch.distributed.PrefixStore("closely", ranks.store.store.clone()))
    return ranks.liveness


@pytest.mark.whole
def test_who_hangs_at_a_barrier_is_noticed() -> None:
    """There is no limit for those that work, but one for those whose main thread stands still."""

    def work(ranks: Ranks) -> Any:
        liveness = watch_closely(ranks)
        try:
            if ranks.rank == 1:
                time.sleep(4)
                return None
            ranks.barrier()
            return "nobody noticed"
        except ranks_module.LostRank as error:
            return str(error), error.code, error.lost
        finally:
            liveness.stop()  # else this process, which goes on to wait for the test, is ended

    line, code, lost = on_ranks(2, work)[0]
    assert "rank 1 is lost (it has not moved for" in line and "--resume" in line and code == 3 and lost == {1}


@pytest.mark.whole
def test_who_works_long_is_waited_for_at_a_barrier() -> None:
    def work(ranks: Ranks) -> Any:
        liveness = watch_closely(ranks)
        until = time.monotonic() + 3
        while ranks.rank == 1 and time.monotonic() < until:
            torch.randn(64, 64).svd()
        try:
            return ranks.barrier("done")
        finally:
            liveness.stop()

    assert on_ranks(2, work) == [["done", "done"]] * 2
