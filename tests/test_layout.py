"""What makes a split, an image and a class, in folders and in parquet; and two labeled sets compared before
they are matched.
"""

import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Pretrain, striped_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_emp.commands import evaluate, pretrain
from ssl_emp.data import decode
from ssl_emp.data.images import ImageSet, NoSplit, count_classes, find_images, load_images, load_test_images
from ssl_emp.data.matching import match_labels
from ssl_emp.data.sniff import image_format
from ssl_emp.data.splits import split_called, split_named, splits_of_folders
from ssl_emp.errors import UserError

STRIPES, _ = striped_images(48, size=8)


def put(root: Path, *names: str, content: bytes | None = None) -> Path:
    """Files with these names, each another image unless `content` is given."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            STRIPES[int(hashlib.md5(name.encode()).hexdigest(), 16) % 48] if content is None else content
        )
    return root


def classes(root: str, *names: str, count: int = 3) -> list[str]:
    return [f"{root}/{name}/{i}.png".lstrip("/") for name in names for i in range(count)]


def table(path: Path, labels: Any = (0, 1, 0, 1), image: Any = None, **columns: Any) -> Path:
    """A parquet file of that many images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"image": pa.array(STRIPES[: len(labels)]) if image is None else image, **columns}
    pq.write_table(pa.table(made | ({} if labels is None or "label" in columns else {"label": labels})), path)
    return path


def load(source: Path | str, split: str = "train", **options: Any) -> ImageSet:
    return load_images(str(source), split, **{"image_size": 8, **options})


def counts(images: ImageSet) -> list[int] | None:
    return None if images.labels is None else images.labels.bincount().tolist()


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert ". fix: " in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# --- words


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("TRAIN", "train"),
        ("my-train-00000-of-00002", "train"),
        ("data_train", "train"),
        ("Training.2", "train"),
        ("train2017", "train"),
        ("testing", "test"),
        ("x.Eval", "test"),
        ("EVALUATION-v2", "test"),
        ("valid", "val"),
        ("imagenet_val", "val"),
        ("dev-0", "val"),
        ("validation", "val"),
        *(
            (name, None)
            for name in (
                "testimony",
                "trainer",
                "latest",
                "contest",
                "values",
                "device",
                "strain",
                "trained",
                "évaluation",
            )
        ),
        ("train_test_split", None),  # which of the two?
    ],
)
def test_words_of_splits_stand_between_delimiters(name: str, split: str | None) -> None:
    assert split_named(name) == split


def test_a_folder_called_so_and_a_folder_whose_name_holds_the_word() -> None:
    called = [
        split_called(name)
        for name in ("Train", "train2017", "_val_", "train_images", "test_set", "training_shoe", "set")
    ]
    assert called == ["train", "train", "val", "train", "test", None, None]
    assert splits_of_folders(["train_a", "test_b"], more=False) == {"train_a": "train", "test_b": "test"}
    assert splits_of_folders(["cat", "dog", "test_set"], more=True) == {"test_set": "test"}
    flowers = {"flowers-train": "train", "flowers-val": "val"}
    assert splits_of_folders([*flowers, "cup", "test_tube"], more=True) == flowers
    for names in (
        ["training_shoe", "test_tube", "cup"],
        ["train", "bus", "car"],
        ["training_shoe"],
        ["cat", "dog"],
        ["a test", "b"],
    ):
        assert splits_of_folders(names, more=False) is None, names
    assert (
        splits_of_folders(["train"], more=False) == {"train": "train"}
        and splits_of_folders(["train"], more=True) is None
    )


# --- splits of folders

TWO = ("cat", "dog")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("TRAIN", "VAL"),
        ("training", "Evaluation"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
        ("archive/train", "archive/valid"),
        ("a/b/Train", "a/b/dev"),
        ("images/train", "images/eval"),
    ],
)
def test_folders_with_the_words_are_splits(tmp_path: Path, train: str, test: str) -> None:
    put(tmp_path, *classes(train, *TWO), *classes(test, *TWO, count=2))
    put(tmp_path, "labels/train/0.txt", content=b"0 0.5 0.5 1 1")  # no images: not a folder beside images
    got, held = load(tmp_path), load(tmp_path, "test")
    assert (counts(got), got.class_names) == ([3, 3], [*TWO]) and all(
        name.startswith(train) for name in got.names
    )
    assert (counts(held), held.class_names) == ([2, 2], [*TWO]) and f"{train}/" in got.labels_from


def test_splits_within_every_class_folder(tmp_path: Path) -> None:
    """As in data sets for the detection of defects: bottle/train/good, bottle/test/broken,
    bottle/ground_truth/broken.
    """
    for name in ("bottle", "cable"):
        put(
            tmp_path,
            *classes(f"{name}/train", "good"),
            *classes(f"{name}/test", "good", "broken"),
            *classes(f"{name}/ground_truth", "broken"),
        )
    got, test = load(tmp_path), load(tmp_path, "test")
    assert (counts(got), counts(test)) == ([3, 3], [6, 6]) and got.class_names == [
        "bottle",
        "cable",
    ] == test.class_names
    assert ("outside of the splits", 6) in [item[:2] for item in got.unused]


@pytest.mark.parametrize("held", ["test", "Testing", "val", "eval2"])
def test_a_test_folder_beside_others_is_not_trained_on(tmp_path: Path, held: str) -> None:
    put(tmp_path, *classes("", *TWO), *classes(held, *TWO, count=2))
    got = load(tmp_path)
    assert counts(got) == [3, 3] and got.class_names == [*TWO] and f"not trained on: {held}/" in got.notes[0]
    assert counts(load(tmp_path, "test")) == [2, 2]


def test_one_folder_of_classes_beside_a_test_split_is_the_train_split(tmp_path: Path) -> None:
    for name in ("trainval", "learn", "all"):
        put(tmp_path / name, *classes(f"x/{name}", *TWO), *classes("x/test", *TWO, count=2))
        got, test = load(tmp_path / name), load(tmp_path / name, "test")
        assert (counts(got), counts(test)) == ([3, 3], [2, 2]) and got.class_names == [
            *TWO
        ] == test.class_names, name
        assert got.labels_from == f"the folders in x/{name}/" and "not trained on: x/test/" in got.notes[0]
    put(tmp_path / "flat", "unlabeled/0.png", "unlabeled/1.png", *classes("test", *TWO))
    put(tmp_path / "mixed", *classes("cat", "old"), "cat/0.png", *classes("test", *TWO))
    for name, count in (("flat", 2), ("mixed", 4)):
        assert len(load(tmp_path / name).names) == count and load(tmp_path / name).labels is None, name


def test_splits_in_one_folder_are_found_past_a_few_other_images(tmp_path: Path) -> None:
    inner = [*classes("set/train", *TWO, count=9), *classes("set/VALID", *TWO, count=2)]
    for name, stray in (
        ("one", "devkit/logo.png"),
        ("deep", "devkit/a/b/logo.png"),
        ("both", "a/0.png"),
        ("loose", "logo.png"),
    ):
        put(tmp_path / name, *inner, stray, *(["b/1.png"] if name == "both" else []))
        got, test = load(tmp_path / name), load(tmp_path / name, "test")
        assert (counts(got), counts(test)) == ([9, 9], [2, 2]), name
        assert [why for why, _, _ in got.unused] == ["outside of the splits"], name
    put(tmp_path / "further", *(f"data/{name}" for name in inner), "data/demo/x.png", "docs/y.png")
    assert counts(load(tmp_path / "further")) == [9, 9] and counts(load(tmp_path / "further", "test")) == [
        2,
        2,
    ]
    half = put(tmp_path / "half", *inner, *classes("more", "a", count=9))
    assert load(half).class_names == ["more", "set"], "no few"
    lacks = put(tmp_path / "lacks", *classes("cat", "train", "test", count=20), "dog/test/0.png")
    assert load(lacks).class_names == ["cat", "dog"], (
        "a class with splits of its own, and one that lacks a part"
    )


def test_a_folder_with_nothing_but_a_test_split(tmp_path: Path) -> None:
    put(tmp_path, *classes("test", *TWO))
    with pytest.raises(NoSplit, match=r"has no train split, only test/\. fix: .*name it: .*/test"):
        load(tmp_path)
    assert counts(load(tmp_path, "test")) == counts(load(tmp_path / "test")) == [3, 3]


@pytest.mark.parametrize(
    "names",
    [
        ("train", "bus", "car"),
        ("trainer", "tester"),
        ("testimony", "cat"),
        ("training_shoe", "test_tube", "cup"),
    ],
)
def test_classes_whose_names_are_no_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    got = load(put(tmp_path, *classes("", *names)))
    assert counts(got) == [3] * len(names) and got.class_names == sorted(names) and got.notes == []
    with pytest.raises(NoSplit):
        load(tmp_path, "test")


def test_other_folders_beside_the_splits_are_counted(tmp_path: Path) -> None:
    put(
        tmp_path,
        *classes("train", *TWO),
        *classes("test", *TWO),
        "unlabeled/0.png",
        "unlabeled/1.png",
        "logo.png",
    )
    got = load(tmp_path)
    assert len(got.names) == 6 and got.unused == [("outside of the splits", 3, "logo.png")]
    assert got.not_used == "3 outside of the splits (logo.png)"


# --- what is an image


def test_files_are_known_by_content_where_the_suffix_tells_nothing(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 40))
    made = {
        "JPEG": ".jfif",
        "PNG": "",
        "GIF": ".php",
        "WEBP": ".jpg?w=640",
        "BMP": ".bin",
        "TIFF": ".dat",
        "PPM": ".JPG_large",
    }
    for fmt, suffix in {**made, **({"AVIF": ".img"} if "AVIF" in decode.FORMATS else {})}.items():
        image.save(tmp_path / f"{fmt}{suffix}", fmt)
    image.save(tmp_path / "hidden in.txt", "PNG")
    texts = {
        "BMW.doc": b"BMW and other cars, a list",
        "P1.me": b"P1 is text, see P2",
        "README": b"hello",
        "a.txt": b"",
        "x.riff": b"RIFF0000WAVE",
    }
    for name, content in texts.items():
        put(tmp_path, name, content=content)
    got = load(tmp_path)
    assert (
        len(got.names) == 8 + ("AVIF" in decode.FORMATS)
        and not got.skipped
        and sum(count for _, count, _ in got.unused) == len(texts)
    )
    assert (got.pixels[:].float().mean((2, 3)) - torch.tensor(image.getpixel((0, 0)))).abs().max() < 6


def test_sidecars_in_masses_are_not_opened_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(3)))
    put(tmp_path, *(f"{i}.json" for i in range(300)), content=b"{}")
    looked = []

    def counting(path: str, *args: Any, **kwargs: Any) -> Any:
        looked.append(path)
        return open(path, *args, **kwargs)

    monkeypatch.setattr("ssl_emp.data.folders.open", counting, raising=False)
    got = load(tmp_path)
    assert len(looked) <= 100 and got.unused == [(".json files", 300, "0.json")]


def test_which_of_two_formats_of_one_container_it_is() -> None:
    def head(*brands: bytes) -> bytes:
        return bytes([0, 0, 0, 12 + 4 * len(brands)]) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])

    for brands, form in (
        ((b"avif", b"mif1"), "AVIF"),
        ((b"mif1", b"miaf", b"avif"), "AVIF"),
        ((b"avis", b"msf1"), "AVIF"),
        ((b"heic", b"mif1"), "HEIF"),
        ((b"mif1", b"heic"), "HEIF"),
        ((b"msf1", b"hevc"), "HEIF"),
        ((b"qt  ", b"mp42"), None),
    ):
        assert image_format(head(*brands)) == form


@pytest.mark.parametrize(
    "head",
    [b"", b"BM", b"P5", b"II*", b"\xff\xd8", b"GIF88a", b"\0\0\0\x18ftypmp42" + bytes(16), b"BM" + bytes(30)],
)
def test_what_is_no_image(head: bytes) -> None:
    assert image_format(head) is None


@given(st.binary(max_size=40))
def test_any_bytes_have_a_format_or_none(head: bytes) -> None:
    assert image_format(head) in (None, *decode.FORMATS, "AVIF", "HEIF")


def test_what_storage_devices_leave_behind_is_no_class(tmp_path: Path) -> None:
    put(
        tmp_path,
        *classes("", *TWO),
        "@eaDir/0.jpg",
        "#recycle/cat/1.png",
        "cat/__MACOSX/2.png",
        "$RECYCLE.BIN/3.png",
        "lost+found/4.png",
    )
    put(
        tmp_path,
        "dog/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg",
        "@Recycle/x.png",
        ".thumbnails/9.png",
        "._a.jpg",
        "System Volume Information/a.png",
    )
    put(
        tmp_path,
        "@SynoResource/0.png",
        "~snapshot/0.png",
        "RECYCLED/0.png",
        "Network Trash Folder/0.png",
        "Temporary Items/0.png",
    )
    put(tmp_path, "Thumbs.db", "cat/desktop.ini", content=b"x")
    got = load(tmp_path)
    assert counts(got) == [3, 3] and got.class_names == [*TWO]
    assert {why: count for why, count, _ in got.unused} == {
        "service folders": 13,
        "hidden": 2,
        "service files": 2,
    }


def test_the_pictures_in_a_run_are_nobodys_images(tmp_path: Path) -> None:
    """A run beside the images, or among those of a class, and what evaluations drew in it; a config alone
    makes no run.
    """
    put(
        tmp_path,
        *classes("", *TWO),
        "run/eval/diagnose/map.png",
        "cat/runs/a/eval/diagnose/neighbors.png",
        "cat/more/3.png",
    )
    for folder in ("run", "cat/runs/a"):
        put(
            tmp_path,
            *(f"{folder}/{name}" for name in ("config.yaml", "environment.json", "train.log")),
            content=b"x",
        )
    put(tmp_path, "cat/more/config.yaml", content=b"x")
    got = load(tmp_path)
    assert counts(got) == [4, 3] and got.class_names == [*TWO]
    assert ("run folders", 2, "cat/runs/a") in got.unused


def test_heic_is_counted_where_it_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decode, "FORMATS", tuple(fmt for fmt in decode.FORMATS if fmt not in ("HEIF", "AVIF"))
    )
    put(tmp_path, "a.png", "b.png")
    put(tmp_path, "IMG_1.HEIC", "IMG_2.heif", content=b"x")
    put(tmp_path, "from_a_phone", content=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    put(tmp_path, "c.avif", content=b"x")
    got = load(tmp_path)
    assert len(got.names) == 2 and {
        count for why, count, _ in got.unused if "pip install pillow-heif" in why
    } == {3}
    assert ("of AVIF, which this Pillow cannot read", 1, "c.avif") in got.unused
    (tmp_path / "phone").mkdir()
    (tmp_path / "IMG_1.HEIC").rename(tmp_path / "phone/IMG_1.HEIC")
    said = refused(lambda: load(tmp_path / "phone"))
    assert (
        "1 of HEIC, which pip install pillow-heif makes readable, such as IMG_1.HEIC" in said
        and "fix: pip install" in said
    )


def test_heic_counts_as_an_image_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "FORMATS", (*decode.FORMATS, "HEIF"))
    put(tmp_path, "a.heic")  # a PNG, in truth: it is the decoder that looks
    put(tmp_path, "b.png")
    assert load(tmp_path).names == ["a.heic", "b.png"]


@pytest.mark.parametrize("link", [os.link, lambda target, path: os.symlink(target, path)])
def test_second_names_of_a_file_are_counted(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    put(tmp_path, *classes("", *TWO))
    (tmp_path / "pet").mkdir()
    for i in range(3):
        link(tmp_path / f"cat/{i}.png", tmp_path / f"pet/{i}.png")
    put(tmp_path, "pet/own.png")
    got = load(tmp_path)
    assert counts(got) == [3, 3, 1] and got.unused == [("second links", 3, "pet/0.png")]


def test_links_in_both_splits_and_links_into_a_store(tmp_path: Path) -> None:
    """A file may be in train and in test (which is told later, pixel by pixel), and may lie elsewhere as DVC
    and the Hub keep it.
    """
    put(tmp_path / "store", *(f"{i}" for i in range(4)))
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "cat", "dog", "dog")):
            (tmp_path / f"data/{split}/{name}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"data/{split}/{name}/{i}.png").symlink_to(tmp_path / f"store/{i}")
    (tmp_path / "data/test/loop").symlink_to(tmp_path / "data")
    for split in ("train", "test"):
        assert counts(load(tmp_path / "data", split)) == [2, 2]
    put(tmp_path / "words", *classes("", "train", "car"))  # no splits, though a folder is called so
    os.link(tmp_path / "words/train/0.png", tmp_path / "words/car/x.png")
    got = load(tmp_path / "words")
    assert len(got.names) == 6 and got.unused[0][:2] == ("second links", 1)


class _NoNumber:
    """A file's status as some file systems give it."""

    def __init__(self, info: os.stat_result, number: int) -> None:
        self.info, self.st_ino = info, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.info, name)


@pytest.mark.parametrize("number", [0, 7])
def test_inode_numbers_that_tell_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put(tmp_path, *classes("", *TWO), *classes("ape", "young", "old"))
    (tmp_path / "ape/loop").symlink_to(tmp_path)
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: _NoNumber(real(*args, **kwargs), number))
    got = load(tmp_path)
    assert len(got.names) == 12 and got.class_names == ["ape", "cat", "dog"]


# --- classes of folders


@pytest.mark.parametrize(
    ("per_class", "stray", "labelled"),
    [(3, 1, True), (3, 2, True), (8, 7, True), (1, 1, False), (2, 2, False), (3, 50, False)],
)
def test_a_stray_image_does_not_take_the_labels_away(
    tmp_path: Path, per_class: int, stray: int, labelled: bool
) -> None:
    put(tmp_path, *classes("", *TWO, count=per_class), *(f"stray{i}.png" for i in range(stray)))
    got = load(tmp_path)
    if labelled:
        assert counts(got) == [per_class] * 2 and got.unused == [
            ("beside the class folders", stray, "stray0.png")
        ]
    else:  # as many as a class has: then these folders are no classes, and nothing is lost
        assert (
            got.labels is None
            and len(got.names) == 2 * per_class + stray
            and f"{stray} of " in got.labels_from
        )
    assert len(load(tmp_path, labels="none").names) == 2 * per_class + stray
    full = {
        name: load(tmp_path, labels=name, store="raw", cache_dir=str(tmp_path / ".cache"))
        for name in ("auto", "none")
    }
    assert len(full["none"].pixels) == 2 * per_class + stray, (
        "the cache is another where the images are others"
    )


def test_dates_are_told_as_the_classes_that_they_become(tmp_path: Path) -> None:
    months = [f"2024-{month:02}" for month in range(1, 7)]
    got = load(put(tmp_path, *classes("", *months)))
    assert got.labelled == "6 classes from the first folder level: 2024-01, 2024-02, 2024-03, 2024-04 …"
    assert load(tmp_path, labels="none").labelled == "no labels (labels are off)"
    assert "one folder, only/" in load(put(tmp_path / "x", "only/0.png", "only/1.png")).labelled
    assert "no class folders" in load(tmp_path / "2024-01").labelled


def test_folders_called_by_numbers_are_numbered_by_value(tmp_path: Path) -> None:
    put(tmp_path / "a", *classes("", *map(str, range(12)), count=1))
    got = load(tmp_path / "a")
    assert got.labels is not None and [int(name.split("/")[0]) for name in got.names] == got.labels.tolist()
    assert load(put(tmp_path / "b", *classes("", "1", "01", "2", count=1))).class_names == ["01", "1", "2"], (
        "not by value where two are one"
    )


def test_classes_of_train_come_from_train(tmp_path: Path) -> None:
    put(tmp_path, *classes("train", "b", "d"), *classes("test", "a", "b", "c", "d", "e"))
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.class_names == ["b", "d"] and count_classes(train) == 2
    assert test.class_names == ["b", "d", "a", "c", "e"] and counts(test) == [3] * 5


# --- parquet: splits, shards, columns of images


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("my-train-00000-of-00001.parquet", "my-test-00000-of-00001.parquet"),
        ("data_train.parquet", "testing.parquet"),
        ("TRAIN.PARQUET", "Validation.parquet"),
        ("data/train-0.parquet", "data/dev-0.parquet"),
        ("default/partial-train/0000.parquet", "default/test/0000.parquet"),
        ("training.pq", "eval.pq"),
    ],
)
def test_parquet_files_with_the_words_are_splits(tmp_path: Path, train: str, test: str) -> None:
    table(tmp_path / train)
    table(tmp_path / test, [1, 0])
    put(tmp_path, "README.md", ".gitattributes", content=b"x")
    assert counts(load(tmp_path)) == [2, 2] and load(tmp_path).names[0] == f"{train}#0"
    assert counts(load(tmp_path, "test")) == [1, 1]
    if "/" not in train:
        assert len(load(tmp_path / "*.p*", image_size=8).names) == 4 or train.isupper(), (
            "a glob over both splits trains on one"
        )


def test_parquet_files_without_the_words_are_the_train_split(tmp_path: Path) -> None:
    table(tmp_path / "testimony.parquet")
    table(tmp_path / "trainer.parquet")
    assert len(load(tmp_path).names) == 8
    table(tmp_path / "test.parquet", [0, 1])
    got = load(tmp_path)
    assert (
        len(got.names) == 8
        and "not trained on: test.parquet" in got.notes[0]
        and len(load(tmp_path, "test").names) == 2
    )
    assert len(load(tmp_path / "test.parquet").names) == 2 == len(load(tmp_path / "t*t.parquet").names), (
        "named, it is meant"
    )
    table(tmp_path / "only/eval-0.parquet")
    assert "no train split, only eval-0.parquet" in refused(lambda: load(tmp_path / "only"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "lacks 1 of 3 files: data/train-00001-of-00003"),
        (["train-00000-OF-00002"], "lacks 1 of 2 files: data/train-00001-OF-00002"),
        (["train_0_of_2"], "lacks 1 of 2 files: data/train_1_of_2"),
        (["train-00003-of-00005"], "lacks 4 of 5 files: data/train-00000-of-00005 and 3 more"),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], "one table twice"),
        (["train-00000-of-00001-aa", "train-00000-of-00001-bb"], "one table twice"),
        (["train", "train-00000-of-00001"], "one table twice"),
        (["train-00000-of-00002", "train-00007-of-00002"], "cannot be one of 2"),
        (["train-00000-of-00001"], ""),
        (["train-1-of-2", "train-2-of-2"], ""),
        (["train-00000-of-00002-0f3a", "train-00001-of-00002-77bc", "train_more-00000-of-00001"], ""),
    ],
)
def test_shards_are_complete_and_there_once(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        table(tmp_path / f"data/{name}.parquet")
    table(tmp_path / "data/test-00000-of-00009.parquet")  # the test split is not asked for
    if not message:
        assert len(load(tmp_path).names) == 4 * len(names)
        return
    assert message in refused(lambda: load(tmp_path))
    if "lacks" in message:
        assert len(load(tmp_path / "data/train*.parquet").names) == 4 * len(names), (
            "named by a glob, they are what is wanted"
        )


def test_several_data_sets_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("fruit", "all"):
        table(tmp_path / f"{name}/train/0000.parquet")
    assert "several data sets: all, fruit" in refused(lambda: load(tmp_path))
    assert len(load(tmp_path / "fruit").names) == 4 and len(load(tmp_path / "*/train/*.parquet").names) == 8


def test_shards_are_open_one_at_a_time(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    for i in range(60):
        table(tmp_path / f"train-{i:05}-of-00060.parquet", [0, 1])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 30 if before else 100, hard))
    try:
        got = load(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(got.names) == 120 and counts(got) == [60, 60]
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 1


def test_tables_beside_images_and_images_beside_tables(tmp_path: Path) -> None:
    put(tmp_path / "a", *classes("", *TWO))
    pq.write_table(pa.table({"file_name": ["cat/0.png"]}), tmp_path / "a/metadata.parquet")
    put(tmp_path / "a", "train.parquet", content=b"no table at all")
    got = load(tmp_path / "a")
    assert counts(got) == [3, 3] and ("tables", 2, "metadata.parquet") in got.unused
    vectors = {
        "binary": pa.array([b"x"] * 50),
        "fixed": pa.array([bytes(16)] * 50, pa.binary(16)),
        "null": pa.nulls(50, pa.binary()),
    }
    for name, column in (*vectors.items(), ("struct", pa.array([{"bytes": b"abc"}] * 50))):
        put(tmp_path / name, *classes("", *TWO))
        pq.write_table(pa.table({"embedding": column}), tmp_path / name / "features.parquet")
        assert counts(load(tmp_path / name)) == [3, 3], "bytes, but no images"
        table(tmp_path / "tables" / name / "x.parquet")
        pq.write_table(pa.table({"embedding": column}), tmp_path / "tables" / name / "features.parquet")
        assert counts(load(tmp_path / "tables" / name)) == [2, 2], "bytes, but no images"
    table(tmp_path / "b/data/train-0.parquet")
    put(tmp_path / "b", "assets/preview.png", "assets/second.png")
    got = load(tmp_path / "b")
    assert len(got.names) == 4 and got.unused == [("beside the tables", 2, "assets/preview.png")]
    assert len(load(tmp_path / "b", kind="folder").names) == 2
    table(tmp_path / "c/0.parquet")
    pq.write_table(pa.table({"width": [1]}), tmp_path / "c/meta.parquet")
    got = load(tmp_path / "c")
    assert len(got.names) == 4 and got.unused == [("tables without a column of images", 1, "meta.parquet")]
    pq.write_table(pa.table({"width": [1]}), tmp_path / "c/0.parquet")
    assert "no column of images in any of its 2 parquet files" in refused(lambda: load(tmp_path / "c"))


def struct_of(kind: pa.DataType) -> pa.Array:
    return pa.StructArray.from_arrays(
        [pa.array(STRIPES[:4], kind), pa.array([None] * 4, pa.string())], ["bytes", "path"]
    )


@pytest.mark.parametrize(
    "column",
    [
        pa.array(STRIPES[:4], pa.binary_view()),
        pa.array(STRIPES[:4]).dictionary_encode(),
        pa.array([content + bytes(9000 - len(content)) for content in STRIPES[:4]], pa.binary(9000)),
        struct_of(pa.large_binary()),
        struct_of(pa.binary_view()),
        pa.array([*STRIPES[:3], None], pa.large_binary()),
    ],
    ids=lambda column: str(column.type)[:24],
)
def test_columns_of_bytes_of_every_kind(tmp_path: Path, column: pa.Array) -> None:
    got = load(table(tmp_path / "x.parquet", image=column))
    expected = [
        np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
        for content in STRIPES[: 4 - column.null_count]
    ]
    assert np.array_equal(got.pixels[:].numpy(), np.stack(expected)) and len(got.skipped) == column.null_count


def test_the_column_of_images_is_found_by_content(tmp_path: Path) -> None:
    x = tmp_path / "x.parquet"
    pq.write_table(
        pa.table(
            {
                "md5": [bytes(16)] * 4,
                "uuid": [bytes(8)] * 4,
                "jpg": STRIPES[:4],
                "mask": STRIPES[4:8],
                "label": [0, 1, 0, 1],
            }
        ),
        x,
    )
    got = load(x)
    assert len(got.names) == 4 and "column jpg" in got.notes[0] and "mask" in got.notes[0]
    mask = load(x, image_column="mask")
    assert not torch.equal(mask.pixels[:], got.pixels[:])
    cached = [
        load(x, image_column=name, store="raw", cache_dir=str(tmp_path / "cache")) for name in ("jpg", "mask")
    ]
    assert torch.equal(cached[0].pixels[:], got.pixels[:]) and torch.equal(
        cached[1].pixels[:], mask.pixels[:]
    )
    pq.write_table(pa.table({"image": [b"not"] * 4, "photo": [*[None] * 2, *STRIPES[:2]]}), x)
    assert len(load(x).names) == 2, "a column called image is not taken for one that holds images"
    assert "did you mean data.image_column=photo?" in refused(lambda: load(x, image_column="foto"))
    pq.write_table(pa.table({"image": STRIPES[:2], "n": [1, 2]}), x)
    assert "is int64, which holds no encoded images" in refused(lambda: load(x, image_column="n"))


# --- parquet: columns of labels

NAMED = ["ape", "cat", "ape", "dog"]


@pytest.mark.parametrize(
    ("labels", "class_names", "numbers"),
    [
        (pa.array(NAMED, pa.large_string()), ["ape", "cat", "dog"], [0, 1, 0, 2]),
        (pa.array(NAMED, pa.string_view()), ["ape", "cat", "dog"], [0, 1, 0, 2]),
        (pa.array(["dog", "cat", "dog", "ape"]).dictionary_encode(), ["ape", "cat", "dog"], [2, 1, 2, 0]),
        (pa.array([7, 9, 7, 8], pa.uint64()).dictionary_encode(), ["7", "8", "9"], [0, 2, 0, 1]),
        (pa.array([True, False, True, True]), ["false", "true"], [1, 0, 1, 1]),
        (pa.array(["10", "9", "010", "9"]), ["010", "10", "9"], [1, 2, 0, 2]),
        (pa.array(["10", "9", "2", "9"]), ["2", "9", "10"], [2, 1, 0, 1]),
        (pa.array(["cafe\u0301", "bar", "caf\xe9", "bar"]), ["bar", "caf\xe9"], [1, 0, 1, 0]),
        (pa.array([1, 0, 1, 2], pa.uint8()), None, [1, 0, 1, 2]),
        (pa.array([10**12, 5, 5, 10**12]), ["5", str(10**12)], [1, 0, 0, 1]),
        (pa.array([1, 2, 1, 2], pa.int16()), ["1", "2"], [0, 1, 0, 1]),
    ],
    ids=lambda value: str(getattr(value, "type", ""))[:20],
)
def test_labels_of_every_kind(
    tmp_path: Path, labels: pa.Array, class_names: list[str] | None, numbers: list[int]
) -> None:
    got = load(table(tmp_path / "x.parquet", label=labels))
    assert got.class_names == class_names and got.labels is not None and got.labels.tolist() == numbers
    assert "column label" in got.labelled and count_classes(got) == len(set(numbers))


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (pa.array([0.0, 1.0, 0.0, 1.0]), "is double"),
        (pa.array([0, None, 1, 0]), "1 of 4 labels of"),
        (pa.array(["a", "", None, "b"]), "2 of 4 labels of"),
        (pa.array([[0], [1], [0], [1]]), "is list"),
        (pa.array([{"id": 1}] * 4), "is struct"),
        (pa.array([0, 1, 2, 3], pa.timestamp("s")), "is timestamp"),
        (pa.array([2**64 - 1, 1, 2, 3], pa.uint64()), "more than 63 bits"),
        (pa.array(STRIPES[:4]), "is binary"),
        (pa.array([-1] * 4), "are missing"),
        (pa.array([None] * 4), "are missing"),
    ],
    ids=lambda value: str(getattr(value, "type", ""))[:20],
)
def test_labels_that_cannot_be_used_do_not_stop_the_training(
    tmp_path: Path, labels: pa.Array, why: str
) -> None:
    x = table(tmp_path / "x.parquet", label=labels)
    got = load(x)
    assert got.labels is None and got.class_names is None and len(got.names) == 4 and why in got.labelled
    assert load(x, label_column="label").labels is None
    table(tmp_path / "two/0.parquet", label=labels)
    table(tmp_path / "two/1.parquet", [0, 1])
    assert load(tmp_path / "two").labels is None


def test_label_columns_of_several_files(tmp_path: Path) -> None:
    table(tmp_path / "a/0.parquet", ["cat", "dog"])
    table(tmp_path / "a/1.parquet", ["ape", "dog"])
    got = load(tmp_path / "a")
    assert (
        got.class_names == ["ape", "cat", "dog"]
        and got.labels is not None
        and got.labels.tolist() == [1, 2, 0, 2]
    )
    table(tmp_path / "a/2.parquet", [0, 1])
    assert "numbers in one file and text in another" in load(tmp_path / "a").labelled
    table(tmp_path / "a/2.parquet", None, image=pa.array(STRIPES[:2]))
    assert "2.parquet has no column label" in load(tmp_path / "a").labelled
    table(tmp_path / "b/0.parquet", [5, 900], label_id=[1, 2], klasse=["x", "y"])
    assert load(tmp_path / "b").class_names == ["5", "900"] and load(
        tmp_path / "b", label_column="klasse"
    ).class_names == ["x", "y"]
    assert "did you mean data.label_column=label_id?" in refused(
        lambda: load(tmp_path / "b", label_column="labelid")
    )
    assert "leave data.label_column out" in refused(
        lambda: load(put(tmp_path / "c", "0.png"), label_column="label")
    )


def declared(path: Path, labels: list[int], names: list[str] | None) -> Path:
    written = table(path, labels)
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    pq.write_table(
        pq.read_table(written).replace_schema_metadata(
            {"huggingface": json.dumps(features)} if names else {}
        ),
        written,
    )
    return written


def test_declared_names_of_classes(tmp_path: Path) -> None:
    declared(tmp_path / "train-0.parquet", [0, 2], ["ape", "bat", "cat"])
    declared(tmp_path / "test-0.parquet", [1, 2], None)
    assert load(tmp_path).class_names == load(tmp_path, "test").class_names == ["ape", "bat", "cat"], (
        "the splits share their classes"
    )
    declared(tmp_path / "train-1.parquet", [0, 1], ["bat", "ape", "cat"])
    assert "numbers other classes" in load(tmp_path).labelled
    declared(tmp_path / "train-1.parquet", [0, 7], ["ape", "bat", "cat"])
    assert "has label 7, but names for 3 classes only" in load(tmp_path).labelled


def test_a_column_that_cannot_be_used_stops_what_needs_labels_alone(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "x.parquet", [0.5] * 16)
    words = [
        "--config",
        str(tiny_config),
        f"data.source={path}",
        "data.image_size=8",
        "augment.size=8",
        f"out={tmp_path / 'run'}",
    ]
    assert pretrain.main([*words, "epochs=1", "prune.policy=none"]) == 0
    assert "no labels (column label is double" in capsys.readouterr().out
    assert pretrain.main([*words, "objective=supervised", f"out={tmp_path / 'other'}"]) == 2
    assert "column label is double" in capsys.readouterr().err
    assert (
        evaluate.main(["pixels", "knn", f"data.source={path}", f"data.test_source={path}", "device=cpu"]) == 2
    )
    assert "column label is double" in "".join(capsys.readouterr())


# --- two sets compared


def labelled(labels: list[int], names: list[str] | None) -> ImageSet:
    pixels = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    return ImageSet(pixels, torch.tensor(labels), [str(i) for i in range(len(labels))], names, [])


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (([0, 1, 2], ["a", "b", "c"]), ([0, 1], ["c", "a"]), [2, 0]),
        (([0, 1], ["bar", "caf\xe9"]), ([1, 0], ["cafe\u0301", "bar"]), [0, 1]),
        (([*range(12)], sorted(map(str, range(12)))), ([11, 2, 10], None), [3, 4, 2]),
        (([*range(11)], None), ([0, 1, 2], ["0", "010", "9"]), [0, 10, 9]),
        (([0, 1, 2], ["00", "01", "02"]), ([0, 1], ["1", "2"]), [1, 2]),
        (([0, 1], ["5", "900"]), ([900, 5], None), [1, 0]),
        (([0, 1, 2], None), ([2, 0], None), [2, 0]),
        (([0, 1], ["false", "true"]), ([1, 0], ["true", "false"]), [0, 1]),
    ],
)
def test_classes_are_matched_by_name_or_by_value(train: Any, test: Any, expected: list[int]) -> None:
    got, line = match_labels(labelled(*train), labelled(*test))
    assert got.labels is not None and got.labels.tolist() == expected and line == ""


@pytest.mark.parametrize(
    ("train", "test", "unknown"),
    [
        (([0, 1], ["a", "b"]), ([0, 1, 2, 2], ["a", "b", "z"]), "z"),
        (([0, 1], None), ([0, 1, 7], None), "7"),
        (([0, 1], ["a", "b"]), ([0, 2, 1], ["a", "B", "b"]), "B"),
        (([0, 1], ["3", "5"]), ([3, 4], None), "4"),
        (([0, 0], ["a", "b"]), ([0, 1], ["a", "b"]), "b"),  # declared, without an image
    ],
)
def test_a_class_that_train_lacks_is_told_and_never_right(train: Any, test: Any, unknown: str) -> None:
    train_set = labelled(*train)
    got, line = match_labels(train_set, labelled(*test))
    assert f"1 test class has no train images ({unknown})" in line
    assert got.labels is not None and len(set(got.labels.tolist()) - set(train_set.labels.tolist())) == 1  # type: ignore[union-attr]  # given
    with pytest.raises(UserError, match="have no train images"):
        match_labels(train_set, labelled(*test), "val")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            ([0, 1], ["cat", "dog"]),
            ([0, 1], None),
            r"the train split names its classes \(cat, dog\), the test split only numbers",
        ),
        (([0, 1], None), ([0, 1], ["cat", "dog"]), "the test split names its classes"),
        (([0, 1], ["0", "x"]), ([0, 1], None), "only numbers them"),
        (
            ([0, 1], ["a", "b"]),
            ([0, 1, 2], ["a", "x", "y"]),
            "2 of the 3 classes of the test split have no train images: x, y",
        ),
        (([0, 1], None), ([5, 6], None), "2 of the 2 classes"),
        (([0, 1], ["cat", "dog"]), ([0], ["images"]), "1 of the 1 classes"),
    ],
)
def test_sets_that_do_not_belong_together_are_refused(train: Any, test: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        match_labels(labelled(*train), labelled(*test))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.booleans(), st.booleans(), st.integers(1, 4))
def test_matching_numbers_written_in_any_way_is_matching_values(
    values: list[int], train_named: bool, test_named: bool, width: int
) -> None:
    """31 classes on both sides, as names padded with zeros or as bare numbers: the label means the same
    value.
    """
    names = [f"{value:0{width}}" for value in range(31)]
    order = sorted(names) if train_named else names
    train = labelled([*range(31)], order if train_named else None)
    got, line = match_labels(train, labelled(values, names if test_named else None))
    assert got.labels is not None and line == ""
    assert [int(order[label]) for label in got.labels.tolist()] == values


# --- to the end: val in the place of test, evaluators, a supervised run


def test_a_val_split_takes_the_place_of_a_test_split_without_labels(tmp_path: Path) -> None:
    put(tmp_path / "im", *classes("train", *TWO), *classes("val", *TWO, count=2), "test/0.png", "test/1.png")
    put(
        tmp_path / "deep",
        *classes("train", *TWO),
        *classes("Valid", *TWO, count=2),
        "Test/images/0.png",
        "Test/images/1.png",
    )
    missing = {
        "nan": [float("nan")] * 2,
        "float": [-1.0] * 2,
        "mixed": pa.array([None, float("nan")], pa.float32()),
        "text": ["", None],
    }
    for name, labels in (("hub", [-1, -1]), ("none", None), *missing.items()):
        table(tmp_path / f"{name}/train-0.parquet")
        table(tmp_path / f"{name}/validation-0.parquet")
        table(tmp_path / f"{name}/test-0.parquet", labels, image=pa.array(STRIPES[:2]))
    for name in ("im", "deep", "hub", "none", *missing):
        got = load(tmp_path / name, "test")
        assert (
            counts(got) == [2, 2] and "has no labels, so" in got.notes[0] and "val" in got.stand_in.lower()
        ), name
        assert len(load(tmp_path / name, "test", labels="none").names) == 2, "without labels, test is test"
    put(tmp_path / "im", *classes("test", *TWO, count=4))
    (tmp_path / "im/test/0.png").unlink()
    assert counts(load(tmp_path / "im", "test")) == [4, 4]


def test_a_test_source_is_its_test_split_or_all_of_it(tmp_path: Path) -> None:
    put(tmp_path / "whole", *classes("", *TWO))
    put(tmp_path / "split", *classes("train", *TWO), *classes("dev", *TWO, count=1))
    table(tmp_path / "t.parquet", [0, 1, 0, 1], kind=["dog", "cat", "dog", "dog"])
    options: dict[str, Any] = {"image_size": 8, "label_column": "kind"}
    assert len(load_test_images(str(tmp_path / "t.parquet"), str(tmp_path / "whole"), **options).names) == 6
    assert len(load_test_images(str(tmp_path / "t.parquet"), str(tmp_path / "split"), **options).names) == 2
    assert load_test_images("mnist5k", str(tmp_path / "t.parquet"), **options).class_names == ["cat", "dog"]
    put(tmp_path / "broken", "test/0.png", "train/1.png", content=b"")
    assert "none of the 1 images" in refused(
        lambda: load_test_images("mnist5k", str(tmp_path / "broken"), image_size=8)
    )


def test_evaluators_agree_on_a_class_that_train_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(
        tmp_path,
        *classes("train", "a", "b", count=6),
        *classes("test", "a", "b", unicodedata.normalize("NFD", "é"), count=2),
    )
    settings = [
        "knn.num_neighbors=1",
        "fewshot.per_class=[2]",
        "fewshot.fractions=[]",
        "fewshot.num_draws=3",
        "linear.max_iter=5",
    ]
    words = [
        "pixels",
        "knn",
        "linear",
        "fewshot",
        f"data.source={tmp_path}",
        "device=cpu",
        "cache_dir=null",
        *settings,
    ]
    assert evaluate.main([*words, "data.image_size=8"]) == 0
    said = capsys.readouterr()
    assert (
        said.err.count("warning: 1 test class has no train images (é): 2 of 6 test images count as wrong")
        == 1
    )
    put(tmp_path, *classes("test", "x", "y", "z", count=1))
    assert evaluate.main([*words, "data.image_size=8"]) == 2
    assert "4 of the 6 classes of the test split have no train images" in "".join(capsys.readouterr())


def test_gaps_between_label_ids_change_nothing(tmp_path: Path, pretrain_run: Pretrain) -> None:
    """The same images with ids 0 .. 3 and with four ids far apart: the same supervised run, bit for bit,
    noise and test split included.
    """
    images, labels = striped_images(48)
    for name, ids in (("dense", [0, 1, 2, 3]), ("gaps", [7, 5_000, 999_999, 10**15])):
        for split in ("train", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            pq.write_table(
                pa.table({"image": images, "label": [ids[label] for label in labels]}),
                tmp_path / name / f"{split}.parquet",
            )
    settings = ["objective=supervised", "data.label_noise=0.2", "epochs=2", "monitor.knn_every=1"]
    runs = [
        pretrain_run(f"run-{name}", f"data.source={tmp_path / name}", *settings) for name in ("dense", "gaps")
    ]
    weights, results, sizes = [], [], []
    for run in runs:
        weights.append((run / "encoder/model.safetensors").read_bytes())
        results.append(json.loads((run / "result.json").read_text()))
        sizes.append(max(path.stat().st_size for path in (run / "checkpoints").glob("*.pt")))
    assert weights[0] == weights[1] and results[0] == results[1] and abs(sizes[0] - sizes[1]) < 4096
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    timed = ("second", "share", "images_per")  # what a clock says
    for dense, gaps in zip(*rows, strict=True):
        assert {k: v for k, v in dense.items() if not any(word in k for word in timed)} == {
            k: v for k, v in gaps.items() if not any(word in k for word in timed)
        }


def test_the_images_line_says_what_was_found_and_what_was_not_used(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, *classes("in", "2024-01", "2024-02", count=8), "in/@eaDir/0.png", "in/loose.png")
    put(tmp_path, "in/notes.txt", content=b"x")
    words = [
        "--config",
        str(tiny_config),
        f"data.source={tmp_path / 'in'}",
        f"out={tmp_path / 'run'}",
        "--dry-run",
        "prune.policy=none",
    ]
    assert pretrain.main(words) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images ")]
    assert (
        "16 of" in line
        and "; 2 classes from the first folder level: 2024-01, 2024-02; 0 unreadable; not used: " in line
    )
    for part in (
        "1 service folder (@eaDir)",
        "1 beside the class folders (loose.png)",
        "1 .txt file (notes.txt)",
    ):
        assert part in line


# --- hints


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("list.csv", "the folder of the images themselves"),
        ("labels.JSON", "the folder of the images themselves"),
        ("x.hdf5", "into a .parquet file"),
        ("a.tar.gz", "unpack it"),
        ("shard.tfrecord", "into a .parquet file"),
        ("film.mp4", "ffmpeg"),
        ("one.png", "the folder that it lies in"),
        ("one.heic", "the folder that it lies in"),
        ("what", "a .parquet file"),
    ],
)
def test_hints_fit_the_file(tmp_path: Path, name: str, hint: str) -> None:
    put(tmp_path, f"folder/{name}", content=b"hello")
    assert hint in refused(lambda: load(tmp_path / "folder" / name))
    if not name.endswith((".png", ".heic")) and name != "what":
        assert name in (line := refused(lambda: load(tmp_path / "folder"))) and hint in line


def test_a_glob_names_parquet(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "a/1.png", "x.csv")
    for pattern, hint in (
        ("a/*", "the folder that it lies in"),
        ("**/*.png", "the folder that it lies in"),
        ("*.csv", "sort them into"),
    ):
        said = refused(lambda pattern=pattern: load(tmp_path / pattern))  # type: ignore[misc]
        assert "that are no parquet, such as" in said and hint in said, pattern


def test_parquet_is_known_by_content_too(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet").rename(tmp_path / "blob")
    got = load(tmp_path / "blob")
    assert len(got.names) == 4 and got.unused == []


def test_all_images_of_a_source_whatever_split_they_are_in(tmp_path: Path) -> None:
    table(tmp_path / "t/train.parquet")
    table(tmp_path / "t/more/test.parquet", [0, 1])
    put(tmp_path / "f", *classes("train", *TWO), *classes("test", *TWO), "x.png")
    assert [len(found.names) for found in find_images(str(tmp_path / "t"))] == [6]
    assert [len(found.names) for found in find_images(str(tmp_path / "f"))] == [13]
    assert [len(found.names) for found in find_images(str(tmp_path / "t/**/*.parquet"))] == [6]
    assert [len(found.names) for found in find_images(str(tmp_path / "f"), "test")] == [6]
    (tmp_path / "e").mkdir()
    assert "no images in" in refused(lambda: find_images(str(tmp_path / "e")))


def test_a_supervised_run_compares_its_test_split_before_it_begins(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--config",
        str(tiny_config),
        "objective=supervised",
        "prune.policy=none",
        f"out={tmp_path / 'run'}",
        "--dry-run",
    ]
    put(
        tmp_path / "in", *classes("train", *TWO, count=8), *classes("val", *TWO, "emu", count=2), "test/0.png"
    )
    assert pretrain.main([*words, f"data.source={tmp_path / 'in'}"]) == 0
    said = capsys.readouterr().out
    assert "test      test/ has no labels, so val/ is the test split" in said
    assert "test      1 test class has no train images (emu): 2 of 6 test images count as wrong" in said
    numbers = table(tmp_path / "numbers.parquet")
    assert pretrain.main([*words, f"data.source={tmp_path / 'in'}", f"data.test_source={numbers}"]) == 2
    assert "names its classes (cat, dog), the test split only numbers them" in capsys.readouterr().err
