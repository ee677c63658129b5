"""What is measured during a run stays a small part of it, after the same epochs in every attempt, and is
said.
"""

import json
from pathlib import Path

import pytest
from conftest import Pretrain

from ssl_emp.commands.job import Job, prepare
from ssl_emp.commands.monitoring import FORWARDS_MEASURED, SHARE, Monitor, epochs_between
from ssl_emp.config import load_config
from ssl_emp.run.report import Report, duration

AUTO = ("monitor.knn_every=null", "monitor.reliability_every=null", "monitor.knn_images=100")


def job_of(config: Path, *overrides: str) -> Job:
    return prepare(load_config(config, list(overrides)), Report(silent=True))


def monitor_of(job: Job) -> Monitor:
    return Monitor(job, Report(silent=True))


def measured_views(job: Job) -> tuple[float, float]:
    """(views that the run measures, by walking through its epochs; views trained on, times 3)."""
    found, views = monitor_of(job), 2 if job.config.objective == "simclr" else 1
    batches = min(
        -(-job.config.monitor.reliability_images // job.config.batch_size),
        job.num_samples // job.config.batch_size,
    )
    total = 0.0
    for epoch in range(1, len(job.steps) + 1):
        measures_knn = bool(found.knn_every) and epoch % found.knn_every == 0
        measures_reliability = bool(found.reliability_every) and epoch % found.reliability_every == 0
        total += measures_knn * min(job.config.monitor.knn_images, job.num_samples)
        total += measures_reliability * 2 * views * batches * job.config.batch_size
    return total, 3.0 * views * sum(job.steps) * job.config.batch_size


@pytest.mark.parametrize(
    "overrides",
    [
        ("epochs=4",),
        ("epochs=57",),
        ("epochs=300", "prune.fraction=0.8"),
        ("epochs=300", "prune.policy=none"),
        ("epochs=200", "prune.policy=random"),
        ("epochs=200", "prune.policy=shorter"),
        ("epochs=200", "objective=supervised"),
        ("epochs=200", "data.labels=none"),
        ("epochs=200", "batch_size=34", "monitor.reliability_images=16"),
        ("epochs=1000", "data.max_images=20", "monitor.reliability_images=1000"),
    ],
)
def test_measuring_takes_its_share_and_no_more(tiny_config: Path, overrides: tuple[str, ...]) -> None:
    job = job_of(tiny_config, *AUTO, *overrides)
    measured, trained = measured_views(job)
    assert FORWARDS_MEASURED * measured <= SHARE * trained
    if job.config.epochs >= 57 and job.images.labels is not None:
        assert measured > 0  # a long run affords some


def test_as_often_as_can_be_afforded() -> None:
    """Against counting: the smallest distance at which the measurements of the run fit."""
    for epochs in (1, 2, 7, 30, 100):
        for work in (0.5, 1.0, 3.0, 10.5, 29.9, 1000.0):
            fitting = [every for every in range(1, epochs + 1) if epochs // every <= work]
            expected = fitting[0] if fitting and work >= 1 else 0
            found = epochs_between(work, 1.0, epochs)
            assert (found == 0) == (expected == 0)
            assert found == 0 or (
                epochs // found <= work and found - expected <= epochs / int(min(work, epochs)) / 2
            )


def test_a_number_is_kept_to(pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain_run("run", "monitor.knn_every=3", "monitor.reliability_every=0", "epochs=10")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "knn_train_split" in row] == [3, 6, 9]
    assert not any("draw_reliability" in row for row in rows)
    assert "monitor   " not in capsys.readouterr().out, "nothing was left to decide"


def test_reliability_is_measured_where_a_pruned_epoch_follows(pretrain_run: Pretrain) -> None:
    run = pretrain_run("run", "monitor.knn_every=0", "monitor.reliability_every=2", "epochs=10")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "draw_reliability" in row] == [2, 4, 6]  # 9 and 10 are annealing


def test_what_cannot_be_measured_takes_nothing_from_the_rest(tiny_config: Path) -> None:
    both, without_labels, without_ranking = (
        monitor_of(job_of(tiny_config, *AUTO, "epochs=300", *more))
        for more in ((), ("data.labels=none",), ("prune.policy=random",))
    )
    assert without_labels.knn_every == without_ranking.reliability_every == 0
    assert 0 < without_labels.reliability_every < both.reliability_every
    assert 0 < without_ranking.knn_every < both.knn_every


def test_the_end_of_a_run_says_what_measuring_cost_and_pruning_saved(
    pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain_run("run", "monitor.knn_every=null")
    said = capsys.readouterr().out
    assert "kNN never (monitor.knn_every=1 asks for it): at most 5% of the time" in said
    assert not any(
        "knn_train_split" in json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    share = row["monitoring_seconds"] / sum(
        row[f"{part}_seconds"] for part in ("training", "scoring", "monitoring")
    )
    assert f", {share:.1%} of it\n" in said
    left_out = 1 - row["real_share"]
    assert f"saved     {left_out:.0%} of the samples: " in said
    unpruned = duration(row["training_seconds"] / row["real_share"])
    assert f" of training, {left_out:.0%} of {unpruned}\n" in said
    pretrain_run("full", "prune.policy=none")
    assert "saved     nothing: 320 samples, which are all of them in every epoch\n" in capsys.readouterr().out
