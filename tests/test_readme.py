"""The README's commands do what it says, on small data; its file tree is the tree; the demo wins (slow)."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import striped_images

from ssl_emp import __main__
from ssl_emp.commands import evaluate, pretrain

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Every `python` command of the "Use it" section, comments dropped."""
    section = README[README.index("## Use it") : README.index("## Results")]
    return [
        shlex.split(line, comments=True)
        for line in section.splitlines()
        if re.match(r"python (pretrain\.py|evaluate\.py|-m ssl_emp)", line)
    ]


@pytest.mark.whole
def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, but for the run of two, which starts the other itself."""
    for split, seed in (("train", 0), ("test", 1)):
        for i, (data, label) in enumerate(zip(*striped_images(48, 24, seed), strict=True)):
            path = tmp_path / "images" / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    small = [
        "epochs=2",
        "batch_size=16",
        "model.width=8",
        "data.image_size=24",
        "augment.size=20",
        "device=cpu",
        "monitor.tensorboard=false",
    ]
    assert len(commands()) >= 4
    monkeypatch.chdir(tmp_path)

    def own(words: list[str]) -> int:
        return __main__.main(words[1:])

    table = ""
    for _, script, *arguments in commands():
        arguments = [
            word.replace("/path/to", str(tmp_path)).replace("configs/", f"{ROOT}/configs/")
            for word in arguments
        ]
        words = [*arguments, *(small if "--config" in arguments else [])]
        if any(word.startswith("devices=") for word in words):
            code = subprocess.run([sys.executable, str(ROOT / script), *words], timeout=120).returncode
        else:
            mains: dict[str, Callable[[list[str]], int]] = {
                "pretrain.py": pretrain.main,
                "evaluate.py": evaluate.main,
                "-m": own,
            }
            code = mains[script](words)
        said, errors = capfd.readouterr()
        assert code == 0, (words, errors)
        table += said
    for encoder in ("runs/mine", "random", "pixels"):
        assert len(re.findall(rf"^\| {encoder} +\| (?:knn|linear)", table, re.MULTILINE)) == 2, table
    left = {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "train.log",
        "metrics.jsonl",
        "checkpoints",
        "encoder",
        "pruning",
        "eval",
    } <= left
    assert (tmp_path / "runs" / ".folder_emp.views.png").exists()


def test_the_file_tree_is_the_tree() -> None:
    tree = README[README.index("## What is where") :]
    rooms = {path.parent.name for path in (ROOT / "ssl_emp").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    assert all((ROOT / "configs" / f"{name}.yaml").exists() for name in re.findall(r"\w+_emp(?=[,; ])", tree))


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets


@pytest.mark.slow
def test_the_demo_wins(tmp_path: Path) -> None:
    """The pretrained encoder beats an untrained one and raw pixels, by kNN and by a linear probe."""
    run = tmp_path / "demo"
    for words in (
        ["pretrain.py", "--config", "configs/demo.yaml", f"out={run}"],
        ["evaluate.py", str(run), "random", "pixels", "knn", "linear"],
    ):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=1200)
    for evaluator in ("knn", "linear"):
        values = {
            row["encoder"]: row["value"]
            for row in json.loads((run / "eval" / f"{evaluator}.json").read_text())
        }
        assert values[str(run)] == max(values.values()) and len(set(values.values())) == 3, values
