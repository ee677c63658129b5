"""linear_eval.metrics against scikit-learn, a hand-typed 11-point rule, the binomial and a loop that
resamples.
"""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from torch import Tensor

from linear_eval import EvalError
from linear_eval.metrics import CHUNK_ELEMENTS, Metric, average_precision, measure


def predictions(num: int, classes: int, right: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class ids of which a share `right` is correct; classes of very different size."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(num, generator=generator) ** 2 * classes).long()
    wrong = torch.rand(num, generator=generator) >= right
    return torch.where(wrong, (labels + 1) % classes, labels), labels


def multi_label(num: int, classes: int, seed: int = 0, levels: int = 7) -> tuple[Tensor, Tensor]:
    """Scores with many ties, labels in {1, 0, -1} that they say something about."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(num, classes, generator=generator) < 0.3).long()
    scores = ((labels + torch.rand(num, classes, generator=generator) * 1.5) * levels).round() / levels
    labels[torch.rand(num, classes, generator=generator) < 0.1] = -1
    return scores, labels


def eleven_points(scores: list[float], labels: list[int]) -> float:
    """As the rule is told: at each recall, the highest precision of any threshold that reaches it."""
    points = []
    for threshold in set(scores):
        taken = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        points.append((sum(taken) / sum(labels), sum(taken) / len(taken)))
    return (
        sum(
            max(precision for recall, precision in points if recall >= step / 10 - 1e-12)
            for step in range(11)
        )
        / 11
    )


def test_accuracies_equal_scikit_learns() -> None:
    predicted, labels = predictions(300, 7, 0.6)
    assert measure(predicted, labels, "top1").value == pytest.approx(
        (predicted == labels).double().mean().item(), abs=1e-15
    )
    expected = balanced_accuracy_score(labels.numpy(), predicted.numpy())
    assert measure(predicted, labels, "mean_per_class").value == pytest.approx(expected, abs=1e-12)
    scores = torch.nn.functional.one_hot(predicted, 7).float()  # scores are their highest column
    for metric in ("top1", "mean_per_class"):
        assert measure(scores, labels, metric) == measure(predicted, labels, metric)


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_equals_scikit_learn_and_the_rule_told_by_hand(levels: int) -> None:
    scores, labels = multi_label(80, 5, levels=levels)
    area, points = average_precision(scores, labels, "map"), average_precision(scores, labels, "voc_map")
    for c in range(5):
        counted = labels[:, c] >= 0  # difficult ones do not exist
        mine, truth = scores[counted, c], labels[counted, c]
        assert area[c].item() == pytest.approx(
            average_precision_score(truth.numpy(), mine.numpy()), abs=1e-12
        )
        assert points[c].item() == pytest.approx(eleven_points(mine.tolist(), truth.tolist()), abs=1e-12)
    assert measure(scores, labels, "voc_map", num_resamples=2).value == pytest.approx(
        points.mean().item(), abs=1e-12
    )


def test_eleven_points_of_three_images_by_hand() -> None:
    # ranked: hit, miss, hit. Recall 1/2 at precision 1, recall 1 at precision 2/3: six recalls (0 to 0.5) at
    # 1, five at 2/3.
    scores, labels = torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1], [0], [1]])
    assert average_precision(scores, labels, "voc_map").item() == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision(scores, labels, "map").item() == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_a_class_without_positives_counts_in_no_mean() -> None:
    scores, labels = multi_label(60, 3)
    labels[:, 1] = 0
    aps = average_precision(scores, labels, "voc_map")
    assert aps[1].isnan()
    assert measure(scores, labels, "voc_map", num_resamples=50).value == pytest.approx(
        ((aps[0] + aps[2]) / 2).item()
    )


@pytest.mark.parametrize(("num", "right"), [(2000, 0.7), (500, 0.95)])
def test_the_interval_of_an_accuracy_is_the_binomials(num: int, right: float) -> None:
    """The bootstrap distribution of a share is Binomial(N, share) / N, whose quantiles are known."""
    correct = round(num * right)
    predicted, labels = torch.zeros(num, dtype=torch.int64), (torch.arange(num) >= correct).long()
    found = measure(predicted, labels, "top1", num_resamples=20_000)
    assert found.value == pytest.approx(right) and found.num_test == num
    cumulative = np.cumsum(
        [
            math.exp(log_binomial(num, k) + k * math.log(right) + (num - k) * math.log1p(-right))
            for k in range(num + 1)
        ]
    )
    for tail, end in ((0.025, found.low), (0.975, found.high)):
        assert abs(end * num - np.searchsorted(cumulative, tail)) <= 1
    half_width = 1.96 * math.sqrt(right * (1 - right) / num)
    assert (found.high - found.low) / 2 == pytest.approx(half_width, rel=0.05)


def log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@pytest.mark.parametrize("metric", ["mean_per_class", "voc_map", "map"])
def test_intervals_agree_with_a_loop_that_resamples(metric: Metric) -> None:
    outputs, labels = predictions(150, 6, 0.6) if metric == "mean_per_class" else multi_label(80, 3)
    rng = np.random.default_rng(1)
    loop = []
    for _ in range(400):
        rows = torch.from_numpy(rng.integers(len(labels), size=len(labels)))
        if metric == "mean_per_class":
            loop.append(balanced_accuracy_score(labels[rows].numpy(), outputs[rows].numpy()))
        else:
            loop.append(average_precision(outputs[rows], labels[rows], metric).nanmean().item())
    found = measure(outputs, labels, metric, num_resamples=2000)
    low, high = np.quantile(loop, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.12 * width) and found.high == pytest.approx(
        high, abs=0.12 * width
    )
    assert found.low < found.value < found.high


def test_a_seed_repeats_the_interval_and_chunks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = multi_label(40, 3)
    once = measure(scores, labels, "voc_map", num_resamples=64, seed=5)
    assert measure(scores, labels, "voc_map", num_resamples=64, seed=5) == once
    assert measure(scores, labels, "voc_map", num_resamples=64, seed=6) != once
    assert CHUNK_ELEMENTS > 64 * 40
    monkeypatch.setattr("linear_eval.metrics.CHUNK_ELEMENTS", 16 * 40)
    assert measure(scores, labels, "voc_map", num_resamples=64, seed=5) == once


def test_an_order_of_the_samples_does_not_matter() -> None:
    scores, labels = multi_label(90, 4)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    for metric in ("voc_map", "map"):
        expected = average_precision(scores, labels, metric)
        torch.testing.assert_close(
            average_precision(scores[order], labels[order], metric), expected, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize(
    ("outputs", "labels", "metric", "options", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), "top1", {}, "no test samples"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), "top1", {}, "outputs are"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "top1", {}, "whole class ids"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), "voc_map", {}, "scores"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64), "voc_map", {}, "no class has a positive"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2, dtype=torch.int64), "map", {}, "not finite"),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            "top5",
            {},
            "metric is 'top5'",
        ),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            "top1",
            {"num_resamples": 1},
            "num_resamples",
        ),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            "top1",
            {"confidence": 1.0},
            "confidence",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    outputs: Tensor, labels: Tensor, metric: Metric, options: dict, message: str
) -> None:
    with pytest.raises(EvalError, match=message) as caught:
        measure(outputs, labels, metric, **options)
    assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)
