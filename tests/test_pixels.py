"""What the decoder makes of pixels, against other decoders and arithmetic; what it refuses, and how much work
it may take.
"""

import inspect
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from ssl_emp.commands import evaluate, pretrain
from ssl_emp.config import DataConfig
from ssl_emp.data import decode as decoder
from ssl_emp.data.decode import FORMATS, MAX_PIXELS, decode, pillow_limits
from ssl_emp.data.images import load_images
from ssl_emp.errors import UserError


def encoded(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


# --- data.max_pixels


def many_and_one_large(root: Path, side: int) -> Path:
    root.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 50, 0)).save(root / f"{number:02d}.png")
    Image.new("1", (side, side), 1).save(root / "large.png")
    return root


def test_max_pixels_is_a_key_of_pretraining(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = many_and_one_large(tmp_path / "in", 300)
    (tmp_path / "c.yaml").write_text("monitor: {tensorboard: false}\n")
    words = [
        "--config",
        str(tmp_path / "c.yaml"),
        f"data.source={root}",
        f"out={tmp_path / 'out'}",
        "data.image_size=16",
        "model.width=8",
        "batch_size=4",
        "epochs=1",
        "--dry-run",
    ]
    for limit, left_out in ((89_999, True), (90_000, False)):
        assert pretrain.main([*words, f"data.max_pixels={limit}"]) == 0
        said = capfd.readouterr()
        assert ("left out: large.png (more pixels than max_pixels)" in said.out + said.err) == left_out


def test_max_pixels_is_a_key_of_evaluation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            many_and_one_large(tmp_path / split / label / "deeper", 300)
    words = [
        "pixels",
        "knn",
        f"data.source={tmp_path}",
        "data.image_size=16",
        "knn.num_neighbors=1",
        "cache_dir=null",
    ]
    assert evaluate.main([*words, "data.max_pixels=89999"]) == 0
    assert "2 unreadable images left out of the train split" in capfd.readouterr().err
    assert evaluate.main(words) == 0
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [0, -1, 10**11, 1.5, "many", True])
def test_max_pixels_has_bounds(value: Any) -> None:
    with pytest.raises(ValueError, match="max_pixels"):
        DataConfig(max_pixels=value)


def test_the_default_is_one_number() -> None:
    assert (
        DataConfig().max_pixels
        == MAX_PIXELS
        == inspect.signature(load_images).parameters["max_pixels"].default
    )


def test_the_limit_governs_alone_on_both_sides_of_pillows_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's limit brought down to 1,000 pixels: where it had a say, 3,000 would be an error and 1,500 a
    warning.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (
        ("a.png", (30, 100)),
        ("b.gif", (15, 100)),
        ("c.tif", (50, 60)),
        ("d.webp", (30, 100)),
        ("e.jpg", (50, 60)),
    ):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images(str(tmp_path), image_size=8, max_pixels=3000).skipped == []
        got = load_images(str(tmp_path), image_size=8, max_pixels=2999)
    assert got.names == ["b.gif"] and {reason for _, reason in got.skipped} == {"more pixels than max_pixels"}
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_another_limit_is_another_file_in_the_cache(tmp_path: Path) -> None:
    root = many_and_one_large(tmp_path / "in", 300)
    for store in ("raw", "encoded"):
        for limit, count in ((100, 0), (90_000, 13), (89_999, 12), (90_000, 13)):
            if not count:
                with pytest.raises(UserError, match="more pixels than max_pixels"):
                    load_images(
                        str(root),
                        store=store,
                        image_size=8,
                        max_pixels=limit,
                        cache_dir=str(tmp_path / store),
                    )
                continue
            got = load_images(
                str(root), store=store, image_size=8, max_pixels=limit, cache_dir=str(tmp_path / store)
            )
            assert len(got.names) == count == len(got.pixels)


# --- JPEG: reduced while it is decoded, against a full decode by torchvision


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 noise with the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    waves = [
        np.fft.irfft2(np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**1.1, s=(height, width))
        for _ in range(3)
    ]
    pixels = np.stack(waves, -1)
    return (128 + pixels / max(pixels.std(), 1e-9) * 50).clip(0, 255).astype(np.uint8)


# what a viewer shows of the pixels stored in each EXIF orientation
SHOWN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def full_decode(content: bytes, size: int, orientation: int) -> np.ndarray:
    """(S, S, 3), by torchvision and numpy, then one resize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's own of its decoders
        pixels = (
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            .permute(1, 2, 0)
            .numpy()
        )
    whole = Image.fromarray(np.ascontiguousarray(SHOWN[orientation](pixels)))
    return np.asarray(ImageOps.fit(whole, (size, size), Image.Resampling.BICUBIC)).astype(float)


JPEGS: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"subsampling": 1}),
    ("RGB", {"subsampling": 2}),
    ("RGB", {"keep_rgb": True}),
    ("L", {}),
    ("CMYK", {"progressive": True}),
]


@pytest.mark.parametrize(
    ("height", "width"), [(65, 65), (127, 131), (257, 259), (401, 805), (899, 97), (515, 513)]
)
def test_a_reduced_jpeg_shows_all_of_the_image_and_no_more(height: int, width: int) -> None:
    pixels = photo(height, width)
    for number, (mode, options) in enumerate(JPEGS):
        picture = Image.fromarray(pixels).convert(mode)
        for orientation in SHOWN if number == 0 else [1 + number]:
            exif = Image.Exif()
            exif[0x0112] = orientation
            content = encoded(picture, "JPEG", quality=92, exif=exif, **options)
            for size in (16, 31, 64):
                seen = decode(content, size, 10**7).transpose(1, 2, 0)
                error = np.abs(seen - full_decode(content, size, orientation))
                assert error.mean() < 2, (mode, options, orientation, size)  # without the box: 4 to 8
                # also at the edges, where the parts lie that reach beyond the image
                assert max(error[0].mean(), error[-1].mean(), error[:, 0].mean(), error[:, -1].mean()) < 4


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 9), (9, 1), (7, 7), (31, 97), (97, 31), (64, 64), (33, 600), (600, 33)]
)
def test_a_jpeg_decoded_in_full_is_the_other_librarys_to_the_bit(height: int, width: int) -> None:
    pixels = photo(height, width)
    for mode, options in JPEGS:
        for orientation in SHOWN:
            exif = Image.Exif()
            exif[0x0112] = orientation
            content = encoded(Image.fromarray(pixels).convert(mode), "JPEG", exif=exif, **options)
            for size in (max(1, min(height, width) // 3), 64):
                assert np.array_equal(
                    decode(content, size, 10**6).transpose(1, 2, 0), full_decode(content, size, orientation)
                )


def test_the_orientation_that_only_xmp_names_is_applied() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded(Image.fromarray(photo(300, 200)), "JPEG", xmp=xmp)
    assert np.abs(decode(content, 32, 10**6).transpose(1, 2, 0) - full_decode(content, 32, 6)).mean() < 2


# --- TIFF and PNG: files written by hand from known pixels


def tiff(
    pixels: np.ndarray,
    photometric: int,
    *,
    planar: bool = False,
    order: str = "<",
    bits: int | None = None,
    sample_format: int = 1,
    extra: tuple[int, ...] = (),
    deflate: bool = False,
    rows: int | None = None,
    tags: dict[int, tuple[str, list[int]]] | None = None,
) -> bytes:
    """pixels (H, W) or (H, W, C) as they shall lie in the file; `tags` over what is written by itself:
    {number: (kind, values)}.
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    planes = [pixels[..., channel] for channel in range(channels)] if planar and channels > 1 else [pixels]
    rows = rows or height
    kind = pixels.dtype.newbyteorder(">" if order == ">" else "<")
    strips = [
        np.ascontiguousarray(plane[at : at + rows]).astype(kind).tobytes()
        for plane in planes
        for at in range(0, height, rows)
    ]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    entries: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits or 8 * pixels.dtype.itemsize] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [channels]),
        278: ("I", [rows]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [1 + planar]),
        339: ("H", [sample_format] * channels),
        **({338: ("H", list(extra))} if extra else {}),
        **(tags or {}),
    }

    def directory() -> bytes:
        table, values = struct.pack(order + "H", len(entries)), b""
        after = 8 + 2 + 12 * len(entries) + 4
        for number, (form, numbers) in sorted(entries.items()):
            raw = struct.pack(f"{order}{len(numbers)}{form}", *numbers)
            table += struct.pack(order + "HHI", number, {"B": 1, "H": 3, "I": 4}[form], len(numbers))
            table += raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "I", after + len(values))
            values += raw + raw[:1] * (len(raw) % 2) if len(raw) > 4 else b""
        return table + struct.pack(order + "I", 0) + values

    starts = 8 + len(directory()) + np.cumsum([0, *map(len, strips[:-1])])
    entries[273] = ("I", starts.tolist())
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(order + "I", 8)
        + directory()
        + b"".join(strips)
    )


SIDE = 24
DOWN, ACROSS = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
GREY = 0.7 * ACROSS + 0.3 * DOWN  # (S, S) in [0, 1]
COLOUR = np.stack([ACROSS, DOWN, 1 - ACROSS], -1)  # (S, S, 3)
HALF_CLEAR = np.full((SIDE, SIDE, 1), 0.5)


def whole_numbers(values: np.ndarray, bits: int) -> np.ndarray:
    return (
        (values * (2**bits - 1))
        .round()
        .astype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)
    )


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """(S, S) numbers below 2**bits -> (S, bytes a row)."""
    return np.packbits(
        ((values[..., None].astype(int) >> (bits - 1 - np.arange(bits))) & 1).reshape(len(values), -1), axis=1
    )


def reversed_bits(rows: np.ndarray) -> np.ndarray:
    return np.packbits(np.unpackbits(rows.reshape(len(rows), -1), axis=1).reshape(-1, 8)[:, ::-1]).reshape(
        rows.shape
    )


def tiffs(order: str, deflate: bool, rows: int) -> dict[str, tuple[bytes, np.ndarray | None]]:
    """name -> (content, pixels in [0, 1], or None where it has to be refused)."""
    given: dict[str, Any] = {"order": order, "deflate": deflate, "rows": rows}
    made: dict[str, tuple[bytes, np.ndarray | None]] = {}
    width = {256: ("I", [SIDE])}
    for bits in (8, 16):
        premultiplied = np.concatenate([COLOUR * HALF_CLEAR, HALF_CLEAR], -1)
        made |= {
            f"grey {bits}": (tiff(whole_numbers(GREY, bits), 1, **given), GREY),
            f"white is zero {bits}": (
                tiff(whole_numbers(1 - GREY, bits), 0, **given),
                None if (order, bits) == (">", 16) else GREY,
            ),
            f"rgb {bits}": (tiff(whole_numbers(COLOUR, bits), 2, **given), COLOUR),
            f"planar rgb {bits}": (
                tiff(whole_numbers(COLOUR, bits), 2, planar=True, **given),
                COLOUR if bits == 8 else None,
            ),
            f"rgba {bits}": (
                tiff(whole_numbers(np.concatenate([COLOUR, HALF_CLEAR], -1), bits), 2, extra=(2,), **given),
                COLOUR / 2 + 0.5,
            ),
            f"premultiplied {bits}": (
                tiff(whole_numbers(premultiplied, bits), 2, extra=(1,), **given),
                COLOUR / 2 + 0.5,
            ),
            f"planar premultiplied {bits}": (
                tiff(whole_numbers(premultiplied, bits), 2, extra=(1,), planar=True, **given),
                None,
            ),
            f"rgb and more {bits}": (
                tiff(whole_numbers(premultiplied, bits), 2, extra=(0,), **given),
                COLOUR * HALF_CLEAR,
            ),
            f"cmyk {bits}": (
                tiff(whole_numbers(np.concatenate([1 - COLOUR, 0 * HALF_CLEAR], -1), bits), 5, **given),
                COLOUR,
            ),
        }
    for bits in (1, 2, 4):
        numbers = whole_numbers(GREY, bits)
        made[f"grey {bits}"] = (
            tiff(packed(numbers, bits), 1, bits=bits, tags=width, **given),
            numbers / (2**bits - 1),
        )
        made[f"white is zero {bits}"] = (
            tiff(packed(2**bits - 1 - numbers, bits), 0, bits=bits, tags=width, **given),
            numbers / (2**bits - 1),
        )
    colours = np.random.default_rng(0).integers(0, 65536, (3, 256))
    indices = whole_numbers(GREY, 8)
    palette = {320: ("H", colours.flatten().tolist())}
    made |= {
        "12 bits": (
            tiff(packed(whole_numbers(GREY, 12), 12), 1, bits=12, tags=width, **given),
            GREY if order == "<" else None,
        ),
        "palette": (
            tiff(indices, 3, tags=palette, **given),
            (colours[:, indices] // 256 / 255).transpose(1, 2, 0),
        ),
        "signed 8": (tiff((indices.astype(int) - 128).astype(np.int8), 1, sample_format=2, **given), None),
        "signed 16": (tiff(whole_numbers(GREY, 15).astype(np.int16), 1, sample_format=2, **given), None),
        "32": (tiff(whole_numbers(GREY, 32), 1, **given), None),
        "float": (tiff(GREY.astype(np.float32), 1, sample_format=3, **given), None),
        "double": (tiff(GREY, 1, sample_format=3, **given), None),
        "float rgb": (tiff(COLOUR.astype(np.float32), 2, sample_format=3, **given), None),
        "grey and alpha 16": (
            tiff(whole_numbers(np.stack([GREY, GREY], -1), 16), 1, extra=(2,), **given),
            None,
        ),
    }
    if not deflate:  # whose own bytes would be reversed
        numbers = whole_numbers(COLOUR, 8)
        made["reversed rgb"] = (tiff(reversed_bits(numbers), 2, tags={266: ("H", [2])}, **given), COLOUR)
        made["planar reversed rgb"] = (
            tiff(reversed_bits(numbers), 2, planar=True, tags={266: ("H", [2])}, **given),
            None,
        )
        made["subsampled"] = (tiff(numbers, 6, **given), None)
    return made


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("rows", [SIDE, 5, 1])
def test_a_tiff_is_right_or_refused(order: str, deflate: bool, rows: int) -> None:
    for name, (content, expected) in tiffs(order, deflate, rows).items():
        if expected is None:
            with pytest.raises(Exception, match=r"[a-z]") as caught:
                decode(content, SIDE, 10**6)
            assert "\n" not in decoder.reason(caught.value), name
            continue
        seen = decode(content, SIDE, 10**6).transpose(1, 2, 0)
        assert np.abs(seen - 255 * (expected if expected.ndim == 3 else expected[..., None])).max() < 2, name


def test_a_tiff_shows_its_first_page_turned_as_it_says() -> None:
    for orientation, shown in SHOWN.items():
        for bits in (8, 16):
            content = tiff(whole_numbers(COLOUR, bits), 2, tags={274: ("H", [orientation])})
            assert np.abs(decode(content, SIDE, 10**6).transpose(1, 2, 0) - 255 * shown(COLOUR)).max() < 2
        grey = tiff(whole_numbers(1 - GREY, 16), 0, tags={274: ("H", [orientation])})
        assert np.abs(decode(grey, SIDE, 10**6)[0] - 255 * shown(GREY[..., None])[..., 0]).max() < 2
    pages = [Image.fromarray(np.full((SIDE, SIDE), value, np.uint16)) for value in (0x4040, 0x8080)]
    assert (
        decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), SIDE, 10**6).max() == 0x40
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, colour_type: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """pixels (H, W) or (H, W, C), chunks between the header and the pixels."""
    height, width = pixels.shape[:2]
    rows = (
        packed(pixels, bits)
        if bits < 8
        else pixels.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    )
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*part) for part in chunks)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def test_a_png_is_right_or_refused() -> None:
    for bits in (8, 16):
        alpha = np.concatenate([COLOUR, HALF_CLEAR], -1)
        for expected, pixels, colour_type in (
            (GREY, GREY, 0),
            (COLOUR, COLOUR, 2),
            (GREY / 2 + 0.5, np.stack([GREY, HALF_CLEAR[..., 0]], -1), 4),
            (COLOUR / 2 + 0.5, alpha, 6),
        ):
            seen = decode(png(whole_numbers(pixels, bits), colour_type, bits), SIDE, 10**6).transpose(1, 2, 0)
            assert np.abs(seen - 255 * (expected if expected.ndim == 3 else expected[..., None])).max() < 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_clear_grey_of_a_png_is_meant_in_its_own_bits(bits: int) -> None:
    numbers = whole_numbers(GREY, bits)
    clear = int(numbers[3, 5])
    content = png(numbers, 0, bits, (b"tRNS", struct.pack(">H", clear)))
    expected = np.where(numbers == clear, 255, numbers / (2**bits - 1) * 255)
    assert np.abs(decode(content, SIDE, 10**6)[0] - expected).max() < 1


def test_the_clear_colour_of_a_png_is_met_or_refused() -> None:
    numbers = whole_numbers(COLOUR, 8)
    clear = struct.pack(">HHH", *numbers[3, 5].tolist())
    expected = np.where((numbers == numbers[3, 5]).all(-1, keepdims=True), 255, numbers)
    assert np.array_equal(
        decode(png(numbers, 2, 8, (b"tRNS", clear)), SIDE, 10**6).transpose(1, 2, 0), expected
    )
    with pytest.raises(ValueError, match="16-bit colour"):
        decode(png(whole_numbers(COLOUR, 16), 2, 16, (b"tRNS", clear)), SIDE, 10**6)


@pytest.mark.parametrize("largest", [1, 15, 100, 254, 256, 1023, 4095, 65534, 65535])
def test_a_pnm_with_any_largest_value_is_as_pillow_reads_it(largest: int) -> None:
    kind = ">u2" if largest > 255 else "u1"
    for magic, values in ((b"P5", GREY), (b"P6", COLOUR)):
        numbers = (values * largest).round().astype(kind)
        content = magic + b" # a remark\n%d %d\n%d\n" % (SIDE, SIDE, largest) + numbers.tobytes()
        with Image.open(io.BytesIO(content)) as image:
            slow = np.asarray(image)
        expected = (slow.astype(np.int64) * 255 + 32767) // 65535 if image.mode == "I" else slow
        seen = decode(content, SIDE, 10**6).transpose(1, 2, 0)
        assert np.array_equal(seen, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, -1))
        assert np.abs(seen - 255 * numbers.astype(float).reshape(SIDE, SIDE, -1) / largest).max() <= 1
        text = magic.replace(b"5", b"2").replace(b"6", b"3") + b"\n%d %d %d\n" % (SIDE, SIDE, largest)
        assert np.array_equal(
            decode(text + b" ".join(b"%d" % number for number in numbers.flatten()), SIDE, 10**6).transpose(
                1, 2, 0
            ),
            seen,
        )
        with pytest.raises(OSError, match="truncated"):
            decode(content[:-1], SIDE, 10**6) if largest != 255 else None


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow was built without it")
def test_content_decides_whatever_the_name_says(tmp_path: Path) -> None:
    for fmt, name in (
        ("AVIF", "0.jpg"),
        ("WEBP", "1.png"),
        ("JPEG", "2.gif"),
        ("TIFF", "3.bmp"),
        ("PNG", "4.tif"),
        ("GIF", "5.webp"),
    ):
        Image.new("RGB", (16, 16), (200, 30, 40)).save(tmp_path / name, fmt)
    got = load_images(str(tmp_path))
    assert (
        got.skipped == []
        and (got.pixels[:].float().mean((2, 3)) - torch.tensor([200.0, 30, 40])).abs().max() < 4
    )


# --- 16 bits of which few are used


def of_twelve_bits() -> dict[str, bytes]:
    return {
        "grey.tif": tiff(whole_numbers(GREY * 4095 / 65535, 16), 1),
        "grey_big.tif": tiff(whole_numbers(GREY * 4095 / 65535, 16), 1, order=">", deflate=True),
        "white_is_zero.tif": tiff(whole_numbers(GREY * 4095 / 65535, 16), 0),
        "colour.tif": tiff(whole_numbers(COLOUR * 4095 / 65535, 16), 2),
        "grey.png": png(whole_numbers(GREY * 4095 / 65535, 16), 0, 16),
        "colour.png": png(whole_numbers(COLOUR * 4095 / 65535, 16), 2, 16),
        "grey.pgm": b"P5 24 24 65535\n" + whole_numbers(GREY * 4095 / 65535, 16).astype(">u2").tobytes(),
        "colour.ppm": b"P6 24 24 65535\n" + whole_numbers(COLOUR * 4095 / 65535, 16).astype(">u2").tobytes(),
    }


def of_all_bits() -> dict[str, bytes]:
    return {
        "declared.tif": tiff(packed(whole_numbers(GREY, 12), 12), 1, bits=12, tags={256: ("I", [SIDE])}),
        "declared.pgm": b"P5 24 24 4095\n" + whole_numbers(GREY, 12).astype(">u2").tobytes(),
        "full.png": png(whole_numbers(GREY, 16), 0, 16),
        "full.tif": tiff(whole_numbers(COLOUR, 16), 2),
        "dark_of_8_bits.png": encoded(Image.new("RGB", (SIDE, SIDE), (3, 2, 1))),
    }


@pytest.mark.parametrize("store", ["memory", "raw", "encoded"])
def test_dim_images_are_named_and_left_as_they_are(tmp_path: Path, store: str) -> None:
    (tmp_path / "in").mkdir()
    for name, content in {
        **of_twelve_bits(),
        **of_all_bits(),
        "bad.png": b"",
        "cut.tif": tiff(whole_numbers(GREY, 16), 1)[:200],
    }.items():
        (tmp_path / "in" / name).write_bytes(content)
    for _ in range(2):  # built, and found again
        got = load_images(
            str(tmp_path / "in"), store=store, cache_dir=str(tmp_path / "cache"), image_size=SIDE
        )
        assert got.dim == sorted(of_twelve_bits()) and [name for name, _ in got.skipped] == [
            "bad.png",
            "cut.tif",
        ]
        assert got.dim_line.startswith(
            "8 images use less than a tenth of the 16-bit range (microscopes, X-ray): colour.png first"
        )
        assert got.pixels[got.names.index("grey.png")].max() <= 16
        assert got.pixels[got.names.index("declared.tif")].max() > 240


def test_a_killed_build_of_jpegs_still_knows_what_was_dim(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in of_twelve_bits().items():
        for number in range(8):
            (tmp_path / "in" / f"{number}_{name}").write_bytes(content)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"store": "encoded", "cache_dir": str(tmp_path / "cache"), "image_size": SIDE}
    with pytest.raises(KeyboardInterrupt):
        load_images(str(tmp_path / "in"), progress=interrupt, **options)
    got = load_images(str(tmp_path / "in"), **options)
    assert got.dim == got.names and len(got.dim) == 64


def test_both_commands_say_that_images_are_dim(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, (name, content) in enumerate(of_all_bits().items()):
        for split, label in (("train", number % 2), ("test", number % 2), ("train", 2)):
            folder = tmp_path / "in" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}_{name}").write_bytes(content)
    (tmp_path / "in/train/0/dim\n.tif").write_bytes(of_twelve_bits()["grey.tif"])
    (tmp_path / "c.yaml").write_text(
        "model: {width: 8}\nbatch_size: 4\nepochs: 1\nmonitor: {tensorboard: false}\n"
    )
    words = [f"data.source={tmp_path / 'in'}", "data.image_size=24"]
    assert (
        pretrain.main(["--config", str(tmp_path / "c.yaml"), f"out={tmp_path / 'out'}", "--dry-run", *words])
        == 0
    )
    said = capfd.readouterr()
    assert (
        "1 image uses less than a tenth of the 16-bit range (microscopes, X-ray): train/0/dim\\n.tif first"
        in said.out + said.err
    )
    assert evaluate.main(["pixels", "knn", "knn.num_neighbors=1", "cache_dir=null", *words]) == 0
    assert "the train split of " in (said := capfd.readouterr()).err and "dim\\n.tif first" in said.err


# --- how much work a file may make


def with_scans(content: bytes, more: int) -> bytes:
    """A progressive JPEG with its last scan so many times more."""
    places = [place for place in range(len(content) - 1) if content[place : place + 2] == b"\xff\xda"]
    return content[:-2] + content[places[-1] : -2] * more + content[-2:]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scans_are_counted_to_the_end_of_the_first_image(mode: str) -> None:
    plain = encoded(Image.fromarray(photo(40, 40)).convert(mode), "JPEG", progressive=True)
    scans = decoder.count_scans(plain)
    assert scans == {"L": 6, "RGB": 10, "CMYK": 18}[mode]
    for more in (1, 7, 200):
        assert decoder.count_scans(with_scans(plain, more)) == scans + more
    exif = Image.Exif()
    exif[0x010E] = b"\xff\xda\xff\xd9" * 50  # as a thumbnail would have them
    told = encoded(
        Image.fromarray(photo(40, 40)).convert(mode),
        "JPEG",
        progressive=True,
        exif=exif,
        comment=b"\xff\xda" * 500,
    )
    # what follows is another image
    assert decoder.count_scans(told) == scans and decoder.count_scans(told + plain) == scans
    assert decoder.count_scans(encoded(Image.fromarray(photo(40, 40)), "JPEG")) == 1


def test_a_jpeg_of_many_scans_is_left_out_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is scans times pixels: 24 at max_pixels, up to a hundred below it."""
    plain = encoded(Image.fromarray(photo(100, 100)), "JPEG", progressive=True)
    scans = decoder.count_scans(plain)
    for name, more in (
        ("as_saved", 0),
        ("24", 24 - scans),
        ("25", 25 - scans),
        ("hundred", 100 - scans),
        ("101", 101 - scans),
    ):
        (tmp_path / f"{name}.jpg").write_bytes(with_scans(plain, more))
    (tmp_path / "told.jpg").write_bytes(
        encoded(Image.fromarray(photo(100, 100)), "JPEG", comment=b"\xff\xda" * 5000)
    )

    def left_out(max_pixels: int, **options: Any) -> list[str]:
        return [
            name
            for name, _ in load_images(str(tmp_path), image_size=8, max_pixels=max_pixels, **options).skipped
        ]

    assert left_out(10_000) == ["101.jpg", "25.jpg", "hundred.jpg"]  # as many pixels as may be
    assert left_out(40_000) == ["101.jpg", "hundred.jpg"]
    assert left_out(10**9) == ["101.jpg"]
    assert left_out(10**9, store="encoded", cache_dir=str(tmp_path / "cache")) == ["101.jpg"]
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded on the way to the refusal
    with pytest.raises(ValueError, match="101 scans, at most 100"):
        decode((tmp_path / "101.jpg").read_bytes(), 8, 10**9)


def test_sequential_jpegs_of_many_scans_are_bounded_too() -> None:
    """A scan for each channel, as old encoders wrote them, then again and again."""
    head, scan = encoded(Image.fromarray(photo(64, 64)).convert("L"), "JPEG").split(b"\xff\xda", 1)
    with pytest.raises(ValueError, match="1,001 scans"):
        decode(head + (b"\xff\xda" + scan[:-2]) * 1001 + b"\xff\xd9", 8, 10**9)


def test_jpegs_within_a_tiff_are_bounded_too() -> None:
    grey = photo(40, 40)[..., 0]
    jpeg = encoded(Image.fromarray(grey), "JPEG", progressive=True, quality=95)
    form = {256: ("I", [40]), 257: ("I", [40]), 259: ("H", [7])}
    for strips, more, is_right in ((1, 0, True), (2, 0, True), (1, 150, False), (2, 100, False)):
        part = with_scans(
            encoded(Image.fromarray(grey[: 40 // strips]), "JPEG", progressive=True, quality=95)
            if strips > 1
            else jpeg,
            more,
        )
        content = np.frombuffer(part, np.uint8)
        rows = {278: ("I", [40 // strips]), 279: ("I", [len(part)] * strips)}
        made = tiff(np.stack([content] * strips), 1, rows=1, tags=form | rows)
        if is_right:
            seen = decode(made, 40, 10**6)[0].astype(int)
            assert np.abs(seen[: 40 // strips] - grey[: 40 // strips]).mean() < 4
        else:
            with pytest.raises(ValueError, match="scans"):
                decode(made, 40, 10**6)


class Counted(decoder._Meter):
    """How often a file was read, and how many bytes, by those that were opened last."""

    seen: list["Counted"] = []

    def __init__(self, size: int, is_jpeg: bool) -> None:
        super().__init__(size, is_jpeg)
        self.num_reads, self.num_bytes = 0, 0
        Counted.seen.append(self)

    def count(self, num_bytes: int) -> None:
        self.num_reads += 1
        self.num_bytes += num_bytes
        super().count(num_bytes)


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def many_of_everything() -> dict[str, bytes]:
    """Files of up to 18 MB that are all headers, chunks, tags or frames."""
    jpeg, small = encoded(Image.new("RGB", (16, 16)), "JPEG"), encoded(Image.new("RGB", (16, 16)))
    tags = {number: ("B", [1]) for number in range(40_000, 60_000)}
    return {
        "comments.jpg": jpeg[:2] + segment(0xFE, b"") * 200_000 + jpeg[2:],
        "exif.jpg": jpeg[:2] + segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 300 + jpeg[2:],
        "junk.jpg": jpeg[:20] + bytes(1_000_000),
        "chunks.png": small[:33] + chunk(b"teSt", b"") * 50_000 + small[33:],
        "text.png": small[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 9)) + small[33:],
        "profile.png": small[:33]
        + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))
        + small[33:],
        "tags.tif": tiff(np.zeros((8, 8), np.uint8), 1, tags=tags),
        "strips.tif": tiff(np.zeros((8, 8), np.uint8), 1, tags={324: ("I", [8] * 400_000)}),
        "remark.ppm": b"P5 #" + b"x" * 1_000_000 + b"\n2 2 255\n....",
        "blocks.gif": b"GIF89a\x10\0\x10\0\0\0\0!\xfe" + b"\1x" * 300_000 + b"\0;",
    }


def test_text_is_no_way_to_write_large_images() -> None:
    for head, most in (
        (b"P1 4096 4097\n", "16,777,216"),
        (b"P2 2048 2049 255\n", "4,194,304"),
        (b"P3 2000 700 65535\n", "4,194,304"),
    ):
        with pytest.raises(ValueError, match=f"written as text, at most {most}"):
            decode(head + b"1 " * 100, 8, 10**8)
    bits = b"P1 24 24\n" + b" ".join(b"%d" % bit for bit in (1 - whole_numbers(GREY, 1)).flatten())
    assert np.array_equal(decode(bits, SIDE, 10**6)[0], 255 * whole_numbers(GREY, 1))


def test_headers_chunks_and_tags_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_Meter", Counted)
    monkeypatch.setattr(decoder, "UNMETERED", 0)
    for name, content in many_of_everything().items():
        Counted.seen.clear()
        with pillow_limits(MAX_PIXELS):
            try:
                decode(content, 8, MAX_PIXELS)
            except Exception as exc:  # noqa: BLE001 - that it is refused is no must, that it ends soon is
                assert "\n" not in decoder.reason(exc) and decoder.reason(exc), name
        for meter in Counted.seen:
            assert meter.num_reads <= 30_000 + len(content) // 100, name
            assert meter.num_bytes <= 9 * len(content) + (1 << 21), name
            assert name != "exif.jpg" or meter.num_bytes < (1 << 24) + 70_000


def test_of_thousands_of_frames_and_pages_only_the_first_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_Meter", Counted)
    monkeypatch.setattr(decoder, "UNMETERED", 0)
    frames = [Image.new("L", (16, 16), value % 251) for value in range(1500)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    apng = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:200])
    webp = encoded(frames[0].convert("RGB"), "WEBP", save_all=True, lossless=True, append_images=frames[1:50])
    page = tiff(np.full((16, 16), 9, np.uint8), 1)
    # where the place of the next page stands: this page again, for ever
    next_page = 8 + 2 + 12 * struct.unpack("<H", page[8:10])[0]
    endless = page[:next_page] + struct.pack("<I", 8) + page[next_page + 4 :]
    for content, first in ((gif, 0), (apng, 0), (webp, 0), (endless, 9)):
        Counted.seen.clear()
        assert (decode(content, 16, 10**6) == first).all()
        assert Counted.seen[0].num_reads < 100 and (content is webp or Counted.seen[0].num_bytes < 200_000)


def test_honest_files_of_many_parts_are_read_all_the_same() -> None:
    """One row a strip, text of editors, profiles, a page of tags, thumbnails: within the bounds with room to
    spare.
    """
    tall = np.random.default_rng(0).integers(0, 256, (3000, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x927C] = bytes(40_000)
    text = (b"tEXt", b"workflow\0" + b"{}" * 100_000)
    honest = {
        "a row a strip": tiff(tall, 2, rows=1),
        "a row a strip, planar": tiff(tall, 2, rows=1, planar=True),
        "a row a strip, packed": tiff(tall, 2, rows=1, deflate=True),
        "text": png(whole_numbers(COLOUR, 8), 2, 8, text, *[(b"tEXt", b"key\0value")] * 500),
        "exif": encoded(
            Image.fromarray(tall), "JPEG", exif=exif, comment=b"x" * 60_000, icc_profile=bytes(500_000)
        ),
    }
    for name, content in honest.items():
        assert decode(content, 8, 10**6).shape == (3, 8, 8), name


def test_limits_of_threads_do_not_outlast_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with pillow_limits(10):
            entered.set()
            leave.wait(30)

    filters = list(warnings.filters)
    with pillow_limits(20):
        thread = threading.Thread(target=hold)
        thread.start()
        assert entered.wait(30) and Image.MAX_IMAGE_PIXELS == 20
    assert Image.MAX_IMAGE_PIXELS == 10  # the other thread is still at work
    leave.set()
    thread.join()
    assert Image.MAX_IMAGE_PIXELS == 12_345 and list(warnings.filters) == filters


# --- a cache that is only readable


@pytest.mark.parametrize("store", ["raw", "encoded"])
def test_a_finished_cache_is_opened_for_reading_only(tmp_path: Path, store: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        Image.fromarray(photo(16, 16, number)).save(tmp_path / "in" / f"{number:02d}.png")
    options: dict[str, Any] = {"store": store, "cache_dir": str(tmp_path / "cache")}
    first = load_images(str(tmp_path / "in"), **options)
    before = {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "cache").iterdir()
    }
    again = load_images(str(tmp_path / "in"), **options)
    assert torch.equal(again.pixels[:], first.pixels[:])
    assert before == {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "cache").iterdir()
    }
    content = again.pixels if isinstance(again.pixels, torch.Tensor) else again.pixels.data
    mapped = maps_of(content.data_ptr())
    # shared: no copy, and not to be written to
    assert mapped.startswith("r--s") and str(tmp_path / "cache") in mapped


def maps_of(address: int) -> str:
    """How this process has mapped an address: `r--s ... path`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rest = line.split(" ", 1)
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= address < high:
            return rest
    raise AssertionError("not mapped")
