"""`ssl-emp evaluate predict CLASSIFIER IMAGES`: a kept classifier -> the class of every image, as CSV.

Images are decoded, classified and written a batch at a time: there may be any number of them, with labels or
without.
"""

import csv
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from ssl_emp.classifier import Classifier, load_classifier
from ssl_emp.commands.arguments import predict_parser, predict_usage
from ssl_emp.commands.eval_config import Count, check, parse_overrides
from ssl_emp.config import LARGEST_BATCH, Section
from ssl_emp.data.decode import MAX_PIXELS, pillow_limits
from ssl_emp.data.images import Source, find_images
from ssl_emp.data.stores import decode_into
from ssl_emp.device import pick_device
from ssl_emp.errors import UserError, path_word, printable
from ssl_emp.run.report import show_progress
from ssl_emp.run.streams import put
from ssl_emp.safe_files import replacing


class PredictConfig(Section):
    top_k: Count = 1
    split: Literal["all", "train", "test"] = "all"
    max_pixels: Annotated[int, Field(ge=1, le=2**40)] = MAX_PIXELS
    batch_size: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = 256
    device: str = "auto"


Row = list[str]


def predict(argv: list[str]) -> int:
    """The command. Raises UserError; gives the exit code, 2 where not one image could be read."""
    arguments = predict_parser().parse_intermixed_args(argv)
    overrides = [word for word in arguments.words if "=" in word and not os.path.exists(word)]
    paths = [path_word(word) for word in arguments.words if word not in overrides]
    if len(paths) < 2:
        raise UserError(
            f"predict needs a classifier and images, {len(paths)} of the two is named", predict_usage()
        )
    config = check(PredictConfig, parse_overrides(overrides, PredictConfig), "the command line")
    device = pick_device(config.device)
    # unchecked: bytes divided by 255 are in range
    classifier = load_classifier(paths[0], check_range=False).to(device)
    sources = [
        (_prefix(path, found, len(paths) > 2), found)
        for path in paths[1:]
        for found in find_images(path, config.split)
    ]

    total, unread, first = 0, 0, ""
    try:
        with _output(Path(arguments.out) if arguments.out else None) as write:
            places = range(2, min(config.top_k, len(classifier.class_names)) + 1)
            further = [word for n in places for word in (f"class_{n}", f"probability_{n}")]
            write(["name", "class", "probability", *further, "problem"])
            for prefix, source in sources:
                for row in rows(classifier, source, config, device):
                    write([prefix + row[0], *row[1:]])
                    total += 1
                    if row[-1]:
                        unread, first = unread + 1, first or f"{prefix + row[0]}: {row[-1]}"
    except BrokenPipeError:  # the reader, such as head, has left
        return 0
    if unread == total:
        fix = "check the files, or name others"
        raise UserError(f"none of {total:,} images could be read" + (f" ({first})" if first else ""), fix)
    if unread:
        print(
            printable(f"{unread:,} of {total:,} images could not be read ({first}); each has a row"),
            file=sys.stderr,
        )
    return 0


def _prefix(path: str, source: Source, is_one_of_several: bool) -> str:
    """What goes before the names of a source, so that those of several can be told apart."""
    if not is_one_of_several or source.names == [path]:
        return ""
    # names of rows begin with the name of their table
    folder = os.path.dirname(path) if os.path.isfile(path) else path.rstrip("/")
    return f"{folder}/" if folder else ""


def rows(
    classifier: Classifier, source: Source, config: PredictConfig, device: torch.device
) -> Iterator[Row]:
    """A row an image, in the source's order; those that could not even be opened come last."""
    size, width = classifier.image_size, 2 * min(config.top_k, len(classifier.class_names))
    positions = np.arange(len(source.names))
    progress = show_progress("images")
    buffer = np.empty((min(config.batch_size, len(positions)), 3, size, size), np.uint8)
    with pillow_limits(config.max_pixels), torch.inference_mode():
        stream = source.read(positions)
        for start in range(0, len(positions), config.batch_size):
            part = positions[start : start + config.batch_size]
            failed = decode_into(
                buffer, lambda chosen: islice(stream, len(chosen)), part, config.max_pixels, None
            ).failed
            images = torch.from_numpy(buffer[: len(part) - len(failed)])
            logits = torch.empty(0, len(classifier.class_names))
            if len(images):
                logits = classifier(images.to(device).float() / 255)
            likely = iter(_likely(classifier, logits, config.top_k))
            for row, position in enumerate(part):
                name = source.names[position]
                yield [name, *[""] * width, failed[row]] if row in failed else [name, *next(likely), ""]
            if progress is not None:
                progress(start + len(part), len(positions))
    for name, why in source.skipped:
        yield [name, *[""] * width, why]


def _likely(classifier: Classifier, logits: torch.Tensor, top_k: int) -> Iterator[Row]:
    """The likeliest classes' names and probabilities of each image, in turns; of equal ones the first."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k].cpu()
    chances = logits.double().softmax(1).cpu()
    for numbers, chance in zip(order.tolist(), chances, strict=True):
        yield [
            cell for number in numbers for cell in (classifier.class_names[number], f"{chance[number]:.6f}")
        ]


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[Row], object]]:
    """A function that writes a row: to standard output, escaped for the terminal, or to a file, as it is.

    The file is there when all of it is.

    Raises:
        BrokenPipeError: the reader of standard output has left.
        UserError: there is no room, or no right to write.
    """
    try:
        if path is None:
            yield _print
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            yield csv.writer(text, lineterminator="\n").writerow
            text.flush()
            text.detach()
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output" if path is None else error.filename or path
        fix = "make room there, or give --out FILE elsewhere"
        raise UserError(f"cannot write {where} ({error.strerror})", fix) from error


def _print(row: Row) -> None:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(map(printable, row))
    error = put("stdout", line.getvalue())
    if error is not None:
        raise error
