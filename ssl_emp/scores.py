"""What is remembered of every sample: its two score terms, how sure they are, when it was scored, how often
it was trained.

The score of one forward pass is mostly noise: which crops were drawn and who else was in the batch. Two
remedies stand here, both off by default: a running mean over epochs (`ema`), and the regression of the terms
on the augmentation that was drawn (`adjust`). Letters: N samples, B batch, F draw features.
"""

import torch
from torch import Tensor

from ssl_emp.augment import NUM_DRAW_FEATURES

FORGET = 0.99  # of the regression, a batch
RIDGE = 1e-3  # of the mean diagonal of its moments


class ScoreState:
    """Per-sample tensors on one device, and what they are updated by.

    Args:
        num_samples: N.
        ema: weight of a new observation in the running means, in (0, 1]; 1 keeps the last observation
            only, the paper's way. Bias-corrected: the n-th observation weighs ema / (1 - (1 - ema)^n), so the
            second one counts half and more.
        adjust: store what the draw of the augmentation and the state of the network do not explain, see
            `adjusted`.
        device: where the tensors live.
        shrink: needs `adjust`; see `expected`.
    """

    PER_SAMPLE = (
        "last",
        "terms",
        "variance",
        "times_scored",
        "scored_epoch",
        "times_trained",
        "trained_epoch",
    )
    REGRESSION = ("gram", "cross", "recall")

    def __init__(
        self, num_samples: int, ema: float, adjust: bool, device: torch.device, shrink: bool = False
    ) -> None:
        assert 0 < ema <= 1, ema
        self.ema, self.adjust, self.shrink = ema, adjust, shrink
        counter = torch.zeros(num_samples, dtype=torch.int32, device=device)
        # loss and memory term as last seen; +inf = never scored
        self.last = torch.full((2, num_samples), torch.inf, device=device)
        self.terms = self.last.clone()  # their running means, adjusted where asked: what ranks
        self.variance = torch.zeros(num_samples, device=device)  # running variance of the loss
        self.times_scored, self.times_trained = counter, counter.clone()
        self.scored_epoch, self.trained_epoch = counter - 1, counter - 1  # -1 = never
        self.gram = torch.zeros(NUM_DRAW_FEATURES, NUM_DRAW_FEATURES, device=device)
        self.cross = torch.zeros(NUM_DRAW_FEATURES, 2, device=device)
        # of the running means with what is then seen: covariance, variance; by term
        self.recall = torch.zeros(2, 2, device=device)

    def observe(
        self, index: Tensor, terms: Tensor, draw: Tensor | None, epoch: int, good: Tensor | None = None
    ) -> None:
        """Take in the terms (2, B) of the samples `index` (B,), seen with the network of `epoch`. Reads
        nothing from the device.

        Args:
            draw: (B, F) of `draw_features`, needed where `adjust`.
            good: 0-d bool on the device; where it is false, nothing is taken in.
        """
        if good is not None:
            self._observe_where(good, index, terms, draw, epoch)
            return
        self.last[:, index] = terms
        before, times = self.terms[:, index], self.times_scored[index] + 1
        if self.adjust:
            assert draw is not None
            self._learn(terms, draw)
            terms = self.adjusted(index, terms, draw)
            if self.shrink:
                self._learn_recall(index, terms)
        rate = self.ema / (1 - (1 - self.ema) ** times)  # (B,)
        first = times == 1
        step = terms - torch.where(first, terms, before)
        # lerp at 1 is the new value to the bit
        self.terms[:, index] = torch.lerp(torch.where(first, terms, before), terms, rate.expand_as(terms))
        self.variance[index] = torch.where(
            first, 0.0, (1 - rate) * self.variance[index] + rate * step[0].square()
        )
        self.times_scored[index] = times
        self.scored_epoch[index] = epoch

    def _observe_where(
        self, good: Tensor, index: Tensor, terms: Tensor, draw: Tensor | None, epoch: int
    ) -> None:
        """`observe`, then back again where not `good`: a branch would wait for the device."""
        names = ("last", "terms", "variance", "times_scored", "scored_epoch")
        before = {name: getattr(self, name)[..., index] for name in names}
        moments = {name: getattr(self, name) for name in self.REGRESSION}
        self.observe(index, terms, draw, epoch)
        for name, values in before.items():
            getattr(self, name)[..., index] = torch.where(good, getattr(self, name)[..., index], values)
        for name, values in moments.items():
            setattr(self, name, torch.where(good, getattr(self, name), values))

    def count_trained(self, index: Tensor, epoch: int, good: Tensor | bool = True) -> None:
        """Note that the samples `index` were trained on in `epoch`, where `good`."""
        self.times_trained[index] += good
        self.trained_epoch[index] = torch.where(
            torch.as_tensor(good, device=index.device), epoch, self.trained_epoch[index]
        )

    def _learn(self, terms: Tensor, draw: Tensor) -> None:
        """Moments of the running regression; a batch loses its influence over the next FORGET / (1 - FORGET)
        ones.
        """
        x, y = draw - draw.mean(0), terms.T - terms.mean(1)
        self.gram = FORGET * self.gram + x.T @ x
        self.cross = FORGET * self.cross + x.T @ y

    def _learn_recall(self, index: Tensor, terms: Tensor) -> None:
        """Regression of the new terms on the remembered ones, both without the draw."""
        known = (self.times_scored[index] > 0).float()
        before = torch.where(known > 0, self.terms[:, index], 0.0)
        number = known.sum().clamp(min=1)
        before, now = (
            (value - (value * known).sum(1, keepdim=True) / number) * known for value in (before, terms)
        )
        self.recall = FORGET * self.recall + torch.stack([(before * now).sum(1), before.square().sum(1)])

    def expected(self, index: Tensor, draw: Tensor) -> Tensor:
        """The terms (2, B) that the samples `index` (B,) will have under a draw (B, F), up to a constant.

        The running mean of a sample is mostly noise. Where `shrink`, it counts for as much as it was found to
        tell: times the slope of what was seen on what was remembered (Kelley 1927, the estimate of a true
        score). Only the samples trained on are seen again, and choosing them by what is remembered does not
        bias a slope on it.
        """
        terms = self.terms[:, index]
        if self.shrink:
            terms = torch.where(terms < torch.inf, self.slope().clamp(0, 1).unsqueeze(1) * terms, torch.inf)
        return terms + self.explained(draw)

    def slope(self) -> Tensor:
        """Of what was seen on what was remembered, by term: (2,), 0 before any sample was seen twice."""
        covariance, variance = self.recall
        return torch.where(variance > 0, covariance / variance, 0.0)

    def adjusted(self, index: Tensor, terms: Tensor, draw: Tensor) -> Tensor:
        """The terms (2, B) without what the draw explains and without the level of the network's present
        state.

        The draw's share is a ridge regression over the last batches. The level is taken where the batch as a
        whole stands against its own history, so that a batch of easy samples stays easy and an old score can
        be compared with a new one.
        """
        residual = terms - self.explained(draw - draw.mean(0))
        history = torch.where(self.times_scored[index] > 0, self.terms[:, index], 0.0)
        return residual - (residual - history).mean(1, keepdim=True)

    def explained(self, draw: Tensor) -> Tensor:
        """What the regression expects a draw (B, F) to add to the terms, up to a constant: (2, B)."""
        ridge = (RIDGE * self.gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(
            NUM_DRAW_FEATURES, device=draw.device
        )
        # (F, 2); solve() would wait for a GPU to check
        weights = torch.linalg.solve_ex(self.gram + ridge, self.cross).result
        return (draw @ weights).T

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        return {name: getattr(self, name) for name in (*self.PER_SAMPLE, *self.REGRESSION)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """What `state_dict` gave, from any device."""
        for name in (*self.PER_SAMPLE, *self.REGRESSION):
            setattr(self, name, state[name].to(self.terms.device, copy=True))
