"""What an exported encoder takes, what it refuses and how it says so, and how images become what it takes."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_emp import load_encoder
from ssl_emp.data.images import load_images
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, build_encoder, save_encoder

SIZE = 32


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    save_encoder(build_encoder("resnet18", 8, "cifar", SIZE, [0.5] * 3, [0.25] * 3), folder)
    return folder


@pytest.fixture
def encoder(exported: Path) -> Encoder:
    return load_encoder(exported)


def pixels(height: int = SIZE, width: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- types and shapes: refused by every encoder


@pytest.mark.parametrize(
    "images",
    [
        torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8),
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.int64),
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.bool),
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.complex64),
        torch.zeros(2, SIZE, SIZE, 3, dtype=torch.int8),
        pixels(),
        Image.fromarray(pixels()),
        "x.png",
        [torch.zeros(3, SIZE, SIZE)],
    ],
)
def test_what_is_no_tensor_of_floats_is_a_type_error(exported: Path, images: Any) -> None:
    for encoder in (
        load_encoder(exported),
        load_encoder(exported, check_range=False),
        build_encoder("resnet18", 8, "cifar", 32, [0.5] * 3, [1.0] * 3),
    ):
        with pytest.raises(TypeError, match=r"^images are .*\. fix: give "):
            encoder(images)


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((2, SIZE, SIZE, 3), r"permute\(0, 3, 1, 2\)"),
        ((3, SIZE, SIZE), r"images\[None\]"),
        ((SIZE, SIZE, 3), "B, 3, H, W"),
        ((2, 1, SIZE, SIZE), "expand"),
        ((2, 4, SIZE, SIZE), r"images\[:, :3\]"),
        ((2, 3 * SIZE * SIZE), "B, 3, H, W"),
        ((1, 2, 3, SIZE, SIZE), "B, 3, H, W"),
        ((), "B, 3, H, W"),
    ],
)
def test_another_shape_is_a_value_error_that_says_what_to_do(
    encoder: Encoder, shape: tuple[int, ...], fix: str
) -> None:
    with pytest.raises(ValueError, match=fix):
        encoder(torch.zeros(shape))


# --- values


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (lambda images: images * 255, "divide by 255"),
        (lambda images: images * 65535, "divide by 255"),
        (lambda images: (images - 0.5) / 0.25, "leave out Normalize"),
        (lambda images: images * 2 - 1, "leave out Normalize"),
        (lambda images: images * 1.1, "clamp"),
        (lambda images: images - 0.02, "clamp"),
        (lambda images: images * 1.005, "clamp"),
        (lambda images: images.index_fill(0, torch.tensor([1]), float("nan")), "no numbers"),
        (lambda images: images / 0, "no numbers"),
        (lambda images: (images * 255).half(), "divide by 255"),
        (lambda images: (images * 255).double(), "divide by 255"),
    ],
)
def test_values_beyond_zero_and_one_are_refused(encoder: Encoder, change: Any, fix: str) -> None:
    images = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).clamp(0.001, 1)
    images[0, 0, 0, 0] = 1
    encoder(images)
    with pytest.raises(ValueError, match=rf"not in \[0, 1\]\. fix: .*{fix}"):
        encoder(change(images))
    copied = copy.deepcopy(encoder)
    with pytest.raises(ValueError, match="fix"):
        copied(change(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounding_and_ordinary_images_are_taken(encoder: Encoder, dtype: torch.dtype) -> None:
    images = torch.cat(
        [torch.zeros(1, 3, SIZE, SIZE), torch.ones(1, 3, SIZE, SIZE), torch.rand(2, 3, SIZE, SIZE)]
    ).to(dtype)
    for given in (
        images,
        images * (1 + torch.finfo(dtype).eps),
        images - 1e-4,
        images.to(memory_format=torch.channels_last),
        images[:0],
    ):
        assert encoder(given).shape == (len(given), 64)


def test_only_a_loaded_encoder_looks_at_values_and_can_be_told_not_to(exported: Path) -> None:
    """With tensors that have no values (as under a tracer), anything that looks at one, and so would wait for
    a GPU, is an error.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    checked, silent = load_encoder(exported), load_encoder(exported, check_range=False)
    untrained = build_encoder("resnet18", 8, "cifar", SIZE, [0.5] * 3, [1.0] * 3).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(torch.zeros(2, 3, SIZE, SIZE))
        assert silent(images).shape == untrained(images).shape == (2, 64)
        with pytest.raises(DataDependentOutputException):
            checked(images)


def test_a_loaded_encoder_can_be_exported_and_traced(encoder: Encoder) -> None:
    images = torch.rand(2, 3, SIZE, SIZE)
    expected = encoder(images)
    torch.testing.assert_close(torch.export.export(encoder, (images,)).module()(images), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that tracing is on its way out; people still do it
        torch.testing.assert_close(torch.jit.trace(encoder, images)(images), expected)


def test_the_check_changes_no_feature_and_is_no_part_of_the_export(exported: Path, tmp_path: Path) -> None:
    images = torch.rand(2, 3, SIZE, SIZE)
    checked, silent = load_encoder(exported), load_encoder(exported, check_range=False)
    assert (
        torch.equal(checked(images), silent(images))
        and checked.state_dict().keys() == silent.state_dict().keys()
    )
    assert repr(checked) == repr(silent)  # the name of cached features is made of it
    save_encoder(checked, tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()


# --- preprocess


def saved(folder: Path) -> list[Path]:
    """Images of many kinds: large, small, turned, with 16 bits, transparent, animated."""
    folder.mkdir(exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "0_large.jpg": (Image.fromarray(pixels(301, 402)), {"quality": 80}),
        "1_turned.jpg": (Image.fromarray(pixels(150, 99)), {"exif": exif}),
        "2_small.png": (Image.fromarray(pixels(9, 20)), {}),
        "3_deep.png": (Image.fromarray(pixels(40, 40)[..., 0].astype(np.uint16) * 257), {}),
        "4_clear.png": (Image.fromarray(np.concatenate([pixels(50, 60), pixels(50, 60)[..., :1]], -1)), {}),
        "5_deep.tif": (
            Image.fromarray(pixels(33, 40)[..., 0].astype(np.uint16) * 257),
            {"compression": "tiff_lzw"},
        ),
        "6_moves.gif": (
            Image.fromarray(pixels(64, 64)),
            {"save_all": True, "append_images": [Image.fromarray(pixels(64, 64, 1))]},
        ),
        "7_odd.webp": (Image.fromarray(pixels(77, 31)), {}),
        "8_ink.jpg": (Image.fromarray(pixels(200, 140)).convert("CMYK"), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return sorted(folder.iterdir())


def test_preprocess_gives_the_pixels_that_evaluation_sees(encoder: Encoder, tmp_path: Path) -> None:
    paths = saved(tmp_path / "in")
    seen = load_images(str(tmp_path / "in"), image_size=encoder.image_size)
    assert seen.skipped == [] and len(seen.names) == len(paths)
    expected = seen.pixels[:].float() / 255
    assert torch.equal(encoder.preprocess(paths), expected)
    assert torch.equal(encoder.preprocess(tuple(map(str, paths))), expected)
    for path, row in zip(paths, expected, strict=True):
        with Image.open(path) as image:
            size = image.size
            assert torch.equal(encoder.preprocess(image), row) and image.size == size
            assert image.tile or path.suffix == ".webp", "the caller's image is not decoded on the way"
        with open(path, "rb") as file, Image.open(io.BytesIO(file.read())) as image:
            assert torch.equal(encoder.preprocess([image])[0], row)
            image.load()
            # noise, the worst case
            assert (encoder.preprocess(image) - row).abs().mean() < (
                5 / 255 if path.suffix == ".jpg" else 1e-9
            )
    features = encoder(encoder.preprocess(paths))
    assert features.shape == (len(paths), 64) and features.isfinite().all()


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (70, 41), (1, 1), (SIZE, 3)])
def test_preprocess_takes_pixels_in_memory(encoder: Encoder, shape: tuple[int, int]) -> None:
    colour = pixels(*shape)
    image = Image.fromarray(colour)
    expected = encoder.preprocess(image)
    assert (
        expected.shape == (3, SIZE, SIZE)
        and expected.dtype == torch.float32
        and 0 <= expected.min()
        and expected.max() <= 1
    )
    if shape == (SIZE, SIZE):
        assert torch.equal(expected, torch.from_numpy(colour.transpose(2, 0, 1).copy()).float() / 255)
    assert torch.equal(encoder.preprocess(colour), expected)
    assert torch.equal(encoder.preprocess(colour[:, ::-1][:, ::-1]), expected)
    assert torch.equal(encoder.preprocess(colour[..., 0]), encoder.preprocess(image.getchannel(0)))
    opaque = np.concatenate([colour, np.full((*shape, 1), 255, np.uint8)], -1)
    assert torch.equal(encoder.preprocess(opaque), expected)
    assert torch.equal(encoder.preprocess([colour, image, colour]), expected.expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (pixels().astype(np.float32) / 255, ValueError),
        (pixels().astype(np.int64), ValueError),
        (pixels().transpose(2, 0, 1), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError),
        ([], ValueError),
        (torch.zeros(3, 8, 8), TypeError),
        (b"\x89PNG", TypeError),
        (None, TypeError),
        (7, TypeError),
        ([pixels(), None], TypeError),
        ("missing.png", UserError),
        (Path("missing\n.png"), UserError),
        (".", UserError),
        (Image.new("F", (8, 8)), UserError),
        (Image.new("I", (8, 8)), UserError),
    ],
)
def test_preprocess_refuses_what_is_no_image(
    encoder: Encoder, image: Any, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="fix: ") as caught:
        encoder.preprocess(image)
    assert "\n" not in str(caught.value)


def test_preprocess_refuses_damaged_files_and_those_with_too_many_pixels(
    encoder: Encoder, tmp_path: Path
) -> None:
    Image.fromarray(pixels(100, 100)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    (tmp_path / "text.jpg").write_text("no image at all")
    with pytest.raises(UserError, match=r"half\.png cannot be read"):
        encoder.preprocess(tmp_path / "half.png")
    with pytest.raises(UserError, match=r"text\.jpg cannot be read \(not an image of a known format"):
        encoder.preprocess(str(tmp_path / "text.jpg"))
    with pytest.raises(UserError, match="more pixels than max_pixels"):
        encoder.preprocess(tmp_path / "whole.png", max_pixels=9_999)
    assert encoder.preprocess(tmp_path / "whole.png", max_pixels=10_000).shape == (3, SIZE, SIZE)


def test_other_frames_and_drafted_images_are_taken_as_the_caller_has_them(
    encoder: Encoder, tmp_path: Path
) -> None:
    frames = [Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "x.tif") as image:
        for number, value in ((1, 200), (0, 10), (1, 200)):
            image.seek(number)
            assert (encoder.preprocess(image) * 255 - value).abs().max() < 1e-4 and image.tell() == number


def test_batches_of_one_list_are_independent(encoder: Encoder) -> None:
    first, second = pixels(seed=1), pixels(seed=2)
    batch: Tensor = encoder.preprocess([first, second])
    assert torch.equal(batch[0], encoder.preprocess(first)) and torch.equal(
        batch[1], encoder.preprocess(second)
    )
