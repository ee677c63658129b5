"""kNN evaluation: 10,000 queries against 50,000 x 512 features, k = 200, against faiss's flat index alone.

    python -m benchmarks.knn

`ours` is the whole of `knn_accuracy`: checks, normalisation, search, exact settlement of ties, votes. `faiss`
only adds the (already normalised) bank to an IndexFlatIP and searches; `lightly` is its `knn_predict`, query
chunks of 1,000.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import common
from benchmarks.common import Ratio
from linear_eval import Features, knn_accuracy

NEIGHBORS, TEMPERATURE, CLASSES = 200, 0.1, 10


def main(argv: list[str] | None = None) -> None:
    arguments = common.parse(common.parser("kNN evaluation against faiss alone."), argv)
    num_bank, num_queries, dim = (1000, 300, 32) if arguments.quick else (50_000, 10_000, 512)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, dim, generator=generator)

    def features(count: int) -> Features:
        y = torch.randint(CLASSES, (count,), generator=generator)
        return Features(centres[y] + 3 * torch.randn(count, dim, generator=generator), y)

    train, test = features(num_bank), features(num_queries)
    bank, queries = F.normalize(train.x), F.normalize(test.x)

    def ours() -> None:
        knn_accuracy(train, test, num_neighbors=NEIGHBORS, temperature=TEMPERATURE)

    def faiss_alone() -> None:
        import faiss

        index: Any = faiss.IndexFlatIP(dim)
        if faiss.get_num_gpus():
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(bank.numpy())
        index.search(queries.numpy(), NEIGHBORS)

    def lightly() -> None:
        from lightly.utils.benchmarking import knn_predict

        columns, labels = bank.T.contiguous().to(arguments.device), train.y.to(arguments.device)
        for chunk in queries.to(arguments.device).split(1000):
            knn_predict(chunk, columns, labels, CLASSES, NEIGHBORS, TEMPERATURE)

    contenders = {"faiss": faiss_alone, "lightly": lightly, "ours": ours}
    ours()  # imports
    figures = common.interleave(
        {name: partial(common.seconds, work) for name, work in contenders.items()}, arguments.repeats
    )
    ratios = [Ratio("faiss", "ours", goal=1.0), Ratio("lightly", "ours")]
    cases = {
        f"{num_queries:,} queries, {num_bank:,} x {dim}, k = {NEIGHBORS}": common.summary(
            figures, ratios, "seconds"
        )
    }
    common.write("knn", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
