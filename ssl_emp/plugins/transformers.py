"""Pruning in the Trainer of Hugging Face transformers: `PrunedTrainer(..., pruner=Pruner(len(train), ...))`.

The sampler has the same length in every epoch, so steps, learning rate and resume are computed by the Trainer
as ever. Everything here goes through its public methods: `get_train_dataloader`, `compute_loss`, `train` and
a callback.
"""

import inspect
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import get_last_checkpoint, seed_worker

from ssl_emp.prune import Pruner, entropy
from ssl_emp.prune.sampler import INDEX_KEY, Indexed
from ssl_emp.safe_files import write_atomically

STATE_NAME = "pruner.pt"  # beside the Trainer's own files in each checkpoint
IGNORED = -100  # label of tokens without a target
# classes whose loss is of the next token
NEXT_TOKEN_MODELS = {
    kind
    for kinds in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")  # the second is not in every version
    for kind in getattr(modeling_auto, f"MODEL_FOR_{kinds}_MAPPING_NAMES", {}).values()
    if isinstance(kind, str)
}


class PrunedTrainerMixin(Trainer):
    """Pruning for any Trainer: `class Mine(PrunedTrainerMixin, Seq2SeqTrainer)`, given `pruner=`.

    Give `Pruner` the batch of one micro-step over all processes (per_device_train_batch_size * processes; the
    steps of `gradient_accumulation_steps` are batches of their own) and `epochs` as many as
    `num_train_epochs`. `pruner.pt` lies in each checkpoint, and a run that is resumed, within an epoch too,
    trains on the samples of the uninterrupted one.

    The loss of a sample is cross-entropy (of classes, or the mean over its tokens that have a label, with the
    label smoothing of the arguments), squared error or binary cross-entropy, as the model's `problem_type`
    says; `sample_losses` may be overridden. Evaluation is the Trainer's own.

    Raises (from `train`, ValueError in one line): a plan of other epochs or batches, a new run with a used
    Pruner, a checkpoint without the pruner's state or with one of another run, arguments that would change
    which samples are trained on (`auto_find_batch_size`, `ignore_data_skip`, length grouping), and
    `compute_loss_func`, which is not told which samples it sees.
    """

    def __init__(self, *args: Any, pruner: Pruner, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruner = pruner
        self._shifts: bool | None = None  # whether the model predicts the next token; None: not known yet
        # the loss below is the mean of a micro-batch, which the Trainer then divides by their number
        self.model_accepts_loss_kwargs = False
        self.add_callback(_PrunerCallback(pruner, self.log))

    # ---- choose

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The pruner's samples in batches that carry their index; accelerate deals them out to processes."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        arguments, workers = self.args, self.args.dataloader_num_workers
        loader = self.accelerator.prepare(
            DataLoader(
                _Numbered(self.train_dataset, self.pruner.num_samples),
                batch_size=arguments.train_batch_size,
                sampler=self.pruner.sampler(1, 0, resumes=False),  # the Trainer skips what was trained itself
                collate_fn=_Collate(self.data_collator, self._columns()),
                num_workers=workers,
                pin_memory=arguments.dataloader_pin_memory,
                persistent_workers=arguments.dataloader_persistent_workers,
                prefetch_factor=arguments.dataloader_prefetch_factor,
                worker_init_fn=partial(seed_worker, num_workers=workers, rank=arguments.process_index),
            )
        )
        if len(loader) != self.pruner.steps_per_epoch:
            raise ValueError(
                f"an epoch has {len(loader)} batches of {arguments.train_batch_size} on each of "
                f"{arguments.world_size} processes, the pruner plans {self.pruner.steps_per_epoch} of "
                f"{self.pruner.batch_size} over all: give Pruner(batch_size="
                f"{arguments.train_batch_size * arguments.world_size})"
            )
        return loader

    def _inner_model(self) -> Any:
        """The model, under an adapter of peft if there is one."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    def _columns(self) -> set[str] | None:
        """Keys of an example that the model takes; None: all of them stay."""
        if not self.args.remove_unused_columns:
            return None
        taken = inspect.signature(self._inner_model().forward).parameters
        return {*taken, "label", "label_ids", *self.label_names}

    # ---- train

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The (weighted) mean loss of a training batch, told to the pruner; of others the Trainer's."""
        if INDEX_KEY not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        index, labels = inputs.pop(INDEX_KEY), inputs.get("labels")
        if labels is None:
            raise ValueError(f"the batches have no labels, only {', '.join(inputs)}: the loss needs them")
        if self.label_smoother is not None:
            del inputs["labels"]  # as the Trainer: the model's own loss would not be smoothed
        outputs = model(**inputs)
        loss, memory = self.sample_losses(outputs, labels)
        if memory is None and self.pruner.policy.needs_memory:
            raise ValueError(
                f"policy {self.pruner.policy.name} needs the entropy of a prediction, which only a "
                "classification has: take policy ucb or loss"
            )
        mean = self.pruner.update(index, loss, memory)
        return (mean, outputs) if return_outputs else mean

    def sample_losses(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss (B,) of each sample, and EMP's memory term (B,): the entropy of its prediction, where it has
        one.

        Args:
            outputs: of the model, with `logits` (B, C), or (B, T, C) of T tokens.
            labels: (B,) or (B, T) int64 classes, (B, C) float for several classes at once, or (B,) or (B, C)
                float targets of a regression.

        Raises:
            ValueError: the model is of another kind.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        config = getattr(self.model, "config", None)
        if logits is None or self._shifts_labels(outputs, labels):
            raise ValueError(
                f"{type(self.model).__name__} gives no logits that are aligned with its labels: override "
                "sample_losses(outputs, labels) to return a loss (B,) for each sample, and its memory or None"
            )
        logits = logits.float()
        kind = getattr(config, "problem_type", None)
        if kind == "regression" or kind is None and logits.shape[-1] == 1:
            return (logits.view(len(labels), -1) - labels.view(len(labels), -1)).square().mean(1), None
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1), None
        if labels.dim() != logits.dim() - 1:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}: give one class a "
                "sample (B,) or a token (B, T), or override sample_losses"
            )
        smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
        loss = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none",
            label_smoothing=smoothing,
        )  # fmt: skip
        memory = entropy(logits.flatten(0, -2)) if self.pruner.policy.needs_memory else None
        has_label = labels.view(len(labels), -1) != IGNORED
        return _sample_means(loss, has_label), None if memory is None else _sample_means(memory, has_label)

    def _shifts_labels(self, outputs: Any, labels: Tensor) -> bool:
        """Whether the model predicts the next token: by its class or, in the first batch, by its own loss."""
        if self._shifts is None:
            names = {kind.__name__ for kind in type(self._inner_model()).__mro__}
            self._shifts = not names.isdisjoint(NEXT_TOKEN_MODELS)
            logits, own = outputs["logits"], outputs.get("loss")
            if own is not None and labels.dim() == 2 and logits.dim() == 3 and labels.shape[1] > 1:
                with torch.no_grad():
                    aligned, shifted = (
                        F.cross_entropy(given.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)
                        for given, wanted in ((logits, labels), (logits[:, :-1], labels[:, 1:]))
                    )
                    self._shifts |= bool((shifted - own).abs() < 0.1 * (aligned - own).abs())
        return self._shifts

    # ---- save and resume

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`; with `resume_from_checkpoint` (a folder, or True: the last one) the pruner
        goes on too.
        """
        self._check_arguments()
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"there is no checkpoint in {self.args.output_dir} to resume from")
        if checkpoint is not None:
            self._resume_pruner(Path(checkpoint))
        elif self.pruner.step:
            raise ValueError(
                f"the pruner has heard of {self.pruner.step} batches already: a new run needs a new Pruner"
            )
        return super().train(checkpoint, *args, **kwargs)

    def _check_arguments(self) -> None:
        given, pruner = self.args, self.pruner
        grouping = getattr(given, "train_sampling_strategy", "random") != "random"
        refused = {
            "auto_find_batch_size": given.auto_find_batch_size,
            "ignore_data_skip": given.ignore_data_skip,
            "train_sampling_strategy or group_by_length": grouping
            or getattr(given, "group_by_length", False),
            "compute_loss_func": self.compute_loss_func is not None,
        }
        for name, is_set in refused.items():
            if is_set:
                raise ValueError(f"{name} does not go with pruning: leave it out")
        per_epoch = -(-pruner.steps_per_epoch // given.gradient_accumulation_steps)
        planned = per_epoch * pruner.epochs
        asked = given.max_steps if given.max_steps > 0 else math.ceil(given.num_train_epochs * per_epoch)
        what = f"the arguments ask for {asked} steps and the pruner plans {planned} in {pruner.epochs} epochs"
        if asked > planned:
            raise ValueError(f"{what}: give Pruner(epochs=...) as many, or fewer steps")
        if asked < planned:
            warnings.warn(f"{what}: the end of the plan is cut", stacklevel=3)

    def _resume_pruner(self, checkpoint: Path) -> None:
        """Load the state beside a checkpoint. Raises ValueError where it is missing, damaged or of another
        run.
        """
        path = checkpoint / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: this checkpoint was not written by a PrunedTrainer, or not to its end; "
                "give an earlier one"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, by the damage
            raise ValueError(f"{path} is damaged ({type(error).__name__}): give an earlier one") from error
        self.pruner.load_state_dict(state)
        saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        accumulated, per_epoch = self.args.gradient_accumulation_steps, self.pruner.steps_per_epoch
        epoch, step = divmod(saved["global_step"], -(-per_epoch // accumulated))
        expected = epoch * per_epoch + step * accumulated
        if self.pruner.step != expected:
            raise ValueError(
                f"{path} is {self.pruner.step} batches into the run and the Trainer {expected}: resume with "
                "the gradient_accumulation_steps of the run, or give another checkpoint"
            )


class PrunedTrainer(PrunedTrainerMixin, Trainer):
    """A Trainer that prunes: `PrunedTrainer(model=..., args=..., train_dataset=..., pruner=...)`."""


class _PrunerCallback(TrainerCallback):
    """Writes the pruner's state into each checkpoint, logs `prune/kept_share` and the other figures, and
    warns once of what is off in them.
    """

    def __init__(self, pruner: Pruner, log: Callable[[dict[str, float]], None]) -> None:
        self.pruner, self.log = pruner, log
        self._has_advised = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            data = io.BytesIO()
            torch.save(self.pruner.state_dict(), data)
            folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            write_atomically(folder / STATE_NAME, data.getvalue())

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures = self.pruner.figures()
        if figures:
            self.log({f"prune/{name}": value for name, value in figures.items()})
        advice = self.pruner.advice(figures)
        if advice is not None and not self._has_advised and state.is_world_process_zero:
            self._has_advised = True
            warnings.warn(advice, stacklevel=2)


class _Numbered(Indexed):
    """Items as (index, example), so that a collator of examples, and the removal of columns, see no index."""

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _Collate:
    """The Trainer's collator for (index, example) pairs; the batch gets its index under `sample_idx`.

    A class, so that worker processes can be sent one.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], columns: set[str] | None) -> None:
        self.collate, self.columns = collate, columns

    def __call__(self, pairs: list[tuple[int, Any]]) -> Any:
        batch = self.collate([self._taken(example) for _, example in pairs])
        if not isinstance(batch, Mapping):
            raise TypeError(f"the data collator gives a {type(batch).__name__}, and the model takes a dict")
        return {**batch, INDEX_KEY: torch.tensor([index for index, _ in pairs])}

    def _taken(self, example: Any) -> Any:
        if self.columns is None or not isinstance(example, Mapping):
            return example
        return {name: value for name, value in example.items() if name in self.columns}


def _sample_means(values: Tensor, mask: Tensor) -> Tensor:
    """(B * T,), (B, T) bool -> (B,) the mean over the masked; 0 where there is none."""
    return (values.view_as(mask) * mask).sum(1) / mask.sum(1).clamp(min=1)
