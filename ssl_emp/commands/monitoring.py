"""What is measured while a run goes on, and how often: kNN accuracy of the encoder, reliability of the score.

Both cost forward passes that train nothing. On a set of a few thousand images one measurement of each after
every epoch takes as long as half of the epoch, more than pruning saves. So they share at most `SHARE` of the
run's time.
"""

import math
from typing import Any

import torch

from linear_eval import EvalError, Features, extract_features, knn_accuracy
from ssl_emp.commands.job import Job
from ssl_emp.prune.pruner import Score
from ssl_emp.run.report import Report

SHARE = 0.05  # of the run's time, for all that is measured together
FORWARDS_TRAINED = 3.0  # a view that is trained on: a backward pass costs two forward passes
FORWARDS_MEASURED = 1.25  # a view that is measured: besides the forward pass, the search for neighbours
# as many views in bf16 take the time of one in fp32, in which the features for kNN are computed
FORWARDS_IN_FP32 = 4.0


class Monitor:
    """Measures after the epochs where a measurement is due, and says at the start how often that is.

    `knn_every`, `reliability_every`: epochs between two measurements, 0 = never; `monitor.knn_every` and
    `monitor.reliability_every` of the config, and where they are null, as often as `SHARE` of the time
    allows. Work is counted in forward passes of one view and not in seconds: a resumed run measures after the
    same epochs as the uninterrupted one.
    """

    def __init__(self, job: Job, report: Report) -> None:
        self.job, self.report, asked = job, report, job.config.monitor
        costs = self._costs()
        views = 2 if job.config.objective == "simclr" else 1
        # steps, as if all had the pixels of the last size
        steps = sum(
            count * (size / job.sizes.last) ** 2
            for count, size in zip(job.steps, job.view_sizes, strict=True)
        )
        work = steps * job.config.batch_size * views * FORWARDS_TRAINED
        each = SHARE / max(len(costs), 1) * work / FORWARDS_MEASURED
        every = {name: epochs_between(each, cost, len(job.steps)) for name, cost in costs.items()}
        if asked.knn_every is not None and "knn" in costs:
            every["knn"] = asked.knn_every
        if asked.reliability_every is not None and "reliability" in costs:
            every["reliability"] = asked.reliability_every
        self.knn_every, self.reliability_every = every.get("knn", 0), every.get("reliability", 0)
        if line := self._line():
            report.say(f"monitor   {line}")
        self.start_knn: float | None = None  # of the weights that training began from
        self.fell = False  # below it, at some epoch
        self.failed = False  # once at least; said once

    def _costs(self) -> dict[str, float]:
        """Forward passes of one view that each measurement takes, of those that are possible."""
        job, monitor, costs = self.job, self.job.config.monitor, {}
        if job.images.labels is not None and monitor.knn_every != 0:
            costs["knn"] = min(monitor.knn_images, job.num_samples) * (FORWARDS_IN_FP32 if job.bf16 else 1.0)
            costs["knn"] *= job.ranks.world_size  # the first process measures, the others wait
        if (
            job.pruner.policy.is_ranking
            and job.total_steps < job.full_steps
            and monitor.reliability_every != 0
        ):
            size, views = job.config.batch_size, 2 if job.config.objective == "simclr" else 1
            batches = min(-(-monitor.reliability_images // size), job.num_samples // size)
            costs["reliability"] = 2.0 * views * batches * size
        return costs

    def _line(self) -> str:
        """For people: what is measured and how often; empty where nothing was left to decide."""
        job, asked, parts = self.job, self.job.config.monitor, []
        is_ranking, has_labels = job.pruner.policy.is_ranking, job.images.labels is not None
        for name, key, given, every, possible in (
            ("kNN", "knn_every", asked.knn_every, self.knn_every, has_labels),
            (
                "the score's reliability",
                "reliability_every",
                asked.reliability_every,
                self.reliability_every,
                is_ranking,
            ),
        ):
            if given is None and possible:
                how = f"every {every} epochs" if every else f"never (monitor.{key}=1 asks for it)"
                parts.append(f"{name} {'every epoch' if every == 1 else how}")
        return f"{', '.join(parts)}: at most {SHARE:.0%} of the time" if parts else ""

    def columns(self) -> str:
        """What stands in the line of an epoch, for people."""
        knn = "kNN: accuracy of the encoder on train images, by their neighbours; " if self.knn_every else ""
        return f"kept: the share of the images that an epoch trains on; {knn}eta: time left"

    def start(self, step: int) -> None:
        """The kNN of a run's model.init, as epoch 0 of metrics.jsonl: measured before the first step, however
        often it is afterwards, and read again by a run that goes on.
        """
        job, report = self.job, self.report
        if job.config.model.init is None or job.config.monitor.knn_every == 0:
            return
        if step == 0:
            if found := self._knn():
                report.metrics({"epoch": 0, "step": 0, "samples_seen": 0, **found})
                self.start_knn = found["knn_train_split"]
                report.say(f"start     kNN {100 * self.start_knn:.1f}% before the first step")
            return
        rows = [row for row in report.rows() if "knn_train_split" in row]
        if rows and rows[0]["epoch"] == 0:
            self.start_knn = rows[0]["knn_train_split"]
            self.fell = any(self._is_below(row["knn_train_split"]) for row in rows)

    def knn(self, epoch: int) -> dict[str, float]:
        """Where due after this epoch, kNN accuracy in 0..1 on a fixed part of train, by the first process.

        Four fifths of that part are the bank, one fifth asks; the test split is for evaluate.py alone.
        """
        return {} if not self.knn_every or (epoch + 1) % self.knn_every else self._knn()

    def below_start(self, row: dict[str, Any]) -> str | None:
        """A warning where the kNN of an epoch's row is below the start's by more than chance, once a run."""
        found = row.get("knn_train_split")
        if self.fell or found is None or self.start_knn is None or not self._is_below(found):
            return None
        self.fell = True
        return (
            f"kNN is {100 * found:.1f}%, below the {100 * self.start_knn:.1f}% that training began from; if "
            "it stays there, try a lower optimizer.lr, a longer optimizer.warmup_epochs, or model.freeze"
        )

    def _is_below(self, found: float) -> bool:
        """By more than two standard errors of a difference of two shares of the queries."""
        assert self.start_knn is not None
        size = min(self.job.config.monitor.knn_images, self.job.num_samples)
        variances = sum(share * (1 - share) for share in (found, self.start_knn))
        return found < self.start_knn - 2 * math.sqrt(variances / (size - size * 4 // 5))

    def _knn(self) -> dict[str, float]:
        job, labels = self.job, self.job.images.labels
        if labels is None or not job.ranks.is_first:
            return {}
        everyone = torch.randperm(job.num_samples, generator=torch.Generator().manual_seed(0))
        picked = everyone[: job.config.monitor.knn_images]
        job.encoder.eval()
        try:
            features = extract_features(
                job.encoder,
                job.images.pixels[picked],
                labels[picked],
                batch_size=job.config.batch_size,
                device=job.device,
            )
            cut = len(features.y) * 4 // 5
            bank = Features(features.x[:cut], features.y[:cut])
            queries = Features(features.x[cut:], features.y[cut:])
            found = knn_accuracy(
                bank, queries, num_neighbors=min(20, cut), temperature=0.1, device=job.device
            )
            return {"knn_train_split": found}
        except EvalError as error:  # a collapsed encoder is worth a line, not the end of the run
            if not self.failed:
                self.report.say(f"warning   the kNN accuracy cannot be measured: {error}")
            self.failed = True
            return {}
        finally:
            job.encoder.train()

    def reliability(self, epoch: int, score: Score) -> dict[str, Any]:
        """After this epoch, where it is due and a pruned one follows, see `Pruner.reliability`."""
        pruner, every = self.job.pruner, self.reliability_every
        if not every or (epoch + 1) % every or not pruner.plan.is_pruned(epoch + 1):
            return {}
        return pruner.reliability(score, self.job.config.monitor.reliability_images)


def epochs_between(work: float, cost: float, epochs: int) -> int:
    """Epochs between measurements of `cost` that may take `work` in a run of `epochs`; 0: none fits."""
    times = min(int(work / cost), epochs)
    return math.ceil(epochs / times) if times else 0
