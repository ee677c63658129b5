"""The main job end to end: what a run leaves, that pruning prunes, that a resumed run is the uninterrupted
one, bad input.
"""

import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Pretrain, striped_images, write_parquet
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linear_eval import EvalError
from ssl_emp import load_encoder
from ssl_emp.augment import cut_views
from ssl_emp.commands import job as job_module
from ssl_emp.commands import pretrain
from ssl_emp.commands.job import Job, prepare
from ssl_emp.commands.resume import first_difference
from ssl_emp.config import PRUNE_SECTIONS, PretrainConfig, load_config
from ssl_emp.data.images import DeviceImages, HostImages
from ssl_emp.data.label_noise import noisy_labels
from ssl_emp.errors import UserError
from ssl_emp.loss import perfect_pair_share
from ssl_emp.prune import POLICIES, Emp, InfoBatch, Pruner, Seen
from ssl_emp.prune.figures import describe_terms, rank_correlation
from ssl_emp.prune.policies import Kept
from ssl_emp.prune.pruner import SCORING_EPOCHS
from ssl_emp.prune.record import Known
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.pace import seconds_of, seconds_per_step
from ssl_emp.run.report import Report
from ssl_emp.run.stop import Stop

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


def assert_same_run(run: Path, reference: Path, other: tuple[str, ...] = ()) -> None:
    """`other`: entries of the checkpoint that may differ."""
    ours, theirs = final_state(run), final_state(reference)
    assert ours.keys() == theirs.keys()
    for path in ours.keys() - set(other):
        leaf = ours[path]
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
        and "saved     25% of the samples: 240 trained on, 320 without pruning; about " in said
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
        run = pretrain_run(policy, f"prune.policy={policy}", "prune.fraction=0")
        assert_same_run(run, unpruned, other=("/pruner/policy",))


def test_loss_is_emp_with_beta_0_and_beta_matters(pretrain_run: Pretrain) -> None:
    loss, beta_0, beta_5 = (
        pretrain_run("a", "prune.policy=loss"),
        pretrain_run("b", "prune.beta=0"),
        pretrain_run("c"),
    )
    assert final_state(loss)["/pruner/record/last"].equal(final_state(beta_0)["/pruner/record/last"])
    assert not final_state(beta_5)["/pruner/record/times_trained"].equal(
        final_state(beta_0)["/pruner/record/times_trained"]
    )


def test_same_seed_same_run_other_seed_other_run(pretrain_run: Pretrain) -> None:
    first = pretrain_run("a")
    assert_same_run(pretrain_run("b"), first)
    assert not final_state(pretrain_run("c", "seed=1"))["/pruner/record/last"].equal(
        final_state(first)["/pruner/record/last"]
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


class Watched:
    """Images that note the batches which are asked for, and whether these are trained on or only scored."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls: list[tuple[bool, Tensor]] = []

    def stream(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        self.calls.append((torch.is_grad_enabled(), batches.clone()))
        return iter(self.store.stream(batches))


def train(job: Job, out: Path) -> Path:
    """The loop alone, on a job of which the test chose a part."""
    out.mkdir(parents=True)
    with pretrain.Stop() as stop:
        assert pretrain.pretrain(job, pretrain.open_run(job, out, None, Report()), stop) == 0
    return out


@pytest.mark.parametrize("scoring", ["all", "pruned"])
def test_what_a_scoring_pass_scores(scoring: str, tiny_config: Path, tmp_path: Path) -> None:
    """Before each pruned epoch, `all`: everything; `pruned`: exactly what the last epoch did not train on."""
    keys = ["epochs=8", "prune.anneal_fraction=0", "monitor.reliability_every=0"]
    job = make_job(tiny_config, f"prune.scoring={scoring}", *keys)
    store = Watched(job.store)
    train(replace(job, store=store), tmp_path / "run")  # type: ignore[arg-type]
    assert [trains for trains, _ in store.calls] == [True, *[False, True] * 7]
    missing = []
    for (_, trained), (_, scored) in zip(store.calls[::2], store.calls[1::2], strict=False):
        left_out = set(range(68)) - set(trained.flatten().tolist())
        wanted = left_out if scoring == "pruned" else set(range(68))
        assert scored.shape == (math.ceil(len(wanted) / 8), 8)
        table = scored.flatten().tolist()
        assert set(table[: len(wanted)]) == wanted and len(table) - len(wanted) < 8
        assert all(len(set(batch)) == 8 for batch in scored.tolist()), "a batch holds no sample twice"
        missing.append(len(left_out))
    # the remainder of the full epoch, then the pruned
    assert missing == [4, 28, 28, 36, 28, 28, 28]


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
    order = torch.randperm(68, generator=torch.Generator().manual_seed(0))[:24].view(3, 8)
    seen = pretrain.score_batches(job, job.model, cut_views, order, 3, job.recipe)
    assert seen.covariates is None and seen.index.equal(order.flatten())
    assert seen.terms.shape == (2, 24) and not seen.terms.requires_grad
    after = job.model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items()), "running statistics included"
    assert all(p.grad is None for p in job.model.parameters()) and job.model.training

    for number, batch in enumerate(order):
        images = job.images.pixels[batch]
        loss, _, memory, _ = pretrain.forward(job, job.model, cut_views, batch, images, 3, job.recipe)
        expected = torch.stack([loss, memory]).detach()
        assert seen.terms[:, 8 * number : 8 * number + 8].equal(expected)
    assert any(not after[name].equal(value) for name, value in before.items()), (
        "training moves the statistics"
    )


@pytest.mark.parametrize("trained", [40, 44, 48])
def test_what_fills_up_the_last_batch_of_a_scoring_pass_is_not_scored(trained: int) -> None:
    """A network whose loss is the sample's number: each sample that was left out gets its own, the others
    keep theirs.
    """
    pruner = Pruner(68, batch_size=4, epochs=3, fraction=0.25, anneal_fraction=0.0, scoring="pruned")
    first = pruner.batches(0).flatten()[:trained]
    pruner.steps[0] = trained // 4  # as if the epoch had been so short
    pruner.record.observe(first, torch.full((2, trained), -7.0), None, 0)

    def score(batches: Tensor, key: int) -> Seen:
        index = batches.flatten()
        return Seen(index, torch.stack([index.float(), -index.float()]))

    pruner.rescore(1, score)
    expected = torch.stack([torch.arange(68.0), -torch.arange(68.0)])
    expected[:, first] = -7.0
    assert pruner.record.last.equal(expected)
    assert pruner.record.times_scored.equal(torch.ones(68, dtype=torch.int32))


@dataclass(frozen=True)
class Noting(Emp):
    """EMP that notes what it was shown and what it kept."""

    calls: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def choose(self, known: Known, *more: Any) -> Kept:
        kept = super().choose(known, *more)
        self.calls.append((known.terms.clone(), kept.index.clone()))
        return kept


def test_the_kept_set_is_the_top_of_the_last_scores(tiny_config: Path, tmp_path: Path) -> None:
    """Each pruned epoch trains on exactly those with the highest loss - beta * distance at its start."""
    job = make_job(tiny_config, "monitor.reliability_every=0")
    store = Watched(job.store)
    Noting.calls.clear()
    job.pruner.policy = Noting()
    train(replace(job, store=store), tmp_path / "run")  # type: ignore[arg-type]
    assert [len(kept) for _, kept in Noting.calls] == [40, 40, 32]
    for ((loss, memory), kept), (_, batches) in zip(Noting.calls, store.calls[1:], strict=False):
        assert sorted(kept.tolist()) == sorted(batches.flatten().tolist())
        scores = torch.where(loss < torch.inf, loss + 5 * memory, torch.inf)
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
    expect_error(capsys, start("batch_size=36"), "fill 1 x batch_size=36", "no whole batch", "batch_size=34")
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
    assert pretrain.compiled(job, report) == (job.model, cut_views)
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
    pretrain.compiled(make_job(tiny_config, "compile=true", "cuda_graphs=true"), report)
    assert modes == [None] * 3 and "cuda_graphs needs a GPU" in report.unwritten[-1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles: as errors they would switch it off
def test_a_step_replayed_as_a_cuda_graph_is_the_compiled_step(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every sample has the same loss and memory, trained on or scored: a graph that read a stale buffer would
    show at once. The rate is so low that rounding has nothing to grow on.
    """
    seen = []
    for graphs in ("false", "true"):
        out = tmp_path / graphs
        overrides = [
            "device=cuda",
            "precision=fp32",
            "compile=true",
            f"cuda_graphs={graphs}",
            "epochs=2",
            "prune.scoring=pruned",
            "optimizer.lr=1.0e-5",
        ]
        assert pretrain.main(["--config", str(tiny_config), f"out={out}", *overrides]) == 0
        assert "not available" not in capsys.readouterr().out, "a compiler is needed for this test"
        table = pq.read_table(out / "pruning" / "samples.parquet").to_pydict()
        seen.append(torch.tensor([table["loss"], table["distance"]]))
    assert seen[0].isfinite().all()
    torch.testing.assert_close(*seen, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_step(tiny_config: Path) -> None:
    """Equal weights, equal batch: losses, gradients and running statistics agree. (Whole runs drift:
    selection amplifies rounding.)
    """
    results = []
    for override in ("compile=false", "compile=true"):
        job = make_job(tiny_config, override, "batch_size=32")
        model, views_of = pretrain.compiled(job, Report())
        assert (model is job.model) == (override == "compile=false"), "a compiler is needed for this test"
        index = torch.arange(32)
        images = job.images.pixels[index]
        loss, _, _, _ = pretrain.forward(job, model, views_of, index, images, 1, job.recipe)
        loss.mean().backward()
        gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
        results.append(([loss.detach()], gradients, [buffer.float() for buffer in job.model.buffers()]))
    for eager, fused in zip(*results, strict=True):
        assert len(eager) == len(fused) > 0
        for a, b in zip(eager, fused, strict=True):
            assert (a - b).norm() <= 1e-3 * a.norm() + 1e-6


def test_views_of_many_sizes_are_all_compiled(tiny_config: Path) -> None:
    """torch gives up after eight versions of a function, with eight pages of warning."""
    stages = [[size, share / 10] for share, size in enumerate(range(8, 18), 1)]
    job = make_job(tiny_config, f"augment.size={stages}", "compile=true")
    counter = CompileCounter()
    views_of = pretrain.compiled_by_size(lambda x, recipe: x * recipe.size, job, Report(), backend=counter)
    for epoch in range(2 * len(stages)):
        recipe = replace(job.recipe, size=job.sizes.at(epoch, 2 * len(stages)))
        for scores in (False, True):
            with torch.set_grad_enabled(not scores):
                assert views_of(torch.ones(1), recipe).item() == recipe.size
    assert counter.frame_count == 2 * len(stages)
    torch._dynamo.reset()


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
    terms = torch.tensor([loss, [-value for value in distance]])
    figures = describe_terms(terms, 5.0, standardized=False)
    assert figures["rank_correlation"] == pytest.approx(spearmanr(loss, distance).statistic, abs=1e-6)
    assert figures["learned_share"] == sum(math.exp(-value) > 0.5 for value in loss) / 4 == 0.5
    assert figures["loss"] == pytest.approx(statistics.mean(loss)) and figures["std_loss"] == pytest.approx(
        statistics.stdev(loss)
    )
    assert figures["std_beta_memory"] == pytest.approx(5 * statistics.stdev(distance))
    standardized = describe_terms(terms, 2.0, standardized=True)
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
        capsys.readouterr().out.count("warning   the kNN accuracy cannot be measured: 68 rows") == 1
        and "knn_train_split" not in rows(run)[-1]
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

    target = (
        (pretrain, "nt_xent") if isinstance(error, torch.OutOfMemoryError) else (pretrain, "write_samples")
    )
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
    assert pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'run β'}", "epochs=1"]) == 0
    terminal.flush()
    assert b"run ?/encoder\n" in terminal.buffer.getvalue()


def test_a_terminal_gets_a_bar_and_the_same_run(
    pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain_run("plain")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured output for a terminal
    assert Report().console.is_terminal
    assert_same_run(pretrain_run("bar"), plain)


class HostReads(TorchDispatchMode):
    """Counts operations for which host and GPU wait for each other: `.item()`, `bool(tensor)`, `nonzero()`,
    indexing with a mask, and a number that has to travel: `tensor[index] = number`, `torch.tensor(number)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._numbers = Numbers(self)

    def __enter__(self) -> "HostReads":
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

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


class Numbers(TorchFunctionMode):
    """For `HostReads`: Python numbers that torch copies to a GPU. The operations alone do not show them."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__setitem__:
            _, key, value = args
            keys = key if isinstance(key, tuple) else (key,)
            self.reads.count += not isinstance(value, Tensor) and any(isinstance(k, Tensor) for k in keys)
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            self.reads.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x.long(), 1.0),
        lambda x: x.__setitem__((x.long(),), 1.0),
        lambda x: torch.tensor(1.0) + x,
        lambda x: torch.as_tensor(True),
    ],
)
def test_what_would_wait_for_a_gpu_is_counted(read: Any) -> None:
    x, reads = torch.zeros(3), HostReads()
    with reads:
        read(x)
    assert reads.count == 1
    with reads:
        x[x.long()] = x + 1
        x[0] = x[1]
        torch.as_tensor(x).index_fill_(0, x.long() * 0, 2.0)
    assert reads.count == 1


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("sgd", []),
        ("lars", []),
        ("adamw", []),
        ("sgd", ["augment.size=[[8, 0.5], [16, 1]]"]),
        ("sgd", ["loss=dcl", "prune.scoring_loss=nt_xent"]),
        ("sgd", ["objective=supervised"]),
    ],
)
def test_an_epoch_reads_nothing_from_the_device(
    optimizer: str, words: list[str], pretrain_run: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, original = HostReads(), DeviceImages.stream

    def watched(self: DeviceImages, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in original(self, index_batches):
            with reads:  # one step: the loop's body runs while this generator waits
                yield batch

    monkeypatch.setattr(DeviceImages, "stream", watched)
    keys = ("prune.scoring=pruned", "monitor.knn_every=0", "monitor.reliability_every=0")
    run = pretrain_run("run", f"optimizer.name={optimizer}", *keys, *words)
    # on the CPU, where it is free, the loop looks after every step whether too many were skipped; scoring
    # passes read nothing at all
    assert reads.count == rows(run)[-1]["step"] == 30


PRUNERS: list[tuple[str, dict[str, Any]]] = [
    ("emp", {}),
    ("emp", {"rescale": True, "ema": 0.3, "explore": 0.2, "soften": 0.5, "memory": "standardized"}),
    ("foresight", {"shrink": True}),
    ("infobatch", {}),
    ("ucb", {}),
    ("random", {"rescale": True}),
    ("none", {}),
]


def make_pruner(policy: str, keys: dict[str, Any], device: str = "cpu") -> Pruner:
    def covariates(epoch: int, index: Tensor) -> Tensor:
        return torch.stack([index * 1.0, (index * (epoch + 3)) % 7 * 1.0], 1)

    return Pruner(
        64, batch_size=8, epochs=4, policy=POLICIES[policy](**keys), fraction=0.5, device=device,
        covariates=covariates,
    )  # fmt: skip


def losses_of(index: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, with a gradient, and memory of some samples."""
    loss = (index % 5).float().requires_grad_() / 3 + 0.1
    return loss, -(index % 3).float()


@pytest.mark.parametrize(("policy", "keys"), PRUNERS)
def test_a_pruner_alone_reads_nothing_from_the_device_within_an_epoch(
    policy: str, keys: dict[str, Any]
) -> None:
    pruner, reads = make_pruner(policy, keys), HostReads()
    for epoch in range(len(pruner.steps)):
        batches = pruner.batches(epoch)
        for index in batches:
            loss, memory = losses_of(index)
            with reads:
                pruner.weighted(index, loss).backward()
                seen = pruner.gather(index, loss, memory)
                pruner.observe(seen, where=seen.terms.isfinite().all())
    assert reads.count == 0 and pruner.step == sum(pruner.steps)
    with reads:
        bool(pruner.record.last.isfinite().all())
    assert reads.count == 1, "the counter sees what it is meant to see"


@pytest.mark.parametrize(("policy", "keys"), PRUNERS)
def test_update_looks_at_the_range_of_an_index_on_the_host_and_at_nothing_else(
    policy: str, keys: dict[str, Any]
) -> None:
    pruner, reads = make_pruner(policy, keys), HostReads()
    sampler = pruner.sampler()
    for _ in range(4):
        for index in torch.tensor(list(sampler)).view(-1, 8):
            loss, memory = losses_of(index)
            with reads:
                pruner.update(index, loss, memory).backward()
    # the lowest and the highest number of a batch, which a DataLoader gives on the host: that costs nothing
    assert reads.count == 2 * pruner.total_steps


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "keys"), PRUNERS)
def test_a_pruner_alone_never_waits_for_the_gpu_within_an_epoch(policy: str, keys: dict[str, Any]) -> None:
    """Both ways to use it, from the second step of an epoch on: the first may choose and set up libraries."""
    pruner = make_pruner(policy, keys, "cuda")
    others = make_pruner(policy, keys, "cuda")
    try:
        for epoch in range(4):
            for number, index in enumerate(pruner.batches(epoch) if epoch < len(pruner.steps) else []):
                loss, memory = losses_of(index)
                if number:
                    torch.cuda.set_sync_debug_mode("error")
                pruner.weighted(index, loss).backward()
                seen = pruner.gather(index, loss, memory)
                pruner.observe(seen, where=seen.terms.isfinite().all())
            torch.cuda.set_sync_debug_mode("default")
            for number, index in enumerate(torch.tensor(list(others.sampler())).view(-1, 8)):
                loss, memory = losses_of(index.pin_memory().to("cuda", non_blocking=True))
                torch.cuda.set_sync_debug_mode("error" if number else "default")
                others.update(index, loss, memory).backward()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
                    "loss=dcl",
                    "prune.scoring_loss=nt_xent",
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


# what each key of prune.* is turned to, away from its default, and what has to hold for it to be looked at
TURNED: dict[str, tuple[str, list[str]]] = {
    "beta": ("0.5", []), "loss_weight": ("-1.0", []), "memory": ("normalized", []), "ema": ("0.7", []),
    "adjust": ("true", []), "foresee": ("true", []), "shrink": ("true", ["prune.foresee=true"]),
    "scoring": ("all", []), "scoring_draws": ("2", ["prune.scoring=all"]),
    "scoring_size": ("8", ["prune.scoring=all"]), "scoring_loss": ("dcl", []), "explore": ("0.5", []),
    "soften": ("3.0", []), "rescale": ("true", []), "redraw_every": ("2", []),
}  # fmt: skip
PLAN = {"policy", "fraction", "warmup_epochs", "anneal_fraction", "indices"}


def test_every_key_of_every_policy_is_turned_below() -> None:
    keys = {key for section in PRUNE_SECTIONS.values() for key in section.model_fields}
    assert keys - PLAN == set(TURNED)
    own = {item.name for policy in POLICIES.values() for item in fields(policy)} - {"index"}
    assert own | {"scoring", "scoring_draws", "scoring_size", "scoring_loss"} == set(TURNED)


@pytest.mark.parametrize("policy", ["emp", "foresight", "infobatch", "random"])
def test_every_key_that_a_policy_has_has_an_effect(policy: str, pretrain_run: Pretrain) -> None:
    """Each, turned alone, changes the weights or the scores."""
    plain: dict[tuple[str, ...], Path] = {}
    start = (
        f"prune.policy={policy}",
        "epochs=4",
        "prune.anneal_fraction=0",
        "monitor.knn_every=0",
        "monitor.reliability_every=0",
    )
    brought = {"adjust", "foresee"} if policy == "foresight" else set()  # it cannot be without
    for key in PRUNE_SECTIONS[policy].model_fields.keys() - PLAN - brought:
        value, needed = TURNED[key]
        if tuple(needed) not in plain:
            plain[tuple(needed)] = pretrain_run(f"plain{len(plain)}", *start, *needed)
        other, heard = plain[tuple(needed)], pretrain_run(key, *start, *needed, f"prune.{key}={value}")
        # the scores, where they rank the same
        assert (weights(heard), samples(heard)) != (weights(other), samples(other)), key


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_key_that_a_policy_does_not_have_is_one_line(
    policy: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line and in a file, with exit code 2; nothing is left behind."""
    more = ["prune.indices=some.txt"] if policy == "indices" else []
    for key in TURNED.keys() - PRUNE_SECTIONS[policy].model_fields.keys():
        words = [f"prune.policy={policy}", *more, f"prune.{key}={TURNED[key][0]}"]
        said = f"policy {policy} has no key prune.{key}, "
        command = ["--config", str(tiny_config), f"out={tmp_path / 'run'}"]
        expect_error(capsys, [*command, *words], said)
        file = tmp_path / "own.yaml"
        lines = [line.partition("=") for line in words]
        file.write_text(
            "prune:\n" + "".join(f"  {name.removeprefix('prune.')}: {value}\n" for name, _, value in lines)
        )
        expect_error(capsys, ["--config", str(file), f"out={tmp_path / 'run'}"], said, str(file))
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["prune.policy=ucb", "prune.scoring_draws=3"],
            "prune.scoring_draws has no effect with prune.scoring=",
        ),
        (
            ["prune.policy=ucb", "prune.scoring_size=8"],
            "prune.scoring_size has no effect with prune.scoring=",
        ),
        (["prune.policy=emp", "prune.shrink=true"], "prune.shrink has no effect without prune.foresee"),
        (["prune.policy=foresight", "prune.shrink=true"], None),
        (["prune.policy=ucb", "prune.scoring=all", "prune.scoring_draws=3"], None),
    ],
)
def test_keys_without_effect_are_noted(
    tiny_config: Path,
    tmp_path: Path,
    overrides: list[str],
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--config", str(tiny_config), f"out={tmp_path / 'run'}", *overrides, "--dry-run"]
    assert pretrain.main(words) == 0
    out = capsys.readouterr().out
    assert ("has no effect" in out) == (said is not None) and (said or "") in out


@dataclass(frozen=True)
class Reweighed(InfoBatch):
    """InfoBatch whose weights are all `value`."""

    value: float = 1.0

    def choose(self, known: Known, *more: Any) -> Kept:
        kept = super().choose(known, *more)
        return Kept(kept.index, torch.full((len(kept.index),), self.value))


def test_weights_of_a_policy_reach_the_loss(tiny_config: Path, tmp_path: Path) -> None:
    """InfoBatch with all weights 1 is another run; with all weights 0 pruned epochs change no weight."""
    keys = ["prune.policy=infobatch", "prune.fraction=0.2", "prune.anneal_fraction=0"]
    keys += ["optimizer.weight_decay=0", "optimizer.momentum=0"]
    runs = {}
    for name, policy in (("own", InfoBatch()), ("1", Reweighed()), ("0", Reweighed(value=0.0))):
        job = make_job(tiny_config, *keys)
        job.pruner.policy = policy
        runs[name] = [row["loss"] for row in rows(train(job, tmp_path / name))]
    assert runs["1"][0] == runs["own"][0] and runs["1"][1:] != runs["own"][1:]
    assert abs(runs["0"][4] - runs["0"][2]) < 0.25 and runs["0"] != runs["1"]


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
    job = make_job(tiny_config, f"prune.policy={policy}")
    before, after = before["pruner"]["record"], after["pruner"]["record"]
    fresh = (before["scored_epoch"] == 1) & (after["scored_epoch"] == 2)
    then, now = (
        job.pruner.policy.score(Known(state["last"], state["variance"]))[fresh] for state in (before, after)
    )
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
    assert final_state(named)["/pruner/record/times_trained"].equal(
        final_state(spelled)["/pruner/record/times_trained"]
    )
    assert weights(named) == weights(spelled)
    assert not final_state(named)["/pruner/record/times_trained"].equal(
        final_state(pretrain_run("loss", "prune.policy=loss"))["/pruner/record/times_trained"]
    )


def test_several_cheap_draws_are_their_mean(tiny_config: Path) -> None:
    """Three draws at half the size: the mean of three passes of one, and no two of them alike."""
    keys = ["prune.scoring=all", "prune.scoring_draws=3", "prune.scoring_size=8", "prune.adjust=true"]
    job = make_job(tiny_config, *keys)
    small, passes = replace(job.recipe, size=8), {}

    def score(batches: Tensor, key: int) -> Seen:
        passes[key] = pretrain.score_batches(job, job.model, cut_views, batches, key, small)
        return passes[key]

    job.pruner.rescore(1, score)
    assert list(passes) == [1, 1 + SCORING_EPOCHS, 1 + 2 * SCORING_EPOCHS]
    first, second, third = passes.values()
    table = first.index[:68]
    assert sorted(table.tolist()) == list(range(68)) and table.equal(second.index[:68])
    mean = (first.terms + second.terms + third.terms)[:, :68] / 3
    torch.testing.assert_close(job.pruner.record.last[:, table], mean)
    assert not first.terms.equal(second.terms) and not second.terms.equal(third.terms)
    draws = [seen.covariates for seen in passes.values() if seen.covariates is not None]
    assert [draw.shape for draw in draws] == [(72, 14)] * 3 and not draws[0].equal(draws[1])
    centred = torch.stack([draw[:68] for draw in draws]).mean(0)
    centred = centred - centred.mean(0)
    torch.testing.assert_close(job.pruner.record.gram, centred.T @ centred)
    full_size = pretrain.score_batches(job, job.model, cut_views, first.index.view(-1, 8), 1, job.recipe)
    assert not full_size.terms.equal(first.terms)


def test_the_views_that_are_foreseen_are_the_views_that_come(tiny_config: Path, tmp_path: Path) -> None:
    """The draws that selection looked at, row by row, are those of the training steps of the same epoch."""
    job = make_job(tiny_config, "prune.foresee=true", "monitor.reliability_every=0")
    foreseen: dict[int, Tensor] = {}
    trained: list[tuple[int, Tensor, Tensor]] = []
    covariates, observe = job.pruner._covariates, job.pruner.record.observe
    assert covariates is not None

    def coming(epoch: int, index: Tensor) -> Tensor:
        assert index.equal(torch.arange(68))
        foreseen[epoch] = covariates(epoch, index)
        return foreseen[epoch]

    def noted(index: Tensor, terms: Tensor, draw: Tensor, epoch: int, *more: Any) -> None:
        if more:  # from the loop; without its last argument the record calls itself
            trained.append((epoch, index, draw))
        observe(index, terms, draw, epoch, *more)

    job.pruner._covariates = coming
    job.pruner.record.observe = noted  # type: ignore[method-assign,assignment]
    train(job, tmp_path / "run")
    assert list(foreseen) == [1, 2, 3] and len(trained) == 30
    for epoch, index, draw in trained:
        if epoch in foreseen:
            assert draw.equal(foreseen[epoch][index])
    assert not foreseen[1].equal(foreseen[2]) and not foreseen[2].equal(foreseen[3]), "every epoch draws anew"


def test_reliability_is_one_where_the_score_does_not_depend_on_the_draw(tiny_config: Path) -> None:
    """A network whose loss is the sample's index: two draws agree, and so does what was stored."""
    generator = torch.Generator().manual_seed(0)
    for noise, low, high in ((0.0, 0.999, 1.001), (40.0, -0.3, 0.6)):
        pruner = make_job(tiny_config).pruner

        def score(batches: Tensor, key: int, noise: float = noise) -> Seen:
            index = batches.flatten()
            loss = index + noise * torch.randn(len(index), generator=generator)
            return Seen(index, torch.stack([loss, torch.zeros_like(loss)]))

        everyone = torch.arange(68)
        pruner.record.observe(everyone, score(everyone, 0).terms, None, 0)
        figures = pruner.reliability(score, 64)
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
    assert "accuracy  " in capsys.readouterr().out
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
    trained = final_state(noisy)["/pruner/record/trained_epoch"] == 1
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
    monkeypatch.setattr("ssl_emp.prune.advice.MIN_SAMPLES", 10)
    pretrain_run("run")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning   ")]
    assert any("only the memory term decides" in line or "more than noise" in line for line in said), said
    assert all("try prune." in line for line in said) and len(said) == len({line[:40] for line in said})


# ---- views that grow ---------------------------------------------------------------------------------------

GROWING = "augment.size=[[8, 0.6], [16, 1]]"  # 3 of 5 epochs at 8 px


def test_views_grow_by_the_epoch(pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    """The first epochs are those of a run of small views, to the bit; the encoder is of the last size."""
    run, small = pretrain_run("growing", GROWING), pretrain_run("small", "augment.size=8")
    assert "views     8 px for 3 epochs, then 16 px for 2\n" in capsys.readouterr().out
    ours, theirs = rows(run), rows(small)
    assert ours[:2] == theirs[:2], "of the third, what is measured after it depends on how often it is"
    assert [ours[2][name] == theirs[2][name] for name in ("loss", "gradient_norm")] == [True, True]
    assert [ours[3][name] == theirs[3][name] for name in ("loss", "gradient_norm")] == [False, False]
    assert load_encoder(run).image_size == 16 and load_encoder(small).image_size == 8
    seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    apart = seconds["training_8px_seconds"] + seconds["training_16px_seconds"]
    assert seconds["training_seconds"] == pytest.approx(apart)
    # nothing new where the views have one size
    assert not any("px" in name for name in (small / "metrics.jsonl").read_text().split('"'))


def test_views_that_grow_resume_bit_for_bit(
    pretrain_run: Pretrain, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within epochs of either size, after the last small one (18 steps) and before its end."""
    words = [GROWING, "prune.scoring=pruned", "prune.policy=foresight"]
    reference, out = pretrain_run("reference", *words), tmp_path / "stopped"
    monkeypatch.setattr(pretrain, "Stop", StopAfter)
    for number, steps in enumerate([5, 12, 1, 2, 6, 100]):
        StopAfter.steps = steps
        start = (
            ["--config", str(tiny_config), f"out={out}", *words] if number == 0 else ["--resume", str(out)]
        )
        assert pretrain.main(start) == (0 if steps == 100 else 143)
    assert_same_run(out, reference)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # trained and scored passes in their order, epochs 2, 3 and 4 are pruned
        (["prune.scoring=pruned", "monitor.reliability_every=0"], "T8 S8 T8 S8 T8 S16 T16"),
        (["prune.scoring=pruned", "monitor.reliability_every=0", "prune.scoring_size=12"],
         "T8 S12 T8 S12 T8 S12 T16"),
        (["monitor.reliability_every=1"], "T8 S8 T8 S8 T8 S8 T16"),
    ],
)  # fmt: skip
def test_a_scoring_pass_has_the_size_of_its_epoch(
    words: list[str], expected: str, tiny_config: Path, tmp_path: Path
) -> None:
    """A rescoring that of the epoch to come, a measurement of the reliability that of the epoch before."""
    job = make_job(tiny_config, GROWING, "monitor.knn_every=0", *words)
    passes = []

    def note(network: Any, arguments: Any) -> None:
        passes.append(f"{'T' if torch.is_grad_enabled() else 'S'}{arguments[0].shape[-1]}")

    job.model.register_forward_pre_hook(note)
    with Stop() as stop:
        assert pretrain.pretrain(job, pretrain.open_run(job, tmp_path, None, Report()), stop) == 0
    assert [kind for kind, _ in itertools.groupby(passes)] == expected.split()


def test_the_cost_of_a_step_by_size() -> None:
    """What is not measured yet is told too long rather than too short."""
    assert seconds_per_step({24: (10, 5.0)}, 24) == 0.5
    assert seconds_per_step({16: (10, 5.0), 24: (0, 0.0)}, 24) == 0.5 * (24 / 16) ** 2
    assert seconds_per_step({16: (10, 5.0), 24: (4, 3.0)}, 24) == 0.75
    # from the nearest
    assert seconds_per_step({12: (10, 1.0), 16: (10, 5.0), 24: (0, 0.0)}, 24) == 0.5 * (24 / 16) ** 2
    fixed, per_pixel = 0.2, 0.001  # a step costs fixed + per_pixel * size**2
    steps, sizes = [10, 8, 8, 10], [16, 16, 24, 24]
    true = [count * (fixed + per_pixel * size**2) for count, size in zip(steps, sizes, strict=True)]
    after_one = seconds_of({16: (10, true[0])}, steps[1:], sizes[1:])
    assert sum(true[1:]) < after_one < 1.5 * sum(true[1:])
    assert after_one > 26 * true[0] / 10, "the mean of the small steps would promise too little"
    after_three = seconds_of({16: (18, sum(true[:2])), 24: (8, true[2])}, steps[3:], sizes[3:])
    assert after_three == pytest.approx(true[3])
    # of one size it is the mean of all steps until now
    assert seconds_of({32: (30, 6.0)}, [7, 3], [32, 32]) == pytest.approx(2.0)
    assert seconds_of({32: (30, 6.0)}, [], []) == 0


def test_pruning_saved_what_the_steps_of_their_size_cost() -> None:
    """Half of the small epochs' steps left out saves little where the large ones cost four times as much."""
    pace = {8: (10, 1.0), 16: (10, 4.0)}
    unpruned = seconds_of(pace, [10, 10, 10], [8, 8, 16])
    assert unpruned == pytest.approx(6.0)
    seconds = {"training": 5.0, "scoring": 0.0, "monitoring": 1.0}
    fewer = "25% of the samples: 600 trained on, 800 without pruning"
    assert pretrain.saved_line(600, 800, seconds, unpruned) == f"{fewer}; about 1s of training, 17% of 6s"
    said = pretrain.saved_line(600, 800, seconds | {"scoring": 3.0}, unpruned)
    assert said == f"{fewer}; no time: scoring took 2s more than the steps it left out"


def test_a_backbone_that_takes_one_size_only_is_one_line(tiny_config: Path) -> None:
    """A ViT has a grid of patches; timm's takes another where it may."""
    vit = [
        "model.arch=timm:test_vit",
        "model.width=64",
        "model.stem=auto",
        "augment.size=[[16, 0.6], [32, 1]]",
        "monitor.knn_every=0",
    ]
    with pytest.raises(UserError, match="timm:test_vit.*16") as error:
        make_job(tiny_config, *vit, "model.args={dynamic_img_size: false, img_size: 32}")
    assert "fix: give one augment.size" in str(error.value) and "\n" not in str(error.value)
    job = make_job(tiny_config, *vit)
    assert job.view_sizes == [16, 16, 16, 32, 32] and job.encoder.image_size == 32


def test_a_schedule_does_not_go_with_padded_crops(tiny_config: Path) -> None:
    with pytest.raises(UserError, match="images of 16 and views of 8 and 16 pixels"):
        make_job(tiny_config, GROWING, "augment.crop_padding=2")
    assert (
        make_job(tiny_config, "augment.size=[[16, 0.5], [16, 1]]", "augment.crop_padding=2").recipe.size == 16
    )


def test_a_shorter_run_sees_every_size(tiny_config: Path) -> None:
    """Its epochs are fewer than those that were planned, and the stages are shares of them."""
    job = make_job(tiny_config, GROWING, "prune.policy=shorter", "prune.fraction=0.6")
    assert len(job.steps) == 4 and job.view_sizes == [8, 8, 16, 16]
