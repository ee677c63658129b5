"""From JPEG files to two views, in images a second: the store of JPEGs against torchvision's ImageFolder in a
DataLoader.

    python -m benchmarks.images --data FOLDER

5,000 images of the source are written as JPEG files of 64 px into class folders. `ours` is what pretrain.py
does with `data.store=encoded`: threads decode the next batches while both views of this one are cut,
compiled. `lightly` is an ImageFolder with SimCLRTransform in a DataLoader with one persistent worker a core.
A figure is one shuffled epoch after an epoch of warm-up; building the store (once a data set) and compilation
are reported beside it.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import common
from ssl_emp.augment import Recipe, cut_views, draw_params
from ssl_emp.data.decode import cores
from ssl_emp.data.images import ImageSet, load_images
from ssl_emp.data.stores import HostImages
from ssl_emp.device import keep_freed_memory
from ssl_emp.errors import UserError
from ssl_emp.prune.plan import shuffled_batches

SIZE = 64
# the defaults of SimCLRTransform
RECIPE = Recipe(SIZE, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_prob=0.5)
GOAL = 4.0


def write_jpegs(images: ImageSet, folder: Path) -> None:
    """Class folders of JPEG files at Pillow's defaults (quality 75)."""
    for number, pixels in enumerate(images.pixels[:]):
        label = 0 if images.labels is None else int(images.labels[number])
        path = folder / f"class{label:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def ours(images: ImageSet, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A function that cuts both views of one epoch; each call uses the next epoch's order and draws."""
    store, index, epochs = (
        HostImages(images.pixels, device),
        torch.arange(len(images.names), device=device),
        count(),
    )
    views_of: Any = torch.compile(cut_views, dynamic=False)

    def epoch() -> None:
        number = next(epochs)
        for rows, batch in store.stream(shuffled_batches(index, batch_size, 0, number)):
            views_of(batch, draw_params(0, number, rows, RECIPE, SIZE), RECIPE)

    return epoch


def lightly(folder: Path, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A function that loads both views of one epoch by worker processes."""
    on_gpu = device.type == "cuda"
    loader: DataLoader[tuple[list[Tensor], Tensor]] = DataLoader(
        ImageFolder(str(folder), SimCLRTransform(input_size=SIZE)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cores(),
        persistent_workers=True,
        pin_memory=on_gpu,
    )

    def epoch() -> None:
        for (view_a, view_b), _ in loader:
            if on_gpu:
                view_a.to(device, non_blocking=True), view_b.to(device, non_blocking=True)

    return epoch


def rate(images: int, epoch: Callable[[], None]) -> float:
    """Images a second of one epoch."""
    return images / common.seconds(epoch)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The summary, the seconds of building the store, and those of both warm-ups."""
    number, batch_size = (32, 8) if arguments.quick else (arguments.images, arguments.batch_size)
    decoded = load_images(arguments.data, "train", image_size=SIZE, max_images=number, store="memory")
    if len(decoded.names) < batch_size:
        raise UserError(
            f"{len(decoded.names)} images in {arguments.data} make no batch",
            "give more images, or a smaller --batch-size",
        )
    write_jpegs(decoded, folder / "jpegs")
    found: list[ImageSet] = []

    def build() -> None:
        found.append(
            load_images(
                str(folder / "jpegs"), store="encoded", image_size=SIZE, cache_dir=str(folder / "cache")
            )
        )

    extra = {"store_seconds": common.seconds(build), "images": len(decoded.names), "batch_size": batch_size}
    # first, so that its workers fork before other threads start
    epochs = {"lightly": lightly(folder / "jpegs", batch_size, arguments.device)}
    extra["warmup_seconds, lightly"] = common.seconds(epochs["lightly"])
    epochs["ours"] = ours(found[0], batch_size, arguments.device)
    extra["warmup_seconds, ours"] = common.seconds(epochs["ours"])
    done = len(decoded.names) // batch_size * batch_size
    figures = common.interleave(
        {name: partial(rate, done, epoch) for name, epoch in epochs.items()}, arguments.repeats
    )
    return {**common.summary(figures, [common.Ratio("ours", "lightly", goal=GOAL)], "images/s"), **extra}


def main(argv: list[str] | None = None) -> None:
    options = common.parser(
        "Images a second from JPEG files, against an ImageFolder with lightly's transform."
    )
    options.add_argument(
        "--data", required=True, help="Tiny-ImageNet as a folder of parquet files, or any other data.source"
    )
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--batch-size", type=int, default=256)
    arguments = common.parse(options, argv)
    keep_freed_memory()  # as pretrain.py does
    compiling = torch.compiler.set_stance("force_eager") if arguments.quick else nullcontext()
    with compiling, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        cases = {f"{SIZE} px JPEG files": measure(arguments, Path(folder))}
    common.write("images", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
