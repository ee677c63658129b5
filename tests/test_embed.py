"""`ssl-emp embed`: the vectors of the encoder, whatever the images, and whatever interrupts it."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import striped_images, write_parquet
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from ssl_emp import load_encoder
from ssl_emp.__main__ import main
from ssl_emp.backbones import drop_last_layer
from ssl_emp.commands import embed_file
from ssl_emp.commands.embed_file import one_source
from ssl_emp.commands.subjects import Normalized
from ssl_emp.data.images import find_images
from ssl_emp.embedding import FeatureReader
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, build_encoder, save_encoder

ROOT = Path(__file__).parent.parent
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
COUNT = 100


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("encoders") / "encoder", seed=0)


def save(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    encoder = build_encoder("resnet18", 8, "cifar", 16, MEAN, STD)
    encoder(torch.rand(32, 3, 16, 16))
    save_encoder(encoder.eval(), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    for number, content in enumerate(striped_images(COUNT)[0]):
        path = folder / f"{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven chunks of two batches: 100 images are few for one of a thousand."""
    monkeypatch.setattr(embed_file, "CHUNK_ROWS", 16)


SMALL = ("--batch-size", "8", "--device", "cpu")


def embed(*words: object) -> int:
    return main(["embed", *map(str, words), *SMALL])


def read(path: Path) -> tuple[list[str], Tensor, dict[str, Any]]:
    """(paths, vectors, metadata)."""
    table = pq.read_table(path)
    vectors = np.stack(table["vector"].to_numpy())
    return table["path"].to_pylist(), torch.from_numpy(vectors), json.loads(table.schema.metadata[b"ssl_emp"])


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    capsys.readouterr()
    assert embed(*words) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and ". fix: " in said.err
    assert said.err[:-1].isprintable() and not said.out
    return said.err


# ---- the vectors


def test_the_vectors_are_the_encoders(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.parquet"
    assert embed(encoder_dir, images, "--out", out) == 0
    names, vectors, about = read(out)
    assert names == sorted(path.relative_to(images).as_posix() for path in images.glob("*/*.png"))
    encoder = load_encoder(encoder_dir)
    with torch.no_grad():
        wanted = torch.cat([encoder(encoder.preprocess(images / name)[None]) for name in names])
    torch.testing.assert_close(vectors, wanted)
    assert vectors.std() > 0.01
    assert (
        about["image_size"] == 16 and about["preprocessing"]["mean"] == MEAN and about["num_images"] == COUNT
    )
    assert (
        about["precision"] == "float32"
        and about["num_unreadable"] == 0
        and len(about["encoder_sha256"]) == 64
    )
    assert about["encoder"] == str(encoder_dir) and about["shapes"] == {"vector": [64]}
    assert pq.read_schema(out).field("vector").type == pa.list_(pa.float32(), 64)
    assert os.listdir(out.parent) == ["x.parquet"], "nothing is left beside it"


def test_python_gives_the_same_vectors(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    assert embed(encoder_dir, images, "--out", tmp_path / "x.parquet") == 0
    names, vectors, _ = read(tmp_path / "x.parquet")
    encoder = load_encoder(encoder_dir)
    paths = [images / name for name in names]
    calls: list[tuple[int, int | None]] = []
    found = encoder.embed(paths, batch_size=8, progress=lambda *done: calls.append(done))
    assert torch.equal(found, vectors) and found.dtype == torch.float32
    assert calls[0] == (8, COUNT) and calls[-1] == (COUNT, COUNT) and len(calls) == 13

    def mixed() -> Iterator[Any]:
        for number, path in enumerate(paths):
            with Image.open(path) as image:
                yield [path, str(path), image.copy(), np.asarray(image)][number % 4]

    assert torch.equal(encoder.embed(mixed(), batch_size=8), vectors)
    stack = np.stack([np.asarray(Image.open(path)) for path in paths[:8]])
    assert torch.equal(encoder.embed(stack, batch_size=8), vectors[:8])


def test_embedding_leaves_the_module_as_it_was(encoder_dir: Path, images: Path) -> None:
    encoder = load_encoder(encoder_dir).train().requires_grad_(True)
    frozen = encoder.backbone.get_submodule("layer1").eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    found = encoder.embed([images / "0/000.png"] * 3)
    assert [module.training for module in encoder.modules()] == modes and not frozen.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert torch.is_grad_enabled() and not found.requires_grad and not found.is_inference()
    assert torch.equal(found, load_encoder(encoder_dir).embed([images / "0/000.png"] * 3)), "in eval mode"
    with pytest.raises(UserError):
        encoder.embed(["missing.png"])
    assert [module.training for module in encoder.modules()] == modes


def test_errors_name_the_image(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_dir)
    good = images / "0/000.png"
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:-300])
    cases: list[tuple[Any, type[Exception], str]] = [
        ([good, tmp_path / "bad.png"], UserError, "bad.png cannot be read"),
        ([good, "a\nb.png"], UserError, r"a\\nb.png cannot be read"),
        ([good, None], TypeError, "image 1 is of type NoneType"),
        ([good, good, np.zeros((4, 4, 3))], ValueError, "pixels of image 2 are .* float64"),
        (good, TypeError, "give a list"),
        (str(good), TypeError, "give a list"),
        (Image.new("RGB", (4, 4)), TypeError, "give a list"),
        (np.zeros((4, 4, 3), np.uint8), TypeError, "give a list"),
        (7, TypeError, "images are of type int"),
        ([], ValueError, "there are no images"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            encoder.embed(given, batch_size=2)
        assert "\n" not in str(caught.value) and "fix: " in str(caught.value)
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size is"):
            encoder.embed([good], batch_size=size)  # type: ignore[arg-type]


# ---- the images


def test_images_from_anywhere(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    contents, _ = striped_images(20)
    for name in ("a-train", "b-test"):
        write_parquet(tmp_path / "tables" / f"{name}.parquet", contents[:10], None)
    (tmp_path / "one=1.png").write_bytes(contents[0])
    sources = {
        "tables": (
            tmp_path / "tables",
            [f"{name}.parquet#{row}" for name in ("a-train", "b-test") for row in range(10)],
        ),
        "glob": (tmp_path / "tables/a*.parquet", [f"a-train.parquet#{row}" for row in range(10)]),
        "file": (tmp_path / "tables/b-test.parquet", [f"b-test.parquet#{row}" for row in range(10)]),
        "image": (tmp_path / "one=1.png", [str(tmp_path / "one=1.png")]),
    }
    found = {}
    for name, (source, names) in sources.items():
        assert embed(encoder_dir, source, "--out", tmp_path / f"{name}.parquet") == 0
        paths, found[name], _ = read(tmp_path / f"{name}.parquet")
        assert paths == names
    torch.testing.assert_close(found["tables"], torch.cat([found["glob"], found["file"]]))
    torch.testing.assert_close(found["image"], found["glob"][:1])
    out = tmp_path / "split.parquet"
    assert embed(encoder_dir, tmp_path / "tables", "split=test", "data.image_size=24", "--out", out) == 0
    paths, vectors, about = read(out)
    assert (
        paths == sources["file"][1] and about["image_size"] == 24 and not torch.equal(vectors, found["file"])
    )


def test_the_splits_of_a_data_set_are_one_source(tmp_path: Path) -> None:
    """In their order, and read from the place that is asked for."""
    contents, _ = striped_images(10)
    for name, part in (("a", contents[:6]), ("b", contents[6:])):
        write_parquet(tmp_path / f"{name}.parquet", part, None)
    sources = [find_images(str(tmp_path / f"{name}.parquet"))[0] for name in "ab"]
    both = one_source(sources)
    assert both.names == [f"a.parquet#{row}" for row in range(6)] + [f"b.parquet#{row}" for row in range(4)]
    for rows in (range(10), [5, 6], [0], [9], [1, 2, 7]):
        assert list(both.read(np.array(rows))) == [contents[row] for row in rows]
    assert both.version != one_source(sources[::-1]).version != sources[0].version


def test_what_cannot_be_read_is_told_and_costs_no_other(
    encoder_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_chunks: None
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    good = (images / "0/000.png").read_bytes()
    for name in ("0/<script>.png", "1/two\nlines.png"):
        (folder / name).write_bytes(good)
    with open(os.fsencode(folder) + b"/2/\xff\xfe.png", "wb") as file:
        file.write(good)
    hostile = ["no\nimage\x1b[2J.png", "\u202egnp.png"]
    for name in hostile:
        (folder / name).write_bytes(b"no image")
    (folder / "0/cut.png").write_bytes(good[:-200])
    os.mkfifo(folder / "pipe.png")
    out = tmp_path / "x.parquet"
    assert embed(encoder_dir, folder, "--out", out) == 0
    said = capsys.readouterr()
    assert said.err == (
        "4 of 107 images could not be read (pipe.png: not a regular file); they have no row\n"
    )
    names, vectors, about = read(out)
    assert len(names) == len(vectors) == COUNT + 3
    assert {name for name, _ in about["unreadable"]} == {"pipe.png", "0/cut.png", *hostile}
    strange = ["0/<script>.png", "1/two\nlines.png", "2/\\xff\\xfe.png"]
    found = vectors[[names.index(name) for name in strange]]
    torch.testing.assert_close(found, vectors[:1].expand(3, -1))

    bad = tmp_path / "bad"
    bad.mkdir()
    for name in (*hostile, *map(str, range(40))):
        (bad / f"{name}.png").write_bytes(b"no image")
    told = refused(capsys, encoder_dir, bad, "--out", tmp_path / "y.parquet")
    assert "none of 42 images could be read (0.png: not an image" in told
    assert not list(tmp_path.glob("y*"))


# ---- interrupted


def forward_that_stops(number: int) -> Any:
    """From the so-manyeth forward pass of a ResNet on, Ctrl-C is pressed."""
    calls = iter(range(1000))

    def press(module: nn.Module, given: Any, result: Any) -> None:
        if isinstance(module, Encoder) and next(calls) >= number:
            os.kill(os.getpid(), signal.SIGINT)

    return nn.modules.module.register_module_forward_hook(press)


def uninterrupted(encoder_dir: Path, images: Path, tmp_path: Path, *words: str) -> bytes:
    assert embed(encoder_dir, images, "--out", tmp_path / "whole.parquet", *words) == 0
    return (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("features", ["pooled", "stages"])
def test_an_interrupted_one_goes_on_and_gives_the_same_bytes(
    features: str,
    encoder_dir: Path,
    images: Path,
    tmp_path: Path,
    small_chunks: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (f"--features={features}",)
    wanted = uninterrupted(encoder_dir, images, tmp_path, *words)
    out = tmp_path / "x.parquet"
    parts = tmp_path / "x.parquet.parts"
    kept = []
    for _ in range(2):
        hook = forward_that_stops(number=9)
        try:
            assert embed(encoder_dir, images, "--out", out, *words) == 130
        finally:
            hook.remove()
        assert "whole chunks are kept" in capsys.readouterr().err and not out.exists()
        kept.append({path.name: path.stat().st_mtime_ns for path in parts.glob("chunk-*")})
        assert {path.name for path in parts.iterdir()} == {"plan.json", *kept[-1]}
    assert 0 < len(kept[0]) < len(kept[1]) < 7 and kept[0].items() <= kept[1].items(), "made once"
    (parts / "chunk-0000001.parquet").write_bytes(b"damaged")  # as a failing disk might
    (parts / ".chunk-0000006.parquet.tmp").write_bytes(b"left by a kill -9")
    assert embed(encoder_dir, images, "--out", out, *words) == 0
    assert out.read_bytes() == wanted and not parts.exists()
    assert pq.ParquetFile(out).num_row_groups == 7


def test_a_full_disk_costs_nothing(
    encoder_dir: Path, images: Path, tmp_path: Path, small_chunks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a chunk, and of the file that they are joined to: files here may have so many bytes."""
    wanted = uninterrupted(encoder_dir, images, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, chunks in ((4000, 0), (12_000, 7)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            told = refused(capsys, encoder_dir, images, "--out", tmp_path / "x.parquet", code=3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in told and "whole chunks are kept" in told
        assert len(list((tmp_path / "x.parquet.parts").glob("chunk-*"))) == chunks
    assert embed(encoder_dir, images, "--out", tmp_path / "x.parquet") == 0
    assert (tmp_path / "x.parquet").read_bytes() == wanted


@pytest.mark.parametrize("finished", [False, True])
def test_another_work_is_not_gone_on_with(
    finished: bool,
    encoder_dir: Path,
    images: Path,
    tmp_path: Path,
    small_chunks: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    out = tmp_path / "x.parquet"
    hook = forward_that_stops(9) if not finished else None
    assert embed(encoder_dir, folder, "--out", out) == (0 if finished else 130)
    if hook is not None:
        hook.remove()
    before = {path: path.read_bytes() for path in tmp_path.glob("x.parquet*/*")} or out.read_bytes()
    other = save(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    same_weights = tmp_path / "normalised otherwise"
    shutil.copytree(encoder_dir, same_weights)
    config["ssl_emp"]["mean"] = [0.1, 0.1, 0.1]
    (same_weights / "config.json").write_text(json.dumps(config))
    cases: list[tuple[str, list[object]]] = [
        ("another encoder", [other, folder]),
        ("another encoder", [same_weights, folder]),
        ("another image size (16, now 20)", [encoder_dir, folder, "data.image_size=20"]),
        ("another features", [encoder_dir, folder, "--features=patches"]),
        ("another precision", [encoder_dir, folder, "precision=bfloat16"]),
        ("other images", [encoder_dir, images]),
    ]
    for message, words in cases:
        assert message in refused(capsys, *words, "--out", out)
    (folder / "0/000.png").write_bytes((images / "0/003.png").read_bytes())
    assert "other images" in refused(capsys, encoder_dir, folder, "--out", out)
    now = {path: path.read_bytes() for path in tmp_path.glob("x.parquet*/*")} or out.read_bytes()
    assert now == before, "nothing is lost"
    assert embed(encoder_dir, folder, "--out", out, "--overwrite") == 0
    assert read(out)[0] == read(out)[0] and not (tmp_path / "x.parquet.parts").exists()
    torch.testing.assert_close(read(out)[1][0], read(out)[1][1]), "0/000.png is 0/003.png by now"


def test_a_file_of_others_is_not_overwritten(
    encoder_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "table.parquet", striped_images(4)[0], None)
    (tmp_path / "text").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for more in ((), ("--overwrite",)):
        told = refused(capsys, encoder_dir, images, "--out", tmp_path / "pipe", *more)
        assert "is no regular file" in told and (tmp_path / "pipe").is_fifo()
    for name in ("table.parquet", "text"):
        before = (tmp_path / name).read_bytes()
        told = refused(capsys, encoder_dir, images, "--out", tmp_path / name)
        assert "is another file. fix: give --overwrite" in told
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "x.parquet.parts").symlink_to(tmp_path)
    assert "is a link" in refused(capsys, encoder_dir, images, "--out", tmp_path / "x.parquet")
    assert embed(encoder_dir, images, "--out", tmp_path / "text", "--overwrite") == 0
    wanted = (tmp_path / "text").stat()
    assert embed(encoder_dir, images, "--out", tmp_path / "text") == 0
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "text").stat().st_mtime_ns == wanted.st_mtime_ns, "not made again"


# ---- maps


def checked(network: nn.Module, features: str, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """(what is read of two images, the same images normalised)."""
    encoder = Normalized(network, MEAN, STD).eval()
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    found = FeatureReader(encoder, features, image_size=size)(pixels)
    images = (pixels.float() / 255 - encoder.mean) / encoder.std
    with torch.no_grad():
        torch.testing.assert_close(found["vector"], network(images))
    return found, images


@torch.no_grad()
def test_maps_of_our_resnets() -> None:
    for arch, stem in (("resnet18", "cifar"), ("resnet50", "imagenet")):
        network = build_encoder(arch, 8, stem, 32, MEAN, STD).backbone.eval()
        patches, images = checked(network, "patches", 32)
        stages, same = checked(network, "stages", 32)
        x = network.get_submodule("maxpool")(
            network.get_submodule("bn1")(network.get_submodule("conv1")(same)).relu()
        )
        for number in range(1, 5):
            x = network.get_submodule(f"layer{number}")(x)
            torch.testing.assert_close(stages[f"stage_{number}"], x.mean((2, 3)))
        assert list(stages) == ["vector", "stage_1", "stage_2", "stage_3", "stage_4"]
        side = 4 if stem == "cifar" else 1
        assert patches["patches"].shape == (2, side * side, network.feature_dim)
        torch.testing.assert_close(patches["patches"].mean(1), patches["vector"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("convnext_atto", 64, {"patches": (4, 320), "stages": [40, 80, 160, 320]}),
        ("efficientnet_lite0", 64, {"patches": (4, 1280), "stages": [16, 24, 40, 112, 320]}),
        ("resnet18", 64, {"patches": (4, 512), "stages": [64, 64, 128, 256, 512]}),
        ("swin_tiny_patch4_window7_224", 64, {"patches": (4, 64), "stages": [8, 16, 32, 64]}),
        ("vit_tiny_patch16_224", 64, {"patches": (16, 192), "stages": [192] * 12}),
    ],
)
def test_maps_of_timm(name: str, size: int, shapes: dict[str, Any]) -> None:
    options: dict[str, Any] = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    options |= {"embed_dim": 8, "depths": (1, 1, 1, 1), "window_size": 2} if name.startswith("swin") else {}
    network: Any = timm.create_model(name, num_classes=0, **options).eval()
    found, images = checked(network, "patches", size)
    wanted = network.forward_features(images)
    if name.startswith("vit"):
        torch.testing.assert_close(found["patches"], wanted[:, 1:])
    else:
        wanted = wanted.flatten(1, 2) if name.startswith("swin") else wanted.flatten(2).mT
        torch.testing.assert_close(found["patches"], wanted)
    assert found["patches"].shape == (2, *shapes["patches"])
    stages, images = checked(network, "stages", size)
    assert [rows.shape[1] for rows in list(stages.values())[1:]] == shapes["stages"]
    if name.startswith("vit"):
        tokens = network._pos_embed(network.patch_embed(images))
        tokens = network.blocks[0](network.norm_pre(tokens))
        torch.testing.assert_close(stages["stage_1"], tokens[:, 1:].mean(1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "patches", "stages"),
    [
        ("resnet18", 32, (1, 512), [64, 128, 256, 512]),
        ("convnext_tiny", 64, (4, 768), [96, 192, 384, 768]),
        ("mobilenet_v2", 64, (4, 1280), [16, 24, 32, 96, 1280]),
        ("vit", 32, (16, 24), [24] * 3),
        ("swin_t", 64, (4, 768), [96, 192, 384, 768]),
        ("regnet_y_400mf", 64, (4, 440), [48, 104, 208, 440]),
        ("shufflenet_v2_x0_5", 64, (4, 1024), [48, 96, 192]),
    ],
)
def test_maps_of_torchvision(name: str, size: int, patches: tuple[int, ...], stages: list[int]) -> None:
    network = models.VisionTransformer(32, 8, 3, 2, 24, 48) if name == "vit" else models.get_model(name)
    drop_last_layer(network.eval())
    found, images = checked(network, "patches", size)
    assert found["patches"].shape == (2, *patches)
    if name in ("resnet18", "mobilenet_v2", "regnet_y_400mf", "swin_t", "shufflenet_v2_x0_5"):
        torch.testing.assert_close(found["patches"].mean(1), found["vector"], rtol=1e-4, atol=1e-5)
    if isinstance(network, models.VisionTransformer):
        tokens = torch.cat([network.class_token.expand(2, -1, -1), network._process_input(images)], 1)
        torch.testing.assert_close(found["patches"], network.encoder(tokens)[:, 1:])
    read, _ = checked(network, "stages", size)
    assert [rows.shape[1] for rows in list(read.values())[1:]] == stages


def test_maps_of_an_unknown_network_are_a_line() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, 5)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.linear(images.flatten(1))
            return found

    for features in ("patches", "stages"):
        with pytest.raises(UserError, match=f"the {features} of a network of type Flat cannot be read"):
            checked(Flat(), features, 8)
    assert checked(Flat(), "pooled", 8)[0]["vector"].shape == (2, 5)


def test_patches_in_the_file(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    assert embed(encoder_dir, images, "--features=patches", "data.image_size=32", "--out", out) == 0
    table, about = pq.read_table(out), read(out)[2]
    assert about["shapes"] == {"vector": [64], "patches": [16, 64]} and about["grid"] == [4, 4]
    patches = np.stack(table["patches"].to_numpy()).reshape(-1, *about["shapes"]["patches"])
    np.testing.assert_allclose(patches.mean(1), np.stack(table["vector"].to_numpy()), rtol=1e-4, atol=1e-5)


# ---- bad input


def test_bad_words_are_a_line(
    encoder_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "x.parquet")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    damaged = tmp_path / "damaged"
    shutil.copytree(encoder_dir, damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    diverged = load_encoder(encoder_dir)
    diverged.backbone.get_parameter("conv1.weight").data.fill_(torch.nan)
    save_encoder(diverged, tmp_path / "diverged")
    cases: list[tuple[str, list[object]]] = [
        ("one ENCODER and one IMAGES, 1 words are named", [encoder_dir, *out]),
        ("3 words are named", [encoder_dir, images, images, *out]),
        ("give --out FILE.parquet", [encoder_dir, images]),
        ("is a folder. fix: give --out", [encoder_dir, images, "--out", tmp_path]),
        ("cannot make the folder", [encoder_dir, images, "--out", tmp_path / "file" / "x.parquet"]),
        ("invalid choice: 'maps'", [encoder_dir, images, "--features=maps", *out]),
        ("did you mean data.image_size?", [encoder_dir, images, "data.image_sizes=3", *out]),
        ("data.image_size: ", [encoder_dir, images, "data.image_size=3", *out]),
        ("batch_size is no key. fix: give --batch-size", [encoder_dir, images, "batch_size=3", *out]),
        ("device=gpu cannot be used here", [encoder_dir, images, "--device=gpu", *out]),
        ("has learned nothing", ["random", images, *out]),
        ("is no directory, encoder", [tmp_path / "missing", images, *out]),
        ("cannot be read", [damaged, images, *out]),
        ("timm has no network 'no_such_model'", ["timm:no_such_model", images, *out]),
        ("no such folder, file or data set", [encoder_dir, tmp_path / "missing", *out]),
        ("not a regular file", [encoder_dir, tmp_path / "pipe", *out]),
        ("no images in", [encoder_dir, tmp_path / "empty", *out]),
        ("is a file, not a folder of images", [encoder_dir, tmp_path / "file", "data.kind=folder", *out]),
        ("names a column, and", [encoder_dir, images, "data.image_column=x", *out]),
        ("the vector of 0/000.png is not finite", [tmp_path / "diverged", images, *out]),
    ]
    for message, words in cases:
        capsys.readouterr()
        code = main(["embed", *map(str, words), *(SMALL if "--device=gpu" not in words else SMALL[:2])])
        said = capsys.readouterr().err
        assert code == 2 and message in said, (message, code, said)
        assert said.startswith("error: ") and said.count("\n") == 1 and ". fix: " in said, said
    assert not (tmp_path / "x.parquet").exists()
    assert main(["embed", str(encoder_dir), str(images), "--out", "x", "--batch-size=0"]) == 2


def test_the_words_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "embed" in capsys.readouterr().out
    for words, message in (
        ([], "no command named"),
        (["embedd"], "did you mean embed?"),
        (["\x1b[2J\n"], "embed"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and "\x1b" not in said


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; from ssl_emp.__main__ import main; sys.argv[0] = 'x'\ntry: main(['embed', '--help'])\n"
    )
    code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "False False" and "--features" in found.stdout


# ---- several processes, and kill -9


@pytest.mark.whole
def test_killed_and_gone_on_with_by_two_processes(encoder_dir: Path, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "images.parquet", [*striped_images(1500)[0], b"no image"], None)
    script = tmp_path / "small_chunks.py"
    script.write_text(
        "import sys\nfrom ssl_emp.commands import embed_file\nfrom ssl_emp.__main__ import main\n"
        "embed_file.CHUNK_ROWS = 32\nsys.exit(main(['embed', *sys.argv[1:]]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

    def command(out: str, *before: str) -> list[str]:
        return [
            *(before or [sys.executable]),
            str(script),
            str(encoder_dir),
            str(source),
            "--out",
            out,
            *SMALL,
        ]

    def run(out: str, *before: str) -> None:
        found = subprocess.run(
            command(out, *before), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert found.returncode == 0 and "1,500 images" in found.stdout, found.stderr
        assert "1 of 1,501 images could not be read (images.parquet#1500: not an image" in found.stderr

    run("whole.parquet")
    wanted = (tmp_path / "whole.parquet").read_bytes()
    killed = subprocess.Popen(command("x.parquet"), env=environment, cwd=tmp_path)
    parts = tmp_path / "x.parquet.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("chunk-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("chunk-*")}
    assert 3 <= len(kept) < 47 and not (tmp_path / "x.parquet").exists()
    run("x.parquet", *torchrun)
    assert (tmp_path / "x.parquet").read_bytes() == wanted and not parts.exists()


# ---- the page


def test_the_page_is_true(
    encoder_dir: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands and snippets run in their order, on small data; timm's weights cannot be had here."""
    page = (ROOT / "docs" / "embed.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder_dir, tmp_path / "runs" / "mine")
    write_parquet(tmp_path / "crops-0.parquet", striped_images(8)[0], None)
    commands = re.findall(r"^ssl-emp (embed runs/.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for line in commands[::-1]:
        words = shlex.split(line.replace("/path/to/images", str(images)))
        assert main([*words, "--overwrite", "--device=cpu"]) == 0
    world: dict[str, Any] = {"paths": sorted(images.glob("0/*"))}
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(first, "docs/embed.md", "exec"), world)  # noqa: S102
    assert world["vectors"].shape == (COUNT, 64) and world["about"]["num_unreadable"] == 0
    expected = torch.from_numpy(world["vectors"][: len(world["paths"])].copy())
    exec(compile(second, "docs/embed.md", "exec"), world)  # noqa: S102
    torch.testing.assert_close(world["vectors"], expected)
