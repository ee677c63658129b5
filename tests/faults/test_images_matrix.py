"""Fault matrix, images and folders: rows F1 to F13, paths (C6), malicious files (B3). A row's docstring is
`row | fault | expected`.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Pretrain, striped_images, write_parquet
from PIL import Image, PngImagePlugin
from refused import main_refuses, refusal

from linear_eval.features import load_features
from ssl_emp import load_encoder
from ssl_emp.commands import pretrain
from ssl_emp.commands.job import load_indices
from ssl_emp.data import decode
from ssl_emp.data.images import DeviceImages, ImageSet, load_images
from ssl_emp.errors import UserError
from ssl_emp.run.checkpoint import load_checkpoint

Record = Callable[[str, object], None]
RED = (200, 30, 40)
SIZE = 24
MAX_PIXELS = 50_000_000


def encoded(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def photo(seed: int, size: int = SIZE) -> Image.Image:
    """Smooth colours and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return Image.fromarray(
        (np.asarray(coarse) + rng.normal(0, 8, (size, size, 3))).clip(0, 255).astype(np.uint8)
    )


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def mean_color(images: ImageSet, name: str) -> list[float]:
    return images.pixels[images.names.index(name)].float().mean((1, 2)).tolist()


# --- F1, F2: files that are no whole images


@pytest.mark.parametrize("store", ["memory", "raw", "encoded"])
@pytest.mark.parametrize(
    "places", [[0], [39], [31, 32, 33], [0, 39]], ids=["first", "last", "across a thread's run", "both ends"]
)
def test_F1_no_image_at_all(tmp_path: Path, store: str, places: list[int]) -> None:
    """F1 | 0 bytes or text named .jpg at the first, last, middle places | left out with name and reason, the
    others untouched
    """
    root = tmp_path / "in"
    for i in range(40):
        content = encoded(photo(i), "JPEG")
        if i in places:
            content = b"" if i % 2 else b"this is not a picture\n" * 9
        fill(root, {f"{'ab'[i % 2]}/{i:02}.jpg": content})
    got = load_images(str(root), image_size=SIZE, store=store, cache_dir=str(tmp_path / "cache"))
    assert {name: reason.split(" (")[0] for name, reason in got.skipped} == {
        f"{'ab'[i % 2]}/{i:02}.jpg": "empty file" if i % 2 else "not an image of a known format"
        for i in places
    }
    kept = [int(name[2:4]) for name in got.names]
    assert sorted(kept) == [i for i in range(40) if i not in places]
    assert got.labels is not None and got.labels.tolist() == [i % 2 for i in kept]
    for row, i in enumerate(kept):
        expected = np.asarray(Image.open(root / got.names[row]).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(got.pixels[row].numpy(), expected), i


TRUNCATED: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_blocks": 1}),
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
]


def test_F2_truncated(record_property: Record) -> None:
    """F2 | 11 kinds of JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, each cut at 60 places | left out, or whole:
    never grey
    """
    refused = whole = 0
    with decode.pillow_limits(MAX_PIXELS):
        for fmt, options in TRUNCATED:
            content = encoded(photo(1), fmt, **options)
            expected = decode.decode(content, SIZE, MAX_PIXELS)
            places = {
                0,
                1,
                len(content) - 1,
                len(content) - 2,
                *np.linspace(2, len(content) - 3, 56).round().astype(int).tolist(),
            }
            for place in places:
                for reader in ("decode", "to_jpeg"):
                    try:
                        if reader == "to_jpeg":
                            pixels = np.asarray(
                                Image.open(io.BytesIO(decode.to_jpeg(content[:place], SIZE, MAX_PIXELS, 90)))
                            )
                            pixels, tolerance = pixels.transpose(2, 0, 1), 40  # JPEG's own loss
                        else:
                            pixels, tolerance = decode.decode(content[:place], SIZE, MAX_PIXELS), 0
                    except Exception as exc:  # noqa: BLE001 - a dozen types
                        assert decode.reason(exc) and "\n" not in decode.reason(exc)
                        refused += 1
                        continue
                    whole += 1
                    assert np.abs(pixels.astype(int) - expected).max() <= tolerance, (
                        f"{fmt} {options} cut at {place} of {len(content)}"
                    )
    record_property("cuts refused", refused)
    record_property("cuts behind the last pixel, read whole", whole)
    assert refused > 1200 and whole < 40


def test_F2_a_half_jpeg_passes_pillows_verify_and_not_ours(tmp_path: Path) -> None:
    """F2 | half a JPEG, good to Pillow's verify() | left out with the reason"""
    content = encoded(photo(1, 64), "JPEG")
    fill(tmp_path, {"half.jpg": content[: len(content) // 2], "good.jpg": content})
    with Image.open(tmp_path / "half.jpg") as image:
        image.verify()
    got = load_images(str(tmp_path))
    assert (
        got.names == ["good.jpg"]
        and got.skipped[0][0] == "half.jpg"
        and "truncated" in got.skipped[0][1].lower()
    )


def test_F1_nothing_but_bad_files(tmp_path: Path) -> None:
    """F1 | every file is bad | refused before training, with the first file's name and reason"""
    fill(tmp_path, {"a.jpg": b"", "b.png": encoded(photo(0))[:99]})
    assert "none of the 2 images" in refusal(
        lambda: load_images(str(tmp_path))
    ) and "a.jpg: empty file" in refusal(lambda: load_images(str(tmp_path)))


# --- F3, F4, F5: unusual kinds of pixels


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, kind: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG with any header over any data: kind 0 grey, 2 RGB; `before` the data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )


def test_F3_unusual_modes(tmp_path: Path) -> None:
    """F3 | CMYK, L, LA, P, 1-bit, RGBA, LAB, YCbCr, colours hidden by alpha 0 | the colour as shown over
    white
    """
    size = (16, 16)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, *RED])
    white, half = (255, 255, 255), tuple((value * 128 + 255 * 127) / 255 for value in RED)
    cases: dict[str, tuple[bytes, tuple[float, ...], float]] = {
        "cmyk.jpg": (encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 3),
        "cmyk.tif": (encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "TIFF"), (255, 0, 0), 0),
        "l.png": (encoded(Image.new("L", size, 77)), (77, 77, 77), 0),
        "la.png": (encoded(Image.new("LA", size, (0, 0))), white, 0),
        "p.png": (encoded(palette), RED, 0),
        "p_clear.png": (encoded(palette, transparency=1), white, 0),
        "p_half.png": (encoded(palette, transparency=bytes([255, 128])), half, 1),
        "l_clear.png": (encoded(Image.new("L", size, 77), transparency=77), white, 0),
        "one_bit.png": (encoded(Image.new("1", size, 1)), white, 0),
        "one_bit.tif": (encoded(Image.new("1", size, 0), "TIFF"), (0, 0, 0), 0),
        "rgba_hidden.png": (encoded(Image.new("RGBA", size, (*RED, 0))), white, 0),
        "rgba_half.png": (encoded(Image.new("RGBA", size, (*RED, 128))), half, 1),
        "rgba.webp": (encoded(Image.new("RGBA", size, (*RED, 0)), "WEBP", lossless=True), white, 0),
        "ycbcr.jpg": (encoded(Image.new("RGB", size, RED), "JPEG"), RED, 3),
        "lab.tif": (encoded(Image.new("LAB", size, (255, 128, 128)), "TIFF"), white, 3),
    }
    got = load_images(
        str(fill(tmp_path, {name: content for name, (content, _, _) in cases.items()})), image_size=16
    )
    assert not got.skipped
    for name, (_, expected, tolerance) in cases.items():
        assert mean_color(got, name) == pytest.approx(expected, abs=tolerance + 1e-3), name


def test_F4_deep_pixels(tmp_path: Path) -> None:
    """F4 | 16-bit grey and RGB PNG, TIFF, PGM; 32-bit TIFF | scaled to 8 bits; 32-bit left out: no known
    range
    """
    grey = Image.fromarray(np.full((16, 16), 100 * 257, np.uint16))
    rows = (b"\0" + struct.pack(">HHH", *(value * 257 for value in RED)) * 16) * 16
    good = {
        "grey.png": (encoded(grey), (100,) * 3),
        "grey.tif": (encoded(grey, "TIFF"), (100,) * 3),
        "grey.pgm": (b"P5 16 16 65535\n" + struct.pack(">H", 100 * 257) * 256, (100,) * 3),
        "white.png": (encoded(Image.fromarray(np.full((16, 16), 65535, np.uint16))), (255,) * 3),
        "dark.png": (encoded(Image.fromarray(np.full((16, 16), 300, np.uint16))), (1,) * 3),
        "rgb.png": (raw_png(16, 16, 16, 2, rows), RED),
    }
    bad = {
        "float.tif": encoded(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"),
        "int.tif": encoded(Image.fromarray(np.full((16, 16), 70000, np.int32)), "TIFF"),
    }
    got = load_images(
        str(fill(tmp_path, bad | {name: content for name, (content, _) in good.items()})), image_size=16
    )
    assert {name for name, _ in got.skipped} == set(bad) and all(
        "32-bit pixels" in reason for _, reason in got.skipped
    )
    for name, (_, expected) in good.items():
        assert mean_color(got, name) == pytest.approx(expected, abs=1), name


def test_F5_several_frames(tmp_path: Path) -> None:
    """F5 | animated GIF, WebP, APNG, TIFF of several pages, MPO | the first frame"""
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    kinds = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}, "MPO": {}}
    names = {"GIF": "a.gif", "WEBP": "a.webp", "PNG": "a.png", "TIFF": "a.tif", "MPO": "a.jpg"}
    files = {
        names[fmt]: encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
        for fmt, options in kinds.items()
    }
    got = load_images(str(fill(tmp_path, files)), image_size=16)
    assert len(got.names) == 5 and all(
        mean_color(got, name) == pytest.approx(RED, abs=3) for name in got.names
    )


# --- F6: bombs


def tiff(width: int, height: int) -> bytes:
    """Header of an uncompressed grey TIFF that holds 16 bytes."""
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, 16),
    ]
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + struct.pack("<H", len(tags)) + listed + bytes(4)


def bombs() -> dict[str, bytes]:
    """Small files that declare far more than they hold, or hold far more than they weigh."""

    def patched(fmt: str, at: int | bytes, size: bytes, **options: Any) -> bytes:
        content = bytearray(encoded(Image.new("P" if fmt == "GIF" else "RGB", (16, 16)), fmt, **options))
        start = content.index(at) + len(at) if isinstance(at, bytes) else at
        content[start : start + len(size)] = size
        return bytes(content)

    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * 20_000_000, zip=True)
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(20_000_000), 9))
    return {
        "196_megapixels.png": raw_png(14000, 14000, 1, 0, bytes(1751 * 14000)),
        "92_megapixels.png": raw_png(9600, 9600, 1, 0, bytes(1201 * 9600)),
        "just_over.png": raw_png(50_000_001, 1, 1, 0, bytes(6_250_002)),
        "canvas.gif": patched("GIF", 6, struct.pack("<HH", 65535, 65535)),
        "frame.gif": patched("GIF", b"\x2c\0\0\0\0", struct.pack("<HH", 60000, 60000)),
        "header.jpg": patched("JPEG", b"\xff\xc0\0\x11\x08", struct.pack(">HH", 65500, 65500)),
        "header.bmp": patched("BMP", 18, struct.pack("<ii", 100_000, 100_000)),
        "header.ppm": b"P6 100000 100000 255\n" + bytes(64),
        "header.tif": tiff(100_000, 100_000),
        "header.webp": b"RIFF"
        + struct.pack("<I", 32)
        + b"WEBPVP8L"
        + struct.pack("<I", 20)
        + b"\x2f"
        + b"\xff" * 4
        + bytes(15),
        "text.png": encoded(photo(0), pnginfo=info),
        "profile.png": encoded(photo(0))[:33] + profile + encoded(photo(0))[33:],
    }


def peak_bytes() -> int | None:
    """Largest resident size of this process since `peak_reset`; None where the kernel does not tell."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def peak_reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_F6_bombs(tmp_path: Path, record_property: Record) -> None:
    """F6 | 12 bombs: 9 kinds of header of over 50 Mpx, 20 MB of text, of profile | left out before decoding,
    < 100 MB, < 1 s
    """
    root = fill(tmp_path, {**bombs(), "good.png": encoded(photo(0))})
    try:
        peak_reset()
    except OSError:
        pytest.skip("this kernel does not reset the peak of the resident size")
    before, began = peak_bytes(), time.perf_counter()
    got = load_images(str(root), image_size=16)
    took, after = time.perf_counter() - began, peak_bytes()
    assert before is not None and after is not None
    record_property("bombs left out", len(got.skipped))
    record_property("MB more at the peak", round((after - before) / 1e6))
    record_property("seconds", round(took, 2))
    assert got.names == ["good.png"] and len(got.skipped) == 12, got.names
    reasons = dict(got.skipped)
    assert all(
        "more pixels than max_pixels" in reasons[name]
        for name in reasons
        if name not in ("header.webp", "text.png", "profile.png")
    )
    assert after - before < 100e6 and took < 1


def test_F6_more_data_than_pixels(tmp_path: Path) -> None:
    """F6 | a 4x4 PNG whose stream unpacks to 100 MB | decoded as 4x4, the rest never unpacked"""
    fill(tmp_path, {"a.png": raw_png(4, 4, 8, 2, bytes(100_000_000)), "b.png": encoded(photo(0, 4))})
    peak_reset()
    before = peak_bytes()
    got = load_images(str(tmp_path), image_size=4)
    assert got.names == ["a.png", "b.png"]
    after = peak_bytes()
    assert before is None or after is None or after - before < 50e6


def test_F6_own_cap_is_exact_and_counts_every_file(tmp_path: Path) -> None:
    """F6 | max_pixels=400 with images of 400 and 401 pixels | 400 accepted, 401 left out, Pillow's limit
    restored
    """
    before = Image.MAX_IMAGE_PIXELS
    fill(
        tmp_path, {"a.png": encoded(Image.new("RGB", (20, 20))), "b.png": encoded(Image.new("RGB", (401, 1)))}
    )
    got = load_images(str(tmp_path), max_pixels=400, image_size=8)
    assert got.names == ["a.png"] and got.skipped == [("b.png", "more pixels than max_pixels")]
    assert Image.MAX_IMAGE_PIXELS == before


# --- F7, F8: shapes and metadata


def test_F7_extreme_shapes_train(pretrain_run: Pretrain, tmp_path: Path) -> None:
    """F7 | images of 1x1, 1x3000, 3000x1 and 65535x1 pixels | loaded and trained on, finite losses"""
    shapes = [(1, 1), (1, 3000), (3000, 1), (65535, 1)]
    for i in range(16):
        fill(
            tmp_path / "in",
            {f"{i:02}.png": encoded(Image.new("RGB", shapes[i % 4], (16 * i, 255 - 16 * i, 0)))},
        )
    run = pretrain_run("run", f"data.source={tmp_path / 'in'}", "data.image_size=16", "epochs=1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and np.isfinite(rows[0]["loss"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_F8_exif_rotation(tmp_path: Path, orientation: int) -> None:
    """F8 | the eight EXIF orientations | applied"""
    stored = np.zeros((32, 32, 3), np.uint8)
    stored[:16, :16] = 255  # EXIF 2.3, section 4.6.4, says where it is shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "0.jpg", exif=exif, quality=100)
    shown = load_images(str(tmp_path)).pixels[0].float().mean(0)  # (32, 32)
    top, left = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    quarters = shown.reshape(2, 16, 2, 16).mean((1, 3))
    assert quarters.argmax().item() == 2 * top + left and quarters.max() > 250


def test_F8_odd_metadata(tmp_path: Path) -> None:
    """F8 | 5 MB of ICC profile, EXIF of random bytes, orientation 99, EXIF beyond its end | the pixels,
    metadata ignored
    """
    beyond = Image.Exif()
    beyond[0x0112] = 99
    random = np.random.default_rng(0).bytes(5_000_000)
    files = {
        "icc.jpg": encoded(photo(1), "JPEG", icc_profile=random),
        "noise.jpg": encoded(photo(1), "JPEG", exif=b"Exif\0\0" + random[:60]),
        "beyond.jpg": encoded(photo(1), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "ninety_nine.jpg": encoded(photo(1), "JPEG", exif=beyond),
    }
    got = load_images(str(fill(tmp_path, files)))
    plain = np.asarray(Image.open(io.BytesIO(encoded(photo(1), "JPEG")))).transpose(2, 0, 1)
    assert len(got.names) == 4 and all(np.array_equal(image.numpy(), plain) for image in got.pixels[:])


def test_F8_formats_outside_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """F8 | EPS, SVG, PSD, PDF, ICO, JPEG 2000, DDS, TGA, … named .png | left out, and no program
    (Ghostscript) is started
    """
    Image.init()
    files = {
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n%%EOF\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "psd.png": b"8BPS\0\1" + bytes(60),
        "pdf.png": b"%PDF-1.4\n" + bytes(60),
        "fli.png": b"\0\0\0\0\x11\xaf" + bytes(200),
        "fits.png": b"SIMPLE  =                    T" + bytes(100),
    }
    for fmt in ("ICO", "JPEG2000", "DDS", "TGA", "PCX", "SGI", "ICNS"):
        if fmt in Image.SAVE:
            files[f"{fmt}.png"] = encoded(photo(0, 32), fmt)
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    got = load_images(str(fill(tmp_path, {**files, "good.png": encoded(photo(0))})))
    record_property("formats left out", len(got.skipped))
    assert got.names == ["good.png"] and len(got.skipped) == len(files) >= 10 and not started


# --- F9, F10: folders with too little in them


def test_F9_folder_layouts(tmp_path: Path) -> None:
    """F9 | empty class folder, flat, mixed, hidden files, .DS_Store, .JPEG, folder x.png | no classes, no
    labels; the rest passed over
    """
    good = encoded(photo(0))
    (tmp_path / "empty_class/a").mkdir(parents=True)
    fill(tmp_path / "empty_class", {"b/0.png": good, "c/0.png": good})
    got = load_images(str(tmp_path / "empty_class"))
    assert got.class_names == ["b", "c"] and got.labels is not None and got.labels.tolist() == [0, 1]
    for name, files in {
        "flat": ["0.png", "1.png"],
        "mixed": ["0.png", "a/1.png", "b/2.png"],
        "one": ["a/0.png"],
    }.items():
        got = load_images(str(fill(tmp_path / name, dict.fromkeys(files, good))))
        assert got.labels is None and got.names == sorted(files)
    hidden = fill(
        tmp_path / "hidden",
        {"UPPER.JPEG": good, ".DS_Store": b"x", ".a.png": good, ".b/0.png": good, "Thumbs.db": b"x"},
    )
    (hidden / "x.png").mkdir()
    got = load_images(str(hidden))
    assert got.names == ["UPPER.JPEG"] and not got.skipped


def test_F9_nothing_in_it(tmp_path: Path) -> None:
    """F9 | empty folder, folders of empty classes, hidden files only, no such folder | one line with a fix"""
    for name in ("empty", "classes/a", "classes/b", "hidden"):
        (tmp_path / name).mkdir(parents=True)
    fill(tmp_path / "hidden", {".a.png": encoded(photo(0))})
    for name in ("empty", "classes", "hidden"):
        assert "no images in" in refusal(lambda name=name: load_images(str(tmp_path / name)))  # type: ignore[misc]
    assert "no such folder" in refusal(lambda: load_images(str(tmp_path / "none")))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_F10_too_few_images(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """F10 | 0, 1 and 5 images with batch_size=8 | refused before training, with the numbers; no run
    directory
    """
    root = fill(tmp_path / "in", {f"{i}.png": encoded(photo(i)) for i in range(count)})
    root.mkdir(exist_ok=True)
    line = main_refuses(
        capsys,
        "--config",
        str(tiny_config),
        f"data.source={root}",
        f"out={tmp_path / 'out'}",
        "prune.policy=none",
    )
    assert {0: "no images", 1: "1 image", 5: "of the 5 images"}[count] in line and (
        count < 5 or "batch_size=8" in line
    )
    assert not (tmp_path / "out").exists()


# --- F11: links, pipes, devices


def test_F11_links(tmp_path: Path, record_property: Record) -> None:
    """F11 | links to file, folder, parent, each other (20 x 20), self, nothing, outside | every inode once, <
    1 s
    """
    root = tmp_path / "root"
    good = encoded(photo(0))
    for i in range(20):
        fill(root, {f"d{i}/x.png": good})
    for i in range(20):
        for j in range(20):
            (root / f"d{i}/l{j}").symlink_to(root / f"d{j}")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "self.png").symlink_to("self.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "again.png").symlink_to(root / "d3/x.png")
    fill(tmp_path / "outside", {"y.png": good})
    (root / "outside").symlink_to(tmp_path / "outside")
    began = time.perf_counter()
    got = load_images(str(root))
    took = time.perf_counter() - began
    record_property("images found", len(got.names))
    record_property("seconds", round(took, 3))
    inodes = {os.stat(root / name).st_ino for name in got.names}
    assert len(got.names) == len(inodes) == 21 and took < 1
    assert {"gone.png", "self.png"} <= {os.path.basename(name) for name, _ in got.skipped}


def test_F11_pipes_and_devices(tmp_path: Path) -> None:
    """F11 | pipe or device as image, source, .parquet, prune.indices | left out or refused, nothing blocks"""
    fill(tmp_path, {"good.png": encoded(photo(0))})
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    got = load_images(str(tmp_path))
    assert got.names == ["good.png"] and {reason for _, reason in got.skipped} == {"not a regular file"}
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "pipe.npy").symlink_to(tmp_path / "pipe.parquet")
    for source in (tmp_path / "pipe.parquet", tmp_path / "*.parquet", Path("/dev/zero"), Path("/dev/null")):
        refusal(lambda source=source: load_images(str(source)))  # type: ignore[misc]
    assert load_images(str(tmp_path)).names == ["good.png"], (
        "a folder of images that holds a pipe called .parquet"
    )
    for path in (tmp_path / "pipe.npy", tmp_path / "pipe.parquet", Path("/dev/zero")):
        assert "not a regular file" in refusal(lambda path=path: load_indices(path, 9))  # type: ignore[misc]


# --- F12: files that change meanwhile


class Interrupted:
    """Stands in for `DeviceImages.stream`: does something before batch `at` of all batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.seen, original = 0, DeviceImages.stream

        def stream(store: DeviceImages, batches: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for item in original(store, batches):
                self.seen += 1
                if self.seen == at:
                    act()
                yield item

        monkeypatch.setattr(DeviceImages, "stream", stream)


def encoder_hash(run: Path) -> str:
    return hashlib.sha256((run / "encoder" / "model.safetensors").read_bytes()).hexdigest()


def test_F12_source_removed_or_replaced(
    pretrain_run: Pretrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """F12 | sources deleted during the run; one deleted or replaced before the resume | no effect; refused,
    once restored bit for bit
    """
    source, kept = tmp_path / "in", tmp_path / "kept"
    for i, content in enumerate(striped_images(24)[0]):
        fill(source, {f"{i:02}.png": content})
    shutil.copytree(source, kept)
    reference = pretrain_run("reference", f"data.source={source}", "epochs=3", "prune.anneal_fraction=0")

    with monkeypatch.context() as patch:
        Interrupted(patch, 6, lambda: shutil.rmtree(source))
        deleted = pretrain_run("deleted", f"data.source={source}", "epochs=3", "prune.anneal_fraction=0")
    assert encoder_hash(deleted) == encoder_hash(reference)
    shutil.copytree(kept, source)

    with monkeypatch.context() as patch:
        Interrupted(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        out = tmp_path / "stopped"
        arguments = ["--config", yaml_of(tmp_path, reference), f"out={out}"]
        assert pretrain.main(arguments) == 143
    for change in (
        lambda: (source / "07.png").unlink(),
        lambda: (source / "07.png").write_bytes((source / "08.png").read_bytes()),
    ):
        change()
        line = main_refuses(capsys, "--resume", str(out))
        assert "not those of the checkpoint" in line and str(source) in line
        shutil.copy(kept / "07.png", source / "07.png")
    assert pretrain.main(["--resume", str(out)]) == 0
    assert encoder_hash(out) == encoder_hash(reference)


def yaml_of(folder: Path, run: Path) -> str:
    """The config of a run as a file of its own, without its directory."""
    text = "".join(
        line
        for line in (run / "config.yaml").read_text().splitlines(keepends=True)
        if not line.startswith("out:")
    )
    (folder / "again.yaml").write_text(text)
    return str(folder / "again.yaml")


def test_F12_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F12 | permission denied, vanished between scan and decoding, input/output error | left out with the
    reason
    """
    fill(tmp_path, {f"{i}.png": encoded(photo(i)) for i in range(4)})
    errors = {
        "1.png": PermissionError(13, "Permission denied"),
        "2.png": FileNotFoundError(2, "No such file or directory"),
    }
    errors["3.png"] = OSError(5, "Input/output error")

    def guarded(path: Any, *args: Any, **kwargs: Any) -> Any:  # chmod does not stop root
        if os.path.basename(path) in errors:
            raise errors[os.path.basename(path)]
        return open(path, *args, **kwargs)

    monkeypatch.setattr(decode, "open", guarded, raising=False)
    got = load_images(str(tmp_path))
    assert got.names == ["0.png"] and got.skipped == [
        (name, error.strerror) for name, error in errors.items()
    ]


def test_F12_damaged_cache(tmp_path: Path) -> None:
    """F12 | cached file of a large set shortened, its note lost or garbage | one line: delete it, it is built
    again
    """
    fill(tmp_path / "in", {f"{i}.png": encoded(photo(i)) for i in range(4)})

    def load(store: str) -> ImageSet:
        return load_images(str(tmp_path / "in"), store=store, cache_dir=str(tmp_path / "cache"))

    for store, pattern in (("raw", "*.u8"), ("raw", "*.json"), ("encoded", "*.jpegs")):
        whole = load(store).pixels[:].clone()
        (path,) = (tmp_path / "cache").glob(pattern)
        content = path.read_bytes()
        for damaged in (content[:-1], b"", b"[]"):
            path.unlink()  # a new file: whoever has the old one mapped keeps it
            path.write_bytes(damaged)
            assert str(path) in refusal(lambda store=store: load(store))  # type: ignore[misc]
        path.unlink()
        if pattern == "*.json":
            assert str(path) in refusal(lambda: load("raw"))
            path.write_bytes(content)
        assert torch.equal(load(store).pixels[:], whole)


# --- F13: labels that are few


def test_F13_a_class_of_one(pretrain_run: Pretrain, tmp_path: Path) -> None:
    """F13 | one class has one image, another only an unreadable one | trains, classes as found, the monitor
    runs
    """
    for i, content in enumerate(striped_images(40)[0]):
        fill(tmp_path / "in", {f"{'many' if i else 'one'}/{i:02}.png": content})
    fill(tmp_path / "in", {"broken/0.png": b""})
    got = load_images(str(tmp_path / "in"))
    assert (
        got.class_names == ["broken", "many", "one"]
        and got.labels is not None
        and got.labels.bincount().tolist() == [0, 39, 1]
    )
    run = pretrain_run("run", f"data.source={tmp_path / 'in'}", "epochs=2")
    assert "knn_train_split" in (run / "metrics.jsonl").read_text()


# --- C6: names


NAMES = [
    "ä 日本🦊",
    "a b",
    "q'u\"o",
    "new\nline",
    "-rf",
    "--help",
    "n" * 255,
    "#c: {x}",
    "$(touch pwned)",
    "*",
    "[ab]",
    "tab\t",
    "x=y",
    "~",
]


@pytest.fixture(scope="module")
def plain_hash(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Encoder of the run that those with odd names must equal."""
    root = tmp_path_factory.mktemp("plain")
    return run_in(root, tiny_config, "plain")


def run_in(root: Path, config: Path, name: str) -> str:
    """Train an epoch on data in `data/NAME` into `out/NAME`, cached in `cache/NAME`, resume it; the encoder's
    hash.
    """
    for i, content in enumerate(striped_images(24)[0]):
        fill(root / "data" / name, {f"{i:02}.png": content})
    before = os.getcwd()
    os.chdir(root)
    try:
        where = [
            f"data.source=data/{name}",
            f"data.cache_dir=cache/{name}",
            "data.store=raw",
            f"out=out/{name}",
        ]
        assert pretrain.main(["--config", str(config), "epochs=1", *where]) == 0
        assert pretrain.main(["--resume", f"out/{name}"]) == 0
        load_encoder(f"out/{name}")
        return encoder_hash(Path("out") / name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_C6_odd_names_of_folders(tiny_config: Path, tmp_path: Path, plain_hash: str, name: str) -> None:
    """C6 | 14 odd names of the data, output and cache folders | the encoder bit for bit as with plain
    names
    """
    assert run_in(tmp_path, tiny_config, name) == plain_hash
    assert not list(tmp_path.rglob("pwned"))


def test_C6_odd_names_of_files(tmp_path: Path) -> None:
    """C6 | odd names of class folders and files, and bytes that are not UTF-8 | all loaded, names that any
    log can hold
    """
    names = [*(name for name in NAMES if len(name) < 250), "n" * 251]
    for name in names:
        fill(tmp_path / "in", {f"{name}/{name}.png": encoded(photo(0))})
    with open(os.fsencode(tmp_path / "in") + b"/~/\xff.png", "wb") as file:
        file.write(encoded(photo(0)))
    got = load_images(str(tmp_path / "in"))
    assert (
        len(got.names) == len(names) + 1 == len(set(got.names))
        and got.class_names == sorted(names)
        and not got.skipped
    )
    json.dumps(got.names).encode("utf-8")
    for name in names:
        assert len(load_images(str(tmp_path / "in" / name)).names) == 1 + (name == "~")


def test_C6_bare_dashes(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C6 | data.source=-rf and out=--help in the current folder | taken as names"""
    monkeypatch.chdir(tmp_path)
    for i, content in enumerate(striped_images(16)[0]):
        fill(Path("-rf"), {f"{i:02}.png": content})
    assert pretrain.main(["--config", str(tiny_config), "epochs=1", "data.source=-rf", "out=--help"]) == 0
    assert (tmp_path / "--help" / "encoder" / "model.safetensors").is_file()


def test_C6_newline_in_a_message(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C6 | a newline in the names of a missing source, a used output folder and a config file | the error is
    still one line
    """
    (tmp_path / "a\nb").mkdir()
    (tmp_path / "a\nb" / "file").write_text("")
    base = ["--config", str(tiny_config)]
    main_refuses(capsys, *base, f"out={tmp_path / 'out'}", f"data.source={tmp_path}/no\nwhere")
    main_refuses(capsys, *base, f"out={tmp_path}/a\nb")
    main_refuses(capsys, "--config", f"{tmp_path}/no\nwhere.yaml")


# --- parquet from strangers


def test_F1_parquet_of_paths_reads_no_files(tmp_path: Path) -> None:
    """F1 | parquet whose image bytes are text: the path of a private file | refused, the file is not
    opened
    """
    fill(tmp_path, {"private.png": encoded(photo(0))})
    path = str(tmp_path / "private.png")
    for column in (pa.array([{"bytes": path}]), pa.array([path]), pa.array([{"path": path}])):
        pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
        assert "no column of images" in refusal(lambda: load_images(str(tmp_path / "x.parquet")))
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train-0.parquet", [encoded(photo(0))], None)
    pq.write_table(pa.table({"image": pa.array([{"bytes": path}])}), tmp_path / "set" / "train-1.parquet")
    assert "no column image of images" in refusal(lambda: load_images(str(tmp_path / "set")))


def test_F1_damaged_parquet(tmp_path: Path, record_property: Record) -> None:
    """F1 | parquet: 100 flipped bits, 50 cuts, odd labels and class names | loaded, left out or refused,
    never a traceback
    """
    path = write_parquet(tmp_path / "x.parquet", striped_images(4)[0], [0, 1, 2, 3])
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = []
    for place, bit in zip(rng.integers(0, len(content), 100), rng.integers(0, 8, 100), strict=True):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        damaged.append(bytes(flipped))
    damaged += [content[: int(end)] for end in np.linspace(0, len(content) - 1, 50)]
    refused = 0
    for bad in damaged:
        path.write_bytes(bad)
        try:
            load_images(str(path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    record_property("damaged files refused", refused)
    assert refused >= 50  # every cut one; a flipped bit may hide in a pixel

    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)
    assert "no images in" in refusal(lambda: load_images(str(path)))
    write_parquet(path, striped_images(2)[0], [0, 10**12])
    assert load_images(str(path)).class_names == ["0", "1000000000000"], "two classes, not a million million"
    good = pa.table(
        {"image": pa.array([{"bytes": data} for data in striped_images(2)[0]]), "label": pa.array([0, 1])}
    )
    for names in (
        b"[",
        b"[" * 10**5,
        b"\xff",
        *(json.dumps({"info": {"features": {"label": {"names": n}}}}) for n in (5, "ab", [1, 2], None)),
    ):
        pq.write_table(good.replace_schema_metadata({"huggingface": names}), path)
        assert load_images(str(path)).class_names is None


# --- B3: files that would run code if they were unpickled


class Evil:
    """Unpickles into a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def evil_objects(marker: Path) -> dict[str, Any]:
    """Ten pickles that would create `marker`."""
    shell = f"touch '{marker}'"
    tensors = {"weight": torch.zeros(2)}
    return {
        "os.system": Evil(os.system, shell),
        "subprocess": Evil(subprocess.call, ["touch", str(marker)]),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w').close()"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w').close()"),
        "pathlib": Evil(Path.touch, marker),
        "nested call": Evil(getattr, Evil(eval, f"__import__('os').system({shell!r})"), "real"),
        "in the optimizer": {
            "format": 2,
            "model": tensors,
            "optimizer": {"state": {0: {"momentum": Evil(os.system, shell)}}},
        },
        "in the scores": {"format": 2, "model": tensors, "scores": {"last": Evil(os.system, shell)}},
        "as a key": {"format": 2, "model": {Holder(shell): 1}},
        "in a tensor's hook": {"weight": torch.zeros(2), "hooks": [Evil(os.mkdir, str(marker))]},
    }


class Holder:
    """A key that unpickles by calling."""

    def __init__(self, shell: str) -> None:
        self.shell = shell

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.system, (self.shell,))


def torch_files(value: Any) -> dict[str, bytes]:
    """A value as each kind of file that torch.load knows: zip, legacy, bare pickle."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, zipped)
        torch.save(value, legacy, _use_new_zipfile_serialization=False)
    return {"zip": zipped.getvalue(), "legacy": legacy.getvalue(), "bare": pickle.dumps(value)}


KINDS = list(evil_objects(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_B3_malicious_pickles(
    tmp_path: Path, pretrain_run: Pretrain, record_property: Record, kind: str
) -> None:
    """B3 | 10 malicious pickles in 3 forms as checkpoint, encoder, .npy, cache, image, parquet, config |
    refused, 0 executed
    """
    marker = tmp_path / "executed"
    value = evil_objects(marker)[kind]
    reads = 0
    for form, content in torch_files(value).items():
        folder = tmp_path / form / "checkpoints"
        fill(folder, {"step_00000003.pt": content})
        (folder / "manifest.json").write_text(
            json.dumps({"step_00000003.pt": hashlib.sha256(content).hexdigest()})
        )
        refusal(lambda folder=folder: load_checkpoint(folder))  # type: ignore[misc]

        encoder = fill(tmp_path / form / "run" / "encoder", {"model.safetensors": content})
        spec = {
            "arch": "resnet18",
            "width": 8,
            "stem": "cifar",
            "image_size": 16,
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
        }
        (encoder / "config.json").write_text(json.dumps({"ssl_emp": spec}))
        refusal(lambda encoder=encoder: load_encoder(encoder))  # type: ignore[misc]

        fill(
            tmp_path / form,
            {"a.npy": content, "a.txt": content, "x.png": content, "x.parquet": content, "run.yaml": content},
        )
        for name in ("a.npy", "a.txt"):
            refusal(lambda name=name, form=form: load_indices(tmp_path / form / name, 9))  # type: ignore[misc]
        (tmp_path / form / "cache.safetensors").write_bytes(content)
        assert load_features(tmp_path / form / "cache.safetensors", torch.zeros(2, dtype=torch.int64)) is None
        for source in (tmp_path / form / "x.parquet", encoder):
            refusal(lambda source=source: load_images(str(source)))  # type: ignore[misc]
        assert pretrain.main(["--config", str(tmp_path / form / "run.yaml")]) == 2
        reads += 8
    array = np.empty(1, object)
    array[0] = value
    np.save(tmp_path / "object.npy", array, allow_pickle=True)
    refusal(lambda: load_indices(tmp_path / "object.npy", 9))
    np.savez(tmp_path / "archive.npz", array)
    shutil.copy(tmp_path / "archive.npz", tmp_path / "archive.npy")
    refusal(lambda: load_indices(tmp_path / "archive.npy", 9))
    record_property("files read", reads + 2)
    record_property("executed", int(marker.exists()))
    assert not marker.exists()
    pickle.loads(pickle.dumps(value))  # the control: unpickled, it runs
    assert marker.exists()


def test_B3_odd_index_files(tmp_path: Path) -> None:
    """B3 | .npy declaring 10^12 numbers, empty, cut, archive; text that is binary, .gz | one line, no memory
    taken
    """
    np.save(tmp_path / "good.npy", np.arange(4))
    good = (tmp_path / "good.npy").read_bytes()
    huge = good.replace(b"(4,), }", b"(1000000000000,), }").replace(b" " * 12, b"", 1)
    assert huge != good and len(huge) == len(good)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a.npy", good)
    files = {
        "huge.npy": huge,
        "empty.npy": b"",
        "cut.npy": good[:-1],
        "head.npy": good[:20],
        "archive.npy": (tmp_path / "zip").read_bytes(),
    }
    files |= {
        "binary.txt": bytes(range(256)),
        "words.txt": b"one\ntwo\n",
        "big.txt": b"9" * 400,
        "text.gz": b"1\n",
        "empty.txt": b"",
    }
    fill(tmp_path, files)
    np.save(tmp_path / "fields.npy", np.zeros(3, [("a", "i8"), ("b", "i8")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in [*files, "fields.npy", "none.npy"]:
            if name != "text.gz":
                assert name in refusal(lambda name=name: load_indices(tmp_path / name, 9))  # type: ignore[misc]
    assert load_indices(tmp_path / "text.gz", 9).tolist() == [1], "read as the text that it is, not unpacked"
    assert load_indices(tmp_path / "good.npy", 9).tolist() == [0, 1, 2, 3]


def test_F15_a_directory_replaced_under_its_run(
    pretrain_run: Pretrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """F15 | the run's directory is renamed in a step, and another run's is put in its place; the images move
    before the resume | exit code 3, one line, nothing written into the other's; by the new names
    bit-identical
    """
    source, out, other = tmp_path / "in", tmp_path / "run", tmp_path / "moved"
    for i, content in enumerate(striped_images(24)[0]):
        fill(source, {f"{i:02}.png": content})
    reference = pretrain_run("reference", f"data.source={source}", "epochs=3", "prune.anneal_fraction=0")

    def replace() -> None:
        out.rename(other)
        fill(out, {"config.yaml": b"another", ".lock": b"another", "metrics.jsonl": b"another"})

    with monkeypatch.context() as patch:
        Interrupted(patch, 6, replace)
        assert (
            pretrain.main(
                ["--config", yaml_of(tmp_path, reference), f"out={out}", "checkpoint.every_steps=1"]
            )
            == 3
        )
    assert "another is in its place" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(
        ("config.yaml", ".lock", "metrics.jsonl"), b"another"
    )
    source.rename(tmp_path / "elsewhere")
    assert pretrain.main(["--resume", str(other), f"data.source={tmp_path / 'elsewhere'}"]) == 0
    assert encoder_hash(other) == encoder_hash(reference)
    (other / "pruning" / "samples.parquet").unlink()
    shutil.rmtree(other / "encoder")
    assert pretrain.main(["--resume", str(other)]) == 0
    assert (
        encoder_hash(other) == encoder_hash(reference) and (other / "pruning" / "samples.parquet").is_file()
    )
