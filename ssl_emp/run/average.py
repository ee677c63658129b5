"""A running average of a network's weights, which is what a run with `model.ema` exports and measures."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """After step t, average += (1 - d) * (weights - average), where d = min(decay, (1 + t) / (10 + t)).

    The growing d forgets the untrained weights of the beginning. BatchNorm's running statistics are averaged
    like the weights, since those of the last step are of other weights than the average (EMAN, arXiv
    2101.08482, does so with a teacher's). Whole numbers, such as BatchNorm's count of batches, stay the
    network's.

    Args:
        model: on its device, with the weights to begin with. Takes its memory once more, and in a step for a
            moment twice.
        decay: 0 < decay < 1; with 0.99 the last hundred steps make two thirds of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        self._names = list(state)
        self._weights = list(state.values())  # the network's own tensors: they see its steps
        self._average = [tensor.clone() for tensor in self._weights]

    @torch.no_grad()
    def update(self, step: int, where: Tensor) -> None:
        """Take in the weights after step number `step`, from 0, where `where` (0-d bool on the device); reads
        nothing back.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        moves = torch._foreach_sub(self._weights, self._average)
        torch._foreach_mul_(moves, torch.where(where, 1 - decay, 0.0))
        torch._foreach_add_(self._average, moves)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In here the network has the average in the place of its weights, which it gets back bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        held = [tensor.clone() for tensor in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        torch._foreach_copy_(self._average, held)

    def state_dict(self) -> dict[str, Tensor]:
        """Name in the network's state -> its average."""
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`, which was found to fit."""
        torch._foreach_copy_(
            self._average, [state[name].to(mine) for name, mine in self.state_dict().items()]
        )
