"""A kept classifier: encoder, linear head and names of the classes, in a folder that needs nothing else.

The folder: `model.safetensors` (tensors `encoder.*` and `head.*`) and `config.json`, which says what they are
of and holds their SHA-256. Nothing in it is run, and its sizes are checked before any of it is used.

Letters: B images, S pixels a side, D features, C classes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from linear_eval.errors import first_line
from linear_eval.linear import LinearHead
from ssl_emp._version import __version__
from ssl_emp.backbones import is_own, rebuild
from ssl_emp.commands.subjects import Normalized, Pixels
from ssl_emp.config import NetworkArgs, Section
from ssl_emp.data.decode import MAX_PIXELS
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, OneImage, check_images, preprocess
from ssl_emp.safe_files import check_regular, inner_folder, read_json, write_atomically
from ssl_emp.text import command_line

KIND = "ssl_emp classifier"
Three = Annotated[list[float], Field(min_length=3, max_length=3)]


class ClassifierConfig(Section):
    """`config.json`."""

    kind: Literal["ssl_emp classifier"]
    format: Literal[1]
    written_by: str
    family: Literal["ssl_emp", "timm", "torchvision", "pixels"]  # who builds the encoder
    # its name in that family
    architecture: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_.]*$")]
    width: Annotated[int, Field(ge=8, le=512, multiple_of=8)] | None  # of a WidthResNet
    stem: Literal["cifar", "imagenet"] | None
    args: NetworkArgs = {}  # of timm's and torchvision's: what their constructor got
    mean: Three | None  # of pixels in [0, 1]; the encoder normalises by them
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] | None
    image_size: Annotated[int, Field(ge=1, le=4096)]
    bf16: bool  # the encoder's forward pass
    class_names: Annotated[list[str], Field(min_length=2, max_length=1_000_000)]
    judged: dict[str, str | int | float | None]  # the row that was written with it
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of model.safetensors


class Classifier(nn.Module):
    """Images (B, 3, S, S) float in [0, 1], normalised here -> logits (B, C), in columns `class_names`.

    What is no such image is refused as by `ssl_emp.model.Encoder`; `checks_range` as there.

    Attributes:
        class_names: C names.
        image_size: the S that it was trained on.
        judged: what it was found to do, and on what: the row that was written with it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: LinearHead,
        class_names: list[str],
        image_size: int,
        bf16: bool,
        judged: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.bf16 = encoder, head, bf16
        self.class_names, self.image_size, self.judged = class_names, image_size, dict(judged)
        self.checks_range = False

    def preprocess(self, images: OneImage | Sequence[OneImage], *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """(3, S, S), or (B, 3, S, S) for a list, of files, PIL images or pixels; see
        `ssl_emp.model.Encoder.preprocess`.
        """
        return preprocess(images, self.image_size, max_pixels)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.checks_range)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.encoder(images)
        if features.shape != (len(images), len(self.head.center)):
            what = (
                f"the encoder gives {tuple(features.shape)} for {len(images)} images, the head wants "
                f"{len(self.head.center)} features"
            )
            raise UserError(what, f"give images of {self.image_size}x{self.image_size} pixels")
        return self.head(features.float())


def check_keepable(encoder: nn.Module, name: str) -> None:
    """Raise UserError where an encoder, called `name`, could not be built again from a folder."""
    spec = _describe(encoder, name)
    try:
        expected = _shapes(_skeleton(spec, meta=True))
    except Exception as error:  # libraries raise errors of many types
        raise UserError(f"a classifier on {name} cannot be kept ({error})", "leave save=true out") from error
    if expected != _shapes(_core(encoder)):
        what = f"a classifier on {name} cannot be kept: it is built otherwise with weights than without"
        raise UserError(what, "leave save=true out")


def save_classifier(
    folder: Path,
    encoder: nn.Module,
    name: str,
    head: LinearHead,
    class_names: list[str],
    image_size: int,
    *,
    bf16: bool = False,
    judged: Mapping[str, Any] | None = None,
) -> None:
    """Write `model.safetensors` and `config.json`, each whole or not at all, over what was there.

    Args:
        encoder: an `Encoder`, or what else evaluate.py judges, called `name` there.
        judged: plain values to keep beside it.

    Raises:
        UserError: the folder cannot be written to.
    """
    tensors = {f"encoder.{key}": tensor for key, tensor in _core(encoder).state_dict().items()}
    tensors |= {f"head.{key}": tensor for key, tensor in head.state_dict().items()}
    weights = save(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
    config = {"kind": KIND, "format": 1, "written_by": f"ssl_emp {__version__}"} | _describe(encoder, name)
    config |= {"image_size": image_size, "bf16": bf16}
    config |= {"class_names": class_names, "judged": dict(judged or {})}
    config |= {"sha256": hashlib.sha256(weights).hexdigest()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inner_folder(folder.parent, folder.name)
        write_atomically(folder / "model.safetensors", weights)
        write_atomically(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    except OSError as error:
        fix = "make room or give --out DIR"
        raise UserError(f"cannot write {error.filename or folder} ({error.strerror})", fix) from error


def _how_to_keep_one() -> str:
    command = f"{command_line('evaluate')} RUN finetune finetune.save=true"
    return f"{command} keeps one in RUN/eval/classifier-finetune"


def load_classifier(path: str | os.PathLike[str], *, check_range: bool = True) -> Classifier:
    """The classifier in a folder that `save_classifier` wrote, in eval mode on the CPU, without gradients.

    Args:
        check_range: refuse values beyond [0, 1], which on a GPU waits for the images at each call.

    Raises:
        UserError: files missing, damaged, changed, or that do not fit each other.
    """
    folder = Path(os.path.expanduser(path))
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            inner = sorted(str(found.parent) for found in folder.glob("eval/**/classifier-*/config.json"))
            fix = f"give {' or '.join(inner[:3])}" if inner else _how_to_keep_one()
            raise UserError(f"no classifier in {folder}: {name} is missing", fix)
    values, weights = read_json(folder / "config.json"), folder / "model.safetensors"
    if isinstance(values, dict) and values.get("kind") != KIND:
        what = f"{folder} holds no classifier" + (
            ", but an encoder, which knows no classes" if "ssl_emp" in values else ""
        )
        raise UserError(what, _how_to_keep_one())
    try:
        config = ClassifierConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{folder / 'config.json'} is damaged ({key}: {first['msg']})"
        fix = "keep the classifier again, or take the folder from where it was kept"
        raise UserError(what, fix) from error
    check_regular(weights, 2**40)
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != config.sha256:
        what = f"{weights} is not the file that {folder / 'config.json'} was written with"
        raise UserError(what, "keep the classifier again, or take both files from where it was kept")
    try:
        model = _built(config, weights)
    except UserError:
        raise
    except Exception as error:  # safetensors, timm, torch: they have no common error
        reason = first_line(error)
        what = f"the classifier in {folder} cannot be built ({type(error).__name__}: {reason})"
        raise UserError(what, "keep it again, with the versions of the packages that are here") from error
    model.checks_range = check_range
    return model


def _built(config: ClassifierConfig, weights: Path) -> Classifier:
    spec = config.model_dump()
    with safe_open(weights, "pt") as file:
        found = {
            name: (tuple(part.get_shape()), part.get_dtype())
            for name in file.keys()
            for part in [file.get_slice(name)]
        }
    dim = found.get("head.center", ((), ""))[0]
    kind = found.get("head.weight", ((), ""))[1]
    classes = (len(config.class_names),)
    expected = {f"encoder.{name}": shape for name, shape in _shapes(_skeleton(spec, meta=True)).items()}
    expected |= {"head.center": dim, "head.scale": dim, "head.weight": classes + dim, "head.bias": classes}
    shapes = {name: shape for name, (shape, _) in found.items()}
    differing = sorted(set(expected) ^ set(found)) or sorted(
        name for name in expected if expected[name] != shapes[name]
    )
    differing += [name for name, (_, dtype) in found.items() if name.startswith("head.") and dtype != kind]
    if differing or len(dim) != 1 or kind not in ("F32", "F64"):
        first = (differing or ["head.weight"])[0]
        what = (
            f"the weights in {weights} do not fit a {config.architecture or config.family} with "
            f"{classes[0]} classes, first at {first}"
        )
        raise UserError(what, "take both files from where the classifier was kept")

    tensors = load_file(weights)
    bad = [
        name
        for name, x in tensors.items()
        if name != "head.scale" and x.is_floating_point() and not x.isfinite().all()
    ]
    bad += [] if (tensors["head.scale"] > 0).all() else ["head.scale"]
    if bad:
        fix = "keep a classifier that has not diverged"
        raise UserError(f"{weights} holds no usable numbers, first in {bad[0]}", fix)
    core = _skeleton(spec)
    core.load_state_dict(
        {name.removeprefix("encoder."): x for name, x in tensors.items() if name.startswith("encoder.")}
    )
    head = LinearHead(*(tensors[f"head.{name}"] for name in ("center", "scale", "weight", "bias")))
    encoder: nn.Module
    if config.family == "pixels":
        encoder = Pixels(config.image_size)
    else:
        assert config.mean is not None and config.std is not None
        if config.family == "ssl_emp":
            spec = {"arch": config.architecture, "width": config.width, "stem": config.stem}
            encoder = Encoder(core, dim[0], config.image_size, config.mean, config.std, spec)
        else:
            encoder = Normalized(core, config.mean, config.std)
    model = Classifier(encoder, head, config.class_names, config.image_size, config.bf16, config.judged)
    return model.eval().requires_grad_(False)


# ---- encoders as words


def _core(encoder: nn.Module) -> nn.Module:
    """The part that has weights, without the normalisation before it."""
    if isinstance(encoder, Encoder):
        return encoder.backbone
    return encoder.network if isinstance(encoder, Normalized) else encoder


def _describe(encoder: nn.Module, name: str) -> dict[str, Any]:
    """The entries of `config.json` that say how an encoder is built."""
    spec: dict[str, Any] = {"family": "pixels", "architecture": ""}
    spec |= {"width": None, "stem": None, "args": {}, "mean": None, "std": None}
    if isinstance(encoder, Encoder | Normalized):
        spec |= {"mean": encoder.mean.flatten().tolist(), "std": encoder.std.flatten().tolist()}
    if isinstance(encoder, Encoder) and is_own(encoder.spec["arch"]):
        own = encoder.spec
        spec |= {"family": "ssl_emp", "architecture": own["arch"]}
        return spec | {"width": own["width"], "stem": own["stem"]}
    if isinstance(encoder, Encoder):
        name = encoder.spec["arch"]
        spec |= {"args": encoder.spec.get("args", {})}
    family, _, architecture = name.partition(":")
    if isinstance(encoder, Encoder | Normalized) and family in ("timm", "torchvision"):
        return spec | {"family": family, "architecture": architecture}
    if isinstance(encoder, Pixels):
        return spec
    raise UserError(f"a classifier on {name} cannot be kept", "leave save=true out")


def _skeleton(spec: Mapping[str, Any], meta: bool = False) -> nn.Module:
    """The network of `_core`, weights without worth; with `meta` none at all, for its shapes alone."""
    family, name = spec["family"], spec["architecture"]
    if family == "pixels":
        return nn.Identity()
    if spec["mean"] is None or spec["std"] is None:
        raise ValueError("mean or std is missing")
    if family == "ssl_emp":
        if not is_own(name) or spec["width"] is None or spec["stem"] is None:
            raise ValueError(f"no architecture {name!r} of width {spec['width']} and stem {spec['stem']}")
        return rebuild({"arch": name, "width": spec["width"], "stem": spec["stem"]}, meta)
    return rebuild({"arch": f"{family}:{name}", "args": spec["args"]}, meta)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
