"""The pruner in a DataLoader: a dataset whose items carry their index, and a sampler of constant length."""

from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from ssl_emp.prune.pruner import Pruner

INDEX_KEY = "sample_idx"  # of items that are dicts


class Indexed(Dataset[Any]):
    """A dataset whose items carry their index, last: (*item, i), {**item, "sample_idx": i} or (item, i)."""

    def __init__(self, dataset: Any, num_samples: int) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "an IterableDataset has no samples by number to choose from: give a dataset with dataset[i]"
            )
        if not isinstance(dataset, Sized) or len(dataset) != num_samples:
            size = len(dataset) if isinstance(dataset, Sized) else "no length"
            raise ValueError(
                f"the dataset has {size} samples and the pruner {num_samples}: make it with len(dataset)"
            )
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, dict):
            if INDEX_KEY in item:
                raise ValueError(
                    f"the items have a key {INDEX_KEY!r} already, which is where their index goes: rename it"
                )
            return {**item, INDEX_KEY: index}
        if type(item) in (tuple, list):
            return type(item)([*item, index])
        return item, index


class PrunedSampler(DistributedSampler[int]):
    """Sample numbers in the order of training: the planned run cut into nominal epochs of equal length.

    Trainers take `len(loader)` once; epochs that became shorter would cut the annealing epochs and stall the
    learning rate. It is a DistributedSampler, so that trainers call `set_epoch` on it and do not replace it.
    A pass begins at the first batch that `update` has not heard of and ends with its nominal epoch, so
    iterating twice gives the same numbers, and nobody has to call `set_epoch`. `Pruner.sampler` makes it.
    """

    def __init__(self, pruner: "Pruner", num_replicas: int | None, rank: int | None, resumes: bool) -> None:
        self.pruner, self.resumes = pruner, resumes
        self._num_replicas, self._rank = num_replicas, rank
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank {self.rank} of {self.num_replicas}: give 0 <= rank < num_replicas")
        self.epoch = 0  # as set last
        self.shuffle, self.drop_last, self.seed = True, True, pruner.seed  # what a DistributedSampler has
        len(self)

    # asked anew each time: Lightning starts torch.distributed after a loader was made

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Processes that share a batch."""
        return self._num_replicas or (dist.get_world_size() if _is_distributed() else 1)

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Which of them this is."""
        if self._rank is not None:
            return self._rank
        return dist.get_rank() if _is_distributed() and self._num_replicas is None else 0

    def __len__(self) -> int:
        """Samples of a pass on this process."""
        whole, parts = self.pruner.batch_size, self.num_replicas
        if whole % parts:
            what = f"batch_size {whole} of the pruner is that of all {parts} processes together"
            raise ValueError(f"{what}: make it a multiple of {parts}")
        return self.pruner.steps_per_epoch * whole // parts

    def set_epoch(self, epoch: int) -> None:
        """Leave out what is before this nominal epoch, counted from 0. Never back: what was heard stays."""
        self.epoch = epoch
        self.pruner.skip_to(epoch)

    def __iter__(self) -> Iterator[int]:
        pruner = self.pruner
        first, last = pruner.next_pass()
        part, rank = len(self) // pruner.steps_per_epoch, self.rank
        for step in range(first if self.resumes else last - pruner.steps_per_epoch, last):
            yield from pruner.batch(step)[rank * part : (rank + 1) * part]
        pruner.end_pass(first, last)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
