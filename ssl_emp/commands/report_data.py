"""What a report shows of a run, gathered from its directory, and pictures and labels from its images.

Everything but config.yaml may be missing: a run that is still going, that lost a file, or whose images have
moved is reported as far as it can be, and a line says what is not there.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_eval.errors import first_line
from ssl_emp.augment import as_pixels, cut_views, draw_params
from ssl_emp.commands.job import recipe_of, view_sizes
from ssl_emp.commands.resume import read_run
from ssl_emp.commands.samples_table import read_samples
from ssl_emp.config import PretrainConfig, flatten
from ssl_emp.data.decode import pillow_limits
from ssl_emp.data.images import ImageSet, common_size, find_split
from ssl_emp.data.stores import decode_into
from ssl_emp.errors import UserError
from ssl_emp.prune.figures import IDLE_EPOCHS
from ssl_emp.prune.plan import PrunePlan
from ssl_emp.prune.policies import POLICIES
from ssl_emp.report.columns import front_coded, histogram, packed
from ssl_emp.report.meanings import meaning_of
from ssl_emp.report.pictures import sprite
from ssl_emp.run.pace import pace_of, seconds_of
from ssl_emp.run.report import read_metrics
from ssl_emp.safe_files import LARGE, read_bytes, read_json
from ssl_emp.text import printable

MOST_SAMPLES = 50_000  # in one report, all runs together; of more, a part is shown
MOST_NAMES = 2_000_000  # characters of their names
LONGEST_NAME = 200  # characters; of a longer one the middle is left out
MOST_ROWS = 1_000  # epochs in a curve; of more, some are left out
MOST_CLASSES = 1_000
GROUP = 40  # pictures of each group
OF_CLASSES = 120  # pictures that are chosen by class
VIEWED = 8  # of each group, their two views are shown as well; of a class 1
MOST_LINES = 200  # warnings and notes

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
EPOCH = re.compile(TIME + r"epoch +(\d+)/\d+ ")
SAID = re.compile(TIME + r"(warning|note) +(\S.*)")
MORE = re.compile(TIME + r" {4,}(\S.*)")  # a line that goes on


@dataclass(frozen=True)
class Pictured:
    """Where a run's images are read from: labels of all of them, pixels of a few."""

    rows: dict[str, int]  # name -> place in the source
    labels: np.ndarray | None  # (N,) class of every place
    class_names: list[str] | None
    # (n,) rising places, and all that were trained on -> ((m, 3, S, S) uint8, the places that cannot be read)
    pixels: Callable[[np.ndarray, np.ndarray], tuple[Tensor, set[int]]]


def gather(run: Path, *, share: int = 1, images: ImageSet | None = None) -> dict[str, Any]:
    """A run as plain data, see `ssl_emp/report/page.js` for what is made of it.

    Args:
        run: its directory.
        share: of how many runs one page tells; each gets so much less room.
        images: those that it was trained on, where no file has them.

    Raises:
        UserError: it is no run, or a file in it is none of ours.
    """
    config, _ = read_run(run, [])
    rows = list({row["epoch"]: row for row in read_metrics(run)}.values())
    notes: list[str] = []
    table = _table(run, notes)
    plan = _plan(config)
    found: dict[str, Any] = {
        "name": printable(os.path.basename(os.path.abspath(run))),
        "folder": printable(os.fspath(run)),
        "about": _about(config, run),
        "metrics": _metrics(rows),
        "warnings": _said(run),
        "evaluation": _evaluation(run, notes),
        "config": _flat(config.model_dump()),
        "defaults": _flat(PretrainConfig.model_validate({"prune": _defaults(config.prune)}).model_dump()),
        "environment": _environment(run, notes),
        "idle_epochs": IDLE_EPOCHS,
    }  # fmt: skip
    trained = [row for row in rows if row["epoch"] > 0]
    num_samples = len(table["name"]) if table is not None else _num_samples(trained)
    if num_samples:
        found["budget"] = _budget(config, plan, num_samples, trained)
    if table is not None:
        found |= _samples(config, run, plan, table, len(trained), share, images, notes)
    found["notes"] = [printable(line) for line in notes]
    return found


# ---- what it was, and what it took -------------------------------------------------------------------------


def _plan(config: PretrainConfig) -> PrunePlan:
    policy, prune = POLICIES[config.prune.policy], config.prune
    earlier = tuple((epochs, end) for epochs, end in config.earlier_plans)
    fraction = prune.fraction if policy.prunes else 0.0
    return PrunePlan(
        config.epochs, fraction, prune.warmup_epochs, prune.anneal_fraction, policy.is_shorter, earlier
    )


def _defaults(prune: Any) -> dict[str, Any]:
    """The policy with its own defaults, and a dash for the keys that have none."""
    fields = type(prune).model_fields
    return {key: "-" for key, field in fields.items() if field.is_required()} | {"policy": prune.policy}


def _about(config: PretrainConfig, run: Path) -> dict[str, Any]:
    model = config.model
    arch = f"{model.arch}, width {model.width}" if ":" not in model.arch else model.arch
    try:
        ended = os.stat(run / "pruning" / "samples.parquet").st_mtime
    except OSError:
        ended = None
    return {
        "objective": config.objective,
        "policy": config.prune.policy,
        "fraction": _plan(config).prune_fraction,
        "arch": printable(arch),
        "source": printable(config.data.source),
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "ended": None if ended is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ended)),
    }


def _num_samples(trained: list[dict[str, Any]]) -> int | None:
    """As the first epochs' rows tell it, of a run that has no table yet."""
    for row in trained:
        if row.get("kept_share") and row["epoch"] == 1:
            seen = row.get("samples_seen") or 0
            return round(seen / row["kept_share"])
    return None


def _budget(
    config: PretrainConfig, plan: PrunePlan, num_samples: int, trained: list[dict[str, Any]]
) -> dict[str, Any]:
    """Steps and seconds of the run, against the same epochs without pruning."""
    size, full = config.batch_size, num_samples // config.batch_size
    steps = plan.epoch_steps(num_samples, size)
    sizes = config.augment.sizes(config.data.image_size or 1)
    views = view_sizes(sizes, plan, len(steps))
    unpruned = view_sizes(sizes, replace(plan, shorter=False), config.epochs)
    last = trained[-1] if trained else {}
    done = int(last.get("epoch", 0))
    budget: dict[str, Any] = {
        "samples": num_samples,
        "epochs_done": done,
        "epochs_planned": len(steps),
        "finished": done >= len(steps),
        "seen": int(last.get("samples_seen") or 0),
        "planned": sum(steps) * size,
        "unpruned": config.epochs * full * size,
        "asked_share": plan.asked_share(),
        "kept": [count * size / num_samples for count in steps][:MOST_ROWS],
        "pruned_epochs": [plan.is_pruned(epoch) for epoch in range(len(steps))][:MOST_ROWS],
        "full_epochs": sum(not plan.is_pruned(epoch) for epoch in range(min(done, len(steps)))),
    }
    seconds = {part: last.get(f"{part}_seconds") for part in ("training", "scoring", "monitoring")}
    if any(not isinstance(value, int | float) for value in seconds.values()) or not last.get("step"):
        return budget
    budget |= {"seconds": seconds}
    if budget["finished"]:
        spent = {
            name.removesuffix("_seconds"): float(value)
            for name, value in last.items()
            if name.endswith("_seconds") and isinstance(value, int | float)
        }
        pace = pace_of(spent, steps, views, sum(steps))
        budget["unpruned_seconds"] = seconds_of(pace, [full] * config.epochs, unpruned)
    return budget


def _metrics(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Each figure as a list with an entry an epoch, None where it was not measured."""
    kept = rows[:: -(-len(rows) // MOST_ROWS)] if rows else []
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    names = dict.fromkeys(
        name for row in kept for name, value in row.items() if isinstance(value, int | float)
    )
    return {printable(name): [_short(row.get(name)) for row in kept] for name in list(names)[:64]}


def _short(value: Any) -> float | None:
    """Six digits, more than a curve shows."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _flat(values: dict[str, Any]) -> dict[str, str]:
    """`{"data": {"source": "x"}}` as `{"data.source": "x"}`, with values as YAML has them."""

    def shown(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return {printable(name): printable(shown(value)) for name, value in flatten(values).items()}


def _environment(run: Path, notes: list[str]) -> dict[str, str]:
    path = run / "environment.json"
    try:
        found = read_json(path) if os.path.lexists(path) else {}
    except UserError as error:
        notes.append(_first(error))
        return {}
    if isinstance(found, dict) and isinstance(found.get("command"), list):
        found["command"] = " ".join(map(str, found["command"]))
    return _flat(found) if isinstance(found, dict) else {}


def _said(run: Path) -> list[dict[str, Any]]:
    """The warnings and notes of train.log, those of one meaning together, with the epochs they are from."""
    path = run / "train.log"
    if not os.path.lexists(path):
        return []
    epoch, said = 0, dict[str, dict[str, Any]]()
    last: dict[str, Any] | None = None
    for line in read_bytes(path, LARGE).decode("utf-8", "replace").splitlines():
        if found := EPOCH.match(line):
            epoch, last = int(found[1]), None
        elif found := SAID.match(line):
            kind, text = found.groups()
            meaning = meaning_of(text)
            key = meaning.title if meaning else text
            if key not in said and len(said) >= MOST_LINES:
                continue
            last = said.setdefault(key, {"kind": kind, "epochs": [], "title": None, "meaning": None})
            last["line"] = printable(text)
            if epoch not in last["epochs"]:  # a resumed run says its notes again
                last["epochs"].append(epoch)
            if meaning:
                last |= {"title": meaning.title, "meaning": meaning.text}
        elif (found := MORE.match(line)) and last is not None:
            last["line"] += " " + printable(found[1])
        else:
            last = None
    return sorted(said.values(), key=lambda item: item["kind"] == "note")


def _evaluation(run: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of RUN/eval/*.json: text and numbers only."""
    names = ("encoder", "evaluator", "data", "protocol", "metric", "value", "std", "n_test", "seed")
    # a row has the path that was typed then, from another folder perhaps, or before the run was moved; beside
    # the run, only encoders that are no runs are in this folder
    own = {os.path.basename(os.path.abspath(run)), "."}
    found = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            rows = read_json(path, LARGE)
        except UserError as error:
            notes.append(_first(error))
            continue
        for row in rows if isinstance(rows, list) else []:
            if not isinstance(row, dict) or not isinstance(row.get("evaluator"), str):
                continue
            kept = {name: row.get(name) for name in names}
            found.append(
                {
                    name: printable(value) if isinstance(value, str) else _short(value)
                    for name, value in kept.items()
                }
                | {"own": os.path.basename(os.path.normpath(str(row.get("encoder")))) in own}
            )
    return found[:2_000]


# ---- the samples -------------------------------------------------------------------------------------------


def _table(run: Path, notes: list[str]) -> Any:
    path = run / "pruning" / "samples.parquet"
    if not path.is_file():
        notes.append("There is no pruning/samples.parquet, which a run writes when it ends: no samples.")
        return None
    try:
        return read_samples(path, more=True)
    except Exception as error:  # pyarrow raises half a dozen types
        notes.append(f"pruning/samples.parquet cannot be read ({first_line(error)}): no samples.")
        return None


def _samples(
    config: PretrainConfig,
    run: Path,
    plan: PrunePlan,
    table: Any,
    done: int,
    share: int,
    images: ImageSet | None,
    notes: list[str],
) -> dict[str, Any]:
    names: list[str] = table["name"].to_pylist()
    columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("name", "index")}
    if columns.get("scored_epoch") is not None:  # people count from 1; 0: never
        columns["scored_epoch"] = columns["scored_epoch"] + 1
    source = _source(config, run, images, notes)
    places = None
    labels = None
    if source is not None:
        places = np.array([source.rows.get(name, -1) for name in names], np.int64)
        if lost := int((places < 0).sum()):
            notes.append(f"{lost:,} of the {len(names):,} samples are not in {config.data.source} any more.")
        if source.labels is not None and source.labels.ndim == 1:
            labels = np.where(places >= 0, source.labels[places], -1)
    groups = _groups(columns, labels, len(names))
    chosen = list(dict.fromkeys(row for group in groups.values() for row in group))
    if share > 1:
        chosen = chosen[::share]
    rows = _shown(names, chosen, share)
    place_of = {row: place for place, row in enumerate(rows.tolist())}
    found: dict[str, Any] = {
        "samples": {
            "count": len(names),
            "shown": len(rows),
            "index": packed(rows),
            "names": front_coded([_named(names[row]) for row in rows]),
            "columns": {printable(name): packed(values[rows]) for name, values in columns.items()},
            "times": histogram(columns["times_trained"]),
            "stale": getattr(config.prune, "scoring", "stale") == "stale",
        }
    }
    if labels is not None and source is not None:
        found["samples"] |= _classes(labels, source.class_names, columns, rows)
    if source is not None and places is not None:
        readable = [row for row in chosen if places[row] >= 0]
        viewed = [
            row
            for name, group in groups.items()
            for row in group[: 1 if name.startswith("class ") else max(1, VIEWED // share)]
        ]
        try:
            found |= _pictures(config, run, plan, source, places, readable, viewed, columns, place_of, notes)
        except Exception as error:  # a source that was there a moment ago, a network drive
            notes.append(f"No pictures: {_first(error)}")
    return found


def _named(name: str) -> str:
    shown = name if name.isprintable() else printable(name)
    if len(shown) <= LONGEST_NAME:
        return shown
    half = LONGEST_NAME // 2
    return f"{shown[:half]}…{shown[1 - half :]}"


def _groups(columns: dict[str, np.ndarray], labels: np.ndarray | None, count: int) -> dict[str, list[int]]:
    """Rows whose pictures are shown, by why; among equals a random choice, the same one in every report."""
    generator = np.random.default_rng(0)
    chance = generator.permutation(count)
    times, epoch, loss = (columns.get(name) for name in ("times_trained", "scored_epoch", "loss"))
    assert times is not None
    groups = {}

    def ranked(values: np.ndarray) -> list[int]:
        known = chance[np.isfinite(values[chance])]
        return known[np.argsort(values[known], kind="stable")][:GROUP].tolist()

    groups["most"] = ranked(-times.astype(np.float64))
    groups["least"] = ranked(times.astype(np.float64))
    if loss is not None:
        groups["hardest"], groups["easiest"] = (
            ranked(-loss.astype(np.float64)),
            ranked(loss.astype(np.float64)),
        )
    if epoch is not None:
        groups["longest"] = ranked(epoch.astype(np.float64))
    groups["random"] = chance[:GROUP].tolist()
    if labels is not None:
        known = np.unique(labels[labels >= 0])
        each = max(1, OF_CLASSES // max(len(known), 1) // 2)
        order = chance[np.argsort(times[chance], kind="stable")]
        for label in known[: OF_CLASSES // 2]:
            of_class = order[labels[order] == label]
            groups[f"class {label}"] = [*of_class[:each].tolist(), *of_class[::-1][:each].tolist()]
    return groups


def _shown(names: list[str], chosen: list[int], share: int) -> np.ndarray:
    """Rows whose numbers are in the page: all, or as many as there is room for, the chosen ones first."""
    most, room = MOST_SAMPLES // share, MOST_NAMES // share
    lengths = np.minimum([len(name) for name in names], LONGEST_NAME)
    if len(names) <= most and lengths.sum() <= room:
        return np.arange(len(names))
    others = np.random.default_rng(1).permutation(len(names))
    order = np.concatenate([np.array(chosen, np.int64), others[~np.isin(others, chosen)]])[:most]
    return np.sort(order[np.cumsum(lengths[order]) <= room])


def _classes(
    labels: np.ndarray, class_names: list[str] | None, columns: dict[str, np.ndarray], rows: np.ndarray
) -> dict[str, Any]:
    """Each class's name and figures, of all samples, and the class of those that are shown."""
    count = int(labels.max()) + 1 if len(labels) else 0
    if not 1 < count <= MOST_CLASSES:
        return {}
    known, times = labels >= 0, columns["times_trained"].astype(np.float64)
    sizes = np.bincount(labels[known], minlength=count)
    mean_times = np.bincount(labels[known], times[known], count) / np.maximum(sizes, 1)
    named = class_names if class_names and len(class_names) >= count else [str(n) for n in range(count)]
    found = {
        "class": packed(labels[rows]),
        "class_names": [printable(name)[:LONGEST_NAME] for name in named[:count]],
        "class_sizes": sizes.tolist(),
        "class_times": [float(f"{value:.5g}") for value in mean_times],
    }
    if "loss" in columns:
        loss = columns["loss"].astype(np.float64)
        finite = known & np.isfinite(loss)
        of = np.maximum(np.bincount(labels[finite], minlength=count), 1)
        found["class_loss"] = [
            float(f"{v:.5g}") for v in np.bincount(labels[finite], loss[finite], count) / of
        ]
    return found


# ---- pictures ----------------------------------------------------------------------------------------------


def _source(config: PretrainConfig, run: Path, images: ImageSet | None, notes: list[str]) -> Pictured | None:
    """Where pictures and labels come from; None where that is gone, which a note says."""
    data = config.data
    if images is not None:
        labels = None if images.labels is None else images.labels.numpy()
        rows = {name: place for place, name in enumerate(images.names)}
        return Pictured(
            rows, labels, images.class_names, lambda few, _: (images.pixels[torch.from_numpy(few)], set())
        )
    if data.kind == "object":
        notes.append("No pictures and no classes: the images were given in Python, and are in no file.")
        return None
    try:
        columns = (data.image_column, data.label_column, data.labels)
        found = find_split(data.source, "train", data.kind, data.download_dir, *columns)
    except Exception as error:  # a missing folder, an unplugged drive, a package that is not there any more
        notes.append(f"No pictures and no classes, the images are not there: {_first(error)}")
        return None

    def pixels(few: np.ndarray, trained: np.ndarray) -> tuple[Tensor, set[int]]:
        with pillow_limits(data.max_pixels):
            side = _stored_size(config, run) or common_size(found, trained, data.max_pixels)
            made = np.empty((len(few), 3, side, side), np.uint8)
            result = decode_into(made, found.read, few, data.max_pixels, None)
        failed = {int(few[row]) for row in result.failed}
        return torch.from_numpy(made[: len(few) - len(failed)]), failed

    rows = {name: place for place, name in enumerate(found.names)}
    return Pictured(rows, found.labels, found.class_names, pixels)


def _stored_size(config: PretrainConfig, run: Path) -> int | None:
    """Side of the images that views are cut from, pixels, where files of the run tell it."""
    if config.data.image_size is not None or config.augment.size is not None:
        return config.data.image_size
    with suppress(UserError):
        about = read_json(run / "encoder" / "config.json")
        size = about.get("ssl_emp", {}).get("image_size") if isinstance(about, dict) else None
        if isinstance(size, int) and 8 <= size <= 4096:
            return size
    return None


def _pictures(
    config: PretrainConfig,
    run: Path,
    plan: PrunePlan,
    source: Pictured,
    places: np.ndarray,
    chosen: Sequence[int],
    viewed: Iterable[int],
    columns: dict[str, np.ndarray],
    place_of: dict[int, int],
    notes: list[str],
) -> dict[str, Any]:
    """The chosen rows as one JPEG, and of some the two views of the epoch that they were trained in last."""
    chosen = sorted((row for row in chosen if row in place_of), key=lambda row: int(places[row]))
    pixels, failed = source.pixels(places[chosen], np.sort(places[places >= 0]))
    chosen = [row for row in chosen if int(places[row]) not in failed]
    if failed:
        notes.append(f"{len(failed)} of the images that pictures are made of cannot be read any more.")
    if not chosen:
        return {}
    found = {"pictures": sprite(pixels) | {"rows": [place_of[row] for row in chosen]}}
    wanted = set(viewed)
    if "scored_epoch" in columns and getattr(config.prune, "scoring", "stale") == "stale":
        at = [n for n, row in enumerate(chosen) if row in wanted and columns["scored_epoch"][row] > 0]
        epochs = [int(columns["scored_epoch"][chosen[n]]) for n in at]
        if at:
            views = _views(config, plan, pixels[at], [chosen[n] for n in at], epochs)
            found["views"] = sprite(views) | {"rows": [place_of[chosen[n]] for n in at], "epochs": epochs}
            found["views"]["each"] = len(views) // len(at)
    return found


def _views(
    config: PretrainConfig, plan: PrunePlan, pixels: Tensor, rows: list[int], epochs: list[int]
) -> Tensor:
    """(n, 3, S, S) uint8 images -> (n v, 3, S', S') uint8: the v views that each was trained on in its epoch,
    counted from 1. They are a function of (seed, epoch, row), so that nothing was kept of them.
    """
    side, number = pixels.shape[-1], 1 if config.objective == "supervised" else 2
    recipe = recipe_of(config, side)
    sizes = view_sizes(config.augment.sizes(side), plan, max(epochs))
    made = torch.empty(len(rows), number, 3, recipe.size, recipe.size, dtype=torch.uint8)
    for epoch in set(epochs):
        at = [place for place, other in enumerate(epochs) if other == epoch]
        own = replace(recipe, size=sizes[epoch - 1])
        draw = draw_params(config.seed, epoch - 1, torch.tensor([rows[place] for place in at]), own, side)
        for which, normalised in enumerate(cut_views(pixels[at], draw[:number], own)):
            made[at, which] = F.interpolate(as_pixels(normalised, own), (recipe.size, recipe.size))
    return made.flatten(0, 1)


def _first(error: Exception) -> str:
    return first_line(error).partition(". fix: ")[0]


def side_by_side(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What differs in the configs of gathered runs: {"differences": [[key, value of each run]]}."""
    keys = dict.fromkeys(key for run in runs for key in run["config"] if key != "out")
    rows = [[key, *(run["config"].get(key, "—") for run in runs)] for key in keys]
    return {"differences": [row for row in rows if len(set(row[1:])) > 1]}
