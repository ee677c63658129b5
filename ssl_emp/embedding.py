"""Images -> vectors of a frozen encoder (`embed`), and the maps inside it (`FeatureReader`).

Letters: B images, S pixels a side, D features, P patches (places of the last map), C channels of a map.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_emp.data.decode import MAX_PIXELS, cores, pillow_limits
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, OneImage, decode_one

FEATURES = ("pooled", "patches", "stages")
BATCH_SIZE = 256  # images a forward pass
Progress = Callable[[int, int | None], None]
Maps = dict[str, Tensor]
Layout = Literal["NCHW", "NHWC", "NLC"]  # NLC: tokens, of which the first is the class token


# ---- one batch


class FeatureReader:
    """uint8 images (B, 3, S, S) -> column -> float32 on the CPU, all from one forward pass of the encoder.

    `vector` (B, D) is what the encoder gives. `patches` (B, P, C) are the places of the last map before the
    pooling, row by row. `stage_1`, `stage_2`, ... (B, C) are the maps that the stages of a convolutional
    network end with, or the blocks of a transformer, each averaged over its places. Class tokens and the like
    are no places.

    Args:
        encoder: in eval mode, with `mean` and `std` and a `backbone` (or `network`) behind them.
        features: one of FEATURES.
        image_size: S.
        bf16: whether the forward pass is autocast to bfloat16.

    Attributes:
        shapes: column -> shape without B, found by a forward pass of one image.
        grid: (rows, columns) of `patches`, or None.

    Raises:
        UserError: the network is not one whose maps can be read.
    """

    def __init__(
        self, encoder: nn.Module, features: str = "pooled", *, image_size: int, bf16: bool = False
    ) -> None:
        self.encoder, self.features, self.bf16 = encoder, features, bf16
        self.device = next((tensor.device for tensor in encoder.buffers()), torch.device("cpu"))
        self.taps: list[Tap] = []
        if features != "pooled" and not is_timm(backbone_of(encoder)):
            with torch.inference_mode():
                self.taps = find_taps(backbone_of(encoder), features, self.device)
        grey = torch.full((1, 3, image_size, image_size), 128, dtype=torch.uint8)
        found = self(grey)
        self.shapes = {name: tuple(rows.shape[1:]) for name, rows in found.items()}
        side = math.isqrt(self.shapes["patches"][0]) if "patches" in found else 0
        self.grid = (side, side) if side else None
        with torch.inference_mode():
            plain = self._autocast(encoder, grey.to(self.device).float() / 255).float().cpu()
        if (plain - found["vector"]).abs().max() > 0.05 * plain.abs().max():
            raise _no_maps(backbone_of(encoder), features)

    def __call__(self, images: Tensor) -> Maps:
        with torch.inference_mode():
            pixels = images.to(self.device).float() / 255
            found = self._autocast(self._read, pixels)
            found = {name: rows.float().cpu() for name, rows in found.items()}
        # copied outside of inference mode: inference tensors could not be trained on
        return {name: rows.clone() for name, rows in found.items()}

    def _autocast(self, forward: Callable[[Tensor], Any], pixels: Tensor) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return forward(pixels)

    def _read(self, pixels: Tensor) -> Maps:
        if self.features == "pooled":
            return {"vector": self.encoder(pixels)}
        network = backbone_of(self.encoder)
        if is_timm(network):
            vector, maps = _timm_maps(network, _normalised(self.encoder, pixels), self.features)
        else:
            with _tapped(self.taps) as maps:
                vector = self.encoder(pixels)
        if self.features == "patches":
            return {"vector": vector, "patches": maps[-1]}
        return {"vector": vector} | {
            f"stage_{number}": places.float().mean(1) for number, places in enumerate(maps, 1)
        }


def backbone_of(encoder: nn.Module) -> nn.Module:
    """The network behind an encoder's input normalisation."""
    found = getattr(encoder, "backbone", None) or getattr(encoder, "network", None)
    assert isinstance(found, nn.Module), type(encoder)
    return found


def uses_bf16(device: torch.device) -> bool:
    """Whether forward passes on a device run in bfloat16: on GPUs that have it, none that only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _normalised(encoder: nn.Module, pixels: Tensor) -> Tensor:
    mean, std = encoder.mean, encoder.std
    assert isinstance(mean, Tensor) and isinstance(std, Tensor)
    return (pixels - mean) / std


def _no_maps(network: nn.Module, features: str) -> UserError:
    what = f"the {features} of a network of type {type(network).__name__} cannot be read"
    fix = "leave --features out, or take a ResNet of ours or a network of timm or torchvision"
    return UserError(what, fix)


# ---- maps inside a network


def is_timm(network: nn.Module) -> bool:
    return hasattr(network, "forward_intermediates") and hasattr(network, "forward_head")


def _timm_maps(network: Any, images: Tensor, features: str) -> tuple[Tensor, list[Tensor]]:
    """(vector (B, D), maps (B, P, C) of the blocks) of a timm model, without its prefix tokens."""
    last_alone: dict[str, Any] = {"indices": 1, "norm": True} if features == "patches" else {}
    try:
        final, maps = network.forward_intermediates(images, output_fmt="NCHW", **last_alone)
        vector = network.forward_head(final)
    except (RuntimeError, AssertionError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _no_maps(network, features) from error
    if features == "patches" and final.ndim == 4:  # what is pooled, where that comes after the last block
        return vector, [_places(final, getattr(network, "output_fmt", "NCHW"))]
    return vector, [_places(found, "NCHW") for found in maps]


@dataclass(frozen=True)
class Tap:
    """Where a map is read: what `module` gives, or is given."""

    module: nn.Module
    layout: Layout = "NCHW"
    is_input: bool = False


def find_taps(network: nn.Module, features: str, device: torch.device) -> list[Tap]:
    """The taps of one of our ResNets or a torchvision model, from input to output. Raises UserError."""
    from torchvision import models

    named = dict(network.named_children())
    if isinstance(network, models.VisionTransformer):
        layers = list(network.encoder.layers)
        return [Tap(layer, "NLC") for layer in ([network.encoder] if features == "patches" else layers)]
    if features == "patches":
        # the map is what is pooled
        for name in ("avgpool", "features", "conv5", "layers"):
            if name in named:
                return [Tap(named[name], is_input=name == "avgpool")]
        if "blocks" in named:
            return [Tap(list(named["blocks"].children())[-1])]
        raise _no_maps(network, features)
    stages = [module for name, module in named.items() if name in ("layer1", "layer2", "layer3", "layer4")]
    stages = stages or [named[name] for name in ("stage2", "stage3", "stage4") if name in named]
    if stages:
        return [Tap(stage) for stage in stages]
    layout: Layout = "NHWC" if isinstance(network, models.SwinTransformer) else "NCHW"
    for name in ("features", "trunk_output", "layers", "blocks"):
        if name in named:
            return _last_of_each_size(network, [Tap(part, layout) for part in named[name].children()], device)
    raise _no_maps(network, features)


def _last_of_each_size(network: nn.Module, taps: list[Tap], device: torch.device) -> list[Tap]:
    """Of parts that follow each other, those after which the map gets smaller, and the last."""
    # of this size every stage has a size of its own; smaller images would end in several maps of one pixel
    with _tapped(taps) as maps:
        network(torch.zeros(1, 3, 224, 224, device=device))
    places = [found.shape[1] for found in maps]
    return [tap for tap, here, after in zip(taps, places, [*places[1:], 0], strict=True) if here != after]


@contextmanager
def _tapped(taps: Sequence[Tap]) -> Iterator[list[Tensor]]:
    """A list that a forward pass in here fills with maps (B, P, C), one a tap."""
    maps: list[Tensor] = []

    def keep(tap: Tap, given: tuple[Any, ...], result: Any) -> None:
        found = given[0] if tap.is_input else result
        maps.append(_places(found, tap.layout))

    with ExitStack() as stack:
        for tap in taps:
            hook = tap.module.register_forward_hook(
                lambda module, given, result, tap=tap: keep(tap, given, result)
            )
            stack.callback(hook.remove)
        yield maps


def _places(found: Tensor, layout: str) -> Tensor:
    """A map as (B, P, C), its places row by row."""
    if layout == "NLC":
        return found[:, 1:]
    return found.flatten(2).transpose(1, 2) if layout == "NCHW" else found.flatten(1, 2)


# ---- images of any kind and number


def embed(
    encoder: Encoder,
    images: Iterable[OneImage],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """See `Encoder.embed`."""
    if isinstance(images, str | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    ):
        kind = type(images).__name__
        fix = "give a list: [image]; a folder is what `ssl-emp embed` takes"
        raise TypeError(f"images are one {kind}, not several images. fix: {fix}")
    if not isinstance(images, Iterable):
        fix = "give a list of paths, PIL images or (H, W, 3) uint8 pixels"
        raise TypeError(f"images are of type {type(images).__name__}. fix: {fix}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}. fix: give a whole number of at least 1")
    total = len(images) if isinstance(images, Sized) else None
    rows: list[Tensor] = []
    done = 0
    decode = partial(decode_one, image_size=encoder.image_size, max_pixels=max_pixels)
    with _frozen(encoder), pillow_limits(max_pixels), ThreadPoolExecutor(min(32, cores())) as pool:
        reader: FeatureReader | None = None
        waiting = iter(images)
        while batch := list(islice(waiting, batch_size)):
            names = [f"image {number}" for number in range(done, done + len(batch))]
            decoded = pool.map(lambda image, name: decode(image, name=name), batch, names)
            pixels = np.empty((len(batch), 3, encoder.image_size, encoder.image_size), np.uint8)
            for place, image in enumerate(decoded):
                pixels[place] = image  # np.stack would keep the strides of (H, W, 3), and round otherwise
            if reader is None:
                bf16 = uses_bf16(encoder.mean.device)
                reader = FeatureReader(encoder, image_size=encoder.image_size, bf16=bf16)
            rows.append(reader(torch.from_numpy(pixels))["vector"])
            done += len(batch)
            if progress is not None:
                progress(done, total)
    if not rows:
        raise ValueError("there are no images. fix: give at least one")
    return torch.cat(rows)


@contextmanager
def _frozen(encoder: nn.Module) -> Iterator[None]:
    """The encoder in eval mode, and each of its modules afterwards as it was."""
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
