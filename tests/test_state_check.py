"""A checkpoint whose hash is right may still hold anything: every entry is of the type, shape and range that
a save could give it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_emp.commands import pretrain
from ssl_emp.commands.job import prepare
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.optim import build_optimizer
from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.run.report import Report
from ssl_emp.run.state_check import check_plain, check_state

Place = tuple[Any, ...]
Stopped = tuple[Path, dict[str, Any], Callable[[dict[str, Any]], None]]
NOT_WEIGHED = ("weight",)  # may be None
# compared with the run's by others; here their types count
FREE = ("config", "fingerprint", "bf16", "threads")


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def stopped(
    request: pytest.FixtureRequest, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Stopped:
    """A run that goes on within a pruned epoch whose samples have weights: its directory, job, checkpoint,
    and the check of another.
    """
    out = tmp_path_factory.mktemp("stopped") / "run"
    keys = [
        f"out={out}",
        "epochs=3",
        "prune.anneal_fraction=0",
        "prune.rescale=true",
        "checkpoint.every_steps=4",
    ]
    keys += [
        f"optimizer.name={request.param}",
        "prune.ema=0.5",
        "monitor.knn_every=0",
        "monitor.reliability_every=0",
    ]
    assert pretrain.main(["--config", str(tiny_config), *keys]) == 0
    max((out / "checkpoints").glob("step_*.pt")).unlink()  # of its end
    state, _ = load_checkpoint(out / "checkpoints")
    assert state is not None and state["step_in_epoch"]
    chosen = state["pruner"]["chosen"][state["epoch"]]
    assert chosen["weight"] is not None and chosen["before"]
    del state["format"], state["written_by"]
    job = prepare(load_config(out / "config.yaml", []), Report(silent=True))

    def check(other: dict[str, Any]) -> None:
        optimizer = build_optimizer(job.model, request.param, 0.05, 0.9, job.config.optimizer.weight_decay)
        check_plain(other, out)
        check_state(other, state, optimizer, job.pruner, out)

    return out, state, check


def places(tree: Any, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*place, key))


def at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def with_value(state: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """The state with another value at a place; tuples become what they were."""

    def put(tree: Any, rest: Place) -> Any:
        if not rest:
            return value
        if isinstance(tree, dict):
            return tree | {rest[0]: put(tree[rest[0]], rest[1:])}
        return type(tree)(
            put(part, rest[1:]) if number == rest[0] else part for number, part in enumerate(tree)
        )

    changed: dict[str, Any] = put(state, place)
    return changed


def wrong_values(value: Any, place: Place) -> Iterator[Any]:
    """What a stranger may put in the place of a value."""
    yield object
    if isinstance(value, Tensor):
        yield from (
            "text",
            7,
            {},
            value.unsqueeze(0),
            value.to(torch.complex64),
            value.to_sparse() if value.dim() else "none",
        )
        if value.numel() > 1:
            yield from (
                value.flatten()[:-1],
                value.flatten()[0].expand(value.shape) if place == ("norms",) else "none",
            )
        if value.is_floating_point() and not value.numel():
            yield value.double()  # of an empty one the type alone can be wrong
        elif value.is_floating_point():
            yield from (value * torch.nan, value - torch.inf, value.double())
        else:
            yield from (value.to(torch.float32), value - 10**6)
        if place[-1] == "batches":
            yield from (value + 10**6, value[0].expand(value.shape).contiguous(), value[:, :-1], value[1:])
        if place[-1] not in NOT_WEIGHED:
            yield None
    elif isinstance(value, bool):
        yield from (1, "yes", None, torch.tensor(True))
        if place[0] not in FREE and place[0] != "optimizer":
            yield not value
    elif isinstance(value, int | float):
        yield from ("x", None, [1], torch.nan, torch.inf)
        if place[0] not in FREE:
            yield from (-5, -(2**70))
            yield from (
                (value + 10**6, value + 0.5) if isinstance(value, int) and place[0] != "optimizer" else ()
            )
    elif isinstance(value, str):
        yield from (7, b"bytes", ["a"])
    elif isinstance(value, dict):
        yield from ([], 3, "text")
        if place[:2] == ("optimizer", "param_groups"):  # what is more or less there is not used
            return
        yield from ({"more": 1} | value, {-1: 2} | value)
        if value:
            yield {key: part for key, part in list(value.items())[1:]}
    elif isinstance(value, list | tuple):
        yield from (3, {}, "text")


def test_every_entry_is_looked_at_before_the_first_is_used(stopped: Stopped) -> None:
    _, state, check = stopped
    accepted, tried = [], 0
    is_adamw = "exp_avg" in state["optimizer"]["state"][0]  # the rest is alike
    many = {("model", name) for name in list(state["model"])[6:]} | {
        ("optimizer", "state", number) for number in range(2, 1000)
    }
    for place in places(state):  # of the tensors of one kind the first ones
        if place[:2] in many or place[:3] in many or (is_adamw and place[0] != "optimizer"):
            continue
        value = at(state, place)
        if place[0] == "config":
            values: Iterator[Any] = iter(
                [object, torch.ones(3), {"a": {"b": {"c": {"d": {"e": 1}}}}}, float("nan"), {1: 2}]
            )
        elif place[:2] == ("optimizer", "param_groups") and len(place) > 3:
            values = iter(["x", object])
        else:
            values = wrong_values(value, place)
        for wrong in values:
            tried += 1
            try:
                check(with_value(state, place, wrong))
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 400, error
            else:
                accepted.append((place, str(wrong)[:40]))
    for name in state:
        tried += 1
        with pytest.raises(UserError, match=f"{name} is missing"):
            check({key: value for key, value in state.items() if key != name})
    assert not accepted and tried > 100, (accepted[:10], tried)


def test_a_checkpoint_as_it_was_is_accepted(stopped: Stopped) -> None:
    _, state, check = stopped
    check(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 3, "step_in_epoch": 0},
        {"epoch": 0},
        {"step": 0},
        {"step_in_epoch": 0},
        {"finished": True},
        {"pruner": {"told": {"idle": (1, float("nan"))}}},
        {"pruner": {"told": {"\x1b[2J": "x"}}},
        {"pruner": {"step": 3}},
        {"pruner": {"policy": "\x1b[2J"}},
        {"pruner": {"chosen": {}}},
        {"seconds": {"training": -1.0, "scoring": 0.0, "monitoring": 0.0}},
        {"bad_in_a_row": torch.tensor(-1)},
    ],
)
def test_entries_that_disagree_are_refused(stopped: Stopped, changes: dict[str, Any]) -> None:
    _, state, check = stopped
    if "pruner" in changes:
        changes = {"pruner": state["pruner"] | changes["pruner"]}
    with pytest.raises(UserError, match="does not fit the run") as caught:
        check(state | changes)
    assert str(caught.value).isprintable()


def test_a_resume_says_it_in_one_line(stopped: Stopped, capfd: pytest.CaptureFixture[str]) -> None:
    out, state, _ = stopped
    save_checkpoint(
        out / "checkpoints", state | {"epoch": "x\ny", "config": state["config"]}, state["step"] + 1
    )
    assert pretrain.main([f"--resume={out}"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "epoch is of type str" in said
