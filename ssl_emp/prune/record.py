"""What is remembered of every sample: loss and memory, how sure they are, when they were seen, how often it
was trained on.

The score of one forward pass is mostly noise: which crops were drawn and who else was in the batch. Two
remedies stand here, both off by default: a running mean over epochs (`ema`), and the regression of loss and
memory on covariates, such as the augmentation that was drawn (`adjust`). Letters: N samples, B batch, F
covariates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FORGET = 0.99  # weight that the regression's moments keep from one batch to the next
LARGEST_VARIANCE = 1e37  # beyond any use, and with a mean added still finite in float32
RIDGE = 1e-3  # of the mean diagonal of its moments


class Known(NamedTuple):
    """What a policy looks at."""

    terms: Tensor  # (2, N) loss and memory of each sample, +inf in both where never seen
    variance: Tensor  # (N,) of the loss

    def of(self, index: Tensor) -> "Known":
        """The same of the samples `index` (K,) alone."""
        return Known(self.terms[:, index], self.variance[index])


class Record:
    """Per-sample tensors on one device, and how an observation changes them.

    Args:
        num_samples: N.
        ema: weight of a new observation in the running means, in (0, 1]; 1 keeps the last observation
            only, as the paper does. Bias-corrected: the n-th observation weighs ema / (1 - (1 - ema)^n), so
            the second counts half or more.
        num_covariates: F; above 0, what the covariates and the state of the network explain is taken out,
            see `adjusted`.
        shrink: needs covariates, see `expected`.
        device: where the tensors live.
    """

    PER_SAMPLE = (
        "last", "terms", "variance", "times_scored", "scored_epoch", "times_trained", "trained_epoch",
    )  # fmt: skip
    REGRESSION = ("gram", "cross", "recall")

    def __init__(
        self, num_samples: int, ema: float, num_covariates: int, shrink: bool, device: torch.device | str
    ) -> None:
        self.ema, self.num_covariates, self.shrink = ema, num_covariates, shrink
        counter = torch.zeros(num_samples, dtype=torch.int32, device=device)
        # loss and memory as last seen; +inf: never
        self.last = torch.full((2, num_samples), torch.inf, device=device)
        self.terms = self.last.clone()  # their running means, adjusted where asked: what is ranked
        self.variance = torch.zeros(num_samples, device=device)  # running variance of the loss
        self.times_scored, self.times_trained = counter, counter.clone()
        self.scored_epoch, self.trained_epoch = counter - 1, counter - 1  # -1: never
        self.gram = torch.zeros(num_covariates, num_covariates, device=device)
        self.cross = torch.zeros(num_covariates, 2, device=device)
        # of loss and memory: covariance of what was remembered with what is then seen, and variance of what
        # was remembered
        self.recall = torch.zeros(2, 2, device=device)

    @property
    def known(self) -> Known:
        """What a policy looks at."""
        return Known(self.terms, self.variance)

    def observe(
        self, index: Tensor, terms: Tensor, covariates: Tensor | None, epoch: int, where: Tensor | None = None
    ) -> None:
        """Take in loss and memory (2, B) of the samples `index` (B,), seen by the network of `epoch`. No host
        sync.

        Args:
            covariates: (B, F), where there are any.
            where: 0-d bool on the device; where it is false, nothing is taken in.
        """
        if where is not None:
            self._observe_where(where, index, terms, covariates, epoch)
            return
        self.last[:, index] = terms
        before, times = self.terms[:, index], self.times_scored[index] + 1
        if self.num_covariates:
            assert covariates is not None
            self._learn(terms, covariates)
            terms = self.adjusted(index, terms, covariates)
            if self.shrink:
                self._learn_recall(index, terms)
        rate = self.ema / (1 - (1 - self.ema) ** times)  # (B,)
        first = times == 1
        step = terms - torch.where(first, terms, before)
        # at rate 1, lerp gives the new value to the bit
        self.terms[:, index] = torch.lerp(torch.where(first, terms, before), terms, rate.expand_as(terms))
        variance = (1 - rate) * self.variance[index] + rate * step[0].square()
        # a square of float32 overflows from 1.8e19 on, and inf would count as never seen
        self.variance[index] = torch.where(first, 0.0, variance).clamp(max=LARGEST_VARIANCE)
        self.times_scored[index] = times
        self.scored_epoch.index_fill_(0, index, epoch)  # by `[index] =` a number would wait for a GPU

    def _observe_where(
        self, where: Tensor, index: Tensor, terms: Tensor, covariates: Tensor | None, epoch: int
    ) -> None:
        """`observe`, undone where `where` is false: a branch would wait for the device."""
        names = ("last", "terms", "variance", "times_scored", "scored_epoch")
        before = {name: getattr(self, name)[..., index] for name in names}
        moments = {name: getattr(self, name) for name in self.REGRESSION}
        self.observe(index, terms, covariates, epoch)
        for name, values in before.items():
            getattr(self, name)[..., index] = torch.where(where, getattr(self, name)[..., index], values)
        for name, values in moments.items():
            setattr(self, name, torch.where(where, getattr(self, name), values))

    def count_trained(self, index: Tensor, epoch: int, where: Tensor | None = None) -> None:
        """Note that the samples `index` were trained on in `epoch`, unless `where`, a 0-d bool, is false."""
        before = self.trained_epoch[index]
        now = torch.full_like(before, epoch)
        self.times_trained[index] += 1 if where is None else where
        self.trained_epoch[index] = now if where is None else torch.where(where, now, before)

    def _learn(self, terms: Tensor, covariates: Tensor) -> None:
        """Moments of the running regression; a batch loses its influence over the next FORGET / (1 - FORGET)
        batches.
        """
        x, y = covariates - covariates.mean(0), terms.T - terms.mean(1)
        self.gram = FORGET * self.gram + x.T @ x
        self.cross = FORGET * self.cross + x.T @ y

    def _learn_recall(self, index: Tensor, terms: Tensor) -> None:
        """How far what was remembered of the samples predicts what is seen of them now, both without the
        covariates.
        """
        seen = (self.times_scored[index] > 0).float()
        before = torch.where(seen > 0, self.terms[:, index], 0.0)
        number = seen.sum().clamp(min=1)
        before, now = (
            (value - (value * seen).sum(1, keepdim=True) / number) * seen for value in (before, terms)
        )
        moments = torch.stack([(before * now).sum(1), before.square().sum(1)])
        self.recall = FORGET * self.recall + moments

    def expected(self, index: Tensor, covariates: Tensor) -> Tensor:
        """Loss and memory (2, B) that the samples `index` (B,) will have under their covariates (B, F), up to
        a constant.

        The running mean of a sample is mostly noise. With `shrink` it is multiplied by the slope of what was
        seen on what was remembered (Kelley 1927, the estimate of a true score). Only samples that are trained
        on are seen again, and choosing them by what is remembered does not bias a slope on it.
        """
        terms = self.terms[:, index]
        if self.shrink:
            shrunk = self.slope().clamp(0, 1).unsqueeze(1) * terms
            terms = torch.where(terms < torch.inf, shrunk, torch.inf)
        return terms + self.explained(covariates)

    def slope(self) -> Tensor:
        """Of what was seen on what was remembered, of loss and memory: (2,), 0 before any sample was seen
        twice.
        """
        covariance, variance = self.recall
        return torch.where(variance > 0, covariance / variance, 0.0)

    def adjusted(self, index: Tensor, terms: Tensor, covariates: Tensor) -> Tensor:
        """Loss and memory (2, B) without what the covariates explain and without the level of the network's
        present state.

        What the covariates explain is a ridge regression over the last batches. The level is the mean
        difference of the batch to its own history, so that a batch of easy samples stays easy and an old
        score can be compared with a new one.
        """
        residual = terms - self.explained(covariates - covariates.mean(0))
        history = torch.where(self.times_scored[index] > 0, self.terms[:, index], 0.0)
        return residual - (residual - history).mean(1, keepdim=True)

    def explained(self, covariates: Tensor) -> Tensor:
        """What the regression expects covariates (B, F) to add to the terms: (2, B), up to a constant."""
        ridge = (RIDGE * self.gram.diagonal().mean()).clamp(min=1e-12)
        regular = self.gram + ridge * torch.eye(self.num_covariates, device=covariates.device)
        # solve() would wait for a GPU to check the result
        weights = torch.linalg.solve_ex(regular, self.cross).result  # (F, 2)
        return (covariates @ weights).T

    def to(self, device: torch.device) -> "Record":
        """Move every tensor to `device`, in place."""
        for name in (*self.PER_SAMPLE, *self.REGRESSION):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        return {name: getattr(self, name) for name in (*self.PER_SAMPLE, *self.REGRESSION)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """What `state_dict` gave, from any device."""
        for name in (*self.PER_SAMPLE, *self.REGRESSION):
            setattr(self, name, state[name].to(self.terms.device, copy=True))
