"""Features that float32 can hardly tell apart by their cosines, or whose squares leave it: the answers are
those of float64.
"""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from linear_eval import Features, linear_probe
from linear_eval.diagnose import feature_std, map_2d, nearest_rows, uniformity
from linear_eval.knn import import_faiss, knn_predictions

Backend = Literal["faiss", "torch"]
BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(import_faiss() is None, reason="no faiss")),
]
NUM_TRAIN = 400
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "offset 100": lambda x: x + 100,
    "offset 1,000": lambda x: x + 1e3,
    "offset 10,000": lambda x: x + 1e4,
    "offset 300,000": lambda x: x + 3e5,
    "negative offset": lambda x: x - 2e4,
    "one large dimension": lambda x: torch.cat([x, torch.full((len(x), 1), 3e4, dtype=x.dtype)], 1),
    "two far clusters": lambda x: torch.where(torch.arange(len(x))[:, None] % 2 == 0, x + 2e4, x - 2e4),
    "three directions": lambda x: x + 1e4 * torch.eye(x.shape[1], dtype=x.dtype)[torch.arange(len(x)) % 3],
    "offset, then tiny": lambda x: (x + 1e4) * 1e-30,
    "offset, then huge": lambda x: (x + 1e4) * 1e30,
    "tiny": lambda x: x * 1e-35,
    "each row of its own length": lambda x: (
        (x + 1e4) * torch.logspace(-10, 10, len(x), dtype=x.dtype)[:, None]
    ),
}

# whose five binary digits make equal distances
EXACT = [name for name in CHANGES if name != "offset 300,000"]


def classes(change: str, num: int = 500, dim: int = 24) -> tuple[Features, Features]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (num,), generator=generator)
    means = torch.randn(7, dim, generator=generator, dtype=torch.float64)
    x = CHANGES[change](
        0.7 * means[labels] + torch.randn(num, dim, generator=generator, dtype=torch.float64)
    ).float()
    return Features(x[:NUM_TRAIN], labels[:NUM_TRAIN]), Features(x[NUM_TRAIN:], labels[NUM_TRAIN:])


def centred_cosines(queries: Tensor, bank: Tensor) -> Tensor:
    """(Q, N) float64: 1 - |a - b|^2 / 2 of unit vectors, less 1: no digits are lost near 1."""
    a, b = (part.double() / part.double().norm(dim=1, keepdim=True) for part in (queries, bank))
    return -(a[:, None] - b[None]).square().sum(-1) / 2


def voted(train: Features, test: Features, k: int, temperature: float | None) -> list[int]:
    predicted = []
    for row in centred_cosines(test.x, train.x):
        near = sorted(range(len(row)), key=lambda number: (-row[number].item(), number))[:k]
        votes = [0.0] * 7
        for number in near:
            less = row[number].item() - row[near[0]].item()
            votes[int(train.y[number])] += (
                1.0
                if temperature is None
                else float(torch.tensor(less / temperature, dtype=torch.float64).exp())
            )
        predicted.append(max(range(7), key=lambda label: (votes[label], -label)))
    return predicted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", EXACT)
def test_neighbours_vote_as_in_float64(change: str, backend: Backend) -> None:
    train, test = classes(change)
    found = knn_predictions(train, test, num_neighbors=[1, 5, 20], temperature=None, backend=backend)
    for k, labels in found.items():
        assert labels.tolist() == voted(train, test, k, None), k
        assert torch.equal(
            labels, knn_predictions(train, test, num_neighbors=[k], temperature=None, backend=backend)[k]
        )
    assert (
        (found[20] == test.y).double().mean() > 0.6
        or "directions" in change
        or "clusters" in change
        or "length" in change
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-9, 1e-7, 0.1])
def test_votes_are_weighed_by_differences_that_float32_does_not_have(
    backend: Backend, temperature: float
) -> None:
    """All the bank votes: whose votes weigh most hangs on the ninth digit of the cosines."""
    train, test = classes("offset 10,000")
    for k in (20, NUM_TRAIN):
        seen = knn_predictions(train, test, num_neighbors=[k], temperature=temperature, backend=backend)[k]
        assert seen.tolist() == voted(train, test, k, temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_enter_by_their_number_however_narrow(backend: Backend) -> None:
    train, test = classes("offset 10,000")
    twice = Features(
        torch.cat([train.x, train.x, train.x]), torch.cat([train.y, (train.y + 1) % 7, (train.y + 2) % 7])
    )
    ones = knn_predictions(twice, test, num_neighbors=[1, 2, 3], temperature=None, backend=backend)
    nearest = centred_cosines(test.x, train.x).argmax(dim=1)
    assert torch.equal(ones[1], train.y[nearest])
    # a draw: the lowest class
    assert torch.equal(ones[2], torch.minimum(train.y[nearest], (train.y[nearest] + 1) % 7))


def test_mixed_features_are_searched_in_float64_only_where_they_need_it() -> None:
    """Half of the queries look at a narrow cluster; the others get what they got without it."""
    train, test = classes("as they are")
    narrow_train, narrow_test = classes("offset 10,000")
    far = torch.zeros(NUM_TRAIN, 24)
    both = Features(
        torch.cat([torch.cat([train.x, far], 1), torch.cat([far, narrow_train.x], 1)]),
        torch.cat([train.y, narrow_train.y]),
    )
    zeros = torch.zeros(len(test.x), 24)
    queries = Features(
        torch.cat([torch.cat([test.x, zeros], 1), torch.cat([zeros, narrow_test.x], 1)]),
        torch.cat([test.y, narrow_test.y]),
    )
    found = knn_predictions(both, queries, num_neighbors=[5, 20], temperature=None, backend="torch")
    for k in (5, 20):
        assert found[k].tolist() == voted(train, test, k, None) + voted(narrow_train, narrow_test, k, None)


@pytest.mark.parametrize("change", EXACT)
def test_pictures_of_neighbours_show_the_nearest(change: str) -> None:
    x = classes(change)[0].x
    queries = torch.arange(0, NUM_TRAIN, 9)
    cosines = centred_cosines(x[queries], x)
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    assert torch.equal(
        nearest_rows(x, queries, 6), cosines.argsort(dim=1, descending=True, stable=True)[:, :6]
    )


@pytest.mark.parametrize("change", EXACT)
def test_figures_and_maps_are_those_of_float64(change: str) -> None:
    x = classes(change)[0].x
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    assert feature_std(x) == pytest.approx(unit.std(dim=0, correction=0).mean().item(), rel=0.02, abs=1e-7)
    pairs = (4 * centred_cosines(x, x)).exp().triu(diagonal=1).sum() / (NUM_TRAIN * (NUM_TRAIN - 1) / 2)
    assert uniformity(x) == pytest.approx(pairs.log().item(), abs=1e-6)
    centred = unit - unit.mean(dim=0)
    first = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    seen = map_2d(x)[:, 0].double()
    assert seen.isfinite().all() and torch.corrcoef(torch.stack([seen, first]))[0, 1].abs() > 0.99


@pytest.mark.parametrize(
    "change",
    [
        "offset 10,000",
        "offset 300,000",
        "negative offset",
        "one large dimension",
        "offset, then tiny",
        "tiny",
    ],
)
def test_a_linear_probe_does_not_mind_where_features_lie(change: str) -> None:
    plain, moved = (
        linear_probe(*classes(name), seed=0, max_iter=100).top1 for name in ("as they are", change)
    )
    assert abs(plain - moved) <= 0.03  # three of a hundred: features at 300,000 have five binary digits left
