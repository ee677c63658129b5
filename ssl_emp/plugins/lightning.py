"""Pruning in Lightning's Trainer: `Trainer(max_epochs=E, callbacks=[PruningCallback(pruner)])`.

The pruner chooses through the loader's sampler and hears the losses in `training_step`; this callback carries
its state through checkpoints, refuses what would prune wrongly in silence, and logs what was kept.
"""

import warnings
from typing import Any

from torch.utils.data import DataLoader

from ssl_emp.prune import Pruner

try:  # what lightly installs
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_warn
except ImportError:
    import lightning.pytorch as pl  # type: ignore[import-not-found, no-redef]
    from lightning.pytorch.utilities import rank_zero_warn  # type: ignore[import-not-found, no-redef]


class PruningCallback(pl.Callback):
    """Everything that a Lightning run needs besides the three lines of `Pruner`.

    A run that is resumed (`trainer.fit(..., ckpt_path=...)`), at the end of an epoch or within one, trains on
    the samples of the uninterrupted run. `trainer.estimated_stepping_batches` is the planned number of steps
    as it stands, because the pruner's loader has the same length in every epoch.

    Logged at the end of an epoch: `prune/kept_share` and the other figures of `pruner.figures()`.

    Raises (from `trainer.fit`, ValueError in one line): another `max_epochs` than the pruner's; a part of an
    epoch (`limit_train_batches`, `overfit_batches`) or `max_steps`; a train loader whose sampler is not
    `pruner.sampler()`, or whose batches have another size; a `training_step` that does not call
    `pruner.update` once a batch; a checkpoint without the pruner's state. `fast_dev_run` checks nothing.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self._advised = False

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or _is_dry_run(trainer):
            return
        planned, limit = self.pruner.epochs, trainer.limit_train_batches
        if trainer.max_epochs != planned or trainer.max_steps != -1:
            raise ValueError(
                f"the pruner plans {planned} epochs, the Trainer max_epochs={trainer.max_epochs}, "
                f"max_steps={trainer.max_steps}: give max_epochs={planned} alone, or a Pruner for as many"
            )
        if isinstance(limit, int) or limit != 1.0:  # the whole number 1 is one batch, 1.0 all of them
            raise ValueError(
                f"limit_train_batches or overfit_batches is {limit}: leave it out, whole epochs are planned"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_dry_run(trainer):
            return
        loader, pruner, parts = trainer.train_dataloader, self.pruner, trainer.world_size
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        if not isinstance(loader, DataLoader) or getattr(sampler, "pruner", None) is not pruner:
            found = type(loader if sampler is None else sampler).__name__
            raise ValueError(
                f"the train loader takes its samples from {found}, not from the pruner: give "
                "DataLoader(pruner.indexed(dataset), batch_size=..., sampler=pruner.sampler())"
            )
        size = getattr(loader.batch_sampler, "batch_size", None)
        if size != pruner.batch_size / parts or len(loader) != pruner.steps_per_epoch:
            raise ValueError(
                f"the loader has {len(loader)} batches of {size} on each of {parts} processes, the pruner "
                f"{pruner.steps_per_epoch} of {pruner.batch_size} over all: give "
                f"batch_size={pruner.batch_size // parts} and sampler=pruner.sampler()"
            )
        # told of every loader without a state; the pruner knows where this one stands
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch, heard = trainer.current_epoch, self.pruner.step
        if heard != epoch * self.pruner.steps_per_epoch + batch_idx and not _is_dry_run(trainer):
            raise ValueError(
                f"batch {batch_idx} of epoch {epoch} begins and the pruner has heard of {heard} batches: "
                "training_step must call pruner.update once a batch, a new run needs a new Pruner, "
                "a resumed one a checkpoint written with PruningCallback"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = self.pruner.figures()
        named = {f"prune/{name}": value for name, value in figures.items()}
        pl_module.log_dict(named, sync_dist=trainer.world_size > 1)  # the same everywhere; else it warns
        advice = self.pruner.advice(figures)
        if advice is not None and not self._advised:
            self._advised = True
            rank_zero_warn(advice)


def _is_dry_run(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run"))  # noqa: B009 - Lightning sets it without declaring it
