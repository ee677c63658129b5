"""Whoever copies an example or a snippet of docs/your_loop.md gets something that runs."""

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import striped_images, write_parquet
from torch.utils.data import TensorDataset
from torchvision.models import mobilenet_v2

from experiments import glue
from ssl_emp.prune import POLICIES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your_loop.md").read_text()


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 200 images of 32 pixels to train on and 40 to test."""
    folder = tmp_path_factory.mktemp("stripes")
    write_parquet(folder / "train.parquet", *striped_images(200, size=32))
    write_parquet(folder / "test.parquet", *striped_images(40, size=32, seed=1))
    return folder


def shown(
    name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What an example prints."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with mock.patch.dict(os.environ):  # Lightning leaves its seed there
        importlib.import_module(name).main(argv)
    return capsys.readouterr().out


def test_plain_loop(
    stripes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown("plain_loop", ["--data", str(stripes), "--epochs", "4", "--batch", "32"], monkeypatch, capsys)
    # 6 batches in the first epoch and 12 or 13 in three, in passes of equal length
    assert [int(found) for found in re.findall(r"(\d+) steps", out)] == [5, 10, 15, 20]
    assert float(re.findall(r"test accuracy (.*)%", out)[0]) > 25.0, "four classes, more than chance"


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning", "ignore::DeprecationWarning"
)
def test_lightly_simclr(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning's checkpoints
    argv = ["--data", str(stripes), "--epochs", "2", "--batch", "64"]
    out = shown("lightly_simclr", argv, monkeypatch, capsys)
    steps, accuracy = re.findall(r"^(\d+) steps, kNN accuracy (.*)%$", out, re.MULTILINE)[0]
    assert int(steps) == 6 and float(accuracy) > 40.0, "stripes of four kinds are told apart by any network"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentences of two kinds of words, named as CoLA is, and `model`: random weights."""
    folder = tmp_path_factory.mktemp("sentences")
    words = ["good", "fine", "bad", "dull"]
    labels = [i % 2 for i in range(256)]
    texts = [" ".join(words[2 * label + i // 2 % 2] for i in range(5)) for label in labels]
    table = pa.table({"sentence": texts, "label": labels, "idx": range(256)})
    for split in ("train", "validation"):
        pq.write_table(table, folder / f"cola-{split}.parquet")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder / "model")
    return folder


def test_glue(
    sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the Trainer's checkpoints
    argv = ["cola", "--data", str(sentences), "--samples", "255", "--model", str(sentences / "model")]
    out = shown("glue", argv, monkeypatch, capsys)
    # 7 batches of 32, then two epochs of 5 or 6
    assert re.findall(r"^(\d+) steps, matthews .*", out, re.MULTILINE) == ["18"]


def test_glue_experiment_goes_on_where_it_stopped(
    sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {
        "pruning": {"rounds_per_epoch": 2}, "samples": 128,
        "training": {"num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 0.01,
                     "model": str(sentences / "model")},
        "groups": [[{"task": "cola", "prune.policy": "none", "seed": 0}], [
            {"task": "cola", "prune.policy": "emp", "prune.beta": 2, "prune.fraction": 0.5, "seed": 0}]],
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps(grid))
    argv = [str(tmp_path / "tiny.yaml"), "--data", str(sentences), "--runs", str(tmp_path / "runs")]
    argv += ["--results", str(tmp_path)]
    assert glue.main([*argv, "--until", "00:00"]) == 0
    assert not (tmp_path / "tiny.jsonl").exists(), "the time was over after a step"
    assert glue.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["cell"]["prune.policy"] for row in rows] == ["none", "emp"]
    assert [row["samples_seen"] for row in rows] == [3 * 128, 3 * 6 * 16], "6 is 16 / 3 batches, rounded up"
    assert all(row["matthews"] > 50 and row["cpu_seconds"] > 0 for row in rows), "two words tell the label"
    assert sum(int(times) * count for times, count in rows[1]["times_trained"].items()) == 288
    assert glue.main(argv) == 0 and len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 2
    assert glue.main([argv[0], "--data", ".", "--until", "noon"]) == 2
    assert capsys.readouterr().err.endswith("error: --until is 'noon'. fix: give such as 03:25\n")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_snippets_of_the_page_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(6, 3)
    world: dict[str, Any] = {
        "dataset": TensorDataset(torch.randn(1200, 6), torch.randint(3, (1200,))),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/your_loop.md, snippet {number}", "exec"), world)  # noqa: S102
    pruner = world["pruner"]
    assert pruner.step == pruner.total_steps == world["schedule"].last_epoch
    assert world["figures"]["kept_share"] == 4 * 256 / 1200, "the last epoch is a full one, of four batches"
    assert world["state"]["pruner"]["step"] == pruner.step


def test_the_page_names_every_policy() -> None:
    table = PAGE.partition("## Which policy")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == set(
        POLICIES
    )


def test_warm_start(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights as the package's file holds them: the same network's, in its order, under other names."""
    torch.manual_seed(0)
    theirs = mobilenet_v2().features.state_dict()
    file = tmp_path / "theirs.pt"
    torch.save({f"their.{number}": value for number, value in enumerate(theirs.values())}, file)
    words = [str(file), "--data", str(stripes), "--images", "96", "--pixels", "32", "--epochs", "2"]
    with pytest.raises(ValueError):  # the counters of BatchNorm have no weight's shape: their names tell them
        shown("warm_start", [*words, "--out", str(tmp_path / "no")], monkeypatch, capsys)
    torch.save({f"their.{name}": value for name, value in theirs.items()}, file)
    out = shown("warm_start", [*words, "--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert "start.safetensors: 260 of 260 tensors" in out and "start     kNN " in out
    assert str(tmp_path / "out" / "run" / "start") in out, "the start is judged beside the run"
