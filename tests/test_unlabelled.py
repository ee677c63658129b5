"""Runs on images without labels or without a test split: what can be said of them is said, the rest says what
is missing.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import striped_images, write_parquet
from test_evaluate import SMALL, make_run, table

from ssl_emp.commands import evaluate
from ssl_emp.commands.subjects import read_run_data
from ssl_emp.data.holdout import held_out_rows, hold_out
from ssl_emp.data.images import load_images
from ssl_emp.errors import UserError


def put_images(folder: Path, count: int, *, classes: bool, seed: int = 0) -> Path:
    images, labels = striped_images(count, seed=seed)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / ("abcd"[label] if classes else "") / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder


def judge(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, dict[str, str]], str]:
    """(exit code, evaluator -> its first row, standard error)."""
    capsys.readouterr()
    code = evaluate.main([*map(str, words), *SMALL])
    said = capsys.readouterr()
    rows: dict[str, dict[str, str]] = {}
    for row in table(said.out):
        rows.setdefault(row["evaluator"], row)
    return code, rows, said.err


@pytest.mark.parametrize(
    "kind", ["flat folder", "parquet without labels", "parquet without labels, with test"]
)
def test_images_without_labels_are_looked_at(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    if kind == "flat folder":
        put_images(data, 30, classes=False)
    else:
        write_parquet(data / "train.parquet", striped_images(30)[0], None)
        if "with test" in kind:
            write_parquet(data / "test.parquet", striped_images(12, seed=1)[0], None)
    run = make_run(tmp_path / "run", {"source": str(data)})
    code, rows, said = judge(capsys, run, "diagnose")
    assert code == 0 and "error" not in said and set(rows) == {"diagnose"}
    assert {path.name for path in (run / "eval/diagnose").iterdir()} == {
        "neighbors.png",
        "map.png",
        "embeddings.parquet",
    }
    found = pq.read_table(run / "eval/diagnose/embeddings.parquet").to_pydict()
    count = 12 if "with test" in kind else 30
    assert len(set(found["path"])) == count == int(rows["diagnose"]["n_test"]) and "label" not in found
    assert torch.tensor(found["vector"]).shape == (count, 64) and torch.tensor(found["vector"]).std() > 0.01
    # what predicts labels says that there are none, and how to name some; the others go on
    code, rows, said = judge(capsys, run, "knn", "linear", "finetune", "diagnose")
    assert (
        code == 2
        and [rows[name]["value"] for name in ("knn", "linear", "finetune")] == [""] * 3
        and rows["diagnose"]["value"]
    )
    assert said.count("error: ") == 1 and "has no labels" in said and "data.source=LABELLED" in said
    labelled = put_images(tmp_path / "labelled/train", 40, classes=True).parent
    put_images(labelled / "test", 16, classes=True, seed=1)
    code, rows, said = judge(capsys, run, "knn", "linear", f"data.source={labelled}")
    assert code == 0 and rows["knn"]["n_test"] == "16"


def test_labels_without_a_test_split_and_a_hold_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = put_images(tmp_path / "data", 60, classes=True)
    run = make_run(tmp_path / "run", {"source": str(data)})
    code, rows, said = judge(capsys, run, "knn", "diagnose")
    assert code == 2 and not rows["knn"]["value"] and rows["diagnose"]["n_test"] == "60"
    assert "has no test split. fix: hold a part of the train images out with data.holdout=0.2" in said
    code, rows, said = judge(capsys, run, "knn", "linear", "data.holdout=0.2")
    assert code == 0 and rows["knn"]["n_test"] == "12" and "bank 48" in rows["knn"]["protocol"]
    assert (
        "20% of every class held out by seed 0" in rows["knn"]["data"]
        and "has seen them, without their labels" in said
    )
    values = {}
    for words in (["data.holdout=0.2", "data.subset_seed=1"], ["data.holdout=0.4"], ["data.holdout=0.2"]):
        assert judge(capsys, run, "knn", *words)[0] == 0
        values[str(words)] = [row["data"] for row in json.loads((run / "eval/knn.json").read_text())]
    assert len(values["['data.holdout=0.2']"]) == 3, (
        "two seeds and two shares are three rows, the fourth replaces the first"
    )
    code, rows, said = judge(capsys, run, "knn", "data.holdout=0.01")
    assert code == 2 and "leaves no image" in said
    with_test = put_images(tmp_path / "both/train", 40, classes=True).parent
    put_images(with_test / "test", 8, classes=True, seed=3)
    code, rows, said = judge(capsys, run, "knn", f"data.source={with_test}", "data.holdout=0.2")
    assert (
        code == 0
        and "data.holdout is not used" in said
        and rows["knn"]["n_test"] == "8"
        and "held out" not in rows["knn"]["data"]
    )


def test_a_hold_out_in_the_place_of_a_test_split_without_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = put_images(tmp_path / "data/train", 60, classes=True).parent
    put_images(data / "test", 8, classes=False, seed=3)
    words = ("pixels", "knn", f"data.source={data}")
    code, rows, said = judge(capsys, *words)
    assert (
        code == 2
        and "the test split" in said
        and "data.holdout=0.2" in said
        and "data.test_source=LABELLED" in said
    )
    code, rows, said = judge(capsys, *words, "data.holdout=0.2")
    assert (
        code == 0
        and rows["knn"]["n_test"] == "12"
        and "held out by seed 0" in rows["knn"]["data"]
        and "in its place" in said
    )
    code, rows, said = judge(capsys, *words, "data.holdout=0.2", f"data.test_source={data / 'test'}")
    assert code == 2 and "has no labels" in said, "who names a test source means it"
    put_images(data / "val", 10, classes=True, seed=4)
    code, rows, said = judge(capsys, *words, "data.holdout=0.2")
    assert code == 0 and rows["knn"]["n_test"] == "10" and "data.holdout is not used" in said


def test_a_hold_out_is_a_function_of_the_names() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3] * 2 + [4])
    names = [f"{label}/{row}.png" for row, label in enumerate(labels.tolist())]
    held = held_out_rows(labels, names, 0.3, 0)
    assert [int(held[labels == label].sum()) for label in range(5)] == [15, 3, 1, 0, 0], (
        "two of every class stay in train"
    )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1))
    again = held_out_rows(labels[order], [names[row] for row in order.tolist()], 0.3, 0)
    assert torch.equal(again, held[order]), "the order of the images plays no part"
    more = held_out_rows(labels, names, 0.5, 0)
    assert bool(more[held].all()), "a smaller share lies within a larger one"
    assert not torch.equal(held_out_rows(labels, names, 0.3, 1), held)
    assert [names[row] for row in (held[50:60].nonzero().flatten() + 50).tolist()] == [
        "1/50.png",
        "1/55.png",
        "1/56.png",
    ], "on every machine"
    assert held_out_rows(labels[:1], ["\udce4"], 0.9, 0).tolist() == [False], "a name that is no text"


@pytest.mark.parametrize("store", ["memory", "raw", "encoded"])
def test_the_parts_of_a_hold_out_are_the_images_they_were(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = put_images(tmp_path / "data", 40, classes=True)
    images = load_images(
        str(data), store="encoded" if store == "encoded" else "memory", cache_dir=str(tmp_path / "cache")
    )
    train, test = hold_out(images, 0.3, 3)
    assert (
        len(train.names) == 28
        and not set(train.names) & set(test.names)
        and set(train.names + test.names) == set(images.names)
    )
    for part in (train, test):
        place = torch.tensor([images.names.index(name) for name in part.names])
        assert images.labels is not None and part.labels is not None
        assert torch.equal(part.pixels[:], images.pixels[place]) and torch.equal(
            part.labels, images.labels[place]
        )
    assert train.content["pixels"] != test.content["pixels"] != images.content["pixels"]
    words = (
        "pixels",
        "knn",
        f"data.source={data}",
        "data.holdout=0.3",
        f"data.store={store}",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    code, rows, said = judge(capsys, *words)
    assert code == 0 and ("JPEG quality 90" in rows["knn"]["data"]) == (store != "memory"), (
        "raw files are not copied into memory"
    )


def test_a_run_that_trained_with_all_labels_holds_none_out(tmp_path: Path) -> None:
    data = put_images(tmp_path / "data", 40, classes=True)
    run = make_run(tmp_path / "run", {"source": str(data)})
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"objective": "supervised"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    given: dict[str, Any] = {"data": {"holdout": 0.2}}
    with pytest.raises(UserError, match="was trained with the labels of all its train images"):
        read_run_data(run, given)
    assert read_run_data(run, {"data": {"holdout": 0.2, "source": "elsewhere"}}).holdout == 0.2


def test_embed_is_a_command_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = put_images(tmp_path / "data", 12, classes=True)
    code, rows, said = judge(capsys, "pixels", "embed", "diagnose", f"data.source={data}")
    assert code == 2 and not rows and said.count("\n") == 1
    assert "fix: ssl-emp embed ENCODER IMAGES --out FILE.parquet" in said
