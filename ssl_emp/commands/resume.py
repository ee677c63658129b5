"""A run directory against what is asked of it: the same settings and images, all files of a finished run."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_emp.backbones import copy_of
from ssl_emp.commands.card import try_to_renew
from ssl_emp.commands.job import Job, sizes_line
from ssl_emp.commands.next_command import next_command
from ssl_emp.config import (
    Override,
    PretrainConfig,
    apply_override,
    check_config,
    flatten,
    load_config,
    read_values,
)
from ssl_emp.data.images import TORCHVISION, sampled_fingerprint
from ssl_emp.device import pick_device
from ssl_emp.errors import UserError
from ssl_emp.model import LARGEST_WEIGHTS, Encoder, build_encoder, load_encoder, save_encoder
from ssl_emp.prune import POLICIES
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.lock import Held
from ssl_emp.run.report import Report, read_metrics, write_environment
from ssl_emp.run.state_check import check_plain
from ssl_emp.safe_files import check_regular, read_json, write_atomically
from ssl_emp.text import resume_command

# where the images and the chosen samples are: free, as what they are is compared, and kept in RUN/config.yaml
# for the next command
PLACES = (
    *"data.source data.kind data.test_source data.image_column data.label_column data.max_pixels".split(),
    *"data.holdout data.download_dir data.cache_dir prune.indices".split(),
)
# settings that may differ between a run and its resumption; whether it is bf16 is compared by itself
FREE_ON_RESUME = (
    *PLACES,
    *"out device devices threads timeout_seconds max_bad_steps precision data.store".split(),
    "keep_freed_memory",
    *"monitor. checkpoint.".split(),
)
NO_RUN = "give the directory that pretraining wrote"


# ---- settings ----------------------------------------------------------------------------------------------


def is_run(out: Path) -> bool:
    """Whether a run began in `out`: it has its settings, or a checkpoint, which has them too."""
    return (out / "config.yaml").is_file() or any((out / "checkpoints").glob("step_*.pt"))


def read_run(
    out: Path, overrides: Sequence[Override], overridden_in: str = "the command line"
) -> tuple[PretrainConfig, bool]:
    """Settings of the run in `out` with overrides; of its newest checkpoint if config.yaml cannot be read.

    Returns:
        (settings, whether config.yaml is whole).

    Raises:
        UserError: it is no run, or settings that cannot be.
    """
    path = out / "config.yaml"
    problem: UserError | None = None
    if path.is_file():
        try:
            if read_values(path):
                return load_config(path, overrides, True, overridden_in), True
        except UserError as error:
            problem = error
    state, _ = load_checkpoint(out / "checkpoints")
    if state is None:
        raise problem or UserError(f"{out} is not a run directory: it has no config.yaml", NO_RUN)
    values = check_config(state.get("config", {}), f"the checkpoint in {out}").model_dump()
    for override in overrides:
        apply_override(PretrainConfig, values, override)
    return check_config(values, f"the checkpoint in {out} and {overridden_in}"), False


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first setting in which a checkpoint's config differs from the present one, in words."""
    # a key younger than the checkpoint: its default
    ours, theirs = flatten(ours), flatten(PretrainConfig().model_dump()) | flatten(theirs)
    for key in ours:
        if not key.startswith(FREE_ON_RESUME) and ours[key] != theirs.get(key):
            return f"{key} was {theirs.get(key)} and is now {ours[key]}"
    return None


def keeping_auto(config: PretrainConfig, before: PretrainConfig) -> PretrainConfig:
    """The config with the run's name and number where it asks for `auto`: they were found when the run began,
    and another version may have other rules.
    """
    asked, kept = config.optimizer, before.optimizer
    update = {name: getattr(kept, name) for name in ("name", "lr") if getattr(asked, name) == "auto"}
    return config.model_copy(update={"optimizer": asked.model_copy(update=update)})


def with_places(before: PretrainConfig, now: PretrainConfig) -> PretrainConfig:
    """What RUN/config.yaml says from now on: as `before`, but for the plan and for where the images are."""
    values, new = before.model_dump(), now.model_dump()
    for key in (*PLACES, "epochs", "earlier_plans"):
        *sections, name = key.split(".")
        source, target = new, values
        for section in sections:
            source, target = source[section], target[section]
        if name in source:
            target[name] = source[name]
    return PretrainConfig.model_validate(values)


def load_state(
    config: PretrainConfig, out: Path, report: Report, may_extend: bool = False
) -> tuple[PretrainConfig, PretrainConfig, dict[str, Any] | None]:
    """The newest checkpoint of the run in `out`, held against what is asked.

    Args:
        may_extend: more `epochs` than the run has train it longer; else they are a difference like others.

    Returns:
        (settings to go on with, those of the run until now, state, or None where there is no checkpoint yet)

    Raises:
        UserError: the run or its checkpoint is of another config.
    """
    before, _ = read_run(out, [])
    config = keeping_auto(config, before)
    state, warnings = load_checkpoint(out / "checkpoints")
    for line in warnings:
        report.say(line)
    if state is not None:
        state.setdefault("threads", 0)  # earlier versions did not note it
        check_plain(state, out / "checkpoints")
        try:
            fingerprint_of(state)
        except (ValueError, RecursionError) as error:
            what = f"the checkpoint in {out / 'checkpoints'} does not fit the run: its fingerprint is none"
            raise UserError(what, "start again with another out=DIR") from error
    if config.earlier_plans and config.earlier_plans != before.earlier_plans:
        what = (
            f"the run in {out} is of another config: earlier_plans was {before.earlier_plans} and is "
            f"now {config.earlier_plans}"
        )
        raise UserError(what, f"leave it to {resume_command(out)} epochs=N")
    if config.epochs > before.epochs and may_extend:
        if POLICIES[before.prune.policy].is_shorter:
            what = (
                f"the run in {out} has policy shorter, which spends the steps of a pruned run in "
                "fewer epochs: it cannot be trained longer"
            )
            raise UserError(what, f"start a new run with epochs={config.epochs} and another out=DIR")
        begun = state["epoch"] + (state["step_in_epoch"] > 0) if state else 0
        begun = max([begun, *(epoch for _, epoch in before.earlier_plans)])
        config = config.model_copy(update={"earlier_plans": [*before.earlier_plans, [before.epochs, begun]]})
    else:
        config = config.model_copy(update={"earlier_plans": before.earlier_plans})
    for settings, source in ((before.model_dump(), "run"), (state["config"] if state else {}, "checkpoint")):
        if not settings:
            continue
        if (settings.get("epochs"), settings.get("earlier_plans", [])) in config.plans() and (
            source == "checkpoint" or may_extend
        ):
            settings = settings | {"epochs": config.epochs, "earlier_plans": config.earlier_plans}
        if difference := first_difference(config.model_dump(), settings):
            fix = "resume without that change, or start a new run with another out=DIR"
            if difference.startswith("epochs ") and config.epochs > before.epochs:
                fix = f"to train it longer: {resume_command(out)} epochs={config.epochs}"
            elif difference.startswith("epochs ") and may_extend:
                fix = f"give {before.epochs} or more, or start a new run with another out=DIR"
            raise UserError(f"the {source} in {out} is of another config: {difference}", fix)
    if state and plan_of(state) != config.plans()[-1]:
        state["finished"] = False  # it was, under a plan of fewer epochs
    return config, before, state


def plan_of(state: dict[str, Any]) -> tuple[Any, Any]:
    """(epochs, earlier_plans) that a checkpoint was saved under."""
    return state["config"].get("epochs"), state["config"].get("earlier_plans", [])


def fingerprint_of(state: dict[str, Any]) -> dict[str, str | None] | None:
    """`ssl_emp.commands.job.what_is_trained_on` of a checkpoint; None: it knows a sample of the images only.

    Raises ValueError where the entry, a text, is neither.
    """
    text = state["fingerprint"]
    if not text.startswith("{"):
        return None
    values = json.loads(text)
    if not all(isinstance(value, str | None) for value in values.values()):
        raise ValueError("fingerprint")
    return dict(values)


# ---- images ------------------------------------------------------------------------------------------------


def missing_source(config: PretrainConfig, out: Path, problem: UserError) -> UserError:
    """The error for images that cannot be loaded on resume, with the way out where they have moved."""
    source = config.data.source
    if config.data.kind == "object":
        what = f"the images of the run in {out} were given in Python, and are in no file"
        return UserError(what, f"go on there: ssl_emp.resume({os.fspath(out)!r}, data)")
    if source in (*TORCHVISION, "mnist5k") or os.path.lexists(os.path.expanduser(source)) or "*" in source:
        return problem
    what = f"the images of the run in {out} are not in data.source={source}"
    fix = f"name the place that they have moved to: {resume_command(out)} data.source=NEW"
    return UserError(what, fix)


def check_same(job: Job, state: dict[str, Any], before: PretrainConfig, out: Path) -> None:
    """Raise UserError where `state` is of other images, labels or indices, or of another precision."""
    known, config = fingerprint_of(state), job.config
    place = f"data.source={config.data.source}"
    if config.data.source != before.data.source:
        place += f" (was {before.data.source})"
    others = f"the images in {place} are not those of the checkpoint in {out}"
    changed = None
    if known is None:  # a checkpoint from before all images were looked at
        if state["fingerprint"] != sampled_fingerprint(job.images):
            changed = others
    else:
        now = job.fingerprint
        differing = {name for name in now if known.get(name) is not None and known[name] != now[name]}
        # kept in another store, all pixels may differ; a sample tells
        pixels = "sample" if "kept_as" in differing else "pixels"
        words = {
            "shape": f"{others}: {now['shape']}, and were {known.get('shape')}",
            "names": f"{others}: their names or their order differ",
            pixels: f"{others}: pixels differ under the same names",
            "labels": f"the labels in {place} are not those that the run in {out} trains on",
            "test": f"the test split in {config.data.test_source or place} is not that of the run in {out}",
            "indices": (
                f"prune.indices={getattr(config.prune, 'indices', None)} does not hold the samples that "
                f"the run in {out} was given"
            ),
        }
        changed = next((line for name, line in words.items() if name in differing), None)
    if changed:
        now_stored = f" (now: {job.images.stored}; was it another data.store?)"
        hint = now_stored if changed.startswith(others) else ""
        raise UserError(changed, f"restore them{hint}, or start a new run with another out=DIR")
    if state["bf16"] != job.bf16:
        precision = "bf16" if state["bf16"] else "fp32"
        fix = f"set precision={precision}"
        raise UserError(f"the run in {out} trains in {precision}, this would go on in another", fix)


# ---- a finished run ----------------------------------------------------------------------------------------


def is_finished(state: dict[str, Any], config: PretrainConfig) -> bool:
    """Whether `state` is that of the last step of the last epoch as planned now, with everything exported."""
    return bool(state["finished"] and state["step_in_epoch"] == 0 and plan_of(state) == config.plans()[-1])


def image_size(config: PretrainConfig, state: dict[str, Any]) -> int | None:
    """Pixels a side that the encoder was trained on; None where only the images tell."""
    shape = ((fingerprint_of(state) or {}).get("shape") or "").rpartition("x")[2]
    stored = config.data.image_size or (int(shape) if shape.isascii() and shape.isdigit() else None)
    return config.augment.sizes(stored).last if stored or config.augment.size else None


def broken_files(
    out: Path, config: PretrainConfig, state: dict[str, Any], backbone: nn.Module | None = None
) -> dict[str, str]:
    """What a finished run's checkpoint can restore: name -> why, of files missing or not of it."""
    checks: dict[str, Callable[[], str | None]] = {
        "config.yaml": lambda: None if read_run(out, [])[1] else "no settings can be read from it",
        "environment.json": lambda: (
            None if isinstance(read_json(out / "environment.json"), dict) else "it holds no dictionary"
        ),
        "encoder": lambda: _encoder_problem(out, config, state, backbone),
        "pruning/samples.parquet": lambda: _samples_problem(out / "pruning" / "samples.parquet", state),
    }
    known = fingerprint_of(state)
    if config.objective == "supervised" and (known is None or known.get("test") is not None):
        checks["result.json"] = lambda: _result_problem(out / "result.json", state)
    found = {}
    for name, check in checks.items():
        try:
            problem = "it is missing" if not os.path.lexists(out / name) else check()
        except UserError as error:
            problem = str(error).partition(". fix: ")[0]
        except Exception as error:  # a damaged file makes JSON, safetensors and pyarrow raise a dozen types
            problem = f"it cannot be read ({type(error).__name__})"
        if problem:
            found[name] = problem
    return found


def _backbone(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that a finished run exports."""
    return {
        name.removeprefix("backbone."): value
        for name, value in state["model"].items()
        if name.startswith("backbone.")
    }


def _encoder_problem(
    out: Path, config: PretrainConfig, state: dict[str, Any], backbone: nn.Module | None
) -> str | None:
    expected, size = _backbone(state), image_size(config, state)
    path = out / "encoder" / "model.safetensors"
    check_regular(path, LARGEST_WEIGHTS)
    weights = load_file(path)
    if weights.keys() != expected.keys() or not all(weights[name].equal(expected[name]) for name in expected):
        return "its weights are not those of the last checkpoint"
    if config.model.arch.startswith("custom:") and backbone is None:
        return None  # only its owner can build it
    encoder = load_encoder(out / "encoder", backbone=copy_of(backbone))
    wanted = _untrained(config, size or encoder.image_size, backbone)
    same = wanted.spec == encoder.spec and wanted.image_size == encoder.image_size
    same = (
        same
        and torch.allclose(wanted.mean, encoder.mean, atol=1e-5)
        and torch.allclose(wanted.std, encoder.std, atol=1e-5)
    )
    return None if same else "its config.json is not that of the run"


def _samples_problem(path: Path, state: dict[str, Any]) -> str | None:
    check_regular(path)
    scores = state["pruner"]["record"]
    expected = {
        "loss": scores["last"][0],
        "times_trained": scores["times_trained"],
        "scored_epoch": scores["scored_epoch"],
    }
    table = pq.read_table(path, columns=["index", "name", "score", *expected])
    if table.num_rows != len(expected["loss"]):
        return f"it has {table.num_rows} rows of {len(expected['loss'])}"
    same = all(
        np.array_equal(table[name].to_numpy(), values.cpu().numpy()) for name, values in expected.items()
    )
    return None if same else "its figures are not those of the last checkpoint"


def _result_problem(path: Path, state: dict[str, Any]) -> str | None:
    found = read_json(path)
    if not (
        isinstance(found, dict)
        and isinstance(found.get("test_accuracy"), int | float)
        and isinstance(found.get("test_images"), int)
    ):
        return "it holds no test accuracy"
    return None if found.get("epoch") == state["epoch"] else "it is of another epoch"


def lost_epochs(out: Path, epochs: int) -> list[int]:
    """Epochs, from 1 on, without a row in metrics.jsonl: no checkpoint can restore them."""
    found = set()
    with suppress(UserError):
        found = {row["epoch"] for row in read_metrics(out)}
    return [epoch for epoch in range(1, epochs + 1) if epoch not in found]


def _untrained(config: PretrainConfig, size: int, backbone: nn.Module | None) -> Encoder:
    """An encoder as the run's was built, of weights without worth; a module from Python is copied."""
    model, augment = config.model, config.augment
    arch = model.arch if backbone is None else copy_of(backbone)
    return build_encoder(arch, model.width, model.stem, size, augment.mean, augment.std, model.args)


def restore_encoder(
    out: Path, config: PretrainConfig, state: dict[str, Any], size: int, backbone: nn.Module | None
) -> None:
    """Write a finished run's encoder again, from its last checkpoint. Raises UserError if it does not fit."""
    encoder = _untrained(config, size, backbone)
    try:
        encoder.backbone.load_state_dict(_backbone(state))
    except (RuntimeError, AttributeError, TypeError) as error:
        first = str(error).splitlines()[-1].strip()
        fix = "start again with another out=DIR"
        raise UserError(f"the checkpoint in {out} does not fit the run: {first}", fix) from error
    save_encoder(encoder, out / "encoder", config.epochs)


def write_config(out: Path, config: PretrainConfig) -> None:
    write_atomically(out / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())


def repair(
    config: PretrainConfig,
    before: PretrainConfig,
    out: Path,
    state: dict[str, Any],
    report: Report,
    held: Held | None,
    backbone: nn.Module | None = None,
) -> bool:
    """Check all files of a finished run and restore what its checkpoint can. Whether nothing is left to do.

    Images are needed for samples.parquet (names), result.json (test split), and where data.source is another.
    """
    if lost := lost_epochs(out, state["epoch"]):
        what = f"metrics.jsonl has no row of {len(lost)} of {state['epoch']} epochs"
        report.say(f"warning   {what}, the first is epoch {lost[0]}: only training could write them again")
    broken = broken_files(out, config, state, backbone)
    for name, problem in broken.items():
        report.say(f"repair    {out / name}: {problem}")
    if with_places(before, config) != before:  # written once it is known that they are the same images
        return False
    size, was_broken = image_size(config, state), bool(broken)
    for name in list(broken):
        if name == "encoder" and size is None or name in ("pruning/samples.parquet", "result.json"):
            continue
        if held is not None and name == "config.yaml":
            write_config(out, before)
        if held is not None and name == "environment.json":
            write_environment(out / name, pick_device(config.device))
        if held is not None and name == "encoder" and size is not None:
            restore_encoder(out, config, state, size, backbone)
            try_to_renew(out, None, report.say)
        del broken[name]
    if not broken:
        rest = "and whole again" if was_broken else "nothing to do"
        report.say(f"{out} is finished, {rest}. next: {next_command(out, config)}", folds=False)
    return not broken


def longer_line(job: Job, before: PretrainConfig) -> str:
    """What it means that the run is trained longer than was planned, when that begins; else empty."""
    if job.config.epochs == before.epochs or not job.config.earlier_plans:
        return ""
    _, end = job.config.earlier_plans[-1]
    step = sum(job.steps[:end])
    rates = (
        f"the learning rate goes from {job.schedule.lr(step - 1):.3g} to {job.schedule.lr(step):.3g} there"
        if step
        else "from the beginning"
    )
    what = f"{before.epochs} epochs were planned, and are {job.config.epochs} now: from epoch {end + 1} on"
    parts = "the learning rate's curve, pruning and annealing"
    if len(job.sizes.all) > 1:
        parts = f"the learning rate's curve, the views ({sizes_line(job.view_sizes)}), pruning and annealing"
    return f"{what} {parts} are laid out anew over all {job.config.epochs}; {rates}"
