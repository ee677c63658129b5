"""What the decoder makes of pixels, against other decoders and arithmetic; what it refuses, and how much work it may take."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import evaluate
import pretrain
from ssl_emp.config import DataConfig
from ssl_emp.decode import MAX_PIXELS
from ssl_emp.errors import UserError
from ssl_emp.images import load_images


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
    words = ["pixels", "knn", f"data.source={tmp_path}", "data.image_size=16", "knn.num_neighbors=1", "cache_dir=null"]
    assert evaluate.main([*words, "data.max_pixels=89999"]) == 0
    assert "2 unreadable images left out of the train split" in capfd.readouterr().err
    assert evaluate.main(words) == 0
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [0, -1, 10**11, 1.5, "many", True])
def test_max_pixels_has_bounds(value: Any) -> None:
    with pytest.raises(ValueError, match="max_pixels"):
        DataConfig(max_pixels=value)


def test_the_default_is_one_number_and_above_what_pillow_warns_of() -> None:
    assert DataConfig().max_pixels == MAX_PIXELS > (Image.MAX_IMAGE_PIXELS or 0)


def test_the_limit_governs_alone_on_both_sides_of_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit brought down to 1,000 pixels: where it had a say, 3,000 would be an error and 1,500 a warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (("a.png", (30, 100)), ("b.gif", (15, 100)), ("c.tif", (50, 60)), ("d.webp", (30, 100)), ("e.jpg", (50, 60))):
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
                    load_images(str(root), store=store, image_size=8, max_pixels=limit, cache_dir=str(tmp_path / store))
                continue
            got = load_images(str(root), store=store, image_size=8, max_pixels=limit, cache_dir=str(tmp_path / store))
            assert len(got.names) == count == len(got.pixels)
