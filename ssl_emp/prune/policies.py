"""Which samples a pruned epoch trains on: one small class a policy, with its own keys, and the paper's
formula in `Emp`.

Each policy keeps exactly `count` samples. Randomness is keyed on (seed, epoch, sample), so that a resumed run
draws alike. To add a policy, write its class and name it in `POLICIES`; config and command line take keys,
defaults and ranges from its fields. Letters: N samples, K kept. Scores are (N,), the highest are kept, +inf =
never seen.
"""

import difflib
import hashlib
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ssl_emp.keyed import keyed_bits, keyed_uniform
from ssl_emp.prune.record import Known

# first key of each use of keyed randomness, so that no two uses share a draw
RANDOM, EXPLORE, SOFTEN, INFOBATCH, SCAN, TIES = 103, 104, 105, 106, 107, 108
MIN_KEEP = 0.1  # InfoBatch keeps at least this share of the easy samples, whatever is asked
SCAN_POOL = 0.7  # SCAN's two candidate sets, 35 % each
WEIGHT = {
    "ge": 0.0,
    "le": 1e9,
}  # far beyond use, and far from float32's 3e38: a score that overflows ranks nothing


def key(default: Any, **allowed: Any) -> Any:
    """A field of a policy: its default, and `ge`, `le` of a number or `options` of a word."""
    return field(default=default, metadata=allowed)


@dataclass(frozen=True)
class Kept:
    """A kept set: `index` (K,) int64 in no order, `weight` (K,) float32 of their losses, or None: all 1."""

    index: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """What chooses the samples of a pruned epoch. Raises ValueError where a key is out of its range."""

    name: ClassVar[str] = "of no name"
    chooses: ClassVar[str] = "a part of them"  # of the images, for a person
    uses_scores: ClassVar[bool] = False  # whether what is remembered of the samples decides
    is_ranking: ClassVar[bool] = False  # whether the highest of `score` are kept
    needs_memory: ClassVar[bool] = False  # whether the memory term decides
    prunes: ClassVar[bool] = True  # False: every epoch trains on everything
    is_shorter: ClassVar[bool] = False  # the steps of a pruned run in fewer, full epochs
    ema: ClassVar[float] = 1.0  # weight of a new observation in the running means; 1: the last one only
    adjusts: ClassVar[bool] = False  # whether what covariates explain is taken out of loss and memory
    foresees: ClassVar[bool] = (
        False  # whether the covariates of the coming epoch are added to what is remembered
    )
    shrink: ClassVar[bool] = False
    # the loss weighs N / K where a policy gives no weights: as many sums of gradients as a full epoch
    rescale: ClassVar[bool] = False
    memory: ClassVar[str] = "raw"  # scale of the memory term, see `Emp`

    def __post_init__(self) -> None:
        for item in fields(self):
            value, allowed = getattr(self, item.name), item.metadata
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if "ge" in allowed and not (number and allowed["ge"] <= value <= allowed["le"]):
                raise ValueError(
                    f"policy {self.name}: {item.name} is {value!r}, allowed: {allowed['ge']} <= "
                    f"{item.name} <= {allowed['le']}"
                )
            if "options" in allowed and value not in allowed["options"]:
                options = " or ".join(map(repr, allowed["options"]))
                raise ValueError(f"policy {self.name}: {item.name} is {value!r}, allowed: {options}")

    @property
    def described(self) -> str:
        """Name, and keys that are not the default: `emp(beta=2.0)`, `ucb()`. Policies that choose alike have
        the same.
        """
        keys = {item.name: _written(getattr(self, item.name)) for item in fields(self)}
        usual = {item.name: _written(item.default) for item in fields(self)}
        own = [f"{name}={text}" for name, text in keys.items() if text != usual[name]]
        return f"{self.name}({', '.join(own)})"

    @property
    def keeps_one_subset(self) -> bool:
        """Whether it trains on the same samples in several pruned epochs on purpose."""
        return False

    @property
    def formula(self) -> "Emp":
        """EMP's score as figures and tables show it for this policy, whatever decides."""
        return Emp()

    def score(self, known: Known) -> Tensor:
        """What a ranking policy keeps the highest of, (N,), +inf = never seen; of the others EMP's score, to
        compare by.
        """
        return self.formula.score(known)

    def problem(self, num_samples: int, count: int) -> str | None:
        """Why it cannot choose `count` of so many samples; None: it can."""
        return None

    def choose(self, known: Known, count: int, seed: int, epoch: int, warmup_epochs: int) -> Kept:
        """The `count` samples of a pruned epoch; `warmup_epochs` is the first epoch that may be pruned."""
        raise NotImplementedError


@dataclass(frozen=True)
class Everything(Policy):
    """No pruning: every epoch trains on everything."""

    name: ClassVar[str] = "none"
    chooses: ClassVar[str] = "all of them"
    prunes: ClassVar[bool] = False


@dataclass(frozen=True)
class Shorter(Policy):
    """The steps of a pruned run spent on fewer, full epochs: what pruning must beat."""

    name: ClassVar[str] = "shorter"
    chooses: ClassVar[str] = "all of them"
    is_shorter: ClassVar[bool] = True


@dataclass(frozen=True)
class Random(Policy):
    """Drawn without replacement; the draws of one epoch are nested in the fraction, those of two are
    independent.
    """

    name: ClassVar[str] = "random"
    chooses: ClassVar[str] = "drawn by chance"
    redraw_every: int = key(1, ge=1, le=1_000_000)  # pruned epochs that train on the same draw
    rescale: bool = False  # type: ignore[misc]

    @property
    def keeps_one_subset(self) -> bool:
        return self.redraw_every > 1

    def choose(self, known: Known, count: int, seed: int, epoch: int, warmup_epochs: int) -> Kept:
        drawn = warmup_epochs + (epoch - warmup_epochs) // self.redraw_every * self.redraw_every
        return random_subset(len(known.variance), count, seed, drawn, known.variance.device)


@dataclass(frozen=True)
class Indices(Policy):
    """A fixed subset, such as methods make that choose once, before training: SAS, prototypes, SemDeDup.

    `index` (M,) int64, distinct, the most wanted first; a pruned epoch takes the first K.
    """

    name: ClassVar[str] = "indices"
    chooses: ClassVar[str] = "a fixed list of them"
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    rescale: bool = False  # type: ignore[misc]

    @property
    def keeps_one_subset(self) -> bool:
        return True

    def problem(self, num_samples: int, count: int) -> str | None:
        if self.index.dim() != 1 or self.index.dtype != torch.int64:
            return f"has an index of {self.index.dtype} {tuple(self.index.shape)}: give (M,) int64"
        if len(self.index) < count:
            return f"names {len(self.index)} samples, and a pruned epoch needs {count}"
        if count and not 0 <= int(self.index.min()) <= int(self.index.max()) < num_samples:
            return f"names samples beyond 0 to {num_samples - 1}"
        return "names a sample twice" if len(self.index.unique()) < len(self.index) else None

    def choose(self, known: Known, count: int, seed: int, epoch: int, warmup_epochs: int) -> Kept:
        return Kept(self.index[:count].to(known.variance.device))


@dataclass(frozen=True)
class Scored(Policy):
    """Policies that look at what is remembered of the samples."""

    uses_scores: ClassVar[bool] = True
    ema: float = key(1.0, ge=1e-6, le=1.0)  # type: ignore[misc]
    adjust: bool = False  # take out of loss and memory what covariates explain

    @property
    def adjusts(self) -> bool:  # type: ignore[override]
        return self.adjust


@dataclass(frozen=True)
class InfoBatch(Scored):
    """InfoBatch (Qin et al., arXiv 2303.04947): samples below the mean loss are thinned out at random and
    weigh more for it.

    The published rule fixes the share of the easy samples that stays and takes the budget that comes of it;
    here the budget is fixed and the share follows, never below `MIN_KEEP`. Where even that does not leave
    room for all hard samples, those are thinned out the same way. Each group's weight is (its size) / (its
    kept size), so the sum over the kept of weight * gradient is in the mean over draws the sum of all
    gradients.
    """

    name: ClassVar[str] = "infobatch"
    chooses: ClassVar[str] = "fewer of those with a low loss, which weigh more"

    def choose(self, known: Known, count: int, seed: int, epoch: int, warmup_epochs: int) -> Kept:
        loss = known.terms[0]
        mean, _ = mean_and_std(loss, loss < torch.inf)
        easy = loss < mean
        num_easy = int(easy.sum())  # one read from the device an epoch
        num_hard = len(loss) - num_easy
        kept_easy = min(num_easy, count, max(count - num_hard, round(MIN_KEEP * num_easy), 1))
        if num_hard and count > 1:
            kept_easy = min(kept_easy, count - 1)  # no group without a member to stand for it
        ticket = keyed_bits(INFOBATCH, seed, epoch, torch.arange(len(loss), device=loss.device))
        groups = []
        for member, size, kept in ((easy, num_easy, kept_easy), (~easy, num_hard, count - kept_easy)):
            if kept:
                index = select_kept(torch.where(member, ticket, -1), kept)
                groups.append((index, torch.full((kept,), size / kept, device=loss.device)))
        index, weight = (torch.cat(parts) for parts in zip(*groups, strict=True))
        return Kept(index, weight)


@dataclass(frozen=True)
class Scan(Scored):
    """After SCAN (Guo et al., arXiv 2411.09126): drop at random among the lowest (redundant) and the highest
    (ill-matched) losses.

    The published method takes 35 % of each batch from either end as candidates and drops a share of them that
    grows within a cycle; here the ends are those of the whole set and the share is what the budget asks.
    """

    name: ClassVar[str] = "scan"
    chooses: ClassVar[str] = "fewer of those with the lowest and the highest losses"
    rescale: bool = False  # type: ignore[misc]

    def choose(self, known: Known, count: int, seed: int, epoch: int, warmup_epochs: int) -> Kept:
        loss = known.terms[0]
        dropped = len(loss) - count
        mixed = keyed_bits(TIES, seed, epoch, torch.arange(len(loss), device=loss.device)).argsort()
        place = mixed[loss[mixed].argsort(stable=True)].argsort()  # equal losses in an order by chance
        extreme = (2 * place - (len(loss) - 1)).abs()
        extreme[loss == torch.inf] = -1  # never seen: neither redundant nor ill-matched
        pool = select_kept(extreme, max(dropped, math.ceil(SCAN_POOL * len(loss))), (seed, epoch))
        ticket = torch.full_like(place, -1)
        ticket[pool] = keyed_bits(SCAN, seed, epoch, pool)
        if dropped:
            ticket[select_kept(ticket, dropped)] = -2
        return Kept(select_kept((ticket > -2).int(), count))


@dataclass(frozen=True)
class Ranking(Scored):
    """Policies that keep the highest of a score, but for what `explore` and `soften` leave to chance."""

    is_ranking: ClassVar[bool] = True
    foresee: bool = (
        False  # rank by what the covariates of the coming epoch will make of the score; brings adjust
    )
    shrink: bool = False  # type: ignore[misc]  # with foresee: what is remembered counts for as much as it was found to predict
    explore: float = key(0.0, ge=0.0, le=1.0)  # share of the kept drawn at random from all other samples
    soften: float = key(0.0, **WEIGHT)  # noise added to the score before it ranks, in its standard deviations
    rescale: bool = False  # type: ignore[misc]

    @property
    def adjusts(self) -> bool:  # type: ignore[override]
        return self.adjust or self.foresee

    @property
    def foresees(self) -> bool:  # type: ignore[override]
        return self.foresee

    def choose(self, known: Known, count: int, seed: int, epoch: int, warmup_epochs: int) -> Kept:
        score = softened(self.score(known), self.soften, seed, epoch)
        return top(score, count, self.explore, seed, epoch)


@dataclass(frozen=True)
class Emp(Ranking):
    """EMP (arXiv 2408.16031), the paper's rule: the highest loss + beta * memory are kept.

    For SimCLR, NT-Xent(z_i, z_j) - beta * ||f(x_i) - f(x_j)||_2; for supervised training, loss + beta *
    H(prediction).
    """

    name: ClassVar[str] = "emp"
    chooses: ClassVar[str] = "those with the highest EMP score of loss and memory"
    needs_memory: ClassVar[bool] = True
    beta: float = key(5.0, **WEIGHT)  # the paper's best for supervised training; it states none for SSL
    loss_weight: float = key(1.0, ge=-1e9, le=1e9)  # 1 in the paper; below 0 easy samples are preferred
    # scale of the memory term: as it is (the paper), of normalised features, or both terms brought to mean 0
    # and standard deviation 1 over the samples seen, so that beta is a ratio of influences
    memory: str = key("raw", options=("raw", "normalized", "standardized"))  # type: ignore[misc]

    @property
    def formula(self) -> "Emp":
        return self

    def score(self, known: Known) -> Tensor:
        loss, memory = known.terms
        seen = loss < torch.inf
        if self.memory == "standardized":
            loss, memory = standardized(loss, seen), standardized(memory, seen)
        return torch.where(seen, self.loss_weight * loss + self.beta * memory, torch.inf)


@dataclass(frozen=True)
class Loss(Ranking):
    """The highest loss."""

    name: ClassVar[str] = "loss"
    chooses: ClassVar[str] = "those with the highest loss"

    def score(self, known: Known) -> Tensor:
        return known.terms[0].clone()  # a view would change with the record


@dataclass(frozen=True)
class Foresight(Loss):
    """The highest loss that is expected under the views which the coming epoch draws, without drawing them
    (docs/method.md).

    Needs covariates that are a function of (epoch, index).
    """

    name: ClassVar[str] = "foresight"
    chooses: ClassVar[str] = "those whose coming views are expected to be hard"
    ema: float = key(0.3, ge=1e-6, le=1.0)  # type: ignore[misc]
    adjust: bool = key(True, options=(True,))
    foresee: bool = key(True, options=(True,))


@dataclass(frozen=True)
class EpsilonGreedy(Loss):
    """The highest running mean of the loss, but for a random tenth: epsilon-greedy of Raju et al., arXiv
    2111.12621.
    """

    name: ClassVar[str] = "epsilon_greedy"
    chooses: ClassVar[str] = "those with the highest mean loss, and some by chance"
    ema: float = key(0.5, ge=1e-6, le=1.0)  # type: ignore[misc]
    explore: float = key(0.1, ge=0.0, le=1.0)


@dataclass(frozen=True)
class Ucb(Ranking):
    """The highest running mean plus running variance of the loss: UCB of Raju et al., arXiv 2111.12621."""

    name: ClassVar[str] = "ucb"
    chooses: ClassVar[str] = "those whose loss is high and varies most"
    ema: float = key(0.5, ge=1e-6, le=1.0)  # type: ignore[misc]

    def score(self, known: Known) -> Tensor:
        return known.terms[0] + known.variance


@dataclass(frozen=True)
class Distance(Ranking):
    """The highest memory term: the views that are closest, or the predictions that are least sure."""

    name: ClassVar[str] = "distance"
    chooses: ClassVar[str] = "those whose views lie closest (supervised: the least sure)"
    needs_memory: ClassVar[bool] = True
    memory: str = key("raw", options=("raw", "normalized", "standardized"))  # type: ignore[misc]

    @property
    def formula(self) -> Emp:
        return Emp(memory=self.memory)

    def score(self, known: Known) -> Tensor:
        return known.terms[1].clone()


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Emp, Foresight, Loss, Distance, EpsilonGreedy, Ucb, InfoBatch, Scan,
        Indices, Random, Shorter, Everything,
    )
}  # fmt: skip


def _written(value: Any) -> str:
    """A key's value, the same for 5 and 5.0 and in every process; of a tensor or array the hash."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().flatten().view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()[:12]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(float(value))
    return str(value) if isinstance(value, bool | str | None) else type(value).__name__


def policy_named(name: str) -> Policy:
    """The policy of this name with its defaults. Raises ValueError for another name, with the nearest one."""
    if not isinstance(name, str):
        raise TypeError(f"policy is {name!r:.80}: give a name or an object, such as 'emp' or Emp(beta=2)")
    if name not in POLICIES:
        near = difflib.get_close_matches(name.lower(), POLICIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(POLICIES)}"
        raise ValueError(f"there is no policy {name!r}; {hint}")
    return POLICIES[name]()


def random_subset(num_samples: int, count: int, seed: int, epoch: int, device: torch.device) -> Kept:
    """`count` samples drawn without replacement."""
    index = torch.arange(num_samples, device=device)
    return Kept(select_kept(keyed_bits(RANDOM, seed, epoch, index), count))


def top(score: Tensor, count: int, explore: float, seed: int, epoch: int) -> Kept:
    """The highest scores, but for a share `explore` of the budget, which is drawn at random from all other
    samples.
    """
    drawn = round(explore * count)
    highest = score.new_empty(0, dtype=torch.int64)
    if drawn < count:
        highest = select_kept(score, count - drawn, (seed, epoch))
    if drawn == 0:
        return Kept(highest)
    ticket = keyed_bits(EXPLORE, seed, epoch, torch.arange(len(score), device=score.device))
    ticket[highest] = -1
    return Kept(torch.cat([highest, select_kept(ticket, drawn)]))


def softened(score: Tensor, softness: float, seed: int, epoch: int) -> Tensor:
    """The score plus Gumbel noise of `softness` times its standard deviation.

    The highest `count` are then a draw without replacement with probabilities in proportion to
    exp(score / (softness * std)) (the Gumbel top-k trick, Kool et al., arXiv 1903.06059).
    """
    if softness == 0:
        return score
    _, spread = mean_and_std(score, score < torch.inf)
    uniform = keyed_uniform(SOFTEN, seed, epoch, torch.arange(len(score), device=score.device))
    return score - softness * spread * (-(uniform + 2.0**-25).log()).log()


def mean_and_std(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of a population) over the masked values, 0-d, without a host sync."""
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0).sum() / count
    return mean, torch.where(mask, (values - mean).square(), 0).sum().div(count).sqrt()


def standardized(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit standard deviation over the masked values; constant values become zeros."""
    mean, std = mean_and_std(values, mask)
    return (values - mean) / std.clamp(min=1e-12)


def select_kept(scores: Tensor, count: int, ties: tuple[int, int] | None = None) -> Tensor:
    """Indices of the `count` highest scores, (N,) -> (count,) int64, same device, no order promised.

    Never-seen samples (+inf) come first. Equals at the border are drawn by chance, keyed on `ties` (seed,
    epoch): losses of learned samples are often all 0, and the lowest indices would be the first classes of a
    sorted data set, in every epoch. None: there are no equals, or any of them will do. On a GPU nothing waits
    for the device: the size is known.
    """
    assert scores.dim() == 1 and 0 < count <= len(scores), (scores.shape, count)
    if scores.device.type != "cpu" and ties is not None:
        return highest_by_sorting(scores, count, ties)
    if scores.device.type != "cpu":
        return scores.topk(count, sorted=False).indices
    # sorting moves pairs of value and index: topk takes at 100 million 3.3 times the time, 2.7 times the
    # memory (benchmarks/selection.py)
    border = np.partition(scores.numpy(), -count)[-count]
    kept = scores > border.item()
    equal = (scores == border.item()).nonzero().squeeze(1)
    wanted = count - int(kept.sum())
    # a NaN compares to nothing, and would shorten the epoch unnoticed
    assert len(equal) >= wanted, "a score is NaN"
    if len(equal) > wanted and ties is not None:
        equal = equal[keyed_bits(TIES, *ties, equal).topk(wanted, sorted=False).indices]
    kept[equal[:wanted]] = True
    return kept.nonzero().squeeze(1)


def highest_by_sorting(scores: Tensor, count: int, ties: tuple[int, int]) -> Tensor:
    """`select_kept` without a wait for the device: all are sorted by chance, then by their scores."""
    order = keyed_bits(TIES, *ties, torch.arange(len(scores), device=scores.device)).argsort(descending=True)
    return order[scores[order].argsort(descending=True, stable=True)[:count]]
