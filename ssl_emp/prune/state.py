"""Whether a state that was loaded fits the pruner that is to go on from it: every entry, before any of it is
used.

It may come from a damaged or foreign file: each tensor must have the type, shape and range that a save could
have given it.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ssl_emp.prune.pruner import Pruner

MAY_BE_INFINITE = ("last", "terms", "score")  # +inf: never seen
LOWEST = {
    "variance": 0,
    "times_scored": 0,
    "times_trained": 0,
    "scored_epoch": -1,
    "trained_epoch": -1,
}  # -1: never


def tensor_problem(ours: Any, theirs: Any, name: str) -> str | None:
    """Why a loaded entry is not a plain tensor such as ours, else None."""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return f"{name} is of type {type(theirs).__name__}"
    plain = type(theirs) in (Tensor, torch.nn.Parameter) and theirs.layout == torch.strided
    if not plain or theirs.is_quantized or theirs.is_meta:
        return f"{name} is no plain tensor"
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return (
            f"{name} is {theirs.dtype} {tuple(theirs.shape)} and should be {ours.dtype} {tuple(ours.shape)}"
        )
    return None


def key_problems(ours: dict[Any, Any], theirs: Any, where: str) -> Iterator[str]:
    """Entries that are missing or not known; `where` ends in a point."""
    if not isinstance(theirs, dict):
        yield f"{where.rstrip('.') or 'the state'} is of type {type(theirs).__name__}"
        return
    yield from (f"{where}{name} is missing" for name in ours if name not in theirs)
    yield from (f"{where}{str(name)[:80]!r} is not known" for name in theirs if name not in ours)


def state_problems(state: Any, identity: dict[str, Any], pruner: "Pruner") -> Iterator[str]:
    """What does not fit, the first first."""
    keys = dict.fromkeys([*identity, "step", "told", "record", "chosen"])
    yield from key_problems(keys, state, "")
    yield from (
        f"{name} was {state[name]!r:.80} and is now {mine!r}"
        for name, mine in identity.items()
        if name != "plan"
        and (type(state[name]) is not type(mine) or state[name] != mine)
        # the name alone is what states held before they held the keys
        and not (name == "policy" and state[name] == pruner.policy.name)
    )
    most = max(pruner.total_steps, sum(pruner.steps))
    if type(state["step"]) is not int or not 0 <= state["step"] <= most:
        yield f"step is {state['step']!r:.80} of {most}"
    plan = pruner.plan.at(pruner.epoch_of(max(state["step"] - 1, 0)))
    planned = [plan.epochs, plan.prune_fraction, plan.warmup_epochs, plan.anneal_fraction, plan.rounds]
    is_plan = isinstance(state["plan"], list) and all(type(part) in (int, float) for part in state["plan"])
    if not is_plan or state["plan"] != planned:
        yield (
            f"the plan (epochs, fraction, warm-up, annealing, rounds) was {state['plan']!r:.80} and "
            f"is now {planned}"
        )
    yield from _told_problems(state["told"])
    record = pruner.record.state_dict()
    yield from _tensor_problems(record, state["record"], "record.")
    if not isinstance(state["chosen"], dict):
        yield f"chosen is of type {type(state['chosen']).__name__}"
    for epoch, entry in state["chosen"].items():
        yield from _chosen_problems(epoch, entry, pruner)


def _chosen_problems(epoch: Any, entry: Any, pruner: "Pruner") -> Iterator[str]:
    """The samples of an epoch under way, their weights, and what its figures will compare with."""
    where = f"chosen.{epoch!r:.20}."
    if type(epoch) is not int or not 0 <= epoch <= pruner.epoch_of(pruner.total_steps):
        yield f"chosen has an epoch {epoch!r:.80}"
    yield from key_problems(dict.fromkeys(("batches", "weight", "before")), entry, where)
    full = pruner.num_samples // pruner.batch_size
    steps = pruner.steps[epoch] if epoch < len(pruner.steps) else full
    batches, weight, before = entry["batches"], entry["weight"], entry["before"]
    like = torch.empty(steps, pruner.batch_size, dtype=torch.int64, device="meta")
    if problem := tensor_problem(like, batches, f"{where}batches"):
        yield problem
    if batches.min() < 0 or batches.max() >= pruner.num_samples:
        yield f"{where}batches name samples beyond 0 to {pruner.num_samples - 1}"
    if len(batches.unique()) < batches.numel():
        yield f"{where}batches name a sample twice"
    if weight is not None:
        if problem := tensor_problem(
            torch.empty(pruner.num_samples, device="meta"), weight, f"{where}weight"
        ):
            yield problem
        if not (weight.isfinite() & (weight >= 0)).all():
            yield f"{where}weight is below 0 or not finite"
    record = pruner.record
    known = {
        "trained_epoch": record.trained_epoch,
        "scored_epoch": record.scored_epoch,
        "score": record.last[0],
    }
    if not isinstance(before, dict) or not set(before) <= set(known):
        yield f"{where}before has other entries than {', '.join(known)}"
    if before and not {"trained_epoch", "scored_epoch"} <= set(before):
        yield f"{where}before lacks trained_epoch or scored_epoch"
    yield from _tensor_problems({name: known[name] for name in before}, before, f"{where}before.")


def _tensor_problems(ours: dict[str, Any], theirs: Any, where: str) -> Iterator[str]:
    """Every tensor such as ours, and in the range of its name."""
    yield from key_problems(ours, theirs, where)
    for name, mine in ours.items():
        value = theirs[name]
        if problem := tensor_problem(mine, value, f"{where}{name}"):
            yield problem
        if name in MAY_BE_INFINITE:
            if (value.isnan() | (value == -torch.inf)).any():
                yield f"{where}{name} is NaN or minus infinity"
        elif not value.isfinite().all():
            yield f"{where}{name} is not finite"
        if name in LOWEST and (value < LOWEST[name]).any():
            yield f"{where}{name} is below {LOWEST[name]}"


def _told_problems(told: Any) -> Iterator[str]:
    if not isinstance(told, dict):
        yield f"told is of type {type(told).__name__}"
    for kind, entry in told.items():
        fits = (
            isinstance(kind, str) and isinstance(entry, tuple) and len(entry) == 2 and type(entry[0]) is int
        )
        if not fits or type(entry[1]) not in (int, float) or math.isnan(entry[1]):
            yield f"told.{str(kind)[:80]!r} is {entry!r:.80}"
