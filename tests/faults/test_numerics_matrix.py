"""Group E of the fault matrix: numbers that are none. A bad step is as if it had not been, and many of them
end the run.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_emp.commands import pretrain
from ssl_emp.errors import RunFailed
from ssl_emp.loss import nt_xent
from ssl_emp.optim import build_optimizer, gradient_norm, step_where
from ssl_emp.prune import Pruner, Seen
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.guard import Guard
from ssl_emp.run.ranks import Ranks

Pretrain = Callable[..., Path]
SMALL = ["optimizer.warmup_epochs=0", "monitor.knn_every=0"]


def sick_at(steps: Iterator[int] | range, value: float, gradient_only: bool = False) -> Callable[..., Tensor]:
    """nt_xent whose loss, or gradient alone, is `value` for one sample in the calls `steps`."""
    wanted, calls = set(steps), 0

    def loss_of(z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks) -> Tensor:
        nonlocal calls
        calls += 1
        loss = nt_xent(z_a, z_b, temperature, ranks)
        if calls not in wanted:
            return loss
        factor = torch.ones_like(loss)
        factor[3] = value
        if gradient_only:
            zero = loss * factor - (loss * factor).detach()  # 0 or NaN - NaN
            return loss.detach() + torch.where(zero.isnan(), (loss - loss.detach()) * factor, zero)
        return loss * factor

    return loss_of


def final(run: Path) -> dict[str, Any]:
    state, warnings = load_checkpoint(run / "checkpoints")
    assert state is not None and not warnings
    return state


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_E1_a_bad_step_changes_nothing(
    value: float, optimizer: str, pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1 | NaN or inf in the loss of one sample, in the last step | nothing moves: weights, optimiser,
    BatchNorm, scores; logged
    """
    settings = [
        *SMALL,
        f"optimizer.name={optimizer}",
        "optimizer.lr=0.01",
        "epochs=1",
        "checkpoint.every_steps=1",
    ]
    monkeypatch.setattr(pretrain, "nt_xent", sick_at(range(8, 9), value))
    run = pretrain_run("sick", *settings)
    after, before = final(run), torch.load(run / "checkpoints" / "step_00000007.pt", weights_only=True)
    for name, tensor in before["model"].items():
        assert after["model"][name].equal(tensor), name
    for slot, values in before["optimizer"]["state"].items():
        for name, tensor in values.items():
            assert after["optimizer"]["state"][slot][name].equal(tensor), name
    for name, tensor in before["pruner"]["record"].items():
        assert after["pruner"]["record"][name].equal(tensor), name
    assert after["step"] == 8 and int(after["bad_in_a_row"]) == 1 and rows(run)[0]["skipped_steps"] == 1
    # of the steps that were made
    assert rows(run)[0]["gradient_norm"] == pytest.approx(float(before["norms"][:7].mean()))
    samples = before["pruner"]["chosen"][0]["batches"][7].tolist()
    assert f"the first is step 8, samples {', '.join(map(str, samples))}" in (run / "train.log").read_text()
    monkeypatch.undo()
    healthy = final(pretrain_run("healthy", *settings))  # the control: the last step does change something
    assert not any(
        healthy["model"][name].equal(tensor)
        for name, tensor in before["model"].items()
        if "num_batches" in name
    )
    assert not healthy["pruner"]["record"]["times_trained"].equal(before["pruner"]["record"]["times_trained"])


def test_E1_the_first_step_of_all(pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """E1b | NaN in the very first step, when momentum is not there yet | the run trains as if it had begun
    with the second
    """
    monkeypatch.setattr(pretrain, "nt_xent", sick_at(range(1, 2), math.nan))
    state = final(pretrain_run("run", *SMALL, "epochs=2"))
    assert state["finished"] and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert all(
        tensor.isfinite().all()
        for values in state["optimizer"]["state"].values()
        for tensor in values.values()
    )


def test_E1_a_row_of_them_ends_the_run(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1c | 4 bad steps in a row with max_bad_steps=3 | code 3, one line with epoch, step and samples, the
    last checkpoint intact
    """
    out = tmp_path / "run"
    arguments = [
        "--config",
        str(tiny_config),
        f"out={out}",
        *SMALL,
        "max_bad_steps=3",
        "checkpoint.every_steps=1",
    ]
    monkeypatch.setattr(pretrain, "nt_xent", sick_at(range(5, 99), math.nan))
    assert pretrain.main(arguments) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 4 bad steps in a row, max_bad_steps is 3; epoch 1: 4 steps were skipped")
    assert "the first is step 5," in line
    before = final(out)
    assert before["step"] == 7 and all(tensor.isfinite().all() for tensor in before["model"].values())
    monkeypatch.undo()
    assert before["bad_in_a_row"] == 3
    # whatever it was is mended, and is no row any more
    assert pretrain.main(["--resume", str(out), "max_bad_steps=1"]) == 0
    capsys.readouterr()


def test_E1_rows_are_counted_over_a_resume() -> None:
    """E1d | the same bad steps, not in a row | the run goes on"""
    batches = torch.arange(40).view(5, 8)
    for most, begins_with in ((2, 0), (1, 0), (2, 1)):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        optimizer = build_optimizer(model, "sgd", 0.1, 0.9, 0.0)
        guard = Guard(model, optimizer, most, torch.tensor(begins_with), None)
        in_a_row = []
        # of a resumed run that begins within a row, the first step belongs to it
        for number, good in enumerate((begins_with == 0, False, False, True, False)):
            model(torch.randn(8, 2)).square().sum().backward()
            terms = torch.ones(2, 8) if good else torch.full((2, 8), torch.nan)
            assert bool(guard.step(terms, number, batches)) == good
            in_a_row.append(int(guard.in_a_row))
            optimizer.zero_grad()
        if begins_with:
            assert in_a_row == [2, 3, 4, 0, 1]
        else:
            assert in_a_row == [0, 1, 2, 0, 1] and guard.skipped() == [1, 2, 4]
        if (most, begins_with) == (2, 0):
            guard.check(batches, 0)
            continue
        rows = f"{max(in_a_row)} bad steps in a row, max_bad_steps is {most}; epoch 1: "
        with pytest.raises(RunFailed, match=rows):
            guard.check(batches, 0)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_E1_a_gradient_that_is_not_finite(name: str) -> None:
    """E1e | a finite loss with a gradient of NaN or inf in one weight | no weight and no state of the
    optimiser moves
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = build_optimizer(model, name, 0.1, 0.9, 1e-4)
    for value in (0.0, math.nan, math.inf, 1.0):
        model(torch.randn(5, 4)).square().sum().backward()
        first = next(model.parameters())
        assert first.grad is not None
        first.grad[0, 0] += value
        before = [p.detach().clone() for p in model.parameters()]
        state = [t.clone() for values in optimizer.state.values() for t in values.values()]
        good = gradient_norm(model.parameters()).isfinite()
        assert bool(good) == math.isfinite(value)
        step_where(optimizer, good)
        now = [t for values in optimizer.state.values() for t in values.values()]
        moved = [not a.equal(b) for a, b in zip(model.parameters(), before, strict=True)]
        assert all(moved) if good else not any(moved)
        if not good:
            assert len(now) == len(state) and all(a.equal(b) for a, b in zip(now, state, strict=True))
        optimizer.zero_grad()


def test_E2_a_score_that_is_not_finite(pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """E2 | NaN for one sample in a scoring pass | its old score stays, pruning goes on with exact counts"""
    spoilt = []

    def sick(z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks) -> Tensor:
        loss = nt_xent(z_a, z_b, temperature, ranks)
        if not torch.is_grad_enabled():
            loss[0], loss[1] = math.nan, math.inf
            spoilt.append(loss)
        return loss

    monkeypatch.setattr(pretrain, "nt_xent", sick)
    run = pretrain_run("run", *SMALL, "prune.scoring=pruned")
    assert len(spoilt) > 10
    assert [row["kept_share"] for row in rows(run)] == [
        row["kept_share"] for row in rows(pretrain_run("plain", *SMALL))
    ]
    assert final(run)["pruner"]["record"]["last"].isfinite().all()


def test_E2_the_old_score_stays() -> None:
    """E2b | NaN or inf in the scores of two samples that were scored before | those two keep what they had"""
    pruner = Pruner(20, batch_size=4, epochs=3, fraction=0.5, anneal_fraction=0.0, scoring="all")
    everyone = torch.arange(20)
    pruner.record.observe(everyone, torch.stack([everyone * 1.0, -everyone * 1.0]), None, 0)

    def score(batches: Tensor, key: int) -> Seen:
        index = batches.flatten()
        terms = torch.stack([index + 100.0, -index - 100.0])
        terms[0, index == 3], terms[1, index == 11] = math.nan, math.inf
        return Seen(index, terms)

    pruner.rescore(1, score)
    expected = torch.stack([everyone + 100.0, -everyone - 100.0])
    expected[:, [3, 11]] = torch.tensor([[3.0, 11.0], [-3.0, -11.0]])
    assert pruner.record.last.equal(expected)
    assert len(pruner.batches(1).unique()) == 4 * pruner.steps[1]


def test_E3_scores_that_say_nothing() -> None:
    """E3 | all scores equal, or none ever given | drawn by chance, exact counts, deterministic"""
    for level in (1.0, math.inf):
        sets = []
        for _ in range(2):
            pruner = Pruner(20, batch_size=2, epochs=4, policy="emp", fraction=0.5, anneal_fraction=0.0)
            pruner.record.terms.fill_(level)
            sets.append(pruner.batches(1).flatten().sort().values.tolist())
        assert sets[0] == sets[1] and len(set(sets[0])) == 10
        assert sets[0] != list(range(10)), "of sorted classes, the first ones"


def test_E5_a_batch_of_one(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E5 | batch_size=1 | one line, code 2"""
    assert pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'run'}", "batch_size=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "batch_size" in line and "greater than or equal to 2" in line


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_E6_a_learning_rate_that_explodes(
    optimizer: str,
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """E6 | optimizer.lr=1e30 | code 3 within 20 steps, no checkpoint of sick weights"""
    out = tmp_path / "run"
    arguments = [
        "--config",
        str(tiny_config),
        f"out={out}",
        *SMALL,
        "optimizer.lr=1e30",
        f"optimizer.name={optimizer}",
    ]
    assert pretrain.main([*arguments, "max_bad_steps=5"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite" in line and "lower optimizer.lr" in line
    assert not list((out / "checkpoints").glob("*.pt"))


def test_E8_images_that_are_all_alike(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E8 | 32 images of one colour | finite to the end"""
    from PIL import Image

    folder = tmp_path / "gray"
    folder.mkdir()
    for number in range(32):
        Image.new("RGB", (16, 16), (90, 90, 90)).save(folder / f"{number}.png")
    out = tmp_path / "run"
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", f"data.source={folder}", *SMALL]) == 0
    assert all(row["loss"] < 10 for row in rows(out)) and all(
        tensor.isfinite().all() for tensor in final(out)["model"].values()
    )
