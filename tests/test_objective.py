"""What is trained on and what of it the scores keep, in whole runs."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Pretrain
from test_loss import algorithm_1
from test_pretrain import StopAfter, assert_same_run, make_job, rows, samples, weights

from ssl_emp.augment import cut_views, draw_params
from ssl_emp.commands import pretrain
from ssl_emp.config import load_config
from ssl_emp.errors import UserError

# ---- the loss


@pytest.mark.parametrize("trained", ["nt_xent", "dcl"])
@pytest.mark.parametrize("scored", ["null", "nt_xent", "dcl"])
def test_a_step_trains_on_one_loss_and_scores_by_the_other(
    tiny_config: Path, trained: str, scored: str
) -> None:
    """Both against loops in float64 over the projections of the same views."""
    job = make_job(tiny_config, f"loss={trained}", f"prune.scoring_loss={scored}", "temperature=0.2")
    index = torch.arange(8, 16)
    images = job.images.pixels[index]
    loss, kept, memory, _ = pretrain.forward(job, job.model, cut_views, index, images, 3, job.recipe)
    views = cut_views(images, draw_params(job.config.seed, 3, index, job.recipe, 16), job.recipe)
    h, z = job.model(torch.cat(views).to(memory_format=torch.channels_last))
    expected = {
        name: algorithm_1(z[:8].detach(), z[8:].detach(), 0.2, decoupled=name == "dcl")
        for name in ("nt_xent", "dcl")
    }
    torch.testing.assert_close(loss.double(), expected[trained], rtol=1e-4, atol=1e-5)
    kept_name = trained if scored == "null" else scored
    torch.testing.assert_close(kept.double(), expected[kept_name], rtol=1e-4, atol=1e-5)
    h_a, h_b = h.detach().chunk(2)
    torch.testing.assert_close(memory, -(h_a - h_b).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_a_run_with_dcl_keeps_what_it_is_asked_to(
    pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one full epoch nothing depends on the scores: the same weights, whatever they are made of."""
    once = ("epochs=1", "loss=dcl", "temperature=0.1")
    plain, kept = pretrain_run("plain", *once), pretrain_run("kept", *once, "prune.scoring_loss=nt_xent")
    coupled = pretrain_run("coupled", "epochs=1", "temperature=0.1")
    assert weights(plain) == weights(kept) != weights(coupled)
    dcl, nt_xent = (torch.tensor(samples(run)["loss"][:64]) for run in (plain, kept))
    seen = dcl.isfinite()
    assert seen.sum() > 50 and (dcl[seen] <= nt_xent[seen]).all() and (nt_xent[seen] > 0).all()
    assert dcl[seen].min() < 0, "log((1 - p) / p)"
    for run, below in ((plain, 0.0), (kept, math.log(2))):
        share = sum(value < below for value in samples(run)["loss"] if math.isfinite(value)) / 64
        assert rows(run)[0]["learned_share"] == pytest.approx(share) and 0 < share < 1
    said = capsys.readouterr().out.splitlines()
    assert said.count("loss      dcl") == 1
    assert said.count("loss      dcl; scores are made of nt_xent") == 1
    assert sum(line.startswith("loss  ") for line in said) == 2


def test_dcl_resumes_bit_for_bit_and_says_that_no_pair_falls_silent(
    pretrain_run: Pretrain,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ("loss=dcl", "prune.scoring_loss=nt_xent", "prune.policy=ucb", "prune.scoring=pruned")
    whole = pretrain_run("whole", *overrides)
    said = capsys.readouterr().out
    assert "note      loss dcl gives every pair its full weight, learned or not" in said
    assert "temperature=" not in said, "no temperature makes it silent"
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    StopAfter.steps = 15
    out = whole.parent / "parts"
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", *overrides]) == 143
    StopAfter.steps = 10**9
    assert pretrain.main(["--resume", str(out), "loss=nt_xent"]) == 2
    assert "loss was dcl and is now nt_xent" in capsys.readouterr().err
    assert pretrain.main(["--resume", str(out)]) == 0
    assert_same_run(out, whole)
    assert yaml.safe_load((out / "config.yaml").read_text())["loss"] == "dcl"


# ---- the learning rate


def test_auto_becomes_a_number_that_resume_and_a_longer_run_keep(
    pretrain_run: Pretrain,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """auto at batch 8 is the run with 0.06 sqrt(8), however it is stopped and started again."""
    auto = ("optimizer.name=auto", "optimizer.lr=auto")
    numbers = pretrain_run("numbers", "optimizer.lr=0.1697")
    capsys.readouterr()
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    out = numbers.parent / "auto"
    start = ["--config", str(tiny_config), f"out={out}", *auto]
    StopAfter.steps = 10
    assert pretrain.main(start) == 143
    assert "optimizer sgd, learning rate 0.1697 at its peak" in capsys.readouterr().out
    settings = yaml.safe_load((out / "config.yaml").read_text())["optimizer"]
    assert (settings["name"], settings["lr"]) == ("sgd", 0.1697)
    StopAfter.steps = 4
    assert pretrain.main([*start, "--auto-resume"]) == 143
    StopAfter.steps = 10**9
    assert pretrain.main(["--resume", str(out), "optimizer.lr=auto"]) == 0
    assert_same_run(out, numbers)
    for run in (out, numbers):
        assert pretrain.main(["--resume", str(run), "epochs=7"]) == 0
    assert_same_run(out, numbers)
    assert yaml.safe_load((out / "config.yaml").read_text())["optimizer"]["lr"] == 0.1697
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out), "optimizer.lr=0.2"]) == 2
    assert "optimizer.lr was 0.1697 and is now 0.2" in capsys.readouterr().err


def test_a_run_under_way_takes_its_own_number_for_auto(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a version with another rule: the number that the run began with, not that of today."""
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    StopAfter.steps = 4
    start = ["--config", str(tiny_config), f"out={tmp_path / 'run'}", "epochs=2", "--auto-resume"]
    assert pretrain.main([*start, "optimizer.lr=0.3"]) == 143
    StopAfter.steps = 10**9
    assert pretrain.main([*start, "optimizer.lr=auto"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optimizer"]["lr"] == 0.3
    assert max(row["lr"] for row in rows(tmp_path / "run")) == pytest.approx(0.3)


def test_a_dry_run_shows_the_number(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optimizer.name=lars", "optimizer.lr=auto", "batch_size=16", f"out={tiny_config.parent / 'dry'}"]
    assert pretrain.main(["--config", str(tiny_config), "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "  lr: 0.3\n" in said and "optimizer lars, learning rate 0.3 at its peak" in said
    assert not (tiny_config.parent / "dry").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss=infonce"], "loss: should be 'nt_xent' or 'dcl' (is 'infonce')"),
        (["loss=null"], "loss: should be 'nt_xent' or 'dcl' (is None)"),
        (["prune.scoring_loss=loss"], "prune.scoring_loss: should be 'nt_xent' or 'dcl' (is 'loss')"),
        (["prune.policy=random", "prune.scoring_loss=dcl"], "policy random has no key prune.scoring_loss"),
        (["objective=supervised", "loss=dcl"], "contrastive losses of objective simclr"),
        (["objective=supervised", "prune.scoring_loss=nt_xent"], "contrastive losses of objective simclr"),
        (["optimizer.lr=automatic"], "optimizer.lr: should be "),
        (["optimizer.lr=null"], "optimizer.lr: should be "),
        (["optimizer.lr=0"], "allowed: 0 < value <= 1e+38, or auto"),
        (["optimizer.name=auto"], "optimizer.name auto needs optimizer.lr auto"),
        (["optimizer.lr=auto", "objective=supervised"], "optimizer.lr auto is for objective simclr"),
        (
            ["optimizer.name=auto", "optimizer.lr=auto", "optimizer.schedule=onecycle"],
            "set optimizer.name to sgd or lars",
        ),
    ],
)
def test_mistakes(tiny_config: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(tiny_config, overrides)
    assert said in str(error.value) and "fix: " in str(error.value) and "\n" not in str(error.value)
