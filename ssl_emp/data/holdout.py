"""A part of labelled images held out for testing, where they come without a test split."""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from ssl_emp.data.images import ImageSet


def held_out_rows(labels: Tensor, names: list[str], share: float, seed: int) -> Tensor:
    """(N,) bool, True where an image is held out: a share of every class, chosen by a hash of (seed, name).

    The same on every machine and for every order of the images. At least two images of a class stay in train,
    so that a probe can choose its settings on one of them.

    Args:
        labels: (N,) class ids.
        names: N different names.
        share: of each class, in [0, 1]; the number of images is rounded.
    """
    keys = [
        hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogateescape"), digest_size=8).digest()
        for name in names
    ]
    classes: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        classes.setdefault(label, []).append(row)
    held = torch.zeros(len(names), dtype=torch.bool)
    for rows in classes.values():
        count = max(0, min(round(share * len(rows)), len(rows) - 2))
        held[sorted(rows, key=keys.__getitem__)[:count]] = True
    return held


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, test) parts of labelled images, see `held_out_rows`. Tensors are copied."""
    assert images.labels is not None
    held = held_out_rows(images.labels, images.names, share, seed)
    return choose(images, (~held).nonzero().flatten()), choose(images, held.nonzero().flatten())


def choose(images: ImageSet, rows: Tensor) -> ImageSet:
    """The images at `rows` (K,), ascending."""
    pixels = images.pixels
    chosen = pixels[rows] if isinstance(pixels, Tensor) else replace(pixels, spans=pixels.spans[rows.numpy()])
    names = [images.names[row] for row in rows.tolist()]
    labels = None if images.labels is None else images.labels[rows]
    return replace(images, pixels=chosen, labels=labels, names=names, skipped=[], dim=[], path=None)
