"""Weighted k-nearest-neighbour classification by cosine similarity: no training, no tuning.

Protocol: Wu et al. 2018, Unsupervised feature learning via non-parametric instance discrimination (section 3.4).
"""

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from linear_eval.features import EvalError, Features, check_splits

Backend = Literal["auto", "faiss", "torch"]
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (Q, D), k -> similarities (Q, k) descending, bank rows (Q, k)

TIE = 1e-6  # cosine similarities closer than this may be ordered differently by two float32 matmuls
SPARE = 16  # neighbours found beyond the k-th, so that a tie at the cut is settled among a few
CHUNK_ELEMENTS = 2**27  # float32 similarities held at once: 512 MiB


def knn_accuracy(train: Features, test: Features, *, num_neighbors: int, temperature: float, backend: Backend = "auto") -> float:
    """Share of the test rows (0..1) whose weighted neighbour vote is their label; arguments as for `knn_predict`.

    A test class that does not occur in `train` cannot be predicted and counts as wrong.
    """
    predicted = knn_predict(train, test, num_neighbors=num_neighbors, temperature=temperature, backend=backend)
    return (predicted == test.y).double().mean().item()


def knn_predict(train: Features, test: Features, *, num_neighbors: int, temperature: float, backend: Backend = "auto") -> Tensor:
    """Labels (N_test,) int64 voted by each test row's nearest train rows, a vote weighing exp(cosine / temperature).

    The answer is the same for every backend: equally similar neighbours enter in the order of their row number, equal
    votes go to the lowest class id.

    Args:
        num_neighbors: how many train rows vote, 1..N_train.
        temperature: > 0; the smaller, the more the nearest row decides.
        backend: "faiss" (exact flat index, on the GPU if faiss sees one), "torch" (chunked matmul and topk, likewise),
            "auto" takes faiss where it can be imported.

    Raises:
        EvalError: a value out of range, features that are empty, not finite, of different width or all zero in a row,
            faiss asked for but not installed.
    """
    check_splits(train, test)
    if not 1 <= num_neighbors <= len(train.x):
        raise EvalError(
            f"num_neighbors is {num_neighbors}, the train split has {len(train.x)} images",
            f"choose 1 <= num_neighbors <= {len(train.x)}",
        )
    if not 0 < temperature < float("inf"):
        raise EvalError(f"temperature is {temperature}", "choose a temperature > 0, e.g. 0.1")

    bank, queries = _unit_rows(train.x, "train"), _unit_rows(test.x, "test")
    classes, bank_class = train.y.unique(return_inverse=True)  # (C,) ascending, (N,) index into it
    search = _make_search(bank, backend)
    answers = []
    for chunk in queries.split(max(1, min(4096, CHUNK_ELEMENTS // len(bank)))):
        similarity, index = _nearest(search, bank, chunk, num_neighbors)  # (Q, k) each
        # The nearest row weighs 1: the same vote as exp(similarity / temperature), but it cannot overflow.
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()  # (Q, k)
        votes = torch.zeros(len(chunk), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, bank_class[index], weight)  # (Q, C)
        # Votes that differ by less than float32 similarities can tell apart are equal.
        winning = votes >= votes.amax(dim=1, keepdim=True) * (1 - min(0.01, TIE / temperature))
        answers.append(classes[winning.int().argmax(dim=1)])  # argmax: first of equal values
    return torch.cat(answers)


def _unit_rows(x: Tensor, name: str) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if ((norm > 1e-15) & (norm < 1e15)).all():
        return x / norm
    largest = x.abs().amax(dim=1, keepdim=True)  # the squares of tiny or huge features leave float32: scale them first
    zeros = int((largest == 0).sum())
    if zeros:
        raise EvalError(
            f"{zeros} of {len(x)} {name} features are all zero, their cosine similarity is undefined",
            "leave these images out (all black?) or use another encoder",
        )
    x = x / largest
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def _nearest(search: Search, bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows. Where the cut falls between (nearly) equal ones, it is settled exactly: lowest row first."""
    similarity, index = search(queries, min(k + SPARE, len(bank)))
    if k == len(bank):
        return similarity, index
    tied = (similarity[:, k - 1] - similarity[:, k] < TIE).nonzero().squeeze(1)
    complete = similarity[tied, k - 1] - similarity[tied, -1] >= TIE  # every row that may come in is among the ones found
    few, many = (tied, tied[:0]) if index.shape[1] == len(bank) else (tied[complete], tied[~complete])
    found = index
    similarity, index = similarity[:, :k].clone(), index[:, :k].clone()
    for rows in few.split(max(1, CHUNK_ELEMENTS // 4 // found.shape[1] // bank.shape[1])):
        candidates = found[rows].sort(dim=1).values  # (R, k + SPARE), lowest row first
        exact = (bank[candidates].double() @ queries[rows].double().unsqueeze(2)).squeeze(2)
        similarity[rows], order = _first_k(exact, k)
        index[rows] = candidates.gather(1, order)
    for rows in many.split(max(1, CHUNK_ELEMENTS // 4 // len(bank))) if len(many) else ():
        exact = torch.cat([queries[rows].double() @ part.double().T for part in bank.split(65536)], dim=1)  # (R, N)
        similarity[rows], index[rows] = _first_k(exact, k)
    return similarity, index


def _first_k(exact: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = exact.round(decimals=9).argsort(dim=1, descending=True, stable=True)[:, :k]
    return exact.gather(1, order).float(), order


def _make_search(bank: Tensor, backend: Backend) -> Search:
    if backend not in ("auto", "faiss", "torch"):
        raise EvalError(f"backend is {backend!r}", "choose auto, faiss or torch")
    faiss = None if backend == "torch" else _import_faiss()
    if faiss is not None:
        return _faiss_search(faiss, bank)
    if backend == "faiss":
        raise EvalError(
            "backend is 'faiss', but faiss cannot be imported",
            "pip install faiss-cpu (or faiss-gpu on Linux), or choose the torch backend",
        )
    return _torch_search(bank)


def _import_faiss() -> ModuleType | None:
    try:
        import faiss
    except (ImportError, OSError):  # OSError: installed, but its shared library does not load
        return None
    return faiss


def _faiss_search(faiss: ModuleType, bank: Tensor) -> Search:
    on_gpu = None
    if faiss.get_num_gpus() > 0:
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(64 * 2**20)  # bytes; the default takes 1.5 GB beside torch's allocator
        with suppress(RuntimeError, MemoryError):  # the GPU is full: the CPU gives the same answer
            index = faiss.GpuIndexFlatIP(resources, bank.shape[1])
            index.add(bank.numpy())
            on_gpu = index  # only now: an index without its bank would answer too

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        answer = None
        if on_gpu is not None:
            with suppress(RuntimeError, MemoryError):  # the GPU is full, or k is beyond its limit of 2048
                answer = on_gpu.search(queries.numpy(), k)
        if answer is None:  # without an index: it would copy the bank
            answer = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        similarity, rows = map(torch.from_numpy, answer)
        return similarity, rows

    return search


def _torch_search(bank: Tensor) -> Search:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = bank.to(device).T  # (D, N)
    matmul = torch.backends.cuda.matmul

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        callers_precision = matmul.fp32_precision
        matmul.fp32_precision = "ieee"  # TF32, where the caller trains with it, is off by up to 1e-3: other neighbours
        try:
            similarity, rows = (queries.to(device) @ columns).topk(k, dim=1)
        finally:
            matmul.fp32_precision = callers_precision
        return similarity.cpu(), rows.cpu()

    return search
