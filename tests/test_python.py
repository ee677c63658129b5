"""ssl_emp.pretrain, resume and evaluate: the bits of the commands from arrays and data sets, one line
for each mistake, and a process that is left as it was.
"""

import io
import json
import os
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Pretrain, striped_images
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import ssl_emp
import ssl_emp.commands.evaluate as evaluate_module
import ssl_emp.commands.pretrain as pretrain_module
from ssl_emp.data.images import load_images
from ssl_emp.data.objects import IN_MEMORY, load_object
from ssl_emp.errors import UserError
from ssl_emp.model import SimCLR
from ssl_emp.run.report import Report, show_progress
from ssl_emp.run.stop import Stop

TINY: dict[str, Any] = {
    "model": {"width": 8, "stem": "imagenet", "projection_dim": 16},
    "epochs": 5,
    "batch_size": 8,
    "optimizer": {"lr": 0.05, "warmup_epochs": 1},
    "augment": {"crop_scale": [0.5, 1.0]},
    "prune": {"fraction": 0.4, "anneal_fraction": 0.2},
    "device": "cpu",
    "monitor": {"tensorboard": False, "knn_every": 2, "reliability_every": 1, "reliability_images": 16},
}  # as conftest's tiny.yaml
SHORT = TINY | {"epochs": 2, "monitor": {"tensorboard": False, "knn_every": 0}, "verbose": False}


def pil_images(count: int = 68, seed: int = 0, size: int = 16) -> tuple[list[Image.Image], list[int]]:
    files, labels = striped_images(count, size, seed)
    return [Image.open(io.BytesIO(file)) for file in files], labels


def arrays(count: int = 68, seed: int = 0, size: int = 16) -> tuple[np.ndarray, list[int]]:
    """(N, S, S, 3) uint8 and labels."""
    images, labels = pil_images(count, seed, size)
    return np.stack([np.asarray(image) for image in images]), labels


class Items(Dataset[Any]):
    """A map-style data set of whatever `item` gives."""

    def __init__(self, item: Callable[[int], Any], count: int = 68) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        return self.item(place)


@dataclass(frozen=True)
class Feature:
    """What Hugging Face calls `Image` or `ClassLabel`."""

    decode: bool = True
    names: list[str] | None = None


class Image_(Feature):
    pass


Image_.__name__ = "Image"


class Columns:
    """A data set as Hugging Face's package has it, of encoded images."""

    def __init__(self, files: list[bytes], labels: list[int], decode: bool = True, form: Any = None) -> None:
        self.files, self.labels, self.decode = files, labels, decode
        self.format: dict[str, Any] = {"type": form}
        self.column_names = ["id", "photo", "label"]
        self.features = {"photo": Image_(decode), "label": Feature(names=["a", "b", "c", "d"])}

    def cast_column(self, name: str, feature: Feature) -> "Columns":
        assert name == "photo"
        return Columns(self.files, self.labels, feature.decode)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.labels
        image: Any = {"bytes": self.files[key], "path": None}
        if self.decode:
            image = Image.open(io.BytesIO(self.files[key]))
            image.load()
        return {"id": key, "photo": image, "label": self.labels[key]}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert ". fix: " in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def same_pixels(data: Any, wanted: np.ndarray, **options: Any) -> Any:
    images = load_object(data, **options)
    assert np.array_equal(images.pixels[:].numpy().transpose(0, 2, 3, 1), wanted)
    assert images.names == [f"data#{row}" for row in range(len(wanted))]
    return images


# --- the same bits as the command


def test_a_run_from_objects_is_that_of_the_command_on_files(
    pretrain_run: Pretrain, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = pretrain_run("command")
    said = capfd.readouterr().out
    pixels, labels = arrays()
    run = ssl_emp.pretrain((pixels, labels), out=tmp_path / "python", **TINY)
    for name in ("encoder/model.safetensors", "encoder/config.json"):
        assert (run.folder / name).read_bytes() == (wanted / name).read_bytes()
    theirs = ssl_emp.RunFolder(wanted)
    for name, column in theirs.samples.items():
        assert name == "name" or np.array_equal(run.samples[name], column), name
    timed = ("seconds", "images_per_second")
    for ours, row in zip(run.metrics, theirs.metrics, strict=True):
        assert ours.keys() == row.keys()
        assert all(ours[key] == row[key] for key in row if not key.endswith(timed))
    assert list(run.samples["name"][:2]) == ["data#0", "data#1"]
    assert run.finished and len(run.metrics) == 5 and "finished, 5 epochs, loss " in repr(run)
    assert run.config.data.source == IN_MEMORY and run.config.prune.fraction == 0.4
    features = run.encoder(torch.rand(2, 3, 16, 16))
    assert features.shape == (2, 64) and not features.requires_grad
    shown = capfd.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(("device", "encoder   resnet18", "plan"))]
    assert lines and all(line in shown for line in lines)
    assert f"ssl_emp.evaluate('{run.folder}', data=(train, test))" in shown


def test_the_next_step_is_a_call(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A quarter of the images, no test split: all that the call may have to say."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.parquet").symlink_to(tiny_data / "train.parquet")
    settings = SHORT | {"verbose": True, "config": {"data.max_images": 12}}
    ssl_emp.pretrain(folder, out=tmp_path / "run", **settings)
    (call,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate ")]
    call = call.removeprefix("evaluate").strip()
    more = "config={'data.holdout': 0.2, 'knn.num_neighbors': 3}"
    assert call == f"ssl_emp.evaluate({str(tmp_path / 'run')!r}, evaluators=['knn'], {more})"
    assert [row.metric for row in eval(call)] == ["top1 %"]


def test_the_names_of_modules_and_functions_do_not_meet() -> None:
    assert ssl_emp.pretrain is not pretrain_module and callable(ssl_emp.pretrain)
    assert ssl_emp.evaluate is not evaluate_module and callable(ssl_emp.evaluate)
    assert callable(pretrain_module.main) and callable(evaluate_module.main)
    assert set(ssl_emp.__all__) <= {*dir(ssl_emp), *ssl_emp._MODULES}
    assert all(getattr(ssl_emp, name) is not None for name in ssl_emp.__all__)


def test_settings_come_in_any_form(tmp_path: Path, tiny_config: Path, tiny_data: Path) -> None:
    """A file, dicts, dots, numpy's numbers, tuples, paths; the later win; a config of a run is one too."""
    dotted: dict[str, Any] = {
        "prune.policy": "random",
        "optimizer.lr": np.float64(0.02),
        "augment.crop_scale": (0.4, 1),
    }
    run = ssl_emp.pretrain(
        None, config=tiny_config, out=tmp_path / "a", verbose=False, epochs=np.int64(2), **dotted
    )
    config = run.config
    assert (config.epochs, config.batch_size, config.prune.policy, config.prune.fraction) == (
        2,
        8,
        "random",
        0.4,
    )
    assert config.optimizer.lr == 0.02 and config.augment.crop_scale == [0.4, 1]
    assert config.data.source == str(tiny_data) and config.out == str(tmp_path / "a")
    assert not config.keep_freed_memory, "it would change this process"
    again = ssl_emp.pretrain(config=config, out=tmp_path / "b", verbose=False, epochs=1)
    assert again.config.prune == config.prune and again.config.out == str(tmp_path / "b")
    nested = ssl_emp.pretrain(tiny_data, config=TINY | {"epochs": 1}, out=tmp_path / "c", verbose=False)
    assert nested.config.data.source == str(tiny_data) and nested.config.model.width == 8


def test_runs_without_a_name_take_the_next_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels, _ = arrays(16)
    names = [str(ssl_emp.pretrain(pixels, **SHORT | {"epochs": 1}).folder) for _ in range(2)]
    assert names == ["runs/python", "runs/python-2"]


# --- what data may be


def test_every_kind_of_object_gives_the_pixels_of_files(tiny_data: Path) -> None:
    wanted = load_images(str(tiny_data)).pixels[:].numpy().transpose(0, 2, 3, 1)
    pixels, labels = arrays()
    files, _ = striped_images(68)
    assert np.array_equal(pixels, wanted)
    tensor = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    unlabelled: list[Any] = [
        pixels,
        tensor,
        pixels.transpose(0, 3, 1, 2),
        list(pixels),
        pil_images()[0],
        TensorDataset(tensor),
        Items(lambda i: {"image": tensor[i], "other": 3}),
        Items(lambda i: [pixels[i]]),
        Items(lambda i: {"bytes": files[i], "path": None}),
    ]
    for data in unlabelled:
        assert same_pixels(data, wanted).labels is None
    labelled: list[Any] = [
        (pixels, labels),
        (tensor, torch.tensor(labels)),
        (pil_images()[0], np.array(labels)),
        TensorDataset(tensor, torch.tensor(labels)),
        Items(lambda i: (Image.open(io.BytesIO(files[i])), labels[i], "more")),
        Items(lambda i: {"img": tensor[i], "fine_label": np.int64(labels[i])}),
        Columns(files, labels),
        Columns(files, labels, decode=False),
        Columns(files, labels, form="custom"),
        Subset(TensorDataset(tensor, torch.tensor(labels)), range(68)),
    ]
    for data in labelled:
        images = same_pixels(data, wanted)
        assert images.labels is not None and images.labels.tolist() == labels
    hidden = same_pixels(Columns(files, labels), wanted, labels="none")
    assert hidden.labels is None and hidden.labels_from == "labels are off"


def test_images_are_fitted_as_files_are(tmp_path: Path) -> None:
    """Other sizes, modes, an EXIF rotation, and a lazily opened JPEG that is decoded at reduced size."""
    rng = np.random.default_rng(0)
    made = {
        "a.png": Image.fromarray(rng.integers(0, 255, (40, 24, 4), np.uint8), "RGBA"),
        "b.png": Image.fromarray(rng.integers(0, 255, (20, 31), np.uint8), "L"),
        "c.png": Image.fromarray(rng.integers(0, 65535, (33, 20), np.uint16)),
        "d.jpg": Image.fromarray(rng.integers(0, 255, (200, 160, 3), np.uint8)),
    }
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image in made.items():
        image.save(tmp_path / name, exif=turned) if name == "d.jpg" else image.save(tmp_path / name)
    wanted = load_images(str(tmp_path), image_size=16).pixels[:]
    opened = [Image.open(tmp_path / name) for name in made]
    assert torch.equal(load_object(opened, image_size=16).pixels[:], wanted)
    assert all(image.getpixel((0, 0)) is not None for image in opened), "still usable"
    loaded = [Image.open(tmp_path / name).copy() for name in ("a.png", "b.png", "c.png")]
    assert torch.equal(load_object(loaded, image_size=16).pixels[:], wanted[:3])


def test_names_of_classes_and_labels_with_gaps() -> None:
    pixels, labels = arrays(16)

    class Named(Items):
        classes = ["up", "down", "left", "right"]

    named = Named(lambda i: (pixels[i], labels[i]), 16)
    assert (
        load_object(named).class_names == load_object(Subset(named, range(16))).class_names == Named.classes
    )
    text = load_object(Items(lambda i: (pixels[i], "cat" if labels[i] else "ant"), 16))
    assert text.class_names == ["ant", "cat"] and text.labels is not None and text.labels[1] == 1
    gaps = load_object((pixels, [3 + 4 * label for label in labels]))
    assert gaps.class_names == ["3", "7", "11", "15"] and gaps.labels is not None
    assert gaps.labels.tolist() == labels


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (lambda i: 0.5, "have labels of type float, not whole numbers or text"),
        (lambda i: [0, 1][: i % 3], "have labels of type list"),
        (lambda i: torch.zeros(1 + i % 2), "have labels of type Tensor, float"),
        (lambda i: -1, "all labels in the items of the data set are missing"),
        (lambda i: None if i == 3 else 1, "1 of 16 labels of <in memory> are missing"),
        (lambda i: f"/a/path/{i}.png", "another text for each image, which are no classes"),
        (lambda i: 2**64, "more than 63 bits"),
    ],
)
def test_labels_that_are_none(label: Callable[[int], Any], why: str) -> None:
    pixels, _ = arrays(16)
    images = load_object(Items(lambda i: (pixels[i], label(i)), 16))
    assert images.labels is None and why in images.labels_from


def test_an_image_that_cannot_be_read_is_left_out_and_listed() -> None:
    pixels, labels = arrays(8)

    def item(place: int) -> Any:
        if place == 2:
            raise FileNotFoundError(2, "No such file or directory", "gone.png")
        return (
            None if place == 5 else {"bytes": b"no image", "path": None} if place == 6 else pixels[place]
        ), labels[place]

    images = load_object(Items(item, 8))
    assert images.names == [f"data#{row}" for row in (0, 1, 3, 4, 7)]
    assert images.labels is not None and images.labels.tolist() == [labels[row] for row in (0, 1, 3, 4, 7)]
    assert dict(images.skipped).keys() == {"data#2", "data#5", "data#6"}
    assert dict(images.skipped)["data#5"] == "no image (None)"
    assert "none of the 4 images of <in memory> could be read (data#0: no image (None))" in refused(
        lambda: load_object([None] * 4)
    )


def test_a_set_that_memory_cannot_hold_goes_into_a_file(tmp_path: Path) -> None:
    """Found again by its content, and not by what it is called; other content is another file."""
    pixels, labels = arrays()
    reads = []

    def item(place: int) -> Any:
        reads.append(place)
        return pixels[place], labels[place]

    options: dict[str, Any] = {"memory_limit": 100, "cache_dir": str(tmp_path), "store": "auto"}
    first = load_object(Items(item), image_size=16, **options)
    assert first.store == "raw" and np.array_equal(first.pixels[:].numpy().transpose(0, 2, 3, 1), pixels)
    assert len(list(tmp_path.glob("*.u8"))) == 1
    again = load_object((pixels, labels), image_size=16, **options)
    assert again.path == first.path and again.labels is not None and again.labels.tolist() == labels
    changed = pixels.copy()
    changed[40, 3, 3] ^= 1
    assert load_object(changed, image_size=16, **options).path != first.path
    jpegs = load_object(Items(item), image_size=16, store="encoded", cache_dir=str(tmp_path))
    assert jpegs.store == "encoded" and jpegs.content["names"] == first.content["names"]
    reads.clear()
    load_object(Items(item), image_size=16)
    assert len(reads) <= 68 + 2 * 8, "what memory holds is read once, but for the probe"


def test_torch_data_sets_may_use_one_buffer_for_all_images() -> None:
    pixels, _ = arrays()
    buffer = np.empty((16, 16, 3), np.uint8)

    def item(place: int) -> np.ndarray:
        buffer[:] = pixels[place]
        return buffer

    same_pixels(Items(item), pixels)


# --- bad input, one line each


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class NoLength:
    def __getitem__(self, place: int) -> int:
        return place


UINT8 = "PIL images or uint8 pixels of 0 to 255"
BAD_DATA: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "floats": (
        lambda x: Items(lambda i: x[i] / 255),
        f"data[0] is float64 of shape (16, 16, 3). fix: give {UINT8}",
    ),
    "float array": (
        lambda x: torch.rand(4, 3, 8, 8),
        f"data is float32 of shape (4, 3, 8, 8). fix: give {UINT8}",
    ),
    "a float later": (
        lambda x: Items(lambda i: x[i] if i != 33 else torch.zeros(3, 4, 4)),
        "data[33] is float32 of",
    ),
    "int64": (lambda x: x.astype(np.int64), f"data is int64 of shape (68, 16, 16, 3). fix: give {UINT8}"),
    "flat": (lambda x: x.reshape(68, -1), "data is an array of shape (68, 768). fix: give (N, 3, H, W)"),
    "two channels": (lambda x: x[..., :2], "data[0] is of shape (16, 16, 2). fix: give (3, H, W)"),
    "two views": (
        lambda x: Items(lambda i: ((x[i], x[i]), 0)),
        "has an image of type tuple. fix: leave random",
    ),
    "a number": (lambda x: Items(lambda i: i), "data[0] has an image of type int. fix: give PIL images"),
    "iterable": (
        lambda x: Endless(),
        "data is a Endless, which has no samples by number to choose from. fix: give a map-style",
    ),
    "generator": (lambda x: (image for image in x), "data is a generator, which has no samples by number"),
    "loader": (
        lambda x: DataLoader(Items(lambda i: x[i])),
        "which gives batches. fix: give its data set, loader.dataset",
    ),
    "dict": (
        lambda x: {"train": x, "test": x},
        "data is a dict of several parts (train, test). fix: give one, data['train']",
    ),
    "no length": (lambda x: NoLength(), "data is of type NoLength. fix: give a path or name, a data set"),
    "a number for data": (lambda x: 7, "data is of type int. fix: give a path or name"),
    "empty array": (lambda x: x[:0], "the ndarray is empty. fix: give at least two images"),
    "empty": (lambda x: Items(lambda i: x[i], 0), "the Items is empty"),
    "one": (lambda x: x[:1], "<in memory> has 1 image to train on"),
    "labels": (lambda x: (x, [1, 2, 3]), "there are 3 labels for 68 images. fix: give one for each image"),
    "a pair of what": (lambda x: (x, 5), "data is a pair, and its second part is of type int"),
    "random": (
        lambda x: Items(lambda i: x[random.randrange(68)]),
        "is another image each time it is read. fix: leave random",
    ),
    "raises": (
        lambda x: Items(lambda i: [][i]),
        "data[0] raised IndexError: list index out of range. fix: correct the data set",
    ),
    "no such key": (
        lambda x: Items(lambda i: {"pic": x[i]}),
        "an item has no key image. fix: name the key of the image",
    ),
    "no image column": (
        lambda x: Bare(),
        "data has no column image or img. fix: name it: {'data.image_column': …}, one of id, text",
    ),
    "no such file": (lambda x: "/no/such/folder", "no such folder, file or data set: /no/such/folder"),
}


class Bare:
    column_names = ["id", "text"]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: Any) -> Any:
        return {"id": key, "text": ""}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name: str, tmp_path: Path) -> None:
    make, line = BAD_DATA[name]
    pixels, _ = arrays()
    assert line in refused(lambda: ssl_emp.pretrain(make(pixels), out=tmp_path / "run", **SHORT))
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_data_that_changes_while_it_is_read() -> None:
    pixels, _ = arrays()

    class Shrinks(Items):
        reads = 0

        def __len__(self) -> int:
            return 68 if Shrinks.reads < 40 else 60

    def counted(place: int) -> np.ndarray:
        Shrinks.reads += 1
        return pixels[place]

    assert "data had 68 items, and has 60 now. fix: give a data set of a fixed length" in refused(
        lambda: load_object(Shrinks(counted))
    )
    seen: dict[int, int] = {}

    def grows(place: int) -> np.ndarray:
        seen[place] = seen.get(place, 0) + 1
        return pixels[place] if seen[place] < 2 or place != 20 else np.zeros((20, 20, 3), np.uint8)

    wide = refused(lambda: load_object(Items(grows)))
    assert "data[20] changes when it is read again: (16, 16) pixels, and then (20, 20)" in wide


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"epoch": 3}, "unknown key epoch, did you mean epochs?, in the settings"),
    "unknown in a section": (
        {"prune": {"frac": 0.1}},
        "policy emp has no key prune.frac, did you mean prune.fraction?",
    ),
    "with dots": (
        {"prune.fraction": 2},
        "prune.fraction: should be less than 1 (is 2), allowed: 0 <= value < 1",
    ),
    "a text for a number": ({"batch_size": "8"}, "batch_size: should be a valid integer"),
    "an array": ({"epochs": np.arange(3)}, "epochs: should be a valid integer"),
    "no name": ({"": 1}, "'' is not the name of a setting"),
    "a section": ({"prune": 3}, "prune: is 3, give a section"),
    "model": ({"model": 3}, "model is of type int. fix: give a name such as resnet18"),
    "arch": ({"model": "resnet19"}, "resnet1"),
    "devices": (
        {"devices": 2},
        "devices=2 would start this program 2 times. fix: leave devices out, and start it by torchrun",
    ),
    "file": ({"config": "no/such.yaml"}, "cannot read no/such.yaml"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name: str, tmp_path: Path) -> None:
    settings, line = BAD_SETTINGS[name]
    pixels, _ = arrays(16)
    out = tmp_path / "run"
    given = {key: value for key, value in SHORT.items() if key not in settings} | settings
    assert line in refused(lambda: ssl_emp.pretrain(pixels, out=out, **given))
    assert not out.exists()


# --- stop and go on


@contextmanager
def stopped_in(step: int, number: int) -> Iterator[None]:
    """A signal to this process within that step, as a terminal or a kernel sends it."""
    seen = [0]

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(module, SimCLR) and torch.is_grad_enabled():
            seen[0] += 1
            if seen[0] == step:
                signal.raise_signal(number)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_ctrl_c_saves_and_resume_gives_the_bits_of_the_uninterrupted_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = arrays()
    whole = ssl_emp.pretrain(data, out=tmp_path / "whole", **TINY | {"verbose": False})
    with stopped_in(13, signal.SIGINT), pytest.raises(KeyboardInterrupt) as caught:
        ssl_emp.pretrain(data, out=tmp_path / "run", **TINY)
    again = f"ssl_emp.resume('{tmp_path / 'run'}', data)"
    assert str(caught.value) == f"stopped, and saved in {tmp_path / 'run'}. go on: {again}"
    assert f"stopped by SIGINT after step 13, saved. go on: {again}" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped = ssl_emp.RunFolder(tmp_path / "run")
    assert not stopped.finished and "not finished" in repr(stopped)
    assert "has no samples.parquet yet. fix: finish it: ssl_emp.resume(" in refused(lambda: stopped.samples)
    run = ssl_emp.resume(stopped, data, verbose=False)
    assert run.finished and capfd.readouterr().out == ""
    for name in ("encoder/model.safetensors", "pruning/samples.parquet"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    longer = ssl_emp.resume(run, data, epochs=6, verbose=False)
    assert len(longer.metrics) == 6 and longer.config.epochs == 6


def test_a_run_that_is_being_extended_has_not_ended(tmp_path: Path) -> None:
    """Its encoder is that of the shorter plan, and no evaluation calls it the last epoch."""
    data = arrays(24)
    run = ssl_emp.pretrain(data, out=tmp_path / "run", **SHORT)
    planned = run.config.epochs
    first = ssl_emp.evaluate(run, (data, data), "knn", knn={"num_neighbors": 1}, verbose=False)
    assert first[0].protocol.endswith("last epoch")
    with stopped_in(2, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        ssl_emp.resume(run, data, epochs=planned + 6, verbose=False)
    assert not run.finished and "not finished" in repr(run)
    second = ssl_emp.evaluate(run, (data, data), "knn", knn={"num_neighbors": 1}, verbose=False)
    assert second[0].protocol.endswith(f"epoch {planned} of {planned + 6}")
    assert f"{planned} of {planned + 6}" in (tmp_path / "run" / "encoder" / "README.md").read_text()
    assert ssl_emp.resume(run, data, verbose=False).finished
    third = ssl_emp.evaluate(run, (data, data), "knn", knn={"num_neighbors": 1}, verbose=False)
    assert third[0].protocol.endswith("last epoch")


def test_scores_are_joined_to_the_images_that_they_are_of(tmp_path: Path) -> None:
    """All data sets from Python have one source and one set of names."""
    mine, others = arrays(24), (255 - arrays(24)[0], arrays(24)[1])
    run = ssl_emp.pretrain(mine, out=tmp_path / "run", **SHORT)
    for data, known in ((mine, True), (others, False)):
        config = {"diagnose.split": "train"}
        ssl_emp.evaluate(run, (data, data), "diagnose", config=config, verbose=False)
        table = pq.read_table(tmp_path / "run" / "eval" / "diagnose" / "embeddings.parquet")
        assert (set(table["times_trained"].to_pylist()) != {None}) == known


def test_a_signal_goes_where_it_would_have_gone(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with stopped_in(3, signal.SIGUSR1):
            run = ssl_emp.pretrain(arrays(24)[0], out=tmp_path / "run", **SHORT)
        assert heard == [signal.SIGUSR1] and not run.finished
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_ctrl_c_does_not_end_the_process(tmp_path: Path) -> None:
    with Stop() as stop:
        stop.ends_process = False
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_resume_notices_other_images_and_a_shell_says_where_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = arrays(24)
    with stopped_in(2, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        ssl_emp.pretrain((pixels, labels), out=tmp_path / "run", **SHORT)
    out = tmp_path / "run"
    other = pixels.copy()
    other[20, 0, 0] ^= 255
    assert "pixels differ under the same names" in refused(lambda: ssl_emp.resume(out, (other, labels)))
    assert "23x3x16x16, and were 24x3x16x16" in refused(lambda: ssl_emp.resume(out, pixels[:23]))
    where = f"the images of the run in {out} were given in Python, and are in no file. fix: go on there: "
    assert where + f"ssl_emp.resume('{out}', data)" in refused(lambda: ssl_emp.resume(out))
    assert "a run stays in its directory" in refused(lambda: ssl_emp.resume(out, pixels, out="x"))
    assert "temperature was 0.5 and is now 0.3" in refused(
        lambda: ssl_emp.resume(out, pixels, temperature=0.3)
    )
    capfd.readouterr()
    assert pretrain_module.main(["--resume", str(out)]) == 2
    assert capfd.readouterr().err == f"error: {where}ssl_emp.resume('{out}', data)\n"
    assert evaluate_module.main([str(out), "knn"]) == 2  # it has no encoder yet
    assert ssl_emp.resume(out, pixels, verbose=False).finished, "labels are not trained on"
    capfd.readouterr()
    assert evaluate_module.main([str(out), "knn"]) == 2
    said = capfd.readouterr()
    assert "the images were given in Python, and are in no file" in said.err
    assert "ssl_emp.evaluate(RUN, data=(train, test))" in said.err and said.err.count("\n") == 1
    assert pretrain_module.main(["--resume", str(out)]) == 0, "a finished run needs no images"
    assert "is not a run directory" in refused(lambda: ssl_emp.resume(tmp_path / "nothing", pixels))
    assert f"go on with ssl_emp.resume('{out}', data), or choose another" in refused(
        lambda: ssl_emp.pretrain(pixels, out=out, **SHORT)
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)

    def forward(self, views: Tensor) -> Tensor:
        return self.norm(self.conv(views)).relu().mean((2, 3))


def test_a_module_is_trained_stopped_resumed_and_judged(tmp_path: Path) -> None:
    data, settings = arrays(24), {key: value for key, value in SHORT.items() if key != "model"}
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    whole = ssl_emp.pretrain(data, module, out=tmp_path / "whole", **settings)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items()), "yours is copied"
    assert whole.config.model.arch == "custom:Net"
    assert not whole.encoder.backbone.state_dict()["conv.weight"].equal(before["conv.weight"])
    with stopped_in(3, signal.SIGINT), pytest.raises(KeyboardInterrupt, match=", data, model=model"):
        ssl_emp.pretrain(data, module, out=tmp_path / "run", **settings)
    assert "custom:Net is a network from Python" in refused(lambda: ssl_emp.resume(tmp_path / "run", data))
    run = ssl_emp.resume(tmp_path / "run", data, Net(), verbose=False)
    name = "encoder/model.safetensors"
    assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    opened = ssl_emp.RunFolder(run.folder, Net())
    assert ssl_emp.resume(opened, data, verbose=False).finished
    near: dict[str, Any] = {"knn": {"num_neighbors": 3}, "verbose": False}
    (row,) = ssl_emp.evaluate(opened, (data, data), "knn", **near)
    (same,) = ssl_emp.evaluate(opened.encoder, (data, data), "knn", **near)
    assert row.value == same.value and row.encoder == str(run.folder)
    assert (run.folder / "eval" / "knn.json").is_file()
    assert "custom:Net" in refused(lambda: ssl_emp.evaluate(run.folder, (data, data), "knn", **near))
    assert "encoder.backbone.requires_grad_()" in refused(lambda: ssl_emp.pretrain(data, run.encoder))


def test_an_image_that_was_closed_is_left_out(tmp_path: Path) -> None:
    images, _ = pil_images(24)
    for image in images[:2]:
        image.load()
        image.close()
    assert len(load_object(images, image_size=16).names) == 22


class Sick(Net):
    """Right where it is looked at, and without a usable number in every batch."""

    def forward(self, views: Tensor) -> Tensor:
        return super().forward(views) * (torch.nan if len(views) > 2 else 1)


class Locked(Net):
    def __deepcopy__(self, memo: Any) -> "Locked":
        raise RuntimeError("holds a socket")


def test_a_run_of_skipped_steps_alone_is_not_finished(tmp_path: Path) -> None:
    """They are fewer than max_bad_steps allows in a row."""
    settings = {key: value for key, value in SHORT.items() if key != "model"}
    with pytest.raises(ssl_emp.RunFailed, match="none of the 4 steps had a finite loss and gradient"):
        ssl_emp.pretrain(
            arrays(24),
            Sick(),
            out=tmp_path / "run",
            **settings | {"prune": {"policy": "none"}, "epochs": 1, "max_bad_steps": 10, "batch_size": 6},
        )
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_module_that_cannot_be_copied_is_a_line(tmp_path: Path) -> None:
    said = refused(lambda: ssl_emp.pretrain(arrays(24), Locked(), out=tmp_path / "run", verbose=False))
    assert said.startswith("the Locked cannot be copied (RuntimeError: holds a socket). fix: ")
    assert not (tmp_path / "run").exists()


# --- the process is left as it was


def test_nothing_of_the_process_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    filters, environment, streams = (
        list(warnings.filters),
        dict(os.environ),
        (id(sys.stdout), id(sys.stderr)),
    )
    pixels, labels = arrays(24)
    with torch.no_grad():
        for _ in range(2):
            run = ssl_emp.pretrain((pixels, labels), **SHORT)
            ssl_emp.evaluate(run, ((pixels, labels), (pixels, labels)), "knn", knn={"num_neighbors": 3})
        refused(lambda: ssl_emp.pretrain(pixels / 2, **SHORT))
        assert not torch.is_grad_enabled()
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]  # type: ignore[index]
    assert list(warnings.filters) == filters and dict(os.environ) == environment
    assert streams == (id(sys.stdout), id(sys.stderr))


def test_in_another_thread(tmp_path: Path) -> None:
    data, found = arrays(24), []

    def work() -> None:
        run = ssl_emp.pretrain(data, out=tmp_path / "thread", **SHORT)
        found.append(
            (run, ssl_emp.evaluate(run, (data, data), "knn", knn={"num_neighbors": 3}, verbose=False))
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((run, table),) = found
    main = ssl_emp.pretrain(data, out=tmp_path / "main", **SHORT)
    name = "encoder/model.safetensors"
    assert (run.folder / name).read_bytes() == (main.folder / name).read_bytes() and len(table) == 1


# --- evaluate


def test_rows_are_those_of_the_command(
    pretrain_run: Pretrain, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = pretrain_run("run", "epochs=2")
    words = ["knn", "linear", "knn.num_neighbors=[3,5]"]
    assert evaluate_module.main([str(out), "random", *words, "--out", str(tmp_path / "shell")]) == 0
    capfd.readouterr()
    table = ssl_emp.evaluate(
        [ssl_emp.RunFolder(out), "random"], evaluators=words[:2], knn={"num_neighbors": (3, 5)}, verbose=False
    )
    assert capfd.readouterr().out == ""
    for name in words[:2]:
        wanted = json.loads((tmp_path / "shell" / f"{name}.json").read_text())
        assert json.loads((out / "eval" / f"{name}.json").read_text()) == wanted
        ours = [row for row in table if row.evaluator == name]
        assert [(row.encoder, row.value, row.protocol) for row in ours] == [
            (row["encoder"], row["value"], row["protocol"]) for row in wanted
        ]
    assert len(table) == 6 and repr(table).count("\n") == 7 and "| top1 % |" in str(table)
    assert table._repr_markdown_() == repr(table)
    # the same images as objects
    train, test = arrays(), arrays(40, 1)
    again = ssl_emp.evaluate(out, (train, test), "knn", knn={"num_neighbors": [3, 5]}, out=tmp_path / "b")
    assert [row.value for row in again] == [row.value for row in table if row.encoder == str(out)][:2]
    assert again[0].data == "<in memory> 16px" and (tmp_path / "b" / "knn.json").is_file()


def test_modules_held_out_parts_and_mixed_sources(tiny_data: Path, tmp_path: Path) -> None:
    pixels, labels = arrays()
    train, test = (pixels, labels), arrays(40, 1)

    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    module = Mean().train()
    near: dict[str, Any] = {"knn": {"num_neighbors": 3}, "verbose": False}
    (row,) = ssl_emp.evaluate(module, (train, test), "knn", **near)
    assert (row.encoder, row.n_test) == ("Mean", 40) and row.value is not None
    assert module.training, "yours is copied"
    (held,) = ssl_emp.evaluate("pixels", train, "knn", config={"data.holdout": 0.25}, **near)
    assert held.n_test == 16, "a quarter of the 17 of each class"
    (mixed,) = ssl_emp.evaluate("pixels", (train, tiny_data / "test.parquet"), "knn", **near)
    (other,) = ssl_emp.evaluate("pixels", (tiny_data, test), "knn", **near)
    (files,) = ssl_emp.evaluate("pixels", tiny_data, "knn", **near)
    assert mixed.value == other.value == files.value
    unlabelled = ssl_emp.evaluate("pixels", pixels, "diagnose", out=tmp_path, **near)
    assert unlabelled[0].n_test == 68 and (tmp_path / "pixels" / "diagnose" / "embeddings.parquet").is_file()


def test_the_start_of_a_run_is_judged_beside_it(tmp_path: Path) -> None:
    train, test = arrays(24), arrays(12, 1)
    first = ssl_emp.pretrain(train, out=tmp_path / "first", **SHORT)
    model = TINY["model"] | {"init": first.folder}
    warm = ssl_emp.pretrain(train, out=tmp_path / "warm", **SHORT | {"model": model, "epochs": 1})
    near: dict[str, Any] = {"knn": {"num_neighbors": 3}, "verbose": False}
    table = ssl_emp.evaluate([nn.Flatten(), warm, "pixels"], (train, test), "knn", **near)
    assert [row.encoder for row in table] == [str(warm.folder), f"{warm.folder}/start", "pixels", "Flatten"]
    assert table[2].value == table[3].value, "both see the pixels"
    alone = ssl_emp.evaluate(warm, (train, test), "knn", start=False, **near)
    assert list(alone) == [table[0]]


def test_what_cannot_be_judged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train, test = arrays(24), arrays(12, 1)
    near: dict[str, Any] = {"knn": {"num_neighbors": 3}}
    for call, line in (
        (
            lambda: ssl_emp.evaluate("pixels", (train, test), "nkk"),
            "no evaluator is called 'nkk'. fix: use knn",
        ),
        (
            lambda: ssl_emp.evaluate("pixel", (train, test), "knn"),
            "'pixel' is no directory, encoder or evaluator",
        ),
        (lambda: ssl_emp.evaluate(3, (train, test), "knn"), "an encoder is of type int"),
        (lambda: ssl_emp.evaluate([], (train, test), "knn"), "there is nothing to judge"),
        (lambda: ssl_emp.evaluate(nn.Identity(), None, "knn"), "there are no images to judge a module on"),
        (
            lambda: ssl_emp.evaluate("pixels", (train, test), "knn", knn={"neighbors": 3}),
            "unknown key 'knn.neighbors'",
        ),
        (lambda: ssl_emp.evaluate("pixels", train, "knn", **near), "<in memory> has no test split"),
        (
            lambda: ssl_emp.evaluate("pixels", (train, test[0]), "knn", **near),
            "the test split of <in memory> has no labels",
        ),
        (lambda: ssl_emp.evaluate("pixels", (train, test[0] / 2), "knn", **near), "data is float64"),
        (
            lambda: ssl_emp.evaluate("pixels", (train, (test[0], [1])), "knn", **near),
            "there are 1 labels for 12 images",
        ),
    ):
        assert line in refused(call)
    capfd.readouterr()
    table = ssl_emp.evaluate(["pixels", str(tmp_path)], (train, test), "knn", **near)
    assert [row.value is None for row in table] == [False, True]
    assert "not judged: no encoder in" in repr(table) and "Traceback" not in capfd.readouterr().err


def test_an_error_of_a_module_is_raised_as_it_is() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 1:
                raise ZeroDivisionError("mine")
            return images.flatten(1)

    with pytest.raises(ZeroDivisionError, match="mine"):
        ssl_emp.evaluate(Broken(), (arrays(24), arrays(12, 1)), "knn", verbose=False)


# --- the page about it


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, its code in order, on tiny images and for two epochs where it asks for a hundred."""
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code) == 4
    monkeypatch.chdir(tmp_path)
    images, labels = arrays(80)
    test_images, test_labels = arrays(40, 1)
    scope: dict[str, Any] = {"images": images, "labels": labels}
    scope |= {"test_images": test_images, "test_labels": test_labels}
    small = "epochs=2, batch_size=16, device='cpu'"
    code[0] = code[0].replace("epochs=100, batch_size=256", small).replace('"resnet18"', "{'width': 8}")
    code[2] = code[2].replace("config={", "config={'model.width': 8, ")
    assert small in code[0] and "{'width': 8}" in code[0] and "'model.width': 8" in code[2]
    exec("".join(code), scope)
    assert scope["accuracy"].keys() == {"knn", "linear"} and len(scope["hardest"]) == 10
    assert scope["features"].shape == (4, 64) and len(scope["run"].metrics) == 3


def test_types_are_told() -> None:
    """A checker believes the hints of a package that has this file, which a wheel takes by setup.py."""
    root = Path(ssl_emp.__file__).parent.parent
    assert (root / "ssl_emp" / "py.typed").is_file() and (root / "linear_eval" / "py.typed").is_file()
    assert '"": ["py.typed"' in (root / "setup.py").read_text()


# --- a notebook


class Shown:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, data: Mapping[str, str], raw: bool) -> None:
        assert raw
        self.texts.append(data["text/plain"])


def test_progress_in_a_notebook_is_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With IPython's display in the place of a kernel's; `make test-notebook` asks a kernel."""
    shown = Shown()
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.display = lambda data, raw, display_id: shown  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("ssl_emp.run.report.CHANGES_EVERY_SECONDS", 0.0)
    with Report().progress(range(3), 3, "epoch 1/2") as items:
        assert list(items) == [0, 1, 2]
    assert [text.split(",")[0] for text in shown.texts] == [f"epoch 1/2 step {n}/3" for n in (1, 2, 3)] + [""]
    progress = show_progress("reading images")
    assert progress is not None
    progress(5, 10)
    progress(10, 10)
    assert shown.texts[-2:] == ["reading images 5 of 10", ""]
    assert (
        list(Report(verbose=False).progress(range(3), 3, "x").__enter__()) == [0, 1, 2]
        and len(shown.texts) == 6
    )
