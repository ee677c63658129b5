"""Several processes do what one does: loss, gradients, BatchNorm, scores, kept lists, files; and all of them end when one does."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_emp import ranks as ranks_module
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.loss import nt_xent
from ssl_emp.model import SimCLR, build_encoder
from ssl_emp.ranks import ALONE, Ranks, SharedBatchNorm, join_ranks, share_batch_norm


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_rank(work: Callable[[Ranks], Any], rank: int, world_size: int, port: int, answers: Any, all_answered: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        answers.put((rank, work(join_ranks(1, 30.0, needs_gpu=False))))
    except Exception as error:  # noqa: BLE001 - told to the test
        answers.put((rank, error))
    all_answered.wait(60)  # rank 0 has the store, which the others may be reading


def on_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work(ranks)` gives in each of `world_size` forked processes that talk by gloo."""
    context = multiprocessing.get_context("fork")  # torch is imported already: seconds a process
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
    return [found[rank] for rank in range(world_size)]


def step(ranks: Ranks) -> dict[str, list[float]]:
    """Loss, gradients and BatchNorm buffers of one training step on twelve images in float64, and the features in eval mode after it."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 8, "cifar", 8, [0.5] * 3, [0.5] * 3)
    model = SimCLR(encoder, 16, 8).double()
    view_a, view_b, weight = torch.randn(12, 3, 8, 8).double(), torch.randn(12, 3, 8, 8).double(), torch.rand(12).double()
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
    pairs = {name: (torch.tensor(found[name], dtype=torch.float64), torch.tensor(wanted[name], dtype=torch.float64)) for name in wanted}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_of_several_ranks_is_the_step_of_one(world_size: int) -> None:
    wanted = step(ALONE)
    for found in on_ranks(world_size, step):
        assert max(differ(found, wanted).values()) < 1e-10, differ(found, wanted)


def test_the_controls_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the gathered negatives, without shared statistics or without summed gradients it is another step."""
    wanted, original = step(ALONE), nt_xent
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "nt_xent", lambda z_a, z_b, temperature, ranks: original(z_a, z_b, temperature))
        without_gather = differ(on_ranks(2, step)[0], wanted)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "share_batch_norm", lambda model, ranks: None)
        without_statistics = differ(on_ranks(2, step)[0], wanted)
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "share_gradients", lambda self, model: model)
        without_sum = differ(on_ranks(2, step)[0], wanted)
    assert without_gather["loss"] > 1e-3 and without_gather["gradients"] > 1e-3
    assert without_statistics["buffers"] > 1e-3 and without_statistics["loss"] > 1e-3
    assert without_sum["gradients"] > 1e-3 and without_sum["loss"] < 1e-10


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
    assert shared.eval()(x).equal(F.batch_norm(x, shared.running_mean, shared.running_var, shared.weight, shared.bias))
    shared.train().track_running_stats = False  # as a scoring pass does
    shared(x)
    torch.testing.assert_close(list(shared.buffers()), list(shared.eval().buffers()))


def test_parts_and_gathering_are_each_others_inverse() -> None:
    def work(ranks: Ranks) -> Any:
        table = torch.arange(24).view(2, 12)
        parts = ranks.part(table)
        return parts.shape, [ranks.gather(row).tolist() for row in parts], ranks.highest(ranks.rank, -ranks.rank)

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


def test_the_first_goes_first_and_every_word_is_heard() -> None:
    def work(ranks: Ranks) -> tuple[float, float, list[str]]:
        with ranks.first_then_others():
            began = time.monotonic()
            time.sleep(0.2)
            ended = time.monotonic()
        return began, ended, ranks.meet(f"word {ranks.rank}")

    times = on_ranks(3, work)
    assert all(began >= times[0][1] for began, _, _ in times[1:])
    assert all(words == ["word 0", "word 1", "word 2"] for _, _, words in times)


def test_rank_0_leaves_last(tmp_path: Path) -> None:
    """The store may live in its process: a rank that is slow to leave still finds it."""
    mark = tmp_path / "rank 0 has left"

    def work(ranks: Ranks) -> bool:
        too_early = False
        if ranks.rank == 2:
            heard = ranks._heard

            def slowly(key: str) -> bool:
                nonlocal too_early
                time.sleep(0.3)
                too_early |= mark.exists()
                return heard(key)

            ranks._heard = slowly  # type: ignore[method-assign]
        ranks_module.leave_ranks(ranks)
        if ranks.is_first:
            mark.touch()
        return too_early

    assert on_ranks(3, work) == [False] * 3 and mark.exists()


def test_a_confession_reaches_who_waits() -> None:
    def work(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            ranks.confess("the file a.jpg is bad", 2)
            return None
        try:
            ranks.meet()
        except ranks_module.LostRank as error:
            return str(error), error.code, error.speaks
        return "nothing heard"

    found = on_ranks(3, work)
    assert found[0] == ("rank 1: the file a.jpg is bad", 2, True) and found[2] == ("rank 1: the file a.jpg is bad", 2, False)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "must be numbers"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
            "does not meet",
        ),
    ],
)
def test_an_environment_that_is_not_complete_is_a_line(environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "MEET_SECONDS", 2.0)
    with pytest.raises(UserError, match=said):
        join_ranks(1, 2.0, needs_gpu=False)
