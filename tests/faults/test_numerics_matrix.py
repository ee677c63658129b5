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

from ssl_emp import passes
from ssl_emp.commands import pretrain
from ssl_emp.loss import nt_xent
from ssl_emp.optim import build_optimizer, gradient_norm, step_where
from ssl_emp.policies import Rule
from ssl_emp.pruning import PrunePlan
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.ranks import Ranks
from ssl_emp.scores import ScoreState

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
    monkeypatch.setattr(passes, "nt_xent", sick_at(range(8, 9), value))
    run = pretrain_run("sick", *settings)
    after, before = final(run), torch.load(run / "checkpoints" / "step_00000007.pt", weights_only=True)
    for name, tensor in before["model"].items():
        assert after["model"][name].equal(tensor), name
    for slot, values in before["optimizer"]["state"].items():
        for name, tensor in values.items():
            assert after["optimizer"]["state"][slot][name].equal(tensor), name
    for name, tensor in before["scores"].items():
        assert after["scores"][name].equal(tensor), name
    assert after["step"] == 8 and int(after["bad_in_a_row"]) == 1 and rows(run)[0]["skipped_steps"] == 1
    # of the steps that were made
    assert rows(run)[0]["gradient_norm"] == pytest.approx(float(before["norms"][:7].mean()))
    samples = before["batches"][7].tolist()
    assert f"the first is step 8, samples {', '.join(map(str, samples))}" in (run / "train.log").read_text()
    monkeypatch.undo()
    healthy = final(pretrain_run("healthy", *settings))  # the control: the last step does change something
    assert not any(
        healthy["model"][name].equal(tensor)
        for name, tensor in before["model"].items()
        if "num_batches" in name
    )
    assert not healthy["scores"]["times_trained"].equal(before["scores"]["times_trained"])


def test_E1_the_first_step_of_all(pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """E1b | NaN in the very first step, when momentum is not there yet | the run trains as if it had begun
    with the second
    """
    monkeypatch.setattr(passes, "nt_xent", sick_at(range(1, 2), math.nan))
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
    monkeypatch.setattr(passes, "nt_xent", sick_at(range(5, 99), math.nan))
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


def test_E1_rows_are_counted_over_a_resume(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E1d | the same bad steps, not in a row | the run goes on"""
    bad, longest = torch.zeros(2, dtype=torch.int64), []
    for good in (True, False, False, True, False):
        bad = pretrain.count_in_a_row(bad, torch.tensor(good))
        longest.append(bad.tolist())
    assert longest == [[0, 0], [1, 1], [2, 2], [0, 2], [1, 2]]
    pretrain.check_bad_steps(bad, 2, torch.ones(1, dtype=torch.bool), torch.arange(8)[None], 0)
    with pytest.raises(pretrain.RunFailed, match="2 bad steps in a row, max_bad_steps is 1"):
        pretrain.check_bad_steps(bad, 1, torch.ones(1, dtype=torch.bool), torch.arange(8)[None], 0)


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
    original = pretrain.score_passes

    def sick(*args: Any) -> tuple[Tensor, Tensor | None]:
        terms, draws = original(*args)
        terms[0, 0], terms[1, 1] = math.nan, math.inf
        return terms, draws

    monkeypatch.setattr(pretrain, "score_passes", sick)
    run = pretrain_run("run", *SMALL, "prune.scoring=pruned")
    assert [row["kept_share"] for row in rows(run)] == [
        row["kept_share"] for row in rows(pretrain_run("plain", *SMALL))
    ]
    assert not final(run)["scores"]["last"].isnan().any()


def test_E3_scores_that_say_nothing() -> None:
    """E3 | all scores equal, or none ever given | the lowest indices, exact counts, deterministic"""
    rule = Rule("emp", PrunePlan(4, 0.5, 1, 0.0))
    for level in (1.0, math.inf):
        state = ScoreState(20, 1.0, False, torch.device("cpu"))
        state.terms.fill_(level)
        kept = rule.choose(state, 1, 10, 0).index
        assert kept.sort().values.tolist() == list(range(10))


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
