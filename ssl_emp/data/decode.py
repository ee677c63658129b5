"""Encoded images -> square RGB uint8, one thread per core; and back to JPEG for the encoded store."""

import functools
import io
import os
import re
import struct
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, features
from torch import Tensor

from linear_eval.errors import first_line

with suppress(Exception):  # an optional plugin of Pillow
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)

# AVIF and HEIC where this Pillow reads them; no EPS, PSD or SVG, whose readers run code or guess
MORE = (*(["AVIF"] if features.check("avif") else []), *(["HEIF"] if "HEIF" in Image.OPEN else []))
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *MORE)
MAX_PIXELS = 50_000_000  # default limit of an image: 200 MB in each thread that decodes
RUN = 32  # images that a thread takes at a time

# EXIF orientation -> how to turn the image upright, and whether its right and bottom edge become left and top
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}

# Limits on the work that a file may cause. Files of cameras and editors stay far below; what exceeds them was
# made to keep a decoder busy.
UNMETERED = 1 << 15  # bytes; a smaller file cannot cause much work, whatever it holds
# a file may be read FREE_READS times (each costs a microsecond of Python) and once more per READ_BYTES
FREE_READS = 20_000
READ_BYTES = 256
TIMES_READ = 8  # all bytes of a file may be read this often in total
# bytes of a JPEG before its pixels: Pillow joins the parts of EXIF in quadratic time
HEADER_BYTES = 1 << 24
# of a JPEG: a progressive one has about ten, a CMYK one 18, and each costs a pass over all pixels
MOST_SCANS = 100
SCANS_AT_MOST_PIXELS = 24  # of a JPEG with max_pixels pixels; a smaller one may have more, for the same work
MOST_STRIPS = 1 << 18  # of a TIFF
MOST_NUMBERS, MOST_BITS = 1 << 22, 1 << 24  # of a PNM written as text, which Pillow parses one by one

PLANAR, SIGNED = 2, 2  # in a TIFF's tags PlanarConfiguration and SampleFormat
TIFF_JPEG = (6, 7)  # in Compression
WHITE_IS_ZERO, YCBCR = 0, 6  # in PhotometricInterpretation
# a marker of a JPEG that is followed by a length, or the last marker
END_OF_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")

# path, file content, (H, W) or (H, W, 3) uint8 pixels, a decoded image, why there is none, a null in a table
Encoded = str | bytes | np.ndarray | Image.Image | Exception | None
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
T = TypeVar("T")


# ---- opening


class _Limits:
    """The limits in use by all threads. Pillow has one limit for the whole process."""

    lock = threading.Lock()
    active: list[int] = []
    pillows_own: int | None = None  # the limit to restore
    quiet = ExitStack()


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Raise Pillow's decompression bomb warnings at our limit, as errors; silence its other warnings.

    Several threads may be inside at a time. Pillow then uses the largest of their limits, and `opened` checks
    each image against the limit of its own thread.
    """
    with _Limits.lock:
        if not _Limits.active:
            _Limits.pillows_own = Image.MAX_IMAGE_PIXELS
            _Limits.quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        _Limits.active.append(max_pixels)
        Image.MAX_IMAGE_PIXELS = max(_Limits.active)
    try:
        yield
    finally:
        with _Limits.lock:
            _Limits.active.remove(max_pixels)
            Image.MAX_IMAGE_PIXELS = max(_Limits.active, default=_Limits.pillows_own)
            if not _Limits.active:
                _Limits.quiet.close()


class _Meter:
    """How much of a file may still be read.

    Pillow parses chunks, markers, tags and frames in Python, without a limit on their number.
    """

    def __init__(self, size: int, is_jpeg: bool) -> None:
        self.reads = FREE_READS + size // READ_BYTES
        self.bytes = TIMES_READ * size + (1 << 20)
        self.header_bytes = HEADER_BYTES if is_jpeg else self.bytes

    def count(self, num_bytes: int) -> None:
        self.reads -= 1
        self.bytes -= num_bytes
        self.header_bytes -= num_bytes
        if self.reads < 0 or self.bytes < 0 or self.header_bytes < 0:
            raise ValueError("far more headers, chunks or tags than an image of this size has")

    def start_pixels(self, num_pieces: int) -> None:
        """The header has been read. Strips are read in blocks, which may exceed them by up to a block."""
        self.reads += 2 * num_pieces
        self.bytes += ImageFile.MAXBLOCK * num_pieces
        self.header_bytes = self.bytes


class _Metered(io.BufferedIOBase):
    meter: _Meter | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if self.meter:
            self.meter.count(len(content))
        return content


class _MeteredFile(_Metered, io.BufferedReader):
    pass


class _MeteredBytes(_Metered, io.BytesIO):
    pass


@contextmanager
def opened(encoded: Encoded, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read but not its pixels; the format is found by content, not suffix."""
    if encoded is None:
        raise ValueError("no bytes in this row")
    if isinstance(encoded, Exception):
        raise encoded
    if isinstance(encoded, Image.Image):
        if encoded.width * encoded.height > max_pixels:
            raise Image.DecompressionBombError
        yield encoded
        return
    if isinstance(encoded, np.ndarray):
        yield Image.fromarray(encoded)
        return
    with _stream(encoded) as stream:
        magic = stream.read(4)
        is_tiff = magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        if is_tiff:
            _check_strips(stream)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if isinstance(stream, _MeteredFile | _MeteredBytes):
            stream.meter = _Meter(size, is_jpeg=magic.startswith(b"\xff\xd8"))
        try:
            image = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            if is_tiff:
                what = "a TIFF damaged, or with pixels of a kind that Pillow does not read"
                raise ValueError(what) from None
            raise
        with image:
            if isinstance(stream, _MeteredFile | _MeteredBytes) and stream.meter:
                stream.meter.start_pixels(len(image.tile))
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image


def _stream(encoded: str | bytes) -> io.BufferedReader | io.BytesIO:
    """A file or its content as a stream for Pillow. Large ones are metered: 40 microseconds."""
    if isinstance(encoded, bytes):
        size = len(encoded)
        stream: io.BufferedReader | io.BytesIO = (_MeteredBytes if size > UNMETERED else io.BytesIO)(encoded)
    else:
        file = open(encoded, "rb", buffering=0)  # closed with the stream
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        stream = (_MeteredFile if size > UNMETERED else io.BufferedReader)(file)
    if not size:
        stream.close()
        raise ValueError("empty file")
    return stream


def _check_strips(stream: io.BufferedReader | io.BytesIO) -> None:
    """Raise ValueError if the first page of a TIFF has too many strips or tiles; Pillow lists all."""
    stream.seek(0)
    head = stream.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = b"+" in head[2:4]
    with suppress(struct.error):  # truncated: Pillow reports it
        (offset,) = struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)
        if offset >= 2**63:
            return
        stream.seek(offset)
        (num_tags,) = struct.unpack(order + ("Q" if is_big else "H"), stream.read(8 if is_big else 2))
        entry = struct.Struct(order + ("HHQQ" if is_big else "HHII"))
        tags = stream.read(entry.size * min(num_tags, 1 << 16))
        for number, _, count, _ in entry.iter_unpack(tags[: len(tags) // entry.size * entry.size]):
            # offsets and byte counts of strips and tiles
            if number in (273, 279, 324, 325) and count > MOST_STRIPS:
                raise ValueError(f"a TIFF in {count:,} strips or tiles, at most {MOST_STRIPS:,} are read")


# ---- decoding


def decode(
    encoded: Encoded, size: int, max_pixels: int, when_dim: Callable[[], None] | None = None
) -> np.ndarray:
    """(3, size, size) uint8. Raises what Pillow raises on a damaged file.

    when_dim: called if the image has 16 bits a channel and uses less than a tenth of that range.
    """
    with opened(encoded, max_pixels) as image:
        return fit(image, size, max_pixels, when_dim).transpose(2, 0, 1)


def decode_any(image: Encoded | Image.Image, size: int, max_pixels: int) -> np.ndarray:
    """`decode`, also for an opened PIL image: from its file, if it is not decoded yet."""
    return decode(detached(image) if isinstance(image, Image.Image) else image, size, max_pixels)


def detached(image: Image.Image) -> bytes | Image.Image:
    """The file of an opened image that is not decoded yet, or the decoded image; the caller's stays as it is.

    Raises ValueError where its file was closed.
    """
    stream = getattr(image, "fp", None)
    if stream is None or not getattr(image, "tile", None):
        return image
    if image.tell():  # another frame than the first: decode a copy in full
        return image.copy()
    here = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(here)
    return bytes(content)


def to_jpeg(
    encoded: Encoded, size: int, max_pixels: int, quality: int, when_dim: Callable[[], None] | None = None
) -> bytes:
    """`decode` as a JPEG without chroma subsampling; an upright RGB JPEG of that size is copied."""
    with opened(encoded, max_pixels) as image:
        is_file = isinstance(encoded, str | bytes) and image.format == "JPEG"
        fits = is_file and image.mode == "RGB" and image.size == (size, size)
        pixels = fit(image, size, max_pixels, when_dim)
    if fits:
        assert isinstance(encoded, str | bytes)
        content = Path(encoded).read_bytes() if isinstance(encoded, str) else encoded
        # decode it as the store will: a JPEG that EXIF turns, or that only Pillow repairs, is encoded anew
        if np.array_equal(
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)), pixels.transpose(2, 0, 1)
        ):
            return content
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def decode_jpeg(record: Tensor) -> np.ndarray:
    """(L,) uint8 bytes of a JPEG -> (3, H, W) uint8, a view. Raises OSError or RuntimeError on damaged bytes.

    Uses torchvision, else Pillow; both use libjpeg-turbo and give the same pixels. On one core, with the
    change of layout, an image of 64 px takes 94 (torchvision), 182 (Pillow) or 89 (torchcodec) microseconds,
    one of 256 px 469, 588 or 471.
    """
    return _jpeg_decoder()(record)


def reader_of_jpegs() -> str:
    """torchvision, or Pillow where that has no decoder."""
    return "Pillow" if _jpeg_decoder() is _decode_with_pillow else "torchvision"


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor], np.ndarray]:
    try:
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as torchvision_decode

        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "JPEG")
        torchvision_decode(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8))
    except (ImportError, RuntimeError):  # deprecated since torchvision 0.29, missing in some builds
        return _decode_with_pillow
    return lambda record: torchvision_decode(record, ImageReadMode.RGB).numpy()


def _decode_with_pillow(record: Tensor) -> np.ndarray:
    with Image.open(io.BytesIO(record.numpy().tobytes()), formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def fit(
    image: Image.Image, size: int, max_pixels: int, when_dim: Callable[[], None] | None = None
) -> np.ndarray:
    """(size, size, 3) uint8: short side scaled to size, then a centre crop. Arguments: see `decode`."""
    _check_scans(image, max_pixels)
    # large JPEGs are decoded at 1/2, 1/4 or 1/8 size, several times faster; other images ignore draft.
    # The reduced size is rounded up, so its last column and row cover less than a pixel: the box excludes the
    # part that is not image
    least = 2 * size * _colour_spread(image)
    drafted = image.draft(None, (least, least))
    rgb, is_dim = _decode_whole(image)
    left, top, (right, bottom) = 0.0, 0.0, drafted[1][2:] if drafted else rgb.size
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in TURNS:
        method, from_right, from_below = TURNS[orientation]
        rgb = rgb.transpose(method)
        width, height = (right, bottom) if orientation < 5 else (bottom, right)
        left, top = from_right * (rgb.width - width), from_below * (rgb.height - height)
        right, bottom = left + width, top + height
    width, height = right - left, bottom - top
    side = min(width, height)
    left, top = left + (width - side) * 0.5, top + (height - side) * 0.5
    box: Box = (left, top, min(left + side, rgb.width), min(top + side, rgb.height))
    if is_dim and when_dim:
        when_dim()
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _colour_spread(image: Image.Image) -> int:
    """Pixels that share a colour in a JPEG decoded at reduced size: 1, but 2 for 4:2:2, 4 for 4:1:1.

    libjpeg reduces the chroma subsampling of both axes alike, so 4:2:0 has none left, but an axis that was
    subsampled more than the other still is.
    """
    # (component, samples across, samples down, table) of each channel
    layer = getattr(image, "layer", None)
    if not isinstance(layer, list) or not layer:
        return 1
    across, down = ([max(1, component[place]) for component in layer] for place in (1, 2))
    spread = max(across) // min(across), max(down) // min(down)
    return max(spread) // min(spread)


def _decode_whole(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as RGB, before EXIF rotation, and whether it is dim.

    Decodes all pixels: opening, and even verify(), accept a JPEG of which half is missing.
    """
    raw_mode = ""  # Pillow's name of the pixel layout in the file
    if isinstance(image, ImageFile.ImageFile) and image.tile:
        codec, _, offset, args = image.tile[0]
        raw_mode = args if isinstance(args, str) else str(args[0]) if args else ""
        if codec in ("ppm", "ppm_plain") and isinstance(args, tuple):
            raw_mode += ";16" if args[1] > 255 else ""
            if codec == "ppm":
                return _to_rgb(_netpbm(image, offset, args[1]), raw_mode)
        if codec == "ppm_plain":
            count = image.width * image.height * len(image.getbands())
            most = MOST_BITS if image.mode == "1" else MOST_NUMBERS
            if count > most:
                what = f"{count:,} numbers written as text, at most {most:,} are read; write it binary"
                raise ValueError(what)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_layout(image, raw_mode)
    image.load()
    return _to_rgb(image, raw_mode)


def _check_scans(image: Image.Image, max_pixels: int) -> None:
    """Raise ValueError if a JPEG, or a TIFF of JPEGs, has far more scans than it needs."""
    pieces = 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.tag_v2.get(TiffImagePlugin.COMPRESSION) not in TIFF_JPEG:
            return
        lists = TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS
        pieces = max(len(image.tag_v2.get(number, ())) for number in lists)
    elif image.format not in ("JPEG", "MPO"):
        return
    stream = getattr(image, "fp", None)
    if stream is None:  # already decoded
        return
    most = pieces * min(MOST_SCANS, SCANS_AT_MOST_PIXELS * max(1, max_pixels // (image.width * image.height)))
    here = stream.tell()
    stream.seek(0)
    found, end = 0, b""
    while found <= most and (block := stream.read(1 << 20)):
        found += (end + block).count(b"\xff\xda")
        end = block[-1:]
    # that count includes thumbnails, comments and further images: parse the markers
    if found > most and image.format != "TIFF":
        stream.seek(0)
        found = count_scans(stream.read())
    if found > most:
        raise ValueError(f"a JPEG of {found:,} scans, at most {most:,} are decoded at its size")
    stream.seek(here)


def count_scans(content: bytes) -> int:
    """Number of scans (passes over all pixels) of the first image in a JPEG file."""
    place, scans = 2, 0
    while (marker := END_OF_SEGMENT.search(content, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    return scans


def _check_layout(image: TiffImagePlugin.TiffImageFile, raw_mode: str) -> None:
    """Raise ValueError for a layout of a TIFF that Pillow decodes to wrong pixels."""
    tags = image.tag_v2
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    num_samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == PLANAR and num_samples > 1:
        is_reversed = tags.get(TiffImagePlugin.FILLORDER, 1) == 2
        if bits > 8 or is_reversed or raw_mode not in ("", "R", "RGB", "RGBA", "RGBX", "C", "CMYK"):
            raise ValueError(
                f"a TIFF of {bits} bits with a plane for each channel, which Pillow cannot put together; "
                "write it interleaved"
            )
    if bits <= 8 and SIGNED in tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)):
        raise ValueError("signed 8-bit pixels have no known range")
    is_ycbcr = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == YCBCR
    is_raw = tags.get(TiffImagePlugin.COMPRESSION, 1) == 1
    is_subsampled = tags.get(TiffImagePlugin.YCBCRSUBSAMPLING, (2, 2)) != (1, 1)
    if is_ycbcr and is_raw and num_samples > 1 and is_subsampled:
        raise ValueError("a TIFF of subsampled YCbCr without compression, which Pillow does not read")


def _netpbm(image: ImageFile.ImageFile, offset: int, largest: int) -> Image.Image:
    """A binary PGM or PPM with any maximum value: Pillow's pixels, without its loop in Python."""
    count = image.width * image.height * len(image.getbands())
    in_file = np.dtype(">u2" if largest > 255 else "u1")
    top, kind = (65535, np.uint16) if image.mode == "I" else (255, np.uint8)
    assert image.fp is not None
    image.fp.seek(offset)
    content = image.fp.read(count * in_file.itemsize)
    if len(content) < count * in_file.itemsize:
        raise OSError("image file is truncated")
    table = np.rint(np.arange(1 << 8 * in_file.itemsize) / largest * top).clip(max=top).astype(kind)
    shape = (image.height, image.width, *([3] if image.mode == "RGB" else []))
    return Image.fromarray(table[np.frombuffer(content, in_file)].reshape(shape))


def _to_rgb(image: Image.Image, raw_mode: str) -> tuple[Image.Image, bool]:
    """The image as RGB, and whether it is dim: 16 bits a channel, less than a tenth of them used."""
    # PGM, and PNG in older Pillow, hold their 16 bits in mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _gray_of_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"signed or 32-bit pixels (mode {image.mode}) have no known range")
    is_deep = ";16" in raw_mode and image.mode in ("RGB", "RGBA")
    is_dim = is_deep and 10 * max(high for _, high in image.getextrema()[:3]) < 255  # type: ignore[misc]  # pairs: it has bands
    # Pillow scales the pixels to 8 bits, but not the value that stands for transparency
    if image.format == "PNG" and "transparency" in image.info:
        if raw_mode == "RGB;16B":
            raise ValueError("transparent where a 16-bit colour is met, which 8 bits cannot tell")
        if raw_mode in ("L;2", "L;4"):
            image.info["transparency"] *= 85 if raw_mode == "L;2" else 17
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB"), is_dim


def _gray_of_16_bits(image: Image.Image) -> tuple[Image.Image, bool]:
    """`_to_rgb` of 16 or 12 bits. Pillow's convert() would clip: every value above 255 white."""
    values = np.asarray(image).astype(np.uint32)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    # 12 bits, packed: the only other depth that a file can declare
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        return Image.fromarray(((values * 255 + 2047) // 4095).astype(np.uint8)).convert("RGB"), False
    is_dim = 10 * int(values.max()) < 65535
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        values = 65535 - values
    gray = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray).convert("RGB"), is_dim


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def map_runs(
    work: Callable[[int, list[Encoded]], T], images: Iterator[Encoded], count: int
) -> Generator[T, None, None]:
    """Yield work(first, run) in order, for the `count` images in runs of RUN, on one thread per core.

    Threads suffice: the decoders release the GIL.
    """
    workers = min(32, cores())
    pending: deque[Future[T]] = deque()
    submitted = 0
    with ThreadPoolExecutor(workers) as pool:
        while submitted < count or pending:
            # three runs a thread are read ahead: little memory beside the pixels
            while submitted < count and len(pending) < 3 * workers:
                run = list(islice(images, RUN))
                assert run, "a source yields one item a position"
                pending.append(pool.submit(work, submitted, run))
                submitted += len(run)
            yield pending.popleft().result()


def reason(exc: Exception) -> str:
    """Why an image was left out, in one line."""
    if isinstance(exc, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(exc, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "more pixels than max_pixels"
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else first_line(exc)
