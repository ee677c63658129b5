"""The plan and the batches as properties."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_emp.prune.plan import PrunePlan, shuffled_batches

plans = st.builds(
    PrunePlan,
    epochs=st.integers(1, 60),
    prune_fraction=st.floats(0, 0.95),
    warmup_epochs=st.integers(1, 5),
    anneal_fraction=st.floats(0, 1),
    shorter=st.booleans(),
)


@given(plan=plans, num_samples=st.integers(64, 3000), batch_size=st.integers(2, 64))
def test_every_step_is_known_in_advance_and_the_budget_is_met(
    plan: PrunePlan, num_samples: int, batch_size: int
) -> None:
    full = num_samples // batch_size
    steps = plan.epoch_steps(num_samples, batch_size)
    assert min(steps, default=0) >= 0
    assert abs(sum(steps) - plan.asked_share() * full * plan.epochs) <= 0.5 + 1e-6, (
        "half a batch in the whole run"
    )
    if plan.shorter:
        assert steps[:-1] == [full] * (len(steps) - 1) and (not steps or 0 < steps[-1] <= full)
        return
    assert len(steps) == plan.epochs
    for epoch, count in enumerate(steps):
        if plan.is_pruned(epoch):
            assert abs(count - (1 - plan.prune_fraction) * full) < 1 + 1e-6
            assert (
                abs(plan.kept_count(epoch, num_samples) - (1 - plan.prune_fraction) * num_samples)
                <= 0.5 + 1e-6
            )
        else:
            assert count == full and plan.kept_count(epoch, num_samples) == num_samples


@given(plan=plans, num_samples=st.integers(100, 3000), batch_size=st.integers(2, 64))
def test_shorter_costs_what_pruning_costs(plan: PrunePlan, num_samples: int, batch_size: int) -> None:
    other = replace(plan, shorter=not plan.shorter)
    assert sum(plan.epoch_steps(num_samples, batch_size)) == sum(other.epoch_steps(num_samples, batch_size))


def test_what_is_rounded_off_in_one_epoch_is_made_up_for_in_the_next() -> None:
    """100 samples are 12 batches of 8; 70 % of them are 8.4: the total is kept, epoch by epoch."""
    assert PrunePlan(7, 0.3).epoch_steps(100, 8) == [12, 8, 9, 8, 9, 8, 8]
    assert PrunePlan(6, 0.5, anneal_fraction=0.3).epoch_steps(78, 2) == [39, 20, 19, 20, 39, 39], (
        "a full epoch is full, also at a half"
    )


@given(plan=plans)
def test_first_and_last_epochs_train_on_everything(plan: PrunePlan) -> None:
    full = [not plan.is_pruned(epoch) for epoch in range(plan.epochs)]
    if plan.shorter:
        assert all(full)
        return
    anneal = round(plan.anneal_fraction * plan.epochs)
    assert all(full[: plan.warmup_epochs])
    assert all(full[plan.epochs - anneal :])
    if plan.prune_fraction > 0:
        assert not any(full[plan.warmup_epochs : plan.epochs - anneal])


@given(
    num_samples=st.integers(2, 300),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 300),
)
def test_batches_are_whole_shuffled_and_without_duplicate(
    num_samples: int, batch_size: int, seed: int, epoch: int
) -> None:
    kept = torch.arange(1000, 1000 + num_samples)
    batches = shuffled_batches(kept, batch_size, seed, epoch)
    assert batches.shape == (num_samples // batch_size, batch_size)
    trained = batches.flatten().tolist()
    assert len(set(trained)) == len(trained) and set(trained) <= set(kept.tolist())
    backwards = shuffled_batches(kept.flip(0), batch_size, seed, epoch)
    assert backwards.equal(batches), "the order of kept must not matter"


@given(batches=st.integers(1, 12), remainder=st.integers(1, 15), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_the_remainder_goes_round(batches: int, remainder: int, seed: int) -> None:
    """Nobody is left out twice before everybody was left out once."""
    batch_size = 16
    num_samples = batches * batch_size + remainder
    left_out = torch.zeros(num_samples, dtype=torch.int64)
    for epoch in range(2 * num_samples):
        mask = torch.ones(num_samples, dtype=torch.int64)
        mask[shuffled_batches(torch.arange(num_samples), batch_size, seed, epoch).flatten()] = 0
        left_out += mask
        assert left_out.max() - left_out.min() <= 1, epoch
    assert left_out.eq(2 * remainder).all()


def test_pruned_and_unpruned_runs_shuffle_alike() -> None:
    """The kept samples come in the order that they have among all samples."""
    everything = shuffled_batches(torch.arange(64), 1, seed=3, epoch=7).flatten().tolist()
    kept = shuffled_batches(torch.arange(0, 64, 3), 1, seed=3, epoch=7).flatten().tolist()
    assert kept == [i for i in everything if i % 3 == 0]
