"""linear_eval against brute force in float64 (kNN) and scikit-learn (linear probe)."""

import hashlib
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linear_eval.knn
from linear_eval import EvalError, Features, extract_features, knn_accuracy, knn_predict, linear_probe
from linear_eval.linear import L2_GRID, split_rows

BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(linear_eval.knn._import_faiss() is None, reason="no faiss"))]


def blobs(num: int, seed: int, *, dim: int = 12, classes: int = 4, spread: float = 1.0) -> Features:
    """Gaussian classes around fixed means."""
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % classes
    return Features(means[y] + spread * torch.randn(num, dim, generator=generator), y)


def with_labels(features: Features, labels: list[int] | Tensor) -> Features:
    return Features(features.x, torch.as_tensor(labels))


# ---- features --------------------------------------------------------------------------------------------------------


def small_encoder() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    layers(torch.randn(8, 3, 8, 8))  # running statistics that are not the initial ones
    return layers.eval()


def images(num: int) -> Tensor:
    return torch.randint(0, 256, (num, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def state_hash(module: nn.Module) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())).hexdigest()


def test_features_are_those_of_the_encoder_for_any_batch_size() -> None:
    encoder, pixels, seen = small_encoder(), images(23), []
    with torch.no_grad():
        expected = torch.stack([encoder(image[None].float() / 255)[0] for image in pixels])
    for batch_size in (1, 7, 23, 100):
        features = extract_features(encoder, pixels, torch.arange(23), batch_size=batch_size, progress=lambda *n: seen.append(n))
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


# ---- kNN -------------------------------------------------------------------------------------------------------------


def brute_force(train: Features, test: Features, k: int, temperature: float) -> list[int]:
    """Float64, one pair at a time: sort by similarity, then row; add up exp(similarity / T); lowest class of the best."""
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
    assert knn_predict(train, test, num_neighbors=k, temperature=temperature, backend=backend).tolist() == expected
    share = sum(a == b for a, b in zip(expected, test.y.tolist(), strict=True)) / len(expected)
    assert 0.3 < share < 1  # hard enough that a wrong neighbour shows
    assert knn_accuracy(train, test, num_neighbors=k, temperature=temperature, backend=backend) == pytest.approx(share, abs=1e-12)


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
    """Rows that are permutations of one vector are equally similar to a constant query, but not in float32."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.rand(97, generator=generator)
    for _ in range(20):
        rows = torch.stack([vector[torch.randperm(97, generator=generator)] for _ in range(12)])
        train, query = Features(rows, 5 - torch.arange(12) % 6), Features(torch.ones(1, 97), torch.tensor([0]))
        assert knn_predict(train, query, num_neighbors=12, temperature=0.01, backend=backend).tolist() == [0]


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
    assert torch.equal(knn_predict(train, small, num_neighbors=10, temperature=1e-4, backend=backend), nearest)
    # a class that the bank does not have is wrong, not an error
    assert knn_accuracy(train, with_labels(far, [77] * 40), num_neighbors=5, temperature=0.1, backend=backend) == 0.0


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


def test_without_faiss_torch_answers_and_asking_for_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(60, 1, spread=2.0), blobs(50, 2, spread=2.0)
    expected = knn_predict(train, test, num_neighbors=7, temperature=0.1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert torch.equal(knn_predict(train, test, num_neighbors=7, temperature=0.1), expected)
    with pytest.raises(EvalError, match="pip install faiss"):
        knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="faiss")
    with pytest.raises(EvalError, match="choose auto, faiss or torch"):
        knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="gpu")  # type: ignore[arg-type]


@pytest.mark.skipif(linear_eval.knn._import_faiss() is None, reason="no faiss")
@pytest.mark.parametrize("fails_when", ["made", "filled", "searched"])
def test_a_full_gpu_falls_back_to_the_cpu_with_the_same_result(monkeypatch: pytest.MonkeyPatch, fails_when: str) -> None:
    import faiss

    class FullIndex:
        def __init__(self, resources: object, dim: int) -> None:
            if fails_when == "made":
                raise RuntimeError("out of memory")

        def add(self, bank: object) -> None:
            if fails_when == "filled":
                raise RuntimeError("out of memory")

        def search(self, queries: object, k: int) -> None:
            raise RuntimeError("out of memory")

    class Resources:
        def setTempMemory(self, size: int) -> None: ...

    train, test = blobs(60, 1, spread=2.0), blobs(50, 2, spread=2.0)
    expected = knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="torch")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", FullIndex, raising=False)
    assert torch.equal(knn_predict(train, test, num_neighbors=7, temperature=0.1, backend="faiss"), expected)


# ---- linear probe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_linear_probe_finds_the_optimum_of_scikit_learn(l2: float) -> None:
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    train, test = blobs(300, 1, spread=2.5), blobs(400, 2, spread=2.5)
    train, test = (Features(part.x * torch.logspace(-2, 2, 12) + 5, part.y) for part in (train, test))  # scales differ
    result = linear_probe(train, test, seed=0, l2_grid=[l2])

    mean, std = train.x.double().mean(0), train.x.double().std(0, correction=0)
    x_train, x_test = ((part.x.double() - mean) / std for part in (train, test))
    oracle = sklearn_linear.LogisticRegression(C=1 / (l2 * len(x_train)), tol=1e-9, max_iter=10_000).fit(x_train, train.y)
    logits = torch.tensor(oracle.decision_function(x_train))
    loss = nn.functional.cross_entropy(logits, train.y).item() + l2 / 2 * (oracle.coef_**2).sum()
    assert result.train_loss == pytest.approx(loss, rel=1e-3)
    assert result.top1 == pytest.approx(oracle.score(x_test, test.y), abs=0.005)
    assert 0.4 < result.top1 < 0.9 and result.num_steps < 200


def test_the_choice_of_l2_does_not_see_the_test_split() -> None:
    train, test = blobs(200, 1, spread=3.0), blobs(200, 2, spread=3.0)
    result = linear_probe(train, test, seed=0)
    other = linear_probe(train, Features(-100 * test.x, test.y.flip(0)), seed=0)
    assert (other.l2, other.val_top1, other.train_loss) == (result.l2, result.val_top1, result.train_loss)
    assert other.top1 != result.top1
    assert min(L2_GRID) < result.l2 < max(L2_GRID)
    assert linear_probe(train, test, seed=0) == result


def test_l2_is_the_best_of_the_grid_on_the_held_out_part() -> None:
    """More features than rows: hardly regularised fits are worse, so that the choice matters."""
    train, test = blobs(60, 1, dim=100, spread=6.0), blobs(40, 2, dim=100, spread=6.0)
    alone = {l2: linear_probe(train, test, seed=0, l2_grid=[l2]).val_top1 for l2 in L2_GRID}
    chosen = linear_probe(train, test, seed=0)
    assert chosen.val_top1 == max(alone.values()) == alone[chosen.l2]
    assert len(set(alone.values())) > 1


def test_permuted_labels_give_chance() -> None:
    train, test = blobs(400, 1, spread=0.5), blobs(2000, 2, spread=0.5)
    assert linear_probe(train, test, seed=0).top1 > 0.95
    shuffled = with_labels(test, test.y[torch.randperm(2000, generator=torch.Generator().manual_seed(0))])
    assert abs(linear_probe(train, shuffled, seed=0).top1 - 0.25) < 0.04  # four standard deviations of 2,000 guesses


def test_held_out_rows_are_stratified_disjoint_and_drawn_from_the_seed() -> None:
    labels = torch.tensor([0] * 50 + [5] * 10 + [7] * 2)[torch.randperm(62, generator=torch.Generator().manual_seed(0))]
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
    refuses("classes 8, 9 of the test split have no train images", test=with_labels(test, [8, 9] * 10))
    refuses("classes 5 have one train image", train=with_labels(train, [0, 1] * 19 + [0, 5]), test=with_labels(test, [0] * 20))
    refuses("columns", test=Features(test.x[:, :5], test.y))
    refuses("not finite", test=Features(test.x / 0, test.y))
    refuses("val_fraction", val_fraction=1.0)
    refuses("l2_grid", l2_grid=[])
    refuses("l2_grid", l2_grid=[1.0, 0.0])


def test_linear_eval_stands_alone() -> None:
    code = "import sys, linear_eval; sys.exit(any(name.split('.')[0] in ('ssl_emp', 'faiss') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
