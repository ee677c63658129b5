"""linear_eval against brute force in float64 (kNN), scikit-learn (kNN, logistic regression) and one head at a
time (SGD).
"""

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import linear_eval
import linear_eval.knn
import linear_eval.lbfgs
from linear_eval import EvalError, Features, extract_features, knn_accuracy, knn_predict, linear_probe
from linear_eval.fewshot import fewshot_probe
from linear_eval.knn import knn_accuracies, knn_predictions
from linear_eval.lbfgs import Classifiers, fit_binary, fit_logistic, minimize
from linear_eval.linear import L2_GRID, HeadResult, multi_label_probe, sgd_probe, split_rows, train_heads
from linear_eval.metrics import MULTI_LABEL, average_precision

PRECISIONS: tuple[Literal["float32"], Literal["float64"]] = ("float32", "float64")
BACKENDS = [
    "torch",
    pytest.param(
        "faiss", marks=pytest.mark.skipif(linear_eval.knn.import_faiss() is None, reason="no faiss")
    ),
]


def blobs(num: int, seed: int, *, dim: int = 12, classes: int = 4, spread: float = 1.0) -> Features:
    """Gaussian classes around fixed means."""
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % classes
    return Features(means[y] + spread * torch.randn(num, dim, generator=generator), y)


def with_labels(features: Features, labels: list[int] | Tensor) -> Features:
    return Features(features.x, torch.as_tensor(labels))


# ---- features


def small_encoder() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    layers(torch.randn(8, 3, 8, 8))  # running statistics that are not the initial ones
    return layers.eval()


def images(num: int) -> Tensor:
    return torch.randint(
        0, 256, (num, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def state_hash(module: nn.Module) -> str:
    return hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())
    ).hexdigest()


def test_features_are_those_of_the_encoder_for_any_batch_size() -> None:
    encoder, pixels, seen = small_encoder(), images(23), []
    with torch.no_grad():
        expected = torch.stack([encoder(image[None].float() / 255)[0] for image in pixels])
    for batch_size in (1, 7, 23, 100):
        features = extract_features(
            encoder, pixels, torch.arange(23), batch_size=batch_size, progress=lambda *n: seen.append(n)
        )
        assert features.x.dtype == torch.float32 and features.y.tolist() == list(range(23))
        torch.testing.assert_close(features.x, expected, atol=1e-5, rtol=0)
        assert seen.pop() == (23, 23)


def test_judging_leaves_the_encoder_as_it_was() -> None:
    encoder = small_encoder()
    before = state_hash(encoder)
    features = extract_features(encoder, images(40), torch.arange(40) % 2, batch_size=8)
    linear_probe(features, features, seed=0)
    knn_accuracy(features, features, num_neighbors=3, temperature=0.1)
    assert state_hash(encoder) == before
    assert not encoder.training and all(parameter.grad is None for parameter in encoder.parameters())


def test_bad_inputs_of_extract_features() -> None:
    encoder, pixels, labels = small_encoder(), images(5), torch.arange(5)
    with pytest.raises(EvalError, match=r"no labels.*fix: "):
        extract_features(encoder, pixels, None)
    with pytest.raises(EvalError, match="there are no images"):
        extract_features(encoder, pixels[:0], labels[:0])
    with pytest.raises(EvalError, match="uint8"):
        extract_features(encoder, pixels.float(), labels)
    with pytest.raises(EvalError, match="uint8"):
        extract_features(encoder, pixels, labels[:4])
    with pytest.raises(EvalError, match="on cpu, device is meta"):
        extract_features(encoder, pixels, labels, device="meta")
    encoder[1].train()  # one BatchNorm forgotten is enough
    with pytest.raises(EvalError, match=r"training mode \(1 modules\)"):
        extract_features(encoder, pixels, labels)


def test_non_finite_features_are_counted() -> None:
    class Diverged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1).clone()
            x[1, 0], x[3, 5] = math.nan, math.inf
            return x

    with pytest.raises(EvalError, match="2 of 5 extracted features are not finite"):
        extract_features(Diverged().eval(), images(5), torch.arange(5))


# ---- kNN


def brute_force(train: Features, test: Features, k: int, temperature: float) -> list[int]:
    """Float64, one pair at a time: sort by similarity, then row; add up exp(similarity / T); lowest class of
    the best.
    """
    answers = []
    for query in test.x.double():
        scored = []
        for row, other in enumerate(train.x.double()):
            similarity = (query * other).sum() / (query.square().sum().sqrt() * other.square().sum().sqrt())
            scored.append((-round(similarity.item(), 9), row))
        votes: dict[int, float] = {}
        for negative, row in sorted(scored)[:k]:
            label = int(train.y[row])
            votes[label] = votes.get(label, 0.0) + math.exp(-negative / temperature)
        best = max(votes.values())
        answers.append(min(label for label, vote in votes.items() if vote > best * (1 - 1e-9)))
    return answers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.5), (60, 1.0)])
def test_knn_agrees_with_brute_force(backend: Any, k: int, temperature: float) -> None:
    train, test = blobs(60, 1, spread=2.0), blobs(50, 2, spread=2.0)
    train = with_labels(train, 3 * train.y + 1)  # class ids need not be 0..C-1
    test = with_labels(test, 3 * test.y + 1)
    expected = brute_force(train, test, k, temperature)
    assert (
        knn_predict(train, test, num_neighbors=k, temperature=temperature, backend=backend).tolist()
        == expected
    )
    share = sum(a == b for a, b in zip(expected, test.y.tolist(), strict=True)) / len(expected)
    assert 0.3 < share < 1  # hard enough that a wrong neighbour shows
    assert knn_accuracy(
        train, test, num_neighbors=k, temperature=temperature, backend=backend
    ) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_neighbours_enter_by_row_and_equal_votes_go_to_the_lowest_class(backend: Any) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]]).repeat(50, 1)
    same = Features(x, torch.arange(50).flip(0))  # row 0 has class 49
    assert knn_predict(same, same, num_neighbors=3, temperature=0.1, backend=backend).tolist() == [47] * 50
    assert knn_predict(same, same, num_neighbors=50, temperature=0.1, backend=backend).tolist() == [0] * 50
    # duplicated rows within a real set: still what brute force says, on every backend
    train, test = blobs(20, 1, spread=2.0), blobs(30, 2, spread=2.0)
    train = Features(train.x.repeat(3, 1), torch.arange(60) % 7)
    for k in (1, 2, 4, 5):
        predicted = knn_predict(train, test, num_neighbors=k, temperature=0.1, backend=backend).tolist()
        assert predicted == brute_force(train, test, k, 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_votes_that_differ_by_rounding_only_are_equal(backend: Any) -> None:
    """Permutations of one vector are equally similar to a constant query, but not in float32."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.rand(97, generator=generator)
    for _ in range(20):
        rows = torch.stack([vector[torch.randperm(97, generator=generator)] for _ in range(12)])
        train, query = (
            Features(rows, 5 - torch.arange(12) % 6),
            Features(torch.ones(1, 97), torch.tensor([0])),
        )
        assert knn_predict(train, query, num_neighbors=12, temperature=0.01, backend=backend).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.1, None])
def test_many_k_in_one_search_are_each_k_alone(backend: Any, temperature: float | None) -> None:
    """With ties at every cut: each row of the bank comes three times, under different labels."""
    train, test = blobs(40, 1, spread=2.0), blobs(50, 2, spread=2.0)
    train = Features(train.x.repeat(3, 1), torch.arange(120) % 7)
    for bank, ks in (
        (train, [20, 1, 2, 5, 7, 20, 120]),
        (Features(train.x[:1].repeat(60, 1), torch.arange(60) % 9), [1, 5, 30]),
    ):
        found = knn_predictions(bank, test, num_neighbors=ks, temperature=temperature, backend=backend)
        assert list(found) == list(dict.fromkeys(ks))
        for k in ks:
            assert torch.equal(
                found[k], knn_predict(bank, test, num_neighbors=k, temperature=temperature, backend=backend)
            ), k
    shares = knn_accuracies(train, test, num_neighbors=[3, 9], temperature=temperature, backend=backend)
    alone = {
        k: knn_accuracy(train, test, num_neighbors=k, temperature=temperature, backend=backend)
        for k in (3, 9)
    }
    assert shares == alone and shares[3] != shares[9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_majority_is_that_of_scikit_learn(backend: Any) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, test = blobs(400, 1, classes=7, spread=2.0), blobs(300, 2, classes=7, spread=2.0)
    ks = [1, 4, 30, 200]  # even ones: votes are often equal
    found = knn_predictions(train, test, num_neighbors=ks, temperature=None, backend=backend)
    for k in ks:
        oracle = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(
            train.x.double(), train.y
        )
        assert found[k].tolist() == oracle.predict(test.x.double()).tolist()
    assert len({tuple(labels.tolist()) for labels in found.values()}) == len(ks)


def test_knn_in_chunks_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(60, 1, spread=2.0), blobs(50, 2, spread=2.0)
    whole = knn_predict(train, test, num_neighbors=7, temperature=0.1)
    monkeypatch.setattr(linear_eval.knn, "CHUNK_ELEMENTS", 60 * 3)
    for backend in ("auto", "torch"):
        assert torch.equal(knn_predict(train, test, num_neighbors=7, temperature=0.1, backend=backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_knn_edges(backend: Any) -> None:
    train, far = blobs(40, 1), blobs(40, 2)
    assert knn_accuracy(train, train, num_neighbors=1, temperature=0.1, backend=backend) == 1.0
    # k = n, all of them vote: no index -1, which would be the last label
    labels = with_labels(train, [0] * 39 + [9])
    assert 9 not in knn_predict(labels, far, num_neighbors=40, temperature=1.0, backend=backend).tolist()
    # a tiny temperature must not overflow, and neither must the scale of the features matter
    small = Features(far.x * 1e-30, far.y)
    nearest = knn_predict(train, far, num_neighbors=1, temperature=0.1, backend=backend)
    assert torch.equal(
        knn_predict(train, small, num_neighbors=10, temperature=1e-4, backend=backend), nearest
    )
    # a class that the bank does not have is wrong, not an error
    assert (
        knn_accuracy(train, with_labels(far, [77] * 40), num_neighbors=5, temperature=0.1, backend=backend)
        == 0.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_knn_refuses_what_has_no_answer(backend: Any) -> None:
    train, test = blobs(40, 1), blobs(20, 2)

    def broken(value: float, rows: int) -> Features:
        x = test.x.clone()
        x[:rows] = value
        return Features(x, test.y)

    def refuses(message: str, train: Features = train, test: Features = test, **changed: Any) -> None:
        options: dict[str, Any] = {"num_neighbors": 5, "temperature": 0.1, "backend": backend} | changed
        with pytest.raises(EvalError, match=message) as caught:
            knn_accuracy(train, test, **options)
        assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)

    refuses("num_neighbors is 41, the train split has 40", num_neighbors=41)
    refuses("num_neighbors is 0", num_neighbors=0)
    with pytest.raises(EvalError, match="num_neighbors is 99, the train split has 40"):
        knn_predictions(train, test, num_neighbors=[1, 99], temperature=0.1, backend=backend)
    with pytest.raises(EvalError, match="num_neighbors is empty"):
        knn_predictions(train, test, num_neighbors=[], temperature=0.1, backend=backend)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        refuses("temperature is", temperature=temperature)
    refuses("3 of 20 test features are not finite", test=broken(math.nan, 3))
    refuses("2 of 20 test features are not finite", test=broken(math.inf, 2))
    refuses("4 of 20 test features are all zero", test=broken(0.0, 4))
    refuses("20 of 20 train features are all zero", train=broken(0.0, 20))
    refuses("train split is empty", train=Features(train.x[:0], train.y[:0]))
    refuses("test split is empty", test=Features(test.x[:0], test.y[:0]))
    refuses("columns", test=Features(test.x[:, :5], test.y))
    refuses("20 of 20 test labels are negative", test=with_labels(test, [-1] * 20))
    refuses("no labels", test=Features(test.x, None))  # type: ignore[arg-type]


def test_without_faiss_torch_answers_and_asking_for_faiss_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, test = blobs(60, 1, spread=2.0), blobs(50, 2, spread=2.0)
    expected = knn_predict(train, test, num_neighbors=7, temperature=0.1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert torch.equal(knn_predict(train, test, num_neighbors=7, temperature=0.1), expected)
    with pytest.raises(EvalError, match="pip install faiss"):
        knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="faiss")
    with pytest.raises(EvalError, match="choose auto, faiss or torch"):
        knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="gpu")  # type: ignore[arg-type]


@pytest.mark.skipif(linear_eval.knn.import_faiss() is None, reason="no faiss")
@pytest.mark.parametrize("fails_when", ["made", "filled", "searched"])
def test_a_full_gpu_falls_back_to_the_cpu_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, fails_when: str
) -> None:
    import faiss

    class FullIndex:
        def __init__(self, resources: object, dim: int, config: Any) -> None:
            made.append(config.device)
            if fails_when == "made":
                raise RuntimeError("out of memory")

        def add(self, bank: object) -> None:
            if fails_when == "filled":
                raise RuntimeError("out of memory")

        def search(self, queries: object, k: int) -> None:
            raise RuntimeError("out of memory")

    class Resources:
        def setTempMemory(self, size: int) -> None: ...

    class Config:
        device = 0

    made: list[int] = []
    train, test = blobs(60, 1, spread=2.0), blobs(50, 2, spread=2.0)
    expected = knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="torch")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", FullIndex, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", Config, raising=False)
    assert torch.equal(knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="faiss"), expected)
    assert not made, "the caller's device is the CPU"
    assert torch.equal(
        knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="faiss", device="cuda:1"), expected
    )
    assert made == [1]


# ---- batched L-BFGS


def test_every_problem_reaches_its_own_minimum_and_is_then_left_alone() -> None:
    """Quadratics of condition 1 to 1e6 against their exact minima."""
    generator = torch.Generator().manual_seed(0)
    conditions = [1.0, 1e2, 1e4, 1e6]
    matrices, targets = [], torch.randn(4, 8, generator=generator).double()
    for condition in conditions:
        basis = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
        matrices.append(basis @ torch.logspace(0, -math.log10(condition), 8).double().diag() @ basis.T)
    stacked, calls = torch.stack(matrices), []

    def objective(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(problems.tolist())
        offset = (points - targets[problems]).unsqueeze(2)
        pull = stacked[problems] @ offset
        return 1 + (offset * pull).sum((1, 2)) / 2, pull.squeeze(2)

    minima = minimize(objective, torch.zeros(4, 8).double(), max_iter=500, tolerance=1e-15)
    torch.testing.assert_close(minima.points, targets, atol=1e-3, rtol=0)
    torch.testing.assert_close(minima.values, torch.ones(4).double(), atol=1e-12, rtol=0)
    assert minima.converged.all() and minima.num_steps[0] < minima.num_steps[3] < 200
    last = max(number for number, problems in enumerate(calls) if 0 in problems)
    assert last < len(calls) / 2, "the round one is still evaluated"
    for h in range(4):  # what it does does not depend on its neighbours
        alone = minimize(
            lambda u, which, h=h: objective(u, which + h),  # type: ignore[misc]
            torch.zeros(1, 8).double(),
            max_iter=500,
            tolerance=1e-15,
        )
        torch.testing.assert_close(alone.points[0], minima.points[h], atol=1e-6, rtol=0)
        assert abs(int(alone.num_steps) - int(minima.num_steps[h])) <= 2
    cut = minimize(objective, torch.zeros(4, 8).double(), max_iter=3, tolerance=1e-15)
    assert cut.num_steps.max() == 3 and not cut.converged[3]


def test_steps_far_too_long_are_shortened() -> None:
    """cosh from far out: its Hessian there is 1e4 times that at the minimum, and a full step overflows."""

    def objective(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return points.cosh().sum(1).double(), points.sinh()

    minima = minimize(objective, torch.tensor([[10.0, -8.0], [0.1, 0.0]]), max_iter=100, tolerance=1e-7)
    torch.testing.assert_close(minima.points, torch.zeros(2, 2), atol=1e-2, rtol=0)
    torch.testing.assert_close(minima.values, torch.full((2,), 2.0).double(), atol=1e-5, rtol=0)


def mean_loss(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    """Float64: mean cross-entropy plus l2 / 2 ||W||^2 / N."""
    logits = x.double() @ weight.double().T + bias.double()
    return (
        nn.functional.cross_entropy(logits, y).item()
        + l2 / 2 / len(x) * weight.double().square().sum().item()
    )


def scaled_blobs(num: int, seed: int, **options: Any) -> Features:
    """Columns of very different scales, off the origin, and one of them nearly a copy of another."""
    part = blobs(num, seed, **options)
    x = part.x * torch.logspace(-1, 1, part.x.shape[1]) + 3
    noise = torch.randn(num, generator=torch.Generator().manual_seed(seed))
    return Features(torch.cat([x, (x[:, 3] + 0.01 * noise).unsqueeze(1)], dim=1), part.y)


def tight(train: Features, num_classes: int, l2: list[float], **options: Any) -> Classifiers:
    return fit_logistic(
        train.x,
        train.y,
        num_classes,
        l2,
        **({"standardize": True, "max_iter": 3000, "tolerance": 1e-9} | options),
    )


@pytest.mark.parametrize(
    ("dtype", "standardize"), [("float64", True), ("float64", False), ("float32", True), ("float32", False)]
)
def test_logistic_regression_is_that_of_scikit_learn_over_eleven_decades(
    dtype: str, standardize: bool
) -> None:
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    train, test = scaled_blobs(300, 1, spread=2.5), scaled_blobs(500, 2, spread=2.5)
    grid = [10.0**exponent for exponent in range(-6, 6)]
    x, x_test = (part.x.to(getattr(torch, dtype)) for part in (train, test))
    found = tight(Features(x, train.y), 4, grid, standardize=standardize)
    assert found.weight.dtype == x.dtype and found.converged.all()
    std, mean = torch.std_mean(train.x.double(), dim=0, correction=0)
    scale = 1 / std if standardize else torch.ones_like(std)
    z, z_test = ((part.x.double() - mean) * scale for part in (train, test))
    for h, l2 in enumerate(grid):
        oracle = sklearn_linear.LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000, solver="newton-cg").fit(
            z, train.y
        )
        best = mean_loss(z, train.y, torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_), l2)
        bias = found.bias[h].double() + found.weight[h].double() @ (mean - found.center.double())
        ours = mean_loss(z, train.y, found.weight[h].double() / scale, bias, l2)
        assert ours == pytest.approx(best, rel=1e-4) and found.loss[h] == pytest.approx(ours, rel=1e-4)
        agree = (found.predict(x_test)[h] == torch.tensor(oracle.predict(z_test))).double().mean()
        assert agree >= 0.998


def test_separable_classes_and_fewer_rows_than_columns() -> None:
    """The loss goes to 0 with l2: the optimum is still that of scikit-learn."""
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    train, test = blobs(40, 1, dim=100, spread=2.0), blobs(2000, 2, dim=100, spread=2.0)
    x = train.x.double() - train.x.double().mean(0)
    grid = [1e-6, 1e-4, 1e-2, 1.0, 100.0]
    found = tight(Features(train.x.double(), train.y), 4, grid, standardize=False)
    for h, l2 in enumerate(grid):
        oracle = sklearn_linear.LogisticRegression(
            C=1 / l2, tol=1e-10, max_iter=5000, solver="newton-cg"
        ).fit(x, train.y)
        best = mean_loss(x, train.y, torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_), l2)
        assert float(found.loss[h]) == pytest.approx(best, rel=1e-4)
        ours, theirs = (
            found.predict(test.x.double())[h],
            torch.tensor(oracle.predict(test.x.double() - train.x.double().mean(0))),
        )
        assert abs((ours == test.y).double().mean() - (theirs == test.y).double().mean()) <= 0.002


def test_two_classes_are_those_of_scikit_learn_at_half_the_strength() -> None:
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    train = blobs(200, 1, classes=2, spread=3.0)
    found = tight(Features(train.x.double(), train.y), 2, [3.0], standardize=False)
    oracle = sklearn_linear.LogisticRegression(C=2 / 3.0, tol=1e-10, max_iter=5000).fit(
        train.x.double(), train.y
    )
    difference = found.weight[0, 1] - found.weight[0, 0]
    torch.testing.assert_close(difference, torch.tensor(oracle.coef_[0]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changed", [{}, {"MAX_ROTATED": 5}, {"CPU_ELEMENTS": 1}, {"STATE_ELEMENTS": 1}])
def test_a_grid_is_its_values_one_at_a_time(monkeypatch: pytest.MonkeyPatch, changed: dict[str, int]) -> None:
    """Also where the features are too wide to rotate, the rows come in chunks, and the problems in batches of
    one.
    """
    train, test = scaled_blobs(300, 1, dim=40, spread=5.0), scaled_blobs(1000, 2, dim=40, spread=5.0)
    grid = list(L2_GRID[::2][::-1])
    alone = [tight(train, 4, [l2], tolerance=1e-6) for l2 in grid]
    for name, value in changed.items():
        monkeypatch.setattr(linear_eval.lbfgs, name, value)
    together = tight(train, 4, grid, tolerance=1e-9 if "MAX_ROTATED" in changed else 1e-6)
    torch.testing.assert_close(together.loss, torch.cat([found.loss for found in alone]), rtol=1e-4, atol=0)
    predicted = torch.cat([found.predict(test.x) for found in alone])
    assert (together.predict(test.x) == predicted).double().mean() > 0.998
    if not changed:
        assert together.num_steps.sum() < 0.7 * sum(int(found.num_steps) for found in alone), (
            "neighbours' solutions did not help"
        )
        again = tight(train, 4, [grid[9]], tolerance=1e-6, start=(together.weight[9], together.bias[9]))
        assert again.num_steps[0] <= 3 < alone[9].num_steps[0] and float(again.loss[0]) == pytest.approx(
            float(together.loss[9]), rel=1e-5
        )


# ---- linear probe


def test_the_choice_of_l2_does_not_see_the_test_split() -> None:
    train, test = scaled_blobs(200, 1, dim=40, spread=3.0), scaled_blobs(200, 2, dim=40, spread=3.0)
    result = linear_probe(train, test, seed=0)
    other = linear_probe(train, Features(-100 * test.x, test.y.flip(0)), seed=0)
    assert (other.l2, other.val_top1, other.train_loss) == (result.l2, result.val_top1, result.train_loss)
    assert other.top1 != result.top1
    again = linear_probe(train, test, seed=0)
    assert again == result and torch.equal(again.predicted, result.predicted)


def test_l2_is_the_best_of_the_grid_on_the_held_out_part_and_then_refitted() -> None:
    """More features than rows: hardly regularised fits are worse, so that the choice matters."""
    train, test = blobs(60, 1, dim=100, spread=6.0), blobs(40, 2, dim=100, spread=6.0)
    fit, held = split_rows(train.y, 0.2, seed=0)
    alone = {l2: tight(Features(train.x[fit], train.y[fit]), 4, [l2], tolerance=1e-5) for l2 in L2_GRID[::4]}
    accuracy = {
        l2: (found.predict(train.x[held])[0] == train.y[held]).double().mean().item()
        for l2, found in alone.items()
    }
    assert len(set(accuracy.values())) > 1
    chosen = linear_probe(train, test, seed=0, l2_grid=L2_GRID[::4])
    assert chosen.val_top1 == max(accuracy.values())
    assert chosen.l2 == max(l2 for l2 in accuracy if accuracy[l2] == chosen.val_top1), (
        "of equals the strongest"
    )
    final = tight(train, 4, [chosen.l2])
    assert chosen.train_loss == pytest.approx(float(final.loss), rel=1e-5)
    assert chosen.predicted.tolist() == final.predict(test.x)[0].tolist()
    assert chosen.top1 == (chosen.predicted == test.y).double().mean()


@pytest.mark.parametrize("probe", [linear_probe, partial(sgd_probe, epochs=5)])
def test_a_validation_split_is_chosen_on_and_refitted_with(probe: Any) -> None:
    train, val, test = blobs(60, 1, spread=3.0), blobs(80, 3, spread=3.0), blobs(200, 2, spread=3.0)
    train, val, test = (with_labels(part, 5 * part.y + 2) for part in (train, val, test))
    result = probe(train, test, seed=0, val=val)
    both = Features(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
    if isinstance(result, HeadResult):
        again = probe(
            both, test, seed=0, learning_rates=[result.learning_rate], weight_decays=[result.weight_decay]
        )
    else:
        again = probe(both, test, seed=0, l2_grid=[result.l2])
        assert result.l2 != probe(train, test, seed=0, val=with_labels(val, val.y.roll(1))).l2
    assert again.val_top1 is None and 0 < result.val_top1 <= 1
    assert again.top1 == pytest.approx(result.top1, abs=0.01) and again.train_loss == pytest.approx(
        result.train_loss, rel=1e-4
    )
    assert set(result.predicted.tolist()) <= {2, 7, 12, 17}


def test_one_l2_needs_no_held_out_rows() -> None:
    train, test = blobs(4, 1, spread=0.5), blobs(100, 2, spread=0.5)  # one image of each class
    result = linear_probe(train, test, seed=0, l2_grid=[1e-2], standardize=False)
    assert result.top1 > 0.8 and result.val_top1 is None


def test_float64_and_the_caller_s_precision() -> None:
    train, test = blobs(200, 1, spread=3.0), blobs(200, 2, spread=3.0)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        single, double = (linear_probe(train, test, seed=0, precision=precision) for precision in PRECISIONS)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert double.l2 == single.l2 and double.top1 == pytest.approx(single.top1, abs=0.005)
    assert (
        double.train_loss == pytest.approx(single.train_loss, rel=1e-5)
        and double.train_loss != single.train_loss
    )


def test_permuted_labels_give_chance() -> None:
    train, test = blobs(400, 1, spread=0.5), blobs(2000, 2, spread=0.5)
    assert linear_probe(train, test, seed=0).top1 > 0.95
    shuffled = with_labels(test, test.y[torch.randperm(2000, generator=torch.Generator().manual_seed(0))])
    # four standard deviations of 2,000 guesses
    assert abs(linear_probe(train, shuffled, seed=0).top1 - 0.25) < 0.04


def test_held_out_rows_are_stratified_disjoint_and_drawn_from_the_seed() -> None:
    labels = torch.tensor([0] * 50 + [5] * 10 + [7] * 2)[
        torch.randperm(62, generator=torch.Generator().manual_seed(0))
    ]
    fit, held = split_rows(labels, 0.2, seed=1)
    assert sorted(fit.tolist() + held.tolist()) == list(range(62))
    assert {label: int((labels[held] == label).sum()) for label in (0, 5, 7)} == {0: 10, 5: 2, 7: 1}
    assert torch.equal(split_rows(labels, 0.2, seed=1)[1], held)
    assert not torch.equal(split_rows(labels, 0.2, seed=2)[1], held)
    assert [len(part) for part in split_rows(labels, 0.999, seed=1)] == [3, 59]  # one of each class stays


def test_constant_columns_do_not_blow_up() -> None:
    train, test = blobs(200, 1, spread=0.5), blobs(200, 2, spread=0.5)
    expected = linear_probe(train, test, seed=0).top1
    constant = Features(torch.cat([train.x, torch.full((200, 1), 0.1), torch.zeros(200, 1)], 1), train.y)
    moved = Features(torch.cat([test.x, torch.full((200, 1), 0.7), torch.ones(200, 1)], 1), test.y)
    assert linear_probe(constant, moved, seed=0).top1 == pytest.approx(expected, abs=0.005)


def test_features_made_in_inference_mode_can_be_probed() -> None:
    with torch.inference_mode():
        train, test = blobs(80, 1), blobs(80, 2)
    with torch.no_grad():
        assert linear_probe(train, test, seed=0).top1 > 0.5


def test_linear_probe_refuses_what_has_no_answer() -> None:
    train, test = blobs(40, 1), blobs(20, 2)

    def refuses(message: str, train: Features = train, test: Features = test, **options: Any) -> None:
        with pytest.raises(EvalError, match=message) as caught:
            linear_probe(train, test, **({"seed": 0} | options))
        assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)

    refuses("only class", train=with_labels(train, [3] * 40), test=with_labels(test, [3] * 20))
    refuses(
        "classes 5 have one train image",
        train=with_labels(train, [0, 1] * 19 + [0, 5]),
        test=with_labels(test, [0] * 20),
    )
    refuses("columns", test=Features(test.x[:, :5], test.y))
    refuses("not finite", test=Features(test.x / 0, test.y))
    refuses("val_fraction", val_fraction=1.0)
    refuses("l2_grid", l2_grid=[])
    refuses("l2_grid", l2_grid=[1.0, 0.0])
    refuses("l2_grid", l2_grid=[1.0, math.nan])
    refuses("max_iter", max_iter=0)
    refuses("precision", precision="bf16")
    refuses("classes 9 of the validation split have no train images", val=with_labels(train, [9] * 40))
    refuses("4 of 20 validation", val=Features(torch.cat([test.x[4:], test.x[:4] / 0]), test.y))


@pytest.mark.parametrize("unknown", [[8], [9, 8], [1_000_000], [4, 99], [17] * 5])
def test_test_classes_that_train_lacks_count_as_wrong_for_every_probe(unknown: list[int]) -> None:
    train, test = blobs(40, 1), blobs(20, 2)
    more = Features(torch.cat([test.x, test.x[: len(unknown)]]), torch.cat([test.y, torch.tensor(unknown)]))
    assert not set(unknown) & set(train.y.tolist())
    share = len(test.x) / len(more.x)
    probes: list[Callable[[Features], float]] = [
        lambda test: linear_probe(train, test, seed=0).top1,
        lambda test: sgd_probe(train, test, seed=0, epochs=2).top1,
        lambda test: knn_accuracy(train, test, num_neighbors=3, temperature=None),
        lambda test: fewshot_probe(train, test, seed=0, per_class=2, num_subsets=3).mean,
    ]
    for probe in probes:
        assert probe(more) == pytest.approx(share * probe(test))


# ---- several labels a row


def tagged(num: int, seed: int, *, dim: int = 12, classes: int = 5, unsure: float = 0.1) -> Features:
    """Columns of different scales; each class on its own side of a noisy plane, from rare to common, some
    rows not counted.
    """
    planes = torch.randn(dim, classes, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, dim, generator=generator)
    y = (
        x @ planes + 2 * torch.randn(num, classes, generator=generator) > torch.linspace(5, -2, classes)
    ).long()
    y[torch.rand(num, classes, generator=generator) < unsure] = -1
    return Features(x * torch.logspace(-1, 1, dim) + 3, y)


def binary_loss(z: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    """Float64: mean over the rows that count of log(1 + exp(-s z)), plus l2 / 2 ||w||^2 / their number."""
    counted = y >= 0
    logits = z[counted].double() @ weight.double() + bias.double()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, y[counted].double())
    return (loss + l2 / 2 / counted.sum() * weight.double().square().sum()).item()


@pytest.mark.parametrize("changed", [{}, {"MAX_ROTATED": 5}, {"CPU_ELEMENTS": 1}, {"STATE_ELEMENTS": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_regression_for_each_class_is_that_of_scikit_learn_over_eleven_decades(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, changed: dict[str, int]
) -> None:
    sklearn_linear, sklearn_metrics = (
        pytest.importorskip("sklearn.linear_model"),
        pytest.importorskip("sklearn.metrics"),
    )
    for name, value in changed.items():
        monkeypatch.setattr(linear_eval.lbfgs, name, value)
    train, test = tagged(300, 1), tagged(400, 2)
    grid = [10.0**exponent for exponent in range(-6, 6)][:: 4 if changed else 1]
    classes, l2 = (
        torch.arange(5).repeat(len(grid)),
        torch.tensor(grid, dtype=torch.float64).repeat_interleave(5),
    )
    given: dict[str, Any] = {"standardize": True, "max_iter": 3000, "tolerance": 1e-9}
    found = fit_binary(train.x.to(dtype), train.y, classes, l2, **given)
    assert found.weight.dtype == dtype and found.converged.all()
    std, mean = torch.std_mean(train.x.double(), dim=0, correction=0)
    z, z_test = ((part.x.double() - mean) / std for part in (train, test))
    scores = found.scores(test.x.to(dtype))
    for p, (c, strength) in enumerate(zip(classes.tolist(), l2.tolist(), strict=True)):
        y, y_test = train.y[:, c], test.y[:, c]
        counted, counted_test = y >= 0, y_test >= 0
        assert 0 < (y == 1).double().mean() < 1 and not counted.all()
        solver = sklearn_linear.LogisticRegression(
            C=1 / strength, tol=1e-8, max_iter=5000, solver="newton-cg"
        )
        oracle = solver.fit(z[counted], y[counted])
        best = binary_loss(z, y, torch.tensor(oracle.coef_[0]), torch.tensor(oracle.intercept_[0]), strength)
        weight, center = found.weight[p].double(), found.center.double()
        ours = binary_loss(z, y, weight * std, found.bias[p].double() + weight @ (mean - center), strength)
        assert ours == pytest.approx(best, rel=1e-4) and float(found.loss[p]) == pytest.approx(ours, rel=1e-4)
        theirs = sklearn_metrics.average_precision_score(
            y_test[counted_test], oracle.decision_function(z_test[counted_test])
        )
        mine = average_precision(scores[:, p, None], y_test[:, None], "map")
        assert float(mine) == pytest.approx(theirs, abs=0.005)


def test_l2_is_chosen_for_each_class_by_its_precision_and_then_refitted() -> None:
    train, val, test = tagged(120, 1), tagged(120, 2), tagged(300, 3)
    grid = [1e-3, 1.0, 100.0]
    both = Features(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
    given: dict[str, Any] = {"standardize": True, "max_iter": 1000, "tolerance": 1e-7}
    for metric in MULTI_LABEL:
        found = multi_label_probe(train, test, metric, seed=0, val=val, l2_grid=grid)
        for c in range(5):
            of_class, precisions = torch.tensor([c]), []
            for l2 in grid:
                alone = fit_binary(train.x, train.y, of_class, torch.tensor([l2]), **given)
                precisions.append(average_precision(alone.scores(val.x), val.y[:, [c]], metric).item())
            assert found.val_precision[c] == pytest.approx(max(precisions), abs=0.01)
            assert precisions[grid.index(float(found.l2[c]))] == pytest.approx(max(precisions), abs=0.01)
            alone = fit_binary(both.x, both.y, of_class, found.l2[[c]], **given)
            torch.testing.assert_close(found.scores[:, [c]], alone.scores(test.x), atol=1e-2, rtol=1e-2)
    assert len(set(found.l2.tolist())) > 1, "one l2 for all would do, and the test shows nothing"


def test_rows_that_do_not_count_and_the_test_labels_have_no_say() -> None:
    train, test = tagged(200, 1), tagged(100, 2)
    found = multi_label_probe(train, test, "map", seed=0)
    hidden = multi_label_probe(train, Features(test.x, 1 - test.y.clamp_min(0)), "map", seed=0)
    assert torch.equal(found.scores, hidden.scores) and torch.equal(found.l2, hidden.l2)
    x = torch.cat([train.x, 100 + 50 * torch.randn(40, 12, generator=torch.Generator().manual_seed(4))])
    given: dict[str, Any] = {"standardize": False, "max_iter": 2000, "tolerance": 1e-9}
    pairs = (torch.arange(5), torch.ones(5, dtype=torch.float64))
    with_more = fit_binary(x.double(), torch.cat([train.y, torch.full((40, 5), -1)]), *pairs, **given)
    without = fit_binary(train.x.double(), train.y, *pairs, **given)
    torch.testing.assert_close(with_more.loss, without.loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(with_more.weight, without.weight, atol=1e-2, rtol=1e-2)


def test_multi_label_probe_refuses_what_has_no_answer() -> None:
    train, test = tagged(60, 1), tagged(30, 2)

    def refuses(
        message: str, train: Features = train, test: Features = test, metric: Any = "map", **options: Any
    ) -> None:
        with pytest.raises(EvalError, match=message) as caught:
            multi_label_probe(train, test, metric, **({"seed": 0} | options))
        assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)

    refuses("not all 1, 0 or -1", train=with_labels(train, 2 * train.y))
    refuses(r"give \(N, D\) features and \(N, C\)", train=with_labels(train, train.y[:, 0]))
    refuses("test labels 4", test=with_labels(test, test.y[:, 1:]))
    refuses("columns", test=Features(test.x[:, :5], test.y))
    refuses("not finite", test=Features(test.x / 0, test.y))
    refuses(
        "classes 0 are on all or on none of the fitted",
        train=with_labels(train, train.y * torch.tensor([0, 1, 1, 1, 1])),
        val=test,
    )
    refuses(
        "classes 0, 1 are on all or on none of the held-out",
        val=with_labels(test, test.y * torch.tensor([1, 0, 1, 1, 1])),
    )
    refuses("metric is 'top1'", metric="top1")
    refuses("l2_grid", l2_grid=[0.0])
    refuses("val_fraction", val_fraction=0)
    for probe in (linear_probe, sgd_probe):
        with pytest.raises(EvalError, match=r"labels \(30, 5\). fix: give .* \(N,\) labels"):
            probe(train, test, seed=0)
    with pytest.raises(EvalError, match=r"\(N,\) labels"):
        knn_accuracy(train, test, num_neighbors=3, temperature=0.1)


# ---- SGD heads


def test_heads_together_are_each_head_alone() -> None:
    """Against torch's layer, autograd, torch.optim.SGD and its cosine, one head at a time."""
    train = blobs(70, 1, spread=2.0)
    rates, decays = [0.01, 0.01, 0.3, 0.3, 2.0], [0.0, 0.1, 0.0, 1e-3, 0.01]
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 32, "momentum": 0.9, "seed": 5}
    weight, loss = train_heads(train.x, train.y, 4, torch.tensor(rates), torch.tensor(decays), **settings)
    for h, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        layer = nn.Linear(12, 4)
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        groups: list[dict[str, Any]] = [
            {"params": [layer.weight], "weight_decay": decay},
            {"params": [layer.bias]},
        ]
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 3)
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            total = 0.0
            for rows in torch.randperm(70, generator=generator).split(32):
                optimizer.zero_grad()
                batch_loss = nn.functional.cross_entropy(layer(train.x[rows]), train.y[rows])
                batch_loss.backward()
                optimizer.step()
                schedule.step()
                total += batch_loss.item() * len(rows)
        torch.testing.assert_close(weight[h, :, :-1], layer.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weight[h, :, -1], layer.bias.detach(), atol=1e-5, rtol=1e-4)
        assert float(loss[h]) == pytest.approx(total / 70, rel=1e-4)


def test_sgd_probe_takes_the_best_head_without_seeing_the_test_split() -> None:
    train, test = blobs(300, 1, spread=2.5), blobs(400, 2, spread=2.5)
    grid: dict[str, Any] = {
        "learning_rates": [1e-6, 0.03, 1e38],
        "weight_decays": [0.0, 10.0],
        "epochs": 20,
        "batch_size": 64,
    }
    result = sgd_probe(train, test, seed=0, **grid)
    other = sgd_probe(train, Features(-100 * test.x, test.y.flip(0)), seed=0, **grid)
    assert (
        (result.learning_rate, result.weight_decay)
        == (other.learning_rate, other.weight_decay)
        == (0.03, 0.0)
    )
    assert (
        result.val_top1 == other.val_top1
        and result.train_loss == other.train_loss
        and result.top1 != other.top1
    )
    assert (
        result.top1 == pytest.approx(linear_probe(train, test, seed=0).top1, abs=0.03) and result.top1 > 0.5
    )
    assert sgd_probe(train, test, seed=0, **grid) == result
    scaled = sgd_probe(
        Features(1000 * train.x + 5, train.y), Features(1000 * test.x + 5, test.y), seed=0, **grid
    )
    assert scaled.top1 == pytest.approx(result.top1, abs=0.005), "features are standardised"


def test_sgd_probe_refuses_what_has_no_answer() -> None:
    train, test = blobs(40, 1), blobs(20, 2)

    def refuses(message: str, train: Features = train, test: Features = test, **options: Any) -> None:
        with pytest.raises(EvalError, match=message) as caught:
            sgd_probe(train, test, **({"seed": 0, "epochs": 2} | options))
        assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)

    refuses("every head diverged", learning_rates=[1e38], epochs=30)
    refuses("every head diverged", learning_rates=[1e38], weight_decays=[0.0], epochs=30)
    refuses("only class", train=with_labels(train, [3] * 40), test=with_labels(test, [3] * 20))
    refuses(
        "classes 5 have one train image",
        train=with_labels(train, [0, 1] * 19 + [0, 5]),
        test=with_labels(test, [0] * 20),
    )
    refuses("not finite", train=Features(train.x / 0, train.y))
    refuses("learning_rates is", learning_rates=[0.1, 0.0])
    refuses("learning_rates is", learning_rates=[])
    refuses("weight_decays is", weight_decays=[-1.0])
    refuses("epochs is 0", epochs=0)
    refuses("momentum 1.0", momentum=1.0)


def test_linear_eval_stands_alone() -> None:
    code = (
        "import sys, linear_eval; sys.exit(any(name.split('.')[0] in ('ssl_emp', 'faiss') for name "
        "in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    sources = Path(linear_eval.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if "distributed" in path.read_text()], "it knows of one process"
