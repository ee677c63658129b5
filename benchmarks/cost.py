"""How the cost of training grows: seconds of an epoch of pretrain.py over the images and over their pixels.

    python -m benchmarks.cost --data CIFAR10

ResNet-18 (`--width`, 3x3 stem), batch 64, unpruned, one process on all cores. `pixels`: 2,048 images, stored
and viewed at 16 to 96 pixels a side; a network of convolutions costs by the area, what is above that law is
what a pass costs whatever the images are. `images`: 24-pixel views of 2,048 to 32,768 images; a straight line
is expected. Of two epochs the second counts, so that start, reading and warm-up are in no figure.
"""

from functools import partial
from typing import Any

from benchmarks import common
from benchmarks.common import Ratio

CONFIG = "configs/cifar10_emp.yaml"
PIXELS = (16, 24, 32, 48, 64, 96)
IMAGES = (2048, 8192, 32768)


def seconds_of(count: int, pixels: int, arguments: Any) -> float:
    """Seconds of training of the second epoch on `count` images of `pixels` a side."""
    overrides = {
        "data.source": arguments.data,
        "data.max_images": count,
        "data.image_size": pixels,
        "augment.size": pixels,
        "data.labels": "none",
        "model.width": arguments.width,
        "model.stem": "cifar",
        "batch_size": 64,
        "epochs": 2,
        "compile": "false",
        "prune.policy": "none",
        "monitor.tensorboard": "false",
        "checkpoint.every_minutes": 1000,
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    first, second = common.run_pretrain(CONFIG, words, arguments)
    return float(second["training_seconds"] - first["training_seconds"])


def main(argv: list[str] | None = None) -> None:
    options = common.parser("How the cost of training grows with images and pixels.")
    options.add_argument("--data", required=True, help="CIFAR-10 as a folder of parquet, or any data.source")
    options.add_argument("--width", type=int, default=8, help="of the ResNet-18")
    arguments = common.parse(options, argv)
    few = 128 if arguments.quick else IMAGES[0]
    sides, counts = ((16, 32), (few, 2 * few)) if arguments.quick else (PIXELS, IMAGES)
    by_pixels = {f"{side} px": partial(seconds_of, few, side, arguments) for side in sides}
    by_images = {f"{count} images": partial(seconds_of, count, 24, arguments) for count in counts}
    # 1: exactly the law; above: what does not shrink with the images
    area = [
        Ratio(f"{side} px", "32 px", per=(side / 32) ** 2, name=f"{side} px / 32 px / area") for side in sides
    ]
    line = [
        Ratio(f"{count} images", f"{few} images", per=count / few, name=f"{count} / {few} images / share")
        for count in counts
    ]
    cases = {
        "pixels": common.summary(common.interleave(by_pixels, arguments.repeats), area, "seconds"),
        "images": common.summary(common.interleave(by_images, arguments.repeats), line, "seconds"),
    }
    common.write("cost", {"cases": cases, "width": arguments.width}, arguments)


if __name__ == "__main__":
    common.run(main)
