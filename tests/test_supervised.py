"""The supervised objective against Python's loops and numbers in float64, and torch's own modules."""

import math

import pytest
import torch
from torch import Tensor, nn

from ssl_emp.model import build_encoder
from ssl_emp.prune import Emp, entropy
from ssl_emp.prune.record import Known
from ssl_emp.supervised import Classifier, cross_entropy


def random_logits(
    count: int, classes: int, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    logits = scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, classes, (count,), generator=generator)


def emp_score(loss: Tensor, logits: Tensor, beta: float) -> Tensor:
    """EMP's score of samples that were seen once, (B,)."""
    return Emp(beta=beta).score(Known(torch.stack([loss, entropy(logits)]), torch.zeros_like(loss)))


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(x - max(row)) for x in row)
    return [math.exp(x - max(row)) / total for x in row]


def looped_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    losses = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        target = [smoothing / len(row) + (1 - smoothing) * (c == label) for c in range(len(row))]
        losses.append(-math.fsum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True)))
    return torch.tensor(losses, dtype=torch.float64)


def looped_entropy(logits: Tensor) -> Tensor:
    rows = [[p for p in softmax(row) if p > 0] for row in logits.double().tolist()]
    return torch.tensor([-math.fsum(p * math.log(p) for p in row) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_equals_the_definitions(classes: int, smoothing: float) -> None:
    logits, labels = random_logits(20, classes)
    loss, memory = cross_entropy(logits, labels, smoothing), entropy(logits)
    torch.testing.assert_close(loss, looped_loss(logits, labels, smoothing), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory, looped_entropy(logits), rtol=1e-12, atol=1e-12)
    expected = looped_loss(logits, labels, smoothing) + 5 * looped_entropy(logits)
    score = emp_score(loss.float(), logits.float(), 5.0)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-5)
    two_terms = torch.stack([loss, memory]).float()
    torch.testing.assert_close(score, two_terms[0] + 5.0 * two_terms[1], rtol=1e-5, atol=1e-5)


def test_mean_is_torchs() -> None:
    logits, labels = random_logits(64, 10, dtype=torch.float32)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(cross_entropy(logits, labels, 0.1).mean(), expected)


def test_gradients() -> None:
    logits, labels = random_logits(4, 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, 0.1), logits)
    assert not entropy(logits).requires_grad, "a score is not trained on"


def test_known_entropies() -> None:
    even = torch.zeros(1, 100)
    torch.testing.assert_close(entropy(even), torch.tensor([math.log(100)]))
    coins = torch.tensor([[0.0, 0.0, -math.inf], [1e4, 1e4, -1e4]])
    torch.testing.assert_close(entropy(coins), torch.full((2,), math.log(2)))
    sure = torch.tensor([[0.0, -math.inf], [3e38, -3e38], [0.0, -200.0]])
    assert entropy(sure).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_extreme_logits_stay_finite(dtype: torch.dtype, scale: float) -> None:
    logits, labels = random_logits(16, 10, scale, dtype)
    logits = logits.clamp(-6e4, 6e4).requires_grad_()
    loss, memory = cross_entropy(logits, labels, 0.1), entropy(logits)
    assert loss.dtype == memory.dtype == torch.float32 and loss.isfinite().all()
    assert ((memory >= 0) & (memory <= math.log(10) + 1e-5)).all()
    loss.mean().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_network_that_diverged_is_not_hidden() -> None:
    logits, labels = random_logits(3, 4)
    logits[1, 2] = math.nan
    for values in (
        cross_entropy(logits, labels, 0.1),
        entropy(logits),
        emp_score(torch.zeros(3), logits, 5.0),
    ):
        assert values.isnan().tolist() == [False, True, False]


def test_half_precision_is_computed_in_float32() -> None:
    logits, labels = random_logits(16, 10, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, memory = cross_entropy(logits, labels, 0.1), entropy(logits)
        assert emp_score(loss, logits, 5.0).dtype == torch.float32
    assert loss.dtype == memory.dtype == torch.float32
    torch.testing.assert_close(loss.double(), looped_loss(logits, labels, 0.1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory.double(), looped_entropy(logits), rtol=1e-5, atol=1e-5)


def test_memory_lowers_a_wrong_label_below_an_open_question() -> None:
    """A sample whose label the network confidently contradicts has the higher loss, one it is unsure of the
    higher score.
    """
    logits, labels = torch.tensor([[6.0, 0.0, 0.0], [0.1, 0.0, 0.0]]), torch.tensor([1, 1])
    loss = cross_entropy(logits, labels, 0.0)
    score = emp_score(loss, logits, 5.0)
    assert loss[0] > loss[1] and score[0] < score[1]
    assert emp_score(loss, logits, 0.0).equal(loss)


def test_classifier_gives_features_and_logits() -> None:
    torch.manual_seed(0)
    f = build_encoder("resnet18", 8, "cifar", 16, [0.5] * 3, [0.5] * 3)
    model = Classifier(f.backbone, f.feature_dim, 7).eval()
    views = torch.randn(4, 3, 16, 16)
    h, logits = model(views)
    assert h.equal(f.backbone(views)) and logits.shape == (4, 7)
    torch.testing.assert_close(logits, h @ model.head.weight.T + model.head.bias)
    logits.sum().backward()
    # what is exported is what trains
    assert model.backbone is f.backbone and all(p.grad is not None for p in f.backbone.parameters())
