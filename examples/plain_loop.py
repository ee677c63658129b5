"""Data pruning in a plain PyTorch loop: supervised CIFAR-10, torchvision's ResNet-18, a DataLoader.

    python examples/plain_loop.py             # CIFAR-10 from torchvision, or --data: a folder of it
    python examples/plain_loop.py --data CIFAR10 --images 4000 --epochs 6
    150 steps, test accuracy 31.5%            # --fraction 0: 186 steps, 40.6%; too short a run to prune

Pruning adds the three lines marked `# prune`; docs/your_loop.md says what they mean.
"""

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from ssl_emp.data.images import load_images
from ssl_emp.prune import Pruner, entropy


class Images(Dataset[Any]):
    """Your dataset: anything with `dataset[i]` and `len(dataset)`."""

    def __init__(self, images: Any, transform: Any) -> None:
        self.pixels, self.labels, self.transform = images.pixels, images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[index]) / 127.5 - 1, self.labels[index]


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--data", default="cifar10", help="a name, or a folder of images or parquet")
    options.add_argument("--images", type=int, help="so many of each split only: a small run")
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--fraction", type=float, default=0.3, help="of a pruned epoch, left out")
    args = options.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    train, test = (load_images(args.data, split, max_images=args.images) for split in ("train", "test"))

    dataset = Images(train, v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]))
    pruner = Pruner(dataset, batch_size=args.batch, epochs=args.epochs, fraction=args.fraction)  # prune
    loader = DataLoader(pruner.indexed(dataset), args.batch, sampler=pruner.sampler(), num_workers=2)  # prune
    model = resnet18(num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=pruner.total_steps)

    began = time.perf_counter()
    for epoch in range(args.epochs):
        for x, y, index in loader:
            logits = model(x.to(device))
            losses = F.cross_entropy(logits, y.to(device), reduction="none")  # (B,)
            loss = pruner.update(index, losses, entropy(logits))  # prune
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}: {pruner.step:,} steps, {time.perf_counter() - began:.0f} s, loss {loss:.2f}"
        )
    model.eval()
    with torch.inference_mode():
        tests = DataLoader(Images(test, v2.Identity()), 256)
        right = torch.cat([model(x.to(device)).argmax(1).cpu() == y for x, y in tests])
    print(f"test accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
