"""Linear probes and kNN on cached features, 10,000 x 512, against scikit-learn, one head and lightly.

    python -m benchmarks.evaluation

Features are class means plus noise of a falling spectrum, rectified; 2,000 more rows are the validation
split.

sweep   45 values of l2, 1e-6..1e5. `sklearn`: LogisticRegression with its defaults (lbfgs, tol 1e-4, at most
100 iterations, where
        it is far from the optimum for weak l2) on float32, for each value; `sklearn_warm`: the same from the
        strongest down, each from the last one's end (warm_start). The payload compares objectives and
        accuracies: ours must be no worse for any l2.
heads   50 heads (10 learning rates x 5 weight decays) against one, the same code; `torch_loop` is one head as
usually written: a
        DataLoader over a TensorDataset, nn.Linear, torch.optim.SGD, a cosine schedule.
knn     k = 1, 5, 10, 20, 50, 100, 200 in one pass against lightly's `knn_predict` for each k, query chunks of
1,000.
"""

import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Ratio
from linear_eval import Features
from linear_eval.knn import knn_predictions
from linear_eval.lbfgs import fit_logistic
from linear_eval.linear import L2_GRID, LEARNING_RATES, SWEEP_TOLERANCE, WEIGHT_DECAYS, train_heads

NEIGHBORS, TEMPERATURE = (1, 5, 10, 20, 50, 100, 200), 0.1
EPOCHS = 5  # of SGD: the ratio does not depend on how many
SPREAD = {10: 6.5, 100: 4.0}  # both give 78 % validation accuracy at the best l2


def main(argv: list[str] | None = None) -> None:
    arguments = common.parse(
        common.parser("Linear probes and kNN against scikit-learn, one head and lightly."), argv
    )
    num, dim = (600, 32) if arguments.quick else (10_000, 512)
    cases, parity = {}, {}
    for num_classes in (10,) if arguments.quick else (10, 100):
        train, val = make_features(num, num // 5, dim, num_classes, SPREAD[num_classes])
        about = f"{num:,} x {dim}, C = {num_classes}"
        sweep, parity[about] = sweep_contenders(train, val, num_classes, arguments.device)
        heads = head_contenders(train, num_classes, arguments.device)
        knn = knn_contenders(train, val, num_classes, arguments.device)
        ratios = {
            "sweep": [Ratio("sklearn", "ours", goal=4.0), Ratio("sklearn_warm", "ours")],
            "heads": [Ratio("ours_50", "ours_1", goal=3.0, at_most=True), Ratio("ours_50", "torch_loop")],
            "knn": [Ratio("lightly", "ours", goal=5.0)],
        }
        for name, contenders in (("sweep", sweep), ("heads", heads), ("knn", knn)):
            timed = {who: partial(common.seconds, work) for who, work in contenders.items()}
            cases[f"{name}, {about}"] = common.summary(
                common.interleave(timed, arguments.repeats), ratios[name], "seconds"
            )
        parity[about] |= compare_sweeps(parity[about].pop("solutions"), train)
    common.write(
        "evaluation",
        {"scikit_learn": version("scikit-learn"), "cases": cases, "sweep_parity": parity},
        arguments,
    )


def make_features(
    num_train: int, num_val: int, dim: int, num_classes: int, spread: float
) -> tuple[Features, Features]:
    """(train, validation); `spread` is that of the noise over that of the class means."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1) ** -0.5
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    means = torch.randn(num_classes, dim, generator=generator)
    y = torch.arange(num_train + num_val) % num_classes
    noise = spread * torch.randn(len(y), dim, generator=generator)
    x = (((means[y] + noise) * spectrum) @ rotation * (dim**0.5 / 3) + 0.1).relu()
    x = x / x[:num_train].std(0)
    return Features(x[:num_train], y[:num_train]), Features(x[num_train:], y[num_train:])


# ---- 45 values of l2 ---------------------------------------------------------------------------------------

Solution = tuple[Tensor, Tensor]  # weight (C, D), bias (C,), float64


def sweep_contenders(
    train: Features, val: Features, num_classes: int, device: torch.device
) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """Contenders, and where each leaves its last solutions and validation accuracies (`compare_sweeps` takes
    them).
    """
    solutions: dict[str, tuple[list[Solution], list[float]]] = {}

    def ours() -> None:
        found = fit_logistic(
            train.x.to(device),
            train.y.to(device),
            num_classes,
            L2_GRID,
            standardize=False,
            max_iter=1000,
            tolerance=SWEEP_TOLERANCE,
        )
        accuracy = (found.predict(val.x.to(device)) == val.y.to(device)).double().mean(1).tolist()
        bias = found.bias.double() - found.weight.double() @ found.center.double()
        solutions["ours"] = list(zip(found.weight.double().cpu(), bias.cpu(), strict=True)), accuracy

    def sklearn(warm: bool) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        x, y, x_val, y_val = train.x.numpy(), train.y.numpy(), val.x.numpy(), val.y.numpy()
        model, found, accuracy = LogisticRegression(warm_start=warm), [], []
        for l2 in reversed(L2_GRID):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=1 / l2).fit(x, y)
            found.append((torch.tensor(model.coef_).double(), torch.tensor(model.intercept_).double()))
            accuracy.append(float(model.score(x_val, y_val)))
        solutions["sklearn_warm" if warm else "sklearn"] = found[::-1], accuracy[::-1]

    return {"sklearn": partial(sklearn, False), "sklearn_warm": partial(sklearn, True), "ours": ours}, {
        "solutions": solutions
    }


def compare_sweeps(
    solutions: dict[str, tuple[list[Solution], list[float]]], train: Features
) -> dict[str, Any]:
    """Best validation accuracies (percent); by how much our objective exceeds theirs at most, and theirs
    ours, as shares of it.
    """
    x = train.x.double()
    objective = {
        who: [
            F.cross_entropy(x @ w.T + b, train.y) + l2 / 2 / len(x) * w.square().sum()
            for l2, (w, b) in zip(L2_GRID, found, strict=True)
        ]
        for who, (found, _) in solutions.items()
    }
    ours = torch.stack(objective.pop("ours"))
    facts: dict[str, Any] = {
        "best_accuracy": {who: 100 * max(accuracy) for who, (_, accuracy) in solutions.items()}
    }
    for who, values in objective.items():
        theirs = torch.stack(values)
        facts[f"ours_above_{who}_at_most"] = ((ours - theirs) / theirs).max().item()
        facts[f"{who}_above_ours_at_most"] = ((theirs - ours) / ours).max().item()
        accuracies = zip(solutions[who][1], solutions["ours"][1], strict=True)
        facts[f"accuracy_of_{who}_minus_ours_by_l2"] = [round(100 * (a - b), 2) for a, b in accuracies]
    return facts


# ---- SGD heads ---------------------------------------------------------------------------------------------


def head_contenders(train: Features, num_classes: int, device: torch.device) -> dict[str, Callable[[], None]]:
    x, y = train.x.to(device), train.y.to(device)
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 256, "momentum": 0.9, "seed": 0}
    rates = torch.tensor(LEARNING_RATES, device=device).repeat_interleave(len(WEIGHT_DECAYS))
    decays = torch.tensor(WEIGHT_DECAYS, device=device).repeat(len(LEARNING_RATES))

    def ours(heads: slice) -> None:
        train_heads(x, y, num_classes, rates[heads], decays[heads], **settings)

    def torch_loop() -> None:
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(train.x, train.y), batch_size=256, shuffle=True
        )
        layer = nn.Linear(train.x.shape[1], num_classes).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(loader))
        for _ in range(EPOCHS):
            for batch, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(layer(batch.to(device)), labels.to(device)).backward()
                optimizer.step()
                schedule.step()

    ours(slice(1))
    return {
        "torch_loop": torch_loop,
        "ours_1": partial(ours, slice(25, 26)),
        "ours_50": partial(ours, slice(None)),
    }


# ---- kNN ---------------------------------------------------------------------------------------------------


def knn_contenders(
    train: Features, val: Features, num_classes: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    def ours() -> None:
        knn_predictions(train, val, num_neighbors=NEIGHBORS, temperature=TEMPERATURE, device=device)

    def lightly() -> None:
        from lightly.utils.benchmarking import knn_predict

        bank, labels = F.normalize(train.x).T.contiguous().to(device), train.y.to(device)
        queries = F.normalize(val.x).to(device)
        for k in NEIGHBORS:
            for chunk in queries.split(1000):
                knn_predict(chunk, bank, labels, num_classes, k, TEMPERATURE)

    ours()  # imports
    return {"lightly": lightly, "ours": ours}


if __name__ == "__main__":
    common.run(main)
