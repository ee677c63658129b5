"""The pruner: before an epoch it says which samples, during it it hears their losses.

Letters: N samples, B batch, b = B / W the part of one of W processes, K samples of a scoring pass, F
covariates.
"""

import operator
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_emp.prune.advice import findings, next_finding
from ssl_emp.prune.figures import LEARNED_BELOW, describe_terms, diagnose, rank_correlation
from ssl_emp.prune.plan import PrunePlan, shuffled_batches
from ssl_emp.prune.policies import Policy, policy_named, random_subset
from ssl_emp.prune.record import Known, Record
from ssl_emp.prune.sampler import Indexed, PrunedSampler
from ssl_emp.prune.state import state_problems

# first epoch numbers of draws that are not trained on, so that none of them equals one of training
RELIABILITY_EPOCHS, SCORING_EPOCHS = 10**6, 10**8
CHUNK = 2**16  # samples whose covariates are computed at once: a draw of views takes 150 bytes and more

# (epoch, index (n,)) -> (n, F): what these samples' coming views will be
Covariates = Callable[[int, Tensor], Tensor]
# (batches (steps, B), key of the draws) -> what a pass over them sees
Score = Callable[[Tensor, int], "Seen"]


@dataclass(frozen=True)
class Seen:
    """What all processes saw of a batch."""

    index: Tensor  # (B,) int64
    terms: Tensor  # (2, B) float32: loss and memory
    covariates: Tensor | None = None  # (B, F)


@dataclass
class Chosen:
    """The samples of an epoch."""

    batches: Tensor | None = None  # (steps, B) int64
    weight: Tensor | None = None  # (N,) of the losses; None: all 1
    # per-sample tensors from before the epoch, which its figures compare with
    before: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None  # the batches on the host


class Pruner:
    """Which samples each epoch of a run trains on. One object a run, the same on all its processes.

    Args:
        samples: N, or the dataset.
        batch_size: samples of a batch, of all processes together; batches are never short.
        epochs: length of the run.
        policy: a name in `POLICIES`, or a policy with keys of its own such as `Emp(beta=2)`.
        fraction: s, the share left out of a pruned epoch, 0 <= s < 1.
        warmup_epochs: first epochs on everything, at least 1: there is no score before.
        anneal_fraction: alpha, the share of the last epochs on everything; the paper states no value.
        rounds_per_epoch: an epoch is chosen in so many rounds, each from its own part of the samples, drawn
            anew every epoch, by the scores as they are then: for runs of few epochs.
        seed: of the order of the samples and of what is left to chance.
        device: of the per-sample tensors; None: where the first losses are.
        covariates: what the coming views of samples will be, a pure function of (epoch, index);
            `foresight` needs it.
        gather: (b, ...) of this process -> (B, ...) of all, in the same order everywhere; None: by
            torch.distributed where it runs. Then `update` is a collective: every process calls it for every
            batch.
        scoring: where a policy looks at scores, they come from the training forward, for free (`stale`),
            or before each pruned epoch from passes over what the last one left out (`pruned`) or over all
            samples (`all`), see `rescore`.
        scoring_draws: passes whose mean is taken.
        earlier: of each plan before this one, its epochs and the first epoch not run under it.
        learned_below: the loss below which a sample counts in the figure `learned_share`. As it stands,
            ln 2: the positive or right class has half of the softmax, if the loss is its -log.

    Raises:
        ValueError, TypeError: an argument out of its range, in one line.
    """

    def __init__(
        self,
        samples: int | Sized,
        *,
        batch_size: int,
        epochs: int,
        policy: str | Policy = "emp",
        fraction: float = 0.3,
        warmup_epochs: int = 1,
        anneal_fraction: float = 0.125,
        rounds_per_epoch: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        covariates: Covariates | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        scoring: str = "stale",
        scoring_draws: int = 1,
        earlier: Sequence[tuple[int, int]] = (),
        learned_below: float = LEARNED_BELOW,
    ) -> None:
        self.num_samples = len(samples) if isinstance(samples, Sized) else _whole("samples", samples)
        # plain numbers, which `torch.load(weights_only=True)` reads: not numpy's
        self.batch_size = batch_size = _whole("batch_size", batch_size)
        self.epochs = epochs = _whole("epochs", epochs)
        self.seed = _whole("seed", seed)
        warmup_epochs = _whole("warmup_epochs", warmup_epochs)
        rounds_per_epoch = _whole("rounds_per_epoch", rounds_per_epoch)
        fraction, anneal_fraction = float(fraction), float(anneal_fraction)
        self.policy = policy if isinstance(policy, Policy) else policy_named(policy)
        self.scoring, self.scoring_draws = scoring, scoring_draws
        self.learned_below = float(learned_below)
        self._covariates, self._gather = covariates, gather
        _check(
            (
                1 <= batch_size <= self.num_samples,
                f"batch_size is {batch_size} of {self.num_samples} samples",
            ),
            (epochs >= 1, f"epochs is {epochs}, give at least 1"),
            (0 <= fraction < 1, f"fraction is {fraction}, allowed: 0 <= fraction < 1"),
            (
                warmup_epochs >= 1,
                f"warmup_epochs is {warmup_epochs}: before it is seen, no sample has a score",
            ),
            (0 <= anneal_fraction <= 1, f"anneal_fraction is {anneal_fraction}, give a share of the epochs"),
            (rounds_per_epoch >= 1, f"rounds_per_epoch is {rounds_per_epoch}, give at least 1"),
            (scoring in ("stale", "pruned", "all"), f"scoring is {scoring!r}, allowed: stale, pruned or all"),
            (
                covariates is not None or not self.policy.adjusts,
                f"policy {self.policy.name} needs covariates, a function of (epoch, index) that says what "
                "the coming views will be; where views are drawn by someone else, policy ucb needs none",
            ),
        )
        # full epochs, or a subset that stays: nothing to choose anew
        rounds = 1 if self.policy.is_shorter or self.policy.keeps_one_subset else rounds_per_epoch
        self.plan = PrunePlan(
            epochs * rounds, fraction if self.policy.prunes else 0.0, warmup_epochs * rounds, anneal_fraction,
            self.policy.is_shorter, tuple((old * rounds, end * rounds) for old, end in earlier), rounds,
        )  # fmt: skip
        self.steps = self.plan.epoch_steps(self.num_samples, batch_size)
        parts = "an epoch keeps" if rounds == 1 else f"one of {rounds} rounds of an epoch keeps"
        few = f"{parts} less than a batch of {batch_size} samples"
        _check((min(self.steps, default=0) >= 1, f"{few}: lower fraction, batch_size or rounds_per_epoch"))
        most = max(count * self.plan.is_pruned(epoch) for epoch, count in enumerate(self.steps))
        if problem := self.policy.problem(self.num_samples, most * batch_size):
            raise ValueError(f"policy {self.policy.name} {problem}")
        self._ends = list(accumulate(self.steps))
        self.steps_per_epoch = -(-self._ends[-1] // epochs)
        self.step = 0  # batches heard of
        self._samples_are_streamed = False  # by a sampler, whose epochs are not those of the plan
        self._passes_unheard = 0  # whole passes of the sampler since `update` heard of a batch
        self._drawn = 0, 0  # first and last (excluded) step of the sampler's last whole pass
        self._chosen: dict[int, Chosen] = {}
        self._told: dict[str, tuple[int, float]] = {}  # findings: when, and how bad
        self._rescored = -1  # the last epoch that `rescore` was asked about
        width = 0
        if self.policy.adjusts and covariates is not None:
            width = covariates(0, torch.zeros(1, dtype=torch.int64, device=device or "cpu")).shape[1]
        self._follows_losses = device is None
        self.record = Record(self.num_samples, self.policy.ema, width, self.policy.shrink, device or "cpu")

    # ---- choose --------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Batches of a run over `sampler()`, len(loader) * epochs: for a learning-rate schedule."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """The epoch (with rounds, the round) that a step, counted from 0, belongs to."""
        if step < self._ends[-1]:
            return bisect_right(self._ends, step)
        # the sampler's last nominal epoch is filled up with full epochs
        return len(self.steps) + (step - self._ends[-1]) // (self.num_samples // self.batch_size)

    def first_step(self, epoch: int) -> int:
        """The step, counted over the run, that an epoch begins with."""
        return self._ends[epoch - 1] if epoch else 0

    def batches(self, epoch: int) -> Tensor:
        """The samples of an epoch in the order of training: (steps, B) int64 on the device, chosen once."""
        chosen = self._begin(epoch)
        if chosen.batches is None:
            chosen.batches, chosen.weight = self._choose(epoch)
        return chosen.batches

    def _choose(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Batches and weights of an epoch that was not chosen yet."""
        device, size, rounds = self.record.terms.device, self.batch_size, self.plan.rounds
        everyone = torch.arange(self.num_samples, device=device)
        if epoch >= len(self.steps):
            return shuffled_batches(everyone, size, self.seed, epoch), None
        first, last = self.plan.full_steps(epoch, self.num_samples, size)
        if rounds > 1 or not self.plan.is_pruned(epoch):
            whole = shuffled_batches(everyone, size, self.seed, epoch // rounds)[first:last]
            if not self.plan.is_pruned(epoch):
                return whole[: self.steps[epoch]], None  # policy shorter may end within an epoch
            everyone = whole.flatten().sort().values  # the part of the samples that this round is about
        if self.policy.uses_scores and self.scoring != "stale" and self._rescored != epoch:
            what = f"scoring is {self.scoring!r} and pruner.rescore(epoch, score) was not called"
            warnings.warn(f"{what} before epoch {epoch}: it chooses by scores of training", stacklevel=3)
        known, candidates = self.record.known, everyone
        if self.policy.foresees:
            known = known._replace(terms=self._expected(epoch))
        if rounds > 1:
            known = known.of(candidates)
        count = self.steps[epoch] * size
        kept = self.policy.choose(known, count, self.seed, epoch, self.plan.warmup_epochs)
        index, weight = candidates[kept.index], kept.weight
        if weight is None and self.policy.rescale:
            weight = known.variance.new_full((count,), len(candidates) / count)
        if weight is not None:
            weight = torch.ones(self.num_samples, device=device).index_put((index,), weight)
        return shuffled_batches(index, size, self.seed, epoch), weight

    def _begin(self, epoch: int) -> Chosen:
        """The entry of an epoch; a new one first notes what the epoch's figures will compare with."""
        if epoch not in self._chosen:
            # the last planned epoch stays: a sampler's passes go on beyond it, and it has the last figures
            first = min(epoch, len(self.steps)) - 1
            for old in [old for old in self._chosen if not self._is_needed(old) and old < first]:
                del self._chosen[old]
            before = {}
            if epoch < len(self.steps) and self.plan.is_pruned(epoch):
                record = self.record
                before = {name: getattr(record, name).clone() for name in ("trained_epoch", "scored_epoch")}
                if self.policy.is_ranking:
                    before["score"] = self.policy.score(record.known._replace(terms=record.last))
            self._chosen[epoch] = Chosen(before=before)
        return self._chosen[epoch]

    def _is_needed(self, epoch: int) -> bool:
        """Whether the batches of an epoch may be asked for again by a run that goes on from here."""
        size, again = self.steps_per_epoch, self.step
        if self._samples_are_streamed:
            again = self.step // size * size  # some trainers read a nominal epoch again from its beginning
        return (self._ends[epoch] if epoch < len(self.steps) else self.total_steps) >= again

    def _expected(self, epoch: int) -> Tensor:
        """Loss and memory (2, N) expected of each sample under its coming views, without drawing these."""
        everyone = torch.arange(self.num_samples, device=self.record.terms.device)
        parts = [self.record.expected(part, self._views_of(epoch, part)) for part in everyone.split(CHUNK)]
        return torch.cat(parts, 1)

    def _views_of(self, epoch: int, index: Tensor) -> Tensor:
        """The covariates of samples (n,) in an epoch, or in the epoch of a round: (n, F)."""
        assert self._covariates is not None
        return self._covariates(epoch // self.plan.rounds, index)

    # ---- train: in our own loop ----------------------------------------------------------------------------

    def weighted(self, index: Tensor, loss: Tensor) -> Tensor:
        """Mean of the losses (B,) or (kB,) of the samples `index` (B,), times their weights if any."""
        chosen = self._chosen.get(self.epoch_of(self.step))
        if chosen is None or chosen.batches is None:
            raise ValueError(
                "these batches do not come from the pruner, so nothing is pruned: give the DataLoader "
                "sampler=pruner.sampler(), or iterate over pruner.batches(epoch)"
            )
        if chosen.weight is None:
            return loss.mean()
        return (loss * chosen.weight[index].repeat(len(loss) // len(index))).mean()

    def gather(
        self, index: Tensor, loss: Tensor, memory: Tensor | None = None, covariates: Tensor | None = None
    ) -> Seen:
        """What this process saw of its part of a batch -> what all saw. One exchange, no host sync.

        Args:
            index: (b,) int64.
            loss, memory: (b,).
            covariates: (b, F); None: by the pruner's own function, where the policy adjusts.
        """
        memory = torch.zeros_like(loss) if memory is None else memory
        terms = torch.stack([loss.detach(), memory.detach()], 1).float()  # (b, 2)
        if not self.policy.adjusts:
            covariates = None
        elif covariates is None:
            covariates = self._views_of(self.epoch_of(self.step), index)
        gather = self._gather or _gather_by_torch()
        if gather is None:
            return Seen(index, terms.T, covariates)
        # an int64 travels as the bits of two float32, which a copy does not change
        parts = [
            index.reshape(-1, 1).contiguous().view(torch.float32),
            terms,
            *([] if covariates is None else [covariates]),
        ]
        whole = gather(torch.cat(parts, 1))
        index = whole[:, :2].contiguous().view(torch.int64).flatten()
        return Seen(index, whole[:, 2:4].T, None if covariates is None else whole[:, 4:])

    def observe(self, seen: Seen, where: Tensor | None = None) -> None:
        """Take in a batch that was trained on, where `where` (0-d bool on the device) holds."""
        epoch = self.epoch_of(self.step)
        self.record.observe(seen.index, seen.terms, seen.covariates, epoch, where)
        self.record.count_trained(seen.index, epoch, where)
        self.step += 1

    # ---- train: in any loop --------------------------------------------------------------------------------

    def indexed(self, dataset: Any) -> Indexed:
        """The dataset with its index in each item: `(*item, i)`, `{**item, "sample_idx": i}`, `(item, i)`."""
        return Indexed(dataset, self.num_samples)

    def sampler(
        self, num_replicas: int | None = None, rank: int | None = None, *, resumes: bool = True
    ) -> PrunedSampler:
        """Sample numbers for a DataLoader, as many in every epoch; for several processes this one's part of
        each batch.

        Args:
            num_replicas, rank: processes and which this is; None: by torch.distributed where it runs.
                Under accelerate, which deals the batches out itself: `sampler(1, 0)`.
            resumes: the first pass after `load_state_dict` begins where the state stood within its epoch;
                False for trainers that skip what was trained themselves.
        """
        asked = self.policy.prunes and not self.policy.is_shorter and self.plan.prune_fraction > 0
        if asked and not any(map(self.plan.is_pruned, range(len(self.steps)))):
            what = (
                f"none of the {self.epochs} epochs is pruned: the warm-up and the annealing are all of them"
            )
            warnings.warn(f"{what}, plan more epochs or a lower anneal_fraction", stacklevel=2)
        return PrunedSampler(self, num_replicas, rank, resumes)

    def skip_to(self, nominal: int) -> None:
        """For the sampler: leave out what is left before a nominal epoch. Never back."""
        begin = nominal * self.steps_per_epoch
        if begin >= self._drawn[1]:
            self._warn_if_unheard()
        self.step = max(self.step, begin)

    def next_pass(self) -> tuple[int, int]:
        """For the sampler: first and last step (excluded) that are left of the nominal epoch under way."""
        self._samples_are_streamed = True
        first, last = self._drawn
        if first < self.step < last:
            heard = f"update heard of {self.step - first} of the last pass's {last - first} batches"
            raise ValueError(f"{heard}: call it once a batch")
        self._passes_unheard += first == self.step < last
        if self._passes_unheard > 2:  # trainers call iter() again before they train, once or twice
            self._warn_if_unheard()
        if self.step >= self.total_steps:
            raise ValueError(
                f"all {self.epochs} planned epochs are trained: make a new Pruner, or one with more"
            )
        return self.step, (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch

    def end_pass(self, first: int, last: int) -> None:
        """For the sampler: these steps were drawn, if not heard of yet."""
        self._drawn = first, last

    def _warn_if_unheard(self) -> None:
        first, last = self._drawn
        if first == self.step < last:
            what = f"update heard of none of the last pass's {last - first} batches, so nothing is learned of"
            warnings.warn(f"{what} the samples: call it once a batch", stacklevel=4)

    def batch(self, step: int) -> list[int]:
        """For the sampler: the samples of a step, counted over the whole run, on the host."""
        epoch = self.epoch_of(step)
        batches, chosen = self.batches(epoch), self._chosen[epoch]
        if chosen.rows is None:
            chosen.rows = batches.cpu()
        first = self.first_step(min(epoch, len(self.steps)))
        return chosen.rows[(step - first) % len(chosen.rows)].tolist()

    def update(self, index: Tensor, loss: Tensor, memory: Tensor | None = None) -> Tensor:
        """Hear the losses of a batch, once each batch; gives back what to call `backward` on.

        Args:
            index: (B,) the samples' numbers, as `indexed` put them into the batch.
            loss: (B,), or view-major (kB,) of k views: their mean is the sample's.
            memory: (B,) EMP's memory term, `entropy(logits)` or `closeness(h_a, h_b)`; what policies emp
                and distance need.

        Returns:
            0-d mean of the losses, weighted where the policy weighs. Scores are kept detached; a batch with a
            loss that is not finite is not scored.

        Raises:
            ValueError, TypeError: shapes that do not fit, a loss that was averaged, no memory, samples that
                are not those of the pruner's next batch (where `index` is on the host: nothing waits).
        """
        try:
            index = torch.as_tensor(index)
        except (TypeError, ValueError, RuntimeError) as error:  # of many kinds, by what it is
            kind = f"index is of type {type(index).__name__}"
            raise TypeError(f"{kind}: give the (B,) integers that indexed() appends") from error
        if self.policy.needs_memory and memory is None:
            what = f"policy {self.policy.name} needs the memory term"
            raise ValueError(
                f"{what}: update(index, loss, entropy(logits)) or update(index, loss, closeness(h_a, h_b))"
            )
        self._check_batch(index, loss, memory)
        if self._follows_losses:
            self._move(loss.device)
            self._follows_losses = False
        device, host_index = self.record.terms.device, index
        index, batch = index.to(device, torch.int64, non_blocking=True), len(index)
        self._check_is_next(host_index)
        mean = self.weighted(index, loss)
        per_sample = loss.detach().to(device).view(-1, batch).mean(0)
        seen = self.gather(index, per_sample, None if memory is None else memory.detach().to(device))
        if len(seen.index) != self.batch_size:
            what = f"a batch of {len(seen.index)} samples, of all processes, where batch_size is"
            raise ValueError(f"{what} {self.batch_size}: give the Pruner that of all processes together")
        self.observe(seen, seen.terms.isfinite().all())
        self._passes_unheard = 0
        return mean

    def _check_is_next(self, index: Tensor) -> None:
        """Raise ValueError where `index` (b,), on the host, is no part of the batch that comes next."""
        epoch = self.epoch_of(self.step)
        chosen = self._chosen.get(epoch)
        if chosen is None or chosen.batches is None or index.device.type != "cpu":
            return
        if chosen.rows is None and chosen.batches.device.type != "cpu":
            return
        if len(set(self.batch(self.step)).intersection(index.tolist())) < len(index):
            raise ValueError(
                f"these samples are not those of batch {self.step} of the run, which comes next: call update "
                "once for each batch of one training loader, in its order, with the pruner's batch_size"
            )

    def _check_batch(self, index: Tensor, loss: Tensor, memory: Tensor | None) -> None:
        for name, values in {"loss": loss, "memory": memory}.items():
            if values is not None and not (isinstance(values, Tensor) and values.is_floating_point()):
                kind = values.dtype if isinstance(values, Tensor) else f"of type {type(values).__name__}"
                raise TypeError(f"{name} is {kind}: give a tensor with one number a sample")
        if index.is_meta or loss.is_meta:
            raise TypeError("index or loss is on the device meta: give values")
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(
                f"index is {index.dtype} of shape {tuple(index.shape)}: give the (B,) integers "
                "that indexed() appends"
            )
        if loss.dim() != 1 or len(loss) == 0 or len(loss) % max(len(index), 1):
            hint = (
                'averaged already? take the loss with reduction="none"'
                if loss.dim() == 0
                else "give one loss a sample, or k a sample"
            )
            raise ValueError(f"loss has shape {tuple(loss.shape)} for {len(index)} samples: {hint}")
        if memory is not None and memory.shape != index.shape:
            raise ValueError(
                f"memory has shape {tuple(memory.shape)} for {len(index)} samples: give one value a sample"
            )
        index = index.to(torch.int64)
        if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < self.num_samples:
            wrong = int(index.max()) if index.max() >= self.num_samples else int(index.min())
            raise ValueError(f"index {wrong} is not one of the {self.num_samples} samples, numbered from 0")

    def _move(self, device: torch.device) -> None:
        self.record.to(device)
        for chosen in self._chosen.values():
            chosen.batches = None if chosen.batches is None else chosen.batches.to(device)
            chosen.weight = None if chosen.weight is None else chosen.weight.to(device)
            chosen.before = {name: tensor.to(device) for name, tensor in chosen.before.items()}

    # ---- score without training ----------------------------------------------------------------------------

    def rescore(self, epoch: int, score: Score) -> None:
        """Before a pruned epoch is chosen, score samples with the network of now, unless scoring is `stale`.

        Scores must be comparable with those of the training pass: batches as large, BatchNorm on the
        statistics of the batch.

        Args:
            score: (batches (steps, B), key of the draws) -> what all processes saw of these batches, in
                order.
        """
        self._rescored = epoch
        asked = self.policy.uses_scores and self.scoring != "stale" and self.plan.is_pruned(epoch)
        if not asked or epoch in self._chosen:
            return
        self._begin(epoch)
        trained_before = self.steps[epoch - 1] * self.batch_size
        count = self.num_samples if self.scoring == "all" else self.num_samples - trained_before
        oldest_first = self.record.scored_epoch.argsort(stable=True)  # (N,)
        first, rest = (
            shuffled_batches(part, 1, self.seed, epoch).flatten()
            for part in (oldest_first[:count], oldest_first[count:])
        )
        if not count:
            return
        keys = [
            epoch + draw * SCORING_EPOCHS for draw in range(self.scoring_draws)
        ]  # the first has this epoch's views
        passes = [self._score(score, first, rest, key) for key in keys]
        terms = torch.stack([seen.terms for seen in passes]).mean(0)
        draws = [seen.covariates for seen in passes if seen.covariates is not None]
        known = terms.isfinite().all(0)  # the others stay as they were
        covariates = torch.stack(draws).mean(0)[known] if draws else None
        self.record.observe(
            first[known], terms[:, known], covariates, epoch - 1
        )  # older than what this epoch trains on

    def _score(self, score: Score, first: Tensor, rest: Tensor, key: int) -> Seen:
        """Scores of `first` (K,), in its order. The last batch is filled up from `rest`, whose scores are
        dropped.
        """
        batches, size = -(-len(first) // self.batch_size), self.batch_size
        table = torch.cat([first, rest]).repeat(2)[: batches * size].view(batches, size)
        seen = score(table, key)
        covariates = None if seen.covariates is None else seen.covariates[: len(first)]
        return Seen(first, seen.terms[:, : len(first)], covariates)

    def reliability(self, score: Score, num_samples: int) -> dict[str, float | None]:
        """How much of the score is the sample and not the draw: by two new draws of some samples with the
        network of now.

        `draw_reliability` is the rank correlation r of the two draws' scores. `score_reliability` is that of
        the score which ranks: its correlation c with a draw is the root of (its own reliability times r), so
        it is c² / r; None where r is too close to 0. Where the policy foresees, `foresight` is how the score
        expected of a draw correlates with the one it then has, and with shrink `recall` is the slope of a
        sample's loss on what was remembered of it, both without the draw.
        """
        record, policy = self.record, self.policy
        batches = min(-(-num_samples // self.batch_size), self.num_samples // self.batch_size)
        device, count = record.terms.device, batches * self.batch_size
        sample = random_subset(self.num_samples, count, 0, -1, device).index  # the same ones all the time
        scores, foresights = [], []
        for draw in (1, 2):
            key = draw * RELIABILITY_EPOCHS + self.epoch_of(self.step - 1)
            order = shuffled_batches(sample, 1, self.seed, key).flatten()
            seen = self._score(score, order, order[:0], key)
            known, terms = record.known.of(order), seen.terms
            no_variance = torch.zeros_like(terms[0])
            if seen.covariates is not None:
                were_seen = record.times_scored[order] > 0
                expected = policy.score(known._replace(terms=record.expected(order, seen.covariates)))
                found = policy.score(Known(terms, no_variance))
                foresights.append(rank_correlation(expected[were_seen], found[were_seen]))
                terms = record.adjusted(order, terms, seen.covariates)
            scores.append(
                torch.zeros(self.num_samples, device=device).index_put(
                    (order,), policy.score(Known(terms, no_variance))
                )[sample]
            )
        ranking = policy.score(record.known)[sample]
        scored = ranking < torch.inf
        ranking, *scores = (values[scored] for values in (ranking, *scores))
        both = rank_correlation(*scores)
        with_ranking = (rank_correlation(ranking, scores[0]) + rank_correlation(ranking, scores[1])) / 2
        foresight = [torch.stack(foresights).mean()] if foresights else []
        r, c, *rest = torch.stack([both, with_ranking, *foresight]).tolist()
        figures: dict[str, float | None] = {
            "draw_reliability": r,
            "score_reliability": c * abs(c) / r if r > 0.02 else None,
        }
        figures |= {"foresight": rest[0]} if rest else {}
        return figures | ({"recall": record.slope()[0].item()} if rest and record.shrink else {})

    # ---- look ----------------------------------------------------------------------------------------------

    def figures(self, labels: Tensor | None = None, is_noisy: Tensor | None = None) -> dict[str, float]:
        """The last finished epoch in numbers, see `describe_terms` and, of a pruned epoch, `diagnose`. Reads
        from the device.

        Args:
            labels: (N,) int64, for class balance.
            is_noisy: (N,) bool, where wrong labels are known.
        """
        epoch = bisect_right(self._ends, self.step) - 1
        chosen = self._chosen.get(epoch)
        if chosen is None or chosen.batches is None:
            return {}
        record, formula = self.record, self.policy.formula
        # some may have been trained on again since: a sampler's passes do not end with the plan's epochs
        trained_epoch, index = record.trained_epoch.clone(), chosen.batches.flatten()
        trained_epoch[index] = trained_epoch[index].clamp(max=epoch)
        figures = {"kept_share": chosen.batches.numel() / self.num_samples}
        standardized = formula.memory == "standardized"
        figures |= describe_terms(record.last[:, index], formula.beta, standardized, self.learned_below)
        if not chosen.before:
            return figures
        before = chosen.before
        # single observations and not means, which resemble themselves
        now = self.policy.score(record.known._replace(terms=record.last)) if "score" in before else None
        return figures | diagnose(
            epoch,
            times_trained=record.times_trained,
            last_trained=trained_epoch,
            # the rounds of one epoch share no sample by construction: nothing is said by that
            last_trained_before=before["trained_epoch"]
            if self.plan.is_pruned(epoch - 1) and self.plan.rounds == 1
            else None,
            scores=now,
            scores_before=before.get("score"),
            fresh=(record.scored_epoch == epoch) & (before["scored_epoch"] == epoch - 1),
            labels=labels,
            num_classes=0 if labels is None else int(labels.max()) + 1,
            is_noisy=is_noisy,
        )

    def advice(self, figures: Mapping[str, Any], class_names: Sequence[str] | None = None) -> str | None:
        """One line on what is off in the last finished epoch, with the key to turn; each kind of thing once a
        run, also over a resume. None: nothing new.

        Args:
            figures: of `figures`, and of `reliability` where it was measured.
            class_names: for the line; None: numbers.
        """
        epoch = bisect_right(self._ends, self.step) - 1
        if epoch not in self._chosen or not self._chosen[epoch].before:
            return None
        can_adjust = self._covariates is not None
        found = findings(
            figures, self.policy, self.num_samples, can_adjust=can_adjust, class_names=class_names
        )
        finding = next_finding(found, self._told)
        if finding is None:
            return None
        self._told[finding.kind] = (epoch, finding.severity)
        return finding.line

    def table(self) -> dict[str, Tensor]:
        """What is known of every sample, each (N,): what a run's samples.parquet holds. +inf: never seen."""
        record = self.record
        return {
            "index": torch.arange(self.num_samples, device=record.terms.device),
            "loss": record.last[0],
            "memory": record.last[1],
            "score": self.policy.score(record.known),
            "times_trained": record.times_trained,
            "scored_epoch": record.scored_epoch,
        }

    # ---- save and resume -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the samples of the epochs under way among it; tensors and
        plain values only.
        """
        chosen = {
            epoch: {"batches": entry.batches, "weight": entry.weight, "before": entry.before}
            for epoch, entry in self._chosen.items()
            if self._is_needed(epoch) and entry.batches is not None
        }
        return {
            **self._identity(),
            "step": self.step,
            "told": dict(self._told),
            "record": self.record.state_dict(),
            "chosen": chosen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, from any device. Raises ValueError where it is of another run or
        damaged.
        """
        if problem := self.state_problem(state):
            raise ValueError(f"the state does not fit this pruner: {problem}")
        device = self.record.terms.device
        self.record.load_state_dict(state["record"])
        self.step, self._told, self._drawn = state["step"], dict(state["told"]), (0, 0)
        self._chosen = {
            epoch: Chosen(
                entry["batches"].to(device),
                None if entry["weight"] is None else entry["weight"].to(device),
                {name: tensor.to(device) for name, tensor in entry["before"].items()},
            )
            for epoch, entry in state["chosen"].items()
        }

    def state_problem(self, state: Any) -> str | None:
        """The first entry in which a loaded state does not fit, before any of it is used; None: it fits."""
        return next(state_problems(state, self._identity(), self), None)

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on from a state."""
        # of the step that was made last: the next one may be of a plan that was made later
        plan = self.plan.at(self.epoch_of(max(self.step - 1, 0)))
        return {
            "samples": self.num_samples,
            "batch_size": self.batch_size,
            "policy": self.policy.described,
            "seed": self.seed,
            "plan": [plan.epochs, plan.prune_fraction, plan.warmup_epochs, plan.anneal_fraction, plan.rounds],
        }


def _check(*rules: tuple[bool, str]) -> None:
    """Raise ValueError with what is wrong in the first rule that does not hold."""
    for holds, what in rules:
        if not holds:
            raise ValueError(what)


def _whole(name: str, value: Any) -> int:
    """A whole number, also of numpy, as Python's; TypeError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r:.80}: give a whole number") from None


def _gather_by_torch() -> Callable[[Tensor], Tensor] | None:
    """What all processes of the default group hold, in the order of ranks; None: there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    # its name since torch 2.14, which warns of the old one
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(part: Tensor) -> Tensor:
        whole = part.new_empty(dist.get_world_size() * len(part), *part.shape[1:])
        all_gather(whole, part.contiguous())
        return whole

    return gather
