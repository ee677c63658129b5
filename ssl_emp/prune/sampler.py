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
    """Sample numbers in the order of training, as many in every epoch: the planned run cut into equal nominal
    epochs.

    Trainers take `len(loader)` once; epochs that became shorter would cut the annealing epochs and stall the
    learning rate. It is a DistributedSampler, so that trainers call `set_epoch` on it and do not replace it.
    Iterating twice gives the same numbers; a whole pass moves on to the next epoch by itself. `sampler()` of
    `Pruner` makes it.
    """

    def __init__(self, pruner: "Pruner", num_replicas: int | None, rank: int | None, resumes: bool) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.num_replicas = num_replicas or (dist.get_world_size() if together else 1)
        self.rank = (
            rank if rank is not None else (dist.get_rank() if together and num_replicas is None else 0)
        )
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank {self.rank} of {self.num_replicas}: give 0 <= rank < num_replicas")
        if pruner.batch_size % self.num_replicas:
            what = (
                f"batch_size {pruner.batch_size} of the pruner is that of all {self.num_replicas} "
                "processes together"
            )
            raise ValueError(f"{what}: make it a multiple of {self.num_replicas}")
        self.pruner, self.resumes = pruner, resumes
        self.epoch = 0  # of the pass under way, or set for the next one
        self._is_set, self._passed = False, 0
        self.num_samples = pruner.steps_per_epoch * pruner.batch_size // self.num_replicas  # of this process
        self.total_size = self.num_samples * self.num_replicas
        self.shuffle, self.drop_last, self.seed = True, True, pruner.seed  # what a DistributedSampler has

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Which nominal epoch, counted from 0, the next pass is."""
        self.epoch, self._is_set = epoch, True

    def __iter__(self) -> Iterator[int]:
        pruner = self.pruner
        epoch = self.epoch if self._is_set else max(self._passed, pruner.step // pruner.steps_per_epoch)
        self.epoch, first = epoch, pruner.begin_epoch(epoch)
        part = pruner.batch_size // self.num_replicas
        for number in range(first if self.resumes else 0, pruner.steps_per_epoch):
            batch = pruner.batch(epoch * pruner.steps_per_epoch + number)
            yield from batch[self.rank * part : (self.rank + 1) * part]
        self._passed, self._is_set = epoch + 1, False
