"""What is measured while a run goes on, and how often: kNN accuracy of the encoder, reliability of the score.

Both cost forward passes that train nothing. On a set of a few thousand images one measurement of each after
every epoch takes as long as half of the epoch, more than pruning saves. So they share at most `SHARE` of the
run's time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_eval import EvalError, Features, extract_features, knn_accuracy
from ssl_emp.commands.job import Job
from ssl_emp.run.report import Report

SHARE = 0.05  # of the run's time, for all that is measured together
FORWARDS_TRAINED = 3.0  # a view that is trained on: a backward pass costs two forward passes
FORWARDS_MEASURED = 1.25  # a view that is measured: besides the forward pass, the search for neighbours
# as many views in bf16 take the time of one in fp32, in which the features for kNN are computed
FORWARDS_IN_FP32 = 4.0


@dataclass(frozen=True)
class Schedule:
    """Epochs between two measurements, 0 = never."""

    knn_every: int
    reliability_every: int

    def measures_knn(self, epoch: int) -> bool:
        """After this epoch, counted from 0."""
        return self.knn_every > 0 and (epoch + 1) % self.knn_every == 0

    def measures_reliability(self, epoch: int) -> bool:
        """After this epoch, counted from 0."""
        return self.reliability_every > 0 and (epoch + 1) % self.reliability_every == 0


def schedule(job: Job) -> Schedule:
    """`monitor.knn_every` and `monitor.reliability_every`; where they are null, as often as `SHARE` of the
    time allows.

    Work is counted in forward passes of one view and not in seconds: a resumed run measures after the same
    epochs as the uninterrupted one, whatever the clock said.
    """
    monitor, views = job.config.monitor, 2 if job.config.objective == "simclr" else 1
    costs = {}
    if job.images.labels is not None and monitor.knn_every != 0:
        costs["knn"] = min(monitor.knn_images, job.num_samples) * (FORWARDS_IN_FP32 if job.bf16 else 1.0)
        costs["knn"] *= job.ranks.world_size  # the first process measures, the others wait
    if job.rule.ranks and job.total_steps < job.full_steps and monitor.reliability_every != 0:
        batches = min(
            -(-monitor.reliability_images // job.config.batch_size), job.num_samples // job.config.batch_size
        )
        costs["reliability"] = 2.0 * views * batches * job.config.batch_size
    work = job.total_steps * job.config.batch_size * views * FORWARDS_TRAINED
    each = SHARE / max(len(costs), 1) * work / FORWARDS_MEASURED
    every = {name: epochs_between(each, cost, len(job.steps)) for name, cost in costs.items()}
    knn = every.get("knn", 0) if monitor.knn_every is None else monitor.knn_every
    reliability = (
        every.get("reliability", 0) if monitor.reliability_every is None else monitor.reliability_every
    )
    return Schedule(knn if "knn" in costs else 0, reliability if "reliability" in costs else 0)


def epochs_between(work: float, cost: float, epochs: int) -> int:
    """Epochs between two measurements of `cost` that may cost `work` in a run of `epochs`; 0 where not one
    can be afforded.
    """
    times = min(int(work / cost), epochs)
    return math.ceil(epochs / times) if times else 0


def schedule_line(job: Job, found: Schedule) -> str:
    """For people: what is measured and how often; empty where nothing was left to decide."""
    asked = job.config.monitor
    parts = []
    for name, key, given, every, possible in (
        ("kNN", "knn_every", asked.knn_every, found.knn_every, job.images.labels is not None),
        (
            "the score's reliability",
            "reliability_every",
            asked.reliability_every,
            found.reliability_every,
            job.rule.ranks,
        ),
    ):
        if given is None and possible:
            how = (
                "every epoch"
                if every == 1
                else f"every {every} epochs"
                if every
                else f"never (monitor.{key}=1 asks for it)"
            )
            parts.append(f"{name} {how}")
    return f"{', '.join(parts)}: at most {SHARE:.0%} of the time together" if parts else ""


def pick_monitor_set(job: Job) -> tuple[Tensor, Tensor] | None:
    """Pixels and labels of a fixed part of the train split, for the kNN line; the test split is for
    evaluate.py alone.
    """
    labels = job.images.labels
    if labels is None:
        return None
    picked = torch.randperm(job.num_samples, generator=torch.Generator().manual_seed(0))[
        : job.config.monitor.knn_images
    ]
    return job.images.pixels[picked], labels[picked]


def monitor_knn(job: Job, monitor_set: tuple[Tensor, Tensor], report: Report) -> float | None:
    """kNN accuracy in 0..1 of the encoder as it is now: four fifths of the monitor set are the bank, one
    fifth asks.
    """
    job.encoder.eval()
    try:
        features = extract_features(
            job.encoder, *monitor_set, batch_size=job.config.batch_size, device=job.device
        )
        cut = len(features.y) * 4 // 5
        bank, queries = (
            Features(features.x[:cut], features.y[:cut]),
            Features(features.x[cut:], features.y[cut:]),
        )
        return knn_accuracy(bank, queries, num_neighbors=min(20, cut), temperature=0.1, device=job.device)
    except EvalError as error:  # a collapsed encoder is worth a line, not the end of the run
        report.say(f"kNN       not taken: {error}")
        return None
    finally:
        job.encoder.train()
