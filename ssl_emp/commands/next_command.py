"""The command that comes after a run and works on its data, whatever labels and splits it has."""

import os
from contextlib import suppress
from pathlib import Path

import torch
import yaml

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
    words = "diagnose"
    with suppress(Exception):  # missing or damaged images by now are no reason to fail after training
        words = _words(config) or words
    if in_python:
        return _call(out, words.split())
    name = os.fspath(out)
    name = f"./{name}" if name in WORDS else name
    return f"{command_line('evaluate')} {quoted(name)} {words}"


def _call(out: Path, words: list[str]) -> str:
    """`ssl_emp.evaluate(...)` with the evaluators and settings of a command's words."""
    settings = {
        key: yaml.safe_load(value) for key, equals, value in (w.partition("=") for w in words) if equals
    }
    evaluators = [word for word in words if "=" not in word]
    more = f", config={settings}" if settings else ""
    return f"ssl_emp.evaluate({os.fspath(out)!r}, evaluators={evaluators}{more})"


def _words(config: PretrainConfig) -> str | None:
    """What can be predicted, from a look at names and labels, no pixels; None where nothing can."""
    train = _listed(config, "train")
    if train.labels is None or train.labels.ndim > 1:
        return None
    labels, more = train.labels, ""
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
        labels, more = labels[~held], f" data.holdout={HOLDOUT:g}"
    except UserError:  # other classes than those of train
        return None
    if config.data.max_images is not None and config.data.max_images < len(labels):
        labels = labels[: config.data.max_images]
    if len(labels) < NEIGHBORS:
        more += f" knn.num_neighbors={max(1, len(labels) // 4)}"
    counts = labels.unique(return_counts=True)[1]
    # a linear probe holds images out, and needs two classes
    can_fit = len(counts) > 1 and int(counts.min()) > 1 and config.data.max_images is None
    return f"knn linear{more}" if can_fit else f"knn{more}"


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
