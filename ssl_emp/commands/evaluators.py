"""The evaluators: one encoder on one data set -> results."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linear_eval import Features, augmented, extract_features
from linear_eval.augmented import augmented_probe, probe_recipe
from linear_eval.diagnose import diagnose, draw_map, draw_neighbors, map_2d, verdict, write_embeddings
from linear_eval.errors import first_line
from linear_eval.features import load_features, save_features
from linear_eval.fewshot import FIXED_L2, FewShotResult, fewshot, fewshot_probe
from linear_eval.finetune import (
    LR,
    MOMENTUM,
    RATED_BATCH,
    Execution,
    LabelledSplits,
    Recipe,
    TrainResult,
    finetune,
    state_hash,
)
from linear_eval.knn import import_faiss, knn_accuracies
from linear_eval.linear import BATCH_SIZE, EPOCHS, L2_GRID, HeadResult, LinearResult, linear_probe, sgd_probe
from ssl_emp.augment import Recipe as Augmentation
from ssl_emp.augment import cut_views, draw_params
from ssl_emp.classifier import check_keepable, save_classifier
from ssl_emp.commands.eval_config import EvalConfig
from ssl_emp.commands.eval_images import Splits
from ssl_emp.commands.ledger import Ledger, Voice
from ssl_emp.commands.samples_table import training_columns
from ssl_emp.commands.subjects import Subject
from ssl_emp.data.images import ImageSet
from ssl_emp.device import describe_device
from ssl_emp.errors import UserError
from ssl_emp.parts import parts as parts_of
from ssl_emp.run.ranks import Ranks
from ssl_emp.run.report import show_progress
from ssl_emp.safe_files import check_inner
from ssl_emp.text import command_line, quoted


@dataclass(frozen=True)
class Result:
    """One line of the table: value as printed (percent for accuracies), `std` over several draws."""

    protocol: str
    value: float
    metric: str = "top1 %"
    std: float | None = None
    n_test: int | None = None  # number of images judged; None: the test split
    then: Callable[[], None] | None = None  # what is left to do once the row is kept


@dataclass(frozen=True)
class Session:
    """What all of a command has in common."""

    config: EvalConfig
    device: torch.device
    ranks: Ranks
    ledger: Ledger

    @property
    def voice(self) -> Voice:
        return self.ledger.voice


@dataclass(frozen=True)
class Judged:
    """One encoder with the splits that it is judged on."""

    session: Session
    subject: Subject
    encoder: nn.Module  # in eval mode, on `device`
    data: Splits
    out: Path | None  # for files beside the rows

    @property
    def config(self) -> EvalConfig:
        return self.session.config

    @property
    def device(self) -> torch.device:
        return self.session.device

    def note(self, line: str) -> None:
        self.session.voice.note(line)

    @property
    def train(self) -> ImageSet:
        return self.data.train

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Split -> (N, D) features of its images. All processes share this work, and only this."""
        return {name: extract(self, images, name).x for name, images in self.images.items()}

    @property
    def images(self) -> dict[str, ImageSet]:
        """By split: `train`, and `test` where there is one."""
        return {"train": self.data.train} | ({} if self.data.test is None else {"test": self.data.test})

    @property
    def features(self) -> tuple[Features, Features]:
        """Of train and test, with labels. UserError or EvalError where there is nothing to predict."""
        train, test = self.splits.train_labels, self.splits.test_labels
        return Features(self.rows["train"], train), Features(self.rows["test"], test)

    @property
    def feature_dim(self) -> int:
        return self.rows["train"].shape[1]

    @property
    def splits(self) -> LabelledSplits:
        """The images that `features` are of; raises as they do."""
        train, test = self.data.labelled
        assert train.labels is not None and test.labels is not None
        return LabelledSplits(train.pixels, train.labels, test.pixels, test.labels)

    def checkpoint(self, evaluator: str) -> Path | None:
        """The file that an interrupted training goes on from; `linear_eval.finetune` completes its name.

        Scripts that look whether `finetune.pt` is there know that a training is under way, or was
        interrupted: so the folder's name.
        """
        if self.out is None:
            return None
        check_inner(self.out, f"{evaluator}.pt")
        return self.out / f"{evaluator}.pt" / "{key}.pt"

    def execution(self, evaluator: str, steps: str) -> Execution:
        """How a training runs that `checkpoint` keeps; `steps` is what its progress counts."""
        progress = show_progress(f"{self.subject.name}: {steps}")
        return Execution(self.device, self.checkpoint(evaluator), progress, self.note)

    def views(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        """The literature's random crop and flip: (epoch, rows, uint8 images) -> (B, 3, S, S) in [0, 1]."""
        size = self.train.pixels.shape[-1]
        recipe = Augmentation(size, jitter_prob=0.0, gray_prob=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        seed = self.config.seed
        return lambda epoch, index, images: cut_views(
            images, draw_params(seed, epoch, index, recipe, size)[:1], recipe
        )[0]


def build(subject: Subject, image_size: int, device: torch.device) -> nn.Module:
    """The encoder in eval mode on the device, or a UserError where it takes no images of this size."""
    encoder = subject.build(image_size).eval().to(device)
    try:
        with torch.inference_mode():
            encoder(torch.zeros(1, 3, image_size, image_size, device=device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:  # networks raise errors of many types
        reason = first_line(error, 120)
        what = f"{subject.name} takes no images of {image_size}x{image_size} pixels ({reason})"
        raise UserError(what, f"set data.image_size={subject.image_size or 224}, or leave it out") from error
    return encoder


def weights_hash(encoder: nn.Module) -> str:
    """Twelve hexadecimal digits of an encoder's weights and buffers; empty where it has learned nothing."""
    return state_hash(encoder)[:12] if any(True for _ in encoder.parameters()) else ""


def out_of_memory(config: EvalConfig, device: torch.device) -> UserError:
    what = f"batch_size={config.batch_size} does not fit into the memory of {device}"
    return UserError(what, f"set batch_size={max(1, config.batch_size // 4)}")


# ---- features


def features_key(encoder: nn.Module, images: ImageSet, *how: object) -> str:
    """The features' name: a hash of the network, its weights and buffers, all pixels and `how`."""
    # what a network was built with need not show in its modules: how timm's pool is one word
    args = getattr(encoder, "spec", {}).get("args", {})
    made_of = f"{encoder!r} {state_hash(encoder)} {images.content['pixels']} {how}{args or ''}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:32]


def features_path(judged: Judged, images: ImageSet) -> Path | None:
    """Where these features are kept; None where they are not."""
    config, device = judged.config, judged.device
    # without parameters there is nothing to save; a module from Python may have been changed since
    is_custom = str(getattr(judged.encoder, "spec", {}).get("arch")).startswith("custom:")
    if config.cache_dir is None or is_custom or not any(True for _ in judged.encoder.parameters()):
        return None
    # all that rounding depends on: a row has the same number with a cache and without
    processor = describe_device(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    key = features_key(judged.encoder, images, config.batch_size, device.type, processor, torch.__version__)
    return Path(config.cache_dir) / f"{key}.safetensors"


def extract(judged: Judged, images: ImageSet, split: str) -> Features:
    """Features of one split, from the cache where they are; labels of unlabelled images are zeros, not read.

    The first process looks, decides and writes. Where it finds the features, the others get no rows.
    """
    ranks = judged.session.ranks
    labels = torch.zeros(len(images.names), dtype=torch.int64) if images.labels is None else images.labels
    with ranks.together():
        path = features_path(judged, images)
    known = load_features(path, labels) if path is not None and ranks.is_first else None
    if ranks.barrier("known" if known else "")[0]:
        return known or Features(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))
    features = extract_features(
        judged.encoder,
        images.pixels,
        labels,
        batch_size=judged.config.batch_size,
        device=judged.device,
        progress=judged.session.voice.progress(f"{judged.subject.name}: {split} features"),
        distribute=partial(distribute, ranks, judged.config.batch_size),
    )
    if path is not None and ranks.is_first:
        save_features(path, features)
    return features


def distribute(ranks: Ranks, batch_size: int, num_images: int, rows_of: Callable[[range], Tensor]) -> Tensor:
    """Features of all images: each process computes a contiguous part of the batches, all get the whole."""
    num_batches = -(-num_images // batch_size)
    begin, end = (
        num_batches * rank // ranks.world_size * batch_size for rank in (ranks.rank, ranks.rank + 1)
    )
    with ranks.together():
        rows = rows_of(range(begin, min(end, num_images)))
    return ranks.gather_rows(rows, num_images)


# ---- classifiers


def run_knn(judged: Judged) -> list[Result]:
    knn = judged.config.knn
    if knn.backend == "auto" and judged.device.type == "cpu" and import_faiss() is None:
        judged.note(
            "faiss cannot be imported, kNN runs on torch with the same result; pip install "
            "faiss-cpu is faster on CPUs"
        )
    train, test = judged.features
    found = knn_accuracies(
        train,
        test,
        num_neighbors=knn.num_neighbors,
        temperature=knn.temperature,
        backend=knn.backend,
        device=judged.device,
    )
    vote = "majority" if knn.temperature is None else f"T={knn.temperature:g}"
    return [
        Result(f"cosine kNN, k={k}, {vote}, bank {len(train.x)}", 100 * top1) for k, top1 in found.items()
    ]


def run_linear(judged: Judged) -> list[Result]:
    linear, seed, device = judged.config.linear, judged.config.seed, judged.device
    if linear.save:
        check_savable(judged, "linear")
    found: TrainResult | LinearResult | HeadResult
    if linear.protocol == "augmented":
        recipe = probe_recipe(
            judged.views(), seed, epochs=linear.epochs or augmented.EPOCHS, val_fraction=linear.val_fraction
        )
        execution = judged.execution("linear", "linear steps")
        found = augmented_probe(judged.encoder, judged.feature_dim, judged.splits, recipe, execution)
        how = f"augmented linear probe, crop+flip, raw features, SGD Nesterov {MOMENTUM}, {recipe.epochs} "
        how += f"epochs, batch {recipe.batch_size}, cosine, lr={found.lr:g}*batch/{RATED_BATCH}"
    elif linear.protocol == "cached":
        epochs = linear.epochs or EPOCHS
        found = sgd_probe(
            *judged.features, seed=seed, epochs=epochs, val_fraction=linear.val_fraction, device=device
        )
        how = f"linear heads on cached features, SGD, {epochs} epochs, batch {BATCH_SIZE}, "
        how += f"lr={found.learning_rate:g} wd={found.weight_decay:g}"
    else:
        found = linear_probe(
            *judged.features,
            seed=seed,
            device=device,
            val_fraction=linear.val_fraction,
            max_iter=linear.max_iter,
            precision=linear.precision,
        )
        how = "logistic regression on standardised frozen features, L-BFGS, "
        how += f"<= {linear.max_iter} steps, l2={found.l2:.3g} of {len(L2_GRID)}"
        how += f", {linear.precision}" if linear.precision != "float32" else ""
    how += f" chosen on {100 * linear.val_fraction:g}% of {len(judged.train.names)} train, refit"
    return [classifier_result(judged, "linear", how, found, linear.save)]


def run_fewshot(judged: Judged) -> list[Result]:
    few, seed, device = judged.config.fewshot, judged.config.seed, judged.device
    train, test = judged.features
    wanted: list[dict[str, Any]] = [{"fraction": fraction} for fraction in few.fractions] + [
        {"per_class": n} for n in few.per_class
    ]
    if not wanted:
        fix = "give at least one, such as fewshot.per_class=[10]"
        raise UserError("fewshot.fractions and fewshot.per_class are both empty", fix)
    splits = judged.splits

    def tuned(rows: Tensor, subset_seed: int) -> float:
        subset = splits._replace(
            train_pixels=splits.train_pixels[rows], train_labels=splits.train_labels[rows]
        )
        recipe = Recipe(judged.views(), subset_seed, few.epochs)
        return finetune(judged.encoder, judged.feature_dim, subset, recipe, Execution(device)).top1

    def line(found: FewShotResult, how: str) -> Result:
        what = f"few labels: {found.per_class} a class, {found.num_labels} labels, "
        what += f"{len(found.accuracies)} draws, {how}"
        return Result(what, 100 * found.mean, std=100 * found.std)

    results = []
    for size in wanted:
        found = fewshot_probe(train, test, seed=seed, num_subsets=few.num_draws, device=device, **size)
        l2 = f"l2={FIXED_L2:g} fixed" if found.per_class == 1 else "l2 chosen on held-out labels"
        results.append(line(found, f"logistic regression on frozen features, {l2}"))
        if few.finetune:
            found = fewshot(splits.train_labels, tuned, seed=seed, num_subsets=few.num_draws, **size)
            how = f"fine-tuned {few.epochs} epochs, crop+flip, batch <= {Recipe.batch_size}, "
            results.append(line(found, f"{how}lr={LR:g}*batch/{RATED_BATCH}"))
    return results


def run_finetune(judged: Judged) -> list[Result]:
    tune = judged.config.finetune
    if tune.save:
        check_savable(judged, "finetune")
    has_parts = tune.layer_decay < 1 and any(True for _ in judged.encoder.parameters())
    groups = tuple(part.parameters for part in parts_of(judged.encoder)) if has_parts else ()
    settings = tune.model_dump(exclude={"save"})
    recipe = Recipe(judged.views(), judged.config.seed, parts=groups, **settings)
    execution = judged.execution("finetune", "fine-tuning steps")
    result = finetune(judged.encoder, judged.feature_dim, judged.splits, recipe, execution)
    chosen = f" (chosen on {100 * tune.val_fraction:g}% of train, refit)" if len(set(tune.lr)) > 1 else ""
    how = (
        f"fine-tuned on {len(judged.train.names)} train, crop+flip, SGD Nesterov {MOMENTUM}, {tune.epochs} "
        f"epochs, batch {tune.batch_size}"
    )
    how += f", cosine, lr={result.lr:g}*batch/{RATED_BATCH}{chosen}, wd={tune.weight_decay:g}"
    for text, value, usual in (
        ("warm-up {:g} epochs", tune.warmup_epochs, 0),
        ("label smoothing {:g}", tune.label_smoothing, 0),
        ("layer decay {:g}", tune.layer_decay, 1),
    ):
        how += f", {text.format(value)}" if value != usual else ""
    how += ", bf16" if tune.bf16 else ""
    return [classifier_result(judged, "finetune", how, result, tune.save)]


def check_savable(judged: Judged, evaluator: str) -> None:
    """Raises UserError where the classifier could not be kept, before it is trained."""
    if judged.out is None:
        fix = "judge a run, or give --out DIR"
        raise UserError(f"{evaluator}.save=true has no place to keep the classifier in", fix)
    check_keepable(judged.encoder, judged.subject.name)


def classifier_result(
    judged: Judged, evaluator: str, protocol: str, found: TrainResult | LinearResult | HeadResult, save: bool
) -> Result:
    """The row of a classifier; once kept, the classifier where asked for, and a finished checkpoint goes."""

    def then() -> None:
        if save and judged.out is not None:
            keep_classifier(judged, judged.out / f"classifier-{evaluator}", protocol, found)
        if isinstance(found, TrainResult) and found.checkpoint is not None:
            with suppress(OSError):
                found.checkpoint.unlink(missing_ok=True)  # so that a second call trains anew
                found.checkpoint.parent.rmdir()  # fails where other checkpoints are in it

    return Result(protocol, 100 * found.top1, then=then)


def keep_classifier(
    judged: Judged, folder: Path, protocol: str, found: TrainResult | LinearResult | HeadResult
) -> None:
    names, subject = judged.train.class_names, judged.subject
    class_names = [str(number) if names is None else names[number] for number in found.classes.tolist()]
    encoder, head, bf16 = judged.encoder, found.head, isinstance(found, TrainResult) and found.classifier.bf16
    if isinstance(found, TrainResult):
        encoder = found.classifier.encoder
    about: dict[str, Any] = {"encoder": subject.name, "data": subject.data.source}
    about |= {"protocol": f"{protocol}, {subject.weights}"}
    about |= {"top1": found.top1, "n_test": len(judged.splits.test_labels)}
    size = judged.train.pixels.shape[-1]
    save_classifier(folder, encoder, subject.name, head, class_names, size, bf16=bf16, judged=about)
    use = f"{command_line('evaluate')} predict {quoted(folder)} IMAGES"
    judged.note(f"the classifier is in {folder}; use it: {use}")


# ---- without labels


@torch.no_grad()
def run_diagnose(judged: Judged) -> list[Result]:
    """Label-free figures of one split's features; once rows are kept, pictures and embeddings too."""
    settings, seed = judged.config.diagnose, judged.config.seed
    split = settings.split if settings.split in judged.images else "train"
    if split != settings.split:
        judged.note(f"{judged.subject.data.source} has no test split: diagnose looks at the train split")
    images, x = judged.images[split], judged.rows[split]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rows = order[: min(2048, settings.max_samples)].sort().values
    views = []
    for epoch in (0, 1):  # two random crops of each image
        parts = [
            judged.views()(epoch, part, images.pixels[part].to(judged.device))
            for part in rows.split(judged.config.batch_size)
        ]
        views.append(torch.cat([judged.encoder(part).float().cpu() for part in parts]))
    found = diagnose(x, views=(views[0], views[1]), max_samples=settings.max_samples, seed=seed)
    for line in verdict(found):
        judged.note(f"{judged.subject.name}: {line}")
    what = f"{found.num_samples} {split} features of {found.dim} dimensions"
    figures = {
        "std of normalised features": found.feature_std,
        "effective rank": found.effective_rank,
        "uniformity": found.uniformity,
    }
    figures |= {} if found.alignment is None else {"alignment of two crops": found.alignment}
    results = [Result(what, value, metric, n_test=len(x)) for metric, value in figures.items()]
    return [*results[:-1], replace(results[-1], then=partial(draw_diagnosis, judged, split))]


def draw_diagnosis(judged: Judged, split: str) -> None:
    """neighbors.png, map.png and embeddings.parquet of a diagnosis; what cannot be drawn is a line."""
    if judged.out is None:
        return
    settings, seed, folder = judged.config.diagnose, judged.config.seed, judged.out / "diagnose"
    images, x = judged.images[split], judged.rows[split]
    picture: dict[str, Any] = {"labels": images.labels, "class_names": images.class_names}
    num_neighbors = min(settings.num_neighbors, len(x) - 1)
    counts: dict[str, Any] = {"num_queries": settings.num_queries, "num_neighbors": num_neighbors}
    about: dict[str, Any] = {"names": images.names, **picture}
    with or_warn(judged.session.voice, folder / "neighbors.png"):
        draw_neighbors(folder / "neighbors.png", images.pixels, x, **picture, **counts, seed=seed)
    coords = None
    with or_warn(judged.session.voice, folder / "map.png"):
        coords = map_2d(x, method=settings.map, seed=seed)
        draw_map(folder / "map.png", coords, **picture, title=judged.subject.name)
    with or_warn(judged.session.voice, folder / "embeddings.parquet", "its columns score and times_trained"):
        columns, has_columns = training_columns(judged.subject, images, split)
        about |= {"columns": columns, "has_columns": has_columns}
    with or_warn(judged.session.voice, folder / "embeddings.parquet"):
        write_embeddings(folder / "embeddings.parquet", x, coords, **about)
    there = [name for name in ("neighbors.png", "map.png", "embeddings.parquet") if (folder / name).is_file()]
    if there:
        judged.note(f"{judged.subject.name}: {', '.join(there)} in {folder}")


@contextmanager
def or_warn(voice: Voice, path: Path, part: str = "") -> Iterator[None]:
    """Make a picture or a table beside the numbers. Where it fails, a line says so: it costs no number."""
    try:
        yield
    # matplotlib, fonts, a full disk and missing packages raise errors of many types
    except Exception as error:
        reason = first_line(error, 2000)
        voice.note(f"warning: {path} is {f'made without {part}' if part else 'not made'}: {reason}")


EVALUATORS: dict[str, Callable[[Judged], list[Result]]] = {
    "knn": run_knn,
    "linear": run_linear,
    "fewshot": run_fewshot,
    "finetune": run_finetune,
    "diagnose": run_diagnose,
}
