"""k-nearest-neighbour classification by cosine similarity, for many k in one search: no training, no tuning.

Protocols: weighted votes as in Wu et al. 2018, Unsupervised feature learning via non-parametric instance
discrimination (section 3.4); plain majority without a temperature.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from linear_eval.features import EvalError, Features, check_splits
from linear_eval.numeric import ieee_matmul

Backend = Literal["auto", "faiss", "torch"]
# (Q, D), k -> similarities (Q, k) descending, bank rows (Q, k)
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]

TIE = 1e-6  # cosine similarities closer than this may be ordered differently by two float32 matmuls
# where all neighbours found are this similar, rounding in float32 may have hidden nearer ones
NARROW = 1e-4
SPARE = 16  # neighbours found beyond the k-th, so that a tie at the cut is settled among a few
EXACT = 1e-14  # float64 cosines closer than this share of the bank's spread count as equal
CHUNK_ELEMENTS = 2**27  # float32 similarities held at once: 512 MiB


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    num_neighbors: int,
    temperature: float | None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> float:
    """Share of test rows (0..1) whose neighbours vote for their label; arguments as for `knn_predictions`.

    A test class that does not occur in `train` cannot be predicted and counts as wrong.
    """
    return knn_accuracies(
        train, test, num_neighbors=[num_neighbors], temperature=temperature, backend=backend, device=device
    )[num_neighbors]


def knn_accuracies(
    train: Features,
    test: Features,
    *,
    num_neighbors: Sequence[int],
    temperature: float | None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> dict[int, float]:
    """`knn_accuracy` for every k of `num_neighbors`, from one search."""
    predicted = knn_predictions(
        train, test, num_neighbors=num_neighbors, temperature=temperature, backend=backend, device=device
    )
    return {k: (labels == test.y).double().mean().item() for k, labels in predicted.items()}


def knn_predict(
    train: Features,
    test: Features,
    *,
    num_neighbors: int,
    temperature: float | None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> Tensor:
    """Labels (N_test,) int64 for one k; arguments as for `knn_predictions`."""
    return knn_predictions(
        train, test, num_neighbors=[num_neighbors], temperature=temperature, backend=backend, device=device
    )[num_neighbors]


def knn_predictions(
    train: Features,
    test: Features,
    *,
    num_neighbors: Sequence[int],
    temperature: float | None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> dict[int, Tensor]:
    """Labels (N_test,) int64 voted by the k nearest train rows, for every k of `num_neighbors`; one search.

    The answer is the same for every backend, and for k alone or among others: equally similar neighbours
    enter in the order of their row number, equal votes go to the lowest class id. Where the neighbours of a
    row are all nearly as similar as each other (features with a large common offset, or a collapsed encoder),
    they are found in float64, on the CPU: slower.

    Args:
        num_neighbors: how many train rows vote, each 1..N_train.
        temperature: > 0: a vote weighs exp(cosine / temperature), the smaller, the more the nearest row
            decides. None: all votes weigh the same.
        backend: "faiss" (exact flat index), "torch" (chunked matmul and topk), "auto" takes torch on a
            GPU, elsewhere faiss where it can be imported.
        device: where the search runs; faiss searches on the CPU where it was built without that GPU.

    Raises:
        EvalError: a value out of range, features that are empty, not finite, of different width or all
            zero in a row, faiss asked for but not installed.
    """
    check_splits(train, test)
    if not num_neighbors:
        raise EvalError("num_neighbors is empty", "give at least one number of neighbours, e.g. 20")
    for k in num_neighbors:
        if not 1 <= k <= len(train.x):
            fix = f"choose 1 <= num_neighbors <= {len(train.x)}"
            raise EvalError(f"num_neighbors is {k}, the train split has {len(train.x)} images", fix)
    if temperature is not None and not 0 < temperature < float("inf"):
        raise EvalError(f"temperature is {temperature}", "choose a temperature > 0, e.g. 0.1")

    bank, queries = _unit_rows(train.x, "train"), _unit_rows(test.x, "test")
    classes, bank_class = train.y.unique(return_inverse=True)  # (C,) ascending, (N,) index into it
    search = _make_search(bank, backend, torch.device(device))
    answers: dict[int, list[Tensor]] = {k: [] for k in num_neighbors}
    size = max(1, min(4096, CHUNK_ELEMENTS // len(bank)))
    for chunk, raw_chunk in zip(queries.split(size), test.x.split(size), strict=True):
        # similarities and rows, (Q, k + SPARE) each
        found = search(chunk, min(max(num_neighbors) + SPARE, len(bank)))
        for k, predicted in answers.items():
            below, index, tie = _settle(
                found[0][:, : k + SPARE], found[1][:, : k + SPARE], bank, chunk, train.x, raw_chunk, k
            )
            votes = torch.zeros(len(chunk), len(classes), dtype=torch.float64)
            if temperature is None:
                votes.scatter_add_(1, bank_class[index], torch.ones_like(below))  # (Q, C)
                winning = votes == votes.amax(dim=1, keepdim=True)
            else:
                # The nearest row weighs 1: the same vote as exp(similarity / temperature), but it cannot
                # overflow.
                weight = (below / temperature).exp()  # (Q, k)
                votes.scatter_add_(1, bank_class[index], weight)  # (Q, C)
                # Votes that differ by less than the similarities can tell apart are equal.
                winning = votes >= votes.amax(dim=1, keepdim=True) * (1 - (tie / temperature).clamp(max=0.01))
            predicted.append(classes[winning.byte().argmax(dim=1)])  # argmax: first of equal values
    return {k: torch.cat(predicted) for k, predicted in answers.items()}


def _unit_rows(x: Tensor, name: str) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if ((norm > 1e-15) & (norm < 1e15)).all():
        return x / norm
    # the squares of tiny or huge features leave float32: scale them first
    largest = x.abs().amax(dim=1, keepdim=True)
    zeros = int((largest == 0).sum())
    if zeros:
        what = f"{zeros} of {len(x)} {name} features are all zero, their cosine similarity is undefined"
        raise EvalError(what, "leave these images out (all black?) or use another encoder")
    x = x / largest
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def exact_cosines(queries: Tensor, bank: Tensor) -> tuple[Tensor, float]:
    """Similarity of rows (Q, D) to rows (N, D), to order the latter: (Q, N) float64, and its rounding step.

    Cosines, less the query's with the mean direction of the bank. So neither loses digits where a common
    offset makes all cosines nearly 1, and equal rows of the bank give equal numbers. Zeros: cosine 0.
    """
    queries = _unit_rows_exactly(queries)
    parts = bank.split(65536)
    # (D,)
    centre = torch.stack([_unit_rows_exactly(part).sum(dim=0) for part in parts]).sum(dim=0) / len(bank)
    found, reach = [], 1e-300
    for part in parts:
        centred = _unit_rows_exactly(part) - centre
        reach = max(reach, torch.linalg.vector_norm(centred, dim=1).max().item())
        found.append(queries @ centred.T)
    step = EXACT * reach
    return (torch.cat(found, dim=1) / step).round() * step, step


def _unit_rows_exactly(x: Tensor) -> Tensor:
    x = x.detach().cpu().double()  # float64: squares of large float32 numbers do not overflow
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-300)


def _settle(
    similarity: Tensor,
    index: Tensor,
    bank: Tensor,
    queries: Tensor,
    raw_bank: Tensor,
    raw_queries: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first k of the rows found, and what can be told of them.

    Args:
        similarity, index: (Q, k + SPARE), as found. bank, queries: of length 1; raw_...: as given.

    Returns:
        (Q, k) float64, how much less similar than the nearest; (Q, k) rows; (Q, 1), least true difference.
    """
    narrow = similarity[:, 0] - similarity[:, -1] < NARROW  # (Q,)
    similarity, index = _settle_cut(similarity, index, bank, queries, k, ~narrow)
    below = (similarity - similarity[:, :1]).double()
    tie = torch.full((len(below), 1), TIE, dtype=torch.float64)
    if narrow.any():
        index = index.clone()  # the caller's tensor serves every k
        for rows in narrow.nonzero().squeeze(1).split(max(1, CHUNK_ELEMENTS // 8 // len(bank))):
            exact, tie[rows] = exact_cosines(raw_queries[rows], raw_bank)  # (R, N)
            index[rows] = exact.argsort(dim=1, descending=True, stable=True)[:, :k]
            below[rows] = exact.gather(1, index[rows]) - exact.gather(1, index[rows, :1])
    return below, index, tie


def _settle_cut(
    similarity: Tensor, index: Tensor, bank: Tensor, queries: Tensor, k: int, among: Tensor
) -> tuple[Tensor, Tensor]:
    """The first k of the rows found; ties (nearly) at the cut are decided exactly: lowest row first.

    among: (Q,) bool, the queries that this is done for.
    """
    if k == len(bank):
        return similarity, index
    tied = ((similarity[:, k - 1] - similarity[:, k] < TIE) & among).nonzero().squeeze(1)
    # all candidates for the first k rows are among those found
    complete = similarity[tied, k - 1] - similarity[tied, -1] >= TIE
    few, many = (tied, tied[:0]) if index.shape[1] == len(bank) else (tied[complete], tied[~complete])
    found = index
    similarity, index = similarity[:, :k].clone(), index[:, :k].clone()
    for rows in few.split(max(1, CHUNK_ELEMENTS // 4 // found.shape[1] // bank.shape[1])):
        candidates = found[rows].sort(dim=1).values  # (R, k + SPARE), lowest row first
        exact = (bank[candidates].double() @ queries[rows].double().unsqueeze(2)).squeeze(2)
        similarity[rows], order = _first_k(exact, k)
        index[rows] = candidates.gather(1, order)
    for rows in many.split(max(1, CHUNK_ELEMENTS // 4 // len(bank))) if len(many) else ():
        # (R, N)
        exact = torch.cat([queries[rows].double() @ part.double().T for part in bank.split(65536)], dim=1)
        similarity[rows], index[rows] = _first_k(exact, k)
    return similarity, index


def _first_k(exact: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = exact.round(decimals=9).argsort(dim=1, descending=True, stable=True)[:, :k]
    return exact.gather(1, order).float(), order


def _make_search(bank: Tensor, backend: Backend, device: torch.device) -> Search:
    if backend not in ("auto", "faiss", "torch"):
        raise EvalError(f"backend is {backend!r}", "choose auto, faiss or torch")
    # On GPUs torch's matmul and topk are at least as fast as an index (faiss issue 3621), and k has no limit.
    faiss = None if backend == "torch" or (backend == "auto" and device.type != "cpu") else import_faiss()
    if faiss is not None:
        return _faiss_search(faiss, bank, device)
    if backend == "faiss":
        fix = "pip install faiss-cpu (or faiss-gpu on Linux), or choose the torch backend"
        raise EvalError("backend is 'faiss', but faiss cannot be imported", fix)
    return _torch_search(bank, device)


def import_faiss() -> ModuleType | None:
    """The module; None where it is not installed, or does not load."""
    try:
        import faiss
    # a library that is missing (OSError), one built for another numpy (AttributeError, ValueError), ...
    except Exception:
        return None
    return faiss


def _faiss_search(faiss: ModuleType, bank: Tensor, device: torch.device) -> Search:
    on_gpu = None
    if device.type == "cuda" and faiss.get_num_gpus() > 0:
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(64 * 2**20)  # bytes; the default takes 1.5 GB beside torch's allocator
        config = faiss.GpuIndexFlatConfig()
        config.device = torch.cuda.current_device() if device.index is None else device.index
        with suppress(RuntimeError, MemoryError):  # the GPU is full: the CPU gives the same answer
            index = faiss.GpuIndexFlatIP(resources, bank.shape[1], config)
            index.add(bank.numpy())
            on_gpu = index  # set last: an index that was not filled would answer too

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        answer = None
        if on_gpu is not None:
            with suppress(RuntimeError, MemoryError):  # the GPU is full, or k is beyond its limit of 2048
                answer = on_gpu.search(queries.numpy(), k)
        if answer is None:  # brute force: an index would copy the bank
            answer = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        similarity, rows = map(torch.from_numpy, answer)
        return similarity, rows

    return search


def _torch_search(bank: Tensor, device: torch.device) -> Search:
    columns = bank.to(device).T  # (D, N)

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with ieee_matmul():
            similarity, rows = (queries.to(device) @ columns).topk(k, dim=1)
        return similarity.cpu(), rows.cpu()

    return search
