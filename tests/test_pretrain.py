"""The main job end to end: what a run leaves, that pruning prunes, that a resumed run is the uninterrupted
one, bad input.
"""

import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Pretrain, striped_images, write_parquet
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linear_eval import EvalError
from ssl_emp import load_encoder, passes, policies
from ssl_emp.augment import cut_views, draw_params
from ssl_emp.commands import job as job_module
from ssl_emp.commands import pretrain
from ssl_emp.commands.job import Job, idle_keys, prepare
from ssl_emp.commands.resume import first_difference
from ssl_emp.config import PretrainConfig, PruneConfig, load_config
from ssl_emp.data.images import DeviceImages, HostImages
from ssl_emp.data.label_noise import noisy_labels
from ssl_emp.errors import UserError
from ssl_emp.loss import nt_xent, perfect_pair_share
from ssl_emp.pruning import feature_distance, select_kept
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.report import Report, rank_correlation
from ssl_emp.scores import ScoreState

ROOT = Path(__file__).parent.parent
CLOCK = ("seconds", "per_second")  # parts of the names of what may differ between equal runs


def tensors(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint by its path."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = {str(i): leaf for i, leaf in enumerate(tree)}.items()
    else:
        return {prefix: tree}
    return {path: leaf for key, branch in items for path, leaf in tensors(branch, f"{prefix}/{key}").items()}


def final_state(run: Path) -> dict[str, Any]:
    state, warnings = load_checkpoint(run / "checkpoints")
    assert state is not None and not warnings
    return {
        path: leaf for path, leaf in tensors(state).items() if not path.startswith(("/config", "/seconds"))
    }


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not any(part in key for part in CLOCK)} for row in found
    ]


def weights(run: Path) -> bytes:
    return (run / "encoder" / "model.safetensors").read_bytes()


def assert_same_run(run: Path, reference: Path) -> None:
    ours, theirs = final_state(run), final_state(reference)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        same = leaf.equal(theirs[path]) if isinstance(leaf, Tensor) else leaf == theirs[path]
        assert same, f"{path} differs"
    assert rows(run) == rows(reference)
    assert weights(run) == weights(reference)
    assert pq.read_table(run / "pruning" / "samples.parquet").equals(
        pq.read_table(reference / "pruning" / "samples.parquet")
    )


def samples(run: Path) -> dict[str, list[Any]]:
    return pq.read_table(run / "pruning" / "samples.parquet").to_pydict()


def test_a_run_leaves_what_it_promises(pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain_run("run", "monitor.tensorboard=true")
    said = capsys.readouterr().out
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    promised = {
        "config.yaml",
        "environment.json",
        "train.log",
        "metrics.jsonl",
        "encoder/model.safetensors",
        "encoder/config.json",
    }
    assert promised | {"pruning/samples.parquet", "checkpoints/manifest.json"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left) and not any(
        ".tmp" in name for name in left
    )

    # 68 images, batch 8: 8 steps; a pruned epoch is asked for 0.6 * 8 = 4.8 steps; epochs 0 and 4 are full
    assert [row["step"] for row in rows(run)] == [8, 13, 18, 22, 30]
    assert [round(row["kept_share"], 3) for row in rows(run)] == [0.941, 0.588, 0.588, 0.471, 0.941]
    assert (
        "30 steps against 40 unpruned (75.0%, asked 76.0%)" in said
        and "240 of 320 unpruned (75.0%, asked 76.0%)" in said
    )
    assert rows(run)[-1]["asked_share"] == pytest.approx(0.76) and rows(run)[-1]["real_share"] == 0.75
    assert all(f"epoch {epoch}/5" in said for epoch in range(1, 6)) and "kNN" in said and "images/s" in said
    assert "steps against" in (run / "train.log").read_text(), "the start-up summary stands in the log too"
    per_sample = samples(run)
    assert sum(per_sample["times_trained"]) == 240 and per_sample["name"][3] == "train.parquet#3"
    assert all(math.isfinite(score) for score in per_sample["score"])
    for score, loss, distance in zip(
        per_sample["score"], per_sample["loss"], per_sample["distance"], strict=True
    ):
        assert score == pytest.approx(loss - 5 * distance, rel=1e-5)
    assert yaml.safe_load((run / "config.yaml").read_text())["prune"]["fraction"] == 0.4
    assert load_encoder(run)(torch.rand(2, 3, 16, 16)).shape == (2, 64)


def test_learning_happens(pretrain_run: Pretrain) -> None:
    losses = [
        row["loss"]
        for row in rows(pretrain_run("run", "epochs=12", "prune.policy=none", "augment.jitter_prob=0"))
    ]
    assert losses[-1] < losses[0] - 0.2, losses


def test_fraction_0_is_the_unpruned_run_bit_for_bit(pretrain_run: Pretrain) -> None:
    unpruned = pretrain_run("unpruned", "prune.policy=none")
    for policy in ("emp", "random"):
        assert_same_run(pretrain_run(policy, f"prune.policy={policy}", "prune.fraction=0"), unpruned)


def test_loss_is_emp_with_beta_0_and_beta_matters(pretrain_run: Pretrain) -> None:
    loss, beta_0, beta_5 = (
        pretrain_run("a", "prune.policy=loss"),
        pretrain_run("b", "prune.beta=0"),
        pretrain_run("c"),
    )
    assert final_state(loss)["/scores/last"].equal(final_state(beta_0)["/scores/last"])
    assert not final_state(beta_5)["/scores/times_trained"].equal(
        final_state(beta_0)["/scores/times_trained"]
    )


def test_same_seed_same_run_other_seed_other_run(pretrain_run: Pretrain) -> None:
    first = pretrain_run("a")
    assert_same_run(pretrain_run("b"), first)
    assert not final_state(pretrain_run("c", "seed=1"))["/scores/last"].equal(
        final_state(first)["/scores/last"]
    )


def test_images_on_the_host_give_the_same_run(
    pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = pretrain_run("device")
    monkeypatch.setattr(job_module, "place_images", HostImages)
    assert_same_run(pretrain_run("host"), on_device)


def test_labels_do_not_touch_the_training(pretrain_run: Pretrain, tmp_path: Path) -> None:
    images, labels = striped_images(68)
    permuted = [labels[i] for i in torch.randperm(68, generator=torch.Generator().manual_seed(0)).tolist()]
    runs = []
    for name, some in (("true", labels), ("permuted", permuted), ("none", None)):
        write_parquet(tmp_path / name / "train.parquet", images, some)
        runs.append(pretrain_run(f"run {name}", f"data.source={tmp_path / name}"))
    assert "knn_train_split" in rows(runs[0])[1] and "knn_train_split" not in rows(runs[2])[1]
    for run in runs[1:]:
        assert samples(run) == samples(runs[0])
        assert weights(run) == weights(runs[0])


@pytest.mark.parametrize("scoring", ["stale", "pruned", "all"])
def test_what_was_scored_when(pretrain_run: Pretrain, scoring: str) -> None:
    run = pretrain_run("run", f"prune.scoring={scoring}", "prune.anneal_fraction=0")
    scored_epoch, times = samples(run)["scored_epoch"], samples(run)["times_trained"]
    assert sum(times) == (8 + 5 + 5 + 4 + 5) * 8
    if scoring == "stale":
        assert min(scored_epoch) < 4
    else:  # this epoch's training, the scoring pass before it (the weights of epoch 3), or epoch 3's training
        assert set(scored_epoch) == {3, 4}
    assert scored_epoch.count(4) == 40


def test_what_a_scoring_pass_scores(pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """`all`: everything, at the asked rhythm. `pruned`: exactly what the last epoch did not train on."""
    noted_passes: list[tuple[int, set[int]]] = []
    trained: set[int] = set()
    missing: list[set[int]] = []
    original, original_batches = passes.score_pass, pretrain.shuffled_batches

    def noted(
        job: Any, model: Any, views_of: Any, first: Tensor, rest: Tensor, epoch: int, recipe: Any
    ) -> Any:
        assert sorted([*first.tolist(), *rest.tolist()]) == list(range(68))
        noted_passes.append((epoch, set(first.tolist())))
        missing.append(set(range(68)) - trained)
        return original(job, model, views_of, first, rest, epoch, recipe)

    def noted_batches(kept: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
        batches = original_batches(kept, batch_size, seed, epoch)
        if batch_size > 1:
            trained.clear()
            trained.update(batches.flatten().tolist())
        return batches

    monkeypatch.setattr(passes, "score_pass", noted)
    monkeypatch.setattr(pretrain, "shuffled_batches", noted_batches)
    pretrain_run(
        "a",
        "prune.scoring=all",
        "prune.rescore_every=2",
        "epochs=6",
        "prune.anneal_fraction=0",
        "monitor.reliability_every=0",
    )
    assert noted_passes == [(epoch, set(range(68))) for epoch in (1, 3, 5)]
    noted_passes.clear()
    missing.clear()
    pretrain_run(
        "b", "prune.scoring=pruned", "epochs=8", "prune.anneal_fraction=0", "monitor.reliability_every=0"
    )
    assert [epoch for epoch, _ in noted_passes] == list(range(1, 8)) and [
        scored for _, scored in noted_passes
    ] == missing
    # the remainder of the full epoch, then the pruned
    assert [len(scored) for scored in missing] == [4, 28, 28, 36, 28, 28, 28]


def make_job(tiny_config: Path, *overrides: str) -> Job:
    job = prepare(load_config(tiny_config, list(overrides)), Report())
    job.model.train()
    return job


def test_the_scoring_pass_equals_the_training_pass(tiny_config: Path) -> None:
    """Frozen weights, equal views, equal batches: equal scores; and the pass touches no weight, buffer or
    gradient.
    """
    job = make_job(tiny_config)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    order = torch.randperm(68, generator=torch.Generator().manual_seed(0))
    first, rest = order[:20], order[20:]
    terms, draws = passes.score_pass(job, job.model, cut_views, first, rest, 3, job.recipe)
    assert draws is None
    assert terms.shape == (2, 20) and not terms.requires_grad
    after = job.model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items()), "running statistics included"
    assert all(p.grad is None for p in job.model.parameters()) and job.model.training

    for batch in order[:24].view(3, 8):  # 20 are filled up to three whole batches
        params = draw_params(job.config.seed, 3, batch, job.recipe, 16)
        h_a, h_b, z_a, z_b = passes.forward_views(
            job, job.model, *cut_views(job.images.pixels[batch], params, job.recipe)
        )
        expected = torch.stack([nt_xent(z_a, z_b, 0.5), feature_distance(h_a, h_b)]).detach()
        wanted = [place for place, sample in enumerate(batch.tolist()) if sample in first.tolist()]
        places = [first.tolist().index(int(batch[place])) for place in wanted]
        assert terms[:, places].equal(expected[:, wanted])


def test_the_kept_set_is_the_top_of_the_last_scores(
    pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pruned epoch trains on exactly those with the highest loss - beta * distance at its start."""
    calls: list[tuple[Tensor, Tensor]] = []

    def noted(scores: Tensor, count: int) -> Tensor:
        kept = select_kept(scores, count)
        calls.append((scores.clone(), kept))
        return kept

    monkeypatch.setattr(policies, "select_kept", noted)
    pretrain_run("run", "monitor.reliability_every=0")
    assert [len(kept) for _, kept in calls] == [40, 40, 32]
    for scores, kept in calls:
        rest = torch.ones(68, dtype=torch.bool)
        rest[kept] = False
        assert scores[kept].min() >= scores[rest].max()
        assert scores.isinf().sum() <= 4, "only the remainder of epoch 0 was never scored"


class StopAfter(pretrain.Stop):
    """Stands in for `pretrain.Stop`: as if a signal came during step `steps`."""

    steps = 0

    def __init__(self) -> None:
        self.reads = 0

    @property
    def signal(self) -> int:  # type: ignore[override]  # each step reads it once
        self.reads += 1
        return int(signal.SIGTERM) if self.reads >= StopAfter.steps else 0


@pytest.mark.parametrize("scoring", ["stale", "pruned"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    pretrain_run: Pretrain, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: str
) -> None:
    reference = pretrain_run("reference", f"prune.scoring={scoring}")
    out = tmp_path / "stopped"
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    arguments = ["--config", str(tiny_config), f"out={out}", f"prune.scoring={scoring}"]
    # steps until each stop: inside epochs, at the end of epoch 0 (8) and of epoch 1 (13)
    stops = [1, 3, 4, 5, 3, 100]
    for run_number, steps in enumerate(stops):
        StopAfter.steps = steps
        code = pretrain.main(arguments if run_number == 0 else ["--resume", str(out)])
        assert code == (0 if steps == 100 else 143)
    assert_same_run(out, reference)


def test_resuming_a_finished_run_changes_nothing(
    pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain_run("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert pretrain.main(["--resume", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def newest_step(run: Path) -> int:
    return max((int(path.stem[5:]) for path in run.glob("checkpoints/step_*.pt")), default=0)


def test_a_run_leaves_the_signals_as_they_were(pretrain_run: Pretrain) -> None:
    """Who calls `main` from Python wants Ctrl-C afterwards."""
    before = [signal.getsignal(number) for number in pretrain.Stop.SIGNALS]
    pretrain_run("run", "epochs=1", "prune.policy=none")
    assert [signal.getsignal(number) for number in pretrain.Stop.SIGNALS] == before
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_IGN, 0), (signal.SIG_DFL, 129)])
def test_a_run_under_nohup_outlives_its_terminal(
    handler: signal.Handlers, code: int, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nohup starts a program with SIGHUP ignored, and it stays so. The control: without it the run stops, and
    is saved.
    """
    original = DeviceImages.stream

    def hung_up(self: DeviceImages, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(original(self, index_batches)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGHUP)
            yield batch

    monkeypatch.setattr(DeviceImages, "stream", hung_up)
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'run'}", "epochs=1"]) == code
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "encoder").exists() == (code == 0) and newest_step(tmp_path / "run") == (
        8 if code == 0 else 3
    )


@pytest.fixture
def no_change(tmp_path: Path) -> Path:
    return tmp_path / "never"


def expect_error(capsys: pytest.CaptureFixture[str], arguments: list[str], *said: str, code: int = 2) -> None:
    assert pretrain.main(arguments) == code
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "fix: " in errors[0]
    for part in said:
        assert part in errors[0], errors[0]


def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_config: Path, tiny_data: Path, no_change: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*overrides: str) -> list[str]:
        return ["--config", str(tiny_config), f"out={no_change}", *overrides]

    (tmp_path / "empty").mkdir()
    expect_error(capsys, start("prune.fractoin=0.5"), "prune.fractoin", "prune.fraction")
    expect_error(capsys, start("epochs=zero"), "epochs")
    expect_error(capsys, start(f"data.source={tmp_path / 'empty'}"), "no images")
    expect_error(capsys, start(f"data.source={tmp_path / 'missing'}"), "missing")
    expect_error(capsys, start("data.source=cifar11"), "cifar1")
    expect_error(capsys, start("batch_size=69", "prune.policy=none"), "68", "batch_size=69", "batch_size=68")
    expect_error(capsys, start("batch_size=42"), "41 of the 68", "batch_size=34")
    expect_error(capsys, start("device=cuda:99"), "device=cuda:99")
    expect_error(capsys, start("device=toaster"), "device=toaster")
    expect_error(capsys, start("device=meta"), "device=meta")
    expect_error(capsys, start("data.source=no #such: *place"), "no #such: *place")
    expect_error(capsys, start("data.max_images=2", "batch_size=2", "prune.fraction=0.9"), "keeps 0 of the 2")
    expect_error(capsys, [], "--config")
    expect_error(capsys, ["--resme", "x"], "--resme")
    expect_error(capsys, ["--config", str(tmp_path / "no.yaml")], "no.yaml")
    expect_error(capsys, ["--resume", str(tmp_path)], "config.yaml")
    expect_error(capsys, ["--resume", str(tmp_path), "--config", str(tiny_config)], "--resume")
    assert not no_change.exists()


def test_a_used_directory_is_refused(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    expect_error(capsys, ["--config", str(tiny_config), f"out={tmp_path / 'used'}"], "not empty", "--resume")
    expect_error(
        capsys, ["--config", str(tiny_config), f"out={tmp_path / 'used' / 'thesis.tex'}"], "thesis.tex"
    )
    expect_error(
        capsys,
        ["--config", str(tiny_config), f"out={tmp_path / 'used' / 'thesis.tex' / 'run'}"],
        "cannot write",
    )
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_config_or_other_images_is_refused(
    pretrain_run: Pretrain,
    tmp_path: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    StopAfter.steps = 3
    out = tmp_path / "run"
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{source: {tmp_path / 'data'}}}\nmodel: {{width: 8}}\nepochs: 3\nbatch_size: 8\ndevice: cpu\n"
    )
    assert pretrain.main(["--config", str(config), f"out={out}"]) == 143
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    expect_error(capsys, ["--resume", str(out), "temperature=0.2"], "temperature was 0.5 and is now 0.2")
    expect_error(capsys, ["--resume", str(out), "model.width=16"], "model.width was 8 and is now 16")
    expect_error(capsys, ["--resume", str(out), "out=elsewhere"], "stays in its directory")
    expect_error(capsys, ["--resume", str(out), "precision=bf16"], "trains in fp32", "precision=fp32")
    edited = (out / "config.yaml").read_text().replace("epochs: 3", "epochs: 4")
    (out / "config.yaml").write_text(edited)
    expect_error(capsys, ["--resume", str(out)], "checkpoint", "epochs was 3 and is now 4")
    (out / "config.yaml").write_text(edited.replace("epochs: 4", "epochs: 3"))
    images, labels = striped_images(68)
    write_parquet(tmp_path / "data" / "train.parquet", images[::-1], labels)
    expect_error(capsys, ["--resume", str(out)], "not those of the checkpoint")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_dry_run_shows_everything_and_trains_nothing(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "x"
    assert pretrain.main(["--config", str(tiny_config), "--dry-run", f"out={out}"]) == 0
    said = capsys.readouterr().out
    resolved = yaml.safe_load(said[said.index("out:") : said.index("one batch")])
    assert resolved["prune"]["fraction"] == 0.4 and resolved["temperature"] == 0.5
    assert "images    68" in said and "30 steps against 40 unpruned" in said and "nothing was trained" in said
    assert not out.exists()
    picture = Image.open(out.with_name(f".{out.name}.views.png"))
    assert picture.size[0] > 8 * 32 and len(set(picture.convert("L").tobytes())) > 50


def test_no_compiler_is_one_line_not_an_end(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(function: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", missing)
    job = make_job(tiny_config, "compile=true")
    report = Report()
    assert passes.compiled(job, report) == (job.model, cut_views)
    assert "compile   not available" in report.unwritten[-1]


def test_cuda_graphs_need_compile_and_a_gpu(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cuda_graphs needs compile: true"):
        make_job(tiny_config, "cuda_graphs=true")
    modes: list[str | None] = []

    def noted(function: Any, mode: str | None = None, **options: Any) -> Any:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", noted)
    report = Report()
    passes.compiled(make_job(tiny_config, "compile=true", "cuda_graphs=true"), report)
    assert modes == [None] * 3 and "cuda_graphs needs a GPU" in report.unwritten[-1]


@pytest.mark.gpu
def test_a_step_replayed_as_a_cuda_graph_is_the_compiled_step(tiny_config: Path, tmp_path: Path) -> None:
    """Whole epochs, trained and scored, with the same losses: a graph that read a stale buffer would show at
    once.
    """
    losses = []
    for graphs in ("false", "true"):
        out = tmp_path / graphs
        overrides = [
            "device=cuda",
            "precision=fp32",
            "compile=true",
            f"cuda_graphs={graphs}",
            "epochs=2",
            "prune.scoring=pruned",
        ]
        assert pretrain.main(["--config", str(tiny_config), f"out={out}", *overrides]) == 0
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_step(tiny_config: Path) -> None:
    """Equal weights, equal batch: losses, gradients and running statistics agree. (Whole runs drift:
    selection amplifies rounding.)
    """
    results = []
    for override in ("compile=false", "compile=true"):
        job = make_job(tiny_config, override, "batch_size=32")
        model, views_of = passes.compiled(job, Report())
        assert (model is job.model) == (override == "compile=false"), "a compiler is needed for this test"
        index = torch.arange(32)
        params = draw_params(0, 1, index, job.recipe, 16)
        _, _, z_a, z_b = passes.forward_views(
            job, model, *views_of(job.images.pixels[index], params, job.recipe)
        )
        loss = nt_xent(z_a, z_b, 0.5)
        loss.mean().backward()
        gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
        results.append(([loss.detach()], gradients, [buffer.float() for buffer in job.model.buffers()]))
    for eager, fused in zip(*results, strict=True):
        assert len(eager) == len(fused) > 0
        for a, b in zip(eager, fused, strict=True):
            assert (a - b).norm() <= 1e-3 * a.norm() + 1e-6


@pytest.mark.slow
def test_a_compiled_run_ends_well(pretrain_run: Pretrain) -> None:
    run = pretrain_run("run", "epochs=3", "compile=true", "prune.scoring=pruned")
    assert [row["step"] for row in rows(run)] == [8, 13, 21] and all(
        math.isfinite(row["loss"]) for row in rows(run)
    )
    assert load_encoder(run)(torch.rand(2, 3, 16, 16)).shape == (2, 64)


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_other_optimisers_train(pretrain_run: Pretrain, optimizer: str) -> None:
    lr = {"lars": 5.0, "adamw": 3e-3}[optimizer]
    overrides = [
        f"optimizer.name={optimizer}",
        f"optimizer.lr={lr}",
        "epochs=12",
        "prune.policy=none",
        "augment.jitter_prob=0",
    ]
    losses = [row["loss"] for row in rows(pretrain_run("run", *overrides))]
    assert losses[-1] < losses[0] - 0.2, losses


def test_rank_correlation_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, generator=generator)
    assert rank_correlation(a, a.exp()).item() == pytest.approx(1) and rank_correlation(
        a, -a
    ).item() == pytest.approx(-1)
    b = torch.randn(50, generator=generator)
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    assert rank_correlation(a, b).item() == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-6)
    assert rank_correlation(a, torch.ones(50)).item() == 0


def test_what_an_epoch_says_of_its_terms() -> None:
    """Both spreads by the statistics module; learned is who has more than half of the softmax, so exp(-loss)
    > 1/2.
    """
    loss, distance = [0.1, 0.69, 0.7, 3.0], [4.0, 1.0, 2.0, 2.5]
    figures = pretrain.describe_terms(torch.tensor([loss, distance]), 5.0, "raw")
    assert figures["learned_share"] == sum(math.exp(-value) > 0.5 for value in loss) / 4 == 0.5
    assert figures["loss"] == pytest.approx(statistics.mean(loss)) and figures["std_loss"] == pytest.approx(
        statistics.stdev(loss)
    )
    assert figures["std_beta_memory"] == pytest.approx(5 * statistics.stdev(distance))
    standardized = pretrain.describe_terms(torch.tensor([loss, distance]), 2.0, "standardized")
    assert standardized["std_beta_memory"] == pytest.approx(2 * statistics.stdev(loss))


def test_a_finished_run_without_its_exports_exports_again(pretrain_run: Pretrain) -> None:
    """As if killed between the last step and the end, or with the encoder deleted."""
    run, reference = pretrain_run("run"), pretrain_run("reference")
    shutil.rmtree(run / "encoder")
    (run / "pruning" / "samples.parquet").unlink()
    assert pretrain.main(["--resume", str(run)]) == 0
    assert_same_run(run, reference)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    run, reference = pretrain_run("run"), pretrain_run("reference")
    for name in ("checkpoints", "encoder", "pruning"):
        shutil.rmtree(run / name)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epo')  # a line cut off
    capsys.readouterr()
    expect_error(capsys, ["--resume", str(run), "temperature=0.1"], "temperature was 0.5 and is now 0.1")
    assert pretrain.main(["--resume", str(run), "data.download_dir=elsewhere"]) == 0
    ours, theirs = final_state(run), final_state(reference)
    assert all(leaf.equal(theirs[path]) for path, leaf in ours.items() if isinstance(leaf, Tensor)) and rows(
        run
    ) == rows(reference)


def test_a_last_update_that_is_not_finite_is_not_saved(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sick = ["optimizer.lr=1e38", "optimizer.warmup_epochs=0", "monitor.knn_every=0"]
    one_step = ["epochs=1", "data.max_images=8"]
    expect_error(
        capsys,
        ["--config", str(tiny_config), f"out={tmp_path / 'a'}", *sick, *one_step, "prune.policy=none"],
        "weights",
        code=3,
    )
    assert not (tmp_path / "a" / "encoder").exists() and not (tmp_path / "a" / "checkpoints").exists()
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    StopAfter.steps = 1
    expect_error(
        capsys,
        ["--config", str(tiny_config), f"out={tmp_path / 'b'}", *sick],
        "weights are not finite after step 1",
        code=3,
    )
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_a_collapsed_encoder_costs_the_knn_line_only(
    pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def collapsed(*arguments: Any, **options: Any) -> Any:
        raise EvalError("68 rows of features are all zero", "train it")

    monkeypatch.setattr("ssl_emp.commands.monitoring.extract_features", collapsed)
    run = pretrain_run("run")
    assert (
        "kNN       not taken: 68 rows" in capsys.readouterr().out and "knn_train_split" not in rows(run)[-1]
    )


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device", "metrics.jsonl"), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_a_full_disk_and_a_full_device_are_one_line(
    error: Exception,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: Any) -> None:
        raise error

    target = (passes, "nt_xent") if isinstance(error, torch.OutOfMemoryError) else (pretrain, "write_samples")
    monkeypatch.setattr(*target, full)
    words = (
        ("out of memory", "batch_size")
        if isinstance(error, torch.OutOfMemoryError)
        else ("metrics.jsonl: No space left", "--resume")
    )
    expect_error(capsys, ["--config", str(tiny_config), f"out={tmp_path / 'run'}"], *words, code=3)


def test_a_terminal_without_greek_does_not_end_a_run(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'run'}", "epochs=1"]) == 0
    terminal.flush()
    assert b"std(?" in terminal.buffer.getvalue()


def test_a_terminal_gets_a_bar_and_the_same_run(
    pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain_run("plain")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured output for a terminal
    assert Report().console.is_terminal
    assert_same_run(pretrain_run("bar"), plain)


class HostReads(TorchDispatchMode):
    """Counts operations whose answer the host must wait for: `.item()`, `bool(tensor)`, `nonzero()`, indexing
    with a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition(".")[0]
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += by_mask or name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::unique2",
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_an_epoch_reads_nothing_from_the_device(
    optimizer: str, pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, original, check_bad_steps = HostReads(), DeviceImages.stream, pretrain.check_bad_steps

    def watched(self: DeviceImages, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in original(self, index_batches):
            with reads:  # one step: the loop's body runs while this generator waits
                yield batch

    monkeypatch.setattr(DeviceImages, "stream", watched)
    # on the CPU, where it is free, the loop looks at every step
    monkeypatch.setattr(pretrain, "check_bad_steps", lambda *args: None)
    pretrain_run("run", f"optimizer.name={optimizer}", "prune.scoring=pruned")
    assert reads.count == 0
    monkeypatch.setattr(pretrain, "check_bad_steps", check_bad_steps)
    pretrain_run("watching", "epochs=1")
    assert reads.count == 8  # a read a step: the counter sees what it is meant to see


@pytest.mark.gpu
def test_no_host_sync_inside_an_epoch(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real loop, from the second batch of an epoch to its last, never waits for the GPU."""
    original = DeviceImages.stream

    def watched(self: DeviceImages, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(original(self, index_batches)):
            if number == 1:  # the first step may set up its libraries
                torch.cuda.set_sync_debug_mode("error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DeviceImages, "stream", watched)
    try:
        assert (
            pretrain.main(
                [
                    "--config",
                    str(tiny_config),
                    f"out={tmp_path / 'run'}",
                    "device=cuda",
                    "prune.scoring=pruned",
                ]
            )
            == 0
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the pruning lab, in whole runs
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", ["foresight", "distance", "epsilon_greedy", "ucb", "infobatch", "scan", "shorter", "indices"]
)
def test_every_policy_trains_the_same_number_of_samples(
    policy: str, pretrain_run: Pretrain, tmp_path: Path
) -> None:
    (tmp_path / "subset.txt").write_text("".join(f"{i}\n" for i in range(60, 10, -1)))
    more = [f"prune.indices={tmp_path / 'subset.txt'}"] if policy == "indices" else []
    run = pretrain_run("run", f"prune.policy={policy}", *more)
    assert rows(run)[-1]["samples_seen"] == 240 == sum(samples(run)["times_trained"])
    assert rows(run)[-1]["real_share"] == 0.75 and rows(run)[-1]["asked_share"] == pytest.approx(0.76)
    if policy == "shorter":
        assert [row["step"] for row in rows(run)] == [8, 16, 24, 30], (
            "full epochs, and the last one cut short"
        )
    if policy == "indices":
        times = samples(run)["times_trained"]
        assert min(times[29:61]) >= 4 and max(times[:11]) <= 2, "the first 32 named are in every pruned epoch"


TURNED = {  # the keys of prune.* beside policy, indices and the plan, away from their defaults
    "beta": 0.5, "beta_end": 1.0, "loss_weight": -1.0, "loss_weight_end": -0.5, "memory": "normalized",
    "layers": ["layer3", "layer4"], "ema": 0.7, "adjust": True, "foresee": True, "shrink": True,
    "scoring": "all", "scoring_draw": "common", "scoring_draws": 2, "scoring_size": 8, "rescore_every": 2,
    "explore": 0.5, "soften": 3.0, "confidence": 50.0, "rescale": True, "redraw_every": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "policy", ["emp", "foresight", "loss", "distance", "ucb", "infobatch", "random", "none"]
)
def test_keys_without_effect_are_named_and_have_none(
    policy: str, pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that are said to be without effect, turned at once, change nothing; each of the others changes the
    weights or the scores.
    """
    words = {key: f"prune.{key}={json.dumps(value)}" for key, value in TURNED.items()}
    idle = [
        key
        for key, value in TURNED.items()
        if idle_keys(PruneConfig.model_validate({"policy": policy, key: value}))
    ]
    start = (
        f"prune.policy={policy}",
        "epochs=3",
        "prune.anneal_fraction=0",
        "monitor.knn_every=0",
        "monitor.reliability_every=0",
    )
    plain = pretrain_run("plain", *start)
    assert "without effect" not in capsys.readouterr().out
    turned = pretrain_run("turned", *start, *(words[key] for key in idle))
    note = next(line for line in capsys.readouterr().out.splitlines() if "without effect" in line)
    assert [key for key in TURNED if f"prune.{key}," in f"{note},"] == idle
    assert weights(turned) == weights(plain)
    brought = {"adjust", "foresee"} if policy == "foresight" else set()  # it has them already
    for key in TURNED.keys() - set(idle) - brought if policy in ("emp", "foresight", "infobatch") else ():
        heard = pretrain_run(key, *start, words[key])
        # the scores, where they rank the same
        assert (weights(heard), samples(heard)) != (weights(plain), samples(plain)), key


def test_a_temperature_at_which_no_pair_is_ever_learned_is_noted(
    pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    def note(name: str, *overrides: str) -> str:
        pretrain_run(name, *overrides)
        return next((line for line in capsys.readouterr().out.splitlines() if "learned" in line), "")

    said = note("warm", "temperature=0.5", "prune.policy=loss")
    assert (
        said.startswith("note      at temperature 0.5 and batch 8 ")
        and "(a perfect one has 35% of its softmax)" in said
    ), said
    advised = said.rpartition("; try ")[2]
    assert 0.94 < perfect_pair_share(8, float(advised.removeprefix("temperature="))) < 0.96
    assert note("advised", advised, "prune.policy=loss") == ""
    assert note("no-choice", "temperature=0.5", "prune.policy=random") == ""
    assert note("no-pruning", "temperature=0.5", "prune.policy=loss", "prune.fraction=0") == ""


def test_weights_of_a_policy_reach_the_loss(pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """InfoBatch with all weights 1 is another run; with all weights 0 pruned epochs change no weight."""
    original = policies.infobatch

    def reweighed(value: float) -> Any:
        def rule(*arguments: Any) -> policies.Kept:
            kept = original(*arguments)
            return policies.Kept(kept.index, torch.full((len(kept.index),), value))

        return rule

    runs = {"published": pretrain_run("published", "prune.policy=infobatch", "prune.fraction=0.2")}
    for value in (1.0, 0.0):
        monkeypatch.setattr(policies, "infobatch", reweighed(value))
        runs[str(value)] = pretrain_run(
            str(value), "prune.policy=infobatch", "prune.fraction=0.2", "prune.anneal_fraction=0",
            "optimizer.name=sgd", "optimizer.weight_decay=0", "optimizer.momentum=0",
        )  # fmt: skip
    assert rows(runs["1.0"])[3]["loss"] != rows(runs["published"])[3]["loss"]
    losses = [row["loss"] for row in rows(runs["0.0"])]
    assert abs(losses[4] - losses[2]) < 0.25 and losses != [row["loss"] for row in rows(runs["1.0"])]


def test_adjusted_running_scores_resume_bit_for_bit(
    pretrain_run: Pretrain, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (
        "prune.ema=0.3",
        "prune.adjust=true",
        "prune.memory=normalized",
        "prune.explore=0.2",
        "prune.scoring=pruned",
    )
    whole = pretrain_run("whole", *overrides)
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    StopAfter.steps = 15
    out = whole.parent / "parts"
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", *overrides]) == 143
    StopAfter.steps = 10**9
    assert pretrain.main(["--resume", str(out)]) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("policy", ["emp", "loss", "foresight", "epsilon_greedy"])
def test_the_repeat_of_a_score_is_that_of_two_epochs_and_survives_a_stop(
    pretrain_run: Pretrain, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """`score_repeat` against scipy on what the checkpoints of two epochs' ends hold, in a run stopped inside
    both of them.
    """
    whole = pretrain_run("whole", f"prune.policy={policy}")
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    out, ends = whole.parent / "parts", []
    # inside epoch 1, to its end, inside epoch 2, to its end, to the end of the run
    for steps in (11, 2, 2, 3, 100):
        StopAfter.steps = steps
        start = ["--config", str(tiny_config), f"out={out}", f"prune.policy={policy}"]
        assert pretrain.main(["--resume", str(out)] if out.exists() else start) == (143 if steps < 100 else 0)
        ends.append(load_checkpoint(out / "checkpoints")[0])
    assert_same_run(out, whole)
    before, after = ends[1], ends[3]
    assert before is not None and after is not None
    assert (before["epoch"], after["epoch"]) == (1, 2) and (before["step"], after["step"]) == (13, 18)
    rule, (before, after) = (
        make_job(tiny_config, f"prune.policy={policy}").rule,
        (before["scores"], after["scores"]),
    )
    fresh = (before["scored_epoch"] == 1) & (after["scored_epoch"] == 2)
    then, now = (rule.score(state["last"], state["variance"], 2)[fresh] for state in (before, after))
    row = rows(out)[2]
    assert row["score_repeat_samples"] == fresh.sum() > 10
    assert (
        row["score_repeat"] == pytest.approx(spearmanr(then, now).statistic, abs=1e-5)
        and row["score_repeat"] < 0.999
    )


def test_foresight_is_the_loss_adjusted_averaged_and_foreseen(pretrain_run: Pretrain) -> None:
    named = pretrain_run("named", "prune.policy=foresight")
    spelled = pretrain_run(
        "spelled",
        "prune.policy=emp",
        "prune.beta=0",
        "prune.ema=0.3",
        "prune.adjust=true",
        "prune.foresee=true",
    )
    assert final_state(named)["/scores/times_trained"].equal(final_state(spelled)["/scores/times_trained"])
    assert weights(named) == weights(spelled)
    assert not final_state(named)["/scores/times_trained"].equal(
        final_state(pretrain_run("loss", "prune.policy=loss"))["/scores/times_trained"]
    )


def test_several_cheap_draws_are_their_mean(tiny_config: Path) -> None:
    """Three draws at half the size: the mean of three passes of one, and no two of them alike."""
    job = make_job(tiny_config, "prune.scoring_draws=3", "prune.scoring_size=8", "prune.adjust=true")
    order = torch.arange(68)
    terms, draws = passes.score_passes(job, job.model, cut_views, order[:20], order[20:], 3)
    small = replace(job.recipe, size=8)
    keys = [3, 3 + passes.SCORING_EPOCHS, 3 + 2 * passes.SCORING_EPOCHS]
    singles = [
        passes.score_pass(job, job.model, cut_views, order[:20], order[20:], key, small) for key in keys
    ]
    torch.testing.assert_close(terms, sum(single[0] for single in singles) / 3)
    assert draws is not None and singles[0][1] is not None and singles[1][1] is not None
    assert (
        draws.shape == (20, 14)
        and not singles[0][0].equal(singles[1][0])
        and not singles[0][1].equal(singles[1][1])
    )
    full_size, _ = passes.score_pass(job, job.model, cut_views, order[:20], order[20:], 3, job.recipe)
    assert not full_size.equal(singles[0][0])


def test_the_views_that_are_foreseen_are_the_views_that_come(
    pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws that selection looked at, row by row, are those of the training steps of the same epoch."""
    foreseen: list[Tensor] = []
    trained: dict[int, list[tuple[Tensor, Tensor]]] = {}
    original = passes.simclr_terms

    def explained(self: ScoreState, draw: Tensor) -> Tensor:
        if len(draw) == 68:
            foreseen.append(draw)
        return draw[:, :2].T

    def noted(
        job: Any, model: Any, views_of: Any, index: Tensor, images: Tensor, epoch: int, *more: Any
    ) -> Any:
        loss, memory, draw = original(job, model, views_of, index, images, epoch, *more)
        assert draw is not None
        trained.setdefault(epoch, []).append((index, draw))
        return loss, memory, draw

    monkeypatch.setattr(ScoreState, "explained", explained)
    monkeypatch.setattr(passes, "simclr_terms", noted)
    pretrain_run("run", "prune.adjust=true", "prune.foresee=true", "monitor.reliability_every=0")
    assert len(foreseen) == 3
    for epoch, draws in zip((1, 2, 3), foreseen, strict=True):
        for index, draw in trained[epoch]:
            assert draw.equal(draws[index])


def test_reliability_is_one_where_the_score_does_not_depend_on_the_draw(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network whose loss is the sample's index: two draws agree, and so does what was stored."""
    job = make_job(tiny_config, "monitor.reliability_images=64")
    state = ScoreState(68, 1.0, False, job.device)
    generator = torch.Generator().manual_seed(0)

    def fake(noise: float) -> Any:
        def through(
            job: Any, model: Any, views_of: Any, index: Tensor, images: Tensor, epoch: int, *more: Any
        ) -> Any:
            values = index.float() + noise * torch.randn(len(index), generator=generator)
            return values, torch.zeros_like(values), None

        return through

    for noise, low, high in ((0.0, 0.999, 1.001), (40.0, -0.3, 0.6)):
        monkeypatch.setattr(passes, "simclr_terms", fake(noise))
        everyone = torch.arange(68)
        state.observe(everyone, torch.stack(fake(noise)(job, None, None, everyone, everyone, 0)[:2]), None, 0)
        figures = passes.measure_reliability(job, job.model, cut_views, state, 0)
        assert figures["draw_reliability"] is not None and low < figures["draw_reliability"] < high, figures
        if noise == 0:
            assert figures["score_reliability"] == pytest.approx(1, abs=1e-3)


def test_a_key_that_is_younger_than_the_checkpoint_had_its_default() -> None:
    now = PretrainConfig().model_dump()
    before = {**now, "prune": {key: value for key, value in now["prune"].items() if key != "soften"}}
    assert first_difference(now, before) is None
    now["prune"] = {**now["prune"], "soften": 0.5}
    assert first_difference(now, before) == "prune.soften was 0.0 and is now 0.5"


def test_a_supervised_run(pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns the stripes, says the last epoch's test accuracy, and leaves an encoder like any other."""
    run = pretrain_run(
        "run", "objective=supervised", "epochs=12", "label_smoothing=0.1", "optimizer.schedule=onecycle",
        "optimizer.lr=0.1", "augment.crop_padding=2", "augment.jitter_prob=0", "augment.gray_prob=0",
    )  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert result["test_images"] == 40 and result["test_accuracy"] > 60, result
    assert "test accuracy" in capsys.readouterr().out
    assert rows(run)[-1]["loss"] < rows(run)[0]["loss"] - 0.2
    assert load_encoder(run)(torch.rand(2, 3, 16, 16)).shape == (2, 64)
    for score, loss, entropy in zip(
        *(samples(run)[name] for name in ("score", "loss", "entropy")), strict=True
    ):
        assert score == pytest.approx(loss + 5 * entropy, rel=1e-5) and 0 <= entropy <= math.log(4) + 1e-6
    curve = [row["lr"] for row in rows(run)]
    assert max(curve) <= 0.1 and curve[-1] < 1e-3 and curve.index(max(curve)) not in (0, len(curve) - 1)


def test_a_supervised_dry_run_is_of_its_own_loss(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained classifier of four classes is about log 4 = 1.39 nats off, NT-Xent of eight pairs about
    log 15 = 2.7.
    """
    assert (
        pretrain.main(
            ["--config", str(tiny_config), "--dry-run", f"out={tmp_path / 'x'}", "objective=supervised"]
        )
        == 0
    )
    said = capsys.readouterr().out
    value = float(said[said.index("one batch loss ") :].split()[3].rstrip(","))
    assert 0.8 < value < 2.0 and (tmp_path / ".x.views.png").exists(), value


def test_label_noise_reaches_the_training_and_the_metrics(pretrain_run: Pretrain, tmp_path: Path) -> None:
    """A run with label noise is, to the bit, the run on a set whose file holds those wrong labels."""
    images, labels = striped_images(68)
    wrong, is_noisy = noisy_labels(torch.tensor(labels), 4, 0.5, seed=3)
    assert int((wrong != torch.tensor(labels)).sum()) == int(is_noisy.sum()) == 34
    write_parquet(tmp_path / "wrong" / "train.parquet", images, wrong.tolist())
    supervised = (
        "objective=supervised",
        "epochs=2",
        "prune.anneal_fraction=0",
        "monitor.knn_every=0",
        "data.subset_seed=3",
    )
    clean = pretrain_run("clean", *supervised)
    noisy = pretrain_run("noisy", *supervised, "data.label_noise=0.5")
    written = pretrain_run("written", *supervised, f"data.source={tmp_path / 'wrong'}")
    assert weights(noisy) == weights(written) != weights(clean)
    assert [row["loss"] for row in rows(noisy)] == [row["loss"] for row in rows(written)]
    pruned = rows(noisy)[-1]
    trained = final_state(noisy)["/scores/trained_epoch"] == 1
    assert pruned["noisy_data"] == 0.5 and pruned["noisy_kept"] == float(is_noisy[trained].double().mean())
    assert not any("noisy_data" in row for row in [*rows(clean), *rows(written)])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective=supervised", "data.labels=none"], ["needs labels", "objective=simclr"]),
        (["objective=supervised", "augment.crop_padding=16"], ["crop_padding=16", "less padding"]),
        (["augment.crop_padding=2", "augment.size=12"], ["images of 16 and views of 12"]),
        (["data.label_noise=0.2"], ["simclr trains without labels"]),
        (["objective=supervised", "prune.adjust=true"], ["prune.adjust"]),
        (["optimizer.schedule=onecycle", "optimizer.name=adamw"], ["onecycle", "sgd or lars"]),
        (["prune.policy=indices"], ["prune.indices"]),
        (["prune.policy=indices", "prune.indices=missing.txt"], ["cannot read the indices in missing.txt"]),
    ],
)
def test_what_does_not_fit_together_is_said(
    tiny_config: Path,
    tmp_path: Path,
    overrides: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'run'}", *overrides]) == 2
    line = capsys.readouterr().err.strip()
    assert all(part in line for part in said) and "\n" not in line and "fix: " in line, line
    assert not (tmp_path / "run").exists()


def test_too_few_indices_are_named(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.txt").write_text("1\n2\n3\n")
    overrides = ["prune.policy=indices", f"prune.indices={tmp_path / 'few.txt'}", f"out={tmp_path / 'run'}"]
    assert pretrain.main(["--config", str(tiny_config), *overrides]) == 2
    assert "names 3 samples, and a pruned epoch needs 40" in capsys.readouterr().err


def test_warnings_name_the_key_to_turn(
    pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_emp.diagnostics.MIN_SAMPLES", 10)
    pretrain_run("run")
    assert (
        "warning   the memory term drowns the loss" in (said := capsys.readouterr().out)
        or "warning   the ranking" in said
    )
    assert "try prune." in said
