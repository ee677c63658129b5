"""Few labels: subsets by counting, figures against the statistics module, the fixed-l2 probe against
scikit-learn.
"""

import statistics
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from linear_eval import EvalError, Features, linear_probe
from linear_eval.fewshot import balanced_subset, fewshot, fewshot_probe, fixed_l2_probe, labels_per_class


def blobs(num: int, seed: int, *, dim: int = 12, classes: int = 4, spread: float = 1.5) -> Features:
    """Gaussian classes around fixed means; class ids 0, 3, 6, ..."""
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    y = torch.arange(num) % classes
    return Features(
        means[y] + spread * torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), 3 * y
    )


TRAIN, TEST = blobs(200, 1), blobs(400, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**40), st.data())
def test_subsets_are_exactly_balanced_and_nested(counts: list[int], seed: int, data: st.DataObject) -> None:
    labels = [5 * label + 1 for label, count in enumerate(counts) for _ in range(count)]
    order = data.draw(st.permutations(range(len(labels))))
    shuffled = torch.tensor([labels[place] for place in order])
    smaller: set[int] = set()
    for per_class in range(1, min(counts) + 1):
        rows = balanced_subset(shuffled, per_class, seed).tolist()
        assert rows == sorted(set(rows))
        assert Counter(shuffled[rows].tolist()) == dict.fromkeys(labels, per_class)
        assert smaller <= set(rows)
        smaller = set(rows)
    assert torch.equal(balanced_subset(shuffled, 1, seed), balanced_subset(shuffled, 1, seed))
    with pytest.raises(
        EvalError,
        match=f"has {min(counts)} train images, {min(counts) + 1} of every class.*fix: .*<= {min(counts)}",
    ):
        balanced_subset(shuffled, min(counts) + 1, seed)


def test_every_row_is_drawn_equally_often() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 0])  # 4 and 2
    drawn = Counter(row for seed in range(600) for row in balanced_subset(labels, 1, seed).tolist())
    assert all(abs(drawn[row] - 150) < 55 for row in (0, 2, 4, 5))  # 5 standard deviations of a binomial
    assert all(abs(drawn[row] - 300) < 62 for row in (1, 3))


def test_a_fraction_in_labels_per_class() -> None:
    assert (
        labels_per_class(torch.arange(50_000) % 10, 0.01) == 50
        and labels_per_class(torch.arange(50_000) % 100, 0.1) == 50
    )
    assert labels_per_class(torch.arange(100) % 10, 0.01) == 1  # a tenth of an image is one
    assert labels_per_class(torch.arange(170) % 10, 0.1) == 2  # 1.7
    assert labels_per_class(torch.arange(40) % 4, 1.0) == 10
    for fraction in (0.0, -0.1, 1.5):
        with pytest.raises(EvalError, match="fraction is"):
            labels_per_class(torch.arange(4), fraction)


def test_draws_and_their_figures() -> None:
    seen: list[tuple[list[int], int]] = []

    def score(rows: Tensor, seed: int) -> float:
        seen.append((rows.tolist(), seed))
        return 1 / (1 + rows[0].item() + len(seen))

    result = fewshot(TRAIN.y, score, fraction=0.1, num_subsets=4, seed=0)
    assert result.accuracies == tuple(1 / (1 + rows[0] + number) for number, (rows, _) in enumerate(seen, 1))
    assert result.mean == pytest.approx(statistics.mean(result.accuracies), rel=1e-12)
    assert result.std == pytest.approx(statistics.stdev(result.accuracies), rel=1e-12)
    assert (result.num_labels, result.per_class) == (20, 5)
    assert len({tuple(rows) for rows, _ in seen}) == 4 and len({seed for _, seed in seen}) == 4

    first, seen = seen, []
    fewshot(TRAIN.y, score, per_class=5, num_subsets=3, seed=0)
    assert seen == first[:3]  # no draw depends on how many there are
    seen = []
    fewshot(TRAIN.y, score, per_class=5, num_subsets=4, seed=1)
    assert not {seed for _, seed in seen} & {seed for _, seed in first}  # neighbouring seeds share no draw


def test_bad_arguments() -> None:
    for given_, match in (
        ({}, "give one of the two"),
        ({"fraction": 0.1, "per_class": 2}, "give one of the two"),
        ({"per_class": 2, "num_subsets": 2}, "num_subsets is 2.*>= 3"),
        ({"per_class": 0}, "per_class is 0"),
        ({"per_class": 51}, "class 0 has 50 train images, 51 of every class"),
        ({"fraction": 0.0}, "fraction is 0"),
    ):
        with pytest.raises(EvalError, match=match):
            fewshot(TRAIN.y, lambda rows, seed: 1.0, seed=0, **given_)
    with pytest.raises(EvalError, match="columns"):
        fewshot_probe(TRAIN, blobs(4, 0, dim=3), per_class=1, seed=0)


def test_the_probe_fits_only_what_is_labeled() -> None:
    """Against linear_probe on the same subsets, taken by hand."""
    by_hand = []

    def score(rows: Tensor, seed: int) -> float:
        few = Features(TRAIN.x[rows], TRAIN.y[rows])
        assert few.x.shape == (16, 12) and Counter(few.y.tolist()) == {0: 4, 3: 4, 6: 4, 9: 4}
        by_hand.append(linear_probe(few, TEST, seed=seed).top1)
        return by_hand[-1]

    given: dict[str, Any] = {"num_subsets": 3, "seed": 5}
    found = fewshot_probe(TRAIN, TEST, per_class=4, **given)
    assert found == fewshot(TRAIN.y, score, per_class=4, **given) and len(set(by_hand)) > 1
    more = fewshot_probe(TRAIN, TEST, per_class=40, **given)
    assert more.mean > found.mean > 0.3 and more.num_labels == 160


def test_one_label_a_class_takes_a_fixed_l2() -> None:
    def score(rows: Tensor, seed: int) -> float:
        return fixed_l2_probe(Features(TRAIN.x[rows], TRAIN.y[rows]), TEST)

    given: dict[str, Any] = {"per_class": 1, "num_subsets": 3, "seed": 0}
    result = fewshot_probe(TRAIN, TEST, **given)
    assert result == fewshot(TRAIN.y, score, **given)
    assert result.num_labels == 4 and 0.25 < result.mean < 1


@pytest.mark.parametrize("l2", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("num", [4, 40])
def test_fixed_l2_against_scikit_learn(num: int, l2: float) -> None:
    # and a constant column
    few = Features(torch.cat([TRAIN.x[:num], torch.full((num, 1), 0.1)], 1), TRAIN.y[:num])
    test = Features(torch.cat([TEST.x, torch.full((len(TEST.x), 1), 5.0)], 1), TEST.y)
    x, x_test = few.x[:, :12].double(), test.x[:, :12].double()
    mean, std = x.mean(0), x.std(0, correction=0)
    oracle = LogisticRegression(C=1 / (l2 * num), tol=1e-10, max_iter=5000).fit(
        ((x - mean) / std).numpy(), few.y.numpy()
    )
    expected = oracle.score(((x_test - mean) / std).numpy(), test.y.numpy())
    assert fixed_l2_probe(few, test, l2=l2) == pytest.approx(expected, abs=0.003)  # one image on the border
