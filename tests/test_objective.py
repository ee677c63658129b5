"""What is trained on and what of it the scores keep, in whole runs."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Pretrain
from test_loss import algorithm_1
from test_pretrain import StopAfter, assert_same_run, final_state, make_job, rows, samples, weights
from torch import Tensor, nn

from linear_eval import Features, extract_features, knn_accuracy
from ssl_emp import load_encoder
from ssl_emp.augment import cut_views, draw_params
from ssl_emp.commands import pretrain
from ssl_emp.commands.job import Job
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder
from ssl_emp.run.average import WeightAverage
from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint

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


# ---- the average of the weights


def test_the_average_equals_a_plain_loop_and_leaves_bad_steps_out() -> None:
    """Weights and running statistics, in float64 (the decay is a float32); the network gets its own back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = WeightAverage(model, 0.5)
    names = [name for name, value in model.state_dict().items() if value.is_floating_point()]
    assert "1.running_var" in names and "1.num_batches_tracked" not in names
    expected = {name: model.state_dict()[name].clone() for name in names}
    for step in range(12):
        model(torch.randn(8, 3, dtype=torch.float64))  # moves the statistics
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        good = step % 3 != 1
        average.update(step, torch.tensor(good))
        decay = min(0.5, (1 + step) / (10 + step))
        assert decay == 0.5 or step < 8
        for name, value in model.state_dict().items():
            if name in expected and good:
                expected[name] = decay * expected[name] + (1 - decay) * value
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), average.in_place():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected.get(name, own[name]), rtol=1e-6, atol=1e-7)
        raise KeyboardInterrupt
    assert all(value.equal(own[name]) for name, value in model.state_dict().items())
    again = WeightAverage(model, 0.5)
    again.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
    for one in (average, again):
        one.update(12, torch.tensor(True))
    assert all(value.equal(again.state_dict()[name]) for name, value in average.state_dict().items())


def knn_of(encoder: Encoder, job: Job) -> float:
    """As `monitor.knn_every` measures it."""
    picked = torch.randperm(68, generator=torch.Generator().manual_seed(0))
    assert job.images.labels is not None
    found = extract_features(
        encoder, job.images.pixels[picked], job.images.labels[picked], batch_size=8, device=job.device
    )
    bank, queries = Features(found.x[:54], found.y[:54]), Features(found.x[54:], found.y[54:])
    return knn_accuracy(bank, queries, num_neighbors=20, temperature=0.1, device=job.device)


def test_the_average_is_exported_and_measured_and_training_does_not_know_it(
    pretrain_run: Pretrain, tiny_config: Path
) -> None:
    plain = pretrain_run("plain", "monitor.knn_every=1")
    run = pretrain_run("run", "monitor.knn_every=1", "model.ema=0.9")
    ours, theirs = final_state(run), final_state(plain)
    assert ours.keys() - theirs.keys() == {path for path in ours if path.startswith("/average/")} != set()
    for path, leaf in theirs.items():
        same = leaf.equal(ours[path]) if isinstance(leaf, Tensor) else leaf == ours[path]
        assert same, path
    without = [{key: value for key, value in row.items() if key != "knn_train_split"} for row in rows(run)]
    assert without == [
        {key: value for key, value in row.items() if key != "knn_train_split"} for row in rows(plain)
    ]
    assert samples(run) == samples(plain) and weights(run) != weights(plain)
    encoder = load_encoder(run)
    for name, value in encoder.backbone.state_dict().items():
        kept = ours.get(f"/average/backbone.{name}", ours[f"/model/backbone.{name}"])
        assert value.equal(kept), name
    job = make_job(tiny_config)
    knn = [knn_of(load_encoder(one), job) for one in (run, plain)]
    assert [rows(one)[-1]["knn_train_split"] for one in (run, plain)] == pytest.approx(knn)
    assert [row["knn_train_split"] for row in rows(run)] != [row["knn_train_split"] for row in rows(plain)]


def test_the_average_resumes_bit_for_bit_and_restores_a_lost_encoder(
    pretrain_run: Pretrain,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = pretrain_run("whole", "model.ema=0.95")
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    out = whole.parent / "parts"
    for number, steps in enumerate([3, 5, 6, 10**9]):
        StopAfter.steps = steps
        words = ["--resume", str(out)] if number else ["--config", str(tiny_config), f"out={out}"]
        assert pretrain.main([*words, *([] if number else ["model.ema=0.95"])]) == (143 if steps < 100 else 0)
    assert_same_run(out, whole)
    shutil.rmtree(out / "encoder")
    assert pretrain.main(["--resume", str(out)]) == 0
    assert_same_run(out, whole)
    capsys.readouterr()
    for override, said in (("0.9", "model.ema was 0.95 and is now 0.9"), ("null", "is now None")):
        assert pretrain.main(["--resume", str(out), f"model.ema={override}"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop("average"), "average is missing"),
        (lambda state: state["average"].popitem(), " is missing"),
        (lambda state: state["average"]["backbone.bn1.running_var"].neg_(), "running_var is below 0"),
        (
            lambda state: state["average"]["backbone.conv1.weight"].fill_(math.nan),
            "conv1.weight is not finite",
        ),
        (lambda state: state.update(average=[1]), "average is of type list"),
    ],
)
def test_a_damaged_average_is_one_line(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[dict[str, Any]], Any],
    said: str,
) -> None:
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    StopAfter.steps = 3
    out = tmp_path / "run"
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", "model.ema=0.9"]) == 143
    state, _ = load_checkpoint(out / "checkpoints")
    assert state is not None
    damage(state)
    save_checkpoint(out / "checkpoints", state, 3)
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and "does not fit the run" in error and error.count("\n") == 1


def test_a_classifier_is_judged_by_its_average(pretrain_run: Pretrain) -> None:
    """The head too: with a decay that forgets at once it is the plain run, with another it is not."""
    supervised = ("objective=supervised", "optimizer.lr=0.01")
    found = {}
    for name, more in (("plain", []), ("at once", ["model.ema=1e-9"]), ("slow", ["model.ema=0.9999"])):
        run = pretrain_run(name, *supervised, *more)
        found[name] = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert found["plain"] == found["at once"] != found["slow"]


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
        (["model.ema=1"], "model.ema: should be less than 1 (is 1), allowed: 0 < value < 1"),
        (["model.ema=0"], "model.ema: should be greater than 0 (is 0), allowed: 0 < value < 1"),
        (["model.ema=often"], "model.ema: should be a valid number (is 'often')"),
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
