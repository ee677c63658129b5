"""Whoever copies an example or a snippet of docs/your_loop.md gets something that runs."""

import importlib
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


def test_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences of two kinds of words, and a network of random weights."""
    monkeypatch.chdir(tmp_path)
    words = ["good", "fine", "bad", "dull"]
    labels = [i % 2 for i in range(256)]
    sentences = [" ".join(words[2 * label + i // 2 % 2] for i in range(5)) for label in labels]
    table = pa.table({"sentence": sentences, "label": labels, "idx": range(256)})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"cola-{split}.parquet")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    argv = ["cola", "--data", str(tmp_path), "--samples", "255", "--model", str(tmp_path / "model")]
    out = shown("glue", argv, monkeypatch, capsys)
    # 7 batches of 32, then 12 rounds in all of which
    assert re.findall(r"^(\d+) steps, matthews .*", out, re.MULTILINE) == ["18"]


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
