"""A classifier that was kept, and what it says of images: as in evaluating, from a folder alone, and not from
a changed one.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import striped_images, write_parquet
from PIL import Image
from safetensors.torch import load_file, save
from torchvision import models

from ssl_emp import load_classifier
from ssl_emp.commands import evaluate
from ssl_emp.data.images import load_images
from ssl_emp.errors import UserError, printable
from ssl_emp.model import build_encoder, save_encoder

CLASSES = ("alder", "birch", "=SUM(A1)", "été\u200b [b]x")
SMALL = ("device=cpu", "cache_dir=null")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images: 64 for training, 42 for testing, of four classes with names of all kinds."""
    root = tmp_path_factory.mktemp("leaves")
    for split, count, seed in (("train", 64, 0), ("test", 42, 1)):
        for row, (content, label) in enumerate(zip(*striped_images(count, seed=seed), strict=True)):
            path = root / split / CLASSES[label] / f"{row:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    encoder = build_encoder("resnet18", 8, "cifar", 16, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    encoder(torch.rand(32, 3, 16, 16))
    save_encoder(encoder.eval(), folder / "encoder")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"source": str(data)}, "seed": 0}))
    return folder


KEPT = {
    "finetune": ("finetune", "finetune.epochs=3", "finetune.batch_size=16", "finetune.save=true"),
    "bf16": (
        "finetune",
        "finetune.epochs=2",
        "finetune.batch_size=16",
        "finetune.bf16=true",
        "finetune.save=true",
    ),
    "lbfgs": ("linear", "linear.save=true"),
    "float64": ("linear", "linear.save=true", "linear.precision=float64"),
    "cached": ("linear", "linear.save=true", "linear.protocol=cached", "linear.epochs=5"),
    "augmented": ("linear", "linear.save=true", "linear.protocol=augmented", "linear.epochs=3"),
}
Kept = Callable[[str], Path]


@pytest.fixture(scope="module")
def kept(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """The folder of a classifier, made once; it holds nothing else, and is far from the run."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("kept")
            assert evaluate.main([str(run_dir), *KEPT[name], *SMALL, "--out", str(folder / "out")]) == 0
            evaluator = KEPT[name][0]
            shutil.move(folder / "out" / f"classifier-{evaluator}", folder / name)
            (row,) = json.loads((folder / f"out/{evaluator}.json").read_text())
            (folder / "row.json").write_text(json.dumps(row))
            made[name] = folder / name
        return made[name]

    return make


def predicted(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, str]]:
    capsys.readouterr()
    assert evaluate.main(["predict", *map(str, words), "device=cpu"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert evaluate.main(["predict", *map(str, words), "device=cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and ". fix: " in captured.err
    return captured.err


# ---- the same numbers


@pytest.mark.parametrize("name", KEPT)
def test_predictions_are_those_that_were_judged(
    name: str, kept: Kept, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The share of right ones among the CSV's rows is the row of the evaluation; the module gives the same
    classes as the command.
    """
    row = json.loads((kept(name).parent / "row.json").read_text())
    rows = predicted(capsys, kept(name), data, "split=test", "top_k=2")
    assert len(rows) == 42 and list(rows[0]) == [
        "name",
        "class",
        "probability",
        "class_2",
        "probability_2",
        "problem",
    ]
    right = sum(
        found["name"].split("/")[1] == found["class"] for found in csv_names(kept(name), data, tmp_path)
    )
    assert round(100 * right / 42, 2) == row["value"] and 25 < row["value"] < 100, (
        "neither chance nor all: the count says something"
    )

    classifier = load_classifier(kept(name))
    assert (
        sorted(classifier.class_names) == sorted(CLASSES) and classifier.judged["protocol"] == row["protocol"]
    )
    test = load_images(str(data), "test", image_size=16)
    with torch.inference_mode():
        chances = classifier(test.pixels[:].float() / 255).double().softmax(1)
    first, second = chances.topk(2).values.T
    assert [found["probability"] for found in rows] == [f"{chance:.6f}" for chance in first.tolist()]
    assert [found["probability_2"] for found in rows] == [f"{chance:.6f}" for chance in second.tolist()]
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())


def csv_names(folder: Path, data: Path, tmp_path: Path) -> list[dict[str, str]]:
    """From a file, where names are as they are; standard output escapes what is not printable."""
    path = tmp_path / "deep" / "out.csv"
    assert (
        evaluate.main(["predict", str(folder), str(data), "split=test", "device=cpu", "--out", str(path)])
        == 0
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["out.csv"]
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_batches_do_not_matter_and_a_kept_one_stays_after_its_run(
    kept: Kept, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_rows = predicted(capsys, kept("lbfgs"), data)
    assert len(all_rows) == 106
    ones = predicted(capsys, kept("lbfgs"), data, "batch_size=5")
    assert [row["name"] for row in ones] == [row["name"] for row in all_rows]
    assert [float(row["probability"]) for row in ones] == pytest.approx(
        [float(row["probability"]) for row in all_rows], abs=1e-4
    )
    train, test = (predicted(capsys, kept("lbfgs"), data, f"split={split}") for split in ("train", "test"))
    assert {row["name"] for row in train + test} == {row["name"] for row in all_rows} and (
        len(train),
        len(test),
    ) == (64, 42)


# ---- images of all kinds


def test_images_without_labels_and_those_that_cannot_be_read(
    kept: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = striped_images(7, 24, seed=5)
    mixed = tmp_path / "mixed"
    (mixed / "deep" / "er").mkdir(parents=True)
    for number, content in enumerate(images):
        (mixed / ("deep/er" if number % 2 else "") / f"{number}.png").write_bytes(content)
    (mixed / "broken.jpg").write_bytes(b"no image")
    (mixed / "cut.png").write_bytes(images[0][:90])
    (mixed / "evil\x1b[31m\n.png").write_bytes(images[0])
    words = ["predict", str(kept("finetune")), str(mixed), "device=cpu", "top_k=9", "batch_size=2"]
    capsys.readouterr()
    assert evaluate.main(words) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and captured.err.startswith(
        "2 of 10 images could not be read (broken.jpg: "
    )
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(captured.out))}
    assert len(rows) == 10 and "class_4" in rows["0.png"] and "class_5" not in rows["0.png"]
    for name in ("broken.jpg", "cut.png"):
        assert rows[name]["problem"] and not rows[name]["class"] and not rows[name]["probability_4"]
    for name, row in rows.items():
        if name not in ("broken.jpg", "cut.png"):
            assert not row["problem"] and sum(
                float(row[f"probability{n}"]) for n in ("", "_2", "_3", "_4")
            ) == pytest.approx(1, abs=1e-5)

    single = predicted(capsys, kept("finetune"), mixed / "0.png")
    assert [(row["name"], row["class"]) for row in single] == [(str(mixed / "0.png"), rows["0.png"]["class"])]
    table = write_parquet(tmp_path / "table.parquet", [*images, b"no image"], None)
    found = predicted(capsys, kept("finetune"), table)
    assert [row["name"] for row in found] == [f"table.parquet#{number}" for number in range(8)] and found[7][
        "problem"
    ]
    assert found[0]["class"] == rows["0.png"]["class"] and found[1]["class"] == rows["deep/er/1.png"]["class"]
    several = predicted(capsys, kept("finetune"), table, mixed, mixed / "0.png")
    assert (
        len(several) == 19
        and several[0]["name"] == f"{table}#0"
        and several[-1]["class"] == rows["0.png"]["class"]
    )
    assert "none of 10 images could be read (0.png: more pixels than max_pixels)" in refused(
        capsys, kept("finetune"), mixed, "max_pixels=575"
    )


def test_from_python(kept: Kept, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a PIL image and an array, alone and together, as the command has them; what is no image in [0,
    1] is refused.
    """
    files = sorted((data / "test" / "alder").iterdir())[:3]
    classifier = load_classifier(kept("cached"))
    second, third = (Image.open(io.BytesIO(file.read_bytes())) for file in files[1:])
    images = classifier.preprocess([files[0], second, np.asarray(third)])
    chances = classifier(images).double().softmax(1).amax(1)
    rows = predicted(capsys, kept("cached"), *files)
    assert [float(row["probability"]) for row in rows] == pytest.approx(chances.tolist(), abs=1e-6)
    assert torch.equal(classifier.preprocess(files[0]), images[0])
    for wrong, message in (
        (images * 255, "divide by 255"),
        (images[0], "for one image"),
        (images - 2, "leave out Normalize"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier(wrong)
    with pytest.raises(TypeError, match="floats in"):
        classifier((images * 255).byte())
    assert classifier(images[:0]).shape == (0, 4)


# ---- what is no classifier


def edited(folder: Path, **changes: Any) -> None:
    """Other entries in config.json; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps(
            {key: value for key, value in values.items() if value is not None or key in ("mean", "std")}
        )
    )


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **changes: Any) -> None:
    """Other weights, with a hash that is right."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    content = save(tensors)
    (folder / "model.safetensors").write_bytes(content)
    edited(folder, sha256=hashlib.sha256(content).hexdigest(), **changes)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def bare(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    reweighted(folder, lambda tensors: tensors.update({name: tensor}))


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the weights": (flip_a_bit, "is not the file that"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "is not the file that"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a pipe": (a_pipe, "config.json is missing"),
    "no JSON": (bare, "is not valid JSON"),
    "another kind": (lambda f: edited(f, kind="model"), "holds no classifier"),
    "a class too many": (lambda f: edited(f, class_names=[*CLASSES, "x"]), "do not fit"),
    "a class too few": (lambda f: edited(f, class_names=list(CLASSES[:3])), "do not fit"),
    "names that are no text": (lambda f: edited(f, class_names=[1, 2, 3, 4]), "class_names.0"),
    "another width": (lambda f: edited(f, width=16), "do not fit"),
    "a width without end": (lambda f: edited(f, width=8 * 10**6), "width"),
    "another architecture": (lambda f: edited(f, architecture="resnet50"), "do not fit"),
    "an architecture of no library": (lambda f: edited(f, architecture="__import__"), "no architecture"),
    "code for an architecture": (lambda f: edited(f, architecture="os.system('true')"), "architecture"),
    "another library": (lambda f: edited(f, family="torchvision", architecture="alexnet"), "do not fit"),
    "a name to fetch": (
        lambda f: edited(f, family="timm", architecture="hf-hub:someone/model"),
        "architecture",
    ),
    "an unknown name": (lambda f: edited(f, family="timm", architecture="no_such_net"), "has no network"),
    "no mean": (lambda f: edited(f, mean=None), "mean or std"),
    "an infinite mean": (lambda f: edited(f, mean=[float("inf")] * 3), "is not valid JSON"),
    "a std of zero": (lambda f: edited(f, std=[0.0] * 3), "std.0"),
    "no number of pixels": (lambda f: edited(f, image_size=10**9), "image_size"),
    "a key of the future": (lambda f: edited(f, code="print()"), "code"),
    "another format": (lambda f: edited(f, format=2), "format"),
    "weights that are not finite": (
        lambda f: reweighted(f, lambda t: t["head.weight"].fill_(torch.nan)),
        "no usable numbers",
    ),
    "a scale of zero": (lambda f: reweighted(f, lambda t: t["head.scale"].zero_()), "no usable numbers"),
    "a head of another width": (lambda f: with_tensor(f, "head.weight", torch.zeros(4, 9)), "do not fit"),
    "a tensor too many": (lambda f: with_tensor(f, "more", torch.zeros(1)), "do not fit"),
    "a tensor too few": (lambda f: reweighted(f, lambda t: t.pop("head.bias")), "do not fit"),
    "a head of whole numbers": (
        lambda f: with_tensor(f, "head.bias", torch.zeros(4, dtype=torch.int64)),
        "do not fit",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_changed_folder_is_refused(
    name: str, kept: Kept, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(kept("lbfgs"), tmp_path / "it")
    change, message = TAMPERED[name]
    change(tmp_path / "it")
    assert message in refused(capsys, tmp_path / "it", data)
    with pytest.raises(UserError, match=re.escape(message)):
        load_classifier(tmp_path / "it")


def test_what_is_no_classifier(
    kept: Kept, run_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "an encoder, which knows no classes" in refused(capsys, run_dir / "encoder", data)
    assert "no classifier in" in refused(capsys, tmp_path, data)
    shutil.copytree(kept("lbfgs"), tmp_path / "run/eval/classifier-linear")
    assert f"fix: give {tmp_path}/run/eval/classifier-linear" in refused(capsys, tmp_path / "run", data)
    assert "no such folder" in refused(capsys, kept("lbfgs"), tmp_path / "nothing")
    assert "1 of the two is named" in refused(capsys, kept("lbfgs"))
    assert "did you mean top_k?" in refused(capsys, kept("lbfgs"), data, "topk=3")
    assert "top_k:" in refused(capsys, kept("lbfgs"), data, "top_k=0")
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, kept("lbfgs"), data, "--out", tmp_path / "file" / "out.csv")


# ---- keeping


def test_a_classifier_needs_a_place(
    run_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nowhere to write is said before the training, in the way of the folder after the row."""
    words = [f"data.source={data}", "model.width=8", *SMALL]
    assert evaluate.main(["random", "finetune", "finetune.save=true", "finetune.epochs=1000", *words]) == 2
    assert (
        "finetune.save=true has no place to keep the classifier in. fix: judge a run, or give --out DIR"
        in capsys.readouterr().err
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classifier-linear").write_text("in the way")
    assert (
        evaluate.main([str(run_dir), "linear", "linear.save=true", *SMALL, "--out", str(tmp_path / "out")])
        == 2
    )
    captured = capsys.readouterr()
    assert "cannot write" in captured.err and "| linear" in captured.out
    (tmp_path / "out" / "classifier-linear").unlink()
    (tmp_path / "home").mkdir()
    (tmp_path / "out" / "classifier-linear").symlink_to(tmp_path / "home")
    assert (
        evaluate.main([str(run_dir), "linear", "linear.save=true", *SMALL, "--out", str(tmp_path / "out")])
        == 2
    )
    assert "is a link to another place" in capsys.readouterr().err and not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize(
    "encoder", ["random", "pixels", "torchvision:shufflenet_v2_x0_5", "timm:test_resnet.r160_in1k"]
)
def test_other_encoders_are_kept_too(
    encoder: str,
    run_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the weights that they were judged with, which are nowhere else."""
    torch.manual_seed(5)
    if encoder.startswith("timm"):
        timm = pytest.importorskip("timm")
        real = timm.create_model
        monkeypatch.setattr(
            timm,
            "create_model",
            lambda name, pretrained, num_classes: real(name, pretrained=False, num_classes=num_classes),
        )
    if encoder.startswith("torchvision"):
        weights = models.shufflenet_v2_x0_5(weights=None).state_dict()
        monkeypatch.setattr(
            models.ShuffleNet_V2_X0_5_Weights, "get_state_dict", lambda self, **given: weights
        )
    words = [f"data.source={data}", "data.image_size=32", "model.width=8", *SMALL, "--out", str(tmp_path)]
    assert evaluate.main([encoder, "linear", "linear.save=true", *words]) == 0
    (row,) = json.loads((tmp_path / "linear.json").read_text())
    (folder,) = [path.parent for path in tmp_path.glob("*/classifier-linear/config.json")]
    rows = predicted(capsys, folder, data, "split=test")
    names = {printable(name): name for name in CLASSES}
    right = sum(names[found["name"].split("/")[1]] == names[found["class"]] for found in rows)
    assert round(100 * right / 42, 2) == row["value"]


def test_classes_without_names_are_called_by_their_numbers(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        content, labels = striped_images(32, seed=seed)
        write_parquet(
            tmp_path / f"data/{split}.parquet", content, [(7, 40, 41, 99)[label] for label in labels]
        )
    words = [f"data.source={tmp_path / 'data'}", "linear.save=true", *SMALL, "--out", str(tmp_path)]
    assert evaluate.main([str(run_dir), "linear", *words]) == 0
    assert load_classifier(tmp_path / "classifier-linear").class_names == ["7", "40", "41", "99"]
    rows = predicted(capsys, tmp_path / "classifier-linear", tmp_path / "data", "split=test")
    (row,) = json.loads((tmp_path / "linear.json").read_text())
    assert (
        row["value"]
        == 100
        * sum(found["class"] == ("7", "40", "41", "99")[number % 4] for number, found in enumerate(rows))
        / 32
    )


def test_keeping_again_replaces(kept: Kept, run_dir: Path, tmp_path: Path) -> None:
    words = ["linear", "linear.save=true", "linear.protocol=cached", *SMALL, "--out", str(tmp_path)]
    first, second = (
        (
            evaluate.main([str(run_dir), *words, f"linear.epochs={epochs}"]),
            load_classifier(tmp_path / "classifier-linear"),
        )[1]
        for epochs in (1, 4)
    )
    assert "1 epochs" in first.judged["protocol"] and "4 epochs" in second.judged["protocol"]
    assert not torch.equal(first.head.weight, second.head.weight)
    assert sorted(path.name for path in (tmp_path / "classifier-linear").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
