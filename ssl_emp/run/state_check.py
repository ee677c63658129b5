"""Whether a loaded checkpoint fits the run that is to go on with it: every entry, before any of it is used.

A hash says that a file is as it was written, not by whom. What a checkpoint holds is tensors and plain
values; here each has the type, the shape and the range that a save of this run could have given it. Letters:
N samples, B batch.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_emp.errors import UserError
from ssl_emp.text import shorten

PLAIN = {
    "epoch": int,
    "step_in_epoch": int,
    "step": int,
    "finished": bool,
    "fingerprint": str,
    "bf16": bool,
    "config": dict,
}
MAY_BE_INFINITE = ("last", "terms", "score")  # +inf: never scored
LOWEST = {
    "running_var": 0,
    "num_batches_tracked": 0,
    "variance": 0,
    "times_scored": 0,
    "times_trained": 0,
    "scored_epoch": -1,
    "trained_epoch": -1,
}  # -1: never
# what an optimizer keeps of a parameter, by its class
KEPT = {"SGD": {"momentum_buffer"}, "Lars": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}


def check_plain(state: dict[str, Any], folder: Path) -> None:
    """Raise UserError unless the entries that a resume looks at first are there and of their types. `folder`
    is for the message.
    """
    for name, kind in PLAIN.items():
        _raise_first(
            _of_type(state.get(name), kind, name) if name in state else iter([f"{name} is missing"]), folder
        )
    _raise_first(_config(state["config"], "config", 3), folder)


def check_state(
    state: dict[str, Any],
    like: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    steps: Sequence[int] | None = None,
    batch_size: int = 0,
) -> None:
    """Raise UserError with the first entry in which a loaded checkpoint does not fit the run, before any of
    it is used.

    Args:
        state: from `load_checkpoint`.
        like: what a save would write now. Its dicts "model" and "scores" are compared entry by entry, of
            the rest names and types.
        optimizer: of the run, not loaded yet; what is kept for each parameter must be of the parameter's
            shape.
        folder: for the message.
        steps, batch_size: batches of every epoch, and samples of a batch; None: the position in the run
            is not looked at.
    """
    _raise_first(_misfits(state, like, optimizer, steps, batch_size), folder)


def _raise_first(problems: Iterator[str], folder: Path) -> None:
    problem = next(problems, None)
    if problem:
        raise UserError(
            f"the checkpoint in {folder} does not fit the run: {problem}", "start again with another out=DIR"
        )


def _misfits(
    state: dict[str, Any],
    like: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int] | None,
    batch_size: int,
) -> Iterator[str]:
    yield from _names(
        like, {name: part for name, part in state.items() if name not in ("format", "written_by")}, ""
    )
    for name, kind in PLAIN.items():
        if name in like:
            yield from _of_type(state[name], kind, name)
    if "config" in like:
        yield from _config(state["config"], "config", 3)
    for section in ("model", "scores"):
        yield from _tensors(like[section], state[section], f"{section}.")
    yield from _optimizer(optimizer, state["optimizer"], state["step"])
    if "seconds" in like:
        yield from _names(like["seconds"], state["seconds"], "seconds.")
        for name, value in state["seconds"].items():
            if not _is_number(value) or value < 0:
                yield f"seconds.{name} is {_shown(value)}"
    if "said" in like:
        yield from _said(state["said"])
    if "bad_in_a_row" in like:
        yield from _tensor(like["bad_in_a_row"], state["bad_in_a_row"], "bad_in_a_row")
        if state["bad_in_a_row"] < 0:
            yield "bad_in_a_row is below 0"
    if steps is not None:
        yield from _position(state, steps)
        yield from _of_the_epoch(state, like, steps, batch_size)


def _position(state: dict[str, Any], steps: Sequence[int]) -> Iterator[str]:
    """Epochs and steps that agree with each other and with the plan."""
    epoch, within, step = state["epoch"], state["step_in_epoch"], state["step"]
    if not 0 <= epoch <= len(steps):
        yield f"epoch is {epoch} of {len(steps)}"
    most = steps[epoch] if epoch < len(steps) else 0
    if not 0 <= within <= most:
        yield f"step_in_epoch is {within} of {most}"
    if step != sum(steps[:epoch]) + within:
        yield (
            f"step is {step} and should be {sum(steps[:epoch]) + within} at step {within} of epoch "
            f"{epoch + 1}"
        )
    if state["finished"] != (step == sum(steps)):
        yield f"finished is {state['finished']} at step {step} of {sum(steps)}"


def _of_the_epoch(
    state: dict[str, Any], like: dict[str, Any], steps: Sequence[int], batch_size: int
) -> Iterator[str]:
    """What there is only within an epoch: its batches, their weights, norms and what the epoch's diagnosis
    compares with.
    """
    scores = like["scores"]
    num_samples = scores["last"].shape[1]
    if not state["step_in_epoch"]:
        yield from (
            f"{name} is there between epochs"
            for name in ("batches", "weight", "norms")
            if state[name] is not None
        )
        if state["before"] != {}:
            yield "before is there between epochs"
        return
    count = steps[state["epoch"]]
    yield from _tensor(
        torch.empty(count, batch_size, dtype=torch.int64, device="meta"), state["batches"], "batches"
    )
    if state["batches"].min() < 0 or state["batches"].max() >= num_samples:
        yield f"batches name samples beyond 0 to {num_samples - 1}"
    if len(state["batches"].unique()) < state["batches"].numel():
        yield "batches name a sample twice"
    if state["weight"] is not None:
        yield from _tensor(torch.empty(num_samples, device="meta"), state["weight"], "weight")
        if not (state["weight"].isfinite() & (state["weight"] >= 0)).all():
            yield "weight is below 0 or not finite"
    yield from _tensor(torch.empty(count, device="meta"), state["norms"], "norms")
    if not state["norms"].is_contiguous():
        yield "norms share memory"  # they are written to one by one
    if not (state["norms"] >= 0).all():  # +inf: a step that was skipped
        yield "norms are below 0 or NaN"
    known = {
        "trained_epoch": scores["trained_epoch"],
        "scored_epoch": scores["scored_epoch"],
        "score": scores["last"][0],
    }
    if not isinstance(state["before"], dict) or not set(state["before"]) <= set(known):
        yield f"before is {_shown(state['before'])}"
    if state["before"] and not {"trained_epoch", "scored_epoch"} <= set(state["before"]):
        yield "before lacks trained_epoch or scored_epoch"
    yield from _tensors({name: known[name] for name in state["before"]}, state["before"], "before.")


def _tensors(ours: dict[str, Any], theirs: Any, where: str) -> Iterator[str]:
    """Every tensor like ours, and in the range of its name."""
    yield from _names(ours, theirs, where)
    for name, mine in ours.items():
        value = theirs[name]
        if isinstance(mine, Tensor) or isinstance(value, Tensor):
            yield from _tensor(mine, value, f"{where}{name}")
            if name in MAY_BE_INFINITE:
                if (value.isnan() | (value == -torch.inf)).any():
                    yield f"{where}{name} is NaN or minus infinity"
            elif not value.isfinite().all():
                yield f"{where}{name} is not finite"
            lowest = LOWEST.get(name.rpartition(".")[2])
            if lowest is not None and (value < lowest).any():
                yield f"{where}{name} is below {lowest}"


def _tensor(ours: Any, theirs: Any, name: str) -> Iterator[str]:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        yield f"{name} is of type {type(theirs).__name__}"
    elif (
        type(theirs) not in (Tensor, torch.nn.Parameter)
        or theirs.layout != torch.strided
        or theirs.is_quantized
        or theirs.is_meta
    ):
        yield f"{name} is no plain tensor"
    elif (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        yield f"{name} is {theirs.dtype} {tuple(theirs.shape)} and should be {ours.dtype} {tuple(ours.shape)}"


def _optimizer(optimizer: torch.optim.Optimizer, theirs: Any, step: Any) -> Iterator[str]:
    yield from _names({"state": 0, "param_groups": 0}, theirs, "optimizer.")
    kept_of, groups = theirs["state"], theirs["param_groups"]
    own_groups = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own_groups) or not isinstance(kept_of, dict):
        yield "optimizer does not hold the groups of parameters that the run has"
    for place, (own, group) in enumerate(zip(own_groups, groups, strict=True)):
        where = f"optimizer.param_groups.{place}"
        if (
            not isinstance(group, dict)
            or group.get("params") != own["params"]
            or any(type(n) is not int for n in group["params"])
        ):
            yield f"{where} does not hold the parameters that the run has"
        for key, value in own.items():  # another torch has other keys; the run takes its own
            if key in ("lr", "momentum") and key in group:  # these move
                if not _is_number(group[key]) or group[key] < 0:
                    yield f"{where}.{key} is {_shown(group[key])}"
            elif key in group and (type(group[key]) is not type(value) or group[key] != value):
                yield f"{where}.{key} is {_shown(group[key])} and should be {_shown(value)}"
    params = [param for group in optimizer.param_groups for param in group["params"]]
    names = KEPT.get(type(optimizer).__name__, set())
    needed = bool(step) and not (type(optimizer).__name__ == "SGD" and not optimizer.defaults["momentum"])
    if set(kept_of) - set(range(len(params))):
        yield f"optimizer.state has entries beyond the {len(params)} parameters"
    for number, kept in kept_of.items():
        where = f"optimizer.state.{number}"
        if not isinstance(kept, dict) or not set(kept) <= names or (needed and set(kept) != names):
            yield f"{where} is {_shown(kept)}"
        for name, value in kept.items():
            if value is None and not needed:
                continue
            like = torch.empty((), dtype=torch.float32) if name == "step" else params[number]
            yield from _tensor(like, value, f"{where}.{name}")
            if not value.isfinite().all() or (name in ("step", "exp_avg_sq") and (value < 0).any()):
                yield f"{where}.{name} is not finite, or below 0"
    if needed and len(kept_of) < len(params):
        yield f"optimizer.state has {len(kept_of)} entries and should have {len(params)}"


def _said(said: Any) -> Iterator[str]:
    if not isinstance(said, dict):
        yield f"said is of type {type(said).__name__}"
    for kind, entry in said.items():
        fits = (
            isinstance(kind, str) and isinstance(entry, tuple) and len(entry) == 2 and type(entry[0]) is int
        )
        if not fits or not isinstance(entry[1], float | int) or math.isnan(entry[1]):
            yield f"said.{_shown(kind)} is {_shown(entry)}"


def _config(values: Any, where: str, depth: int) -> Iterator[str]:
    """Settings as a run saves them: words and numbers in a few levels of sections. They are compared with the
    run's.
    """
    if isinstance(values, dict) and depth:
        for key, value in values.items():
            yield from (
                _config(value, f"{where}.{shorten(key)}", depth - 1)
                if isinstance(key, str)
                else [f"{where} has a key {_shown(key)}"]
            )
    elif isinstance(values, list) and depth:
        for value in values:
            yield from _config(value, where, depth - 1)
    elif not (values is None or isinstance(values, str | bool) or _is_number(values)):
        yield f"{where} is of type {type(values).__name__}"


def _names(ours: dict[Any, Any], theirs: Any, where: str) -> Iterator[str]:
    if not isinstance(theirs, dict):
        yield f"{where.rstrip('.')} is of type {type(theirs).__name__}"
        return
    yield from (f"{where}{name} is missing" for name in ours if name not in theirs)
    yield from (f"{where}{shorten(str(name))} is not known" for name in theirs if name not in ours)


def _of_type(value: Any, kind: type, name: str) -> Iterator[str]:
    if type(value) is not kind:
        yield f"{name} is of type {type(value).__name__}"
    elif isinstance(value, int) and not 0 <= value < 2**63:
        yield f"{name} is {_shown(value)}"


def _is_number(value: Any) -> bool:
    """Finite, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """A value in a message, whatever it is: a tensor or a dict by its type, since printing it might take for
    ever.
    """
    return (
        shorten(repr(value)) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    )
