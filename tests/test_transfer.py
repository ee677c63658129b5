"""linear_eval.transfer against scipy's ranks and arithmetic by hand; linear_eval.targets on small copies of
each data set's layout.
"""

import csv
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from linear_eval import EvalError
from linear_eval.metrics import Measured, measure
from linear_eval.targets import TARGETS, VOC_CLASSES, torchvision_target
from linear_eval.transfer import (
    Cell,
    Outcome,
    Suite,
    Target,
    Transfer,
    draw_bars,
    parse_suite,
    run_suite,
    tabulate,
    to_csv,
    to_markdown,
    to_rows,
)

ROOT = Path(__file__).resolve().parent.parent


def suite_of(*targets: dict[str, Any]) -> Suite:
    return parse_suite({"name": "test", "targets": list(targets)}, "suite.yaml")


def predictions(share: float, num: int = 200) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num) % 4
    return torch.where(torch.arange(num) < share * num, labels, (labels + 1) % 4), labels


def table_of(values: dict[str, list[float | None]]) -> Transfer:
    """Encoder -> its value on data set d0, d1, ..., None where there is none."""
    cells = []
    for encoder, row in values.items():
        for column, value in enumerate(row):
            measured = None if value is None else Measured(value, value - 0.05, value + 0.05, 100)
            cells.append(
                Cell(
                    encoder,
                    Target(name=f"d{column}", source="x"),
                    "lbfgs",
                    measured,
                    "" if measured else "no such folder",
                )
            )
    return tabulate("test", cells)


# ---- suites


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "suites").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_suites_are_valid_and_say_their_command(path: Path) -> None:
    suite = parse_suite(yaml.safe_load(path.read_text()), str(path))
    assert suite.name == path.stem
    assert path.read_text().startswith("#") and f"transfer.suite={path.stem}" in path.read_text()


def test_the_simclr_suite_has_the_papers_metrics_and_validation_splits() -> None:
    """Chen et al. 2020, appendix B.8.1: "we report top-1 accuracy for ..."; "We used the validation sets
    specified ...".
    """
    suite = parse_suite(yaml.safe_load((ROOT / "configs/suites/simclr.yaml").read_text()), "simclr.yaml")
    by_metric: dict[str, set[str]] = {}
    for target in suite.targets:
        by_metric.setdefault(target.metric, set()).add(target.source)
        assert (target.protocol, target.image_size, target.max_images) == ("lbfgs", 224, None)
    assert by_metric == {
        "top1": {"food101", "cifar10", "cifar100", "cub200", "sun397", "cars", "dtd"},
        "mean_per_class": {"aircraft", "pets", "caltech101", "flowers102"},
        "voc_map": {"voc2007"},
    }
    assert {target.source for target in suite.targets if target.val_split} == {
        "aircraft",
        "voc2007",
        "dtd",
        "flowers102",
    }
    assert {target.source for target in suite.targets} == set(TARGETS)


def test_defaults_fill_what_a_target_leaves_out() -> None:
    targets = [{"name": "x", "source": "f"}, {"name": "y", "source": "g", "image_size": 32}]
    values = {"name": "a", "defaults": {"image_size": 64, "metric": "mean_per_class"}, "targets": targets}
    x, y = parse_suite(values, "suite.yaml").targets
    assert (x.image_size, y.image_size, y.metric, x.protocol) == (64, 32, "mean_per_class", "lbfgs")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "is not a suite"),
        ({"name": "a", "targets": []}, "targets: .*at least 1 item"),
        ({"name": "a", "targets": [{"name": "x"}]}, r"targets.0.source: Field required"),
        ({"name": "a", "targets": [{"name": "x", "source": "f", "metrics": "top1"}]}, "did you mean metric"),
        (
            {"name": "a", "targets": [{"name": "x", "source": "f", "metric": "top5"}]},
            "targets.0.metric: .*'top1'",
        ),
        ({"name": "a", "targets": [{"name": "x", "source": "f", "image_size": 0}]}, "image_size"),
        (
            {"name": "a", "targets": [{"name": "x", "source": "f"}, {"name": "x", "source": "g"}]},
            "two targets named x",
        ),
        (
            {"name": "a", "targets": [{"name": "x", "source": "f", "test_split": "train"}]},
            "not three different splits",
        ),
        (
            {"name": "a", "targets": [{"name": "x", "source": "pets", "val_split": "val"}]},
            "pets has no split val, only train, test",
        ),
        (
            {"name": "a", "targets": [{"name": "x", "source": "voc2007"}]},
            "top1 does not fit the labels of voc2007",
        ),
        (
            {
                "name": "a",
                "targets": [{"name": "x", "source": "voc2007", "metric": "voc_map", "protocol": "knn"}],
            },
            "which protocol knn does",
        ),
        (
            {"name": "a", "targets": [{"name": "x", "source": "f", "metric": "map", "protocol": "linear"}]},
            "which protocol linear does",
        ),
        ({"name": "a", "target": [], "targets": [{"name": "x", "source": "f"}]}, "did you mean targets"),
        (
            {"name": "a", "defaults": 3, "targets": [{"name": "x", "source": "f"}]},
            "defaults in suite.yaml is 3",
        ),
    ],
)
def test_a_bad_suite_is_one_clear_line(values: Any, message: str) -> None:
    with pytest.raises(EvalError, match=message) as caught:
        parse_suite(values, "suite.yaml")
    assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)


# ---- running and the table


def test_a_suite_runs_and_a_missing_data_set_is_a_line() -> None:
    suite = suite_of(
        {"name": "easy", "source": "f"},
        {"name": "gone", "source": "g"},
        {"name": "hard", "source": "h", "metric": "mean_per_class"},
    )
    calls = []

    def evaluate(encoder: str, target: Target) -> Outcome:
        calls.append((encoder, target.name))
        if target.name == "gone":
            raise EvalError("no folder g", "get it")
        share = {"good": 0.9, "bad": 0.5}[encoder] - 0.3 * (target.name == "hard")
        return Outcome(*predictions(share), protocol=f"lbfgs of {encoder}")

    transfer = run_suite(suite, ["good", "bad"], evaluate, num_resamples=100, seed=3)
    assert calls[:3] == [("good", "easy"), ("bad", "easy"), ("good", "gone")]  # target by target
    assert transfer.complete == ("easy", "hard")
    for encoder, share in (("good", 0.9), ("bad", 0.5)):
        expected = [
            measure(*predictions(share), "top1", num_resamples=100, seed=3),
            measure(*predictions(share - 0.3), "mean_per_class", num_resamples=100, seed=3),
        ]
        assert [
            transfer.cell(encoder, target).measured for target in (suite.targets[0], suite.targets[2])
        ] == expected
        assert transfer.macro[encoder] == pytest.approx((expected[0].value + expected[1].value) / 2)
    assert to_markdown(transfer).count("not judged") == 1
    assert "not judged: gone: no folder g. fix: get it" in to_markdown(transfer)


def test_other_exceptions_are_missing_only_where_asked_for() -> None:
    def evaluate(encoder: str, target: Target) -> Outcome:
        raise FileNotFoundError("no file\nat all")

    suite = suite_of({"name": "a", "source": "f"})
    with pytest.raises(FileNotFoundError):
        run_suite(suite, ["e"], evaluate)
    assert run_suite(suite, ["e"], evaluate, missing=(OSError,)).cells[0].reason == "no file"
    with pytest.raises(EvalError, match="each once"):
        run_suite(suite, ["e", "e"], evaluate)


def test_ranks_share_ties_as_scipy_does() -> None:
    values = {"a": [0.9, 0.5, 0.3], "b": [0.9, 0.7, 0.3], "c": [0.1, 0.5, 0.3], "d": [0.9, 0.2, 0.3]}
    transfer = table_of({encoder: list(row) for encoder, row in values.items()})
    for column in range(3):
        expected = rankdata([-row[column] for row in values.values()])
        assert [transfer.places[encoder, f"d{column}"] for encoder in values] == expected.tolist()
    assert transfer.mean_place["b"] == pytest.approx((2 + 1 + 2.5) / 3)


def test_the_macro_average_is_over_what_all_encoders_have() -> None:
    transfer = table_of({"a": [0.9, None, 0.3], "b": [0.7, 0.99, 0.4]})
    assert transfer.complete == ("d0", "d2") and transfer.macro == pytest.approx({"a": 0.6, "b": 0.55})
    assert transfer.places["b", "d1"] == 1 and ("a", "d1") not in transfer.places
    text = to_markdown(transfer)
    assert "not judged: d1 with a: no such folder" in text and "2 of 3 data sets" in text
    nothing = table_of({"a": [0.9, None], "b": [None, 0.8]})
    assert nothing.complete == () and nothing.macro == {} and "macro" not in to_markdown(nothing)
    assert to_rows(nothing)[-1]["data"] == "d1"


def test_rows_csv_and_markdown_tell_the_same(tmp_path: Path) -> None:
    transfer = table_of({"a": [0.9123, None], "b, c": [0.7, 0.25]})
    rows = json.loads(json.dumps(to_rows(transfer)))
    assert [row["data"] for row in rows] == ["d0", "d1", "d0", "d1", "macro average", "macro average"]
    assert {key: rows[0][key] for key in ("value", "low", "high", "rank", "n_test", "metric")} == {
        "value": 91.23, "low": 86.23, "high": 96.23, "rank": 1, "n_test": 100, "metric": "top1 %",
    }  # fmt: skip
    assert rows[1]["value"] is None and rows[1]["rank"] is None and rows[1]["reason"] == "no such folder"
    read = list(csv.DictReader(io.StringIO(to_csv(transfer))))
    assert [
        {key: str(value) if value is not None else "" for key, value in row.items()} for row in rows
    ] == read
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in to_markdown(transfer).splitlines()
        if line.startswith("|")
    ]
    assert lines[0] == ["data", "metric", "n_test", "a", "b, c"]
    assert lines[2] == ["d0", "top1 %", "100", "91.23 [86.2, 96.2] (1)", "70.00 [65.0, 75.0] (2)"]
    assert lines[3][3:] == ["-", "25.00 [20.0, 30.0] (1)"]
    assert len({len(line) for line in to_markdown(transfer).splitlines() if line.startswith("|")}) == 1
    assert "(1)" not in to_markdown(table_of({"alone": [0.5]}))  # nothing to rank


def test_bars_are_drawn_and_matplotlib_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = table_of({"a": [0.9, None, None], "b": [0.7, 0.25, None]})
    draw_bars(transfer, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.format == "PNG" and image.width > 500
    with pytest.raises(EvalError, match="nothing to draw"):
        draw_bars(table_of({"a": [None]}), tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EvalError, match=r"pip install matplotlib \(extra `experiments`\)"):
        draw_bars(transfer, tmp_path / "none.png")
    assert [item.name for item in tmp_path.iterdir()] == ["bars.png"]


# ---- data sets on disk


def put_image(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if shade % 2 else "RGB", (5, 4), shade).save(path)  # some grey, as in Caltech-101
    return path


def put_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def fake_food101(root: Path) -> None:
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        listing = {name: [f"{name}/{number}" for number in numbers] for name in ("waffles", "apple_pie")}
        put_lines(root / "food-101/meta" / f"{split}.json", json.dumps(listing))
        for paths in listing.values():
            for path in paths:
                put_image(root / "food-101/images" / f"{path}.jpg", int(path[-1]))


def fake_dtd(root: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{name}/{name}_000{number}.jpg" for name in ("woven", "banded")]
        put_lines(root / "dtd/dtd/labels" / f"{split}1.txt", *names)
        put_lines(root / "dtd/dtd/labels" / f"{split}2.txt", "woven/of_the_second_split.jpg")
        for name in names:
            put_image(root / "dtd/dtd/images" / name, number)


def fake_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    put_lines(data / "variants.txt", "707-320", "Boeing 717")
    for number, split in enumerate(("train", "val", "test")):
        put_lines(data / f"images_variant_{split}.txt", f"100{number} Boeing 717", f"200{number} 707-320")
        put_image(data / "images" / f"100{number}.jpg", number)
        put_image(data / "images" / f"200{number}.jpg", number)


def fake_pets(root: Path) -> None:
    for split, number in (("trainval", 1), ("test", 2)):
        names = [f"Abyssinian_{number}", f"american_bulldog_{number}"]
        put_lines(
            root / "oxford-iiit-pet/annotations" / f"{split}.txt", f"{names[0]} 1 1 1", f"{names[1]} 2 2 1"
        )
        for name in names:
            put_image(root / "oxford-iiit-pet/images" / f"{name}.jpg", number)


def fake_sun397(root: Path) -> None:
    folder = root / "SUN397"
    put_lines(folder / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    for split, name in (("Training", "x"), ("Testing", "y")):
        paths = [f"/a/apartment_building/outdoor/sun_{name}.jpg", f"/a/abbey/sun_{name}.jpg"]
        put_lines(folder / "Partitions" / f"{split}_01.txt", *paths)
        for path in paths:
            put_image(folder / path[1:], 3)
    put_image(folder / "a/abbey/sun_in_no_list.jpg", 3)


def fake_caltech101(root: Path) -> None:
    for name, count in (("ant", 33), ("BACKGROUND_Google", 35), ("crab", 31)):
        for number in range(1, count + 1):
            put_image(root / "caltech101/101_ObjectCategories" / name / f"image_{number:04d}.jpg", number)
    put_lines(root / "caltech101/101_ObjectCategories/BACKGROUND_Google/tmp", "a stray file of the archive")


def fake_voc2007(root: Path) -> None:
    folder = root / "VOCdevkit/VOC2007"
    for first, split in enumerate(("train", "val", "test")):
        ids = [f"00{first}00{number}" for number in range(3)]
        put_lines(folder / "ImageSets/Main" / f"{split}.txt", *ids)
        for name in VOC_CLASSES:
            marks = {"cat": (1, -1, 0), "dog": (1, 1, -1)}.get(name, (-1, -1, -1))
            put_lines(
                folder / "ImageSets/Main" / f"{name}_{split}.txt",
                *(f"{i} {mark:2d}" for i, mark in zip(ids, marks, strict=True)),
            )
        for image in ids:
            put_image(folder / "JPEGImages" / f"{image}.jpg", first)


def fake_cub200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    paths = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Wren/c.jpg", "002.Wren/d.jpg"]
    put_lines(folder / "images.txt", *(f"{i} {path}" for i, path in enumerate(paths, 1)))
    put_lines(folder / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    put_lines(folder / "train_test_split.txt", "1 0", "2 1", "3 1", "4 0")
    put_lines(folder / "classes.txt", "1 001.Albatross", "2 002.Wren")
    for path in paths:
        put_image(folder / "images" / path, 7)


def fake_cars(root: Path) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    kind = [("class", "O"), ("fname", "O")]
    for split, path in (
        ("train", folder / "devkit/cars_train_annos.mat"),
        ("test", folder / "cars_test_annos_withlabels.mat"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {"annotations": np.array([(2, "1.jpg"), (1, "2.jpg")], dtype=kind)})
        for name in ("1.jpg", "2.jpg"):
            put_image(folder / f"cars_{split}" / name, 9)
    savemat(
        folder / "devkit/cars_meta.mat",
        {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype="O")},
    )


FAKES = {
    "food101": (
        fake_food101, "train",
        ["waffles/1", "waffles/2", "apple_pie/1", "apple_pie/2"], [1, 1, 0, 0], ["apple_pie", "waffles"],
    ),
    "dtd": (fake_dtd, "val", ["woven/woven_0001", "banded/banded_0001"], [1, 0], ["banded", "woven"]),
    "aircraft": (fake_aircraft, "test", ["1002", "2002"], [1, 0], ["707-320", "Boeing 717"]),
    "pets": (
        fake_pets, "train",
        ["Abyssinian_1", "american_bulldog_1"], [0, 1], ["Abyssinian", "american_bulldog"],
    ),
    "sun397": (
        fake_sun397, "test",
        ["outdoor/sun_y", "abbey/sun_y"], [1, 0], ["abbey", "apartment_building/outdoor"],
    ),
    "cub200": (
        fake_cub200, "train", ["001.Albatross/b", "002.Wren/c"], [0, 1], ["001.Albatross", "002.Wren"],
    ),
    "cars": (fake_cars, "test", ["cars_test/1", "cars_test/2"], [1, 0], ["AM General Hummer", "Acura RL"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_a_data_set_in_its_own_layout(name: str, tmp_path: Path) -> None:
    make, split, ends, labels, class_names = FAKES[name]
    make(tmp_path)
    found = torchvision_target(name, tmp_path, split)
    assert all(str(path).endswith(f"{end}.jpg") for path, end in zip(found.sources, ends, strict=True))
    assert found.labels.tolist() == labels and found.class_names == class_names
    assert [image.mode for image in found.images()] == ["RGB"] * len(found)


def test_pets_classes_are_torchvisions(tmp_path: Path) -> None:
    fake_pets(tmp_path)
    for png in ("Abyssinian_1", "american_bulldog_1"):
        put_image(tmp_path / "oxford-iiit-pet/annotations/trimaps" / f"{png}.png", 2)
    theirs = torchvision.datasets.OxfordIIITPet(tmp_path, split="trainval")
    assert [label for _, label in theirs] == torchvision_target("pets", tmp_path, "train").labels.tolist()


def test_caltech_trains_on_30_of_each_of_102_folders_and_tests_on_the_rest(tmp_path: Path) -> None:
    fake_caltech101(tmp_path)
    train, test = (torchvision_target("caltech101", tmp_path, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["BACKGROUND_Google", "ant", "crab"]
    assert train.labels.bincount().tolist() == [30, 30, 30] and test.labels.bincount().tolist() == [5, 3, 1]
    assert not set(map(str, train.sources)) & set(map(str, test.sources)) and len(train) + len(test) == 99
    names = sorted(
        Path(str(path)).name
        for path, label in zip(train.sources, train.labels.tolist(), strict=True)
        if label == 2
    )
    left_out = max(
        range(1, 32), key=lambda number: hashlib.sha256(f"crab/image_{number:04d}.jpg".encode()).hexdigest()
    )
    # on any machine
    assert names == [f"image_{number:04d}.jpg" for number in range(1, 32) if number != left_out]


def test_voc_has_a_column_for_each_class_and_difficult_ones_do_not_count(tmp_path: Path) -> None:
    fake_voc2007(tmp_path)
    found = torchvision_target("voc2007", tmp_path, "test")
    assert found.labels.shape == (3, 20) and found.labels.dtype == torch.int64
    assert found.labels[:, VOC_CLASSES.index("cat")].tolist() == [1, 0, -1]
    assert found.labels[:, VOC_CLASSES.index("dog")].tolist() == [1, 1, 0]
    assert found.labels[:, VOC_CLASSES.index("sofa")].tolist() == [0, 0, 0]
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_voc_is_judged_by_a_regression_for_each_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the files of the challenge to its row: shades tell two classes apart, the third is a coin."""
    from ssl_emp.commands import evaluate

    monkeypatch.setattr("linear_eval.targets.VOC_CLASSES", ("bird", "cat", "dog"))
    rng, folder = np.random.default_rng(0), tmp_path / "VOCdevkit/VOC2007"
    counted = {}
    for first, (split, count) in enumerate((("train", 40), ("val", 40), ("test", 60))):
        shades = rng.integers(0, 256, count)
        ids = [f"00{first}{number:03d}" for number in range(count)]
        put_lines(folder / "ImageSets/Main" / f"{split}.txt", *ids)
        marks = {
            "bird": 2 * (shades > 100) - 1,
            "cat": 2 * (shades > 180) - 1,
            "dog": 2 * rng.integers(0, 2, count) - 1,
        }
        marks["bird"][::9] = 0  # difficult: shades of both kinds
        for name, column in marks.items():
            put_lines(
                folder / "ImageSets/Main" / f"{name}_{split}.txt",
                *(f"{i} {m:2d}" for i, m in zip(ids, column, strict=True)),
            )
        for image, shade in zip(ids, shades, strict=True):
            path = folder / "JPEGImages" / f"{image}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(shade + rng.integers(-3, 4, (8, 8, 3)), 0, 255).astype(np.uint8)).save(
                path
            )
        counted[split] = int(sum((column != 0).sum() for column in marks.values()))
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "name: one\ntargets: [{name: VOC, source: voc2007, metric: voc_map, val_split: val, image_size: 8}]\n"
    )
    words = [
        "transfer",
        f"transfer.suite={suite}",
        f"transfer.root={tmp_path}",
        "transfer.num_draws=100",
        "device=cpu",
        "cache_dir=null",
    ]
    assert evaluate.main(["pixels", *words, "--out", str(tmp_path / "out")]) == 0
    assert "not judged" not in capsys.readouterr().out
    (row, _) = json.loads((tmp_path / "out/transfer.json").read_text())
    assert row["metric"] == "VOC07 mAP %" and row["n_test"] == 60 and row["low"] <= row["high"]
    assert (
        "11-point AP of VOC2007 on val (40), refit on train+val, difficult objects not counted"
        in row["protocol"]
    )
    assert 75 < row["value"] < 95, "two classes near 100, one near the share of its positives"
    assert counted["train"] == 3 * 40 - 5


@pytest.mark.parametrize("name", TARGETS)
def test_a_missing_data_set_is_one_clear_line_and_makes_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=rf"^{name} \(test\) cannot be read from .*\. fix: ") as caught:
        torchvision_target(name, tmp_path / "data", "test")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_incomplete_data_set_and_wrong_names_are_clear(tmp_path: Path) -> None:
    fake_dtd(tmp_path)
    (tmp_path / "dtd/dtd/images/woven/woven_0000.jpg").unlink()
    with pytest.raises(EvalError, match=r"1 of 2 train images of dtd are missing, e.g. .*woven_0000.jpg"):
        torchvision_target("dtd", tmp_path, "train")
    with pytest.raises(EvalError, match="no target data set 'dtt'"):
        torchvision_target("dtt", tmp_path, "train")
    with pytest.raises(EvalError, match="pets has no split 'val'"):
        torchvision_target("pets", tmp_path, "val")
    (tmp_path / "dtd/dtd/labels/train1.txt").write_text("")
    with pytest.raises(EvalError, match="lists no images"):
        torchvision_target("dtd", tmp_path, "train")


def test_torchvision_has_the_classes_that_are_used() -> None:
    for name in (
        "Food101",
        "CIFAR10",
        "CIFAR100",
        "SUN397",
        "StanfordCars",
        "FGVCAircraft",
        "VOCDetection",
        "DTD",
    ):
        assert hasattr(torchvision.datasets, name)
    for name in ("OxfordIIITPet", "Caltech101", "Flowers102"):
        assert hasattr(torchvision.datasets, name)


def test_flowers_without_scipy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flowers-102/jpg").mkdir(parents=True)
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(EvalError, match="pip install scipy"):
        torchvision_target("flowers102", tmp_path, "train")


def test_flowers_labels_start_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = tmp_path / "flowers-102"
    for number in (1, 2, 3):
        put_image(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "setid.mat", {"trnid": [1, 3], "valid": [2], "tstid": [2]})
    savemat(folder / "imagelabels.mat", {"labels": [5, 102, 1]})
    # it compares checksums
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    found = torchvision_target("flowers102", tmp_path, "train")
    assert found.labels.tolist() == [4, 0] and len(found.class_names) == 102
