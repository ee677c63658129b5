"""The figures against double loops, sets and counting; every warning on both sides of its threshold, and on
simulated runs.
"""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_emp import diagnostics
from ssl_emp.diagnostics import (
    Finding,
    class_balance,
    diagnose,
    findings,
    gini,
    kept_overlap,
    next_to_say,
    noisy_share,
    share_not_trained_for,
    times_histogram,
)

masks = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*(st.lists(st.booleans(), min_size=n, max_size=n) for _ in range(2)))
)


# --- the figures ---


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


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_histogram_counts(times: list[int]) -> None:
    counted = Counter(times)
    assert times_histogram(torch.tensor(times, dtype=torch.int32), 6).tolist() == [
        counted[value] for value in range(7)
    ]


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


# --- the words ---

HEALTHY: dict[str, float | None] = {
    "kept_share": 0.7,
    "times_gini": 0.1,
    "idle_share": 0.01,
    "kept_overlap": 0.8,
    "kept_overlap_chance": 0.7,
    "score_repeat": 0.4,
    "score_repeat_samples": 5000.0,
    "std_loss": 0.6,
    "std_beta_memory": 1.2,
    "rank_correlation": 0.6,
    "class_ratio_min": 0.8,
    "class_min": 0.0,
    "class_ratio_max": 1.2,
    "class_max": 1.0,
    "noisy_kept": 0.2,
    "noisy_data": 0.2,
}


def found(
    figures: dict[str, float | None] | None = None, num_samples: int = 10_000, **keys: Any
) -> dict[str, Finding]:
    """By kind, with some figures and keys unlike the healthy ones."""
    settings: dict[str, Any] = {"policy": "emp", "beta": 5.0} | keys
    all_found = findings(HEALTHY | (figures or {}), num_samples=num_samples, **settings)
    assert all(
        finding.severity > 1 and "\n" not in finding.line and "prune." in finding.line
        for finding in all_found
    )
    by_kind = {finding.kind: finding for finding in all_found}
    assert len(by_kind) == len(all_found)
    return by_kind


@pytest.mark.parametrize(
    "policy", ["emp", "loss", "distance", "epsilon_greedy", "ucb", "random", "infobatch", "scan", "indices"]
)
def test_nothing_is_said_of_a_healthy_epoch(policy: str) -> None:
    assert not found(policy=policy)


@pytest.mark.parametrize(
    ("kind", "silent", "fires"),
    [
        ("ranking", {"score_repeat": 0.1}, {"score_repeat": 0.099}),
        ("ranking", {"score_repeat": -0.1}, {"score_repeat": -0.099}),
        ("ranking", {"score_repeat": -1, "score_reliability": 0.1}, {"score_reliability": 0.099}),
        (
            "ranking",
            {"score_reliability": None, "draw_reliability": 0.11},
            {"score_reliability": None, "draw_reliability": 0.02},
        ),
        ("drowned", {"std_beta_memory": 2.99}, {"std_beta_memory": 3.01}),
        ("drowned", {"std_beta_memory": 0.121}, {"std_beta_memory": 0.119}),
        (
            "rotation",
            {"kept_overlap": 0.7 - 0.2 * (0.7 - 0.4 / 0.7) + 0.001},
            {"kept_overlap": 0.7 - 0.2 * (0.7 - 0.4 / 0.7) - 0.001},
        ),
        ("idle", {"idle_share": 0.1}, {"idle_share": 0.101}),
        (
            "idle",
            {"kept_share": 0.1, "idle_share": 2 * 0.9**8},
            {"kept_share": 0.1, "idle_share": 2 * 0.9**8 + 0.001},
        ),
        ("noise", {"noisy_kept": 0.2299}, {"noisy_kept": 0.2301}),
        ("balance", {"class_ratio_min": 0.501}, {"class_ratio_min": 0.499}),
        ("balance", {"class_ratio_max": 1.999}, {"class_ratio_max": 2.001}),
    ],
)
def test_each_warning_on_both_sides_of_its_threshold(
    kind: str, silent: dict[str, float | None], fires: dict[str, float | None]
) -> None:
    assert not found(silent)
    assert set(found(fires)) == {kind}


def test_the_lines() -> None:
    everything: dict[str, float | None] = {
        "score_repeat": 0.08,
        "kept_overlap": 0.6,
        "std_beta_memory": 8.4,
        "idle_share": 0.12,
        "noisy_kept": 0.27,
        "class_ratio_min": 0.04,
        "class_ratio_max": 1.7,
    }
    assert [finding.line for finding in found(everything, class_names=["airplane", "cat"]).values()] == [
        "the ranking is no better than chance: scores of consecutive epochs correlate by 0.08 "
        "(5,000 samples), kept sets overlap by 60% where chance gives 70%; "
        "try prune.ema=0.2 or prune.adjust=true",
        "the memory term drowns the loss: its spread is 14 times the loss's, their rank correlation +0.60; "
        "try prune.memory=standardized with prune.beta=1 or prune.beta=0.36",
        "samples are pruned for having been trained (low-frequency learning): kept sets overlap by 60% where "
        "chance gives 70%; try prune.explore=0.1",
        "12% of the samples were not trained for 8 epochs; try prune.explore=0.1",
        (
            "mislabelled samples are over-represented among the kept: 27% against 20% in the data; "
            "try prune.explore=0.1"
        ),
        "class imbalance of the kept set: airplane 0.04 times its share, cat 1.7 times; some is expected "
        "of the method and forcing balance can cost accuracy; to even it, prune.explore=0.1",
    ]
    everything["std_beta_memory"] = 0.6
    remedies = {
        kind: finding.line.rpartition("; ")[2]
        for kind, finding in found(everything, ema=0.2, adjust=True, explore=0.1).items()
    }
    assert remedies == {  # what is turned already is not named again
        "rotation": "try prune.beta=10",
        "idle": "try prune.explore=0.2",
        "noise": "try prune.beta=10",
        "balance": "to even it, prune.explore=0.2",
    }
    everything |= {"score_reliability": 0.05}
    line = found(everything, ema=0.2, adjust=True)["ranking"].line
    assert "the score's reliability is 0.05, scores of consecutive" in line and line.endswith(
        "try prune.policy=random, which needs no score"
    )
    assert found({"std_beta_memory": 0.03, "std_loss": 3})["drowned"].line == (
        "the loss drowns the memory term: its spread is 100 times the memory term's, their rank correlation "
        "+0.60; try prune.memory=standardized with prune.beta=1 or prune.beta=5e+02"
    )
    assert found({"std_beta_memory": 8.4}, memory="standardized", beta=14)["drowned"].line.endswith(
        "; try prune.beta=1"
    )
    assert found({"noisy_kept": 0.3}, policy="loss", beta=0)["noise"].line.endswith("try prune.policy=emp")
    assert found({"kept_overlap": 0.6}, beta=0)["rotation"].line.endswith("try prune.beta=1")


OFF: dict[str, float | None] = {
    "score_repeat": 0.0,
    "kept_overlap": 0.6,
    "std_beta_memory": 60,
    "idle_share": 0.3,
    "noisy_kept": 0.4,
    "class_ratio_min": 0.1,
}


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("emp", {"ranking", "drowned", "rotation", "idle", "noise", "balance"}),
        ("loss", {"ranking", "rotation", "idle", "noise", "balance"}),
        ("infobatch", {"idle", "noise", "balance"}),
        ("random", {"idle", "balance"}),
        ("indices", {"balance"}),
    ],
)
def test_a_policy_is_judged_by_what_it_does(policy: str, kinds: set[str]) -> None:
    assert set(found(OFF, policy=policy)) == kinds


def test_a_subset_that_was_asked_to_stay_leaves_samples_idle_in_silence() -> None:
    assert set(found(OFF, policy="random", redraw_every=8)) == {"balance"}
    assert "idle" in found(OFF, policy="loss", redraw_every=8), "where the key has no effect"


def test_few_samples_are_not_judged() -> None:
    assert not found(OFF, num_samples=399)
    assert "ranking" not in found(OFF | {"score_repeat_samples": 399.0})
    assert "noise" in found({"noisy_kept": 0.235}) and "noise" not in found(
        {"noisy_kept": 0.235}, num_samples=400
    )
    assert "noise" in found({"noisy_kept": 0.245}, num_samples=400)  # 3 sqrt(0.2 * 0.8 / 280 * 0.3) = 0.039


def test_a_running_mean_that_resembles_itself_proves_nothing() -> None:
    assert "ranking" not in found({"score_repeat": 0.0}, ema=0.5)
    assert "ranking" in found({"score_repeat": 0.9, "score_reliability": 0.05}, ema=0.5)


def test_a_ranking_of_draws_is_judged_by_how_it_foresees_them() -> None:
    noise: dict[str, float | None] = {"score_reliability": 0.03, "draw_reliability": 0.1, "score_repeat": 0.0}
    foreseen: dict[str, Any] = {"policy": "foresight", "foresees": True, "ema": 0.3, "adjust": True}
    assert not found(noise | {"foresight": 0.37}, **foreseen), "samples are alike, their draws are not"
    line = found(noise | {"foresight": 0.09}, **foreseen)["ranking"].line
    assert "what is expected of a draw correlates with what it is by 0.09" in line and line.endswith(
        "try prune.ema=0.2"
    )
    assert not found({"score_reliability": 0.5, "foresight": 0.1}, **foreseen)
    assert "ranking" in found(noise | {"foresight": 0.37}, adjust=True), "known, but not what ranks"
    assert "ranking" in found(noise, **foreseen) and "ranking" in found(
        noise | {"foresight": None}, **foreseen
    )


def test_the_terms_are_compared_only_where_both_rank() -> None:
    off: dict[str, float | None] = {"std_beta_memory": 60}
    assert (
        found(off)
        and not found(off, beta=0.0)
        and not found(off, loss_weight=0.0)
        and not found(off, policy="ucb")
    )
    assert not found({"std_beta_memory": 4}, loss_weight=-2.0) and found(
        {"std_beta_memory": 4}, loss_weight=-1.0
    )
    assert not found({"std_loss": 0.0})


def test_a_kind_is_told_again_when_worse_or_after_ten_epochs() -> None:
    """Compared by epoch: severity 2 throughout, 3.5 from epoch 4 on, a second kind in between."""
    said: dict[str, tuple[int, float]] = {}
    told = []
    for epoch in range(26):
        found_now = [Finding("ranking", 2.0 if epoch < 4 else 3.5, "a"), Finding("idle", 1.1, "b")]
        finding = next_to_say(found_now, said, epoch)
        if finding:
            said[finding.kind] = (epoch, finding.severity)
            told.append((epoch, finding.kind))
    assert told == [
        (0, "ranking"),
        (1, "idle"),
        (4, "ranking"),
        (11, "idle"),
        (14, "ranking"),
        (21, "idle"),
        (24, "ranking"),
    ]
    assert next_to_say([], said, 99) is None
    assert next_to_say(
        [Finding("ranking", 2, "a"), Finding("idle", 9, "b")], {"ranking": (0, 1.0)}, 5
    ) == Finding("idle", 9, "b")


# --- simulated runs ---


def simulate(
    policy: str, noise: float, epochs: int = 14, count: int = 4000, fraction: float = 0.5
) -> list[dict[str, Finding]]:
    """Policies on made-up scores, all observed each epoch; -> what is found, epoch by epoch.

    The worth of a sample wanders: 0.8 of it lasts an epoch. `rotating` lowers a score by being trained, as a
    loss is.
    """
    generator = torch.Generator().manual_seed(1)
    worth = torch.randn(count, generator=generator)
    labels, everyone = torch.arange(count) % 10, torch.ones(count, dtype=torch.bool)
    times = torch.zeros(count, dtype=torch.int32)
    last, scores, result = times - 1, torch.full((count,), torch.inf), []
    for epoch in range(epochs):
        kept_count = count if epoch == 0 else round(count * (1 - fraction))
        rank_by = torch.rand(count, generator=generator) if policy == "random" else scores
        kept = rank_by.topk(kept_count).indices
        before, scores_before = last.clone(), scores
        last[kept], times[kept] = epoch, times[kept] + 1
        worth = 0.8 * worth + 0.6 * torch.randn(count, generator=generator)
        scores = worth + noise * torch.randn(count, generator=generator)
        if policy == "rotating":
            scores[kept] -= 3
        figures = diagnose(
            epoch,
            times_trained=times,
            last_trained=last,
            last_trained_before=before if epoch > 1 else None,
            scores=scores,
            scores_before=scores_before,
            fresh=everyone,
            labels=labels,
            num_classes=10,
        )
        said = findings(
            figures | {"kept_share": kept_count / count},
            num_samples=count,
            policy="random" if policy == "random" else "loss",
            beta=0.0,
        )
        result.append({finding.kind: finding for finding in said} if epoch else {})
    return result


def test_a_reliable_ranking_and_a_random_choice_are_left_in_peace() -> None:
    assert not any(simulate("ranked", noise=0.5, fraction=0.3))
    assert not any(simulate("random", noise=0.5))
    assert not any(simulate("random", noise=0.5, fraction=0.8))


def test_a_ranking_of_noise_is_found() -> None:
    kinds = [set(found) for found in simulate("ranked", noise=10)]
    assert all("ranking" in found for found in kinds[1:]) and not any("rotation" in found for found in kinds)


def test_rotation_is_found() -> None:
    kinds = [set(found) for found in simulate("rotating", noise=0.5)]
    assert all(found - {"idle"} == {"rotation"} for found in kinds[2:])


def test_a_fixed_choice_leaves_samples_idle() -> None:
    """Half of the samples are never trained after epoch 0: found when the window is full, not before."""
    last = torch.zeros(1000, dtype=torch.int32)
    for epoch in range(1, 12):
        last[:500] = epoch
        figures = diagnose(epoch, times_trained=last, last_trained=last) | {"kept_share": 0.5}
        kinds = {finding.kind for finding in findings(figures, num_samples=1000, policy="loss", beta=0.0)}
        assert kinds == ({"idle"} if epoch >= diagnostics.IDLE_EPOCHS else set()), epoch


@pytest.mark.parametrize("kept", [200, 360])
def test_chance_alone_fires_nothing_in_small_sets(kept: int) -> None:
    """A random choice is rarely accused of rotation or noise at the smallest set: 3 standard errors."""
    drawn, accused = random.Random(0), Counter[str]()
    for _ in range(300):
        now, before = (
            torch.tensor(drawn.sample([True] * kept + [False] * (400 - kept), 400)) for _ in range(2)
        )
        noisy = torch.tensor(drawn.sample([True] * 80 + [False] * 320, 400))
        figures = diagnose(
            5,
            times_trained=now.int(),
            last_trained=torch.where(now, 5, 0),
            last_trained_before=torch.where(before, 4, 0),
            is_noisy=noisy,
        )
        accused.update(
            finding.kind
            for finding in findings(
                figures | {"kept_share": kept / 400}, num_samples=400, policy="loss", beta=0.0
            )
        )
    assert accused["rotation"] + accused["noise"] <= 4, accused
