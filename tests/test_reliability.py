"""Reliability on made-up scores whose truth is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pretrain

from experiments import proxy, reliability


def test_correlations_follow_the_share_of_the_truth() -> None:
    """truth + noise of three times its variance: one draw repeats by 1/4, means of four by 4/7
    (Spearman-Brown).
    """
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, generator=generator)
    values = truth + 3**0.5 * torch.randn(8, 4000, generator=generator)
    assert reliability.mean_correlation(values) == pytest.approx(0.25, abs=0.03)
    assert reliability.halves(values) == pytest.approx(4 / 7, abs=0.03)


def test_residuals_are_least_squares_and_say_what_they_explain() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 500, 4, generator=generator)
    features[..., 3] = 1.0  # constant: of no use, and no harm
    noise = torch.randn(3, 500, generator=generator)
    left, explained = reliability.residuals(2 * features[..., 0] - features[..., 2] + noise, features)
    assert explained == pytest.approx(5 / 6, abs=0.03)
    assert (left - (noise - noise.mean(1, keepdim=True))).abs().mean() < 0.1


def test_a_run_is_measured(
    pretrain_run: Pretrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = pretrain_run("run", "epochs=1", "prune.policy=none")
    out = tmp_path / "rows.jsonl"
    arguments = [
        "reliability",
        str(run),
        "--images",
        "64",
        "--batch-sizes",
        "8",
        "32",
        "--draws",
        "4",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert reliability.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["batch_size"], row["score"]) for row in rows][:2] == [
        (8, "loss"),
        (8, "raw distance"),
    ] and len(rows) == 8
    assert all(-1 <= row[name] <= 1 for row in rows for name in reliability.COLUMNS)
    assert all(0 < row["explained"] < 1 for row in rows)
    monkeypatch.setattr(sys, "argv", [*arguments[:2], "--images", "4", "--batch-sizes", "8"])
    assert reliability.main() == 2 and "change --images" in capsys.readouterr().err


def test_a_proxy_orders_everything(
    pretrain_run: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain_run("run", "epochs=1", "prune.policy=none")
    monkeypatch.setattr(
        sys,
        "argv",
        ["proxy", str(run), "--draws", "4", "--batch-size", "8", "--out", str(tmp_path / "proxy")],
    )
    assert proxy.main() == 0
    orders = {path.stem: np.load(path).tolist() for path in (tmp_path / "proxy").glob("*.npy")}
    assert orders.keys() == {"easy", "hard", "near", "far", "emp", "random"}
    assert all(sorted(order) == list(range(68)) for order in orders.values())
    assert orders["easy"] == orders["hard"][::-1] and orders["easy"] != orders["near"]
