"""Noisy labels against what they promise: how many, whose, which, and the same every time."""

import math

import pytest
import torch

from ssl_emp.data.label_noise import noisy_labels


@pytest.mark.parametrize(
    "count, classes, share", [(1000, 10, 0.2), (7, 2, 0.5), (333, 100, 1.0), (50, 3, 0.0), (5, 4, 0.09)]
)
def test_exactly_the_share_is_wrong_and_nothing_else_moves(count: int, classes: int, share: float) -> None:
    labels = torch.arange(count) % classes
    before = labels.clone()
    noisy, is_noisy = noisy_labels(labels, classes, share, seed=3)
    assert labels.equal(before) and noisy.dtype == torch.int64 and is_noisy.dtype == torch.bool
    assert int(is_noisy.sum()) == round(share * count)
    for old, new, wrong in zip(before.tolist(), noisy.tolist(), is_noisy.tolist(), strict=True):
        assert (new != old) == wrong and 0 <= new < classes


def test_who_and_what_are_uniform() -> None:
    count, classes = 60_000, 6
    labels = torch.arange(count) % classes
    noisy, is_noisy = noisy_labels(labels, classes, 0.5, seed=0)
    table = (
        (labels[is_noisy] * classes + noisy[is_noisy]).bincount(minlength=classes**2).view(classes, classes)
    )
    assert (table.diagonal() == 0).all()
    expected = count / 2 / classes / (classes - 1)
    others = table[~torch.eye(classes, dtype=torch.bool)]
    freedom = classes * (classes - 1) - 1
    assert ((others - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)  # chi-square
    blocks = is_noisy.view(60, -1).sum(1)  # along the set too
    assert ((blocks - 500.0) ** 2 / 250).sum() < 59 + 5 * math.sqrt(2 * 59)


def test_a_function_of_seed_and_place() -> None:
    labels = torch.arange(2000) % 10
    first, again, other = (noisy_labels(labels, 10, 0.2, seed) for seed in (1, 1, 2))
    assert first[0].equal(again[0]) and first[1].equal(again[1])
    both = (first[1] & other[1]).double().mean()  # two draws of a fifth share a twenty-fifth
    assert abs(both - 0.04) < 0.02
    more, is_more = noisy_labels(labels, 10, 0.4, seed=1)
    assert (is_more | ~first[1]).all() and more[first[1]].equal(first[0][first[1]])


def test_impossible_noise_is_refused() -> None:
    for classes, share in ((1, 0.1), (10, 1.1), (10, -0.1)):
        with pytest.raises(AssertionError):
            noisy_labels(torch.zeros(4, dtype=torch.int64), classes, share, 0)
