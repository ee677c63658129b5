"""Two views of a batch, in views a second: this package against lightly's PIL transform and kornia's batched
chain.

    python -m benchmarks.augmentation

`ours` is what pretrain.py calls (draw_params, then cut_views through torch.compile), `ours_eager` the same
uncompiled. `lightly` is lightly's SimCLRTransform in a pool of processes, one a core; it gets its images as
arrays in memory and keeps the views to itself, so it is spared the reading and the copying that a DataLoader
does. `kornia` is applied twice to the whole batch. The same strengths and probabilities for all. Each is warm
when it is measured; `compile_seconds` in the file is the first call of `ours` (less where the compiler finds
it in its cache).
"""

import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import common
from ssl_emp.augment import Recipe, cut_views, draw_params
from ssl_emp.data.decode import cores
from ssl_emp.device import keep_freed_memory

# SimCLR's for photographs
STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "blur_prob": 0.5}
# name -> recipe, side of the source images, batch, goal against lightly
CASES: dict[str, tuple[Recipe, int, int, float]] = {
    "32 px": (Recipe(size=32), 32, 512, 12.0),
    "64 px, blur": (Recipe(size=64, **STRONG), 64, 256, 4.0),  # type: ignore[arg-type]  # mypy takes ** for any field's type
    "224 of 256 px, blur": (Recipe(size=224, **STRONG), 256, 64, 2.0),  # type: ignore[arg-type]  # as above
}

Measure = Callable[[], float]


def rate(views: int, work: Callable[[], object], least_seconds: float) -> Measure:
    """Views a second of `work`, called as often as fills `least_seconds`. Call it once before: this
    calibrates on a warm one.
    """
    times = max(1, math.ceil(least_seconds / common.seconds(work)))

    def repeat() -> None:
        for _ in range(times):
            work()

    return lambda: times * views / common.seconds(repeat)


def ours(images: Tensor, recipe: Recipe, views_of: Any) -> Callable[[], object]:
    """A function that cuts both views of the batch; each call uses the draws of another epoch."""
    index, epochs = torch.arange(len(images), device=images.device), count()
    return lambda: views_of(images, draw_params(0, next(epochs), index, recipe, images.shape[-1]), recipe)


def kornia_chain(recipe: Recipe) -> nn.Module | None:
    """The same chain from kornia, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, on import
            from kornia import augmentation as K
    except ImportError:
        return None
    size = recipe.size
    blur = K.RandomGaussianBlur((recipe.blur_kernel_size,) * 2, recipe.blur_sigma, p=recipe.blur_prob)
    return nn.Sequential(
        K.RandomResizedCrop((size, size), scale=recipe.crop_scale, ratio=recipe.crop_ratio),
        K.RandomHorizontalFlip(p=recipe.flip_prob),
        K.ColorJitter(
            recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=recipe.jitter_prob
        ),
        K.RandomGrayscale(p=recipe.gray_prob),
        *([blur] if recipe.blur_prob else []),
        K.Normalize(torch.tensor(recipe.mean), torch.tensor(recipe.std)),
    )


# in a process of the pool: its transform and the images, (B, H, W, 3) uint8
_pool_transform: Any = None
_pool_images: np.ndarray


def _start_worker(images: np.ndarray, recipe: Recipe) -> None:
    from lightly.transforms import SimCLRTransform

    global _pool_transform, _pool_images
    torch.set_num_threads(1)
    _pool_images = images
    _pool_transform = SimCLRTransform(
        input_size=recipe.size,
        cj_prob=recipe.jitter_prob,
        cj_strength=1.0,
        cj_bright=recipe.brightness,
        cj_contrast=recipe.contrast,
        cj_sat=recipe.saturation,
        cj_hue=recipe.hue,
        min_scale=recipe.crop_scale[0],
        random_gray_scale=recipe.gray_prob,
        gaussian_blur=recipe.blur_prob,
        sigmas=recipe.blur_sigma,
        hf_prob=recipe.flip_prob,
    )


def _work(rows: range) -> int:
    return sum(len(_pool_transform(Image.fromarray(_pool_images[row]))) for row in rows)


@contextmanager
def lightly_pool(images: Tensor, recipe: Recipe) -> Iterator[Callable[[], object]]:
    """Both views of the batch by lightly's transform in one process a core, started before it is yielded."""
    pieces = [range(start, min(start + 16, len(images))) for start in range(0, len(images), 16)]
    arrays = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with multiprocessing.get_context("spawn").Pool(cores(), _start_worker, (arrays, recipe)) as pool:
        yield lambda: pool.map(_work, pieces, chunksize=1)


def measure(name: str, arguments: Any) -> dict[str, Any]:
    """One case: its summary, and the seconds that the first, compiling call took."""
    recipe, source, batch, goal = CASES[name]
    batch, least_seconds = (8, 0.0) if arguments.quick else (batch, 1.5)
    images = torch.randint(
        0, 256, (batch, 3, source, source), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = images.to(arguments.device)
    works: dict[str, Callable[[], object]] = {
        "ours": ours(images, recipe, torch.compile(cut_views, dynamic=False)),
        "ours_eager": ours(images, recipe, cut_views),
    }
    chain = kornia_chain(recipe)
    if chain is None:
        print("kornia is not installed, left out: pip install -e '.[bench]'")
    else:
        both = chain.to(arguments.device)
        works["kornia"] = lambda: [both(images.float() / 255) for _ in range(2)]
    with lightly_pool(images, recipe) as by_lightly:
        works["lightly"] = by_lightly
        first = {key: common.seconds(work) for key, work in works.items()}
        figures = common.interleave(
            {key: rate(2 * batch, work, least_seconds) for key, work in works.items()}, arguments.repeats
        )
    ratios = [
        common.Ratio("ours", "lightly", goal=goal),
        common.Ratio("ours", "kornia"),
        common.Ratio("ours", "ours_eager"),
    ]
    return {**common.summary(figures, ratios, "views/s"), "batch": batch, "compile_seconds": first["ours"]}


def main(argv: list[str] | None = None) -> None:
    arguments = common.parse(common.parser("Views a second against lightly and kornia."), argv)
    keep_freed_memory()  # as pretrain.py does
    names = list(CASES)[:1] if arguments.quick else list(CASES)
    with torch.compiler.set_stance("force_eager") if arguments.quick else nullcontext(), torch.no_grad():
        cases = {name: measure(name, arguments) for name in names}
    common.write("augmentation", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
