"""Are the evaluators' numbers those of the libraries people quote? On an encoder and images of yours.

    python -m benchmarks.parity ENCODER --data DATA

Features of a pretrained encoder (a run, or an encoder directory) for 10,000 train images and the whole test
split. On these:

knn       cosine, k = 20, T = 0.1, by faiss and by torch, against lightly's `knn_predict` (the formula of Wu
et al. 2018 and of DINO);
          one vote a neighbour against scikit-learn's KNeighborsClassifier
logistic  our L-BFGS (float32) against scikit-learn's LogisticRegression (newton-cg, float64, tol 1e-8),
standardised features,
          l2 from 1e-6 to 1e5

Nothing is timed.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from linear_eval import Features, extract_features
from linear_eval.knn import knn_predict
from linear_eval.lbfgs import fit_logistic
from linear_eval.linear import SWEEP_TOLERANCE
from ssl_emp import load_encoder
from ssl_emp.data.images import load_images

NEIGHBORS, TEMPERATURE = 20, 0.1
L2 = (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e3, 1e5)


def knn_rows(train: Features, test: Features) -> list[dict[str, object]]:
    """Accuracy (percent) of ours and theirs, and the share (percent) of test images with the same label."""

    def ours(temperature: float | None, backend: str) -> Tensor:
        return knn_predict(train, test, num_neighbors=NEIGHBORS, temperature=temperature, backend=backend)  # type: ignore[arg-type]

    def lightly() -> Tensor:
        from lightly.utils.benchmarking import knn_predict as theirs

        bank, classes = F.normalize(train.x).T.contiguous(), int(train.y.max()) + 1
        chunks = F.normalize(test.x).split(1000)
        return torch.cat(
            [theirs(chunk, bank, train.y, classes, NEIGHBORS, TEMPERATURE)[:, 0] for chunk in chunks]
        )

    def sklearn() -> Tensor:
        from sklearn.neighbors import KNeighborsClassifier

        model = KNeighborsClassifier(NEIGHBORS, metric="cosine", algorithm="brute").fit(
            train.x.double(), train.y
        )
        return torch.as_tensor(model.predict(test.x.double()))

    def accuracy(predicted: Tensor) -> float:
        return round(100 * (predicted == test.y).double().mean().item(), 2)

    rows: list[dict[str, object]] = []
    references: list[tuple[str, Callable[[], Tensor], float | None]] = [
        ("lightly, weighted", lightly, TEMPERATURE),
        ("scikit-learn, one vote each", sklearn, None),
    ]
    for name, reference, temperature in references:
        theirs = reference()
        for backend in ("faiss", "torch"):
            mine = ours(temperature, backend)
            same = round(100 * (mine == theirs).double().mean().item(), 2)
            rows.append(
                {
                    "against": name,
                    "backend": backend,
                    "ours": accuracy(mine),
                    "theirs": accuracy(theirs),
                    "same label": same,
                }
            )
    return rows


def logistic_rows(train: Features, test: Features) -> list[dict[str, object]]:
    """For each l2: how much our objective exceeds theirs, as a share of it, and both accuracies (percent)."""
    from sklearn.linear_model import LogisticRegression

    num_classes = int(train.y.max()) + 1
    std, mean = torch.std_mean(train.x.double(), dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    z, z_test = (train.x.double() - mean) / std, (test.x.double() - mean) / std
    found = fit_logistic(
        train.x, train.y, num_classes, L2, standardize=True, max_iter=1000, tolerance=SWEEP_TOLERANCE
    )
    rows: list[dict[str, object]] = []
    for h, l2 in enumerate(L2):
        oracle = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000, solver="newton-cg").fit(z, train.y)
        weight, bias = torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_)
        best = F.cross_entropy(z @ weight.T + bias, train.y) + l2 / 2 / len(z) * weight.square().sum()
        own_weight, own_bias = found.weight[h].double(), found.bias[h].double()
        logits = (train.x.double() - found.center.double()) @ own_weight.T + own_bias
        reached = F.cross_entropy(logits, train.y) + l2 / 2 / len(z) * (own_weight * std).square().sum()
        mine, theirs = found.predict(test.x)[h], torch.as_tensor(oracle.predict(z_test))
        rows.append(
            {
                "l2": l2,
                "objective above theirs": float(f"{(reached / best - 1).item():.2g}"),
                "ours": round(100 * (mine == test.y).double().mean().item(), 2),
                "theirs": round(100 * (theirs == test.y).double().mean().item(), 2),
            }
        )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Parity of the evaluators with lightly and scikit-learn.")
    options.add_argument("encoder")
    options.add_argument("--data", required=True, help="a data.source with labels")
    options.add_argument("--max-images", type=int, default=10_000, help="of the train split (default 10000)")
    arguments = common.parse(options, argv)
    encoder = load_encoder(arguments.encoder)
    splits = []
    for split, most in (("train", arguments.max_images), ("test", None)):
        images = load_images(arguments.data, split, image_size=encoder.image_size, max_images=most)
        splits.append(
            extract_features(encoder, images.pixels, images.labels, batch_size=256, device=arguments.device)
        )
    train, test = splits
    shapes = {"train": list(train.x.shape), "test": list(test.x.shape)}
    result = {
        "benchmark": "parity",
        **shapes,
        "knn": knn_rows(train, test),
        "logistic": logistic_rows(train, test),
    }
    print(table(result["knn"]), table(result["logistic"]), sep="\n\n")  # type: ignore[arg-type]
    out = (
        Path(arguments.out) if arguments.out else None if arguments.quick else common.RESULTS / "parity.json"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps(result | {"environment": common.environment(arguments.device)}, indent=2) + "\n"
        )
        print(out)


if __name__ == "__main__":
    common.run(main)
