"""Which samples an epoch trains on: every policy a pure function of what is known of the samples, with an
exact budget.

`count` is the budget; each function keeps exactly as many. Randomness is keyed on (seed, epoch, sample), so a
resumed run draws alike. A weight multiplies the sample's loss; None means 1 for all. Scores are (N,), the
highest kept, +inf = never scored.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_emp.data.decode import reason
from ssl_emp.errors import UserError
from ssl_emp.keyed import keyed_bits, keyed_uniform
from ssl_emp.pruning import PrunePlan, combine_terms, mean_and_std, select_kept
from ssl_emp.scores import ScoreState

# these keep the highest of a score
RANKING = ("loss", "foresight", "emp", "distance", "epsilon_greedy", "ucb")
SCORING = (*RANKING, "infobatch", "scan")  # these look at scores
# first key of each use of keyed randomness, so that no two uses share a draw
RANDOM, EXPLORE, SOFTEN, INFOBATCH, SCAN = 103, 104, 105, 106, 107
MIN_KEEP = 0.1  # InfoBatch keeps at least this share of the easy samples, whatever is asked
SCAN_POOL = 0.7  # SCAN's two candidate sets, 35 % each


@dataclass(frozen=True)
class Kept:
    """A kept set: `index` (K,) int64 in no order, `weight` (K,) float32 or None."""

    index: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """How a run chooses: the policy with its settings, the keys prune.* of the config."""

    policy: str
    plan: PrunePlan
    beta: float = 5.0  # of the first pruned epoch
    beta_end: float | None = None  # of the last one, in a straight line; None: as the first
    loss_weight: float = 1.0
    loss_weight_end: float | None = None
    memory: str = "raw"
    explore: float = 0.0
    soften: float = 0.0
    confidence: float = 1.0
    redraw_every: int = 1
    rescale: bool = False  # weigh the kept by N / K where a policy gives no weights of its own
    fixed: Tensor | None = None  # policy indices: the subset, most wanted first

    @property
    def ranks(self) -> bool:
        """Whether the highest of a score are kept."""
        return self.policy in RANKING

    @property
    def scores(self) -> bool:
        """Whether scores decide at all."""
        return self.policy in SCORING

    def beta_at(self, epoch: int) -> float:
        """Weight of the memory term in this epoch."""
        return self._between(self.beta, self.beta_end, epoch)

    def loss_weight_at(self, epoch: int) -> float:
        """Weight of the loss in this epoch."""
        return self._between(self.loss_weight, self.loss_weight_end, epoch)

    def _between(self, first: float, last: float | None, epoch: int) -> float:
        if last is None:
            return first
        plan = self.plan.at(epoch)
        pruned = [number for number in range(plan.epochs) if plan.is_pruned(number)]
        if len(pruned) < 2:
            return first
        return first + (last - first) * min(max((epoch - pruned[0]) / (pruned[-1] - pruned[0]), 0.0), 1.0)

    def score(self, terms: Tensor, variance: Tensor, epoch: int) -> Tensor:
        """What the policies that rank keep the highest of, from terms (2, N) and the loss's variance (N,):
        (N,), +inf = never scored.

        A tensor of its own: a view of the terms would change with them, and a score kept from before an epoch
        would then be compared with itself after it.
        """
        match self.policy:
            case "loss" | "foresight" | "epsilon_greedy":
                return terms[0].clone()
            case "distance":
                return torch.where(terms[1] < torch.inf, -terms[1], torch.inf)
            case "ucb":
                return ucb_score(terms[0], variance, self.confidence)
            case _:
                return combine_terms(terms, self.beta_at(epoch), self.memory, self.loss_weight_at(epoch))

    def choose(
        self, state: ScoreState, epoch: int, count: int, seed: int, foreseen: Tensor | None = None
    ) -> Kept:
        """The `count` samples of a pruned epoch, everything where the epoch is a full one.

        Args:
            foreseen: (2, N), the terms that are expected under the views of this epoch, for the policies
                that rank; None: those remembered.
        """
        if not self.plan.is_pruned(epoch):
            return Kept(torch.arange(state.last.shape[1], device=state.last.device))
        kept = self._choose(state, epoch, count, seed, foreseen)
        if self.rescale and kept.weight is None:
            return Kept(kept.index, state.last.new_full((count,), state.last.shape[1] / count))
        return kept

    def _choose(self, state: ScoreState, epoch: int, count: int, seed: int, foreseen: Tensor | None) -> Kept:
        loss = state.terms[0]
        match self.policy:
            case "random":
                drawn = (
                    self.plan.warmup_epochs
                    + (epoch - self.plan.warmup_epochs) // self.redraw_every * self.redraw_every
                )
                return random_subset(len(loss), count, seed, drawn, loss.device)
            case "infobatch":
                return infobatch(loss, count, seed, epoch)
            case "scan":
                return scan(loss, count, seed, epoch)
            case "indices":
                assert self.fixed is not None
                return Kept(self.fixed[:count])
        terms = state.terms if foreseen is None else foreseen
        score = softened(self.score(terms, state.variance, epoch), self.soften, seed, epoch)
        return top(score, count, self.explore, seed, epoch)


def random_subset(num_samples: int, count: int, seed: int, epoch: int, device: torch.device) -> Kept:
    """`count` samples drawn without replacement; the draws of one epoch are nested, and those of two are
    independent.
    """
    index = torch.arange(num_samples, device=device)
    return Kept(select_kept(keyed_bits(RANDOM, seed, epoch, index), count))


def top(score: Tensor, count: int, explore: float, seed: int, epoch: int) -> Kept:
    """The highest scores, but for a share `explore` of the budget, which is drawn at random from all other
    samples.

    With a running mean of the loss as the score this is epsilon-greedy (Raju et al., arXiv 2111.12621), with
    EMP's score and `explore` 0 the paper's rule.
    """
    drawn = round(explore * count)
    highest = select_kept(score, count - drawn) if drawn < count else score.new_empty(0, dtype=torch.int64)
    if drawn == 0:
        return Kept(highest)
    ticket = keyed_bits(EXPLORE, seed, epoch, torch.arange(len(score), device=score.device))
    ticket[highest] = -1
    return Kept(torch.cat([highest, select_kept(ticket, drawn)]))


def softened(score: Tensor, softness: float, seed: int, epoch: int) -> Tensor:
    """The score plus Gumbel noise of `softness` times its standard deviation: the highest `count` are then a
    draw without replacement with probabilities in proportion to exp(score / (softness * std)) (the Gumbel
    top-k trick, Kool et al., arXiv
    1903.06059)."""
    if softness == 0:
        return score
    _, spread = mean_and_std(score, score < torch.inf)
    uniform = keyed_uniform(SOFTEN, seed, epoch, torch.arange(len(score), device=score.device))
    return score - softness * spread * (-(uniform + 2.0**-25).log()).log()


def ucb_score(mean: Tensor, variance: Tensor, confidence: float) -> Tensor:
    """Running mean of the loss plus `confidence` times its running variance (UCB of Raju et al., arXiv
    2111.12621).
    """
    return mean + confidence * variance


def infobatch(loss: Tensor, count: int, seed: int, epoch: int) -> Kept:
    """InfoBatch (Qin et al., arXiv 2303.04947): samples below the mean loss are thinned out at random and
    weigh more for it.

    The published rule fixes the share of the easy samples that stays and takes the budget that comes of it;
    here the budget is fixed and the share follows, never below `MIN_KEEP`. Where even that does not leave
    room for all hard samples, those are thinned out the same way. Each group's weight is (its size) / (its
    kept size), so the sum over the kept of weight * gradient is in the mean over draws the sum of all
    gradients.
    """
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


def scan(loss: Tensor, count: int, seed: int, epoch: int) -> Kept:
    """After SCAN (Guo et al., arXiv 2411.09126): drop at random among the lowest (redundant) and the highest
    (ill-matched) losses.

    The published method takes 35 % of each batch from either end as candidates and drops a share of them that
    grows within a cycle; here the ends are those of the whole set and the share is what the budget asks.
    """
    dropped = len(loss) - count
    rank = loss.argsort().argsort()
    extreme = (2 * rank - (len(loss) - 1)).abs()
    extreme[loss == torch.inf] = -1  # never scored: neither redundant nor ill-matched
    pool = select_kept(extreme, max(dropped, math.ceil(SCAN_POOL * len(loss))))
    ticket = torch.full_like(rank, -1)
    ticket[pool] = keyed_bits(SCAN, seed, epoch, pool)
    if dropped:
        ticket[select_kept(ticket, dropped)] = -2
    return Kept(select_kept((ticket > -2).int(), count))


def load_indices(path: Path, num_samples: int) -> Tensor:
    """A fixed subset, most wanted first, from a `.npy` file or a text file with an index a line: (M,) int64.

    Such files come from methods that choose once, before training: SAS, prototypes, SemDeDup.

    Raises:
        UserError: the file cannot be read, or does not hold distinct places of the data set.
    """
    fix = "give a .npy file or a text file with one index a line"
    if path.exists() and not path.is_file():  # a pipe would block for ever, /dev/zero fill the memory
        raise UserError(f"cannot read the indices in {path} (not a regular file)", fix)
    try:
        if path.suffix == ".npy":
            # mapped: a header may declare more than memory holds; refuses pickles and archives
            values: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        else:
            # given a name, numpy would also unpack archives
            with open(path, encoding="utf-8") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its word on an empty file: ours follows
                values = np.loadtxt(file, dtype=np.int64, ndmin=1)
    except Exception as error:  # damaged headers make numpy raise half a dozen types, EOFError among them
        raise UserError(f"cannot read the indices in {path} ({reason(error)})", fix) from error
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or not len(values):
        raise UserError(
            f"{path} holds {values.dtype} of shape {values.shape}", "give one list of whole numbers"
        )
    if values.min() < 0 or values.max() >= num_samples:
        raise UserError(
            f"{path} holds the index {values.max() if values.max() >= num_samples else values.min()}",
            f"use 0 to {num_samples - 1}",
        )
    if len(np.unique(values)) < len(values):
        raise UserError(
            f"{path} holds {len(values) - len(np.unique(values))} indices twice", "name each sample once"
        )
    return torch.from_numpy(values.astype(np.int64))
