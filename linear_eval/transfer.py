"""A transfer suite: target data sets with splits, metric and protocol -> one table encoder x data set.

Data flow: a mapping (from YAML) -> `parse_suite` -> `run_suite`, which calls `evaluate(encoder, target)` for
every pair -> `Transfer` -> `to_rows`, `to_csv`, `to_markdown`, `draw_bars`. How features are made and probed
is the caller's: this module sees predictions.

The protocol it is made for is the linear evaluation of SimCLR's appendix B.8 (Chen et al. 2020, after
Kornblith et al. 2019): images at 224 px, logistic regression on frozen features, l2 chosen on a validation
split, then a fit on train and validation together.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from linear_eval.artifacts import COLOURS, new_figure, save_figure
from linear_eval.errors import EvalError, did_you_mean, first_line
from linear_eval.metrics import MULTI_LABEL, NUM_RESAMPLES, Measured, Metric, measure
from linear_eval.names import csv_cell, markdown_cell, printable, shorten
from linear_eval.targets import TARGETS

Protocol = Literal["lbfgs", "linear", "knn"]
Name = Annotated[str, Field(min_length=1)]
METRIC_NAMES = {"top1": "top1", "mean_per_class": "mean per class", "voc_map": "VOC07 mAP", "map": "mAP"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Strict):
    """One target data set.

    Attributes:
        name: what the table calls it.
        source: a name of `linear_eval.targets.TARGETS`, or whatever else the caller can load (a folder, a
            parquet file).
        train_split, test_split: what is fitted, what is judged.
        val_split: where the regularisation is chosen; it then joins train. None: a part of train is held out.
        metric: see `linear_eval.metrics`.
        protocol: `lbfgs` (SimCLR's), `linear` or `knn`; images with several labels take `lbfgs`, a regression
            for each class.
        image_size: pixels a side. None: as the encoder wants it.
        max_images: of the train split; all of the test split counts.
    """

    name: Name
    source: Name
    train_split: Name = "train"
    val_split: Name | None = None
    test_split: Name = "test"
    metric: Metric = "top1"
    protocol: Protocol = "lbfgs"
    image_size: Annotated[int, Field(ge=1)] | None = None
    max_images: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        splits = [split for split in (self.train_split, self.val_split, self.test_split) if split is not None]
        if len(set(splits)) < len(splits):
            what = f"{self.name}: train_split, val_split and test_split are not three different splits"
            raise ValueError(what)
        if self.source in TARGETS:
            unknown = set(splits) - set(TARGETS[self.source].splits)
            if unknown:
                raise ValueError(
                    f"{self.source} has no split {min(unknown)}, only "
                    f"{', '.join(TARGETS[self.source].splits)}"
                )
            if TARGETS[self.source].multi_label != (self.metric in MULTI_LABEL):
                raise ValueError(f"{self.metric} does not fit the labels of {self.source}")
        if self.metric in MULTI_LABEL and self.protocol != "lbfgs":
            raise ValueError(
                f"{self.name}: {self.metric} needs a score for each class, which protocol "
                f"{self.protocol} does not give"
            )
        return self


class Suite(_Strict):
    """Target data sets under a name."""

    name: Name
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]


class Outcome(NamedTuple):
    """What `evaluate` gives: outputs and labels as for `measure`; the protocol with all choices, in words."""

    outputs: Tensor
    labels: Tensor
    protocol: str


Evaluate = Callable[[str, Target], Outcome]


@dataclass(frozen=True)
class Cell:
    """One encoder on one data set: `measured`, or why there is none."""

    encoder: str
    target: Target
    protocol: str
    measured: Measured | None
    reason: str = ""


@dataclass(frozen=True)
class Transfer:
    """The table of a suite: cells in the order of encoders, then of targets.

    Attributes:
        places: (encoder, data set) -> 1 for the best of that data set; equal values share their mean place.
        complete: data sets that every encoder was judged on.
        macro: encoder -> mean value (0..1) over `complete`; empty when that is.
        mean_place: encoder -> mean place over `complete`; empty likewise.
    """

    suite: str
    cells: tuple[Cell, ...]
    places: dict[tuple[str, str], float]
    complete: tuple[str, ...]
    macro: dict[str, float]
    mean_place: dict[str, float]

    @property
    def encoders(self) -> list[str]:
        return list(dict.fromkeys(cell.encoder for cell in self.cells))

    @property
    def targets(self) -> list[Target]:
        return list({cell.target.name: cell.target for cell in self.cells}.values())

    def cell(self, encoder: str, target: Target) -> Cell:
        return next(cell for cell in self.cells if (cell.encoder, cell.target.name) == (encoder, target.name))


def parse_suite(values: Any, where: str) -> Suite:
    """A suite from `{"name": ..., "defaults": {...}, "targets": [{...}, ...]}`; `defaults` fills in the rest.

    Args:
        values: what the YAML file holds.
        where: the file, for messages.

    Raises:
        EvalError: what does not fit, by its key, with the nearest known key for one that does not exist.
    """
    if not isinstance(values, dict) or not isinstance(values.get("targets"), list):
        fix = "write `name:` and a list of `targets:`, as in configs/suites/simclr.yaml"
        raise EvalError(f"{where} is not a suite", fix)
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, dict):
        fix = "write keys of a target with their values, or leave it out"
        raise EvalError(f"defaults in {where} is {defaults!r}", fix)
    filled = {key: value for key, value in values.items() if key != "defaults"}
    filled["targets"] = [
        defaults | target if isinstance(target, dict) else target for target in values["targets"]
    ]
    try:
        suite = Suite.model_validate(filled)
    except ValidationError as error:
        raise _suite_error(error, where) from error
    names = [target.name for target in suite.targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvalError(f"{where} has two targets named {twice[0]}", "give each target a name of its own")
    return suite


def _suite_error(error: ValidationError, where: str) -> EvalError:
    first = error.errors()[0]
    *above, last = first["loc"] or ("",)
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = list(Target.model_fields) if above else ["defaults", *Suite.model_fields]
        otherwise = f"use one of {', '.join(known)}"
        return EvalError(f"unknown key {key} in {where}", did_you_mean(str(last), known, otherwise))
    if first["type"] == "value_error":
        return EvalError(f"{key}: {first['ctx']['error']}, in {where}", f"correct {key}")
    return EvalError(f"{key}: {first['msg']} (is {str(first['input'])[:60]!r}), in {where}", f"correct {key}")


def run_suite(
    suite: Suite,
    encoders: Sequence[str],
    evaluate: Evaluate,
    *,
    missing: tuple[type[Exception], ...] = (EvalError,),
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    done: Callable[[Cell], None] | None = None,
) -> Transfer:
    """Judges every encoder on every target.

    Args:
        encoders: names, different ones; passed on to `evaluate` and used in the table.
        evaluate: fits on train (and validation) and gives what it says of the test split; called target
            by target, so that a cache of one data set serves all encoders.
        missing: exceptions that mean "not on this data set"; their text becomes the reason in the table.
        num_resamples, seed: of the bootstrap, the same resamples of the test split for all encoders.
        done: called with every cell as soon as it is known.

    Raises:
        EvalError: no encoder, or one named twice.
    """
    if not encoders or len(set(encoders)) < len(encoders):
        raise EvalError(f"encoders are {list(encoders)}", "name at least one, each once")
    found: dict[tuple[str, str], Cell] = {}
    for target in suite.targets:
        for encoder in encoders:
            try:
                outputs, labels, protocol = evaluate(encoder, target)
                measured = measure(outputs, labels, target.metric, num_resamples=num_resamples, seed=seed)
                cell = Cell(encoder, target, protocol, measured)
            except missing as error:
                cell = Cell(encoder, target, "", None, first_line(error, 2000))
            found[encoder, target.name] = cell
            if done is not None:
                done(cell)
    return tabulate(
        suite.name, [found[encoder, target.name] for encoder in encoders for target in suite.targets]
    )


def tabulate(suite: str, cells: Sequence[Cell]) -> Transfer:
    """Places and averages of cells, one for each encoder and data set."""
    encoders = list(dict.fromkeys(cell.encoder for cell in cells))
    values: dict[str, dict[str, float]] = {}  # data set -> encoder -> value
    for cell in cells:
        of_target = values.setdefault(cell.target.name, {})
        if cell.measured is not None:
            of_target[cell.encoder] = cell.measured.value
    places = {}
    for name, judged in values.items():
        for encoder, value in judged.items():
            better = sum(other > value for other in judged.values())
            equal = sum(other == value for other in judged.values())
            places[encoder, name] = better + (equal + 1) / 2
    complete = tuple(name for name, judged in values.items() if len(judged) == len(encoders))
    macro, mean_place = {}, {}
    for encoder in encoders if complete else ():
        macro[encoder] = math.fsum(values[name][encoder] for name in complete) / len(complete)
        mean_place[encoder] = math.fsum(places[encoder, name] for name in complete) / len(complete)
    return Transfer(suite, tuple(cells), places, complete, macro, mean_place)


# ---- the table, for machines and for people


def to_rows(transfer: Transfer) -> list[dict[str, Any]]:
    """JSON-able: a row a cell, then each encoder's macro average. Percent, None where not judged."""
    rows = []
    row: dict[str, Any]
    for cell in transfer.cells:
        measured = cell.measured
        row = {"encoder": cell.encoder, "evaluator": "transfer", "data": cell.target.name}
        row |= {"suite": transfer.suite, "protocol": cell.protocol}
        row |= {"metric": f"{METRIC_NAMES[cell.target.metric]} %"}
        row |= {
            name: None if measured is None else _percent(getattr(measured, name))
            for name in ("value", "low", "high")
        }
        row |= {"rank": transfer.places.get((cell.encoder, cell.target.name))}
        row |= {"n_test": 0 if measured is None else measured.num_test}
        rows.append(row | {"reason": cell.reason})
    for encoder, value in transfer.macro.items():
        row = {"encoder": encoder, "evaluator": "transfer", "data": "macro average", "suite": transfer.suite}
        row |= {"protocol": f"mean over {', '.join(transfer.complete)}", "metric": "mean %"}
        row |= {"value": _percent(value), "low": None, "high": None, "rank": transfer.mean_place[encoder]}
        rows.append(row | {"n_test": 0, "reason": ""})
    return rows


def to_csv(transfer: Transfer) -> str:
    """`to_rows` with a header, empty where no value is; names as of `csv_cell` and `printable`."""
    rows = to_rows(transfer)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: csv_cell(printable(value)) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    )
    return text.getvalue()


def to_markdown(transfer: Transfer) -> str:
    """A line a data set, a column an encoder: value [interval] (place); then what is missing and why."""
    several = len(transfer.encoders) > 1
    lines = [["data", "metric", "n_test", *map(markdown_cell, transfer.encoders)]]
    for target in transfer.targets:
        cells = [transfer.cell(encoder, target) for encoder in transfer.encoders]
        if all(cell.measured is None for cell in cells):
            continue
        num_test = max(cell.measured.num_test for cell in cells if cell.measured is not None)
        texts = [
            _cell_text(cell.measured, transfer.places.get((cell.encoder, target.name)) if several else None)
            for cell in cells
        ]
        lines.append([markdown_cell(target.name), f"{METRIC_NAMES[target.metric]} %", str(num_test), *texts])
    if transfer.complete:
        count = f"{len(transfer.complete)} of {len(transfer.targets)} data sets"
        places = [
            f" ({transfer.mean_place[encoder]:.3g})" if several else "" for encoder in transfer.encoders
        ]
        texts = [
            f"{100 * transfer.macro[encoder]:.2f}{place}"
            for encoder, place in zip(transfer.encoders, places, strict=True)
        ]
        lines.append(["macro average", count, "", *texts])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    table = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    kind = "95 % bootstrap interval over test samples"
    return (
        "\n".join([*table, "", f"[{kind}]" + (" (rank)" if several else ""), *missing_lines(transfer)]) + "\n"
    )


def missing_lines(transfer: Transfer) -> list[str]:
    """`not judged: DATA: why`, one line for all the encoders that share the reason."""
    who: dict[tuple[str, str], list[str]] = {}
    for cell in transfer.cells:
        if cell.measured is None:
            who.setdefault((cell.target.name, cell.reason), []).append(cell.encoder)
    everyone = len(transfer.encoders)
    return [
        printable(
            "not judged: "
            f"{name}{'' if len(encoders) == everyone else ' with ' + ', '.join(encoders)}: "
            f"{reason}"
        )
        for (name, reason), encoders in who.items()
    ]


def draw_bars(transfer: Transfer, path: Path) -> None:
    """A bar for each encoder and data set with its interval, as PNG.

    Raises:
        EvalError: nothing was judged, matplotlib is not installed, the file cannot be written.
    """
    targets = [
        target for target in transfer.targets if any(target.name == name for _, name in transfer.places)
    ]
    if not targets:
        fix = "see the reasons in the table"
        raise EvalError("no encoder was judged on any data set, there is nothing to draw", fix)
    encoders = transfer.encoders
    figure = new_figure(max(6.0, 1.5 + len(targets) * (0.35 + 0.22 * len(encoders))), 4.5)
    axes = figure.subplots()
    width = 0.8 / len(encoders)
    for turn, encoder in enumerate(encoders):
        places, heights, below, above = [], [], [], []
        for column, target in enumerate(targets):
            measured = transfer.cell(encoder, target).measured
            if measured is not None:
                places.append(column + (turn - (len(encoders) - 1) / 2) * width)
                heights.append(100 * measured.value)
                # a bootstrap interval need not contain the value
                below.append(100 * max(0.0, measured.value - measured.low))
                above.append(100 * max(0.0, measured.high - measured.value))
        hatch = "//" if turn // len(COLOURS) % 2 else None
        style: dict[str, Any] = {"color": COLOURS[turn % len(COLOURS)], "hatch": hatch, "label": str(turn)}
        axes.bar(
            places,
            heights,
            width,
            yerr=[below, above],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"},
            **style,
        )
    labels = [f"{shorten(target.name)}\n{METRIC_NAMES[target.metric]}" for target in targets]
    axes.set_xticks(range(len(targets)), labels, rotation=45, ha="right", fontsize=8)
    axes.set(ylabel="%", ylim=(0, 100))
    axes.set_title(f"{shorten(transfer.suite)}, 95 % bootstrap intervals over test samples", parse_math=False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    # set as text: matplotlib leaves labels out that begin with _
    for text, encoder in zip(legend.get_texts(), encoders, strict=True):
        text.set_text(shorten(encoder))
    save_figure(figure, path)


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _cell_text(measured: Measured | None, place: float | None) -> str:
    if measured is None:
        return "-"
    text = f"{100 * measured.value:.2f} [{100 * measured.low:.1f}, {100 * measured.high:.1f}]"
    return text if place is None else f"{text} ({place:g})"
