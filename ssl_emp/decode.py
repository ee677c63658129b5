"""Encoded images -> RGB uint8 of one square size, in a thread a core; and back to JPEG for the encoded store."""

import functools
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

# no EPS, PSD, SVG: formats that run code or guess. AVIF where this Pillow was built with it
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
MAX_PIXELS = 90_000_000  # of an image, unless another limit is given; Pillow itself warns from 89 million on
EXIF_ORIENTATION = 0x0112
RUN = 32  # images a thread takes at a time

Encoded = str | bytes | np.ndarray | None  # path, file content, (H, W) or (H, W, 3) uint8 pixels, or a null in a table
T = TypeVar("T")


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Pillow's own bomb check (also of inner frames) at our limit, as an error; its chatter about odd files off."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def opened(encoded: Encoded, max_pixels: int) -> Iterator[Image.Image]:
    """Header read, pixels not yet decoded."""
    if encoded is None:
        raise ValueError("no bytes in this row")
    if isinstance(encoded, np.ndarray):
        yield Image.fromarray(encoded)
        return
    with open(encoded, "rb") if isinstance(encoded, str) else io.BytesIO(encoded) as stream:
        if not stream.seek(0, os.SEEK_END):
            raise ValueError("empty file")
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image


def decode(encoded: Encoded, size: int, max_pixels: int) -> np.ndarray:
    """(3, size, size) uint8. Raises whatever Pillow raises on a damaged file."""
    with opened(encoded, max_pixels) as image:
        return _fit(image, size).transpose(2, 0, 1)


def to_jpeg(encoded: Encoded, size: int, max_pixels: int, quality: int) -> bytes:
    """What `decode` gives, as a JPEG without chroma subsampling; an upright RGB JPEG of that size is taken byte for byte."""
    with opened(encoded, max_pixels) as image:
        fits = image.format == "JPEG" and image.mode == "RGB" and image.size == (size, size)
        pixels = _fit(image, size)
    if fits:
        assert isinstance(encoded, str | bytes)
        content = Path(encoded).read_bytes() if isinstance(encoded, str) else encoded
        # decoded once more, as the store will: what EXIF turns, or Pillow repairs and others do not, is encoded anew
        if np.array_equal(decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)), pixels.transpose(2, 0, 1)):
            return content
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def decode_jpeg(record: Tensor) -> np.ndarray:
    """(L,) uint8 bytes of a JPEG -> (3, H, W) uint8, a view. Raises OSError or RuntimeError on damaged bytes.

    By torchvision, else by Pillow; both use libjpeg-turbo and give the same pixels. Measured on one core, with the change of
    layout: 64 px 94 against 182 microseconds, 256 px 469 against 588; torchcodec takes as long as torchvision (89 and 471).
    """
    return _jpeg_decoder()(record)


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor], np.ndarray]:
    try:
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as torchvision_decode

        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "JPEG")
        torchvision_decode(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8))
    except (ImportError, RuntimeError):  # deprecated since torchvision 0.29, and left out of some builds
        return _decode_with_pillow
    return lambda record: torchvision_decode(record, ImageReadMode.RGB).numpy()


def _decode_with_pillow(record: Tensor) -> np.ndarray:
    with Image.open(io.BytesIO(record.numpy().tobytes()), formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _fit(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    image.draft(None, (2 * size, 2 * size))  # large JPEGs decode at 1/2, 1/4 or 1/8: several times faster; no-op for the rest
    image.load()  # in full: a header and even verify() pass for half a JPEG
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return np.asarray(ImageOps.fit(_to_rgb(image), (size, size), Image.Resampling.BICUBIC))


def _to_rgb(image: Image.Image) -> Image.Image:
    # convert() would clip: every value above 255 white. PGM, and PNG in older Pillow, hold their 16 bits in mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def map_runs(work: Callable[[int, list[Encoded]], T], images: Iterator[Encoded], count: int) -> Generator[T, None, None]:
    """Yield work(first, run) in order for the `count` images in runs; in a thread a core, as decoders release the GIL."""
    workers = min(32, cores())
    pending: deque[Future[T]] = deque()
    submitted = 0
    with ThreadPoolExecutor(workers) as pool:
        while submitted < count or pending:
            # few runs wait at a time: what is read ahead stays small beside the pixels
            while submitted < count and len(pending) < 3 * workers:
                run = list(islice(images, RUN))
                assert run, "a source yields one item a position"
                pending.append(pool.submit(work, submitted, run))
                submitted += len(run)
            yield pending.popleft().result()


def reason(exc: Exception) -> str:
    """One line for people."""
    if isinstance(exc, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(exc, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "more pixels than max_pixels"
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return (text.splitlines() or [""])[0][:200] or type(exc).__name__
