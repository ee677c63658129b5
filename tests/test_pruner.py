"""`Pruner` alone: EMP's formula in float64, what it may import, choices that stay, states refused."""

import ast
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_emp import prune
from ssl_emp.prune import POLICIES, Emp, Foresight, Indices, Policy, Pruner, Random, Seen, closeness, entropy
from ssl_emp.prune.figures import IDLE_EPOCHS
from ssl_emp.prune.policies import Loss
from ssl_emp.prune.record import Known

ROOT = Path(__file__).parent.parent
SAMPLES, BATCH, EPOCHS = 70, 8, 6  # 8 whole batches and a remainder


def views(epoch: int, index: Tensor) -> Tensor:
    """Covariates (n, 3), a pure function of (epoch, index)."""
    return torch.stack([((index * k + epoch * 31) % 17) / 17 for k in (3, 5, 7)], 1).float()


def named(name: str) -> Policy:
    return Indices(index=torch.arange(SAMPLES).flip(0)) if name == "indices" else POLICIES[name]()


def make_pruner(policy: str | Policy = "emp", **options: Any) -> Pruner:
    chosen: dict[str, Any] = {"batch_size": BATCH, "epochs": EPOCHS, "fraction": 0.4, "seed": 3}
    chosen |= {"anneal_fraction": 0.2, "device": "cpu", "covariates": views}
    policy = named(policy) if policy in POLICIES else policy
    return Pruner(options.pop("samples", SAMPLES), policy=policy, **(chosen | options))


def terms_of(index: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Loss and memory as functions of sample and step."""
    return ((index * 7919 + step * 104729) % 1009).float() / 1009, -((index * 31 + step) % 13).float() / 13


def train(
    pruner: Pruner, until: int = 10**9, after_step: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Our own loop without a network, from where the pruner stands: the batches."""
    trained: list[list[int]] = []
    for epoch in range(pruner.epoch_of(pruner.step), len(pruner.steps)):
        for index in pruner.batches(epoch)[pruner.step - pruner.first_step(epoch) :]:
            if pruner.step >= until:
                return trained
            loss, memory = terms_of(index, pruner.step)
            pruner.weighted(index, loss)
            pruner.observe(pruner.gather(index, loss, memory))
            trained.append(index.tolist())
            after_step()
    return trained


def refused(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    return str(caught.value)


# ---- the formula


@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("loss_weight", [1.0, -2.0])
@pytest.mark.parametrize("scale", ["raw", "normalized", "standardized"])
def test_emps_score_is_the_papers_formula(scale: str, loss_weight: float, beta: float) -> None:
    """NT-Xent - beta * distance of the views, by loops over numbers in float64."""
    h_a, h_b, loss = torch.randn(30, 5), torch.randn(30, 5), torch.rand(30) * 3

    def unit(row: list[float]) -> list[float]:
        length = math.sqrt(math.fsum(x * x for x in row)) if scale == "normalized" else 1.0
        return [x / length for x in row]

    def scaled(values: list[float]) -> list[float]:
        if scale != "standardized":
            return values
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))
        return [(x - mean) / spread for x in values]

    distances = [math.dist(unit(a), unit(b)) for a, b in zip(h_a.tolist(), h_b.tolist(), strict=True)]
    losses, memories = scaled(loss.tolist()), scaled([-distance for distance in distances])
    expected = [loss_weight * x + beta * m for x, m in zip(losses, memories, strict=True)]

    memory = closeness(h_a, h_b, normalized=scale == "normalized")
    assert memory.tolist() == pytest.approx([-distance for distance in distances], rel=1e-5)
    unseen = torch.full((2, 1), torch.inf)
    known = Known(torch.cat([torch.stack([loss, memory]), unseen], 1), torch.zeros(31))
    score = Emp(beta=beta, loss_weight=loss_weight, memory=scale).score(known)
    assert score.dtype == torch.float32 and score[30] == torch.inf, "never seen: kept first"
    assert score[:30].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_supervised_score_adds_the_entropy() -> None:
    logits, loss = 3 * torch.randn(20, 4), torch.rand(20)
    expected = []
    for row, value in zip(logits.double().tolist(), loss.tolist(), strict=True):
        exponentials = [math.exp(x) for x in row]
        p = [x / math.fsum(exponentials) for x in exponentials]
        expected.append(value - 5 * math.fsum(x * math.log(x) for x in p))
    score = Emp().score(Known(torch.stack([loss, entropy(logits)]), torch.zeros(20)))
    assert score.tolist() == pytest.approx(expected, rel=1e-5)


def test_standardized_terms_have_equal_influence_whatever_their_scale() -> None:
    loss, memory = torch.rand(200), torch.randn(200)
    score = Emp(beta=1.0, memory="standardized").score
    one = score(Known(torch.stack([loss, memory]), torch.zeros(200)))
    other = score(Known(torch.stack([1000 * loss + 3, 0.01 * memory - 7]), torch.zeros(200)))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    alike = score(Known(torch.stack([torch.ones(200), memory]), torch.zeros(200)))
    assert alike.isfinite().all(), "losses that are all alike decide nothing"


def test_closeness_is_float32_and_detached() -> None:
    h_a, h_b = torch.randn(6, 5, requires_grad=True).bfloat16(), torch.randn(6, 5).bfloat16()
    memory = closeness(h_a, h_b)
    assert memory.dtype == torch.float32 and not memory.requires_grad
    torch.testing.assert_close(memory, -(h_a.float() - h_b.float()).norm(dim=1).detach())
    scaled = closeness(7 * h_a.float(), 0.1 * h_b.float(), normalized=True)
    torch.testing.assert_close(scaled, closeness(h_a, h_b, normalized=True))
    assert closeness(h_a, -h_a, normalized=True).allclose(torch.tensor(-2.0))
    assert closeness(torch.zeros(3, 4), torch.zeros(3, 4), normalized=True).eq(0).all()


# ---- what it may import, and what may name a policy


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, `a.b` of `from a import b` where b is a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{file.name}: an import without its package"
            is_package = node.module == "ssl_emp"
            yield from ((f"ssl_emp.{alias.name}" for alias in node.names) if is_package else [node.module])


def test_prune_imports_torch_numpy_and_keyed_alone() -> None:
    files = sorted(Path(prune.__file__).parent.glob("*.py"))
    assert len(files) > 8
    for file in files:
        for module in imports(file):
            top, ours = module.partition(".")[0], module.split(".")[:2]
            known = top in ("torch", "numpy") or top in sys.stdlib_module_names
            assert known or ours in (["ssl_emp", "keyed"], ["ssl_emp", "prune"]), (file.name, module)
    keyed = ROOT / "ssl_emp" / "keyed.py"
    assert {module.partition(".")[0] for module in imports(keyed)} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.whole
def test_a_fresh_interpreter_imports_prune_without_the_rest() -> None:
    heavy = ("torchvision", "pydantic", "pyarrow", "lightly", "lightning", "transformers", "yaml", "PIL")
    ask = f"import sys, ssl_emp.prune; print([name for name in {heavy} if name in sys.modules])"
    plain = f"import sys, torch, numpy; print([name for name in {heavy} if name in sys.modules])"
    found, by_torch = (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for code in (ask, plain)
    )
    assert found == by_torch == "[]\n"


def test_no_other_file_compares_a_policys_name() -> None:
    """A policy is asked what it is (`uses_scores`, `prunes`), never for its name."""

    def words(node: ast.AST) -> set[str]:
        parts = [child for child in ast.walk(node) if isinstance(child, ast.Constant)]
        return {part.value for part in parts if isinstance(part.value, str)}

    # `loss`, `random` and `none` are names of other things too, such as columns: there the other side counts
    everyday, others = {"loss", "random", "none", "distance", "indices", "scan"}, []
    for folder in ("ssl_emp", "linear_eval"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.is_relative_to(ROOT / "ssl_emp" / "prune"):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Compare | ast.MatchValue):
                    text = ast.unparse(node)
                    compared = words(node) & set(POLICIES)
                    if compared - everyday or (compared and "polic" in text):
                        others.append(f"{file.relative_to(ROOT)}:{node.lineno}: {text}")
    assert not others


# ---- choices


@pytest.mark.parametrize("name", POLICIES)
def test_an_epoch_is_chosen_once_and_every_resume_goes_on_with_it(name: str) -> None:
    """At every step of a run: a fresh pruner with its state trains on the same to the end."""
    whole = make_pruner(name)
    batches, states = [], []

    def note() -> None:
        epoch = whole.epoch_of(whole.step - 1)
        again = whole.batches(epoch)
        assert again is whole.batches(epoch), "chosen once"
        states.append({"step": whole.step, **torch_copy(whole.state_dict())})

    batches = train(whole, after_step=note)
    assert len(batches) == sum(whole.steps) == whole.step
    for state in states[:: 1 if name in ("emp", "foresight") else 5]:
        other = make_pruner(name)
        other.load_state_dict(state)
        assert train(other) == batches[state["step"] :], state["step"]
        for column, values in other.table().items():
            assert values.equal(whole.table()[column]), column


def torch_copy(tree: Any) -> Any:
    """A copy of a state such as a file holds."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: torch_copy(value) for key, value in tree.items()}
    return tree


@pytest.mark.parametrize("name", ["emp", "foresight", "ucb"])
def test_a_batch_that_does_not_hold_leaves_no_trace(name: str) -> None:
    """But for the position: the next batch is due. Its losses were NaN."""
    pruner, clean = make_pruner(name), make_pruner(name)
    train(pruner, 5)
    train(clean, 5)
    index = pruner.batches(0)[5]
    seen = pruner.gather(index, torch.full((BATCH,), torch.nan), torch.full((BATCH,), torch.nan))
    pruner.observe(seen, where=torch.tensor(False))
    before, after = clean.record.state_dict(), pruner.record.state_dict()
    assert all(values.equal(after[entry]) for entry, values in before.items()) and pruner.step == 6


def test_an_index_may_be_a_column() -> None:
    """Several processes exchange it as bits, which a view of a table has not in a row."""
    pruner = make_pruner("loss")
    pruner._gather = lambda part: part
    index = torch.stack([pruner.batches(0)[0]] * 2, 1)[:, 0]
    assert not index.is_contiguous()
    assert pruner.gather(index, torch.zeros(BATCH)).index.equal(index)


def test_a_loss_that_leaps_leaves_a_state_that_loads() -> None:
    """The square of a difference of 2e19 is beyond float32; inf would count as never seen."""
    pruner, again = make_pruner("ucb"), make_pruner("ucb")
    index = torch.arange(BATCH)
    for level in (1e20, 0.0, 3e38):
        pruner.record.observe(index, torch.full((2, BATCH), level), None, 0)
    assert pruner.policy.score(pruner.record.known)[:BATCH].isfinite().all()
    assert again.state_problem(pruner.state_dict()) is None


def test_a_state_goes_on_with_the_same_policy_only() -> None:
    state = make_pruner(Emp(beta=5)).state_dict()
    make_pruner(Emp(beta=5.0)).load_state_dict(state)
    other = make_pruner(Emp(beta=1, explore=0.1))
    said = refused(lambda: other.load_state_dict(state))
    assert said.endswith("policy was 'emp()' and is now 'emp(explore=0.1, beta=1.0)'")
    one, unlike = (Indices(index=torch.arange(SAMPLES).roll(shift)) for shift in (0, 1))
    state = make_pruner(one).state_dict()
    make_pruner(one).load_state_dict(state)
    refused(lambda: make_pruner(unlike).load_state_dict(state))
    make_pruner(one).load_state_dict(state | {"policy": "indices"})  # as it was written before


@dataclass(frozen=True, eq=False)
class Own(Loss):
    """A policy of somebody's own, with keys of any kind."""

    weights: np.ndarray = field(default_factory=lambda: np.ones(3))
    rule: Callable[[Tensor], Tensor] = torch.abs
    note: str | None = None


def test_a_policy_of_ones_own_is_described_alike_in_every_process() -> None:
    """Where a key has no text but its address, its kind stands for it."""
    assert Own().described == Own(rule=torch.square).described and "0x" not in Own().described
    assert Own().described != Own(weights=np.zeros(3)).described != Own(note="a").described
    make_pruner(Own()).load_state_dict(make_pruner(Own()).state_dict())


def test_scoring_that_nobody_does_is_told() -> None:
    pruner = make_pruner("loss", scoring="all")
    with pytest.warns(UserWarning, match="scoring is 'all' and pruner.rescore.* was not called"):
        train(pruner)


def test_scores_come_from_what_was_observed() -> None:
    """A few lines beside it: the highest loss + 5 * memory of the last time that each sample was seen."""
    pruner = make_pruner("emp")
    score = torch.full((SAMPLES,), torch.inf)
    for epoch, steps in enumerate(pruner.steps):
        chosen = pruner.batches(epoch)
        if pruner.plan.is_pruned(epoch):
            assert set(chosen.flatten().tolist()) == set(
                score.argsort(descending=True, stable=True)[: steps * BATCH].tolist()
            )
        for index in chosen:
            loss, memory = terms_of(index, pruner.step)
            score[index] = loss + 5 * memory
            pruner.observe(pruner.gather(index, loss, memory))
    assert pruner.table()["score"].equal(score)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rounds", [2, 3])
def test_rounds_train_each_sample_at_most_once_an_epoch(rounds: int, name: str) -> None:
    """And as many samples in an epoch as without rounds, up to a batch."""
    pruner, plain = (make_pruner(name, rounds_per_epoch=number) for number in (rounds, 1))
    batches = train(pruner)
    assert len(batches) == sum(plain.steps)
    if name in ("shorter", "indices"):
        assert batches == train(plain), "there is nothing to choose anew"
        return
    assert len(pruner.steps) == rounds * EPOCHS
    begin = 0
    for epoch in range(EPOCHS):
        count = sum(pruner.steps[epoch * rounds : (epoch + 1) * rounds])
        trained = sum(batches[begin : begin + count], [])
        assert len(trained) == len(set(trained)) == count * BATCH
        assert abs(count - plain.steps[epoch]) <= 1, epoch
        begin += count


def test_a_round_keeps_the_highest_of_its_part_by_the_scores_of_now() -> None:
    """Its part is what the round of an unpruned epoch trains on, so no round is harder by its place."""
    pruner = make_pruner("loss", rounds_per_epoch=2, anneal_fraction=0.0)
    unpruned = make_pruner("none", rounds_per_epoch=2, anneal_fraction=0.0)
    score = torch.full((SAMPLES,), torch.inf)
    for number, steps in enumerate(pruner.steps):
        chosen, part = pruner.batches(number), unpruned.batches(number).flatten().sort().values
        if pruner.plan.is_pruned(number):
            order = part[score[part].argsort(descending=True, stable=True)]
            assert set(chosen.flatten().tolist()) == set(order[: steps * BATCH].tolist()), number
        for index in chosen:
            loss, memory = terms_of(index, pruner.step)
            score[index] = loss
            pruner.observe(pruner.gather(index, loss, memory))


def test_rounds_of_an_epoch_are_no_rotation() -> None:
    """They share no sample by construction, so nothing is said of the overlap with the round before."""
    for rounds, is_told in ((1, True), (2, False)):
        pruner = make_pruner("loss", rounds_per_epoch=rounds, anneal_fraction=0.0)
        train(pruner)
        assert ("kept_overlap" in pruner.figures()) == is_told


def test_one_round_is_as_without() -> None:
    for name in POLICIES:
        assert train(make_pruner(name, rounds_per_epoch=1)) == train(make_pruner(name))


@pytest.mark.parametrize("policy", [Random(rescale=True), Emp(rescale=True), POLICIES["scan"](rescale=True)])  # type: ignore[call-arg]
def test_rescaled_the_kept_stand_for_all(policy: Policy) -> None:
    """A weight N / K in the pruned epochs, none in full ones; which samples are kept does not change."""
    pruner = make_pruner(policy)
    plain = make_pruner(policy.name)
    for epoch, steps in enumerate(pruner.steps):
        assert pruner.batches(epoch).equal(plain.batches(epoch))
        weight = SAMPLES / (steps * BATCH) if pruner.plan.is_pruned(epoch) else 1.0
        for index in pruner.batches(epoch):
            loss, memory = terms_of(index, pruner.step)
            assert pruner.weighted(index, loss).item() == pytest.approx(weight * loss.mean().item())
            for one in (pruner, plain):
                one.observe(one.gather(index, loss, memory))


@pytest.mark.parametrize("name", ["emp", "foresight"])
def test_two_processes_are_one(name: str) -> None:
    """Each gives its half of every batch; what all saw is that of one process, to the bit."""
    whole = make_pruner(name)
    parts: list[Tensor] = []

    def gather(part: Tensor) -> Tensor:
        parts.append(part)
        return torch.cat(parts[-2:]) if len(parts) % 2 == 0 else part

    pruner = make_pruner(name, gather=gather)
    for epoch in range(len(pruner.steps)):
        assert pruner.batches(epoch).equal(whole.batches(epoch))
        for index in pruner.batches(epoch):
            loss, memory = terms_of(index, pruner.step)
            seen: list[Seen] = [
                pruner.gather(index[part], loss[part], memory[part]) for part in (slice(0, 4), slice(4, 8))
            ]
            pruner.observe(seen[1])
            whole.observe(whole.gather(index, loss, memory))
    theirs = pruner.record.state_dict()
    assert all(values.equal(theirs[entry]) for entry, values in whole.record.state_dict().items())


def test_indices_of_any_size_travel_as_they_are() -> None:
    """They go through the exchange as the bits of float32, NaN patterns among them."""
    index = torch.tensor([0, 1, 2**24 + 1, 0x7FC00001, 2**31 - 1, 2**40 + 0x7F800001])
    seen = make_pruner("loss", samples=2**10).gather(index, torch.rand(6))
    assert seen.index.equal(index) and seen.index.dtype == torch.int64


# ---- arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0 of 70 samples"),
        ({"batch_size": 71}, "batch_size is 71 of 70 samples"),
        ({"epochs": 0}, "epochs is 0, give at least 1"),
        ({"fraction": 1.0}, "fraction is 1.0, allowed: 0 <= fraction < 1"),
        ({"fraction": -0.1}, "fraction is -0.1"),
        ({"fraction": math.nan}, "fraction is nan"),
        ({"warmup_epochs": 0}, "warmup_epochs is 0: before it is seen, no sample has a score"),
        ({"anneal_fraction": 1.5}, "anneal_fraction is 1.5"),
        ({"rounds_per_epoch": 0}, "rounds_per_epoch is 0"),
        ({"rounds_per_epoch": 9}, "less than a batch of 8 samples"),
        ({"fraction": 0.95}, "less than a batch of 8 samples"),
        ({"scoring": "fresh"}, "scoring is 'fresh', allowed: stale, pruned or all"),
        ({"policy": "epm"}, "did you mean emp?"),
        ({"policy": "foresight", "covariates": None}, "policy foresight needs covariates"),
        ({"policy": Foresight(ema=0.5), "covariates": None}, "policy foresight needs covariates"),
        ({"policy": Emp(adjust=True), "covariates": None}, "policy emp needs covariates"),
    ],
)
def test_arguments_out_of_range_are_one_line(options: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: make_pruner(**options))


def test_batches_that_did_not_come_from_the_pruner_are_refused() -> None:
    index = torch.arange(BATCH)
    assert "nothing is pruned" in refused(lambda: make_pruner().weighted(index, torch.rand(BATCH)))


# ---- looking


def test_the_table_holds_what_was_seen() -> None:
    pruner = make_pruner("emp")
    empty = pruner.table()
    assert empty["loss"].eq(torch.inf).all() and empty["scored_epoch"].eq(-1).all()
    batches = train(pruner)
    table = pruner.table()
    times, last = torch.zeros(SAMPLES, dtype=torch.int64), torch.full((SAMPLES,), torch.inf)
    for step, batch in enumerate(batches):
        index = torch.tensor(batch)
        times[index] += 1
        last[index] = terms_of(index, step)[0]
    assert table["index"].tolist() == list(range(SAMPLES))
    assert table["times_trained"].tolist() == times.tolist() and table["loss"].equal(last)
    assert table["score"].equal(table["loss"] + 5 * table["memory"])


def test_figures_and_advice_of_a_plain_loop() -> None:
    """A policy that ranks by noise is told that it does; figures of an epoch by counting."""
    samples = 800
    pruner = make_pruner("loss", samples=samples, batch_size=40, epochs=12, anneal_fraction=0.0)
    labels, lines = torch.arange(samples) % 2, []
    drawn = torch.Generator().manual_seed(0)
    assert pruner.figures() == {} and pruner.advice({}) is None
    before: set[int] = set()
    for epoch in range(12):
        kept = set(pruner.batches(epoch).flatten().tolist())
        losses = []
        for index in pruner.batches(epoch):
            losses.append(torch.rand(40, generator=drawn))
            pruner.observe(pruner.gather(index, losses[-1]))
        figures = pruner.figures(labels)
        assert figures["kept_share"] == len(kept) / samples
        assert figures["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
        assert ("idle_share" in figures) == (epoch > 0), "full epochs have less to tell"
        assert ("kept_overlap" in figures) == (epoch > 1)
        if epoch > 1:
            assert figures["kept_overlap"] == pytest.approx(len(kept & before) / len(kept))
            odd = sum(i % 2 for i in kept) / len(kept) / 0.5
            ratios = [figures["class_ratio_min"], figures["class_ratio_max"]]
            assert ratios == pytest.approx(sorted([odd, 2 - odd]))
        lines.append(pruner.advice(figures, ["even", "odd"]))
        before = kept
    told = [line for line in lines if line]
    assert lines[0] is None and any("little more than noise" in line for line in told)
    assert len(told) == len(set(told)) < 6 and len([line for line in told if "noise" in line]) == 1
    assert 12 > IDLE_EPOCHS


def test_a_healthy_run_is_told_nothing() -> None:
    pruner = make_pruner("random", samples=800, batch_size=40, epochs=8)
    for epoch in range(8):
        for index in pruner.batches(epoch):
            pruner.observe(pruner.gather(index, index / 800))
        assert pruner.advice(pruner.figures(torch.arange(800) % 2)) is None


# ---- states


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"samples": 80}, "samples was 70 and is now 80"),
        ({"policy": "loss"}, "policy was 'emp()' and is now 'loss()'"),
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"batch_size": 4}, "batch_size was 8 and is now 4"),
        ({"epochs": 7}, "the plan (epochs, fraction, warm-up, annealing, rounds) was [6"),
        ({"fraction": 0.3}, "was [6, 0.4, 1, 0.2, 1] and is now [6, 0.3, 1, 0.2, 1]"),
        ({"warmup_epochs": 2}, "is now [6, 0.4, 2, 0.2, 1]"),
        ({"anneal_fraction": 0.0}, "is now [6, 0.4, 1, 0.0, 1]"),
        ({"rounds_per_epoch": 2}, "is now [12, 0.4, 2, 0.2, 2]"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(other: dict[str, Any], words: str) -> None:
    pruner, second = make_pruner(), make_pruner(**other)
    train(pruner, 11)
    assert words in refused(lambda: second.load_state_dict(pruner.state_dict()))
    assert second.step == 0 and second.table()["loss"].eq(torch.inf).all(), "nothing was loaded"


Place = tuple[Any, ...]


def places(tree: Any, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*place, key))


def with_value(tree: Any, place: Place, value: Any) -> Any:
    """The state with another value at a place."""
    if not place:
        return value
    if isinstance(tree, dict):
        return tree | {place[0]: with_value(tree[place[0]], place[1:], value)}
    parts = list(tree)
    parts[place[0]] = with_value(parts[place[0]], place[1:], value)
    return type(tree)(parts)


def wrong_values(value: Any, place: Place) -> Iterator[Any]:
    """What a stranger may put in the place of a value."""
    yield from (object, "text", b"bytes")
    if isinstance(value, Tensor):
        yield from (7, {}, [], value.unsqueeze(0), value.to(torch.complex64), value.to("meta"))
        yield from (value.unsqueeze(0)[..., :0], value.to_sparse(), value.double(), value.bool())
        if value.is_floating_point() and value.numel():
            yield from (value * torch.nan, value - torch.inf)
            if place[-1] not in ("last", "terms", "score"):
                yield value + torch.inf
        elif not value.is_floating_point():
            yield value - 10**6
        if place[-1] == "batches":
            yield from (value + 10**6, value[:1].expand(value.shape).contiguous(), value[:-1])
        if place[-1] in ("weight", "variance"):
            yield value - 10
        if place[-1] != "weight":  # None: the policy does not weigh
            yield None
    elif isinstance(value, int | float):
        yield from (None, [1], torch.nan, True, torch.tensor(1))
        yield from (-5, value + 10**9) if place[0] != "told" else ()
    elif isinstance(value, dict):
        yield from ([], 3, None, {"more": 1} | value, {-1: 2} | value)
        if place != ("told",) and value and place != ("chosen",):
            yield {key: part for key, part in list(value.items())[1:]}
    elif isinstance(value, list | tuple):
        yield from (3, {}, value[:-1], (*value, 1))


@pytest.mark.parametrize(
    "policy", [Emp(ema=0.5, rescale=True), Foresight(shrink=True)], ids=["emp", "foresight"]
)
def test_every_entry_of_a_state_is_looked_at_before_the_first_is_used(policy: Policy) -> None:
    """Within a pruned epoch whose samples have weights, with a finding told."""
    pruner = make_pruner(policy, anneal_fraction=0.0)
    train(pruner, pruner.steps[0] + pruner.steps[1] + 2)
    pruner._told["idle"] = (1, 1.5)
    state = pruner.state_dict()
    assert state["chosen"] and any(entry["before"] for entry in state["chosen"].values())
    fresh, accepted, tried = make_pruner(policy, anneal_fraction=0.0), [], 0
    assert fresh.state_problem(state) is None
    for place in places(state):
        value = state
        for part in place:
            value = value[part]
        for wrong in wrong_values(value, place):
            tried += 1
            problem = fresh.state_problem(with_value(state, place, wrong))
            if problem is None:
                accepted.append((place, str(wrong)[:60]))
            else:
                assert problem.isprintable() and len(problem) < 300, problem
    for name in state:
        less = {key: value for key, value in state.items() if key != name}
        assert fresh.state_problem(less) == f"{name} is missing"
    strangers: list[Any] = [None, [], "text", 7, torch.ones(3)]
    for nothing in strangers:
        assert fresh.state_problem(nothing) is not None
    assert not accepted and tried > 200, (accepted[:10], tried)


@pytest.mark.parametrize("name", ["emp", "distance"])
def test_memory_that_is_missing_is_refused_by_the_policies_that_need_it(name: str) -> None:
    pruner = make_pruner(name)
    index = pruner.batches(0)[0]
    words = refused(lambda: pruner.update(index, torch.rand(BATCH)))
    assert f"policy {name} needs the memory term: update(index, loss, entropy(logits))" in words
    assert pruner.step == 0
    other = make_pruner("loss")
    other.batches(0)
    other.update(index, torch.rand(BATCH))
    assert other.step == 1
