"""The figures of an epoch against double loops, sets and counting."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_emp.prune.figures import (
    class_balance,
    describe_terms,
    diagnose,
    gini,
    kept_overlap,
    noisy_share,
    rank_correlation,
    share_not_trained_for,
)

masks = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*(st.lists(st.booleans(), min_size=n, max_size=n) for _ in range(2)))
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_gini_is_the_mean_difference_of_all_pairs(times: list[int]) -> None:
    total = sum(times)
    pairs = sum(abs(a - b) for a in times for b in times)
    expected = pairs / (2 * len(times) * total) if total else 0.0
    assert gini(torch.tensor(times, dtype=torch.int32)).item() == pytest.approx(expected, abs=1e-12)


def test_gini_of_one_of_equals_and_of_one_who_has_all() -> None:
    assert gini(torch.tensor([7])) == 0
    assert gini(torch.full((100,), 3)) == 0
    assert gini(torch.eye(50, dtype=torch.int32)[0]).item() == pytest.approx(49 / 50)


@given(masks)
def test_overlap_is_that_of_the_sets(both: tuple[list[bool], list[bool]]) -> None:
    now, before = ({i for i, kept in enumerate(mask) if kept} for mask in both)
    expected = len(now & before) / len(now) if now else 0.0
    assert kept_overlap(torch.tensor(both[0]), torch.tensor(both[1])).item() == pytest.approx(expected)
    assert noisy_share(torch.tensor(both[0]), torch.tensor(both[1])).item() == pytest.approx(expected)


def test_overlap_of_independent_sets_is_the_chance_that_is_stated() -> None:
    generator = torch.Generator().manual_seed(0)
    now, before = (torch.rand(100_000, generator=generator) < share for share in (0.3, 0.6))
    assert kept_overlap(now, before).item() == pytest.approx(before.double().mean().item(), abs=0.01)


@given(st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=8), st.integers(1, 6))
def test_idle_share_is_that_of_the_samples_missing_from_the_last_kept_sets(
    history: list[set[int]], num_epochs: int
) -> None:
    epoch = len(history) - 1
    last = torch.tensor(
        [max((e for e, kept in enumerate(history) if i in kept), default=-1) for i in range(10)],
        dtype=torch.int32,
    )
    recent = set().union(*history[-num_epochs:])
    expected = sum(i not in recent for i in range(10)) / 10 if len(history) >= num_epochs else 0.0
    assert share_not_trained_for(last, epoch, num_epochs).item() == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30))
def test_class_balance_by_counting(samples: list[tuple[int, bool]]) -> None:
    samples = [*samples, (0, True)]  # one at least is kept
    ratio, expected, entropy = class_balance(
        torch.tensor([k for _, k in samples]), torch.tensor([label for label, _ in samples]), 5
    )
    data, kept = Counter(label for label, _ in samples), Counter(label for label, k in samples if k)
    for label in range(5):
        if not data[label]:
            assert ratio[label].isnan() and expected[label] == 0
            continue
        by_chance = kept.total() * data[label] / len(samples)
        assert expected[label].item() == pytest.approx(by_chance)
        assert ratio[label].item() == pytest.approx(kept[label] / by_chance)
    shares = [count / kept.total() for count in kept.values()]
    bits = -sum(share * math.log2(share) for share in shares)
    assert entropy.item() == pytest.approx(bits / math.log2(len(data)) if len(data) > 1 else 1.0)


class HostReads(TorchDispatchMode):
    """Counts operations for which a GPU would be waited for; `.tolist()` is counted where it is called, by
    its one stack.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition(".")[0].removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "bincount", "_unique2")
        self.names += [name] if by_mask or name in waits else []
        return function(*args, **(kwargs or {}))


def epoch_inputs(count: int = 1000, seed: int = 0) -> dict[str, Any]:
    """An epoch of a random choice with everything known; some samples never scored, never trained."""
    generator = torch.Generator().manual_seed(seed)
    scores, before = torch.randn(2, count, generator=generator)
    before[:5] = scores[5:10] = torch.inf
    return {
        "times_trained": torch.randint(0, 10, (count,), generator=generator, dtype=torch.int32),
        "last_trained": torch.randint(-1, 10, (count,), generator=generator, dtype=torch.int32),
        "last_trained_before": torch.randint(-1, 9, (count,), generator=generator, dtype=torch.int32),
        "scores": scores,
        "scores_before": before,
        "fresh": torch.rand(count, generator=generator) < 0.5,
        "labels": torch.randint(0, 2, (count,), generator=generator),
        "num_classes": 2,
        "is_noisy": torch.rand(count, generator=generator) < 0.2,
    }


def test_diagnose_gathers_the_figures_over_the_right_samples() -> None:
    inputs = epoch_inputs()
    figures = diagnose(9, **inputs)
    now, before = inputs["last_trained"] == 9, inputs["last_trained_before"] == 8
    assert figures["kept_overlap"] == pytest.approx(kept_overlap(now, before).item())
    assert figures["kept_overlap_chance"] == pytest.approx(before.float().mean().item())
    assert figures["times_gini"] == pytest.approx(gini(inputs["times_trained"]).item())
    # epochs 2 .. 9 are 8
    assert figures["idle_share"] == pytest.approx((inputs["last_trained"] < 2).float().mean().item())
    assert figures["noisy_kept"] == pytest.approx((inputs["is_noisy"] & now).sum().item() / now.sum().item())
    assert figures["noisy_data"] == pytest.approx(inputs["is_noisy"].float().mean().item())
    ordered = sorted(inputs["times_trained"].tolist())
    assert [figures[f"times_p{percent}"] for percent in (10, 50, 90)] == [
        ordered[100],
        ordered[500],
        ordered[899],
    ]

    pairs = [
        (a, b)
        for a, b, fresh in zip(
            inputs["scores"].tolist(), inputs["scores_before"].tolist(), inputs["fresh"].tolist(), strict=True
        )
        if fresh and math.isfinite(a) and math.isfinite(b)
    ]
    places = [
        {value: place for place, value in enumerate(sorted(column))} for column in zip(*pairs, strict=True)
    ]
    apart = sum((places[0][a] - places[1][b]) ** 2 for a, b in pairs)
    assert figures["score_repeat_samples"] == len(pairs) < inputs["fresh"].sum()
    assert figures["score_repeat"] == pytest.approx(
        1 - 6 * apart / (len(pairs) * (len(pairs) ** 2 - 1)), abs=1e-4
    )


def test_diagnose_names_the_extreme_classes_and_leaves_out_the_small_ones() -> None:
    labels = torch.tensor([0] * 1000 + [1] * 1000 + [3] * 1000 + [4] * 40)  # none of class 2
    trained = torch.cat(
        [torch.arange(1000) < kept for kept in (300, 900, 600)] + [torch.zeros(40, dtype=torch.bool)]
    )
    last = torch.where(trained, 5, 4)
    figures = diagnose(
        5, times_trained=torch.ones_like(last), last_trained=last, labels=labels, num_classes=5
    )
    assert (figures["class_min"], figures["class_max"]) == (0, 1)
    assert figures["class_ratio_min"] == pytest.approx((300 / 1800) / (1000 / 3040))
    assert figures["class_ratio_max"] == pytest.approx((900 / 1800) / (1000 / 3040))
    few = slice(980, 1020)
    figures = diagnose(5, times_trained=last[few], last_trained=last[few], labels=labels[few], num_classes=5)
    assert "class_entropy" in figures and not {
        "class_min",
        "class_max",
        "class_ratio_min",
        "class_ratio_max",
    } & set(figures)


def test_diagnose_waits_for_the_device_twice() -> None:
    inputs, reads = epoch_inputs(), HostReads()
    with reads:
        diagnose(9, **inputs)
    assert reads.names == ["nonzero"]  # and the read-out


@pytest.mark.gpu
def test_diagnose_on_a_gpu_gives_the_same() -> None:
    inputs = epoch_inputs()
    on_gpu: dict[str, Any] = {
        name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    assert diagnose(9, **on_gpu) == pytest.approx(diagnose(9, **inputs), abs=1e-5)


def test_diagnose_leaves_out_what_cannot_be_known() -> None:
    one: dict[str, Any] = {
        "times_trained": torch.ones(1, dtype=torch.int32),
        "last_trained": torch.zeros(1, dtype=torch.int32),
    }
    assert set(diagnose(0, **one)) == {"times_gini", "idle_share", "times_p10", "times_p50", "times_p90"}
    never = torch.full((1,), torch.inf)
    figures = diagnose(
        0, **one, scores=torch.zeros(1), scores_before=never, fresh=torch.ones(1, dtype=torch.bool)
    )
    assert figures["score_repeat_samples"] == 0 and "score_repeat" not in figures
    equal: dict[str, Any] = {name: torch.zeros(500) for name in ("scores", "scores_before")} | {
        "fresh": torch.ones(500, dtype=torch.bool)
    }
    figures = diagnose(
        0,
        times_trained=torch.ones(500, dtype=torch.int32),
        last_trained=torch.zeros(500, dtype=torch.int32),
        **equal,
    )
    assert figures["score_repeat"] == 0  # equal scores rank nothing


def spearman(a: list[float], b: list[float]) -> float:
    """Of values without ties, by the differences of their places."""
    places = [{value: place for place, value in enumerate(sorted(column))} for column in (a, b)]
    apart = sum((places[0][x] - places[1][y]) ** 2 for x, y in zip(a, b, strict=True))
    return 1 - 6 * apart / (len(a) * (len(a) ** 2 - 1))


def test_rank_correlation_is_spearmans() -> None:
    a, b = torch.randn(2, 60)
    assert rank_correlation(a, a + b).item() == pytest.approx(
        spearman(a.tolist(), (a + b).tolist()), abs=1e-6
    )
    assert rank_correlation(a, torch.ones(60)) == 0 == rank_correlation(a[:0], b[:0])


def test_ties_share_a_rank() -> None:
    """Of supervised losses most may be exactly 0: their order in memory is nothing that two scores share."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2000, generator=generator)
    a[torch.rand(2000, generator=generator) < 0.9] = 0.0
    b[torch.rand(2000, generator=generator) < 0.9] = 0.0
    ranked = [rankdata(column.numpy()) for column in (a, b)]
    assert rank_correlation(a, b).item() == pytest.approx(np.corrcoef(*ranked)[0, 1], abs=1e-6)
    assert abs(rank_correlation(a, b)) < 0.1


def test_the_terms_are_described_as_the_formula_uses_them() -> None:
    """Mean and spread of the loss, the spread of beta * memory, and how they go together: with the distance,
    minus the memory.
    """
    loss, memory = torch.rand(200) * 2, -torch.rand(200)
    memory[50:] -= loss[50:]
    found = describe_terms(torch.stack([loss, memory]), 3.0, standardized=False)
    values = [value for value in loss.double().tolist() if value < math.log(2)]
    assert found["learned_share"] == pytest.approx(len(values) / 200)
    assert found["loss"] == pytest.approx(loss.mean().item())
    assert found["std_loss"] == pytest.approx(loss.std().item())
    assert found["std_beta_memory"] == pytest.approx(3 * memory.std().item(), rel=1e-5)
    assert found["rank_correlation"] == pytest.approx(spearman(loss.tolist(), (-memory).tolist()), abs=1e-5)
    scaled = describe_terms(torch.stack([loss, 100 * memory]), 3.0, standardized=True)
    assert scaled["std_beta_memory"] == pytest.approx(3 * loss.std().item(), rel=1e-4), "in nats"
    loss[7] = memory[7] = torch.inf  # of a step that was skipped
    without = torch.arange(200) != 7
    with_gap = describe_terms(torch.stack([loss, memory]), 3.0, standardized=False)
    assert with_gap == pytest.approx(
        describe_terms(torch.stack([loss, memory])[:, without], 3.0, standardized=False)
    )
    same = describe_terms(torch.stack([loss[without], torch.full((199,), -0.5)]), 3.0, standardized=True)
    assert same["std_beta_memory"] == 0 == same["rank_correlation"], "memory that is alike decides nothing"
