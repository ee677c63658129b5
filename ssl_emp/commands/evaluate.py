"""Judge encoders: encoder -> features -> knn | linear | fewshot | finetune | diagnose | transfer -> one
table, and the rows as JSON.

    python evaluate.py ENCODER [ENCODER ...] EVALUATOR [EVALUATOR ...] [key=value ...] [--out DIR]

ENCODER    a run directory, an encoder directory (model.safetensors and config.json), `random` (the same
network, untrained),
           `pixels` (no network at all), `timm:NAME`, `torchvision:NAME`
EVALUATOR  `knn` (every k of knn.num_neighbors from one search), `linear` (linear.protocol: lbfgs, cached or
augmented), `fewshot` (few
           labels, several draws; fewshot.finetune trains the network too), `finetune` (the whole network),
           `transfer` (transfer.suite, a YAML file of target data sets). Without labels and without a test
           split: `diagnose` (collapse, effective rank, neighbours, a map, embeddings.parquet), `embed`
           (embeddings.parquet of all images)
key=value  data.* and model.* as in pretrain.py; the sections knn, linear, fewshot, finetune, diagnose,
transfer; seed, device,
           batch_size, cache_dir (all of them in ssl_emp/commands/eval_config.py)

A run is judged on the data in its own config.yaml, all others on that of the first run named, without one on
mnist5k; data.source replaces the whole of it. data.max_images limits the train split only; data.holdout=0.2
makes a test split where labels come without one. Features are computed once for an encoder and a data set and
kept in cache_dir. Rows go to RUN/eval/EVALUATOR.json, or to DIR, as soon as an evaluator is done, and are
printed at the end. What cannot be judged is a row with the reason, and the rest goes on. Exit codes: 0 all
was judged, 2 something was not that the user can see to (all other rows are kept), 3 another process was
lost, 1 an error of the program, 128+n stopped by signal n (what was judged is kept).

    python evaluate.py predict RUN/eval/classifier-finetune IMAGES [--out FILE]

says which class each image is, by a classifier that finetune.save=true or linear.save=true kept (python
evaluate.py predict --help).

    torchrun --nproc-per-node 8 evaluate.py ...

Several processes share the forward passes that make the features, each on a GPU of its own where there are
GPUs; the first one fits on them and writes. The numbers are those of one process.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linear_eval import EvalError, Features, extract_features
from linear_eval.augmented import augmented_probe
from linear_eval.diagnose import diagnose, draw_map, draw_neighbors, map_2d, verdict, write_embeddings
from linear_eval.errors import first_line
from linear_eval.features import load_features, save_features
from linear_eval.fewshot import FewShotResult, fewshot, fewshot_probe
from linear_eval.finetune import TrainResult, finetune, state_hash
from linear_eval.knn import import_faiss, knn_accuracies, knn_predict
from linear_eval.linear import HeadResult, LinearResult, linear_probe, multi_label_probe, sgd_probe
from linear_eval.metrics import MULTI_LABEL
from linear_eval.targets import TARGETS, torchvision_target
from linear_eval.transfer import (
    Cell,
    Outcome,
    Target,
    Transfer,
    draw_bars,
    missing_lines,
    parse_suite,
    run_suite,
    tabulate,
    to_csv,
    to_markdown,
    to_rows,
)
from ssl_emp.augment import Recipe, cut_views, draw_params
from ssl_emp.classifier import check_keepable, save_classifier
from ssl_emp.commands.eval_config import EvalConfig, check, parse_overrides
from ssl_emp.commands.ledger import Ledger, Voice
from ssl_emp.commands.predict import predict
from ssl_emp.commands.rows import COLUMNS, Row
from ssl_emp.commands.rows import write_rows as write_rows  # for scripts that add rows of their own
from ssl_emp.commands.subjects import Subject, find_subjects, is_run, read_run_data
from ssl_emp.config import DataConfig, parse_yaml
from ssl_emp.data.holdout import hold_out
from ssl_emp.data.images import (
    EncodedPixels,
    ImageSet,
    NoSplit,
    listed,
    load_images,
    load_source,
    load_test_images,
)
from ssl_emp.data.matching import match_labels
from ssl_emp.device import describe_device, keep_freed_memory, pick_device
from ssl_emp.errors import Parser, RunFailed, UserError, path_argument
from ssl_emp.run.interrupts import Interrupts, Stopped
from ssl_emp.run.ranks import (
    ALONE,
    LostRank,
    NoPlace,
    Ranks,
    connect,
    end_abruptly,
    end_with_line,
    leave_ranks,
)
from ssl_emp.run.report import show_progress
from ssl_emp.run.streams import prepare_streams
from ssl_emp.safe_files import check_inner, check_regular, read_text, write_atomically
from ssl_emp.text import home, quoted

USAGE = (
    "python evaluate.py ENCODER [ENCODER ...] knn|linear|fewshot|finetune|diagnose|embed|transfer "
    "[...] [key=value ...], see --help"
)
AGAIN = ". fix: see what it wrote, and start all of them again"
LONGEST_NAME = 16_384  # bytes; paths have up to 4,096, and a letter may be written as four


# ---- what the user asked for
# -----------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> tuple[list[str], list[str], dict[str, Any], Path | None]:
    """(encoders, evaluators, overrides as nested dicts, --out), each name once and in the order given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=USAGE)
    parser.add_argument("words", nargs="*", metavar="ENCODER | EVALUATOR | key=value")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="write knn.json and linear.json here instead"
    )
    arguments = parser.parse_intermixed_args(argv)
    words = list(dict.fromkeys(arguments.words))
    evaluators = [word for word in words if word in ALL_EVALUATORS]
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    encoders = [at_home(word) for word in words if word not in evaluators and word not in overrides]
    for wanted, kind in ((encoders, "encoder"), (evaluators, "evaluator")):
        if not wanted:
            raise UserError(f"no {kind} named", USAGE)
    return (
        encoders,
        evaluators,
        parse_overrides(overrides),
        None if arguments.out is None else Path(arguments.out),
    )


def at_home(word: str) -> str:
    try:
        return home(word)
    except ValueError as error:
        raise UserError(str(error), "name an encoder") from error


# ---- images
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """What encoders are judged on. Without labels or without a test split there are evaluators that can still
    look at the images.
    """

    train: ImageSet
    test: ImageSet | None
    data: DataConfig
    held_out: bool = False  # `test` is a part of what was the train split
    no_test: Exception | None = None  # why there is no test split
    no_labels: Exception | None = None  # why nothing can be predicted

    @property
    def labelled(self) -> tuple[ImageSet, ImageSet]:
        """(train, test) with labels numbered alike. Raises UserError or EvalError where there is nothing to
        predict.
        """
        for problem in (self.no_labels, self.no_test):
            if problem is not None:
                raise problem
        assert self.test is not None
        return self.train, self.test

    @property
    def described(self) -> str:
        """Every setting of the data that moves a number, for the row; `DATA_UNSAID` has the others."""
        data = self.data
        said = [f"{data.source} {self.train.pixels.shape[-1]}px"]
        said += [f"test {data.test_source}"] if data.test_source else []
        said += [f"judged on {self.test.stand_in}"] if self.test is not None and self.test.stand_in else []
        said += (
            [f"subset {data.subset_seed} of {data.max_images} images"] if data.max_images is not None else []
        )
        said += (
            [f"{100 * (data.holdout or 0):g}% of every class held out by seed {data.subset_seed}"]
            if self.held_out
            else []
        )
        said += [f"JPEG quality {data.jpeg_quality}"] if self.train.store == "encoded" else []
        others = {
            key: value
            for key, value in data.model_dump().items()
            if key not in DATA_SAID and key not in DATA_UNSAID
        }
        said += [
            f"{key}={value}" for key, value in others.items() if value != DataConfig.model_fields[key].default
        ]
        return ", ".join(said)


DATA_SAID = ("source", "image_size", "test_source", "max_images", "subset_seed", "holdout", "jpeg_quality")
# cannot move a number of an evaluation, or only through what is said
DATA_UNSAID = ("labels", "label_noise", "download_dir", "store", "cache_dir")


def load_splits(data: DataConfig, image_size: int | None, voice: Voice) -> Splits:
    """Train and test, of one size and labelled alike. Raises UserError where the train split cannot be
    loaded, or a test source.
    """
    common: dict[str, Any] = {
        "labels": data.labels,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "max_pixels": data.max_pixels,
        "jpeg_quality": data.jpeg_quality,
        "download_dir": data.download_dir,
        "cache_dir": data.cache_dir,
    }

    def load_train(store: str) -> ImageSet:
        return load_images(
            data.source,
            "train",
            kind=data.kind,
            image_size=image_size,
            max_images=data.max_images,  # of the train split only: all of the test split counts
            subset_seed=data.subset_seed,
            store=store,
            progress=voice.progress("train images"),
            **common,
        )

    def load_test(like: ImageSet) -> ImageSet:
        return load_test_images(
            data.source,
            data.test_source,
            kind=data.kind,
            image_size=like.pixels.shape[-1],
            # both splits lose what JPEG loses, or neither
            store="encoded" if like.store == "encoded" else data.store,
            progress=voice.progress("test images"),
            **common,
        )

    train, test, no_test = load_train(data.store), None, None
    try:
        test = load_test(train)
    except UserError as error:
        if data.test_source is not None:
            raise
        no_test = error
    held_out = False
    if (
        data.holdout is not None
        and data.test_source is None
        and test is not None
        and test.labels is None
        and train.labels is not None
    ):
        voice.note(f"the test split of {data.source} has no labels, so data.holdout is in its place")
        test, no_test = (
            None,
            NoSplit(
                f"{data.source} has no test split with labels", "name one with data.test_source=LABELLED"
            ),
        )
    if data.holdout is not None and test is not None:
        voice.note(f"data.holdout is not used: {data.test_source or data.source} has a test split")
    elif data.holdout is not None and train.labels is not None and isinstance(no_test, NoSplit):
        # parts of a mapped tensor would be copied into memory, parts of encoded images are not
        if train.store == "raw":
            train = load_train("encoded")
        train, test = hold_out(train, data.holdout, data.subset_seed)
        held_out = True
        if len(test.names):
            no_test = None
            what = (
                f"{len(test.names):,} of {len(train.names) + len(test.names):,} images of "
                f"{data.source} are held out as test"
            )
            voice.note(
                f"{what}; an encoder that was trained on this data has seen them, without their labels"
            )
        else:
            test = None
            what = (
                f"data.holdout={data.holdout:g} leaves no image of {data.source} to test on, since "
                "two of every class stay in train"
            )
            no_test = UserError(what, "raise data.holdout, or give more images of a class")
    elif isinstance(no_test, NoSplit):
        fix = (
            "hold a part of the train images out with data.holdout=0.2, or name other images with "
            "data.test_source=LABELLED"
        )
        no_test = UserError(f"{data.source} has no test split", fix)

    no_labels: UserError | None = None
    for split, images, source in (
        ("train", train, data.source),
        ("test", test, data.test_source or data.source),
    ):
        if images is None:
            continue
        if images.skipped:
            voice.note(f"{len(images.skipped)} unreadable images left out of the {split} split of {source}")
        for line in (*images.notes, *([images.dim_line] if images.dim else [])):
            voice.note(f"the {split} split of {source}: {line}")
        if images.labels is None and no_labels is None:
            sort = (
                "sort the images into a folder for each class, add a column `label`, or name "
                "labelled ones with data.source=LABELLED"
            )
            if split == "test" and data.test_source is None and data.labels != "none":
                sort = (
                    "hold a part of the train images out with data.holdout=0.2, or name labelled "
                    "ones with data.test_source=LABELLED"
                )
            no_labels = UserError(
                (
                    f"the {split} split of {source} has {images.labelled}, and encoders are judged by "
                    "predicting them"
                ),
                "drop data.labels=none" if data.labels == "none" else f"{sort}; diagnose and embed need none",
            )
    if test is not None:
        if no_labels is None:
            try:
                test, lacking = match_labels(train, test)
                if lacking:
                    voice.note(f"warning: {lacking}")
            except UserError as error:
                no_labels = error
        warn_of_overlap({"train": train}, test, voice)
    return Splits(train, test, data, held_out, no_test, no_labels)


def warn_of_overlap(fitted: dict[str, ImageSet], test: ImageSet, voice: Voice, where: str = "") -> None:
    """A line for each split, by its name, that holds images of the test split."""
    hashes = image_hashes(test.pixels)
    for name, images in fitted.items():
        shared = len(image_hashes(images.pixels) & hashes)
        if shared:
            voice.note(
                f"warning: {where}{shared} of {len(hashes)} distinct test images also occur in "
                f"the {name} split, pixel by pixel"
            )


def image_hashes(pixels: Tensor | EncodedPixels) -> set[bytes]:
    """Of images (N, 3, S, S), decoded 256 at a time."""
    chunks = (pixels[start : start + 256] for start in range(0, len(pixels), 256))
    return {
        hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        for chunk in chunks
        for image in chunk
    }


# ---- evaluators: one encoder on one data set -> results
# --------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One line of the table: value as printed (percent for accuracies), `std` over draws where there are
    several.
    """

    protocol: str
    value: float
    metric: str = "top1 %"
    std: float | None = None
    n_test: int | None = None  # images that it is about; None: the test split
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
        """Of the train and the test split, with labels. Raises UserError or EvalError where there is nothing
        to predict.
        """
        _, train_labels, _, test_labels = self.splits
        return Features(self.rows["train"], train_labels), Features(self.rows["test"], test_labels)

    @property
    def feature_dim(self) -> int:
        return self.rows["train"].shape[1]

    @property
    def splits(self) -> tuple[Any, Tensor, Any, Tensor]:
        """(train pixels, train labels, test pixels, test labels); raises as `features`."""
        train, test = self.data.labelled
        assert train.labels is not None and test.labels is not None
        return train.pixels, train.labels, test.pixels, test.labels

    def checkpoint(self, evaluator: str) -> Path | None:
        """The file that an interrupted training goes on from, its name for `linear_eval.finetune` to
        complete.

        Scripts that look whether `finetune.pt` is there know that a training is under way, or was
        interrupted: so the folder's name.
        """
        if self.out is None:
            return None
        check_inner(self.out, f"{evaluator}.pt")
        return self.out / f"{evaluator}.pt" / "{key}.pt"

    def views(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        """Random crop and flip, as in the literature's probes: (epoch, rows, uint8 images) -> (B, 3, S, S) in
        [0, 1].
        """
        size = self.train.pixels.shape[-1]
        recipe = Recipe(size, jitter_prob=0.0, gray_prob=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        seed = self.config.seed
        return lambda epoch, index, images: cut_views(
            images, draw_params(seed, epoch, index, recipe, size)[:1], recipe
        )[0]


def features_key(encoder: nn.Module, images: ImageSet, *how: object) -> str:
    """Name for the features of these images: a hash of the network, its weights and buffers, all pixels, and
    `how` they are made.
    """
    made_of = f"{encoder!r} {state_hash(encoder)} {images.content['pixels']} {how}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:32]


def features_path(judged: Judged, images: ImageSet) -> Path | None:
    """Where these features are kept; None where they are not."""
    config, device = judged.config, judged.device
    # pixels are their own cache
    if config.cache_dir is None or not any(True for _ in judged.encoder.parameters()):
        return None
    # what the rounding depends on is part of the key: a number is the same with a cache and without
    processor = describe_device(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    key = features_key(judged.encoder, images, config.batch_size, device.type, processor, torch.__version__)
    return Path(config.cache_dir) / f"{key}.safetensors"


def extract(judged: Judged, images: ImageSet, split: str) -> Features:
    """Features of one split, from the cache where they are; the labels of images without any are zeros, which
    nobody reads.

    The first process looks, decides and writes. Where it finds the features, the others get no rows: the work
    that they would share is done.
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
    chosen = f"chosen on {100 * linear.val_fraction:g}% of {len(judged.train.names)} train, refit"
    if linear.protocol == "augmented":
        epochs = linear.epochs or 90
        progress = show_progress(f"{judged.subject.name}: linear steps")
        given: dict[str, Any] = {
            "views": judged.views(),
            "seed": seed,
            "epochs": epochs,
            "val_fraction": linear.val_fraction,
        }
        given |= {"checkpoint": judged.checkpoint("linear"), "warn": judged.note}
        tuned = augmented_probe(
            judged.encoder, judged.feature_dim, *judged.splits, device=device, progress=progress, **given
        )
        how = (
            f"augmented linear probe, crop+flip, raw features, SGD Nesterov 0.9, {epochs} epochs, "
            "batch 256, cosine"
        )
        how += f", lr={tuned.lr:g}*batch/256"
        return [finished(judged, "linear", f"{how} {chosen}", tuned, linear.save)]
    train, test = judged.features
    if linear.protocol == "cached":
        epochs = linear.epochs or 100
        heads = sgd_probe(
            train, test, seed=seed, val_fraction=linear.val_fraction, epochs=epochs, device=device
        )
        how = (
            f"linear heads on cached features, SGD, {epochs} epochs, batch 256, "
            f"lr={heads.learning_rate:g} wd={heads.weight_decay:g}"
        )
        return [finished(judged, "linear", f"{how} {chosen}", heads, linear.save)]
    settings: dict[str, Any] = {
        "val_fraction": linear.val_fraction,
        "max_iter": linear.max_iter,
        "precision": linear.precision,
    }
    probe = linear_probe(train, test, seed=seed, device=device, **settings)
    how = (
        f"logistic regression on standardised frozen features, L-BFGS, <= {linear.max_iter} steps, "
        f"l2={probe.l2:.3g} of 45"
    )
    how += f", {linear.precision}" if linear.precision != "float32" else ""
    return [finished(judged, "linear", f"{how} {chosen}", probe, linear.save)]


def run_fewshot(judged: Judged) -> list[Result]:
    few, seed, device = judged.config.fewshot, judged.config.seed, judged.device
    train, test = judged.features
    wanted: list[dict[str, Any]] = [{"fraction": fraction} for fraction in few.fractions] + [
        {"per_class": n} for n in few.per_class
    ]
    if not wanted:
        raise UserError(
            "fewshot.fractions and fewshot.per_class are both empty",
            "give at least one, such as fewshot.per_class=[10]",
        )
    train_pixels, train_labels, test_pixels, test_labels = judged.splits

    def tuned(rows: Tensor, draw_seed: int) -> float:
        given: dict[str, Any] = {
            "views": judged.views(),
            "seed": draw_seed,
            "epochs": few.epochs,
            "device": device,
        }
        subset = (train_pixels[rows], train_labels[rows], test_pixels, test_labels)
        return finetune(judged.encoder, judged.feature_dim, *subset, **given).top1

    def line(found: FewShotResult, how: str) -> Result:
        what = (
            f"few labels: {found.per_class} a class, {found.num_labels} labels, "
            f"{len(found.accuracies)} draws, {how}"
        )
        return Result(what, 100 * found.mean, std=100 * found.std)

    results = []
    for size in wanted:
        found = fewshot_probe(train, test, seed=seed, num_draws=few.num_draws, device=device, **size)
        l2 = "l2=0.1 fixed" if found.per_class == 1 else "l2 chosen on held-out labels"
        results.append(line(found, f"logistic regression on frozen features, {l2}"))
        if few.finetune:
            found = fewshot(train_labels, tuned, seed=seed, num_draws=few.num_draws, **size)
            results.append(
                line(found, f"fine-tuned {few.epochs} epochs, crop+flip, batch <= 256, lr=0.05*batch/256")
            )
    return results


def run_finetune(judged: Judged) -> list[Result]:
    tune = judged.config.finetune
    if tune.save:
        check_savable(judged, "finetune")
    progress = show_progress(f"{judged.subject.name}: fine-tuning steps")
    given: dict[str, Any] = {
        **tune.model_dump(exclude={"save"}),
        "views": judged.views(),
        "seed": judged.config.seed,
    }
    given |= {
        "device": judged.device,
        "checkpoint": judged.checkpoint("finetune"),
        "progress": progress,
        "warn": judged.note,
    }
    result = finetune(judged.encoder, judged.feature_dim, *judged.splits, **given)
    chosen = f" (chosen on {100 * tune.val_fraction:g}% of train, refit)" if len(set(tune.lr)) > 1 else ""
    how = (
        f"fine-tuned on {len(judged.train.names)} train, crop+flip, SGD Nesterov 0.9, {tune.epochs} "
        f"epochs, batch {tune.batch_size}"
    )
    how += f", cosine, lr={result.lr:g}*batch/256{chosen}, wd={tune.weight_decay:g}"
    for text, value, usual in (
        ("warm-up {:g} epochs", tune.warmup_epochs, 0),
        ("label smoothing {:g}", tune.label_smoothing, 0),
        ("layer decay {:g}", tune.layer_decay, 1),
    ):
        how += f", {text.format(value)}" if value != usual else ""
    how += ", bf16" if tune.bf16 else ""
    return [finished(judged, "finetune", how, result, tune.save)]


def check_savable(judged: Judged, evaluator: str) -> None:
    """Raises UserError where the classifier could not be kept, before it is trained."""
    if judged.out is None:
        raise UserError(
            f"{evaluator}.save=true has no place to keep the classifier in", "judge a run, or give --out DIR"
        )
    check_keepable(judged.encoder, judged.subject.name)


def finished(
    judged: Judged, evaluator: str, protocol: str, found: TrainResult | LinearResult | HeadResult, save: bool
) -> Result:
    """The row of a classifier. Once it is kept, so is the classifier where that is asked for, and a
    checkpoint that is done goes.
    """

    def then() -> None:
        if save and judged.out is not None:
            keep_classifier(judged, judged.out / f"classifier-{evaluator}", protocol, found)
        if isinstance(found, TrainResult) and found.checkpoint is not None:
            with suppress(OSError):
                found.checkpoint.unlink(missing_ok=True)  # a second call trains anew
                found.checkpoint.parent.rmdir()  # not where the checkpoints of other settings wait in it

    return Result(protocol, 100 * found.top1, then=then)


def keep_classifier(
    judged: Judged, folder: Path, protocol: str, found: TrainResult | LinearResult | HeadResult
) -> None:
    names, subject = judged.train.class_names, judged.subject
    class_names = [str(number) if names is None else names[number] for number in found.classes.tolist()]
    encoder, head, bf16 = judged.encoder, found.head, isinstance(found, TrainResult) and found.classifier.bf16
    if isinstance(found, TrainResult):
        encoder = found.classifier.encoder
    about: dict[str, Any] = {
        "encoder": subject.name,
        "data": subject.data.source,
        "protocol": f"{protocol}, {subject.weights}",
    }
    about |= {"top1": found.top1, "n_test": len(judged.splits[3])}
    size = judged.train.pixels.shape[-1]
    save_classifier(folder, encoder, subject.name, head, class_names, size, bf16=bf16, judged=about)
    judged.note(f"the classifier is in {folder}; use it: python evaluate.py predict {quoted(folder)} IMAGES")


@torch.no_grad()
def run_diagnose(judged: Judged) -> list[Result]:
    """Label-free figures of the features of one split; pictures and embeddings where rows are kept, once
    these are.
    """
    settings, seed = judged.config.diagnose, judged.config.seed
    split = settings.split if settings.split in judged.images else "train"
    if split != settings.split:
        judged.note(f"{judged.subject.data.source} has no test split: diagnose looks at the train split")
    images, x = judged.images[split], judged.rows[split]
    rows = (
        torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[
            : min(2048, settings.max_samples)
        ]
        .sort()
        .values
    )
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
    counts: dict[str, Any] = {
        "num_queries": settings.num_queries,
        "num_neighbors": min(settings.num_neighbors, len(x) - 1),
    }
    about: dict[str, Any] = {"names": images.names, **picture}
    with beside(judged.session.voice, folder / "neighbors.png"):
        draw_neighbors(folder / "neighbors.png", images.pixels, x, **picture, **counts, seed=seed)
    coords = None
    with beside(judged.session.voice, folder / "map.png"):
        coords = map_2d(x, method=settings.map, seed=seed)
        draw_map(folder / "map.png", coords, **picture, title=judged.subject.name)
    with beside(judged.session.voice, folder / "embeddings.parquet", "its columns score and times_trained"):
        columns, has_columns = training_columns(judged.subject, images, split)
        about |= {"columns": columns, "has_columns": has_columns}
    with beside(judged.session.voice, folder / "embeddings.parquet"):
        write_embeddings(folder / "embeddings.parquet", x, coords, **about)
    there = [name for name in ("neighbors.png", "map.png", "embeddings.parquet") if (folder / name).is_file()]
    if there:
        judged.note(f"{judged.subject.name}: {', '.join(there)} in {folder}")


@contextmanager
def beside(voice: Voice, path: Path, part: str = "") -> Iterator[None]:
    """Makes a picture or a table beside the numbers. Where it cannot be made, a line says so: it never costs
    a number.
    """
    try:
        yield
    # whatever a library of pictures, a font, a full disk or a missing package comes up with
    except Exception as error:
        reason = first_line(error, 2000)
        voice.note(
            f"warning: {path} is made without {part}: {reason}"
            if part
            else f"warning: {path} is not made: {reason}"
        )


def run_embed(judged: Judged) -> list[Result]:
    """The features of all images of all splits, as embeddings.parquet: index, path, split, labels where there
    are any, vector.
    """
    if judged.out is None:
        raise UserError(
            "embed has no folder to write into", "name a run among the encoders, or give --out DIR"
        )
    path = judged.out / "embed" / "embeddings.parquet"
    sets = judged.images
    labels = [images.labels for images in sets.values() if images.labels is not None]
    labelled = len(labels) == len(sets) and judged.data.no_labels is None
    write_embeddings(
        path,
        torch.cat([judged.rows[split] for split in sets]),
        names=[name for images in sets.values() for name in images.names],
        splits=[split for split, images in sets.items() for _ in images.names],
        labels=torch.cat(labels) if labelled else None,
        class_names=judged.train.class_names if labelled else None,
    )
    judged.note(f"{judged.subject.name}: {path}")
    counts = " and ".join(f"{len(images.names)} {split} images" for split, images in sets.items())
    total = sum(len(images.names) for images in sets.values())
    return [
        Result(
            f"embeddings.parquet of {counts}, {judged.feature_dim} features each",
            total,
            "images",
            n_test=total,
        )
    ]


def training_columns(
    subject: Subject, images: ImageSet, split: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """({"score": (N,) float32, "times_trained": (N,) int64}, (N,) bool where they are known) from a run's
    pruning/samples.parquet.

    Joined by name, and only if the images come from the source that the run was trained on: another one may
    have the same names. ({}, None) where the encoder is no run, or one that kept no table.
    """
    import pyarrow as pa

    run = Path(subject.name)
    path = run / "pruning" / "samples.parquet"
    if not is_run(run) or not path.is_file():
        return {}, None
    try:
        table = read_samples(path)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        what = f"{path} cannot be read ({first_line(error)})"
        raise UserError(what, f"move it away, or: python pretrain.py --resume {quoted(run)}") from error
    trained_on = read_run_data(run, {}).source
    source = subject.data.source if split == "train" else subject.data.test_source or subject.data.source
    same = source == trained_on or os.path.realpath(source) == os.path.realpath(trained_on)
    row_of = {name: row for row, name in enumerate(table["name"].to_pylist())} if same else {}
    rows = torch.tensor([row_of.get(name, -1) for name in images.names])
    known = rows >= 0
    columns = {}
    for name, dtype in (("score", torch.float32), ("times_trained", torch.int64)):
        values = torch.tensor(table[name].to_numpy(), dtype=dtype)
        columns[name] = torch.zeros(len(rows), dtype=dtype)
        columns[name][known] = values[rows[known]]
    return columns, known


def read_samples(path: Path) -> Any:
    """A run's table of samples as a pyarrow.Table of name (text), score and times_trained (numbers).

    What it says of itself is compared with the size of the file before it is read: a few bytes may stand for
    any number of rows.

    Raises:
        UserError: no regular file.
        ValueError, pyarrow.ArrowException, OSError: not such a table.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    size = check_regular(path)
    file = pq.ParquetFile(
        path, read_dictionary=["name"], thrift_string_size_limit=1 << 26, thrift_container_size_limit=1 << 20
    )
    schema, rows = file.schema_arrow, file.metadata.num_rows
    kinds = {
        "name": lambda kind: kind.equals(pa.dictionary(pa.int32(), pa.string())) or pa.types.is_string(kind)
    }
    kinds |= {"score": pa.types.is_floating, "times_trained": pa.types.is_integer}
    for name, fits in kinds.items():
        if schema.names.count(name) != 1 or not fits(schema.field(name).type):
            raise ValueError(f"it has no column {name} of the type that a run writes")
    if rows > size:  # every name is another one, and takes a byte at the least
        raise ValueError(f"{rows:,} rows in {size:,} bytes")
    table = file.read(columns=list(kinds))
    names = table["name"].combine_chunks() if len(table) else table["name"]
    spelled = names.dictionary if pa.types.is_dictionary(names.type) and len(table) else names
    if len(table) != rows or any(table[name].null_count for name in ("name", "times_trained")):
        raise ValueError("it does not hold the rows that it lists")
    if rows and pc.max(pc.binary_length(spelled)).as_py() > LONGEST_NAME:
        raise ValueError(f"a name has more than {LONGEST_NAME} bytes")
    return table


EVALUATORS: dict[str, Callable[[Judged], list[Result]]] = {
    "knn": run_knn,
    "linear": run_linear,
    "fewshot": run_fewshot,
    "finetune": run_finetune,
    "diagnose": run_diagnose,
    "embed": run_embed,
}
ALL_EVALUATORS = (*EVALUATORS, "transfer")


# ---- a suite of target data sets
# -------------------------------------------------------------------------------------


def load_target(
    target: Target, image_size: int | None, config: EvalConfig, voice: Voice
) -> dict[str, ImageSet]:
    """The splits of a target, of one size, with labels numbered alike: `train`, `val` where it has one,
    `test`.
    """
    data, size = config.data, target.image_size or image_size
    options: dict[str, Any] = {
        "jpeg_quality": data.jpeg_quality,
        "cache_dir": data.cache_dir,
        "store": data.store,
    }
    options["max_pixels"] = data.max_pixels
    splits: dict[str, ImageSet] = {}
    for part, split in (
        ("train", target.train_split),
        ("val", target.val_split),
        ("test", target.test_split),
    ):
        if split is None:
            continue
        given: dict[str, Any] = {
            **options,
            "image_size": size,
            "max_images": target.max_images if part == "train" else None,
        }
        if target.source in TARGETS and target.source not in ("cifar10", "cifar100"):
            listing = torchvision_target(
                target.source, config.transfer.root, split, download=config.transfer.download
            )
            name = f"{target.source}/{split}"
            images = load_source(
                listed(listing.sources, listing.labels, listing.class_names, name), name, **given
            )
        else:
            images = load_images(target.source, split, download_dir=config.transfer.root, **given)
        if images.labels is None:
            raise UserError(
                f"the {split} split of {target.source} has {images.labelled}",
                "leave it out of the suite, or label it",
            )
        size = images.pixels.shape[-1]
        if part != "train":
            images, lacking = match_labels(splits["train"], images, part)
            for line in (*images.notes, *([lacking] if lacking else [])):
                voice.note(f"warning: {target.name}: {line}")
        splits[part] = images
    warn_of_overlap(
        {part: images for part, images in splits.items() if part != "test"},
        splits["test"],
        voice,
        f"{target.name}: ",
    )
    return splits


def judge_target(
    session: Session, subject: Subject, target: Target, splits: dict[str, ImageSet]
) -> tuple[Outcome, str]:
    """One encoder on one target by the target's protocol, and the hash of its weights."""
    size = splits["train"].pixels.shape[-1]
    config, device = session.config, session.device
    with session.ranks.together():
        encoder = build(subject, size, device)
    judged = Judged(session, subject, encoder, Splits(splits["train"], splits["test"], config.data), None)
    train, test = judged.features
    val = extract(judged, splits["val"], "val") if "val" in splits else None
    if not session.ranks.is_first:
        raise EvalError("process 0 goes on with the features", "see there")
    weights = weights_hash(encoder)
    if target.protocol == "knn":
        both = train if val is None else Features(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
        k = config.knn.num_neighbors[0]
        predicted = knn_predict(
            both, test, num_neighbors=k, temperature=config.knn.temperature, device=device
        )
        vote = "majority" if config.knn.temperature is None else f"T={config.knn.temperature:g}"
        return Outcome(
            predicted, test.y, f"cosine kNN, k={k}, {vote}, bank {len(both.x)}, {size}px, {subject.weights}"
        ), weights
    chosen = f"val ({len(val.x)})" if val is not None else f"{100 * config.linear.val_fraction:g}% of train"
    if target.metric in MULTI_LABEL:
        found = multi_label_probe(
            train,
            test,
            target.metric,
            seed=config.seed,
            val=val,
            val_fraction=config.linear.val_fraction,
            device=device,
        )
        points = "11-point AP of VOC2007" if target.metric == "voc_map" else "AP over all points"
        low, high = found.l2.min().item(), found.l2.max().item()
        protocol = (
            f"lbfgs, a binary regression for each of {test.y.shape[1]} classes, "
            f"l2={low:.3g}..{high:.3g} of 45 in 1e-6..1e5 by {points}"
        )
        protocol += (
            f" on {chosen}, refit on train+val, difficult objects not counted, {size}px, {subject.weights}"
        )
        return Outcome(found.scores, test.y, protocol), weights
    if target.protocol == "linear":
        heads = sgd_probe(
            train, test, seed=config.seed, val=val, val_fraction=config.linear.val_fraction, device=device
        )
        return Outcome(
            heads.predicted,
            test.y,
            f"linear heads, SGD, chosen on {chosen}, refit, {size}px, {subject.weights}",
        ), weights
    probe = linear_probe(
        train, test, seed=config.seed, val=val, val_fraction=config.linear.val_fraction, device=device
    )
    protocol = (
        f"lbfgs, l2={probe.l2:.3g} of 45 in 1e-6..1e5 chosen on {chosen}, refit on train+val, "
        f"{size}px, {subject.weights}"
    )
    return Outcome(probe.predicted, test.y, protocol), weights


def check_places(folder: Path | None, subject: Subject) -> None:
    """Raise UserError where a folder that an evaluation writes to is a link in somebody's run directory, and
    leads elsewhere.
    """
    if folder is None:
        return
    root, names = (folder.parent, [folder.name]) if folder == subject.eval_dir else (folder, [])
    if not (subject.eval_dir and is_run(Path(subject.name))):
        names = [*names, safe_name(subject.name)]
    check_inner(root, *names)
    for inner in ("diagnose", "embed", "classifier-finetune", "classifier-linear"):
        check_inner(root, *names, inner)


def run_transfer(session: Session, subjects: list[Subject], folder: Path | None) -> None:
    """Every encoder on every target of transfer.suite; each cell is kept in `folder` at once."""
    config, ranks, ledger = session.config, session.ranks, session.ledger
    path = Path(config.transfer.suite)
    if not path.is_file():  # a pipe or a device would be read for ever
        raise UserError(
            f"transfer.suite={path} is no file",
            "give transfer.suite=FILE.yaml, such as configs/suites/small.yaml",
        )
    suite = parse_suite(parse_yaml(read_text(path), str(path)), str(path))
    by_name = {subject.name: subject for subject in subjects}
    loaded: dict[tuple[str, int | None], dict[str, ImageSet] | Exception] = {}
    judged: dict[tuple[str, str], Row] = {}  # (encoder, data set) -> hashes of its weights and images
    cells: dict[tuple[str, str], Cell] = {}

    def evaluate_pair(name: str, target: Target) -> Outcome:
        subject = by_name[name]
        with ranks.together():
            subject.check()
        key = (target.name, target.image_size or subject.image_size)
        if key not in loaded:
            for other in [other for other in loaded if other[0] != target.name]:
                del loaded[other]  # one target's images at a time
            try:
                with ranks.first_then_others():
                    loaded[key] = load_target(target, subject.image_size, config, session.voice)
            except MISTAKES as error:
                loaded[key] = error
        splits = loaded[key]
        if not isinstance(splits, dict):
            raise splits
        session.voice.note(f"{target.name}: {name}")
        outcome, weights = judge_target(session, subject, target, splits)
        judged[name, target.name] = {"weights": weights, "images": images_hash(splits.values())}
        return outcome

    def rows_of(transfer: Transfer) -> list[Row]:
        about: Row = {"seed": config.seed, "draws": config.transfer.num_draws}
        return [row | about | judged.get((row["encoder"], row["data"]), {}) for row in to_rows(transfer)]

    def keep(cell: Cell) -> None:
        cells[cell.encoder, cell.target.name] = cell
        if ranks.is_first and cell.measured is not None:  # its rank is known at the end
            ledger.keep(folder, [rows_of(tabulate(suite.name, [cell]))[0] | {"rank": None}], in_table=False)

    given: dict[str, Any] = {"num_draws": config.transfer.num_draws, "seed": config.seed, "done": keep}
    try:
        run_suite(suite, list(by_name), evaluate_pair, missing=MISTAKES, **given)
    finally:  # a suite that was stopped has its cells
        pairs = [(name, target) for name in by_name for target in suite.targets]
        left = "stopped before it was judged"
        transfer = tabulate(
            suite.name, [cells.get((name, t.name), Cell(name, t, "", None, left)) for name, t in pairs]
        )
        if ranks.is_first and cells:
            with ledger.interrupts.held():
                # a mean over what was done is no result of the suite
                means = len(transfer.cells) if len(cells) == len(pairs) else 0
                ledger.keep(folder, rows_of(transfer)[: len(transfer.cells) + means], in_table=False)
                if folder is not None:
                    with beside(session.voice, folder / "transfer.csv"):
                        write_atomically(folder / "transfer.csv", to_csv(transfer).encode(), shared=True)
                ledger.show()
                ledger.print(to_markdown(transfer) + "".join(f"{line}\n" for line in missing_lines(transfer)))
    if ranks.is_first and folder is not None and any(cell.measured is not None for cell in transfer.cells):
        with beside(session.voice, folder / "transfer.png"):
            draw_bars(transfer, folder / "transfer.png")


def images_hash(sets: Iterable[ImageSet | None]) -> str:
    """Twelve hexadecimal digits of all pixels, labels and names."""
    contents = [None if images is None else images.content for images in sets]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]


def weights_hash(encoder: nn.Module) -> str:
    """Twelve hexadecimal digits of an encoder's weights and buffers; empty where it has learned nothing."""
    return state_hash(encoder)[:12] if any(True for _ in encoder.parameters()) else ""


# ---- encoder -> features -> evaluators -> table
# ----------------------------------------------------------------------


def build(subject: Subject, image_size: int, device: torch.device) -> nn.Module:
    """The encoder in eval mode on the device, or a UserError where it takes no images of this size."""
    encoder = subject.build(image_size).eval().to(device)
    try:
        with torch.inference_mode():
            encoder(torch.zeros(1, 3, image_size, image_size, device=device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:  # each network complains in its own way
        reason = first_line(error, 120)
        what = f"{subject.name} takes no images of {image_size}x{image_size} pixels ({reason})"
        raise UserError(what, f"set data.image_size={subject.image_size or 224}, or leave it out") from error
    return encoder


def judge(
    session: Session,
    subject: Subject,
    splits: Callable[[], Splits],
    evaluators: list[str],
    folder: Path | None,
) -> None:
    """Rows of one encoder, evaluator by evaluator, each kept in `folder` at once; its features are computed
    once.

    What one evaluator refuses, or all of them, is a row without a value; the others go on.
    """
    ranks, ledger = session.ranks, session.ledger
    out = (
        None
        if folder is None
        else folder / ("" if subject.eval_dir and is_run(Path(subject.name)) else safe_name(subject.name))
    )
    row: Row = dict.fromkeys(COLUMNS) | {
        "encoder": subject.name,
        "data": subject.data.source,
        "metric": "",
        "seed": session.config.seed,
    }
    with one_failure(session, [row | {"evaluator": evaluator} for evaluator in evaluators], shared=True):
        with ranks.together():
            subject.check()
        check_places(folder, subject)
        found = splits()
        with ranks.together():
            encoder = build(subject, found.train.pixels.shape[-1], session.device)
        judged = Judged(session, subject, encoder, found, out)
        before = state_hash(encoder)
        _ = judged.rows
        if not ranks.is_first:
            return
        row |= {"data": found.described, "n_test": None if found.test is None else len(found.test.names)}
        row |= {"weights": weights_hash(encoder), "images": images_hash((found.train, found.test))}
        for evaluator in evaluators:
            row |= {"evaluator": evaluator}
            with one_failure(session, [row]):
                results = EVALUATORS[evaluator](judged)
                if state_hash(judged.encoder) != before:
                    what = f"{subject.name} changed while {evaluator} judged it"
                    raise UserError(what, "use an encoder that writes no state in its forward pass")
                ledger.keep(folder, [row | columns(result, subject) for result in results])
                for result in results:
                    if result.then is not None:
                        result.then()


def columns(result: Result, subject: Subject) -> Row:
    """What a result says in its row. Raises EvalError where its value is not finite: JSON has no such."""
    if not math.isfinite(result.value):
        raise EvalError(
            f"{result.metric} is {result.value}", "use another checkpoint: this encoder has diverged"
        )
    digits = 2 if result.metric.endswith("%") else 4
    std = None if result.std is None else round(result.std, 2)
    about = {"protocol": f"{result.protocol}, {subject.weights}", "metric": result.metric}
    value = result.value if isinstance(result.value, int) else round(result.value, digits)
    return about | {"value": value, "std": std} | ({} if result.n_test is None else {"n_test": result.n_test})


MISTAKES = (UserError, EvalError, RunFailed)  # RunFailed: another process failed in what is done together


@contextmanager
def one_failure(session: Session, rows: list[Row], *, shared: bool = False) -> Iterator[None]:
    """What goes wrong in here costs these rows, and nothing else.

    Args:
        shared: the processes work together in here. An error that one of them does not tell the others of
            has to end it: they wait.
    """
    config, device, ranks, ledger = session.config, session.device, session.ranks, session.ledger
    try:
        yield
        return
    except LostRank:
        raise
    except MISTAKES as caught:
        error: Exception = caught
    except (torch.OutOfMemoryError, MemoryError) as caught:
        error = out_of_memory(config, device)
        error.__cause__ = caught
    except Exception as caught:
        if shared and ranks.world_size > 1:
            raise
        # as torch says it on a CPU
        error = out_of_memory(config, device) if "can't allocate memory" in str(caught) else caught
    if ranks.is_first:
        for row in rows:
            if isinstance(error, MISTAKES):
                ledger.refuse(row, error)
            else:
                ledger.crash(row, error)
    else:
        ledger.code = ledger.code or 2


def out_of_memory(config: EvalConfig, device: torch.device) -> UserError:
    what = f"batch_size={config.batch_size} does not fit into the memory of {device}"
    return UserError(what, f"set batch_size={max(1, config.batch_size // 4)}")


def find_work(
    argv: list[str] | None, ranks: Ranks
) -> tuple[list[Subject], list[str], EvalConfig, torch.device, Path | None]:
    """The command line as (encoders, evaluators, settings, device, --out)."""
    names, evaluators, given, out = parse_arguments(argv)
    config = check(EvalConfig, given, "the command line")
    device = own_device(pick_device(config.device), ranks)
    names = [os.path.normpath(name) if os.path.exists(name) else name for name in names]
    return find_subjects(names, config, given, ALL_EVALUATORS), evaluators, config, device, out


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The GPU of this process, one each."""
    if device.type != "cuda" or ranks.world_size == 1:
        return device
    count = torch.cuda.device_count()
    if device.index is not None or ranks.local_rank >= count:
        raise UserError(
            f"{ranks.world_size} processes share device={device} ({count} here)",
            "start one process a GPU, or set device=cpu",
        )
    return torch.device("cuda", ranks.local_rank)


def evaluate(argv: list[str] | None, interrupts: Interrupts, ranks: Ranks = ALONE) -> int:
    """Everything that the command line asks for; the exit code."""
    # also mistakes on the command line are told together: torchrun ends all processes as soon as one has
    # ended
    with ranks.first_then_others():
        subjects, evaluators, config, device, out = find_work(argv, ranks)
    ranks.set_timeout(config.timeout_seconds)
    alone = [evaluator for evaluator in evaluators if evaluator != "transfer"]
    ledger = Ledger(interrupts, Voice(ranks.is_first))
    session = Session(config, device, ranks, ledger)
    loaded: dict[tuple[DataConfig, int | None], Splits | Exception] = {}

    def splits_of(subject: Subject) -> Splits:
        key = (subject.data, subject.image_size)
        if key not in loaded:
            try:
                with ranks.first_then_others():
                    splits = load_splits(*key, session.voice)
                try:
                    with ranks.together():  # where one process finds no test split, none has one
                        if splits.no_test is not None:
                            raise splits.no_test
                except MISTAKES as error:
                    splits = replace(splits, test=None, no_test=error)
                loaded[key] = splits
            except MISTAKES as error:
                loaded[key] = error
        found = loaded[key]
        if isinstance(found, Exception):
            raise found
        return found

    try:
        try:
            for subject in subjects if alone else []:
                judge(session, subject, partial(splits_of, subject), alone, out or subject.eval_dir)
        finally:
            ledger.show()
        if "transfer" in evaluators:
            folder = out or next(
                (subject.eval_dir for subject in subjects if subject.eval_dir is not None), None
            )
            if folder is not None and is_run(folder.parent):
                check_inner(folder.parent, folder.name)
            run_transfer(session, subjects, folder)
    finally:
        code = ledger.close()
    return code


def safe_name(name: str) -> str:
    """An encoder's name as a folder name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "encoder"


def main(argv: list[str] | None = None) -> int:
    prepare_streams()
    keep_freed_memory()
    # what model hubs download is read as tensors: no code in it runs
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    words = sys.argv[1:] if argv is None else argv
    ranks = ALONE
    try:
        with Interrupts() as interrupts:
            if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
                ranks = connect(EvalConfig().timeout_seconds, advice=AGAIN)
            if words[:1] == ["predict"]:  # a folder of that name is ./predict
                code = predict(words[1:])
            else:
                code = evaluate(argv, interrupts, ranks)
            leave_ranks(ranks)
        return code
    except NoPlace as error:
        return end_with_line(str(error), 2, ranks, True)
    except (UserError, EvalError) as error:
        return end_with_line(str(error), 2, ranks)
    except LostRank as error:
        return end_with_line(str(error), error.code, ranks, error.speaks, error.lost)
    except Stopped as stopped:
        end_abruptly(ranks, 128 + stopped.number)
        return 128 + stopped.number
    except KeyboardInterrupt:
        end_abruptly(ranks, 130)
        return 130
    except Exception as error:
        ranks.report_failure(f"{type(error).__name__}: {error}", 1)
        raise  # a bug: the traceback is what helps
