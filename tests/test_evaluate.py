"""evaluate.py from the command line to the table and the JSON."""

import hashlib
import io
import json
import subprocess
import sys
import urllib.error
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import striped_images, write_parquet
from torch import nn
from torchvision import models

from linear_eval import Features
from ssl_emp.commands import evaluate, evaluators, subjects
from ssl_emp.commands.row_tables import terminal_table
from ssl_emp.commands.rows import COLUMNS
from ssl_emp.config import DataConfig
from ssl_emp.data.images import ImageSet, fingerprint, load_images
from ssl_emp.model import build_encoder, save_encoder

SMALL = ("knn.num_neighbors=5", "device=cpu", "cache_dir=null")


def make_run(folder: Path, data: dict[str, Any], seed: int = 0) -> Path:
    """What pretrain.py leaves behind, with untrained weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(
        build_encoder("resnet18", 8, "imagenet", 16, [0.5] * 3, [0.25] * 3).eval(), folder / "encoder"
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"data": data, "model": {"arch": "resnet18", "width": 8}, "seed": seed})
    )
    return folder


@pytest.fixture
def run_dir(tmp_path: Path, tiny_data: Path) -> Path:
    return make_run(tmp_path / "run", {"source": str(tiny_data), "labels": "none"})


def table(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table; cells that a row lacks are empty, as where it is rendered."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip_longest(lines[0], line, fillvalue="")) for line in lines[2:]]


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Runs to exit code 2; gives its one line on standard error."""
    assert evaluate.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and ". fix: " in errors[0], captured.err
    return errors[0]


def test_a_run_beside_its_floors(run_dir: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = hashlib.sha256((run_dir / "encoder/model.safetensors").read_bytes()).digest()
    assert (
        evaluate.main([str(run_dir), "random", "pixels", "knn", "linear", *SMALL, "data.max_images=60"]) == 0
    )
    rows = table(capsys.readouterr().out)
    assert list(rows[0]) == [
        "encoder",
        "evaluator",
        "data",
        "protocol",
        "metric",
        "value",
        "std",
        "n_test",
        "seed",
    ]
    run = str(run_dir)
    assert [(row["encoder"], row["evaluator"]) for row in rows] == [
        (encoder, evaluator) for encoder in (run, "random", "pixels") for evaluator in ("knn", "linear")
    ]
    assert rows[0]["protocol"] == "cosine kNN, k=5, T=0.1, bank 60, last epoch"
    assert rows[1]["protocol"].startswith(
        "logistic regression on standardised frozen features, L-BFGS, <= 1000 steps, l2="
    )
    assert rows[1]["protocol"].endswith("chosen on 20% of 60 train, refit, last epoch")
    assert rows[2]["protocol"].endswith("untrained resnet18 of width 8, imagenet stem")
    assert rows[4]["protocol"].endswith("raw pixels")
    for row in rows:
        assert (row["data"], row["n_test"], row["seed"]) == (
            f"{tiny_data} 16px, subset 0 of 60 images",
            "40",
            "0",
        )  # max_images is for train only
        assert 0 <= float(row["value"]) <= 100 and len(row["value"].split(".")[1]) == 2
    for evaluator in ("knn", "linear"):
        stored = json.loads((run_dir / f"eval/{evaluator}.json").read_text())
        shown = [row for row in rows if row["evaluator"] == evaluator]
        assert [{key: "" if row[key] is None else str(row[key]) for key in COLUMNS} for row in stored] == [
            row | {"value": str(float(row["value"]))} for row in shown
        ]
    assert hashlib.sha256((run_dir / "encoder/model.safetensors").read_bytes()).digest() == weights
    assert sorted(path.name for path in (run_dir / "eval").iterdir()) == ["knn.json", "linear.json"]


def test_the_knn_number_is_that_of_a_loop_over_the_images(
    run_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    assert (
        evaluate.main(
            [
                str(run_dir),
                "pixels",
                "knn",
                "knn.num_neighbors=1",
                "device=cpu",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    train, test = load_images(str(tiny_data), "train"), load_images(str(tiny_data), "test")
    assert train.labels is not None and test.labels is not None
    hits = 0
    for image, label in zip(test.pixels[:].double(), test.labels, strict=True):
        similarities = [
            nn.functional.cosine_similarity(image.flatten(), other.flatten(), dim=0)
            for other in train.pixels[:].double()
        ]
        hits += int(train.labels[torch.stack(similarities).argmax()] == label)
    rows = {row["encoder"]: row["value"] for row in json.loads((tmp_path / "out/knn.json").read_text())}
    assert rows["pixels"] == round(100 * hits / len(test.labels), 2)
    assert not (run_dir / "eval").exists()  # --out instead


def test_a_rerun_replaces_its_rows_and_keeps_the_others(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def keys() -> list[tuple[str, int]]:
        return [
            (row["protocol"].split(", ")[1], row["seed"])
            for row in json.loads((run_dir / "eval/knn.json").read_text())
        ]

    for override in ("seed=0", "knn.num_neighbors=7", "seed=1"):
        assert evaluate.main([str(run_dir), "knn", *SMALL, override]) == 0
    assert keys() == [("k=5", 0), ("k=7", 0), ("k=5", 1)]
    edited = json.loads((run_dir / "eval/knn.json").read_text())
    edited[0]["value"] = -1
    (run_dir / "eval/knn.json").write_text(json.dumps(edited))
    assert evaluate.main([str(run_dir) + "/", "knn", *SMALL]) == 0
    assert keys() == [("k=7", 0), ("k=5", 1), ("k=5", 0)]
    assert all(row["value"] >= 0 for row in json.loads((run_dir / "eval/knn.json").read_text()))
    capsys.readouterr()
    (run_dir / "eval/knn.json").write_text("{")
    assert evaluate.main([str(run_dir), "knn", *SMALL]) == 0
    assert (
        "does not hold rows of earlier evaluations, and was moved to knn.json.damaged-1"
        in capsys.readouterr().err
    )
    assert keys() == [("k=5", 0)] and (run_dir / "eval/knn.json.damaged-1").read_text() == "{"


def test_runs_are_judged_on_their_own_data(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "other/train.parquet", *striped_images(32, seed=2))
    write_parquet(tmp_path / "elsewhere.parquet", *striped_images(24, seed=3))
    first = make_run(tmp_path / "a", {"source": str(tiny_data)})
    second = make_run(
        tmp_path / "b",
        {"source": str(tmp_path / "other"), "test_source": str(tmp_path / "elsewhere.parquet")},
        seed=1,
    )
    assert evaluate.main([str(first), str(second), str(second / "encoder"), "knn", *SMALL]) == 0
    rows = table(capsys.readouterr().out)
    assert [row["n_test"] for row in rows] == ["40", "24", "40"]
    assert [row["data"].split()[0] for row in rows] == [
        str(tiny_data),
        str(tmp_path / "other"),
        str(tiny_data),
    ]
    assert rows[2]["protocol"].endswith("as exported")
    stored = {name: json.loads((tmp_path / name / "eval/knn.json").read_text()) for name in ("a", "b")}
    assert [row["encoder"] for row in stored["a"]] == [str(first), str(second / "encoder")]
    assert [row["encoder"] for row in stored["b"]] == [str(second)]
    # another source on the command line is for all, and drops the test_source that belonged to the run's
    assert evaluate.main([str(second), "knn", f"data.source={tiny_data}", *SMALL]) == 0
    assert table(capsys.readouterr().out)[0]["data"] == f"{tiny_data} 16px"


def test_without_a_run_nothing_is_written(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pixels", "random", "knn", f"data.source={tiny_data}", "model.width=8", *SMALL]
    assert evaluate.main(words) == 0
    first = table(capsys.readouterr().out)
    assert [row["encoder"] for row in first] == ["pixels", "random"] and not list(tmp_path.iterdir())
    torch.rand(3)  # `random` depends on its seed, not on what was drawn before
    assert evaluate.main([*words, "data.image_size=16"]) == 0
    assert table(capsys.readouterr().out) == first


@pytest.mark.whole
def test_from_a_shell_a_mistake_is_one_line() -> None:
    words = [sys.executable, str(Path(__file__).parents[1] / "evaluate.py"), "nothing", "knn"]
    failed = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and failed.stdout == ""
    assert (
        failed.stderr.startswith("error: 'nothing' is no directory, encoder or evaluator. fix: ")
        and failed.stderr.count("\n") == 1
    )


def test_what_was_done_before_an_error_is_kept(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run_dir), "linear", "knn", "knn.num_neighbors=500", "device=cpu"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: num_neighbors is 500, the train split has 68 images. fix: ")
        and captured.err.count("\n") == 1
    )
    rows = table(captured.out)
    assert [(row["evaluator"], bool(row["value"])) for row in rows] == [("linear", True), ("knn", False)]
    assert rows[1]["protocol"].startswith("not judged: num_neighbors is 500")
    assert (
        len(json.loads((run_dir / "eval/linear.json").read_text())) == 1
        and not (run_dir / "eval/knn.json").exists()
    )


def test_a_terminal_gets_the_protocols_below_the_table() -> None:
    row = dict.fromkeys(COLUMNS, "x") | {
        "value": 12.345,
        "std": None,
        "metric": "top1 %",
        "protocol": "a very long protocol " * 5,
    }
    table, _, below = terminal_table([row, row | {"encoder": "y"}]).partition("(1) a very")
    assert (
        table.count("(1)") == 2
        and table.count("12.35") + table.count("12.34") == 2
        and "long protocol" in below
    )
    assert "all: data x, metric top1 %, n_test x, seed x\n" in table
    assert "seed" not in table.splitlines()[1]
    assert table.startswith("┏") and len(table.splitlines()[0]) <= 60, "there is room for names"
    other = terminal_table([row, row | {"seed": "z"}])
    assert "seed" in other.splitlines()[1] and "all: data x, metric top1 %, n_test x\n" in other


def test_wrong_words_are_named(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no encoder named" in fails(capsys, "knn")
    assert "no evaluator named" in fails(capsys, "random")
    assert "no encoder named" in fails(capsys)
    assert "--fast" in fails(capsys, "random", "knn", "--fast")
    assert "did you mean linear?" in fails(capsys, run_dir, "knn", "linaer")
    assert "'finetuned' is no directory" in fails(capsys, run_dir, "finetuned", "knn")
    assert "unknown key 'knn.num_neighbours'. fix: did you mean knn.num_neighbors?" in fails(
        capsys, run_dir, "knn", "knn.num_neighbours=5"
    )
    assert "unknown key 'zzz'. fix: use one of data.source" in fails(capsys, run_dir, "knn", "zzz=5")
    for word in ("model.init=other/encoder", "model.freeze=1", "epochs=3", "prune.fraction=0.5"):
        said = (
            f"{word.partition('=')[0]} is a setting of pretraining, and does nothing here. fix: leave it out"
        )
        assert said in fails(capsys, run_dir, "random", "knn", word)
    for override in (
        "knn.num_neighbors=0",
        "knn.temperature=0",
        "knn.temperature=.nan",
        "linear.val_fraction=1",
        "seed=-1",
        "seed=x",
    ):
        assert override.partition("=")[0] + ":" in fails(capsys, run_dir, "knn", override)
    assert "device=gpu cannot be used" in fails(capsys, run_dir, "knn", "device=gpu")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.yaml").write_text("data: {}")
    assert "has no encoder yet" in fails(capsys, tmp_path / "half", "knn")
    (tmp_path / "empty").mkdir()
    assert "no encoder in" in fails(capsys, tmp_path / "empty", "knn")
    (run_dir / "config.yaml").write_text("seed: 0")
    assert "has no data section" in fails(capsys, run_dir, "knn")
    (run_dir / "config.yaml").write_text("data: [1")
    assert "not valid YAML" in fails(capsys, run_dir, "knn")


def test_missing_labels_and_splits_are_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, labels = striped_images(24)
    write_parquet(tmp_path / "unlabeled/train.parquet", data, None)
    write_parquet(tmp_path / "unlabeled/test.parquet", data, None)
    line = fails(capsys, run_dir, "knn", f"data.source={tmp_path / 'unlabeled'}")
    assert (
        "the train split of" in line
        and "unlabeled has no labels" in line
        and "a folder for each class" in line
    )
    assert "drop data.labels=none" in fails(capsys, run_dir, "knn", "data.labels=none")
    write_parquet(tmp_path / "one/train.parquet", data, labels)
    assert "has no test split" in fails(capsys, run_dir, "knn", f"data.source={tmp_path / 'one'}")
    assert "no such folder" in fails(capsys, run_dir, "knn", f"data.source={tmp_path / 'none'}")
    assert "no such folder" in fails(capsys, run_dir, "knn", f"data.test_source={tmp_path / 'none'}")


def test_images_in_both_splits_are_counted(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, labels = striped_images(24)
    more, more_labels = striped_images(8, seed=1)
    write_parquet(tmp_path / "leaky/train.parquet", data, labels)
    write_parquet(tmp_path / "leaky/test.parquet", data[:3] + more, labels[:3] + more_labels)
    assert evaluate.main([str(run_dir), "pixels", "knn", f"data.source={tmp_path / 'leaky'}", *SMALL]) == 0
    warning = "warning: 3 of 11 distinct test images also occur in the train split, pixel by pixel\n"
    # once, though there are two encoders
    assert capsys.readouterr().err == f"{warning}report: {run_dir / 'report.html'}\n"


def test_folders_that_number_their_classes_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test folder without class `a`: its `b` is class 0 there, but class 1 in train."""
    data, labels = striped_images(32)
    for row, (image, label) in enumerate(zip(data, labels, strict=True)):
        for split in ("train",) if label == 0 else ("train", "held"):
            folder = tmp_path / split / "abcd"[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.png").write_bytes(image)
    sources = (f"data.source={tmp_path / 'train'}", f"data.test_source={tmp_path / 'held'}")
    assert evaluate.main(["pixels", "knn", *sources, "knn.num_neighbors=1", "device=cpu"]) == 0
    # the same images: each is its own neighbour
    assert table(capsys.readouterr().out)[0]["value"] == "100.00"
    (tmp_path / "held/b").rename(tmp_path / "held/e")
    assert evaluate.main(["pixels", "knn", *sources, "knn.num_neighbors=1", "device=cpu"]) == 0
    printed = capsys.readouterr()
    assert (
        table(printed.out)[0]["value"] == "66.67"
        and printed.err.count("1 test class has no train images (e): 8 of 24") == 1
    )
    (tmp_path / "held/c").rename(tmp_path / "held/f")
    assert "2 of the 3 classes of the test split have no train images: e, f" in fails(
        capsys, "pixels", "knn", *sources
    )


def test_timm_models(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    assert "timm has no network 'no_such_net'" in fails(capsys, run_dir, "timm:no_such_net", "knn")
    real = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained, num_classes: real(name, pretrained=False, num_classes=num_classes),
    )
    assert evaluate.main([str(run_dir), "timm:test_resnet", "knn", "data.image_size=32", *SMALL]) == 0
    rows = table(capsys.readouterr().out)
    assert (
        rows[1]["encoder"] == "timm:test_resnet"
        and rows[1]["protocol"].endswith("timm weights")
        and " 32px" in rows[1]["data"]
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in fails(capsys, run_dir, "timm:test_resnet", "knn")


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_models(
    name: str, run_dir: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features are those of the same network built by hand: its usual input, its last layer left out."""
    torch.manual_seed(7)
    oracle = models.get_model(name).eval()
    weights = {key: value.clone() for key, value in oracle.state_dict().items()}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **options: weights)
    judged: list[tuple[nn.Module, ImageSet]] = []
    original = evaluators.extract

    def kept(judge: evaluators.Judged, images: ImageSet, split: str) -> Features:
        judged.append((judge.encoder, images))
        return original(judge, images, split)

    monkeypatch.setattr(evaluators, "extract", kept)
    assert (
        evaluate.main(
            [f"torchvision:{name}", "knn", f"data.source={tiny_data}", "data.image_size=64", *SMALL]
        )
        == 0
    )
    encoder, images = judged[0]
    assert images.pixels.shape[1:] == (3, 64, 64)
    if name == "resnet18":
        oracle.fc = nn.Identity()
    elif name == "shufflenet_v2_x0_5":
        oracle.fc = nn.Sequential()
    elif name == "mobilenet_v3_small":
        oracle.classifier = oracle.classifier[:-1]
    else:
        oracle.classifier = nn.AdaptiveAvgPool2d(1)
    batch = images.pixels[:4].float() / 255
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    with torch.no_grad():
        expected = oracle((batch - mean) / std)
        torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0, "a comparison of zeros would show nothing"


def test_torchvision_models_that_cannot_be_had(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert "no image classifier 'resnet19'. fix: did you mean torchvision:resnet1" in fails(
        capsys, run_dir, "torchvision:resnet19", "knn"
    )
    assert "no image classifier 'zzzz'. fix: see torchvision.models.list_models" in fails(
        capsys, "torchvision:zzzz", "knn"
    )
    # it finds boxes
    assert "no image classifier" in fails(capsys, "torchvision:fasterrcnn_resnet50_fpn", "knn")

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    line = fails(capsys, run_dir, "torchvision:shufflenet_v2_x0_5", "knn")
    assert (
        "the weights of torchvision:shufflenet_v2_x0_5 cannot be loaded (URLError: " in line
        and str(tmp_path / "hub") in line
    )


def test_a_downloaded_file_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save({"fc.bias": Touch()}, tmp_path / "hub/checkpoints" / url.rpartition("/")[2])
    assert "UnpicklingError" in fails(capsys, "torchvision:shufflenet_v2_x0_5", "knn")
    assert not (tmp_path / "executed").exists()


def test_a_network_of_one_size_says_so(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=7
    )
    monkeypatch.setattr(models, "get_model", lambda *arguments, **options: network)
    words = ["torchvision:vit_b_16", "knn", f"data.source={tiny_data}", *SMALL]
    # the real one takes 224 px only, whatever the images are
    line = fails(capsys, *words, "data.image_size=32")
    assert (
        "torchvision:vit_b_16 takes no images of 224x224 pixels (Wrong image height! Expected 32 "
        "but got 224!)"
    ) in line
    assert network.heads(torch.ones(1, 8)).shape == (1, 8), "the head is gone"
    monkeypatch.setattr(models, "get_model", lambda *arguments, **options: models.alexnet())
    assert "alexnet takes no images of 16x16 pixels" in fails(
        capsys, "torchvision:alexnet", *words[1:], "data.image_size=16"
    )


def test_a_run_with_data_of_another_shape_and_ctrl_c(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"data": {"max_images": 5}}
    inherited = subjects.read_run_data(run_dir, given)
    assert (inherited.max_images, inherited.labels) == (5, "auto")  # trained without labels, judged with them
    assert subjects.read_run_data(run_dir, {"data": {"source": "cifar10"}}) == DataConfig(source="cifar10")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_splits", interrupted)
    assert evaluate.main([str(run_dir), "knn"]) == 130


# ---- the other evaluators


def test_every_k_and_every_linear_protocol_is_a_row(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        str(run_dir),
        "knn",
        "knn.num_neighbors=[1,5,9]",
        "knn.temperature=null",
        "device=cpu",
        "cache_dir=null",
    ]
    assert evaluate.main(words) == 0
    rows = table(capsys.readouterr().out)
    assert [row["protocol"].split(",")[1].strip() for row in rows] == [
        "k=1",
        "k=5",
        "k=9",
    ] and "majority" in rows[0]["protocol"]
    for protocol, said in (
        ("cached", "linear heads on cached features"),
        ("augmented", "augmented linear probe"),
    ):
        assert (
            evaluate.main([str(run_dir), "linear", f"linear.protocol={protocol}", "linear.epochs=3", *SMALL])
            == 0
        )
        (row,) = table(capsys.readouterr().out)
        assert (
            row["protocol"].startswith(said)
            and "3 epochs" in row["protocol"]
            and 0 <= float(row["value"]) <= 100
        )


def test_few_labels_have_a_spread(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "fewshot",
        "fewshot.fractions=[0.2]",
        "fewshot.per_class=[1]",
        "fewshot.num_draws=3",
        "fewshot.finetune=true",
    ]
    assert evaluate.main([str(run_dir), *words, "fewshot.epochs=2", *SMALL]) == 0
    rows = table(capsys.readouterr().out)
    assert len(rows) == 4 and all(float(row["std"]) >= 0 for row in rows)
    assert (
        "3 a class, 12 labels, 3 draws, logistic regression" in rows[0]["protocol"]
        and "fine-tuned 2 epochs" in rows[1]["protocol"]
    )
    assert "1 a class, 4 labels" in rows[2]["protocol"] and "l2=0.1 fixed" in rows[2]["protocol"]


def test_fine_tuning_leaves_the_encoder_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (run_dir / "encoder/model.safetensors").read_bytes()
    assert (
        evaluate.main(
            [str(run_dir), "finetune", "knn", "finetune.epochs=2", "finetune.lr=[0.02,0.1]", *SMALL]
        )
        == 0
    )
    rows = table(capsys.readouterr().out)
    assert [row["evaluator"] for row in rows] == ["finetune", "knn"] and "chosen on 20% of train" in rows[0][
        "protocol"
    ]
    assert (run_dir / "encoder/model.safetensors").read_bytes() == weights and not list(
        (run_dir / "eval").glob("*.pt")
    )


def test_a_diagnosis_leaves_pictures_and_embeddings(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run_dir), "diagnose", *SMALL]) == 0
    captured = capsys.readouterr()
    metrics = {row["metric"]: float(row["value"]) for row in table(captured.out)}
    assert set(metrics) == {
        "std of normalised features",
        "effective rank",
        "uniformity",
        "alignment of two crops",
    }
    assert all(len(row["value"].split(".")[1]) == 4 for row in table(captured.out)), "no percent: four digits"
    assert (
        1 <= metrics["effective rank"] <= 40
        and metrics["uniformity"] <= 0
        and "effective rank" in captured.err
    )
    left = {path.name for path in (run_dir / "eval/diagnose").iterdir()}
    assert left == {"neighbors.png", "map.png", "embeddings.parquet"}
    assert pq.read_table(run_dir / "eval/diagnose/embeddings.parquet").num_rows == 40


def test_embeddings_carry_the_scores_of_what_was_trained_on(
    run_dir: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 8 samples are not in the table
    order = torch.randperm(68, generator=torch.Generator().manual_seed(0)).tolist()[:60]
    columns = {
        "name": [f"train.parquet#{row}" for row in order],
        "score": [row / 2 for row in order],
        "times_trained": order,
    }
    (run_dir / "pruning").mkdir()
    pq.write_table(pa.table(columns), run_dir / "pruning/samples.parquet")

    def embeddings(*words: str) -> dict[str, list[Any]]:
        assert evaluate.main([str(run_dir), "pixels", "diagnose", *words, *SMALL]) == 0
        return pq.read_table(run_dir / "eval/diagnose/embeddings.parquet").to_pydict()

    found = embeddings("diagnose.split=train")
    assert found["path"] == [f"train.parquet#{row}" for row in range(68)]
    assert found["times_trained"] == [row if row in order else None for row in range(68)]
    assert found["score"] == [row / 2 if row in order else None for row in range(68)]
    assert "68 train features" in table(capsys.readouterr().out)[0]["protocol"]
    beside = pq.read_table(run_dir / "eval/pixels/diagnose/embeddings.parquet")
    assert "score" not in beside.column_names  # no run: nothing was trained
    found = embeddings()
    assert found["score"] == [None] * 40 == found["times_trained"], "the test split was not trained on"
    data, labels = striped_images(20, seed=5)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"other/{split}.parquet", data, labels)
    found = embeddings("diagnose.split=train", f"data.source={tmp_path / 'other'}")
    assert found["path"][3] == "train.parquet#3" and found["score"] == [None] * 20, (
        "the same names, but other images"
    )
    (run_dir / "pruning/samples.parquet").write_bytes(b"PAR1")
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "diagnose", *SMALL]) == 0, "it costs these columns and no number"
    assert (
        "without its columns score and times_trained" in (said := capsys.readouterr().err)
        and "samples.parquet cannot be read" in said
    )
    assert "score" not in pq.read_table(run_dir / "eval/diagnose/embeddings.parquet").column_names


@pytest.mark.parametrize("row", [1, 4999, 9998])
def test_one_changed_image_among_ten_thousand_is_another_key(row: int) -> None:
    pixels = torch.zeros(10_000, 3, 4, 4, dtype=torch.uint8)
    changed = pixels.clone()
    changed[row, 0, 0, 0] = 1
    sets = [
        ImageSet(part, None, [str(number) for number in range(10_000)], None, [])
        for part in (pixels, changed)
    ]
    encoder = nn.Linear(2, 2)
    assert fingerprint(sets[0]) != fingerprint(sets[1])
    keys = [evaluators.features_key(encoder, images) for images in sets]
    assert keys[0] != keys[1] and keys[0] == evaluators.features_key(
        encoder, replace(sets[0], pixels=pixels.clone())
    )
    with torch.no_grad():
        encoder.bias[0] += 1
    assert evaluators.features_key(encoder, sets[0]) != keys[0]


def test_images_that_lie_as_jpegs_are_known_by_all_of_them(tmp_path: Path) -> None:
    data, labels = striped_images(1500, size=8)
    keys, prints = [], []
    for changed in (False, False, True):
        write_parquet(tmp_path / "train.parquet", [*data[:2], data[changed + 1], *data[3:]], labels)
        found = load_images(
            str(tmp_path / "train.parquet"), store="encoded", cache_dir=str(tmp_path / f"cache{changed}")
        )
        assert not isinstance(found.pixels, torch.Tensor)
        prints.append(fingerprint(found))
        keys.append([evaluators.features_key(nn.Identity(), found) for _ in range(2)])
    assert keys[1][0] == keys[1][1] and keys[2][0] not in (*keys[0], *keys[1])
    assert prints[1] == prints[0] != prints[2]


def test_features_are_computed_once_for_an_encoder_and_a_data_set(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    original = evaluators.extract_features

    def counted(encoder: nn.Module, pixels: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(pixels))
        return original(encoder, pixels, *arguments, **options)

    monkeypatch.setattr(evaluators, "extract_features", counted)
    words = [str(run_dir), "knn", "knn.num_neighbors=5", "device=cpu", f"cache_dir={tmp_path / 'features'}"]
    tables = []
    for more, expected in (([], [68, 40]), ([], [68, 40]), (["data.max_images=60"], [68, 40, 60])):
        assert evaluate.main([*words, *more]) == 0
        assert calls == expected
        tables.append(table(capsys.readouterr().out))
    assert tables[0] == tables[1] != tables[2]
    for path in (tmp_path / "features").iterdir():
        path.write_bytes(b"damaged")
    assert evaluate.main(words) == 0 and table(capsys.readouterr().out) == tables[0], (
        "a damaged file is made again"
    )
    other = make_run(
        tmp_path / "other",
        {"source": yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["source"]},
        seed=5,
    )
    before = len(calls)
    assert evaluate.main([str(other), *words[1:]]) == 0 and len(calls) == before + 2, (
        "other weights, other features"
    )


def test_a_suite_is_one_table_with_intervals(
    run_dir: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    targets = [
        {"name": "stripes", "source": str(tiny_data)},
        {
            "name": "by class",
            "source": str(tiny_data),
            "metric": "mean_per_class",
            "protocol": "knn",
            "max_images": 40,
        },
        {"name": "absent", "source": str(tmp_path / "nowhere")},
        {"name": "textures", "source": "dtd"},
    ]
    suite.write_text(yaml.safe_dump({"name": "tiny", "targets": targets}))
    words = ["transfer", f"transfer.suite={suite}", f"transfer.root={tmp_path}", "transfer.num_draws=100"]
    assert evaluate.main([str(run_dir), "random", "pixels", *words, *SMALL]) == 0
    said = capsys.readouterr().out
    assert "stripes" in said and "macro" in said and "nowhere" in said
    rows = json.loads((run_dir / "eval/transfer.json").read_text())
    judged = [row for row in rows if row["data"] in ("stripes", "by class")]
    assert len(judged) == 6 and all(
        row["low"] <= row["value"] <= row["high"] and row["n_test"] == 40 for row in judged
    )
    assert all(
        row["value"] is None and row["reason"] for row in rows if row["data"] in ("absent", "textures")
    )
    assert (run_dir / "eval/transfer.csv").read_text().count("\n") == len(rows) + 1
    assert (run_dir / "eval/transfer.png").stat().st_size > 5000
    assert evaluate.main([str(run_dir), *words, *SMALL, "linear.max_iter=1", "linear.precision=float64"]) == 0
    found = [row for row in json.loads((run_dir / "eval/transfer.json").read_text()) if row["value"]]
    short = [row["protocol"] for row in found if "<= 1 steps, float64" in row["protocol"]]
    assert len(short) == 1, "of the linear target"
    capsys.readouterr()
    assert "did you mean transfer.suite?" in fails(capsys, run_dir, "transfer", "transfer.suit=x")


def test_a_target_from_its_own_layout(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DTD as its creators ship it: lists of files for train, val and test; l2 is chosen on val."""
    images, _ = striped_images(48)
    folder = tmp_path / "dtd" / "dtd"
    for part, numbers in (("train", range(16)), ("val", range(16, 32)), ("test", range(32, 48))):
        lines = []
        for i in numbers:
            name = f"{('banded', 'dotted')[i % 2]}/{i}.jpg"
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "images" / name).write_bytes(images[i])
            lines.append(name)
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: one\ntargets: [{name: DTD, source: dtd, val_split: val}]\n")
    assert (
        evaluate.main(
            [str(run_dir), "transfer", f"transfer.suite={suite}", f"transfer.root={tmp_path}", *SMALL]
        )
        == 0
    )
    (row, _) = json.loads((run_dir / "eval/transfer.json").read_text())
    assert row["n_test"] == 16 and "chosen on val (16), refit on train+val" in row["protocol"], row


# ---- an interrupted training


class Watched(io.StringIO):
    """A terminal at which somebody presses Ctrl-C when a text appears."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.text in text:
            raise KeyboardInterrupt
        return super().write(text)


def interrupted(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Watched(text))
        assert evaluate.main([str(word) for word in words]) == 130


TUNED = ("finetune", "finetune.epochs=4", "finetune.batch_size=16", *SMALL)  # 68 images: 5 steps an epoch


@pytest.mark.whole
def test_an_interrupted_fine_tuning_on_other_images(
    run_dir: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same labels in the same order, other pictures; then other test images, another size: each as if
    nothing had been left.
    """
    data, labels = striped_images(68)
    turned = [data[row ^ 1] for row in range(68)]  # the pictures of each class are those of another one
    write_parquet(tmp_path / "turned/train.parquet", turned, labels)
    write_parquet(tmp_path / "turned/test.parquet", *striped_images(40, seed=1))
    write_parquet(tmp_path / "tests/train.parquet", data, labels)
    write_parquet(tmp_path / "tests/test.parquet", *striped_images(40, seed=2))
    interrupted(monkeypatch, "fine-tuning steps 17 of 20", run_dir, *TUNED)
    assert [path.name for path in (run_dir / "eval").iterdir()] == ["finetune.pt"]
    left = list((run_dir / "eval" / "finetune.pt").iterdir())
    assert len(left) == 1 and left[0].suffix == ".pt"
    content = left[0].read_bytes()
    others = [
        [f"data.source={tmp_path / 'turned'}"],
        [f"data.source={tmp_path / 'tests'}"],
        ["data.image_size=12"],
        ["seed=1"],
    ]
    for words in others:
        capsys.readouterr()
        assert evaluate.main([str(run_dir), *TUNED, *words]) == 0
        after = table(capsys.readouterr().out)
        assert evaluate.main([str(run_dir), *TUNED, *words, "--out", str(tmp_path / "clean")]) == 0
        assert table(capsys.readouterr().out) == after
    assert left[0].read_bytes() == content, "what was interrupted waits"
    screen = Watched("no such text")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        assert evaluate.main([str(run_dir), *TUNED]) == 0
    seen = screen.getvalue().split("\r")
    assert [line for line in seen if "fine-tuning" in line][0].endswith("fine-tuning steps 16 of 20"), seen
    again = table(capsys.readouterr().out)
    assert evaluate.main([str(run_dir), *TUNED, "--out", str(tmp_path / "clean")]) == 0
    assert table(capsys.readouterr().out) == again
    assert not list((run_dir / "eval").glob("*.pt")), "done: it goes"


def test_an_interrupted_fine_tuning_stands_in_nobodys_way(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, "fine-tuning steps 12 of", run_dir, *TUNED)
    interrupted(
        monkeypatch,
        "linear steps 12 of",
        run_dir,
        "linear",
        "linear.protocol=augmented",
        "linear.epochs=9",
        *SMALL,
    )
    assert {path.name for path in (run_dir / "eval").iterdir()} == {"finetune.pt", "linear.pt"}
    capsys.readouterr()
    others = (
        "finetune.epochs=1",
        "finetune.lr=0.2",
        "finetune.label_smoothing=0.1",
        "linear.protocol=augmented",
        "linear.epochs=1",
    )
    assert evaluate.main([str(run_dir), "finetune", "linear", "knn", *SMALL, *others]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"report: {run_dir / 'report.html'}\n" and [
        row["evaluator"] for row in table(captured.out)
    ] == [
        "finetune",
        "linear",
        "knn",
    ]
    assert len(list((run_dir / "eval").glob("*.pt"))) == 2


def test_settings_that_move_a_number_are_in_its_protocol(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "finetune.epochs=1", "finetune.batch_size=16", "finetune.label_smoothing=0.3",
        "finetune.warmup_epochs=0.5", "finetune.bf16=true", "finetune.lr=[0.1,0.2]",
        "finetune.weight_decay=0.1", "finetune.layer_decay=0.5", "data.max_images=24", "data.max_images=25",
    ]  # fmt: skip
    for word in asked:
        assert evaluate.main([str(run_dir), "finetune", "finetune.epochs=1", *SMALL, word]) == 0
    assert (
        evaluate.main(
            [
                str(run_dir),
                "finetune",
                "finetune.epochs=1",
                *SMALL,
                "finetune.lr=[0.1,0.2]",
                "finetune.val_fraction=0.4",
            ]
        )
        == 0
    )
    for word in ("linear.precision=float64", "linear.max_iter=30", "linear.val_fraction=0.3"):
        assert evaluate.main([str(run_dir), "linear", "linear.max_iter=20", *SMALL, word]) == 0
    rows = json.loads((run_dir / "eval/finetune.json").read_text())
    assert len({row["protocol"] for row in rows}) == len(asked) + 1
    assert len({row["protocol"] for row in json.loads((run_dir / "eval/linear.json").read_text())}) == 3
    capsys.readouterr()


def test_a_run_directory_that_cannot_be_written_to(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file stands where the folder of rows would be: the number is printed, with a warning."""
    (run_dir / "eval").write_text("in the way")
    code = evaluate.main([str(run_dir), *TUNED])
    captured = capsys.readouterr()
    (row,) = table(captured.out)
    assert row["evaluator"] == "finetune" and code == 2  # the row could not be kept, and that is an error
    assert [line.split(" (")[0] for line in captured.err.splitlines() if "checkpoint" in line] != []
