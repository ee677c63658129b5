"""Features of a frozen encoder, computed once and kept on the CPU."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linear_eval.errors import EvalError
from linear_eval.files import replacing

__all__ = [
    "EvalError",
    "Features",
    "Pixels",
    "check_features",
    "check_frozen",
    "check_splits",
    "content_hash",
    "extract_features",
    "load_features",
    "save_features",
]

BATCH_SIZE = 256  # images a forward pass


class Pixels(Protocol):
    """Images as a tensor, or what gives tensors of them: (N, 3, H, W) uint8, `pixels[a:b]` on the CPU."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """What an encoder makes of one split.

    Attributes:
        x: (N, D) float32 on the CPU, one row per image.
        y: (N,) int64 on the CPU, class ids >= 0; or (N, C) of several labels: 1, 0, -1 not counted.
    """

    x: Tensor
    y: Tensor


def extract_features(
    encoder: nn.Module,
    pixels: Pixels,
    labels: Tensor | None,
    *,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    distribute: Callable[[int, Callable[[range], Tensor]], Tensor] | None = None,
) -> Features:
    """Runs a frozen encoder over all images, without gradients and without augmentation.

    Args:
        encoder: (B, 3, H, W) float32 in [0, 1] -> (B, D); in eval mode and already on `device`; it is not
            changed.
        pixels: (N, 3, H, W) uint8, on the CPU; may be backed by a file, only one batch is read at a time.
        labels: (N,) class ids, or (N, C) of images with several labels; see `Features`.
        batch_size: images per forward pass; changes features by rounding only.
        device: where the forward pass runs; batches travel there as uint8.
        progress: called as `progress(images_done, N)` after each batch.
        distribute: how several processes share the work: called as `distribute(N, rows_of)`, it calls
            `rows_of(range of images)` -> (n, D) and returns the rows of all images, (N, D). It must cut at
            multiples of `batch_size`: how many images are in a batch changes the rounding.

    Raises:
        EvalError: no images or labels, an encoder in training mode or elsewhere, non-finite features.
    """
    if labels is None:
        fix = "give labels: features are judged by how well they predict them"
        raise EvalError("the images have no labels", fix)
    if len(pixels.shape) != 4 or pixels.dtype != torch.uint8 or len(pixels) != len(labels):
        fix = "give (N, 3, H, W) uint8 pixels and a label for each"
        raise EvalError(f"pixels are {tuple(pixels.shape)} {pixels.dtype}, labels {tuple(labels.shape)}", fix)
    if len(pixels) == 0:
        raise EvalError("there are no images", "give at least one image")
    device = check_frozen(encoder, device)

    def rows_of(images: range) -> Tensor:
        rows = [torch.empty(0, 0)]
        with torch.inference_mode():
            for start in images[::batch_size]:
                batch = pixels[start : min(start + batch_size, images.stop)].to(device).float() / 255
                rows.append(encoder(batch).float().cpu())  # (B, 3, H, W) -> (B, D)
                if progress is not None:
                    progress(min(start + batch_size, len(pixels)), len(pixels))
        # outside of inference mode: inference tensors could not be used to fit a linear layer
        return torch.cat(rows[1:] or rows)

    x = rows_of(range(len(pixels))) if distribute is None else distribute(len(pixels), rows_of)
    features = Features(x, labels.detach().cpu().long())
    check_features(features, "extracted", multi_label=labels.ndim == 2)
    return features


def content_hash(pixels: Pixels) -> str:
    """SHA-256 (hex) over the shape and all pixels (N, 3, H, W) uint8, read 256 images at a time.

    Pixels kept compressed may have a method `content_hash` of their own, which takes their bytes as they lie.
    """
    own = getattr(pixels, "content_hash", None)
    if own is not None:
        return own()
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for start in range(0, len(pixels), 256):  # in parts: the file may be larger than memory
        digest.update(pixels[start : start + 256].contiguous().numpy().data)
    return digest.hexdigest()


def check_frozen(encoder: nn.Module, device: str | torch.device) -> torch.device:
    """The device; raises EvalError unless the encoder is in eval mode and on it."""
    training = [name or type(module).__name__ for name, module in encoder.named_modules() if module.training]
    if training:
        fix = "call encoder.eval() first"
        raise EvalError(f"the encoder is in training mode ({len(training)} modules)", fix)
    device = torch.device(device)
    elsewhere = {parameter.device.type for parameter in encoder.parameters()} - {device.type}
    if elsewhere:
        fix = f"call encoder.to('{device}') first"
        raise EvalError(f"the encoder is on {min(elsewhere)}, device is {device}", fix)
    return device


def load_features(path: Path, labels: Tensor) -> Features | None:
    """What `save_features` kept in `path`, mapped into memory and not copied, with these labels.

    The path must name all that the features depend on: encoder, images, size. None where there is no file, it
    cannot be read, or it holds another number of rows.
    """
    with suppress(SafetensorError, OSError, KeyError):
        x = load_file(path)["x"] if path.is_file() else None
        if x is not None and len(x) == len(labels):
            return Features(x, labels.detach().cpu().long())
    return None


def save_features(path: Path, features: Features) -> None:
    """Keep the rows for `load_features` (safetensors). A full disk costs the cache, not the result."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(
            path, shared=True
        ) as file:  # save_file takes a path; `save` would hold a second copy in memory
            save_file({"x": features.x.contiguous()}, file.name)


def check_splits(train: Features, test: Features, *, multi_label: bool = False) -> None:
    """Raises EvalError unless both splits pass `check_features` and are of equal width."""
    check_features(train, "train", multi_label=multi_label)
    check_features(test, "test", multi_label=multi_label)
    if train.x.shape[1] != test.x.shape[1]:
        what = f"train features have {train.x.shape[1]} columns, test features {test.x.shape[1]}"
        raise EvalError(what, "use one encoder and one image size for both")


def check_features(features: Features, name: str, *, multi_label: bool = False) -> None:
    """Raise EvalError unless `features` are finite (N, D) with N > 0 labels >= 0; `name` says which split.

    `multi_label`: labels are (N, C) of 1, 0 and -1 instead.
    """
    x, y = features.x, features.y
    if y is None:
        raise EvalError(f"the {name} features have no labels", "give labels")
    if x.ndim != 2 or y.ndim != 1 + multi_label or len(y) != len(x):
        fix = f"give (N, D) features and {'(N, C)' if multi_label else '(N,)'} labels"
        raise EvalError(f"the {name} features are {tuple(x.shape)}, their labels {tuple(y.shape)}", fix)
    if len(x) == 0:
        raise EvalError(f"the {name} split is empty", "give at least one image")
    # a row's sum finds suspects in one pass; a sum of finite numbers may overflow, so they are looked at
    suspects = x[~x.sum(dim=1).isfinite()]
    bad_rows = int((~suspects.isfinite().all(dim=1)).sum())
    if bad_rows:
        fix = "use another checkpoint: this encoder has diverged"
        raise EvalError(f"{bad_rows} of {len(x)} {name} features are not finite", fix)
    if multi_label:
        if y.shape[1] == 0 or not ((y >= -1) & (y <= 1)).all():
            fix = "write 1 present, 0 absent, -1 not counted"
            raise EvalError(f"the {name} labels {tuple(y.shape)} are not all 1, 0 or -1", fix)
        return
    unlabeled = int((y < 0).sum())
    if unlabeled:
        fix = "leave out images without a label"
        raise EvalError(f"{unlabeled} of {len(y)} {name} labels are negative", fix)
