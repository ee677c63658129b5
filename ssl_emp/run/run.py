"""A run under way: where it stands, how long its parts took, saving, and going on from a checkpoint."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ssl_emp.prune import Pruner
from ssl_emp.run.checkpoint import save_checkpoint
from ssl_emp.run.guard import Guard
from ssl_emp.run.lock import Held
from ssl_emp.run.metrics import scalars
from ssl_emp.run.pace import pace_of, seconds_of
from ssl_emp.run.ranks import Ranks
from ssl_emp.run.report import INDENT, Report, duration
from ssl_emp.run.state_check import check_state
from ssl_emp.run.stop import Stop
from ssl_emp.run.threads import Threads

IF_MORE_FOLLOW = (
    "such a step changes nothing; where many follow, start again with a lower optimizer.lr or a longer "
    "optimizer.warmup_epochs"
)


class Run:
    """Position, clock, save and resume of one run; the position is the pruner's step.

    Args:
        folder: run directory.
        held: the directory as it was locked, of the process that writes.
        source: what a checkpoint says of where it comes from: config, fingerprint of the images, precision.
        state: a loaded checkpoint to go on from, or None.
        every_minutes, every_steps: how often a checkpoint is due; None: by the clock alone.
        view_sizes: side of the views of every epoch, pixels: a step costs as much as they have pixels.
        all_sizes: every size of the schedule, also those that no epoch has; of several, each is timed apart.
        again: how to go on with it once it was stopped, such as a command.
        threads: of torch; None: it does not compute on the CPU.
        verbose: print all figures of an epoch, not a few.
        in_python: it was started by a call, and is told the next one.
    """

    def __init__(
        self,
        folder: Path,
        held: Held | None,
        report: Report,
        ranks: Ranks,
        model: nn.Module,
        optimizer: Optimizer,
        pruner: Pruner,
        *,
        max_bad_steps: int,
        every_minutes: float,
        every_steps: int | None,
        source: dict[str, Any],
        state: dict[str, Any] | None,
        view_sizes: Sequence[int],
        all_sizes: Sequence[int],
        again: str,
        threads: Threads | None = None,
        verbose: bool = False,
        in_python: bool = False,
    ) -> None:
        self.again, self.verbose, self.in_python = again, verbose, in_python
        self.folder, self.held, self.report, self.ranks = folder, held, report, ranks
        self.model, self.optimizer, self.pruner, self.source = model, optimizer, pruner, source
        self.threads = threads
        self.device = pruner.record.terms.device
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self.epoch = 0  # the one under way, until its row is in metrics.jsonl
        self.seconds = {"training": 0.0, "scoring": 0.0, "monitoring": 0.0}
        self.view_sizes = list(view_sizes)
        if len(all_sizes) > 1:
            self.seconds |= {f"training_{size}px": 0.0 for size in all_sizes}
        in_a_row, norms = torch.zeros((), dtype=torch.int64, device=self.device), None
        self.guard = Guard(model, optimizer, max_bad_steps, in_a_row, None)
        if state is not None:
            self._restore(state)
            in_a_row = state["bad_in_a_row"].to(self.device)
            norms = state["norms"].to(self.device) if state["norms"] is not None else None
            self.guard = Guard(model, optimizer, max_bad_steps, in_a_row, norms)
        self.was_finished = False  # the state is that of a finished run, which need not be saved again
        self._saved_at, self._saved_step = time.monotonic(), self.step
        self._began = (self.step, self.seconds["training"])  # the epoch, or what is left of it

    # ---- where it stands -----------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps that were trained."""
        return self.pruner.step

    @property
    def step_in_epoch(self) -> int:
        return self.step - self.pruner.first_step(self.epoch)

    def stream(self, store: Any, batches: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(index (b,), images (b, 3, H, W)) of an epoch's batches still to train, with a progress line."""
        first = self.step_in_epoch
        part = self.ranks.part(batches[first:])
        with self.report.progress(store.stream(part), len(batches), self.label(epoch), first) as stream:
            for batch in stream:
                if self.threads is not None and (line := self.threads.look(self.step)):
                    self.report.say(f"threads   {line}")
                yield batch

    def label(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{len(self.pruner.steps)}"

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the seconds in here as those of training, scoring or monitoring."""
        began = self._now()
        self._running = (part, began)
        try:
            yield
        finally:
            self._spend(part, self._now() - self._running[1])

    def _spend(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        if part == "training" and (apart := f"training_{self.view_sizes[self.epoch]}px") in self.seconds:
            self.seconds[apart] += seconds

    def pace(self) -> dict[int, tuple[int, float]]:
        """Side of the views -> steps that were made with it, and the seconds that these took together."""
        return pace_of(self.seconds, self.pruner.steps, self.view_sizes, self.step)

    def _now(self) -> float:
        if self.device.type == "cuda":
            # without it we time kernel launches only; a few times an epoch
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def figures(self, batches: Tensor) -> dict[str, Any]:
        """Of the epoch that was trained: position, throughput, seconds since the run's start."""
        size, (step, seconds) = self.pruner.batch_size, self._began
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "samples_seen": self.step * size,
            "images_per_second": (self.step - step) * size / (self.seconds["training"] - seconds),
            **{f"{name}_seconds": value for name, value in self.seconds.items()},
        }
        if self.epoch + 1 == len(self.pruner.steps):
            full = self.pruner.epochs * (self.pruner.num_samples // size)
            row |= {"asked_share": self.pruner.plan.asked_share(), "real_share": self.step / full}
        return row

    def end_epoch(self, row: dict[str, Any], skipped: str, *warnings: str | None) -> None:
        """Write the row of the epoch, tell it and its warnings, and go on to the next.

        Args:
            skipped: `Guard.skipped_line`, said after the first epoch of the run that has any; afterwards the
                epoch's line counts them.
        """
        is_first = skipped and not any("skipped_steps" in before for before in self.report.rows())
        self.report.metrics(row)
        epochs, seconds = len(self.pruner.steps), self.seconds
        beside = (seconds["scoring"] + seconds["monitoring"]) / (self.epoch + 1)
        coming = slice(self.epoch + 1, None)
        left = seconds_of(self.pace(), self.pruner.steps[coming], self.view_sizes[coming])
        left += (epochs - self.epoch - 1) * beside
        self.report.say(epoch_line(row, epochs, left))
        if self.verbose:
            self.report.say(f"{INDENT}{figures_line(row)}")
        for line in filter(None, (f"{skipped}; {IF_MORE_FOLLOW}" if is_first else None, *warnings)):
            self.report.say(f"warning   {line}")
        self.guard.norms = None
        self.epoch += 1
        self._began = (self.step, seconds["training"])

    # ---- save and resume -----------------------------------------------------------------------------------

    def save_if_due(self, stop: Stop, batches: Tensor, epoch: int) -> int:
        """After a step: save if clock, step count or any process's signal asks for it. That signal, or 0."""
        minutes, steps = (time.monotonic() - self._saved_at) / 60, self.step - self._saved_step
        is_due = minutes > self.every_minutes or steps == self.every_steps
        stopping, due = self.ranks.highest(stop.signal, is_due)  # read once: a signal may come at any moment
        if self.device.type == "cpu" or due or stopping:
            self.guard.check(batches, epoch)  # .item() waits for a GPU, so there only when saving
        if due or stopping:
            part, began = self._running
            now = self._now()
            self._spend(part, now - began)
            self.save()
            self._running = (part, self._now())
            self._saved_at, self._saved_step = time.monotonic(), self.step
        if stopping:
            name = signal.Signals(stopping).name
            line = f"stopped by {name} after step {self.step}, saved. go on: {self.again}"
            self.report.say(line, folds=False)
        return stopping

    def save(self) -> None:
        """Write a checkpoint. Raises RunFailed where weights are not finite or the disk refuses."""
        self.guard.check_weights(self.step)
        if self.ranks.is_first:
            if self.held is not None:
                self.held.check()
            save_checkpoint(self.folder / "checkpoints", self.state(), self.step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
            "norms": self.guard.norms if self.step_in_epoch else None,
            "bad_in_a_row": self.guard.in_a_row,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "finished": self.step == sum(self.pruner.steps),
            "threads": torch.get_num_threads(),
            "seconds": dict(self.seconds),
            **self.source,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        folder = self.folder / "checkpoints"
        check_state(state, self.state(), self.optimizer, self.pruner, folder)
        self.model.load_state_dict(state["model"])
        # the groups as the config makes them, since another torch has other keys there; what moves is that of
        # the last step
        own_groups = self.optimizer.state_dict()["param_groups"]
        groups = [
            own | {name: group[name] for name in ("lr", "momentum") if name in own and name in group}
            for own, group in zip(own_groups, state["optimizer"]["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.pruner.load_state_dict(state["pruner"])
        self.epoch, self.seconds = state["epoch"], dict(state["seconds"])
        before, now = state["threads"], torch.get_num_threads()
        if self.threads is not None and before not in (0, now) and not state["finished"]:
            what = f"{now}, and {before} when it was saved: the run goes on with another rounding than it"
            self.report.say(f"threads   {what} would have had without the stop; threads={before} keeps it")


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """An epoch for a person, in 80 columns: how far, how well, on what share, how fast, how long yet.

    Args:
        row: of metrics.jsonl; `kept_share` and the kNN accuracy are of 1.
    """
    number, last = f"epoch {row['epoch']}/{epochs}", f"epoch {epochs}/{epochs}"
    parts = [number.ljust(len(last)), f"loss {row['loss']:.3f}", f"kept {row['kept_share']:4.0%}"]
    parts += [f"{row['images_per_second']:6,.0f} images/s"]
    parts += [f"eta {duration(seconds_left)}"] if row["epoch"] < epochs else []
    parts += [f"kNN {100 * row['knn_train_split']:.1f}%"] if "knn_train_split" in row else []
    parts += [f"{row['skipped_steps']} steps skipped"] if "skipped_steps" in row else []
    return "  ".join(parts)


def figures_line(row: dict[str, Any]) -> str:
    """Every number of a row of metrics.jsonl, by the names it has there."""
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars(row))
