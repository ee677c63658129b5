"""How many samples each epoch trains on, known before the first step, and the shuffled batches of a kept set.

Letters: N samples, K kept, B batch.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from ssl_emp.keyed import keyed_bits

# first key of each use of keyed randomness, so that no two uses share a draw
SHUFFLE, ROTATION = 101, 102


@dataclass(frozen=True)
class PrunePlan:
    """How many samples each epoch keeps: a pure function of the epoch.

    Args:
        epochs: length of the run, T.
        prune_fraction: s, the share left out of a pruned epoch, 0 <= s < 1.
        warmup_epochs: first epochs on everything (the paper: 1).
        anneal_fraction: alpha, the share of the last epochs on everything, rounded to whole epochs.
        shorter: spend the same number of steps on full epochs, fewer of them: what pruning must beat.
        earlier: of each plan before this one, its epochs and the first epoch that is not run under it:
            what was run stays as it was.
        rounds: into so many rounds each epoch of the data is cut. Then `epochs`, `warmup_epochs` and
            `earlier` count rounds.
    """

    epochs: int
    prune_fraction: float
    warmup_epochs: int = 1
    anneal_fraction: float = 0.0
    shorter: bool = False
    earlier: tuple[tuple[int, int], ...] = ()
    rounds: int = 1

    def at(self, epoch: int) -> "PrunePlan":
        """The plan that this epoch is run under."""
        number = sum(end <= epoch for _, end in self.earlier)
        if number == len(self.earlier):
            return self
        return replace(self, epochs=self.earlier[number][0], earlier=self.earlier[:number])

    def is_pruned(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, trains on a part only."""
        return not self.shorter and self._asks_less(epoch)

    def _asks_less(self, epoch: int) -> bool:
        planned = self.at(epoch).epochs
        last = planned - self.rounds * round(self.anneal_fraction * planned / self.rounds)
        return self.prune_fraction > 0 and self.warmup_epochs <= epoch < last

    def kept_count(self, epoch: int, num_samples: int) -> int:
        """Samples that the paper's rule keeps in this epoch: all, or (1 - s) N rounded."""
        return round((1 - self.prune_fraction) * num_samples) if self.is_pruned(epoch) else num_samples

    def asked_share(self) -> float:
        """Samples that the run is asked to train on, over those of the same run unpruned."""
        pruned = sum(self._asks_less(epoch) for epoch in range(self.epochs))
        return 1 - self.prune_fraction * pruned / self.epochs

    def full_steps(self, epoch: int, num_samples: int, batch_size: int) -> tuple[int, int]:
        """First and last (excluded) of the whole batches of an unpruned pass over the data that belong to
        this epoch.
        """
        full, part = num_samples // batch_size, epoch % self.rounds
        return part * full // self.rounds, (part + 1) * full // self.rounds

    def epoch_steps(self, num_samples: int, batch_size: int) -> list[int]:
        """Whole batches of every epoch that is run.

        A pruned epoch is asked for (1 - s) times the batches of a full one, which is seldom a whole number.
        What is rounded off is made up for in the epochs after, so that asked and real budget differ by half a
        batch in the whole run, not in each epoch.
        """
        steps, owed = [], 0.0
        for epoch in range(self.epochs):
            first, last = self.full_steps(epoch, num_samples, batch_size)
            asks_less = self._asks_less(epoch)
            owed += (last - first) * (1 - self.prune_fraction * asks_less)
            steps.append(round(owed) if asks_less else last - first)
            owed -= steps[-1]
        full = num_samples // batch_size
        if self.shorter and full:
            whole, rest = divmod(sum(steps), full)
            return [full] * whole + ([rest] if rest else [])
        return steps


def shuffled_batches(kept: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Cut a kept set into shuffled whole batches, (K,) int64 -> (K // batch_size, batch_size) int64, same
    device.

    A short batch has fewer negatives and would look easy, so the remainder is left out; what is left out
    moves round a fixed circle of the samples from epoch to epoch, so that over a full set nobody is left out
    twice before everybody was once. The order depends on (seed, epoch, which samples are kept) only, not on
    the order of `kept`: pruned and unpruned runs shuffle alike.
    """
    remainder = len(kept) % batch_size
    circle = kept[keyed_bits(ROTATION, seed, kept).argsort()]  # (K,)
    trained = circle.roll(-(epoch * remainder))[remainder:]
    return trained[keyed_bits(SHUFFLE, seed, epoch, trained).argsort()].view(-1, batch_size)
