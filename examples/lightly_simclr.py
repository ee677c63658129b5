"""Data pruning in lightly's SimCLR, its examples/pytorch_lightning/simclr.py with the lines marked `# prune`.

    python examples/lightly_simclr.py         # CIFAR-10 from torchvision, or --data: a folder of it
    python examples/lightly_simclr.py --data CIFAR10 --images 2000 --epochs 6
    36 steps, kNN accuracy 25.9%              # --fraction 0: 42 steps, 27.8%
docs/your_loop.md says what they mean.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import to_pil_image

from linear_eval import extract_features, knn_accuracy
from ssl_emp.data.images import load_images
from ssl_emp.plugins.lightning import PruningCallback
from ssl_emp.prune import Emp, Pruner, closeness


class SimCLR(pl.LightningModule):
    def __init__(self, pruner: Pruner) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
        self.projection_head = SimCLRProjectionHead(512, 2048, 2048)
        self.criterion = NTXentLoss()
        self.criterion.cross_entropy.reduction = "none"  # prune: a loss of every view, (2B,)
        self.pruner = pruner

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        (x0, x1), _, _, index = batch  # prune: the index comes last
        h0, h1 = self.backbone(x0), self.backbone(x1)
        losses = self.criterion(self.projection_head(h0), self.projection_head(h1))
        return self.pruner.update(index, losses, closeness(h0, h1))  # prune

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.06)


class Pictures(list[Any]):  # PIL images and labels; lightly sets `transform`, as on torchvision's datasets
    transform: Any = None

    def __getitem__(self, index: Any) -> Any:
        picture, label = super().__getitem__(index)
        return self.transform(picture), label


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--data", default="cifar10", help="a name, or a folder of images or parquet")
    options.add_argument("--images", type=int, help="so many of each split only: a small run")
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--fraction", type=float, default=0.3, help="of a pruned epoch, left out")
    args = options.parse_args(argv)
    pl.seed_everything(0)
    train, test = (load_images(args.data, split, max_images=args.images) for split in ("train", "test"))
    pictures = Pictures(zip(map(to_pil_image, train.pixels[:]), train.labels, strict=True))
    dataset = LightlyDataset.from_torch_dataset(pictures, SimCLRTransform(input_size=32, gaussian_blur=0))
    # prune: three lines, of which the first gives the score's two terms equal say, whatever their scale
    emp = Emp(memory="standardized", beta=1.0)
    pruner = Pruner(dataset, batch_size=args.batch, epochs=args.epochs, policy=emp, fraction=args.fraction)
    loader = DataLoader(pruner.indexed(dataset), args.batch, sampler=pruner.sampler(), num_workers=2)
    model = SimCLR(pruner)
    pl.Trainer(max_epochs=args.epochs, callbacks=[PruningCallback(pruner)]).fit(model, loader)  # prune
    model.eval().cpu()
    bank, queries = (extract_features(model.backbone, one.pixels, one.labels) for one in (train, test))
    found = knn_accuracy(bank, queries, num_neighbors=20, temperature=0.1)
    print(f"{pruner.step:,} steps, kNN accuracy {found:.1%}")


if __name__ == "__main__":
    main()
