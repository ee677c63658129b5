"""Pruning for any training loop: a `Pruner` knows samples by number and losses by value (EMP, arXiv
2408.16031).

    pruner = Pruner(len(dataset), batch_size=256, epochs=200, policy="emp", fraction=0.3)
    loader = DataLoader(pruner.indexed(dataset), batch_size=256, sampler=pruner.sampler())
    loss = pruner.update(index, F.cross_entropy(logits, y, reduction="none"), entropy(logits))

Imports torch, numpy and `ssl_emp.keyed` only. docs/your_loop.md has the rest.
"""

from ssl_emp.prune.memory import closeness, entropy
from ssl_emp.prune.policies import (
    POLICIES,
    Distance,
    Emp,
    EpsilonGreedy,
    Everything,
    Foresight,
    Indices,
    InfoBatch,
    Loss,
    Policy,
    Random,
    Scan,
    Shorter,
    Ucb,
)
from ssl_emp.prune.pruner import Pruner, Seen

__all__ = [
    "POLICIES", "Distance", "Emp", "EpsilonGreedy", "Everything", "Foresight", "Indices", "InfoBatch", "Loss",
    "Policy", "Pruner", "Random", "Scan", "Seen", "Shorter", "Ucb", "closeness", "entropy",
]  # fmt: skip
