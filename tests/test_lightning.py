"""`PruningCallback` in Lightning's Trainer: whole epochs, exact resume wherever it was killed, refusals."""

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from ssl_emp.plugins.lightning import PruningCallback
from ssl_emp.prune import Pruner, entropy

pytestmark = pytest.mark.filterwarnings(  # Lightning's advice on workers, logging intervals and devices
    "ignore:.*does not have many workers.*", "ignore:.*smaller than the logging interval.*",
    "ignore:GPU available but not used", "ignore:.*exists and is not empty.*",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)  # fmt: skip

SAMPLES, BATCH, EPOCHS = 70, 8, 8  # 8 full batches and a remainder


def make_pruner(**options: Any) -> Pruner:
    chosen: dict[str, Any] = {
        "policy": "emp",
        "fraction": 0.5,
        "anneal_fraction": 0.25,
        "seed": 3,
        "batch_size": BATCH,
    }
    return Pruner(SAMPLES, **(chosen | {"epochs": EPOCHS} | options))


def make_data() -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(SAMPLES, 5, generator=made), torch.randint(3, (SAMPLES,), generator=made)
    )


def make_loader(pruner: Pruner, **options: Any) -> DataLoader[Any]:
    chosen: dict[str, Any] = {"batch_size": BATCH, "sampler": pruner.sampler()} | options
    return DataLoader(pruner.indexed(make_data()), **chosen)


class Module(pl.LightningModule):
    """A linear classifier that notes what it is trained on."""

    def __init__(self, pruner: Pruner) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Linear(5, 3)
        self.pruner = pruner
        self.trained: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        self.trained.append(index.tolist())
        logits = self.network(x)
        return self.pruner.update(index, F.cross_entropy(logits, y, reduction="none"), entropy(logits))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        # ends in an error where a step more than planned is taken
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Killed(Exception):
    """As if the process had been killed: nothing is saved after it."""


class KillBefore(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.step:
            raise Killed


def make_trainer(folder: Path, pruner: Pruner, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    chosen: dict[str, Any] = {
        "max_epochs": EPOCHS, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": saves,
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(callbacks=[PruningCallback(pruner), *callbacks], **(chosen | options))


def train(folder: Path, validate_every: int = 0, workers: int = 0) -> tuple[Module, Pruner]:
    """A whole run, with validation every so many steps."""
    pruner = make_pruner()
    module = Module(pruner)
    trainer = make_trainer(folder, pruner, val_check_interval=validate_every or 1.0)
    loaders = (
        make_loader(pruner, num_workers=workers),
        DataLoader(make_data(), 35) if validate_every else None,
    )
    trainer.fit(module, *loaders)
    return module, pruner


def train_in_two_parts(
    folder: Path, saves: ModelCheckpoint, step: int, validate_every: int = 0, **loading: Any
) -> tuple[Module, Pruner]:
    """A run that is killed before this step, and another one from its last checkpoint."""
    trained: list[list[int]] = []
    for part, callbacks in enumerate(([saves, KillBefore(step)], [])):
        pruner = make_pruner()
        module = Module(pruner)
        trainer = make_trainer(folder, pruner, *callbacks, val_check_interval=validate_every or 1.0)
        loaders = make_loader(pruner, **loading), DataLoader(make_data(), 35) if validate_every else None
        if part == 0:
            with pytest.raises(Killed):
                trainer.fit(module, *loaders)
            trained = module.trained[: torch.load(saves.last_model_path)["global_step"]]
        else:
            trainer.fit(module, *loaders, ckpt_path=saves.last_model_path)
    module.trained = trained + module.trained
    return module, pruner


def assert_same(one: tuple[Module, Pruner], other: tuple[Module, Pruner]) -> None:
    assert one[0].trained == other[0].trained
    assert torch.equal(one[0].network.weight, other[0].network.weight)
    assert torch.equal(one[1].table()["score"], other[1].table()["score"])


# --- whole epochs


def test_full_epochs_are_whole_and_pruned_ones_short(tmp_path: Path) -> None:
    module, pruner = train(tmp_path)
    assert len(module.trained) == pruner.total_steps < EPOCHS * (SAMPLES // BATCH)
    begin = 0
    for epoch, steps in enumerate(pruner.steps):
        trained = sum(module.trained[begin : begin + steps], [])
        assert len(trained) == len(set(trained)) == steps * BATCH
        assert (steps == SAMPLES // BATCH) == (epoch in (0, 6, 7)), (
            "the first and the annealing epochs are full"
        )
        begin += steps


def test_steps_planned_are_steps_taken(tmp_path: Path) -> None:
    pruner = make_pruner(epochs=10, fraction=0.4, anneal_fraction=0.1)
    while pruner.steps_per_epoch % 2:  # Lightning takes a step more in an epoch that 2 does not divide
        pruner = make_pruner(epochs=pruner.epochs + 1, fraction=0.4, anneal_fraction=0.1)
    taken: list[int] = []

    class Counted(Module):
        def on_train_start(self) -> None:
            taken.append(int(self.trainer.estimated_stepping_batches))

    trainer = make_trainer(tmp_path, pruner, max_epochs=pruner.epochs, accumulate_grad_batches=2)
    module = Counted(pruner)
    trainer.fit(module, make_loader(pruner))
    assert taken == [pruner.total_steps // 2] == [trainer.global_step]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step, (
        "it has come to its end"
    )


# --- resume


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, Pruner]:
    return train(tmp_path_factory.mktemp("whole"))


# before, at and after borders of Lightning's epochs and of the pruner's, in full, pruned and annealing epochs
@pytest.mark.parametrize("step", range(1, 44, 3))
def test_resume_within_an_epoch(tmp_path: Path, uninterrupted: tuple[Module, Pruner], step: int) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    assert_same(train_in_two_parts(tmp_path, saves, step), uninterrupted)


@pytest.mark.parametrize(("step", "persistent"), [(3, True), (12, False), (20, True)])
def test_resume_with_workers_that_read_ahead(tmp_path: Path, step: int, persistent: bool) -> None:
    """What they had read ahead is read again, also over an epoch's border that they had passed already."""
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    parts = train_in_two_parts(tmp_path, saves, step, num_workers=2, persistent_workers=persistent)
    assert_same(parts, train(tmp_path, workers=2))


@pytest.mark.parametrize("validate_every", [0, 6, 3])
@pytest.mark.parametrize("epoch", [1, 4])
def test_resume_from_lightnings_own_checkpoints(tmp_path: Path, epoch: int, validate_every: int) -> None:
    """After an epoch; or with its validation, before the epoch is counted; or with one in its middle."""
    whole = train(tmp_path, validate_every)
    saves = ModelCheckpoint(tmp_path, save_last=True)
    step = epoch * whole[1].steps_per_epoch + 5
    assert_same(train_in_two_parts(tmp_path, saves, step, validate_every), whole)


def test_a_resumed_run_says_nothing_of_loaders_that_cannot_resume(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train_in_two_parts(tmp_path, saves, 11)
    assert not [one for one in said if "resum" in str(one.message)]


def test_the_state_is_plain(tmp_path: Path) -> None:
    pruner = make_pruner()
    saves = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, pruner, saves).fit(Module(pruner), make_loader(pruner))
    saved = torch.load(saves.last_model_path, weights_only=True)["callbacks"]["PruningCallback"]
    other = make_pruner()
    other.load_state_dict(saved)
    assert other.step == pruner.step == pruner.total_steps


# --- refusals


def refused(folder: Path, loader: Any = None, module: Any = None, **options: Any) -> str:
    pruner = make_pruner()
    module = (module or Module)(pruner)
    trainer = make_trainer(folder, pruner, **options)
    with pytest.raises(ValueError) as caught:
        trainer.fit(module, loader(pruner) if loader else make_loader(pruner))
    assert "\n" not in str(caught.value)
    assert len(module.trained) <= 1, "before anything was trained, or at the second batch"
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_epochs": 5}, "plans 8 epochs, the Trainer max_epochs=5"),
        ({"max_steps": 20}, "max_steps=20"),
        ({"limit_train_batches": 0.5}, "is 0.5"),
        ({"limit_train_batches": 1}, "is 1:"),
        ({"overfit_batches": 2}, "overfit_batches is 2"),
    ],
)
def test_trainers_that_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, **options)


LOADERS: dict[str, tuple[Callable[[Pruner], Any], str]] = {
    "shuffled": (lambda pruner: make_loader(pruner, sampler=None, shuffle=True), "from RandomSampler, not"),
    "another pruner's": (lambda pruner: make_loader(make_pruner()), "not from the pruner"),
    "another batch size": (lambda pruner: make_loader(pruner, batch_size=4), "batches of 4 on each of 1"),
    "two loaders": (lambda pruner: [make_loader(pruner), make_loader(pruner)], "from list, not"),
    "no loader": (lambda pruner: [1, 2, 3], "from list, not"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_are_refused(tmp_path: Path, name: str) -> None:
    loader, words = LOADERS[name]
    assert words in refused(tmp_path, loader)


def test_a_step_that_tells_the_pruner_nothing_is_refused(tmp_path: Path) -> None:
    class Silent(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trained.append(batch[2].tolist())
            return F.cross_entropy(self.network(batch[0]), batch[1])

    assert "batch 1 of epoch 0 begins and the pruner has heard of 0 batches" in refused(
        tmp_path, module=Silent
    )


def test_a_checkpoint_without_the_pruner_is_refused(tmp_path: Path) -> None:
    pruner = make_pruner()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_last=True)
    trainer = make_trainer(tmp_path, pruner, saves, KillBefore(7))
    trainer.callbacks.pop(0)  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        trainer.fit(Module(pruner), make_loader(pruner))
    pruner = make_pruner()
    with pytest.raises(ValueError, match="batch 5 of epoch 0 begins and the pruner has heard of 0 batches"):
        make_trainer(tmp_path, pruner).fit(
            Module(pruner), make_loader(pruner), ckpt_path=saves.last_model_path
        )


@pytest.mark.parametrize(
    ("step", "words"), [(7, "a new run needs a new Pruner"), (-1, "all 8 planned epochs")]
)
def test_a_used_pruner_is_refused(tmp_path: Path, step: int, words: str) -> None:
    pruner = make_pruner()
    with contextlib.suppress(Killed):
        make_trainer(tmp_path, pruner, KillBefore(step)).fit(Module(pruner), make_loader(pruner))
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, pruner).fit(Module(pruner), make_loader(pruner))


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    pruner = make_pruner()
    saves = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, pruner, saves).fit(Module(pruner), make_loader(pruner))
    other = make_pruner(policy="loss")
    with pytest.raises(ValueError, match="policy"):
        make_trainer(tmp_path, other).fit(Module(other), make_loader(other), ckpt_path=saves.last_model_path)


def test_a_batch_sampler_and_a_dry_run_are_fine(tmp_path: Path, uninterrupted: tuple[Module, Pruner]) -> None:
    pruner = make_pruner()
    module = Module(pruner)
    batches = BatchSampler(pruner.sampler(), BATCH, drop_last=True)
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), batch_sampler=batches)
    make_trainer(tmp_path, pruner).fit(module, loader)
    assert_same((module, pruner), uninterrupted)

    pruner = make_pruner()
    trainer = make_trainer(tmp_path, pruner, fast_dev_run=True)
    trainer.fit(Module(pruner), make_loader(pruner))
    assert trainer.global_step == 1


# --- what it says


def test_figures_are_logged_once_an_epoch_and_advice_once(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Told(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            told.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    class Talkative(Pruner):
        def advice(self, *_: Any, **__: Any) -> str:
            return "advice in one line"

    pruner = Talkative(SAMPLES, batch_size=BATCH, epochs=EPOCHS, fraction=0.5)
    with pytest.warns(UserWarning, match="^advice in one line$") as said:
        make_trainer(tmp_path, pruner, Told()).fit(Module(pruner), make_loader(pruner))
    assert len([one for one in said if "advice" in str(one.message)]) == 1
    assert len(told) == EPOCHS
    shares = [
        figures["prune/kept_share"] for figures in told[1:]
    ]  # the plan's first epoch ends in the second
    assert max(shares) > 0.9 and min(shares) < 0.6
    assert {f"prune/{name}" for name in pruner.figures()} <= told[-1].keys()


# --- several processes


class Sliced(Module):
    """Its loader is made in each process, as lightly's examples do, and each writes what it trained on."""

    def __init__(self, pruner: Pruner, folder: Path) -> None:
        super().__init__(pruner)
        self.folder = folder

    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader(self.pruner, batch_size=BATCH // 2)

    def on_train_end(self) -> None:
        assert isinstance(self.trainer.train_dataloader, DataLoader)
        torch.save(
            {
                "trained": torch.tensor(self.trained),
                "score": self.pruner.table()["score"],
                "sampler": type(self.trainer.train_dataloader.sampler).__name__,
                "steps": int(self.trainer.estimated_stepping_batches),
            },
            self.folder / f"{self.global_rank}.pt",
        )


@pytest.mark.whole
@pytest.mark.parametrize("made_before", [False, True])
def test_two_processes_share_every_batch(tmp_path: Path, made_before: bool) -> None:
    """The pruner, and the loader where it is made before `fit`, do not know yet that there will be two."""
    pruner = make_pruner()
    loader = make_loader(pruner, batch_size=BATCH // 2) if made_before else None
    trainer = make_trainer(tmp_path, pruner, strategy="ddp_spawn", devices=2)
    with mock.patch.dict(os.environ):  # Lightning leaves the address of the processes there
        trainer.fit(Sliced(pruner, tmp_path), loader)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["sampler"] == other["sampler"] == "PrunedSampler"
    assert one["steps"] == len(one["trained"]) == pruner.total_steps
    assert torch.equal(one["score"], other["score"])
    batches = torch.cat([one["trained"], other["trained"]], 1)  # (steps, B): the parts of a batch
    begin = 0
    for steps in pruner.steps:
        trained = batches[begin : begin + steps].flatten()
        assert len(trained.unique()) == steps * BATCH, "nothing twice in an epoch"
        begin += steps


@pytest.mark.whole
def test_two_processes_with_another_sampler_are_refused(tmp_path: Path) -> None:
    pruner = make_pruner()
    trainer = make_trainer(tmp_path, pruner, strategy="ddp_spawn", devices=2)
    with (
        mock.patch.dict(os.environ),
        pytest.raises(Exception, match="from DistributedSampler, not from the pru"),
    ):
        trainer.fit(Module(pruner), make_loader(pruner, sampler=None, shuffle=True))
