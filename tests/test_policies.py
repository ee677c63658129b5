"""Every policy against its rule written out, exact budgets, and weighted ones against the full gradient."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_emp.commands.job import load_indices
from ssl_emp.errors import UserError
from ssl_emp.prune import (
    POLICIES,
    Distance,
    Emp,
    EpsilonGreedy,
    Foresight,
    Indices,
    InfoBatch,
    Loss,
    Policy,
    Random,
    Scan,
    Ucb,
)
from ssl_emp.prune.policies import (
    Kept,
    highest_by_sorting,
    policy_named,
    random_subset,
    select_kept,
    softened,
    top,
)
from ssl_emp.prune.record import Known

CPU = torch.device("cpu")
WARMUP = 1


def scores(num_samples: int, seed: int, unscored: int = 0) -> Tensor:
    values = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))
    values[torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + 1))[:unscored]] = (
        torch.inf
    )
    return values


def known(loss: Tensor, memory: Tensor | None = None, variance: Tensor | None = None) -> Known:
    """What a policy looks at; a sample without a loss has no memory either."""
    memory = torch.where(loss < torch.inf, torch.zeros_like(loss) if memory is None else memory, torch.inf)
    return Known(torch.stack([loss, memory]), torch.zeros_like(loss) if variance is None else variance)


def infobatch(loss: Tensor, count: int, seed: int, epoch: int) -> Kept:
    return InfoBatch().choose(known(loss), count, seed, epoch, WARMUP)


def scan(loss: Tensor, count: int, seed: int, epoch: int) -> Kept:
    return Scan().choose(known(loss), count, seed, epoch, WARMUP)


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


@pytest.mark.parametrize(
    "policy",
    [Emp(memory=scale, beta=beta) for scale in ("raw", "normalized", "standardized") for beta in (0.0, 5.0)]
    + [Emp(loss_weight=0.0), Loss(), Foresight(), EpsilonGreedy(), Ucb(), Distance()],
    ids=str,
)
def test_a_score_does_not_change_with_what_it_was_made_of(policy: Policy) -> None:
    """Also at the settings where a term drops out of the formula, and one could be handed on as it is."""
    assert policy.is_ranking
    now = known(scores(50, 1).abs(), scores(50, 2), scores(50, 3).square())
    now.terms[:, :5] = torch.inf  # never seen
    score = policy.score(now)
    kept = score.clone()
    assert kept[:5].eq(torch.inf).all() and kept[5:].isfinite().all()
    now.terms[:, 20:], now.variance[20:] = 0.0, 7.0
    assert score.equal(kept) and not policy.score(now).equal(kept)


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


def test_ucb_is_mean_plus_variance() -> None:
    mean, variance = torch.tensor([1.0, 2.0, torch.inf]), torch.tensor([3.0, 0.5, 0.0])
    assert Ucb().score(known(mean, variance=variance)).tolist() == [4.0, 2.5, math.inf]


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
    seen = known(scores(50, 1))

    def drawn(policy: Random, epoch: int, count: int = 20) -> set[int]:
        return set(policy.choose(seen, count, seed=0, epoch=epoch, warmup_epochs=2).index.tolist())

    seldom = Random(redraw_every=3)
    sets = [drawn(seldom, epoch) for epoch in range(2, 10)]
    redrawn = [drawn(Random(), epoch) for epoch in range(2, 10)]
    assert sets == [redrawn[0]] * 3 + [redrawn[3]] * 3 + [redrawn[6]] * 2
    assert len({frozenset(kept) for kept in redrawn}) == 8
    assert sets[1] < drawn(seldom, 3, 21), "an epoch with a batch more adds to the others"
    assert seldom.keeps_one_subset and not Random().keeps_one_subset


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


def test_an_indices_policy_keeps_its_first() -> None:
    policy = Indices(index=torch.tensor([5, 0, 3, 9]))
    assert policy.choose(known(scores(10, 1)), 3, 0, 1, WARMUP).index.tolist() == [5, 0, 3]
    assert policy.problem(10, 4) is None
    assert policy.problem(10, 5) == "names 4 samples, and a pruned epoch needs 5"


def test_policies_that_rank_differ_in_the_score_only() -> None:
    loss, memory = scores(50, 1).exp(), -scores(50, 2).exp()
    expected: dict[Policy, Tensor] = {
        Emp(): loss + 5 * memory,
        Loss(): loss,
        Distance(): memory,
        EpsilonGreedy(explore=0.0): loss,
        Ucb(): loss,  # seen once: no variance yet
        Emp(beta=0.0, loss_weight=-1.0): -loss,
    }
    for policy, score in expected.items():
        kept = policy.choose(known(loss, memory), 20, 0, 1, WARMUP)
        assert set(kept.index.tolist()) == set(score.argsort(descending=True)[:20].tolist()), policy
        assert kept.weight is None


def test_epsilon_greedy_draws_a_tenth() -> None:
    loss = scores(200, 1)
    best = set(loss.argsort(descending=True)[:90].tolist())
    kept = set(EpsilonGreedy().choose(known(loss), 100, 0, 1, WARMUP).index.tolist())
    again = set(EpsilonGreedy().choose(known(loss), 100, 0, 2, WARMUP).index.tolist())
    assert best <= kept & again and len(kept) == 100 and kept != again


def test_rescaled_random_draws_have_the_full_gradient_in_the_mean() -> None:
    """The weight N / K that the pruner gives the kept of a policy with `rescale`."""
    seen, gradients = known(scores(1000, 1)), torch.randn(1000, 8).double() + 0.3
    draws = []
    for epoch in range(1, 2001):
        kept = Random(rescale=True).choose(seen, 300, 1, epoch, WARMUP)
        assert kept.weight is None
        draws.append(1000 / 300 * gradients[kept.index].sum(0))
    summed = torch.stack(draws)
    error = (summed.mean(0) - gradients.sum(0)) / (summed.std(0) / 2000**0.5)
    assert error.abs().max() < 4.5, "standard errors"


@given(data=st.data(), num_samples=st.integers(1, 400))
def test_the_highest_scores_are_kept(data: st.DataObject, num_samples: int) -> None:
    count = data.draw(st.integers(1, num_samples))
    values = data.draw(
        st.lists(
            st.floats(-1e6, 1e6, width=32) | st.just(math.inf), min_size=num_samples, max_size=num_samples
        )
    )
    kept = select_kept(torch.tensor(values), count)
    assert kept.dtype == torch.int64 and len(kept) == count == len(set(kept.tolist()))
    assert sorted((values[i] for i in kept.tolist()), reverse=True) == sorted(values, reverse=True)[:count]


@pytest.mark.parametrize("name", ["emp", "loss", "distance", "ucb", "epsilon_greedy", "scan", "infobatch"])
def test_equals_at_the_border_are_drawn_by_chance(name: str) -> None:
    """Losses of learned samples are often all 0; of classes one after the other the first must not be kept in
    every epoch.
    """
    now = known(torch.zeros(1000), torch.zeros(1000))
    now.terms[0, :100] = 1.0  # the few that are not learned
    policy, times = policy_named(name), torch.zeros(1000)
    for epoch in range(1, 201):
        times[policy.choose(now, 500, 0, epoch, WARMUP).index] += 1
    learned = times[100:].view(9, 100).mean(1)  # of nine classes
    assert (learned - learned.mean()).abs().max() < 5 * (200 * 0.25 / 100) ** 0.5, learned


@given(data=st.data(), num_samples=st.integers(1, 200))
def test_a_device_that_must_not_wait_chooses_the_same(data: st.DataObject, num_samples: int) -> None:
    """Sorted by chance and then by score, as on a GPU, are the samples that the partition on a CPU gives."""
    count = data.draw(st.integers(1, num_samples))
    few = st.sampled_from([0.0, 0.5, 1.0, math.inf])
    values = torch.tensor(data.draw(st.lists(few, min_size=num_samples, max_size=num_samples)))
    kept = select_kept(values, count, (3, 7))
    assert kept.sort().values.equal(highest_by_sorting(values, count, (3, 7)).sort().values)


def test_a_score_that_is_nan_does_not_shorten_the_epoch_unnoticed() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        select_kept(torch.tensor([1.0, math.nan, 3.0, 2.0]), 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Emp(beta=-1.0), "policy emp: beta is -1.0, allowed: 0.0 <= beta <= 1000000000.0"),
        (lambda: Emp(beta=math.nan), "policy emp: beta is nan"),
        (
            lambda: Emp(beta="5"),  # type: ignore[arg-type]
            "policy emp: beta is '5'",
        ),
        (lambda: Emp(memory="raws"), "memory is 'raws', allowed: 'raw' or 'normalized' or 'standardized'"),
        (lambda: Loss(ema=0), "policy loss: ema is 0"),
        (lambda: Loss(ema=True), "policy loss: ema is True"),
        (lambda: Ucb(explore=1.1), "policy ucb: explore is 1.1"),
        (lambda: Distance(soften=-0.5), "policy distance: soften is -0.5"),
        (lambda: Random(redraw_every=0), "policy random: redraw_every is 0"),
        (lambda: Foresight(foresee=False), "policy foresight: foresee is False, allowed: True"),
        (lambda: policy_named("epm"), "there is no policy 'epm'; did you mean emp?"),
        (lambda: policy_named("EMP"), "there is no policy 'EMP'; did you mean emp?"),
        (lambda: policy_named("?"), f"there is no policy '?'; known are {', '.join(POLICIES)}"),
    ],
)
def test_a_key_out_of_its_range_is_one_line(make: Callable[[], Policy], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_every_policy_is_found_by_its_name_with_its_defaults() -> None:
    for name, kind in POLICIES.items():
        policy = policy_named(name)
        assert type(policy) is kind and policy.name == name
        assert dataclasses.is_dataclass(policy) and kind.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.ema = 0.5  # type: ignore[misc]
