"""Training with labels: `finetune` trains the whole pretrained network; `augmented_probe` shares the loop.

Data flow: uint8 images -> augmented views -> encoder -> one linear head for each learning rate ->
cross-entropy -> SGD. Protocol: SimCLR (arXiv 2002.05709, appendix B.5): random crop and flip, SGD with
Nesterov momentum 0.9, half a cosine, a rate that grows with the batch; judged after the last epoch on the
test images as they are. The head starts at zero.

Letters: N images, B in a batch, S pixels a side, D features, C classes, L learning rates.
"""

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_eval.artifacts import artifact
from linear_eval.errors import EvalError, first_line
from linear_eval.features import Pixels, content_hash
from linear_eval.files import check_uncompressed
from linear_eval.linear import VAL_FRACTION, LinearHead, check_val_fraction, number_in, split_rows
from linear_eval.numeric import cosine_schedule, takes_weight_decay

# epoch, row numbers (B,), images (B, 3, H, W) uint8 -> (B, 3, S, S) in [0, 1]
Views = Callable[[int, Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]  # steps done, steps in all
Warn = Callable[[str], Any]

# of checkpoints; raised also when the training changes, so that an unfinished one begins anew
FORMAT = 3
MOMENTUM = 0.9
LR = 0.05
RATED_BATCH = 256  # learning rates are given for this many images a step


class IndexedPixels(Pixels, Protocol):
    """`Pixels` that also give rows in an index's order: `pixels[rows]` for rows (B,) int64 on the CPU."""

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


class LabelledSplits(NamedTuple):
    """What is trained on and what is judged: pixels (N, 3, H, W) uint8, class ids (N,)."""

    train_pixels: IndexedPixels
    train_labels: Tensor
    test_pixels: IndexedPixels
    test_labels: Tensor


@dataclass(frozen=True)
class TrainResult:
    """What training with labels gave.

    Attributes:
        top1: accuracy on the test split after the last epoch, 0..1.
        lr: the peak learning rate used, for 256 images a step.
        val_top1: accuracy of `lr` on the held-out part of the train split, 0..1; None: there was no choice.
        train_loss: mean cross-entropy (nats) over the views of the last epoch.
        classifier: what was tested, in eval mode, with one head.
        classes: (C,) int64 ascending, the class ids that its logits stand for.
        checkpoint: the file that holds the finished training, where there is one; it may be deleted.
    """

    top1: float
    lr: float
    val_top1: float | None
    train_loss: float
    classifier: "Classifier" = field(compare=False, repr=False)
    classes: Tensor = field(compare=False, repr=False)
    checkpoint: Path | None = field(compare=False, repr=False)

    @property
    def head(self) -> LinearHead:
        """The classifier's, on raw features."""
        (layer,) = self.classifier.heads
        assert isinstance(layer, nn.Linear)
        zero = torch.zeros_like(layer.weight[0])
        return LinearHead(zero, torch.ones_like(zero), layer.weight, layer.bias)


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: all that its result depends on beside the encoder and the images.

    Attributes:
        views: augmentation; gets the epoch, rows of the train pixels and their images, both on the device.
            torch's global generators are seeded anew for each epoch, so that it may draw from them.
        seed: order of the images, dropout, what is held out.
        epochs: passes over the train images.
        lr: peak learning rate for 256 images a step, scaled with the real batch; several: chosen on a
            held-out part of train, then the whole train split is trained on. Equal ones: the lowest.
        weight_decay: of weights; biases, norms, position embeddings and class tokens have none.
        batch_size: most images a step; an epoch's batches differ in size by one image at most. It takes
            part in the scaling of lr.
        layer_decay: each of `parts` learns at this multiple of the rate of the part above it, the head on
            top at the full rate (BEiT, arXiv 2106.08254). 1: all alike.
        parts: names of the encoder's parameters, one tuple a part (stem, stages or blocks), input first;
            each name once. For `layer_decay` alone.
        label_smoothing: share of the target that is spread over all classes.
        warmup_epochs: of linear rise to the peak; the rest falls as half a cosine to zero.
        bf16: encoder in bfloat16 autocast, also when tested; head and loss stay in float32.
        val_fraction: share of every class that is held out to choose between several `lr`.

    Raises:
        EvalError: a value out of range.
    """

    views: Views
    seed: int
    epochs: int = 30
    lr: float | Sequence[float] = LR
    weight_decay: float = 0.0
    batch_size: int = 256
    layer_decay: float = 1.0
    parts: Sequence[Sequence[str]] = ()
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    bf16: bool = False
    val_fraction: float = VAL_FRACTION

    @property
    def rates(self) -> list[float]:
        """Learning rates to choose from, each once, ascending."""
        return sorted({self.lr} if isinstance(self.lr, int | float) else set(self.lr))

    def __post_init__(self) -> None:
        for name, fits, values in (
            ("epochs", self.epochs >= 1, ">= 1"),
            # an epoch is cut into equal batches, and BatchNorm needs two images in each
            ("batch_size", self.batch_size >= 4, ">= 4"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, ">= 0 and below epochs"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, ">= 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
        ):
            if not fits:
                raise EvalError(f"{name} is {getattr(self, name)}", f"choose a value {values}")
        if not self.rates or not 0 < self.rates[0] <= self.rates[-1] < math.inf:
            raise EvalError(f"lr is {self.lr}", "give one or several finite values > 0")
        check_val_fraction(self.val_fraction)


@dataclass(frozen=True)
class Execution:
    """Where and how a training runs: nothing here changes its result.

    Attributes:
        device: where it runs.
        checkpoint: a file written after every epoch. A call with the same arguments goes on from there,
            on the CPU bit for bit; a finished one is only tested again. It holds a hash of all that the
            training depends on: pixels and labels of both splits, encoder, settings, what `views` makes of
            some images. `{key}` in its name stands for that hash, so that other trainings have other files
            and what is unfinished of them stays as it is; of a file by another name, a training that is not
            this one is refused.
        progress: called after each step as `progress(steps_done, steps_in_all)`.
        warn: called with a line where a checkpoint cannot be written, or `{key}` not be read.
    """

    device: str | torch.device = "cpu"
    checkpoint: Path | None = None
    progress: Progress | None = None
    warn: Warn = warnings.warn


ON_CPU = Execution()


class Classifier(nn.Module):
    """An encoder under L linear heads, each trained for itself: (B, 3, S, S) -> (B, C, L) float32 logits.

    With `frozen`, the encoder stays in eval mode and gets no gradient.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        num_classes: int,
        num_heads: int,
        *,
        frozen: bool,
        bf16: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.feature_dim, self.frozen, self.bf16 = encoder, feature_dim, frozen, bf16
        self.heads = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, feature_dim, num_classes) for _ in range(num_heads)
        )
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    @property
    def learner(self) -> nn.Module:
        """The part that training changes."""
        return self.heads if self.frozen else self

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and not self.frozen
        with (
            torch.set_grad_enabled(learns),
            torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            h = self.encoder(images)  # (B, D)
        if h.shape != (len(images), self.feature_dim):
            fix = f"make it (B, {self.feature_dim})"
            raise EvalError(f"the encoder gives {tuple(h.shape)} for {len(images)} images", fix)
        return torch.stack([head(h.float()) for head in self.heads], 2)


def finetune(
    encoder: nn.Module,
    feature_dim: int,
    splits: LabelledSplits,
    recipe: Recipe,
    execution: Execution = ON_CPU,
) -> TrainResult:
    """Trains a copy of the encoder and a linear head with labels, and scores it once on the test images.

    Each of several learning rates costs one more training.

    Args:
        encoder: (B, 3, S, S) float32 in [0, 1] -> (B, feature_dim), on any device and in any mode; it is
            not changed.
        splits: a test class that train lacks counts as wrong.

    Raises:
        EvalError: splits or labels do not fit, values out of range, divergence, a wrong checkpoint.
    """
    return train_and_test(encoder, feature_dim, splits, recipe, execution, frozen=False)


def train_and_test(
    encoder: nn.Module,
    feature_dim: int,
    splits: LabelledSplits,
    recipe: Recipe,
    execution: Execution,
    *,
    frozen: bool,
) -> TrainResult:
    """Choose the learning rate on a held-out part of train, train on all of it, test.

    Heads on a frozen encoder share its forward pass, so that choosing between any number of rates doubles the
    work; a trained one needs a training for each.
    """
    trainings = _Trainings(encoder, feature_dim, splits, recipe, execution, frozen)
    saved, first = trainings.load(), 0
    if saved is not None:
        trainings.scores, first = saved["scores"], saved["number"]
    for number in range(first, trainings.num_trials):
        model, losses = trainings.run(number, saved if number == first else None)
        accuracy = trainings.accuracy(model, splits.train_pixels, trainings.train_target, trainings.val_rows)
        trainings.scores = trainings.scores + torch.where(losses.isfinite(), accuracy, -1.0).tolist()
    model, losses = trainings.run(trainings.num_trials, saved if first == trainings.num_trials else None)
    best = trainings.best(trainings.scores)
    rate = recipe.rates[best]
    if not losses.isfinite():
        fix = f"lower it, e.g. lr={rate / 10:g}, or give several to choose from"
        raise EvalError(f"training diverged at lr={rate:g}", fix)
    rows = torch.arange(len(trainings.test_target))
    top1 = trainings.accuracy(model, splits.test_pixels, trainings.test_target, rows).item()
    val_top1 = trainings.scores[best] if trainings.scores else None
    kept = trainings.kept.path if trainings.kept is not None and trainings.kept.path.is_file() else None
    return TrainResult(top1, rate, val_top1, losses.item(), model.eval(), trainings.classes, kept)


class _Trainings:
    """The trainings behind one result, by number: trials on a part of train, then the one on all of it."""

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        splits: LabelledSplits,
        recipe: Recipe,
        execution: Execution,
        frozen: bool,
    ) -> None:
        self.encoder, self.feature_dim, self.splits, self.frozen = encoder, feature_dim, splits, frozen
        self.recipe, self.execution, self.device = recipe, execution, torch.device(execution.device)
        self.classes, self.train_target, self.test_target = _check(splits)
        self.all_rows = torch.arange(len(self.train_target))
        rates = recipe.rates
        self.trials = [] if len(rates) == 1 else [rates] if frozen else [[rate] for rate in rates]
        self.num_trials = len(self.trials)
        self.fit_rows, self.val_rows = self.all_rows, self.all_rows[:0]
        if self.trials:
            if self.train_target.bincount().min() < 2:
                fix = "give one lr, or two images of each class"
                raise EvalError("a class has one train image, so that no lr can be chosen on others", fix)
            self.fit_rows, self.val_rows = split_rows(self.train_target, recipe.val_fraction, recipe.seed)
        self.scores: list[float] = []  # held-out accuracy of each rate tried so far
        self.num_steps = [  # of each training
            recipe.epochs * _num_batches(len(rows), recipe.batch_size)
            for rows in [self.fit_rows] * self.num_trials + [self.all_rows]
        ]
        self.kept = None
        if execution.checkpoint is not None:
            made_of = _fingerprint(encoder, splits, recipe, self.device) | {"frozen": frozen}
            made_of |= {"train labels": _hash(self.classes, self.train_target)}
            made_of |= {"test labels": _hash(self.test_target)}
            self.kept = _Checkpoint(execution.checkpoint, made_of, execution.warn)

    def best(self, scores: list[float]) -> int:
        """Place of the best learning rate by the scores of all; of equals, the lowest."""
        return max(range(len(self.recipe.rates)), key=scores.__getitem__) if scores else 0

    def begin(self, number: int, scores: list[float]) -> tuple["Classifier", torch.optim.SGD, Tensor]:
        """What a training begins with: network, optimizer, rows."""
        is_trial = number < self.num_trials
        rates = self.trials[number] if is_trial else [self.recipe.rates[self.best(scores)]]
        rows = self.fit_rows if is_trial else self.all_rows
        # requires_grad_: load_encoder turns gradients off
        encoder = self.encoder if self.frozen else copy.deepcopy(self.encoder).requires_grad_(True)
        shape = (self.feature_dim, len(self.classes), len(rates))
        model = Classifier(encoder, *shape, frozen=self.frozen, bf16=self.recipe.bf16).to(self.device)
        return model, _optimizer(model, rates, len(rows), self.recipe), rows

    def load(self) -> dict[str, Any] | None:
        """What the checkpoint holds of these trainings; None: nothing."""

        def check(state: dict[str, Any]) -> None:
            number, scores = state["number"], state["scores"]
            if not 0 <= number <= self.num_trials or len(scores) != sum(map(len, self.trials[:number])):
                raise ValueError("no such trial")
            _resume(*self.begin(number, scores)[:2], state, self.recipe.epochs)

        return None if self.kept is None else self.kept.load(check)

    def run(self, number: int, saved: dict[str, Any] | None) -> tuple["Classifier", Tensor]:
        """Train from the beginning, or from a saved state; the network and each head's loss (L,)."""
        model, optimizer, rows = self.begin(number, self.scores)
        progress, kept, scores = self.execution.progress, self.kept, self.scores

        def tick(done: int) -> None:
            if progress is not None:
                progress(sum(self.num_steps[:number]) + done, sum(self.num_steps))

        def save(state: dict[str, Any]) -> None:
            if kept is not None:
                kept.save({"number": number, "scores": scores, **state})

        data = (self.splits.train_pixels, self.train_target, rows)
        return model, _train(model, optimizer, *data, self.recipe, self.device, saved, save, tick)

    def accuracy(self, model: "Classifier", pixels: IndexedPixels, target: Tensor, rows: Tensor) -> Tensor:
        return _accuracy(model, pixels, target, rows, self.recipe.batch_size, self.device)


def state_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers (name, shape, type, bytes), and of which modules are training."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(str([part.training for part in module.modules()]).encode())
    return digest.hexdigest()


def keyed_seed(*key: int) -> int:
    """A seed below 2^31, a hash of the key: of torch's CPU seeds 32 bits count, and neighbours overlap."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest()) >> 1


def parameter_groups(
    model: Classifier,
    lrs: Sequence[float],
    weight_decay: float,
    layer_decay: float,
    parts: Sequence[Sequence[str]] = (),
) -> list[dict[str, Any]]:
    """SGD's groups, one for each pair of `peak_lr` and `weight_decay`. Biases, norms, position embeddings and
    class tokens have no decay.

    Args:
        lrs: peak learning rate of each head; the encoder, where it is trained, takes the only one.
        layer_decay, parts: see `Recipe`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}

    def add(name: str, parameter: nn.Parameter, lr: float) -> None:
        decay = weight_decay if takes_weight_decay(name, parameter) else 0.0
        groups.setdefault((lr, decay), []).append(parameter)

    for head, lr in zip(model.heads, lrs, strict=True):
        for name, parameter in head.named_parameters():
            add(name, parameter, lr)
    if not model.frozen:
        assert len(lrs) == 1, "heads with different rates cannot share an encoder that learns"
        heights = _heights(model.encoder, parts) if layer_decay < 1 else {}
        for name, parameter in model.encoder.named_parameters():
            add(name, parameter, lrs[0] * layer_decay ** heights.get(name, 0))
    return [
        {"params": params, "peak_lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()
    ]


def _heights(encoder: nn.Module, parts: Sequence[Sequence[str]]) -> dict[str, int]:
    """Parts from each parameter up to the head: 1 in the last one. EvalError unless these are all of them."""
    heights = {name: len(parts) - number for number, part in enumerate(parts) for name in part}
    known = {name for name, _ in encoder.named_parameters()}
    if wrong := sorted(heights.keys() ^ known):
        what = "do not name the encoder's" if wrong[0] in known else "name what the encoder has not:"
        fix = "name every parameter in parts, input first, or set layer_decay=1"
        raise EvalError(f"layer_decay counts parts, and these {what} {wrong[0]}", fix)
    return heights


def _check(splits: LabelledSplits) -> tuple[Tensor, Tensor, Tensor]:
    """Class ids (C,) ascending; both splits' labels as 0..C-1 on the CPU, -1 for classes not in train."""
    train_pixels, train_labels, test_pixels, test_labels = splits
    for name, pixels, labels in (("train", train_pixels, train_labels), ("test", test_pixels, test_labels)):
        is_rgb = len(pixels.shape) == 4 and pixels.shape[1] == 3 and pixels.dtype == torch.uint8
        if not is_rgb or labels.shape != pixels.shape[:1]:
            what = f"the {name} pixels are {tuple(pixels.shape)} {pixels.dtype}, "
            what += f"their labels {tuple(labels.shape)}"
            raise EvalError(what, "give (N, 3, H, W) uint8 pixels and (N,) labels")
        if len(pixels) == 0:
            raise EvalError(f"the {name} split is empty", "give at least one image")
        unlabeled = int((labels < 0).sum())
        if unlabeled:
            fix = "leave out images without a label"
            raise EvalError(f"{unlabeled} of {len(labels)} {name} labels are negative", fix)
    classes, train_target = train_labels.detach().cpu().long().unique(return_inverse=True)
    test_labels = test_labels.detach().cpu().long()
    if len(classes) < 2:
        raise EvalError(f"the train split has only class {classes.tolist()}", "give at least two classes")
    return classes, train_target, number_in(classes, test_labels)


def _num_batches(num_images: int, batch_size: int) -> int:
    return -(-num_images // batch_size)


def _optimizer(model: Classifier, lrs: list[float], num_rows: int, recipe: Recipe) -> torch.optim.SGD:
    # the real batch size: few labels make small batches
    scale = num_rows / _num_batches(num_rows, recipe.batch_size) / RATED_BATCH
    rates = [lr * scale for lr in lrs]
    groups = parameter_groups(model, rates, recipe.weight_decay, recipe.layer_decay, recipe.parts)
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)


def _resume(model: Classifier, optimizer: torch.optim.SGD, state: dict[str, Any], epochs: int) -> None:
    """Load a saved training. Raises ValueError, RuntimeError or others where network or rates differ."""

    def settings() -> list[dict[str, Any]]:
        return [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]

    ours, asked = model.learner.state_dict(), settings()
    for name, tensor in state["model"].items():
        if (tensor.shape, tensor.dtype) != (ours[name].shape, ours[name].dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
    model.learner.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if settings() != asked:
        raise ValueError("other rates")
    for parameter, entries in optimizer.state.items():
        if any(isinstance(kept, Tensor) and kept.shape != parameter.shape for kept in entries.values()):
            raise ValueError("momentum of another shape")
    if not 1 <= state["epochs"] <= epochs or state["losses"].shape != (len(model.heads),):
        raise ValueError("epochs or losses that cannot be")


@torch.enable_grad()
def _train(
    model: Classifier,
    optimizer: torch.optim.SGD,
    pixels: IndexedPixels,
    target: Tensor,
    rows: Tensor,
    recipe: Recipe,
    device: torch.device,
    resumed: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    tick: Callable[[int], None],
) -> Tensor:
    """Train on `rows`, from a saved state if there is one; mean loss of each head's last epoch, (L,)."""
    epoch_steps = _num_batches(len(rows), recipe.batch_size)
    num_steps, warmup_steps = recipe.epochs * epoch_steps, recipe.warmup_epochs * epoch_steps
    num_heads = len(model.heads)
    losses = torch.full((num_heads,), math.inf)
    first_epoch = 0
    if resumed is not None:
        _resume(model, optimizer, resumed, recipe.epochs)
        losses, first_epoch = resumed["losses"], resumed["epochs"]
    for epoch in range(first_epoch, recipe.epochs):
        model.train()
        sums = torch.zeros(num_heads, device=device)
        with _keyed_random(device, recipe.seed, epoch):
            batches = rows[torch.randperm(len(rows))].tensor_split(epoch_steps)
            for step, index in enumerate(batches, epoch * epoch_steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * cosine_schedule(step, num_steps, warmup_steps)
                images, y = pixels[index].to(device), target[index].to(device)
                logits = model(recipe.views(epoch, index.to(device), images))  # (B, C, L)
                y, smoothing = y.unsqueeze(1).expand(-1, num_heads), recipe.label_smoothing  # (B, L)
                each = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
                optimizer.zero_grad()
                # summed over heads: the gradient of one does not depend on the others
                each.mean(0).sum().backward()
                optimizer.step()
                sums += each.detach().sum(0)
                tick(step + 1)
        losses = (sums / len(rows)).cpu()
        if not losses.isfinite().any():
            break
        state = {"model": model.learner.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "losses": losses, "epochs": epoch + 1})
    return losses


@torch.inference_mode()
def _accuracy(
    model: Classifier,
    pixels: IndexedPixels,
    target: Tensor,
    rows: Tensor,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Each head's accuracy on `rows` of the data, without augmentation: (L,) float64 in 0..1, on the CPU."""
    model.eval()
    hits = torch.zeros(len(model.heads), dtype=torch.int64, device=device)
    for index in rows.split(batch_size):
        predicted = model(pixels[index].to(device).float() / 255).argmax(1)  # (B, L)
        hits += (predicted == target[index].to(device).unsqueeze(1)).sum(0)
    return hits.cpu().double() / len(rows)


@contextmanager
def _keyed_random(device: torch.device, *key: int) -> Iterator[None]:
    """torch's generators seeded by the key, then put back: an epoch's draws depend on nothing before it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_seed(*key))
        yield


def _fingerprint(
    encoder: nn.Module, splits: LabelledSplits, recipe: Recipe, device: torch.device
) -> dict[str, Any]:
    """What a training depends on besides labels, by names for people; views by what they make of noise."""
    train_pixels = splits.train_pixels
    settings = {part.name: getattr(recipe, part.name) for part in fields(recipe) if part.name != "views"}
    rows = torch.linspace(0, len(train_pixels) - 1, min(len(train_pixels), 8)).round().long()
    shape, generator = (len(rows), *train_pixels.shape[1:]), torch.Generator().manual_seed(0)
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    views = []
    for epoch in sorted({0, recipe.epochs // 2, recipe.epochs - 1}):
        with torch.no_grad(), _keyed_random(device, recipe.seed, epoch):
            views.append(recipe.views(epoch, rows.to(device), noise.to(device)))
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": device.type,
        "encoder": hashlib.sha256(f"{encoder!r} {state_hash(encoder)}".encode()).hexdigest(),
        "train images": content_hash(train_pixels),
        "test images": content_hash(splits.test_pixels),
        "views": _hash(*views),
        **settings | {"lr": recipe.rates},
    }


def _hash(*tensors: Tensor) -> str:
    """SHA-256 over shapes, types and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Checkpoint:
    """The file of one training, which holds what the training is made of.

    Args:
        path: `{key}` in its name becomes a hash of `made_of`. Such a file is ours to replace; any other
            one is the caller's.
        made_of: what the training depends on, plain values by names for people.
        warn: is told in a line what costs only the resuming.
    """

    def __init__(self, path: Path, made_of: dict[str, Any], warn: Warn) -> None:
        self.made_of = json.dumps(made_of, sort_keys=True)
        self.path = path.with_name(
            path.name.replace("{key}", hashlib.sha256(self.made_of.encode()).hexdigest()[:16])
        )
        self.is_keyed, self.warn, self.warned = self.path != path, warn, False

    def load(self, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """What was saved of this training; None: nothing. `check` raises anything where it does not fit."""
        if not os.path.lexists(self.path):
            return None
        try:
            state = self._read()
            if state["fingerprint"] == self.made_of:
                check(state)
        # torch.load raises pickle, zip, runtime and key errors for what is no checkpoint of ours
        except Exception as error:
            what = f"cannot read the checkpoint {self.path} ({type(error).__name__})"
            if self.is_keyed:
                self.warn(f"{what}: the training begins anew")
                return None
            raise EvalError(what, "delete it and start again") from error
        if state["fingerprint"] == self.made_of:
            return state
        ours, theirs = json.loads(self.made_of), json.loads(state["fingerprint"])
        other = ", ".join(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        what = f"the checkpoint {self.path} is of another training (other {other})"
        if self.is_keyed:
            self.warn(f"{what}: this one begins anew")
            return None
        raise EvalError(what, "delete it or give another file")

    def _read(self) -> dict[str, Any]:
        """The file's state, of the right types and extent."""
        if self.path.is_symlink() or not self.path.is_file():  # opening a pipe would wait for ever
            raise TypeError("no regular file")
        check_uncompressed(self.path)
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        types = {"fingerprint": str, "number": int, "scores": list, "epochs": int, "losses": Tensor}
        types |= {"model": dict, "optimizer": dict}
        if not isinstance(state, dict) or any(not isinstance(state.get(key), types[key]) for key in types):
            raise TypeError("not a training's state")
        if not all(isinstance(score, float) for score in state["scores"]):
            raise TypeError("no scores")
        if not isinstance(json.loads(state["fingerprint"]), dict):
            raise TypeError("it does not say what it is of")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Whole or not at all. A file that cannot be written costs no training, only the resuming."""
        try:
            with artifact(self.path) as file:
                torch.save({"fingerprint": self.made_of, **state}, file)
        # torch.save raises RuntimeError on a full disk
        except (EvalError, OSError, RuntimeError) as error:
            if not self.warned:
                why = getattr(error.__cause__, "strerror", None) or first_line(error)
                what = f"cannot write the checkpoint {self.path} ({why})"
                self.warn(f"{what}: the training goes on, but could not be resumed")
            self.warned = True
