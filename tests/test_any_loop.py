"""The three lines in a plain PyTorch loop, and what breaks pruning there: a right result or a clear line."""

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from ssl_emp.prune import POLICIES, Emp, Indices, Policy, Pruner, closeness, entropy

SAMPLES, BATCH, EPOCHS = 70, 8, 8  # 8 full batches and a remainder


def make_pruner(samples: int = SAMPLES, **options: Any) -> Pruner:
    chosen: dict[str, Any] = {
        "policy": "loss",
        "fraction": 0.5,
        "anneal_fraction": 0.25,
        "seed": 3,
        "batch_size": BATCH,
    }
    return Pruner(samples, **(chosen | {"epochs": EPOCHS} | options))


def make_data(samples: int = SAMPLES) -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 5, generator=made), torch.randint(3, (samples,), generator=made)
    )


def losses_of(index: Tensor, step: int) -> Tensor:
    """A loss that is a function of sample and step, so that an epoch's choice can be foretold."""
    return ((index * 7919 + step * 104729) % 1009).float() / 1009


def run(
    pruner: Pruner, loader: DataLoader[Any], epochs: range | None = None, until: int = -1
) -> Iterator[list[int]]:
    """The plain loop, without a network; the indices of every batch. Ends before step `until`."""
    for epoch in epochs if epochs is not None else range(pruner.epochs):
        assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if pruner.step == until:
                return
            index = batch[-1]
            yield index.tolist()
            pruner.update(index, losses_of(index, pruner.step))


def refused(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the index travels in the batch


class Items(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_index_survives_the_default_collate(workers: int) -> None:
    shapes: dict[str, tuple[Callable[[int], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
        "tuple": (lambda i: (torch.tensor(i), -i), lambda batch: (batch[0], batch[-1])),
        "list": (lambda i: [torch.tensor(i), -i], lambda batch: (batch[0], batch[-1])),
        "dict": (lambda i: {"x": torch.tensor(i)}, lambda batch: (batch["x"], batch["sample_idx"])),
        "bare": (lambda i: torch.tensor(i), lambda batch: (batch[0], batch[-1])),
        "number": (lambda i: i, lambda batch: (batch[0], batch[-1])),
        "views": (lambda i: ([torch.zeros(2), torch.tensor(i)], 0), lambda batch: (batch[0][1], batch[-1])),
    }  # fmt: skip
    for name, (make, read) in shapes.items():
        pruner = make_pruner()
        loader: DataLoader[Any] = DataLoader(
            pruner.indexed(Items(make)), BATCH, sampler=pruner.sampler(), num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        for batch in loader:
            value, index = read(batch)
            assert index.dtype == torch.int64 and value.tolist() == index.tolist(), name


def test_the_index_survives_a_collate_of_ones_own() -> None:
    def collate(items: list[tuple[Tensor, Tensor, int]]) -> dict[str, Tensor]:
        x, y, index = zip(*items, strict=True)
        return {"inputs": torch.stack(x), "targets": torch.stack(y), "index": torch.tensor(index)}

    data, pruner = make_data(), make_pruner()
    for batch in DataLoader(pruner.indexed(data), BATCH, sampler=pruner.sampler(), collate_fn=collate):
        assert torch.equal(batch["inputs"], data.tensors[0][batch["index"]])


def test_the_index_survives_lightlys_collate_no_more_than_its_items() -> None:
    """lightly's MultiViewCollate takes items of three parts alone; the default collate does the same."""
    pruner = make_pruner()
    dataset = pruner.indexed(Items(lambda i: ([torch.zeros(2), torch.ones(2)], i, str(i))))
    (first, second), labels, names, index = next(iter(DataLoader(dataset, BATCH, sampler=pruner.sampler())))
    assert first.shape == second.shape == (BATCH, 2) and labels.tolist() == index.tolist()
    assert names == tuple(str(i) for i in index.tolist()) or list(names) == [str(i) for i in index.tolist()]


# --- whole passes


@pytest.mark.parametrize("options", [
    {}, {"num_workers": 2, "persistent_workers": True}, {"num_workers": 1, "prefetch_factor": 5}
])  # fmt: skip
def test_every_epoch_of_the_plan_is_trained_once(options: dict[str, Any]) -> None:
    pruner = make_pruner()
    loader: DataLoader[Any] = DataLoader(
        pruner.indexed(make_data()), BATCH, sampler=pruner.sampler(), **options
    )
    batches = list(run(pruner, loader))
    assert len(batches) == len(loader) * EPOCHS == pruner.total_steps == pruner.step
    begin = 0
    for steps in pruner.steps:
        trained = sum(batches[begin : begin + steps], [])
        assert len(trained) == len(set(trained)) == steps * BATCH
        begin += steps
    assert pruner.total_steps - begin < EPOCHS, "what rounding adds at the end"


def test_kept_are_those_of_the_highest_loss() -> None:
    """Two pruned epochs against a few lines: sort by the loss that was heard last, take the highest."""
    pruner = make_pruner()
    batches = list(run(pruner, DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler())))
    heard = torch.full((SAMPLES,), torch.inf)
    begin = 0
    for epoch, steps in enumerate(pruner.steps):
        trained = set(sum(batches[begin : begin + steps], []))
        if epoch in (1, 2, 3):
            by_loss = heard.argsort(descending=True, stable=True).tolist()
            assert trained <= set(by_loss[: steps * BATCH + BATCH - 1])
            assert set(by_loss[: steps * BATCH - BATCH]) - trained == set() or epoch == 1
        for step in range(begin, begin + steps):
            index = torch.tensor(batches[step])
            heard[index] = losses_of(index, step)
        begin += steps


def test_asking_twice_moves_nothing() -> None:
    """BatchSampler and Lightning call `iter()` again, and throw away what they have read ahead."""
    pruner, other = make_pruner(), make_pruner()
    loader: DataLoader[Any] = DataLoader(
        pruner.indexed(make_data()), BATCH, sampler=pruner.sampler(), num_workers=1
    )
    iter(loader)
    next(iter(loader))
    assert [batch[-1].tolist() for batch in loader] == [batch[-1].tolist() for batch in loader]
    iter(loader.sampler)
    untouched: DataLoader[Any] = DataLoader(
        other.indexed(make_data()), BATCH, sampler=other.sampler(), num_workers=1
    )
    assert list(run(pruner, loader)) == list(run(other, untouched))


def test_a_short_pass_that_is_read_ahead_whole() -> None:
    """Workers have asked for all of it before anything was trained on: it is not over for that."""
    pruner = make_pruner()
    loader: DataLoader[Any] = DataLoader(
        pruner.indexed(make_data()), BATCH, sampler=pruner.sampler(), num_workers=1, prefetch_factor=9
    )
    iter(loader)
    steps = []
    for _ in range(EPOCHS):  # without set_epoch
        for batch in loader:
            steps.append(pruner.step)
            pruner.update(batch[-1], losses_of(batch[-1], pruner.step))
    assert steps == list(range(pruner.total_steps))


def test_set_epoch_leaves_out_what_is_before_it_and_never_goes_back() -> None:
    pruner, whole = make_pruner(), make_pruner()
    sampler = pruner.sampler()
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=sampler)
    plain: DataLoader[Any] = DataLoader(whole.indexed(make_data()), BATCH, sampler=whole.sampler())
    begun = list(run(pruner, loader, range(1), until=4))  # a pass that the user breaks off
    sampler.set_epoch(0)  # accelerate counts from 0 again after a resume
    batches = list(run(whole, plain))
    assert begun + [batch[-1].tolist() for batch in loader] == batches[: pruner.steps_per_epoch]
    with pytest.warns(UserWarning, match="update heard of none of the last pass's 2 batches"):
        sampler.set_epoch(1)
    assert next(iter(sampler)) == batches[pruner.steps_per_epoch][0]


def test_a_pass_that_update_heard_half_of_is_refused() -> None:
    pruner = make_pruner()
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler())
    for number, batch in enumerate(loader):
        if number < 3:
            pruner.update(batch[-1], losses_of(batch[-1], number))
    assert "update heard of 3 of the last pass's 6 batches" in refused(lambda: list(loader))


def test_a_loop_that_never_calls_update_is_told() -> None:
    pruner = make_pruner()
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler())
    with pytest.warns(UserWarning, match="update heard of none of the last pass's 6 batches"):
        for _ in range(4):
            list(loader)


def test_a_plan_that_prunes_no_epoch_is_told() -> None:
    options: dict[str, Any]
    for options in ({"epochs": 1}, {"epochs": 1, "rounds_per_epoch": 2}, {"anneal_fraction": 1}):
        with pytest.warns(UserWarning, match="epochs is pruned"):
            make_pruner(**options).sampler()
    for options in ({"epochs": 1, "policy": "none"}, {"epochs": 1, "fraction": 0}, {"epochs": 2}):
        make_pruner(**options).sampler()  # a warning would be an error


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("every batch twice", "not those of batch 1"),
        ("every second batch", "not those of batch 0"),
        ("two loaders", "not those of batch 1"),
        ("validation too", "not those of batch 6"),
        ("a sample twice", "not those of batch 0"),
        ("smaller batches", "a batch of 4 samples, of all processes, where batch_size is 8"),
        ("larger batches", "not those of batch 0"),
    ],
)
def test_update_hears_the_pruners_batches_in_their_order_and_no_others(mistake: str, words: str) -> None:
    pruner = make_pruner()
    sizes = {"smaller batches": BATCH // 2, "larger batches": BATCH * 2}
    loader: DataLoader[Any] = DataLoader(
        pruner.indexed(make_data()), sizes.get(mistake, BATCH), sampler=pruner.sampler()
    )
    heard = 0

    def loop() -> None:
        nonlocal heard
        for number, batch in enumerate(loader):
            index = batch[-1][[0] * BATCH] if mistake == "a sample twice" else batch[-1]
            for _ in range(2 if mistake in ("every batch twice", "two loaders") else 1):
                if mistake != "every second batch" or number % 2:
                    pruner.update(index, losses_of(index, number))
                    heard += 1
        for index in torch.arange(SAMPLES).split(BATCH):
            pruner.update(index, losses_of(index, 0))

    assert words in refused(loop)
    assert pruner.step == heard


def test_more_epochs_than_planned_are_refused() -> None:
    pruner = make_pruner()
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler())
    list(run(pruner, loader))
    assert "all 8 planned epochs are trained" in refused(lambda: list(loader))


def test_processes_share_every_batch_and_may_be_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(make_pruner().sampler())
    pruner = make_pruner()
    sampler = pruner.sampler()
    assert len(sampler) == len(whole)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert len(sampler) == len(whole) // 2 and sampler.rank == rank
        parts.append(torch.tensor(list(sampler)).view(-1, BATCH // 2))
    assert torch.cat(parts, 1).flatten().tolist() == whole
    assert list(pruner.sampler(1, 0)) == whole
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert "make it a multiple of 3" in refused(lambda: len(sampler))
    assert "rank 2 of 2" in refused(lambda: pruner.sampler(2, 2))


def test_a_batch_sampler_of_ones_own() -> None:
    pruner, other = make_pruner(), make_pruner()
    batches = BatchSampler(pruner.sampler(), BATCH, drop_last=False)
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), batch_sampler=batches)
    seen = []
    for _ in range(EPOCHS):  # nobody calls set_epoch: a whole pass moves on by itself
        for batch in loader:
            seen.append(batch[-1].tolist())
            pruner.update(batch[-1], losses_of(batch[-1], pruner.step))
    plain: DataLoader[Any] = DataLoader(other.indexed(make_data()), BATCH, sampler=other.sampler())
    assert seen == list(run(other, plain))


def test_reading_ahead_chooses_by_the_scores_there_are() -> None:
    """Scores of the batches in flight at an epoch's border are not heard yet: they count one epoch later."""
    pruner, other = make_pruner(), make_pruner()
    ahead: DataLoader[Any] = DataLoader(
        pruner.indexed(make_data()), BATCH, sampler=pruner.sampler(), num_workers=1
    )
    plain: DataLoader[Any] = DataLoader(other.indexed(make_data()), BATCH, sampler=other.sampler())
    one, two = list(run(pruner, ahead)), list(run(other, plain))
    full = pruner.steps[0]
    assert one[:full] == two[:full]
    assert len(one) == len(two)


def test_the_figures_of_the_last_planned_epoch_stay() -> None:
    """Passes are rounded up to whole batches, so that the last ones go on beyond the plan."""
    pruner = Pruner(2000, batch_size=256, epochs=20, policy="ucb", fraction=0.3)
    assert pruner.total_steps == 120 and sum(pruner.steps) == 104
    loader = DataLoader(pruner.indexed(make_data(2000)), 256, sampler=pruner.sampler())
    told = []
    for epoch in range(20):
        for _ in run(pruner, loader, range(epoch, epoch + 1)):
            pass
        told.append(pruner.figures())
    assert not told[0], "a pass is shorter than the plan's first epoch"
    assert all(figures["kept_share"] > 0 for figures in told[1:])
    assert told[-1].keys() == told[-2].keys() and told[-1]["kept_share"] == 7 * 256 / 2000


def test_a_schedule_over_total_steps_ends_exactly() -> None:
    pruner = make_pruner()
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=pruner.total_steps)
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler())
    rates = []
    for _ in run(pruner, loader):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < pruner.total_steps:
            schedule.step()
    assert len(rates) == pruner.total_steps and rates[-1] == min(rates)
    with pytest.raises(ValueError, match="total"):
        schedule.step()
        schedule.step()


# --- losses


def test_view_major_losses_are_averaged_over_views() -> None:
    pruner, other = make_pruner(batch_size=3), make_pruner(batch_size=3)
    assert next(iter(pruner.sampler())) == next(iter(other.sampler()))
    index = pruner.batches(0)[0]
    loss = torch.tensor([1.0, 2.0, 3.0, 5.0, 6.0, 7.0], requires_grad=True)  # three samples, twice
    mean = pruner.update(index, loss)
    mean.backward()
    assert mean.item() == 4.0 and torch.equal(loss.grad, torch.full((6,), 1 / 6))  # type: ignore[arg-type]
    other.update(index, torch.tensor([3.0, 4.0, 5.0]))
    for name, column in pruner.table().items():
        assert torch.equal(column, other.table()[name]), name
    assert pruner.table()["loss"][index].tolist() == [3.0, 4.0, 5.0]
    assert not pruner.table()["loss"].requires_grad


def test_infobatchs_weighted_mean_is_unbiased() -> None:
    """InfoBatch trains on few of the easy samples and weighs them up: over many draws of an epoch, the sum of
    weighted losses is that of all samples.
    """
    samples, batch = 400, 20
    losses = torch.linspace(0, 1, samples) ** 2
    sums = []
    for seed in range(200):
        pruner = make_pruner(
            samples, batch_size=batch, policy="infobatch", epochs=4, anneal_fraction=0, seed=seed
        )
        loader: DataLoader[Any] = DataLoader(
            pruner.indexed(TensorDataset(losses)), batch, sampler=pruner.sampler()
        )
        taken: list[Tensor] = []
        while pruner.step < pruner.steps[0] + pruner.steps[1]:
            for loss, index in loader:
                taken.append(pruner.update(index, loss) * len(index))
                if pruner.step == pruner.steps[0] + pruner.steps[1]:
                    break
        assert torch.stack(taken[: pruner.steps[0]]).sum().item() == pytest.approx(
            losses.sum().item(), rel=1e-5
        )
        sums.append(torch.stack(taken[pruner.steps[0] :]).sum())
    drawn = torch.stack(sums)
    error = drawn.std() / len(drawn) ** 0.5
    assert (drawn.mean() - losses.sum()).abs() < 4 * error < 0.05 * losses.sum()


@pytest.mark.parametrize(
    ("index", "loss", "words"),
    [
        ([1, 2, 3], torch.tensor(0.5), "reduction"),
        ([1, 2, 3], torch.tensor([0.5, 1.0]), "2"),
        ([1, 2, 3], torch.tensor([0.5] * 4), "4"),
        ([1, 2, SAMPLES], torch.tensor([0.5] * 3), str(SAMPLES)),
        ([1, 2, -1], torch.tensor([0.5] * 3), "-1"),
    ],
)
def test_losses_that_are_refused(index: list[Any], loss: Tensor, words: str) -> None:
    pruner = make_pruner()
    next(iter(pruner.sampler()))
    assert words in refused(lambda: pruner.update(torch.tensor(index), loss))
    assert "float32" in refused(lambda: pruner.update(torch.rand(3), torch.rand(3)), TypeError)
    values, row = torch.rand(BATCH), pruner.batches(0)[0]
    no_index: Any
    for no_index in (None, {"index": 1}, ["a"], torch.zeros(BATCH, device="meta", dtype=torch.int64)):
        assert "index" in refused(partial(pruner.update, no_index, values), TypeError)
    no_loss: Any
    for no_loss in (0.5, values.tolist(), values.numpy(), torch.ones(BATCH, dtype=torch.int64)):
        assert "loss is" in refused(partial(pruner.update, row, no_loss), TypeError)
        assert "memory is" in refused(partial(pruner.update, row, values, no_loss), TypeError)
    assert pruner.step == 0 and not pruner.table()["times_trained"].any(), "nothing was noted"


@pytest.mark.parametrize("kind", [list, np.array, "uint8", "uint16", "int32"])
def test_an_index_may_be_a_list_an_array_or_small_integers(kind: Any) -> None:
    pruner = make_pruner()
    row = next(iter(BatchSampler(pruner.sampler(), BATCH, drop_last=True)))
    index = torch.tensor(row, dtype=getattr(torch, kind)) if isinstance(kind, str) else kind(row)
    pruner.update(index, torch.arange(8.0))
    assert pruner.table()["loss"][row].tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_of_any_precision_are_kept_detached(dtype: torch.dtype) -> None:
    pruner = make_pruner(policy="emp")
    row = next(iter(BatchSampler(pruner.sampler(), BATCH, drop_last=True)))
    loss = torch.arange(8.0).to(dtype).requires_grad_()
    assert pruner.update(torch.tensor(row), loss, loss * 2).requires_grad
    table = pruner.table()
    assert table["loss"][row].tolist() == list(range(8)) and not table["memory"].requires_grad


@pytest.mark.parametrize("name", ["emp", "distance"])
def test_policies_that_need_the_memory_term_say_so(name: str) -> None:
    pruner = make_pruner(policy=name, batch_size=2)
    first, second, index = pruner.batches(0)[:3]
    loss = torch.tensor([0.5, 0.7])
    assert "memory" in refused(lambda: pruner.update(first, loss))
    pruner.update(first, loss, closeness(torch.randn(2, 4), torch.randn(2, 4)))
    pruner.update(second, loss, entropy(torch.randn(2, 3)))
    assert "memory" in refused(lambda: pruner.update(index, loss, torch.tensor(1.0)))


def test_the_memory_terms() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    probabilities = logits.detach().double().softmax(1)
    assert entropy(logits).double().tolist() == pytest.approx(
        (-(probabilities * probabilities.log()).sum(1)).tolist(), rel=1e-5
    )
    a, b = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    assert closeness(a, b).tolist() == pytest.approx(
        [-(x - y).norm().item() for x, y in zip(a, b, strict=True)]
    )
    assert not entropy(logits).requires_grad and not closeness(a, b).requires_grad


# --- data


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES))


def test_data_that_is_refused() -> None:
    assert "IterableDataset" in refused(lambda: make_pruner().indexed(Stream()), TypeError)
    assert "69" in refused(lambda: make_pruner().indexed(make_data(69)))
    assert "70" in refused(lambda: make_pruner().indexed(make_data(69)))


def test_an_indexed_dataset_holds_no_pruner() -> None:
    """It is pickled to every worker: the kept list and scores stay in the main process."""
    small = len(pickle.dumps(make_pruner().indexed(make_data())))
    assert small - len(pickle.dumps(make_data())) < 1000


# --- resume


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("foresight", "indices")])
def test_state_goes_through_a_file_of_plain_types(tmp_path: Path, name: str) -> None:
    """Within a pruned epoch, for every policy."""
    memory = torch.linspace(0, 1, SAMPLES)

    def part(pruner: Pruner, until: int) -> list[list[int]]:
        loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler())
        seen: list[list[int]] = []
        for epoch in range(pruner.step // pruner.steps_per_epoch, EPOCHS):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for _, _, index in loader:
                if pruner.step == until:
                    return seen
                seen.append(index.tolist())
                pruner.update(index, losses_of(index, pruner.step), memory[index])
        return seen

    first, whole = make_pruner(policy=name), make_pruner(policy=name)
    until = first.steps[0] + 2
    begun = part(first, until)
    torch.save(first.state_dict(), tmp_path / "pruner.pt")
    second = make_pruner(policy=name)
    second.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    assert second.step == until
    assert begun + part(second, -1) == part(whole, -1)
    for column, values in second.table().items():
        assert torch.equal(values, whole.table()[column]), column


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def train(file: Path, until: int = -1, **loading: Any) -> tuple[list[list[int]], Tensor]:
    """A plain loop that saves after every step and goes on from its file; the batches, and the weights."""
    pruner, net = make_pruner(policy="emp"), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if file.exists():
        state = torch.load(file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
    sampler = pruner.sampler()
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=sampler, **loading)
    batches: list[list[int]] = []
    for epoch in range(pruner.step // pruner.steps_per_epoch, pruner.epochs):
        sampler.set_epoch(epoch)
        for x, y, index in loader:
            if pruner.step == until:
                return batches, net.first.weight
            logits = net(x)
            loss = pruner.update(index, F.cross_entropy(logits, y, reduction="none"), entropy(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batches.append(index.tolist())
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"pruner": pruner.state_dict()}, file)
    return batches, net.first.weight


@pytest.mark.parametrize(
    "loading", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4}]
)
def test_resume_within_an_epoch_is_bit_identical(tmp_path: Path, loading: dict[str, Any]) -> None:
    batches, weight = train(tmp_path / "whole.pt", **loading)
    steps = (1, 7, 9, 13, 22, 40) if not loading else (9, 13)
    for until in steps:
        file = tmp_path / f"{until}.pt"
        begun, _ = train(file, until, **loading)
        rest, weight_of_both = train(file, **loading)
        assert len(begun) == until and begun + rest == batches, until
        assert torch.equal(weight, weight_of_both), until


def test_resumed_again_and_again(tmp_path: Path) -> None:
    batches, weight = train(tmp_path / "whole.pt")
    seen: list[list[int]] = []
    for until in (*range(3, len(batches), 3), -1):
        more, last = train(tmp_path / "parts.pt", until)
        seen += more
    assert seen == batches and torch.equal(weight, last)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"samples": 80}, "80"),
        ({"policy": "random"}, "policy"),
        ({"fraction": 0.3}, "fraction"),
        ({"epochs": 9}, "epochs"),
        ({"batch_size": 4}, "batch_size"),
        ({"seed": 4}, "seed"),
    ],
)
def test_a_state_of_another_plan_is_refused(other: dict[str, Any], words: str) -> None:
    pruner = make_pruner()
    list(run(pruner, DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler()), until=10))
    second = make_pruner(**other)
    assert words in refused(lambda: second.load_state_dict(pruner.state_dict()))
    assert second.step == 0


def test_a_state_that_is_none_is_refused() -> None:
    state: Any
    for state in (None, [1]):
        assert "pruner: the state is of type" in refused(partial(make_pruner().load_state_dict, state))
    state = make_pruner().state_dict()
    for broken in ({}, {"scores": [1, 2]}, {name: state[name] for name in list(state)[1:]}):
        refused(lambda broken=broken: make_pruner().load_state_dict(broken))  # type: ignore[misc]


# --- policies by name and by object


def test_a_policy_is_a_name_or_an_object() -> None:
    for name, kind in POLICIES.items():
        if name in ("foresight", "indices"):  # these need more than a name
            continue
        policy = kind()
        assert isinstance(policy, Policy)
        assert make_pruner(policy=policy).steps == make_pruner(policy=name).steps
    assert "emp" in refused(lambda: make_pruner(policy="epm"))
    assert "covariates" in refused(lambda: make_pruner(policy="foresight"))
    for none in (None, Emp, 3):
        assert "give a name or an object" in refused(partial(make_pruner, policy=none), TypeError)


def test_a_fixed_subset_that_does_not_suffice_is_refused_before_the_first_epoch() -> None:
    for index, words in (
        (torch.arange(5), "names 5 samples, and a pruned epoch needs"),
        (torch.arange(SAMPLES + 1), "beyond 0 to 69"),
        (torch.arange(SAMPLES) // 2, "names a sample twice"),
        (torch.rand(SAMPLES), "float32"),
    ):
        policy = Indices(index=index)
        assert words in refused(partial(make_pruner, policy=policy, rounds_per_epoch=2))


def test_arguments_may_be_numpys_numbers_and_the_state_stays_plain(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": np.int64(BATCH), "epochs": np.int32(EPOCHS), "seed": np.uint8(3)}
    samples: Any = np.int64(SAMPLES)
    pruner = make_pruner(samples, **options, fraction=np.float32(0.5), anneal_fraction=np.float64(0.25))
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    make_pruner().load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    for name in ("samples", "batch_size", "epochs", "seed", "warmup_epochs", "rounds_per_epoch"):
        options = {name: 2.0}
        assert f"{name} is 2.0" in refused(partial(make_pruner, **options), TypeError)


# --- accelerate


def test_accelerate_does_not_shard_twice() -> None:
    accelerate = pytest.importorskip("accelerate")
    pruner, other = make_pruner(), make_pruner()
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data()), BATCH, sampler=pruner.sampler(1, 0))
    prepared = accelerate.Accelerator(cpu=True).prepare(loader)
    assert len(prepared) * EPOCHS == pruner.total_steps
    seen = []
    for _ in range(EPOCHS):
        for batch in prepared:
            seen.append(batch[-1].tolist())
            pruner.update(batch[-1], losses_of(batch[-1], pruner.step))
    plain: DataLoader[Any] = DataLoader(other.indexed(make_data()), BATCH, sampler=other.sampler())
    assert [len(batch) for batch in seen] == [BATCH] * pruner.total_steps
    assert seen[: pruner.steps[0]] == list(run(other, plain))[: pruner.steps[0]]

    # two processes: each takes every second batch, half as large, of the one order
    batches = BatchSampler(make_pruner().sampler(1, 0), BATCH // 2, drop_last=True)
    shards = [
        list(accelerate.data_loader.BatchSamplerShard(batches, num_processes=2, process_index=rank))
        for rank in (0, 1)
    ]
    assert [one + other for one, other in zip(*shards, strict=True)] == seen[: pruner.steps_per_epoch]


# --- figures


def test_figures_are_of_the_last_finished_epoch_wherever_they_are_asked_for() -> None:
    """A pass of the sampler ends within an epoch of the plan, some samples of which were trained on twice."""
    labels = torch.arange(400) % 2
    pruner = make_pruner(400, batch_size=20, policy="random", epochs=6)
    loader: DataLoader[Any] = DataLoader(pruner.indexed(make_data(400)), 20, sampler=pruner.sampler())
    ends = [sum(pruner.steps[: epoch + 1]) for epoch in range(EPOCHS - 2)]
    at_end, compared = pruner.figures(), 0
    assert at_end == {}, "no epoch is finished"
    for _ in run(pruner, loader):  # goes on within the epoch, a batch before `update`
        found = pruner.figures(labels)
        if pruner.step in ends:
            at_end = found
        for name in ("kept_share", "kept_overlap", "class_ratio_min", "class_ratio_max"):
            assert found.get(name) == at_end.get(name), (pruner.step, name)
        compared += "kept_overlap" in found and pruner.step not in ends
    assert compared > 20
