"""What is kept on disk is found again by all that it depends on: the pixels of one source are never those of
another.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import png, striped_images, write_parquet

from ssl_emp.commands import evaluate
from ssl_emp.data.images import ImageSet, _arrays, listed, load_images, load_source
from ssl_emp.model import build_encoder, save_encoder


def noise(seed: int, num: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 16, 16, 3), np.uint8)


def arrays(pixels: np.ndarray, folder: Path) -> ImageSet:
    found = _arrays("cifar10/train", pixels, np.zeros(len(pixels), np.int64), ["a"])
    return load_source(found, "cifar10", image_size=16, store="raw", cache_dir=str(folder))


def listed_arrays(pixels: np.ndarray, folder: Path) -> ImageSet:
    found = listed(list(pixels), torch.zeros(len(pixels), dtype=torch.int64), ["a"], "flowers/train")
    return load_source(found, "flowers", image_size=16, store="raw", cache_dir=str(folder))


def listed_files(pixels: np.ndarray, folder: Path) -> ImageSet:
    """The same names, sizes and times of writing: only the time of the change tells them apart, as after `cp
    -p`.
    """
    paths = [folder / f"{number}.ppm" for number in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        path.write_bytes(b"P6 16 16 255\n" + image.tobytes())
        os.utime(path, ns=(10**18, 10**18))
    found = listed(list(map(str, paths)), torch.zeros(len(pixels), dtype=torch.int64), ["a"], "flowers/train")
    return load_source(found, "flowers", image_size=16, store="raw", cache_dir=str(folder / "cache"))


def columns(pixels: np.ndarray, folder: Path) -> ImageSet:
    """One table with two columns of images; which is read follows from the pixels that are asked for."""
    path, both = folder / "two.parquet", {"image": noise(0), "img": noise(1)}
    if not path.exists():
        pq.write_table(
            pa.table({name: [png(image) for image in images] for name, images in both.items()}), path
        )
    column = next(name for name, images in both.items() if np.array_equal(images, pixels))
    return load_images(
        str(path), image_size=16, store="raw", cache_dir=str(folder / "cache"), image_column=column
    )


@pytest.mark.parametrize("load", [arrays, listed_arrays, listed_files, columns])
def test_other_pixels_are_another_file_in_the_cache(
    load: Callable[[np.ndarray, Path], ImageSet], tmp_path: Path
) -> None:
    for seed in (0, 1, 0):
        pixels = noise(seed)
        assert torch.equal(load(pixels, tmp_path).pixels[:], torch.from_numpy(pixels).permute(0, 3, 1, 2))
    others = len(list(tmp_path.rglob("*.u8")))
    assert others == (3 if load is listed_files else 2), "found again, unless the files were written again"


def test_features_are_those_of_these_settings(tmp_path: Path, tiny_data: Path) -> None:
    """Network, pixels, images in a batch: each of its own; labels and evaluators share."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 8, "imagenet", 16, [0.5] * 3, [0.25] * 3).eval()
    save_encoder(encoder, tmp_path / "one")
    save_encoder(build_encoder("resnet18", 8, "imagenet", 16, [0.5] * 3, [0.2] * 3).eval(), tmp_path / "two")
    data, labels = striped_images(68)
    write_parquet(tmp_path / "data/train.parquet", [data[1], *data[1:]], labels)
    write_parquet(tmp_path / "data/test.parquet", *striped_images(40, seed=1))
    kept: set[str] = set()
    base = ["device=cpu", f"cache_dir={tmp_path / 'cache'}", "knn.num_neighbors=3"]
    one, two, given = str(tmp_path / "one"), str(tmp_path / "two"), f"data.source={tiny_data}"
    for words, new in (
        ([one, "knn", given], 2),
        ([one, "knn", "linear", given], 0),
        ([one, "knn", given, "batch_size=7"], 2),
        ([one, "knn", f"data.source={tmp_path / 'data'}"], 1),  # one train image differs, no test image
        ([one, "knn", given, "data.image_size=20"], 2),
        ([two, "knn", given], 2),  # of other weights, and of another normalisation
        ([one, "knn", given, "knn.num_neighbors=5", "seed=3"], 0),
    ):
        assert evaluate.main([*base, *words]) == 0
        found = {path.name for path in (tmp_path / "cache").iterdir()}
        assert len(found - kept) == new, words
        kept = found
