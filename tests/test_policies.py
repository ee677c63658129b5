"""Every policy against its rule written out, exact budgets, and weighted ones against the full gradient."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_emp.errors import UserError
from ssl_emp.policies import (
    RANKING,
    Rule,
    infobatch,
    load_indices,
    random_subset,
    scan,
    softened,
    top,
    ucb_score,
)
from ssl_emp.pruning import PrunePlan
from ssl_emp.scores import ScoreState

CPU = torch.device("cpu")


def scores(num_samples: int, seed: int, unscored: int = 0) -> Tensor:
    values = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))
    values[torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + 1))[:unscored]] = (
        torch.inf
    )
    return values


@given(data=st.data(), num_samples=st.integers(1, 300), seed=st.integers(0, 10**6), epoch=st.integers(0, 300))
@settings(max_examples=60)
def test_budgets_are_exact_and_draws_depend_on_the_key_only(
    data: st.DataObject, num_samples: int, seed: int, epoch: int
) -> None:
    count = data.draw(st.integers(1, num_samples))
    score = scores(num_samples, seed, unscored=data.draw(st.integers(0, num_samples)))
    if data.draw(st.booleans()):
        score = torch.zeros(num_samples)  # all equal
    explore = data.draw(st.floats(0, 1))
    rules = (
        lambda: top(score, count, explore, seed, epoch),
        lambda: top(softened(score, 0.7, seed, epoch), count, 0.0, seed, epoch),
        lambda: infobatch(score, count, seed, epoch),
        lambda: scan(score, count, seed, epoch),
        lambda: random_subset(num_samples, count, seed, epoch, CPU),
    )
    for number, rule in enumerate(rules):
        kept, again = rule(), rule()
        assert kept.index.dtype == torch.int64 and len(kept.index) == count == len(
            set(kept.index.tolist())
        ), number
        assert 0 <= kept.index.min() and kept.index.max() < num_samples
        assert kept.index.equal(again.index) and (kept.weight is None) == (number != 2)
        if kept.weight is not None and count > 1:  # one sample cannot stand for two groups
            assert kept.weight.shape == (count,) and kept.weight.sum().item() == pytest.approx(
                num_samples, rel=1e-5
            )


@pytest.mark.parametrize("memory", ["raw", "normalized", "standardized"])
@pytest.mark.parametrize("policy", RANKING)
def test_a_score_does_not_change_with_what_it_was_made_of(policy: str, memory: str) -> None:
    """Also at the settings where a term drops out of the formula, and one could be handed on as it is."""
    for beta in (0.0, 5.0):
        terms, variance = torch.stack([scores(50, 1), scores(50, 2)]).abs(), scores(50, 3).square()
        terms[:, :5] = torch.inf  # never scored
        rule = Rule(policy, PrunePlan(4, 0.3), beta=beta, memory=memory, confidence=beta)
        score = rule.score(terms, variance, 1)
        kept = score.clone()
        terms[:, 20:], variance[20:] = 0.0, 7.0
        assert score.equal(kept) and not rule.score(terms, variance, 1).equal(kept)


def test_top_without_exploration_is_the_papers_rule() -> None:
    score = scores(100, 0)
    kept = top(score, 30, 0.0, seed=0, epoch=1)
    assert set(kept.index.tolist()) == set(score.argsort(descending=True)[:30].tolist())


def test_exploration_draws_from_the_others_alike() -> None:
    score = scores(100, 0)
    best = set(score.argsort(descending=True)[:20].tolist())
    times = torch.zeros(100)
    for epoch in range(1000):
        kept = top(score, 25, 0.2, seed=0, epoch=epoch).index
        assert best <= set(kept.tolist()), "a fifth of 25 is drawn, 20 are the highest"
        times[kept] += 1
    others = torch.tensor([i not in best for i in range(100)])
    # binomial(1000, 5 / 80): mean 62.5, standard deviation 7.7
    assert (times[others] - 62.5).abs().max() < 5 * 7.7 and times[others].sum() == 5000


def test_softened_selection_is_a_draw_in_proportion_to_exp_of_the_score() -> None:
    """One draw out of four: frequencies against the softmax of score / (softness * std)."""
    score = torch.tensor([0.0, 1.0, 2.0, torch.inf])
    assert softened(score, 0.0, 0, 0) is score
    std = score[:3].std(correction=0)
    expected = (score[:3] / (0.8 * std)).softmax(0)
    times = torch.zeros(3)
    for epoch in range(4000):
        noisy = softened(score, 0.8, 0, epoch)
        assert noisy[3] == torch.inf
        times[noisy[:3].argmax()] += 1
    assert (times / 4000 - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_ucb_is_mean_plus_confidence_times_variance() -> None:
    mean, variance = torch.tensor([1.0, 2.0, torch.inf]), torch.tensor([3.0, 0.5, 0.0])
    assert ucb_score(mean, variance, 2.0).tolist() == [7.0, 3.0, math.inf]


def test_infobatch_is_its_published_rule_where_the_budget_is_the_published_one() -> None:
    """Samples at or above the mean are kept with weight 1; a share r of those below, with weight 1 / r."""
    loss = scores(1000, 3).exp()
    easy = {i for i, value in enumerate(loss.tolist()) if value < loss.mean().item()}
    share = 0.5
    kept_easy = int(share * len(easy))
    kept = infobatch(loss, 1000 - len(easy) + kept_easy, seed=0, epoch=1)
    assert kept.weight is not None
    weight = dict(zip(kept.index.tolist(), kept.weight.tolist(), strict=True))
    assert all(weight[i] == 1 for i in range(1000) if i not in easy)
    assert sum(i in easy for i in weight) == kept_easy
    assert all(weight[i] == pytest.approx(len(easy) / kept_easy) for i in weight if i in easy)
    other = infobatch(loss, len(kept.index), seed=0, epoch=2)
    assert set(other.index.tolist()) != set(kept.index.tolist()), "drawn anew each epoch"


@pytest.mark.parametrize(
    "count", [750, 500, 300, 60], ids=["all hard ones fit", "just", "hard ones thinned", "tiny"]
)
def test_infobatch_has_the_full_gradient_in_the_mean(count: int) -> None:
    """The mean over 2,000 draws of the weighted sum of per-sample gradients is the sum of all."""
    loss = scores(1000, 5).exp()
    gradients = torch.randn(
        1000, 8, generator=torch.Generator().manual_seed(7)
    ).double() + 0.3 * loss.double().unsqueeze(1)

    def sums(weigh: bool) -> Tensor:
        draws = []
        for epoch in range(2000):
            kept = infobatch(loss, count, seed=1, epoch=epoch)
            assert kept.weight is not None
            weight = (
                kept.weight.double() if weigh else torch.full((count,), 1000 / count, dtype=torch.float64)
            )
            draws.append(weight @ gradients[kept.index])
        return torch.stack(draws)

    full, weighted = gradients.sum(0), sums(weigh=True)
    error = (weighted.mean(0) - full) / (weighted.std(0) / 2000**0.5)
    assert error.abs().max() < 4.5, "standard errors"
    if count > 300:  # the control: unweighted, hard samples count too much
        plain = sums(weigh=False)
        assert ((plain.mean(0) - full) / (plain.std(0) / 2000**0.5)).abs().max() > 20


def test_scan_drops_from_both_ends_only() -> None:
    loss = torch.arange(100.0)
    pool = {*range(35), *range(65, 100)}
    for epoch in range(20):
        dropped = set(range(100)) - set(scan(loss, 60, seed=0, epoch=epoch).index.tolist())
        assert dropped <= pool and min(dropped) < 35 and max(dropped) >= 65
    dropped = set(range(100)) - set(scan(loss, 20, seed=0, epoch=0).index.tolist())
    assert dropped == {*range(40), *range(60, 100)}, "where more must go than the ends hold, the ends grow"


def test_scan_does_not_drop_what_was_never_scored() -> None:
    loss = torch.arange(100.0)
    loss[:10] = torch.inf
    assert set(range(10)) <= set(scan(loss, 50, seed=0, epoch=3).index.tolist())


@given(
    num_samples=st.integers(2, 500),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 500),
)
@settings(max_examples=50)
def test_random_sets_have_no_duplicate_and_change(
    num_samples: int, share: float, seed: int, epoch: int
) -> None:
    count = max(1, int(share * num_samples))
    kept, again, other = (
        random_subset(num_samples, count, seed, e, CPU).index for e in (epoch, epoch, epoch + 1)
    )
    assert len(set(kept.tolist())) == count and kept.max() < num_samples
    assert kept.equal(again)
    if 20 < count < num_samples - 20:
        assert set(kept.tolist()) != set(other.tolist())


def test_a_random_set_stays_for_as_many_epochs_as_asked() -> None:
    state, plan = observed(scores(50, 1), scores(50, 2)), PrunePlan(12, 0.5, warmup_epochs=2)
    often, seldom = (Rule("random", plan, redraw_every=every) for every in (1, 3))
    sets = [set(seldom.choose(state, epoch, 20, seed=0).index.tolist()) for epoch in range(2, 10)]
    redrawn = [set(often.choose(state, epoch, 20, seed=0).index.tolist()) for epoch in range(2, 10)]
    assert sets == [redrawn[0]] * 3 + [redrawn[3]] * 3 + [redrawn[6]] * 2
    assert len({frozenset(kept) for kept in redrawn}) == 8
    assert sets[1] < set(seldom.choose(state, 3, 21, seed=0).index.tolist()), (
        "an epoch with a batch more adds to the others"
    )


def test_random_sets_are_uniform() -> None:
    times = torch.zeros(200)
    for epoch in range(1000):
        times[random_subset(200, 60, 0, epoch, CPU).index] += 1
    # binomial(1000, 0.3): mean 300, standard deviation 14.5; 200 samples stay within five of them
    assert times.sum() == 60_000 and (times - 300).abs().max() < 5 * 14.5


def test_indices_come_from_numpy_and_text_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([5, 0, 3]))
    (tmp_path / "b.txt").write_text("5\n0\n3\n")
    for name in ("a.npy", "b.txt"):
        assert load_indices(tmp_path / name, 6).tolist() == [5, 0, 3]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2, 2], "1 indices twice"),
        ([1, 6], "holds the index 6, fix|holds the index 6.*use 0 to 5"),
        ([-1, 2], "holds the index -1"),
        ([0.5], "one list of whole numbers"),
        ([[1, 2]], "one list of whole numbers"),
        ([], "one list of whole numbers"),
    ],
)
def test_bad_indices_are_named(tmp_path: Path, content: list[object], complaint: str) -> None:
    np.save(tmp_path / "a.npy", np.array(content))
    with pytest.raises(UserError, match=complaint):
        load_indices(tmp_path / "a.npy", 6)


def test_indices_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.txt").write_text("one\n")
    for name in ("a.npy", "b.txt", "missing.npy"):
        with pytest.raises(UserError, match="cannot read the indices"):
            load_indices(tmp_path / name, 6)


def observed(loss: Tensor, distance: Tensor) -> ScoreState:
    state = ScoreState(len(loss), 1.0, False, CPU)
    state.observe(torch.arange(len(loss)), torch.stack([loss, distance]), None, 0)
    return state


def test_policies_that_rank_differ_in_the_score_only() -> None:
    loss, distance = scores(50, 1).exp(), scores(50, 2).exp()
    state, plan = observed(loss, distance), PrunePlan(10, 0.5)
    expected = {
        "emp": loss - 5 * distance,
        "loss": loss,
        "distance": -distance,
        "epsilon_greedy": loss,
        "ucb": loss,  # seen once: no variance yet
    }
    for policy, score in expected.items():
        kept = Rule(policy, plan).choose(state, 1, 20, seed=0)
        assert set(kept.index.tolist()) == set(score.argsort(descending=True)[:20].tolist()), policy
        assert len(Rule(policy, plan).choose(state, 0, 20, seed=0).index) == 50, (
            "the first epoch is a full one"
        )
    easy = Rule("emp", plan, beta=0.0, loss_weight=-1.0).choose(state, 1, 20, seed=0)
    assert set(easy.index.tolist()) == set(loss.argsort()[:20].tolist())


@pytest.mark.parametrize("policy", ["random", "loss", "emp", "scan"])
def test_rescaled_the_kept_stand_for_all(policy: str) -> None:
    """Weights sum to N where the epoch is pruned; which samples are kept does not change, nor do InfoBatch's
    own weights.
    """
    state, plan = observed(scores(50, 1).exp(), scores(50, 2).exp()), PrunePlan(10, 0.5)
    plain, rescaled = (
        Rule(policy, plan, rescale=rescale).choose(state, 1, 20, seed=0) for rescale in (False, True)
    )
    assert plain.weight is None and rescaled.weight is not None and rescaled.index.equal(plain.index)
    assert rescaled.weight.tolist() == [2.5] * 20
    assert Rule(policy, plan, rescale=True).choose(state, 0, 20, seed=0).weight is None, (
        "the first epoch is a full one"
    )
    own, same = (
        Rule("infobatch", plan, rescale=rescale).choose(state, 1, 20, seed=0).weight
        for rescale in (False, True)
    )
    assert own is not None and same is not None and own.equal(same)


def test_random_rescaled_has_the_full_gradient_in_the_mean() -> None:
    state, rule = (
        observed(scores(1000, 1), scores(1000, 2)),
        Rule("random", PrunePlan(4000, 0.7), rescale=True),
    )
    gradients = torch.randn(1000, 8, generator=torch.Generator().manual_seed(7)).double() + 0.3
    draws = []
    for epoch in range(1, 2001):
        kept = rule.choose(state, epoch, 300, seed=1)
        assert kept.weight is not None
        draws.append(kept.weight.double() @ gradients[kept.index])
    summed = torch.stack(draws)
    assert ((summed.mean(0) - gradients.sum(0)) / (summed.std(0) / 2000**0.5)).abs().max() < 4.5, (
        "standard errors"
    )


def test_weights_run_in_a_straight_line_over_the_pruned_epochs() -> None:
    rule = Rule(
        "emp",
        PrunePlan(8, 0.5, warmup_epochs=2, anneal_fraction=0.125),
        beta=1.0,
        beta_end=3.0,
        loss_weight=-1.0,
    )
    assert [rule.beta_at(epoch) for epoch in range(8)] == [1, 1, 1, 1.5, 2, 2.5, 3, 3]
    assert {rule.loss_weight_at(epoch) for epoch in range(8)} == {-1.0}
