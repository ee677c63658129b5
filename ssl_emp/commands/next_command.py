"""The command that comes after a run and works on its data, whatever labels and splits it has."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from ssl_emp.commands.arguments import EVALUATOR_NAMES
from ssl_emp.commands.eval_config import KnnConfig
from ssl_emp.config import PretrainConfig
from ssl_emp.data.holdout import held_out_rows
from ssl_emp.data.images import ImageSet, NoSplit, find_split
from ssl_emp.data.matching import match_labels
from ssl_emp.errors import UserError
from ssl_emp.text import command_line, quoted

HOLDOUT = 0.2
NEIGHBORS = KnnConfig().num_neighbors[0]
# words of evaluate, which a run of that name would be taken for
WORDS = ("random", "pixels", "predict", *EVALUATOR_NAMES)


def next_command(out: Path, config: PretrainConfig, in_python: bool = False) -> str:
    """`ssl-emp evaluate RUN ...`, as labels allow; without a test split a part of train is held out.

    In Python it is a call. Images that were given there have to be given again.
    """
    if config.data.kind == "object":
        return f"ssl_emp.evaluate({os.fspath(out)!r}, data=(train, test))"
    evaluators, settings = ["diagnose"], dict[str, float]()
    with suppress(Exception):  # missing or damaged images by now are no reason to fail after training
        evaluators, settings = _judged(config) or (evaluators, settings)
    if in_python:
        more = f", config={settings}" if settings else ""
        return f"ssl_emp.evaluate({os.fspath(out)!r}, evaluators={evaluators}{more})"
    name = os.fspath(out)
    name = f"./{name}" if name in WORDS else name
    words = [*evaluators, *(f"{key}={value}" for key, value in settings.items())]
    return f"{command_line('evaluate')} {quoted(name)} {' '.join(words)}"


def _judged(config: PretrainConfig) -> tuple[list[str], dict[str, float]] | None:
    """Evaluators and settings for what can be predicted, from names and labels, without pixels; None where
    nothing can.
    """
    train = _listed(config, "train")
    if train.labels is None or train.labels.ndim > 1:
        return None
    labels, settings = train.labels, dict[str, float]()
    try:
        test = _listed(config, "test")
        if test.labels is None and config.data.test_source is None:
            raise NoSplit("the test split has no labels", "hold a part of the train images out")
        if test.labels is None:
            return None
        match_labels(train, test)
    except NoSplit:
        held = held_out_rows(labels, train.names, HOLDOUT, config.data.subset_seed)
        # a supervised run has seen all labels
        if config.objective == "supervised" or not held.any():
            return None
        labels, settings = labels[~held], {"data.holdout": HOLDOUT}
    except UserError:  # other classes than those of train
        return None
    if config.data.max_images is not None and config.data.max_images < len(labels):
        labels = labels[: config.data.max_images]
    if len(labels) < NEIGHBORS:
        settings["knn.num_neighbors"] = max(1, len(labels) // 4)
    counts = labels.unique(return_counts=True)[1]
    # a linear probe holds images out, and needs two classes
    can_fit = len(counts) > 1 and int(counts.min()) > 1 and config.data.max_images is None
    return ["knn", "linear"] if can_fit else ["knn"], settings


def _listed(config: PretrainConfig, split: str) -> ImageSet:
    """Names, labels and class names of a split, without its pixels."""
    data = config.data
    columns = (data.image_column, data.label_column)
    if split == "test" and data.test_source is not None:
        try:
            found = find_split(data.test_source, "test", "auto", data.download_dir)
        except NoSplit:
            found = find_split(data.test_source, "train", "auto", data.download_dir)
    else:
        found = find_split(data.source, split, data.kind, data.download_dir, *columns)
    labels = None if found.labels is None else torch.from_numpy(found.labels)
    return ImageSet(torch.empty(0), labels, found.names, found.class_names, [])
