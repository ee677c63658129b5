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

from ssl_emp.errors import UserError
from ssl_emp.prune import Pruner
from ssl_emp.prune.state import key_problems, tensor_problem
from ssl_emp.text import shorten

PLAIN = {
    "epoch": int,
    "step_in_epoch": int,
    "step": int,
    "finished": bool,
    "fingerprint": str,
    "bf16": bool,
    "threads": int,
    "config": dict,
}
# what an optimizer keeps of a parameter, by its class
KEPT = {"SGD": {"momentum_buffer"}, "Lars": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}


def check_plain(state: dict[str, Any], folder: Path) -> None:
    """Raise UserError unless the entries read first are there and of their types. `folder`: to be named."""
    for name, kind in PLAIN.items():
        missing = iter([f"{name} is missing"])
        _raise_first(_of_type(state[name], kind, name) if name in state else missing, folder)
    _raise_first(_config(state["config"], "config", 4), folder)


def check_state(
    state: dict[str, Any],
    like: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    pruner: Pruner,
    folder: Path,
) -> None:
    """Raise UserError with the first entry of a loaded checkpoint that does not fit the run, before any use.

    Args:
        state: from `load_checkpoint`.
        like: what a save would write now. Its dict "model" is compared entry by entry, of the rest names
            and types.
        optimizer, pruner: of the run, not loaded yet.
        folder: for the message.
    """
    _raise_first(_misfits(state, like, optimizer, pruner), folder)


def _raise_first(problems: Iterator[str], folder: Path) -> None:
    problem = next(problems, None)
    if problem:
        fix = "start again with another out=DIR"
        raise UserError(f"the checkpoint in {folder} does not fit the run: {problem}", fix)


def _misfits(
    state: dict[str, Any], like: dict[str, Any], optimizer: torch.optim.Optimizer, pruner: Pruner
) -> Iterator[str]:
    own = {name: part for name, part in state.items() if name not in ("format", "written_by")}
    yield from key_problems(like, own, "")
    for name, kind in PLAIN.items():
        yield from _of_type(state[name], kind, name)
    yield from _config(state["config"], "config", 4)
    yield from _weights(like["model"], state["model"])
    yield from _optimizer(optimizer, state["optimizer"], state["step"])
    yield from key_problems(like["seconds"], state["seconds"], "seconds.")
    for name, value in state["seconds"].items():
        if not _is_number(value) or value < 0:
            yield f"seconds.{name} is {_shown(value)}"
    if problem := tensor_problem(like["bad_in_a_row"], state["bad_in_a_row"], "bad_in_a_row"):
        yield problem
    if state["bad_in_a_row"] < 0:
        yield "bad_in_a_row is below 0"
    yield from _position(state, pruner.steps)
    if problem := pruner.state_problem(state["pruner"]):
        yield f"pruner: {problem}"
    if state["pruner"]["step"] != state["step"]:
        yield f"step is {state['step']} and that of the pruner {state['pruner']['step']}"
    yield from _of_the_epoch(state, pruner.steps)


def _position(state: dict[str, Any], steps: Sequence[int]) -> Iterator[str]:
    """Epochs and steps that agree with each other and with the plan."""
    epoch, within, step = state["epoch"], state["step_in_epoch"], state["step"]
    if not 0 <= epoch <= len(steps):
        yield f"epoch is {epoch} of {len(steps)}"
    most = steps[epoch] if epoch < len(steps) else 0
    if not 0 <= within <= most:
        yield f"step_in_epoch is {within} of {most}"
    if step != sum(steps[:epoch]) + within:
        place = f"at step {within} of epoch {epoch + 1}"
        yield f"step is {step} and should be {sum(steps[:epoch]) + within} {place}"
    if state["finished"] != (step == sum(steps)):
        yield f"finished is {state['finished']} at step {step} of {sum(steps)}"


def _of_the_epoch(state: dict[str, Any], steps: Sequence[int]) -> Iterator[str]:
    """What there is only within an epoch: its batches, and the norms of its gradients."""
    norms = state["norms"]
    if not state["step_in_epoch"]:
        if norms is not None:
            yield "norms is there between epochs"
        return
    if state["epoch"] not in state["pruner"]["chosen"]:
        yield f"the batches of epoch {state['epoch'] + 1}, which is under way, are missing"
    if problem := tensor_problem(torch.empty(steps[state["epoch"]], device="meta"), norms, "norms"):
        yield problem
    if not norms.is_contiguous():
        yield "norms share memory"  # they are written to one by one
    if not (norms >= 0).all():  # +inf: a step that was skipped
        yield "norms are below 0 or NaN"


def _weights(ours: dict[str, Any], theirs: Any) -> Iterator[str]:
    """Every tensor of the model like ours, finite, and in the range of its name."""
    yield from key_problems(ours, theirs, "model.")
    for name, mine in ours.items():
        value = theirs[name]
        if problem := tensor_problem(mine, value, f"model.{name}"):
            yield problem
        if not value.isfinite().all():
            yield f"model.{name} is not finite"
        if name.rpartition(".")[2] in ("running_var", "num_batches_tracked") and (value < 0).any():
            yield f"model.{name} is below 0"


def _optimizer(optimizer: torch.optim.Optimizer, theirs: Any, step: Any) -> Iterator[str]:
    yield from key_problems({"state": 0, "param_groups": 0}, theirs, "optimizer.")
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
            if problem := tensor_problem(like, value, f"{where}.{name}"):
                yield problem
            if not value.isfinite().all() or (name in ("step", "exp_avg_sq") and (value < 0).any()):
                yield f"{where}.{name} is not finite, or below 0"
    if needed and len(kept_of) < len(params):
        yield f"optimizer.state has {len(kept_of)} entries and should have {len(params)}"


def _config(values: Any, where: str, depth: int) -> Iterator[str]:
    """Settings as a run saves them: words and numbers in nested sections, compared with the run's."""
    if isinstance(values, dict) and depth:
        for key, value in values.items():
            if isinstance(key, str):
                yield from _config(value, f"{where}.{shorten(key)}", depth - 1)
            else:
                yield f"{where} has a key {_shown(key)}"
    elif isinstance(values, list) and depth:
        for value in values:
            yield from _config(value, where, depth - 1)
    elif not (values is None or isinstance(values, str | bool) or _is_number(values)):
        yield f"{where} is of type {type(values).__name__}"


def _of_type(value: Any, kind: type, name: str) -> Iterator[str]:
    if type(value) is not kind:
        yield f"{name} is of type {type(value).__name__}"
    elif isinstance(value, int) and not 0 <= value < 2**63:
        yield f"{name} is {_shown(value)}"


def _is_number(value: Any) -> bool:
    """Finite, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """A value in a message: a tensor or a dict by its type, since printing it might take for ever."""
    return (
        shorten(repr(value)) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    )
