"""What is remembered against a loop over its definition, and the adjustment on data whose truth is known."""

import pytest
import torch
from torch import Tensor

from ssl_emp.prune.figures import rank_correlation
from ssl_emp.prune.record import Record

COVARIATES = 14


def make_record(num_samples: int, ema: float = 1.0, covariates: int = 0, shrink: bool = False) -> Record:
    return Record(num_samples, ema, covariates, shrink, "cpu")


def test_the_last_score_is_kept_to_the_bit_where_ema_is_1() -> None:
    state = make_record(5)
    assert state.terms.isinf().all() and state.scored_epoch.eq(-1).all()
    for epoch in range(3):
        terms = torch.randn(2, 2, generator=torch.Generator().manual_seed(epoch)) * 1e3
        state.observe(torch.tensor([1, 4]), terms, None, epoch)
        assert state.terms[:, [1, 4]].equal(terms) and state.last[:, [1, 4]].equal(terms)
    assert state.terms[:, [0, 2, 3]].isinf().all()
    assert state.scored_epoch.tolist() == [-1, 2, -1, -1, 2] and state.times_scored.tolist() == [
        0,
        3,
        0,
        0,
        3,
    ]


@pytest.mark.parametrize("ema", [0.2, 0.7])
def test_the_running_mean_is_the_weighted_mean_of_what_was_seen(ema: float) -> None:
    """Weights (1 - ema)^age, made to sum to one; the variance as UCB's published recursion has it, from the
    mean before.
    """
    values = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = make_record(3, ema)
    mean, variance = 0.0, 0.0
    for count in range(1, 7):
        state.observe(torch.tensor([2]), values[count - 1].float().unsqueeze(1), None, count)
        weights = (1 - ema) ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        expected = (weights.unsqueeze(1) * values[:count]).sum(0) / weights.sum()
        torch.testing.assert_close(state.terms[:, 2].double(), expected, rtol=1e-5, atol=1e-6)
        rate = ema / (1 - (1 - ema) ** count)
        loss = values[count - 1, 0].item()
        variance = 0.0 if count == 1 else (1 - rate) * variance + rate * (loss - mean) ** 2
        mean = mean + rate * (loss - mean)
        assert state.variance[2].item() == pytest.approx(variance, rel=1e-4, abs=1e-6)


def test_training_is_counted() -> None:
    state = make_record(4)
    state.count_trained(torch.tensor([0, 2]), 0)
    state.count_trained(torch.tensor([2, 3]), 1)
    state.count_trained(torch.tensor([0, 1]), 2, torch.tensor(False))
    assert state.times_trained.tolist() == [1, 0, 2, 1] and state.trained_epoch.tolist() == [0, -1, 1, 1]


def noisy_world(seed: int, num_samples: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """A hidden value a sample, and one observation of it: + what the draw adds + the network's level + a
    little noise.
    """
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    truth = torch.randn(num_samples, generator=fixed)
    effect = torch.randn(COVARIATES, 2, generator=fixed)
    draw = torch.randn(num_samples, COVARIATES, generator=drawn)
    terms = truth + (draw @ effect).T + level + 0.1 * torch.randn(2, num_samples, generator=drawn)
    return truth, terms, draw


@pytest.mark.parametrize("adjust", [False, True])
def test_adjusting_finds_the_sample_behind_the_draw(adjust: bool) -> None:
    """Rank correlation with the hidden truth: poor without, near one with."""
    state = make_record(512, covariates=COVARIATES if adjust else 0)
    for epoch in range(3):
        truth, terms, draw = noisy_world(epoch + 1, 512, level=5.0 - epoch)
        for batch in torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).view(-1, 64):
            state.observe(batch, terms[:, batch], draw[batch], epoch)
    found = rank_correlation(state.terms[0], truth).item()
    assert found > 0.97 if adjust else found < 0.5, found


def test_an_adjusted_score_stays_comparable_while_the_level_moves_and_only_easy_samples_are_seen() -> None:
    """Ten epochs on the lower half only, the level falling: the halves keep their distance, in mean, as they
    had it.
    """
    state = make_record(512, 0.5, COVARIATES)
    truth, terms, draw = noisy_world(1, 512, level=5.0)
    everyone, easy = torch.arange(512), truth.argsort()[:256]
    state.observe(everyone, terms, draw, 0)
    hard = truth.argsort()[256:]
    apart = (state.terms[0, hard].mean() - state.terms[0, easy].mean()).item()
    for epoch in range(1, 11):
        _, terms, draw = noisy_world(epoch + 1, 512, level=5.0 - epoch)
        state.observe(easy, terms[:, easy], draw[easy], epoch)
    assert (state.terms[0, hard].mean() - state.terms[0, easy].mean()).item() == pytest.approx(
        apart, abs=0.02
    )


def test_state_survives_a_checkpoint() -> None:
    state, other = (make_record(64, 0.3, COVARIATES, shrink=True) for _ in range(2))
    _, terms, draw = noisy_world(1, 64, 0.0)
    state.observe(torch.arange(64), terms, draw, 0)
    other.load_state_dict(state.state_dict())
    for one in (state, other):
        one.observe(torch.arange(64), terms.flip(0), draw, 1)
    assert all(state.state_dict()[name].equal(value) for name, value in other.state_dict().items())


def test_what_a_draw_will_add_is_foreseen() -> None:
    """The regression, learnt on some draws, tells what another one adds: the truth and the expected addition
    make up the terms.
    """
    state = make_record(512, 1.0, COVARIATES)
    truth, terms, draw = noisy_world(1, 512, level=3.0)
    state.observe(torch.arange(512), terms, draw, 0)
    _, terms, draw = noisy_world(2, 512, level=2.0)
    expected = state.terms + state.explained(draw)
    assert rank_correlation(expected[0], terms[0]).item() > 0.98
    assert rank_correlation(state.terms[0], terms[0]).item() < 0.6, (
        "the sample alone says little about this draw"
    )


def choose_and_observe(state: Record, noise: float, epochs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Epochs on the better half by what is expected; the truth has variance 1, a sight of it `noise` more. ->
    last truth, terms, draws.
    """
    everyone = torch.arange(len(state.last[0]))
    for epoch in range(epochs):
        truth, terms, draw = noisy_world(epoch + 1, len(everyone), level=5.0 - epoch)
        terms = terms + noise * torch.randn(terms.shape, generator=torch.Generator().manual_seed(100 + epoch))
        kept = everyone if epoch == 0 else state.expected(everyone, draw)[0].topk(len(everyone) // 2).indices
        for batch in kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(epoch))].view(
            -1, 64
        ):
            state.observe(batch, terms[:, batch], draw[batch], epoch)
    return truth, terms, draw


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_what_is_remembered_counts_for_as_much_as_it_tells(noise: float) -> None:
    """The slope is the reliability of a single sight, 1 / (1 + noise²), though only those with the highest
    expectation are seen again.
    """
    state = make_record(4096, 1.0, COVARIATES, shrink=True)
    choose_and_observe(state, noise, epochs=4)
    covariance, variance = state.recall
    assert (covariance / variance)[0].item() == pytest.approx(1 / (1 + noise**2 + 0.1**2), rel=0.04)


def test_nothing_is_remembered_until_a_sample_was_seen_twice() -> None:
    state = make_record(64, 1.0, COVARIATES, shrink=True)
    _, terms, draw = noisy_world(1, 64, level=1.0)
    everyone = torch.arange(64)
    assert state.expected(everyone, draw).eq(torch.inf).all(), "never scored: always kept"
    state.observe(everyone, terms, draw, 0)
    assert state.expected(everyone, draw).equal(state.explained(draw))


def test_shrinking_foresees_better_and_brings_more_samples_back() -> None:
    """Where a sight is mostly noise: what is expected of a new draw comes closer to what is seen, and fewer
    samples stay out.
    """
    found = {}
    for shrink in (False, True):
        state = make_record(4096, 0.3, COVARIATES, shrink)
        _, terms, draw = choose_and_observe(state, noise=5.0, epochs=12)
        expected = state.expected(torch.arange(4096), draw)
        found[shrink] = (
            rank_correlation(expected[0], terms[0]).item(),
            (state.scored_epoch < 6).float().mean().item(),
        )
    assert found[True][0] > found[False][0] + 0.03 and found[True][1] < 0.2 * found[False][1], found
