"""The network f and g of SimCLR (arXiv 2002.05709): a backbone and lightly's projection head.

Letters: B images, D features, P projections.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from linear_eval.errors import first_line
from ssl_emp.backbones import build, feature_dim, is_own, rebuild, resolve_stem
from ssl_emp.config import NetworkArgs, Section
from ssl_emp.data.decode import MAX_PIXELS, decode_any, pillow_limits, reason
from ssl_emp.errors import UserError
from ssl_emp.safe_files import check_regular, read_json, write_atomically
from ssl_emp.text import resume_command

ROUNDING = 1e-3  # allowed beyond [0, 1]: rounding errors of resizing; no mistake of scaling is that small
FLOATS = ("F16", "BF16", "F32", "F64")  # names of types in safetensors
LARGEST_WEIGHTS = 1 << 36  # bytes; the largest network that a config allows has 6 GiB


class _Spec(Section):
    """The description of the network in an encoder's config.json, with the limits of a run's config."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)

    arch: Annotated[str, Field(max_length=250)]
    width: Annotated[int, Field(ge=1, le=512)] | None = None
    stem: Literal["auto", "cifar", "imagenet"] | None = None
    args: NetworkArgs = {}
    image_size: Annotated[int, Field(ge=1, le=4096)]
    mean: Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(min_length=3, max_length=3)]

    @model_validator(mode="after")
    def _whole(self) -> "_Spec":
        if is_own(self.arch) and None in (self.width, self.stem):
            raise ValueError("width or stem is missing")
        return self


OneImage = str | os.PathLike[str] | Image.Image | np.ndarray


class Encoder(nn.Module):
    """f with its input normalisation: images (B, 3, H, W) float in [0, 1] -> features (B, D) float32.

    Raises TypeError for anything but a tensor of floats (bytes of 0 to 255 would give meaningless features)
    and ValueError for another shape. With `checks_range`, values beyond [0, 1] are a ValueError too; that
    check is cheap beside the forward pass, but on a GPU it waits for the images. Training and evaluation,
    whose images are bytes divided by 255, go without it. Nothing is checked while the network is compiled,
    exported, traced or captured.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        image_size: int,
        mean: list[float],
        std: list[float],
        spec: dict[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.image_size = image_size
        self.spec = spec  # arch, and width and stem, or args: what builds this network again
        self.checks_range = False
        # not part of the state: config.json has mean and std
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.checks_range)
        return self.backbone((images.to(self.mean.dtype) - self.mean) / self.std).float()

    def preprocess(self, images: OneImage | Sequence[OneImage], *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Images as input of `forward`, with exactly the pixels that evaluate.py uses.

        EXIF rotation, then the short side scaled to `image_size` S (bicubic, antialiased), a centre crop.

        Args:
            images: a file, a PIL image, (H, W), (H, W, 3) or (H, W, 4) uint8 pixels; or a list of them. A
                PIL image that is not decoded yet is decoded like its file. A decoded one can differ by about
                one level of 255, because a large JPEG file is reduced while it is decoded.
            max_pixels: files that declare more are refused.

        Returns:
            (3, S, S) float32 in [0, 1] on the CPU, or (B, 3, S, S) for a list.

        Raises:
            UserError: a file that cannot be read as an image.
            TypeError, ValueError: neither a file nor an image, or no image at all.
        """
        return preprocess(images, self.image_size, max_pixels)

    def embed(
        self,
        images: Iterable[OneImage],
        *,
        batch_size: int = 256,
        progress: Callable[[int, int | None], None] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Tensor:
        """The vectors of any number of images, decoded a batch at a time: those of `ssl-emp embed`.

        Runs in eval mode and without gradients, and leaves the module as it was. On a GPU that has bfloat16
        the forward pass uses it.

        Args:
            images: an iterable of files, PIL images and uint8 pixels, as `preprocess` takes them; a generator
                is read as it is needed.
            batch_size: images a forward pass; changes vectors by rounding only.
            progress: called with (images done, all images) after each batch; None where their number is not
                known.
            max_pixels: files that declare more are refused.

        Returns:
            (N, D) float32 on the CPU, in the order of the images.

        Raises:
            UserError: an image that cannot be read, by its name or its place (from 0).
            TypeError, ValueError: what is no image; one image alone; no image at all.
        """
        from ssl_emp.embedding import embed

        return embed(self, images, batch_size=batch_size, progress=progress, max_pixels=max_pixels)


def preprocess(
    images: OneImage | Sequence[OneImage], image_size: int, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """See `Encoder.preprocess`."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not len(images):
            raise ValueError("there are no images. fix: give at least one")
        return torch.stack([preprocess(image, image_size, max_pixels) for image in images])
    return torch.from_numpy(decode_one(images, image_size, max_pixels).copy()).float() / 255


def decode_one(
    image: OneImage, image_size: int, max_pixels: int = MAX_PIXELS, name: str = "the image"
) -> np.ndarray:
    """(3, S, S) uint8 of one image; errors as of `Encoder.preprocess`, with `name` for what is no file."""
    if isinstance(image, np.ndarray):
        shape = image.shape
        is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
        if image.dtype != np.uint8 or not is_image or not image.size:
            fix = "give (H, W, 3) uint8 of one image, or a list of them"
            which = "pixels" if name == "the image" else f"pixels of {name}"
            raise ValueError(f"{which} are {shape} {image.dtype}. fix: {fix}")
    elif not isinstance(image, str | os.PathLike | Image.Image):
        fix = "give a path, a PIL image, or (H, W, 3) uint8 pixels"
        which = "an image" if name == "the image" else name
        raise TypeError(f"{which} is of type {type(image).__name__}. fix: {fix}")
    image = os.path.expanduser(os.fspath(image)) if isinstance(image, str | os.PathLike) else image
    try:
        with pillow_limits(max_pixels):
            return decode_any(image, image_size, max_pixels)
    except Exception as error:  # Pillow raises a dozen types
        name = image if isinstance(image, str) else name
        fix = "give a file that holds an image"
        raise UserError(f"{name} cannot be read ({reason(error)})", fix) from error


def check_images(images: Tensor, check_range: bool) -> None:
    """Raise TypeError or ValueError unless images are (B, 3, H, W) floats, in [0, 1] if asked for."""
    if not torch.jit.is_tracing():
        _check_images(images)
        if check_range and not torch.compiler.is_compiling() and images.numel():
            _check_range(images)


def _check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless images are (B, 3, H, W) floats; reads no value."""
    if not isinstance(images, Tensor):
        fix = "give a tensor; encoder.preprocess(image or path) makes one"
        raise TypeError(f"images are of type {type(images).__name__}. fix: {fix}")
    if not images.is_floating_point():
        fix = "give floats in [0, 1], such as images.float() / 255, or encoder.preprocess(image or path)"
        raise TypeError(f"images are {str(images.dtype).removeprefix('torch.')}. fix: {fix}")
    if images.ndim == 4 and images.shape[1] == 3:
        return
    fix = "give (B, 3, H, W)"
    if images.ndim == 3:
        fix += ", such as images[None] for one image"
    elif images.ndim == 4 and images.shape[3] == 3:
        fix += ", such as images.permute(0, 3, 1, 2)"
    elif images.ndim == 4 and images.shape[1] == 1:
        fix += ", such as images.expand(-1, 3, -1, -1) for grey ones"
    elif images.ndim == 4 and images.shape[1] == 4:
        fix += ", such as images[:, :3]: the fourth channel is none of colour"
    raise ValueError(f"images are {tuple(images.shape)}. fix: {fix}")


def _check_range(images: Tensor) -> None:
    """Raise ValueError unless all values are in [0, 1], up to rounding. Waits for the device."""
    if images.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    slack = max(ROUNDING, 2 * torch.finfo(images.dtype).eps)
    if -slack <= low and high <= 1 + slack:  # false for nan
        return
    fix = "leave out Normalize: the encoder normalises by itself"
    if not (math.isfinite(low) and math.isfinite(high)):
        fix = "look for what made values that are no numbers"
    elif -0.5 <= low and high <= 1.5:
        fix = "images.clamp(0, 1): resizing by cubic curves goes beyond the values that there were"
    elif -slack <= low:
        fix = "divide by 255, or by the largest value that there can be"
    raise ValueError(f"images lie in [{low:.4g}, {high:.4g}], not in [0, 1]. fix: {fix}")


def build_encoder(
    arch: str | nn.Module,
    width: int | None,
    stem: str | None,
    image_size: int,
    mean: list[float],
    std: list[float],
    args: Mapping[str, Any] | None = None,
) -> Encoder:
    """An untrained encoder, initialised from torch's global generator.

    Args:
        arch: `resnet18`, `resnet34`, `resnet50`, `timm:NAME`, `torchvision:NAME`, or a network, normalised
            images (B, 3, S, S) -> (B, D), which is taken as it is.
        width: of the three: channels of the first stage; 64 is the published network, a multiple of 8
            otherwise.
        stem: of the three: `auto`, `cifar` or `imagenet`, see `ssl_emp.backbones.resolve_stem`.
        image_size: pixels a side that the encoder is trained on.
        mean, std: three numbers each, of images in [0, 1].
        args: of timm's and torchvision's: what their constructor gets.

    Raises:
        UserError: no such network, or one that gives no features (B, D) of such images.
    """
    backbone, spec = build(arch, image_size, width, stem, args)
    dim = feature_dim(backbone, image_size, spec["arch"])
    return Encoder(backbone, dim, image_size, list(mean), list(std), spec)


class SimCLR(nn.Module):
    """f and g: normalised views (M, 3, S, S) -> h = f(x) (M, D), z = g(h) (M, P), neither L2-normalised."""

    def __init__(self, encoder: Encoder, projection_hidden: int, projection_dim: int) -> None:
        # imported here: it takes seconds, and loading an encoder does not need it
        from lightly.models.modules.heads import SimCLRProjectionHead

        super().__init__()
        self.backbone = encoder.backbone
        self.projector = SimCLRProjectionHead(encoder.feature_dim, projection_hidden, projection_dim)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(views)
        return h, self.projector(h)


def save_encoder(encoder: Encoder, folder: Path, epochs: int | None = None) -> None:
    """Write `model.safetensors` and `config.json`, each through a temporary file, in timm's local-dir layout.

    Where the network is timm's, or a published ResNet (width 64, ImageNet stem),
    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same features; the key `ssl_emp` is for
    `load_encoder` of all others. `epochs`: of the plan that has ended, for a run that is extended later.
    """
    folder.mkdir(exist_ok=True)
    # six digits: 0.485 as float32 and back is 0.485, not 0.48500001430511475
    mean, std = (
        [round(value, 6) for value in stat.flatten().tolist()] for stat in (encoder.mean, encoder.std)
    )
    size, spec = encoder.image_size, encoder.spec
    about = getattr(encoder.backbone, "pretrained_cfg", None) if spec["arch"].startswith("timm:") else None
    usual = {"fixed_input_size": False, "pool_size": None, "first_conv": "conv1", "classifier": "fc"}
    own = {key: about[key] for key in usual if key in about} if isinstance(about, Mapping) else usual
    config = {
        "architecture": spec["arch"].removeprefix("timm:"),
        "num_classes": 0,
        "num_features": encoder.feature_dim,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": 0,
            **own,
        },
        "model_args": spec.get("args", {}),
        "ssl_emp": {**spec, "image_size": size, "mean": mean, "std": std}
        | ({} if epochs is None else {"epochs": epochs}),
    }
    # clone: of tensors that share their memory safetensors takes one only
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in encoder.backbone.state_dict().items()
    }
    # safetensors' save_file would neither sync the file nor raise OSError on a full disk
    write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_encoder(
    path: str | os.PathLike[str], *, check_range: bool = True, backbone: nn.Module | None = None
) -> Encoder:
    """The frozen encoder of a run directory or an encoder directory, in eval mode on the CPU.

    Args:
        path: a run directory (`RUN/encoder` is read) or a directory with `model.safetensors` and
            `config.json`.
        check_range: refuse values beyond [0, 1]. On a GPU each call then waits for its images; where they
            are known to be right, False saves that.
        backbone: of a run whose network was a module from Python: one like it, which gets the weights.

    Returns:
        A module, images (B, 3, H, W) float in [0, 1] -> (B, D) float32 features. It normalises its input; its
        `preprocess` makes such images from files, PIL images and pixels.

    Raises:
        UserError: files missing or unreadable, or weights that do not match the network key by key.
    """
    folder = Path(os.path.expanduser(path))
    fix = "give a run directory or an encoder directory that pretraining wrote"
    if os.path.isfile(folder / "config.yaml"):  # unlike Path's it is silent where a name is too long
        fix = f"write it again from the run's last checkpoint: {resume_command(folder)}"
    folder = folder / "encoder" if os.path.isdir(folder / "encoder") else folder
    spec, found = _read_headers(folder, fix)
    if spec["stem"] is not None:
        spec["stem"] = resolve_stem(spec["stem"], spec["image_size"])
    # without memory, whatever size config.json claims
    tensors = _rebuilt(spec, backbone, folder, meta=True).state_dict()
    shapes = {name: (tuple(x.shape), x.is_floating_point()) for name, x in tensors.items()}
    differing = sorted(set(shapes) ^ set(found)) or sorted(
        name for name, (shape, kind) in found.items() if shapes[name] != (shape, kind in FLOATS)
    )
    if differing:
        width = f" of width {spec['width']}" if spec["width"] else ""
        name = spec["arch"] if backbone is None else f"a {type(backbone).__name__}"
        raise UserError(
            f"the weights in {folder} do not fit {name}{width}, first at {differing[0]}",
            fix if fix.startswith("write") else "give the config.json that was written with these weights",
        )
    network = _rebuilt(spec, backbone, folder)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    size = spec["image_size"]
    dim = feature_dim(network, size, spec["arch"])
    built = {
        key: spec[key] for key in (("arch", "width", "stem") if is_own(spec["arch"]) else ("arch", "args"))
    }
    encoder = Encoder(network, dim, size, spec["mean"], spec["std"], built)
    encoder.checks_range = check_range
    return encoder.eval().requires_grad_(False)


def _rebuilt(spec: dict[str, Any], backbone: nn.Module | None, folder: Path, meta: bool = False) -> nn.Module:
    """The network of a config.json, or `backbone` where it is one from Python. UserError if there is none."""
    if backbone is not None and not spec["arch"].startswith("custom:"):
        what = f"the encoder in {folder} is {spec['arch']}, which needs no network from outside"
        raise UserError(what, "leave backbone out")
    if backbone is not None:
        return backbone.cpu()
    try:
        return rebuild(spec, meta)
    except UserError as error:
        what, _, fix = str(error).partition(". fix: ")
        raise UserError(f"the encoder in {folder} cannot be built: {what}", fix) from error
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        raise UserError(
            f"the encoder in {folder} cannot be built: {what}", fix or "correct config.json"
        ) from error
    except Exception as error:  # timm and torch have no common error
        what = f"the encoder in {folder} cannot be built ({type(error).__name__}: {first_line(error)})"
        raise UserError(what, "use the versions of the packages that it was written with") from error


def _read_headers(folder: Path, fix: str) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]:
    """(arguments of `build_encoder`, weight -> shape and type) of a directory. Raises UserError."""
    for name in ("config.json", "model.safetensors"):
        if not os.path.isfile(folder / name):
            raise UserError(f"no encoder in {folder}: {name} is missing", fix)
    try:
        spec = _Spec.model_validate(read_json(folder / "config.json")["ssl_emp"]).model_dump()
        check_regular(folder / "model.safetensors", LARGEST_WEIGHTS)
        # reads the header and compares it with the size of the file
        with safe_open(folder / "model.safetensors", "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{folder / 'config.json'} is damaged (ssl_emp.{key}: {first['msg']})"
        raise UserError(what, fix) from error
    except UserError:
        raise
    # json, safetensors and key errors have no common base class; each means a damaged export
    except Exception as error:
        what = f"the encoder in {folder} cannot be read ({type(error).__name__}: {error})"
        raise UserError(what, fix) from error
    return spec, found
