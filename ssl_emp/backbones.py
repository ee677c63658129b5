"""The networks f that a run can train, each images (B, 3, S, S), normalised -> features (B, D).

`model.arch` names one: `resnet18`, `resnet34`, `resnet50` with `width` and `stem`; `timm:NAME`;
`torchvision:NAME`; or, from Python, a module of one's own, which files call `custom:CLASS`. What builds a
network again is its spec, a dict of plain values that goes into files; no code is ever taken from there.

timm is an extra: the three ResNets and torchvision's 80 networks need none, and it brings a client of a hub.

Letters: B images, S pixels a side, D features.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from linear_eval.errors import did_you_mean, first_line
from ssl_emp.errors import UserError
from ssl_emp.text import shorten

# name -> (block, number of blocks in each stage)
ARCHS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
FULL_WIDTH = 64  # channels of the first stage in the published ResNets
SMALL_IMAGE = 64  # up to this many pixels a side, the "auto" stem keeps the resolution (SimCLR, appendix B.9)
NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")  # no prefix and no path: those would be downloaded, or read
# arguments of timm and torchvision that load weights, read files, or change what comes out
REFUSED = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_model_args",
    "checkpoint_path", "cache_dir", "weights", "weights_backbone", "progress", "num_classes", "in_chans",
    "features_only", "feature_cfg", "out_indices", "scriptable", "exportable", "no_jit", "device", "dtype",
}  # fmt: skip
Given = TypeVar("Given", bound=nn.Module | None)
MOST_ARGS, LARGEST_ARG = 32, 65_536  # of what a file may ask for


class WidthResNet(ResNet):
    """torchvision's ResNet with `width` channels in the first stage instead of 64; same parameter names."""

    def __init__(self, arch: str, width: int, stem: str) -> None:
        self.width = width
        block, layers = ARCHS[arch]
        super().__init__(block, layers)
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        # as torchvision's ResNet initialises its own
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        if stem == "cifar":
            self.maxpool = nn.Identity()
        self.feature_dim = 512 * block.expansion * width // FULL_WIDTH
        self.fc = nn.Identity()  # forward ends at the pooled features

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == FULL_WIDTH:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // FULL_WIDTH, blocks, stride, dilate)


def resolve_stem(stem: str, image_size: int) -> str:
    """`auto` -> `cifar` (3x3, stride 1, no max-pooling) up to 64 px, else `imagenet` (7x7, stride 2)."""
    return ("cifar" if image_size <= SMALL_IMAGE else "imagenet") if stem == "auto" else stem


# ---- names and arguments -----------------------------------------------------------------------------------


def check_name(arch: str) -> str:
    """`arch` as it is. Raises ValueError with the nearest names where there is no such network.

    timm is imported only where its names are asked for: that takes seconds.
    """
    family, colon, name = arch.partition(":")
    if arch in ARCHS or (family == "custom" and NAME.fullmatch(name)):
        return arch
    kinds = "resnet18, resnet34, resnet50, timm:NAME and torchvision:NAME"
    if family not in ("timm", "torchvision") or not colon:
        near = did_you_mean(arch, ARCHS, f"there are {kinds}")
        raise ValueError(f"no network is called {shorten(arch)!r}; {near}")
    known = timm_names() if family == "timm" else torchvision_names()
    is_known = NAME.fullmatch(name) and (name.partition(".")[0] if family == "timm" else name) in known
    if not is_known:
        where = "timm.list_models()" if family == "timm" else "torchvision.models.list_models()"
        near = did_you_mean(name, known, f"see {where}", prefix=f"{family}:")
        what = "network" if family == "timm" else "image classifier"
        raise ValueError(f"{family} has no {what} {shorten(name)!r}; {near}")
    return arch


def torchvision_names() -> list[str]:
    """Image classifiers, whose last layer can be left out."""
    from torchvision import models

    return list(models.list_models(module=models))


def timm_names() -> set[str]:
    """Networks of timm, without the tags of their weights. ValueError where timm is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ValueError("timm's networks need the package timm; pip install timm") from error
    return set(timm.list_models())


def check_args(args: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are plain values that shape a network and nothing else."""
    if len(args) > MOST_ARGS:
        raise ValueError(f"model.args has {len(args)} entries; give at most {MOST_ARGS}")
    for name, value in args.items():
        if not (isinstance(name, str) and name.isidentifier() and not name.startswith("_")):
            raise ValueError(f"model.args.{shorten(str(name))} is no name of an argument; correct it")
        if name in REFUSED:
            raise ValueError(
                f"model.args.{name} does not shape the network; leave it out: channels are 3, classes 0, "
                "and weights are given apart"
            )
        values = value if isinstance(value, list) else [value]
        if len(values) > MOST_ARGS or not all(_is_plain(item) for item in values):
            raise ValueError(
                f"model.args.{name} is {shorten(repr(value))}; give a number, a word, true, false, null, "
                "or a short list of them"
            )


def check_options(arch: str, width: int | None, stem: str | None, args: Mapping[str, Any]) -> None:
    """Raise ValueError where an option is set that a network of this name does not have."""
    if is_own(arch):
        if args:
            what = f"model.args is for timm:NAME and torchvision:NAME, and model.arch is {arch}"
            raise ValueError(f"{what}; leave it out: model.width and model.stem shape this one")
        return
    for key, value, usual in (("width", width, FULL_WIDTH), ("stem", stem, "auto")):
        if value not in (None, usual):
            what = f"model.{key}={value} is for resnet18, resnet34 and resnet50, and model.arch is {arch}"
            raise ValueError(f"{what}; set model.{key}={usual}, or leave it out")
    if arch.startswith("custom:") and args:
        raise ValueError("model.args cannot shape a network that is built already; leave it out")


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 200
    return value is None or isinstance(value, bool | int | float) and abs(value) <= LARGEST_ARG  # nan is not


def needs_network(arch: str) -> UserError:
    """The error for `custom:CLASS` without the module."""
    what = f"{arch} is a network from Python, and none was given"
    return UserError(what, "give it: ssl_emp.pretrain(model=NETWORK), ssl_emp.load_encoder(backbone=NETWORK)")


def is_own(arch: str) -> bool:
    """Whether it is one of the three that take `width` and `stem`, and draw no random numbers."""
    return arch in ARCHS


def custom_name(network: nn.Module) -> str:
    """What files call a module from Python."""
    return f"custom:{re.sub(r'[^A-Za-z0-9_]', '_', type(network).__name__)[:200]}"


def copy_of(network: Given) -> Given:
    """A copy of a module from Python; None of None. Raises UserError where it cannot be copied."""
    try:
        return copy.deepcopy(network)
    except Exception as error:  # what a module holds raises errors of every type
        what = f"the {type(network).__name__} cannot be copied ({type(error).__name__}: {first_line(error)})"
        raise UserError(what, "give a module that copy.deepcopy takes") from error


def described(spec: Mapping[str, Any]) -> str:
    """A spec in words."""
    if is_own(spec["arch"]):
        return f"{spec['arch']}, width {spec['width']}, {spec['stem']} stem"
    return ", ".join([spec["arch"], *(f"{name}={value}" for name, value in spec.get("args", {}).items())])


# ---- building ----------------------------------------------------------------------------------------------


def build(
    arch: str | nn.Module,
    image_size: int,
    width: int | None = None,
    stem: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A network that ends at its features, initialised from torch's global generator, and its spec.

    Args:
        arch: a name, or a module, which is taken as it is.
        image_size: of the views. A network with patches of a fixed number is built for it, unless `args`
            decide that; where it can, it then takes other sizes too, by resampled position embeddings.
        width, stem: of our own three only. None, 64 and `auto` mean: as published, and by the size.
        args: passed on to timm's or torchvision's constructor.

    Raises:
        UserError: no such network, or one that cannot be built so.
    """
    given = dict(args or {})
    name = arch if isinstance(arch, str) else custom_name(arch)
    try:
        check_name(name)
        check_args(given)
        check_options(name, width, stem, given)
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        raise UserError(what, fix) from error
    if is_own(name):
        spec: dict[str, Any] = {
            "arch": name,
            "width": width or FULL_WIDTH,
            "stem": resolve_stem(stem or "auto", image_size),
        }
        return WidthResNet(name, spec["width"], spec["stem"]), spec
    if isinstance(arch, nn.Module):
        return arch, {"arch": name, "args": {}}
    if name.startswith("custom:"):
        raise needs_network(name)
    network, used = _create(name, given, image_size)
    _check_patches(network, name, image_size)
    return network, {"arch": name, "args": used}


def rebuild(spec: Mapping[str, Any], meta: bool = False) -> nn.Module:
    """The network of a spec from a file, weights without worth; with `meta` no memory, its shapes alone.

    Raises:
        ValueError: there is no such network, and errors of many types where it cannot be built so.
    """
    if meta:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return rebuild(spec)
    arch, args = check_name(spec["arch"]), spec.get("args", {})
    check_args(args)
    check_options(arch, spec.get("width"), spec.get("stem"), args)
    if is_own(arch):
        return WidthResNet(arch, spec["width"], spec["stem"])
    family, _, name = arch.partition(":")
    if family == "custom":
        raise needs_network(arch)
    return (make_timm if family == "timm" else make_torchvision)(name, args)


def _create(arch: str, args: dict[str, Any], image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """(network, the arguments that it was built with), of timm or torchvision."""
    family, _, name = arch.partition(":")
    create = make_timm if family == "timm" else make_torchvision
    for extra in _sized(family, name, args, image_size):
        before = torch.get_rng_state()
        try:
            return create(name, extra | args), extra | args
        except TypeError as error:
            if not extra or "unexpected keyword" not in str(error):
                raise _cannot_be_built(arch, args, error) from error
            torch.set_rng_state(before)  # the weights do not depend on what was tried
        except Exception as error:  # what a wrong value raises has no common type
            raise _cannot_be_built(arch, args, error) from error
    raise AssertionError


def _sized(family: str, name: str, args: Mapping[str, Any], image_size: int) -> list[dict[str, Any]]:
    """Arguments to try, the best first, that build a network of a fixed input size for views of this one."""
    if family == "torchvision":
        return (
            [{"image_size": image_size}, {}] if name.startswith("vit_") and "image_size" not in args else [{}]
        )
    import timm

    about = timm.get_pretrained_cfg(name, allow_unregistered=True)
    is_fixed = about is not None and about.fixed_input_size
    if not is_fixed or {"img_size", "dynamic_img_size"} & args.keys():
        return [{}]
    size = {"img_size": image_size}
    return [size | {"dynamic_img_size": True}, size, {}]


def _cannot_be_built(arch: str, args: Mapping[str, Any], error: Exception) -> UserError:
    """An error of a constructor in one line."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in args:
        reason = f"{type(error).__name__}: {first_line(error, 120)}"
        shown = ", ".join(f"{name}={value}" for name, value in args.items())
        return UserError(
            f"{arch} cannot be built with model.args {{{shorten(shown)}}} ({reason})", "correct it"
        )
    known: list[str] = []
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            family, _, name = arch.partition(":")
            network = (make_timm if family == "timm" else make_torchvision)(name, {})
        known = [key for key in inspect.signature(type(network).__init__).parameters if key not in REFUSED]
    except Exception:  # the error above is what counts
        pass
    fix = did_you_mean(found[1], known, "leave it out", prefix="model.args.")
    return UserError(f"{arch} takes no argument {found[1]} (model.args.{found[1]})", fix)


def make_timm(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """timm's network `name` without its classifier. Its own errors pass."""
    import timm

    return timm.create_model(name, pretrained=pretrained, num_classes=0, **args)


def make_torchvision(
    name: str, args: Mapping[str, Any], weights: Any = None, progress: bool = False
) -> nn.Module:
    """torchvision's network `name`, untrained or with `weights`, without its classifier. Errors pass."""
    from torchvision import models

    usual: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3") and weights is None:  # else they give tuples while they train
        usual = {"aux_logits": False, "init_weights": True}
    options = {} if weights is None else {"progress": progress}
    network = models.get_model(name, weights=weights, **usual | dict(args), **options)
    drop_last_layer(network)
    return network


def drop_last_layer(network: nn.Module) -> None:
    """Put an Identity in place of the layer of a torchvision classifier that scores the classes."""
    head = next(name for name in ("fc", "classifier", "heads", "head") if hasattr(network, name))
    parts = getattr(network, head).named_modules()
    scoring = [name for name, part in parts if isinstance(part, nn.Linear | nn.Conv2d)]
    network.set_submodule(f"{head}.{scoring[-1]}".rstrip("."), nn.Identity())


def _check_patches(network: nn.Module, name: str, image_size: int) -> None:
    """Raise UserError where patches do not divide a view: what is left over would be cut off in silence."""
    patches = getattr(network, "patch_embed", None)
    size, pads = getattr(patches, "patch_size", None), getattr(patches, "dynamic_img_pad", False)
    sides = size if isinstance(size, tuple) else (size,)
    if pads or not all(isinstance(side, int) and side > 0 for side in sides):
        return
    side = max(sides)
    if image_size % side:
        near = [n for n in (image_size // side * side, -(-image_size // side) * side) if n]
        what = f"views of {image_size} pixels cannot be cut into the patches of {name}, of {side} pixels"
        raise UserError(what, f"set augment.size={' or '.join(map(str, near))}")


# ---- what comes out ----------------------------------------------------------------------------------------


@contextmanager
def untouched(network: nn.Module) -> Iterator[torch.device]:
    """Inside, the network may be run in any mode; afterwards modes, buffers and random numbers are as before.

    Yields the device that its input has to be on.
    """
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    tensor = next(iter([*network.parameters(), *network.buffers()]), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield device
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def example(image_size: int, device: torch.device) -> Tensor:
    """Two images (2, 3, S, S) in [-1, 1], neither constant nor equal."""
    ramp = torch.linspace(-1, 1, 3 * image_size**2, device=device).view(1, 3, image_size, image_size)
    return torch.cat([ramp, ramp.flip(-1)])


def feature_dim(network: nn.Module, image_size: int, name: str) -> int:
    """D, by one forward in eval mode that leaves no trace.

    Raises:
        UserError: the network takes no images of this size, or what it gives are no features (B, D).
    """
    if isinstance(network, WidthResNet):
        return network.feature_dim
    with untouched(network) as device, torch.no_grad():
        network.eval()
        features = _forward(network, image_size, device, name)
    if device.type != "meta" and not features.isfinite().all():
        raise UserError(f"{name} gives features that are not finite", "give a network with usable weights")
    return features.shape[1]


def check_trains(network: nn.Module, image_size: int, name: str) -> None:
    """Raise UserError where a network gives no features (B, D) in training, or has nothing that learns;
    freeze what gets no gradient.

    A parameter that no feature depends on would be missing from the optimiser's state and stop DDP. Of our
    own three all are known to be right.
    """
    if isinstance(network, WidthResNet):
        return
    with untouched(network) as device:
        network.train()
        features = _forward(network, image_size, device, f"{name} in training")
        learning = [p for p in network.parameters() if p.requires_grad]
        if device.type != "meta" and not features.isfinite().all():
            what = f"{name} in training gives features that are not finite"
            raise UserError(what, "give a network with usable weights")
        if not features.requires_grad or not learning:
            what = f"nothing of {name} would learn: no gradient reaches a parameter"
            raise UserError(what, "give a network whose parameters require gradients")
        found = torch.autograd.grad(features.float().sum(), learning, allow_unused=True)
    for parameter, gradient in zip(learning, found, strict=True):
        parameter.requires_grad_(gradient is not None)


def _forward(network: nn.Module, image_size: int, device: torch.device, name: str) -> Tensor:
    """Features (2, D) of `example`, or a UserError."""
    try:
        features = network(example(image_size, device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # networks raise errors of every type
        what = f"{name} takes no images of {image_size}x{image_size} pixels"
        reason = f"{type(error).__name__}: {first_line(error, 120)}"
        fix = "give views of another size (augment.size), or a network of normalised images (B, 3, S, S)"
        raise UserError(f"{what} ({reason})", fix) from error
    pooled = "use a network that ends in pooled features, one row an image"
    if not isinstance(features, Tensor):
        raise UserError(f"{name} gives a {type(features).__name__}, not features (B, D)", pooled)
    if features.ndim != 2 or len(features) != 2:
        maps = ", which are maps" if features.ndim == 4 else ""
        shape = tuple(features.shape)
        raise UserError(f"{name} gives {shape} for 2 images{maps}, not features (B, D)", pooled)
    if not features.shape[1] or features.dtype != torch.float32:
        kind = str(features.dtype).removeprefix("torch.")
        what = f"{name} gives {features.shape[1]} features of type {kind}"
        raise UserError(what, "end it in features.float()" if features.is_floating_point() else pooled)
    return features
