"""The code of CONTRIBUTING.md works as it stands there: a policy in a pruner, an evaluator against loops."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from linear_eval import Features
from ssl_emp.prune import Pruner

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """What the blocks of Python on the page define, one after another as in one file."""
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return SimpleNamespace(**names)


def test_the_policy_keeps_what_it_says(page: SimpleNamespace) -> None:
    pruner = Pruner(24, batch_size=4, epochs=6, policy=page.Restless(ema=0.4), fraction=0.5)
    seen: dict[int, list[float]] = {index: [] for index in range(24)}
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        batches = pruner.batches(epoch)
        if epoch == 2:
            break
        for index in batches:
            loss = torch.rand(4, generator=generator) * (1 + index)
            pruner.update(index, loss, torch.zeros(4))
            for sample, value in zip(index.tolist(), loss.tolist(), strict=True):
                seen[sample] += [value]
    variance = pruner.record.variance
    never = torch.tensor([not values for values in seen.values()])
    order = torch.where(never, torch.inf, variance).argsort(descending=True)
    assert sorted(batches.flatten().tolist()) == sorted(order[:12].tolist())
    assert len({round(value, 6) for value in variance.tolist()}) > 12, (
        "a ranking of equal values shows nothing"
    )


def test_the_evaluator_is_the_mean_of_each_class(page: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    train = Features(torch.randn(60, 5, generator=generator) + y[:, None], y)
    test = Features(torch.randn(30, 5, generator=generator) + y[:30, None], y[:30])
    right = 0
    for x, label in zip(test.x, test.y, strict=True):
        near = [float(cosine_similarity(x, train.x[train.y == name].mean(0), dim=0)) for name in range(3)]
        right += near.index(max(near)) == int(label)
    assert 10 < right < 30
    (result,) = page.run_centroid(SimpleNamespace(features=(train, test)))
    assert result.value == pytest.approx(100 * right / 30, abs=1e-4)
    assert result.protocol == "nearest of 3 class means"
