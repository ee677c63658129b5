"""The peer of `benchmarks.training`: SimCLR trained by lightly's own parts, as its CIFAR-10 benchmark puts
them together.

    python -m benchmarks.lightly_loop --data FOLDER --width 16 --batch-size 256 --steps 8 --warmup-steps 2
    [--plus]

lightly's SimCLRTransform on PIL images in a DataLoader with one worker a core, its projection head and
NTXentLoss, two forward passes, SGD, fp32. `--plus` adds what an experienced user would: channels_last,
torch.compile, one forward pass over both views, persistent workers, and on a GPU pinned memory and bf16
autocast. The network is this package's, so that both sides of the comparison train the same one; the images
lie decoded in memory, which spares the loader the files. Prints one line of JSON; the steps of the warm-up
(compilation, start of the workers) are not in it.

    python -m benchmarks.lightly_loop --data FOLDER --epochs 40 --lr 0.12 --encoder DIR

is a whole run instead: a cosine over the epochs, timed from the first batch to the last, start of the workers
included, and the encoder in DIR for evaluate.py.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from ssl_emp.data.decode import cores
from ssl_emp.data.images import load_images
from ssl_emp.device import pick_device
from ssl_emp.errors import Parser, UserError
from ssl_emp.model import build_encoder, save_encoder


class PilImages(Dataset[tuple[list[Tensor], int]]):
    """Decoded images in the form of torchvision's CIFAR10: a transformed PIL image and its label."""

    def __init__(self, pixels: Tensor, labels: Tensor | None, transform: Any) -> None:
        """pixels: (N, 3, S, S) uint8."""
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, S, S, 3)
        self.labels = [0] * len(pixels) if labels is None else labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of one epoch after the other, without end."""
    while True:
        yield from loader


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train for the warm-up and the timed steps; images a second of the latter, and what was run."""
    torch.manual_seed(arguments.seed)
    device, plus, workers = pick_device(arguments.device), arguments.plus, cores()
    size, batch_size, epochs = arguments.image_size, arguments.batch_size, arguments.epochs
    # each worker reads two batches ahead: load no more images than the timed steps and these need
    needed = (arguments.warmup_steps + arguments.steps + 2 * workers) * batch_size
    most = arguments.images if epochs else needed
    images = load_images(
        arguments.data, "train", image_size=arguments.stored, max_images=most, store="memory"
    )
    if len(images.names) < batch_size:
        raise UserError(
            f"{len(images.names)} images in {arguments.data} make no batch",
            f"give --batch-size {len(images.names)} or less",
        )
    transform = SimCLRTransform(
        input_size=size, cj_strength=0.5, gaussian_blur=0, min_scale=arguments.min_scale
    )
    loader: DataLoader[Any] = DataLoader(
        PilImages(images.pixels[:], images.labels, transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=plus or bool(epochs),
        pin_memory=plus and device.type == "cuda",
    )
    encoder = build_encoder(
        "resnet18", arguments.width, "auto", size, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    head = SimCLRProjectionHead(encoder.feature_dim, encoder.feature_dim, 128)
    model: nn.Module = nn.Sequential(encoder.backbone, head).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=5e-4)
    criterion = NTXentLoss(temperature=arguments.temperature)
    steps = epochs * len(loader) or arguments.warmup_steps + arguments.steps
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if epochs else None
    model.train()
    if plus:
        model = torch.compile(model.to(memory_format=torch.channels_last))  # type: ignore[assignment]  # torch types it as a callable

    def project(view_a: Tensor, view_b: Tensor) -> tuple[Tensor, Tensor]:
        if not plus:
            return model(view_a), model(view_b)
        z_a, z_b = model(torch.cat([view_a, view_b]).to(memory_format=torch.channels_last)).chunk(2)
        return z_a, z_b

    first_timed = 0 if epochs else arguments.warmup_steps
    began = time.perf_counter()
    batches = endless(loader)
    for step in range(steps):
        if step == first_timed:
            common.synchronize()
            began = time.perf_counter()
        (view_a, view_b), _ = next(batches)
        view_a, view_b = (view.to(device, non_blocking=True) for view in (view_a, view_b))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=plus and device.type == "cuda"):
            loss = criterion(*project(view_a, view_b))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cosine is not None:
            cosine.step()
    common.synchronize()
    took = time.perf_counter() - began
    if arguments.encoder:
        save_encoder(encoder, Path(arguments.encoder))
    return {
        "images_per_second": (steps - first_timed) * batch_size / took,
        "seconds": took,
        "steps": steps - first_timed,
        "loss": loss.item(),
        "workers": workers,
        "torch_threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> None:
    options = Parser(description="lightly's own SimCLR loop, timed.")
    options.add_argument("--data", required=True, help="any data.source of pretrain.py")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--image-size", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--steps", type=int, default=8, help="timed")
    options.add_argument("--warmup-steps", type=int, default=2)
    options.add_argument(
        "--plus",
        action="store_true",
        help="with channels_last, torch.compile, one forward pass, bf16 on a GPU",
    )
    options.add_argument("--device", default="auto")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--lr", type=float, default=6e-2)
    options.add_argument("--temperature", type=float, default=0.5)
    options.add_argument("--min-scale", type=float, default=0.08, help="smallest area of a crop")
    options.add_argument("--epochs", type=int, default=0, help="a whole run of so many, instead of --steps")
    options.add_argument("--images", type=int, help="of a whole run (default: all)")
    options.add_argument("--stored", type=int, help="pixels of a stored image (default: --image-size)")
    options.add_argument("--encoder", metavar="DIR", help="where the encoder goes")
    arguments = options.parse_args(argv)
    arguments.stored = arguments.stored or arguments.image_size
    print(json.dumps(train(arguments)))


if __name__ == "__main__":
    common.run(main)
