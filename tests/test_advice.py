"""Every warning of `advice` on both sides of its threshold, its lines, and simulated runs."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from ssl_emp.prune import POLICIES, Emp, Foresight, Loss, Policy, Random, Ucb
from ssl_emp.prune.advice import Finding, findings, next_finding
from ssl_emp.prune.figures import IDLE_EPOCHS, diagnose

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
    figures: dict[str, float | None] | None = None,
    num_samples: int = 10_000,
    policy: Policy | None = None,
    **options: Any,
) -> dict[str, Finding]:
    """By kind, with some figures unlike the healthy ones."""
    all_found = findings(HEALTHY | (figures or {}), policy or Emp(), num_samples, **options)
    assert all(
        finding.severity > 1 and "\n" not in finding.line and "prune." in finding.line
        for finding in all_found
    )
    by_kind = {finding.kind: finding for finding in all_found}
    assert len(by_kind) == len(all_found)
    return by_kind


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_told_of_a_healthy_epoch(policy: str) -> None:
    assert not found(policy=POLICIES[policy]())


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
        "images are chosen by a score that is little more than noise, so hardly better than by chance "
        "(scores of one epoch and the next correlate by 0.08, 5,000 images; 60% of the kept were kept in the "
        "epoch before, 70% by chance); try prune.ema=0.2 or prune.adjust=true",
        "of the two parts of the score only the memory term decides which images are kept: it varies 14 "
        "times as much as the loss; for both to count, try prune.memory=standardized with prune.beta=1 or "
        "prune.beta=0.36",
        "images take turns: one that was trained on is left out of the next epoch for it (60% of the kept "
        "were kept in the epoch before, 70% by chance); try prune.explore=0.1",
        "12% of the images were in none of the last 8 epochs; try prune.explore=0.1",
        "images with a wrong label are kept too often: they are 27% of the kept and 20% of the data; "
        "try prune.explore=0.1",
        "the classes are kept unevenly: airplane at 0.04 times its share of the data, cat at 1.7 times; some "
        "of that is the method, and evening it can cost accuracy; to even it, try prune.explore=0.1",
    ]
    everything["std_beta_memory"] = 0.6
    remedies = {
        kind: finding.line.rpartition("; ")[2]
        for kind, finding in found(everything, policy=Emp(ema=0.2, adjust=True, explore=0.1)).items()
    }
    assert remedies == {  # what is turned already is not named again
        "rotation": "try prune.beta=10",
        "idle": "try prune.explore=0.2",
        "noise": "try prune.beta=10",
        "balance": "to even it, try prune.explore=0.2",
    }
    everything |= {"score_reliability": 0.05}
    line = found(everything, policy=Emp(ema=0.2, adjust=True))["ranking"].line
    assert "(the reliability of the score, from 0 to 1, is 0.05; scores of one" in line and line.endswith(
        "try prune.policy=random, which needs no score"
    )
    assert found({"std_beta_memory": 0.03, "std_loss": 3})["drowned"].line == (
        "of the two parts of the score only the loss decides which images are kept: it varies 100 times as "
        "much as the memory term; for both to count, try prune.memory=standardized with prune.beta=1 or "
        "prune.beta=5e+02"
    )
    assert found({"std_beta_memory": 8.4}, policy=Emp(memory="standardized", beta=14))[
        "drowned"
    ].line.endswith("; for both to count, try prune.beta=1")
    assert found({"noisy_kept": 0.3}, policy=Loss())["noise"].line.endswith("try prune.policy=emp")
    assert found({"kept_overlap": 0.6}, policy=Emp(beta=0.0))["rotation"].line.endswith("try prune.beta=1")


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
    assert set(found(OFF, policy=POLICIES[policy]())) == kinds


def test_a_subset_that_was_asked_to_stay_leaves_samples_idle_in_silence() -> None:
    assert set(found(OFF, policy=Random(redraw_every=8))) == {"balance"}


def test_few_samples_are_not_judged() -> None:
    assert not found(OFF, num_samples=399)
    assert "ranking" not in found(OFF | {"score_repeat_samples": 399.0})
    assert "noise" in found({"noisy_kept": 0.235}) and "noise" not in found(
        {"noisy_kept": 0.235}, num_samples=400
    )
    assert "noise" in found({"noisy_kept": 0.245}, num_samples=400)  # 3 sqrt(0.2 * 0.8 / 280 * 0.3) = 0.039


def test_a_running_mean_that_resembles_itself_proves_nothing() -> None:
    assert "ranking" not in found({"score_repeat": 0.0}, policy=Emp(ema=0.5))
    assert "ranking" in found({"score_repeat": 0.9, "score_reliability": 0.05}, policy=Emp(ema=0.5))


def test_a_ranking_of_draws_is_judged_by_how_it_foresees_them() -> None:
    noise: dict[str, float | None] = {"score_reliability": 0.03, "draw_reliability": 0.1, "score_repeat": 0.0}
    foreseen: dict[str, Any] = {"policy": Foresight()}
    assert not found(noise | {"foresight": 0.37}, **foreseen), "samples are alike, their draws are not"
    line = found(noise | {"foresight": 0.09}, **foreseen)["ranking"].line
    assert "expected and real losses of the coming views correlate by 0.09" in line and line.endswith(
        "try prune.ema=0.2"
    )
    assert not found({"score_reliability": 0.5, "foresight": 0.1}, **foreseen)
    assert "ranking" in found(noise | {"foresight": 0.37}, policy=Emp(adjust=True)), (
        "known, but not what ranks"
    )
    assert "ranking" in found(noise, **foreseen) and "ranking" in found(
        noise | {"foresight": None}, **foreseen
    )


def test_the_terms_are_compared_only_where_both_rank() -> None:
    off: dict[str, float | None] = {"std_beta_memory": 60}
    assert (
        found(off)
        and not found(off, policy=Emp(beta=0.0))
        and not found(off, policy=Emp(loss_weight=0.0))
        and not found(off, policy=Ucb())
    )
    assert not found({"std_beta_memory": 4}, policy=Emp(loss_weight=-2.0)) and found(
        {"std_beta_memory": 4}, policy=Emp(loss_weight=-1.0)
    )
    assert not found({"std_loss": 0.0})


def test_a_kind_is_told_once_and_one_at_a_time() -> None:
    """However much worse it becomes, and however long ago it was told."""
    told_before: dict[str, tuple[int, float]] = {}
    told = []
    for epoch in range(60):
        found_now = [Finding("ranking", 2.0 + epoch, "a"), Finding("idle", 1.1, "b")]
        found_now += [Finding("noise", 9.0, "c")] if epoch > 40 else []
        finding = next_finding(found_now, told_before)
        if finding:
            told_before[finding.kind] = (epoch, finding.severity)
            told.append((epoch, finding.kind))
    assert told == [(0, "ranking"), (1, "idle"), (41, "noise")]
    assert next_finding([], {}) is None


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
        now = findings(
            figures | {"kept_share": kept_count / count}, Random() if policy == "random" else Loss(), count
        )
        result.append({finding.kind: finding for finding in now} if epoch else {})
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
        kinds = {finding.kind for finding in findings(figures, Loss(), 1000)}
        assert kinds == ({"idle"} if epoch >= IDLE_EPOCHS else set()), epoch


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
            finding.kind for finding in findings(figures | {"kept_share": kept / 400}, Loss(), 400)
        )
    assert accused["rotation"] + accused["noise"] <= 4, accused
