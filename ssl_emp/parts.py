"""A backbone as a list of parts from input to output: what `model.freeze` and `optimizer.layer_decay` count.

Part 0 is the stem or the patch embedding, with class token and position embeddings; then come the stages of a
convolutional network or the blocks of a transformer. timm's networks say so themselves (`group_matcher`). Of
others it is read off the order in which modules were registered, which is that of the forward pass in
torchvision's networks and most others.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn
from torchvision.models import ConvNeXt, SwinTransformer

# share of a network's parameters from which on a module in it is the network, and its children are the parts
NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Part:
    """Stem, stage or block of a backbone.

    Attributes:
        name: of its first module or tensor, such as `conv1`, `layer2` or `blocks.3`.
        parameters: names in `backbone.named_parameters()`.
    """

    name: str
    parameters: tuple[str, ...]


def parts(backbone: nn.Module) -> list[Part]:
    """The parts of a backbone, input first. Each parameter is in exactly one.

    Raises:
        ValueError: it has no parameters.
    """
    known = {name for name, _ in backbone.named_parameters()}
    if not known:
        raise ValueError("the backbone has no parameters, and so no parts")
    # a parameter that two modules share has one name
    found = [(name, tuple(one for one in names if one in known)) for name, names in _groups(backbone)]
    found = [(name, names) for name, names in found if names]
    if len(found) > 1 and all(backbone.get_parameter(name).dim() <= 1 for name in found[-1][1]):
        found[-2:] = [(found[-2][0], found[-2][1] + found[-1][1])]  # a last norm is no part of its own
    return [Part(name, names) for name, names in found]


def _groups(backbone: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(name, names of parameters) of every part."""
    prefix, network = "", backbone
    while not hasattr(network, "group_matcher"):
        inner = _inner(network)
        if inner is None or _count(network.get_submodule(inner)) < _count(network):
            break
        prefix, network = f"{prefix}{inner}.", network.get_submodule(inner)
    if not hasattr(network, "group_matcher"):
        yield from _by_order(backbone)
        return
    from timm.models import group_parameters

    found = group_parameters(network, network.group_matcher(coarse=True))  # type: ignore[operator]
    for _, group in sorted(found.items()):
        yield prefix + _common(group), [f"{prefix}{name}" for name in group]


def _common(names: list[str]) -> str:
    """The module that the first of these tensors is in, with all others below the same child."""
    paths = [name.split(".")[:-1] or [name] for name in names]
    paths = [path for path in paths if path[0] == paths[0][0]]
    return ".".join(os.path.commonprefix(paths))  # of lists, entry by entry


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _inner(module: nn.Module) -> str | None:
    """The name of the child that has nearly all of `module`, and children itself; None: there is none."""
    total = _count(module)
    return next(
        (
            name
            for name, child in module.named_children()
            if _has_children(child) and _count(child) >= NEARLY_ALL * total
        ),
        None,
    )


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _by_order(backbone: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(name, tensors) part by part. A module with modules in it opens a part; what stands alone (a first
    convolution and its BatchNorm, a last norm) belongs to the part before it, or to the stem.
    """
    stages = next((m for m in backbone.modules() if isinstance(m, ConvNeXt | SwinTransformer)), None)
    merged = set() if stages is None else set(list(stages.features)[3::2])  # the stage after a downsampling
    units = list(_units(backbone, ""))
    only_leaves = not any(_has_children(unit) for _, unit in units)
    current, title = list(_own_tensors(backbone, "")), ""
    for name, unit in units:
        tensors = [f"{name}.{inner}" for inner, _ in unit.named_parameters()]
        if not tensors:
            continue
        weight = getattr(unit, "weight", None)
        has_matrix = isinstance(weight, Tensor) and weight.dim() > 1
        opens = has_matrix if only_leaves else _has_children(unit)
        if opens and unit not in merged and title:
            yield title, current
            current, title = [], ""
        current += tensors
        title = title or name
    yield title or current[0], current


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules in order, of which parts are made: children, or what is in the child that is nearly all."""
    inner = _inner(module)
    for name, child in module.named_children():
        if name == inner:
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _own_tensors(module: nn.Module, prefix: str) -> Iterator[str]:
    """Parameters of the modules whose children `_units` gives: class tokens, position embeddings."""
    for name, _ in module.named_parameters(recurse=False):
        yield f"{prefix}{name}"
    if inner := _inner(module):
        yield from _own_tensors(module.get_submodule(inner), f"{prefix}{inner}.")


# ---- what is done with them --------------------------------------------------------------------------------


def freeze(backbone: nn.Module, count: int) -> list[Part]:
    """Take the first `count` parts out of training, in place: no gradient, and eval mode for good, in which
    BatchNorm's statistics stay and nothing is dropped.

    Returns:
        These parts.

    Raises:
        ValueError: nothing of the backbone would train.
    """
    found = parts(backbone)
    if count >= len(found):
        names = ", ".join(part.name for part in found)
        raise ValueError(
            f"the backbone has {len(found)} parts ({names}), and {count} of them would not train"
        )
    frozen = {name for part in found[:count] for name in part.parameters}
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for module in _whole(backbone, "", frozen):
        module.eval()
        # whoever calls backbone.train() means the rest of it
        module.train = MethodType(_stay, module)  # type: ignore[method-assign]
    return found[:count]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _whole(module: nn.Module, prefix: str, frozen: set[str]) -> Iterator[nn.Module]:
    """The outermost modules all of whose parameters are in `frozen`."""
    for name, child in module.named_children():
        tensors = [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]
        if tensors and frozen.issuperset(tensors):
            yield child
        elif tensors:
            yield from _whole(child, f"{prefix}{name}.", frozen)


def lr_scales(backbone: nn.Module, layer_decay: float) -> dict[str, float]:
    """Parameter -> factor of the learning rate: `layer_decay ** d`, d = 1 for the last part, and one more for
    each part before it (BEiT, arXiv 2106.08254; `param_groups_layer_decay` of timm). A head on top has 1.
    """
    found = parts(backbone)
    return {
        name: layer_decay ** (len(found) - number)
        for number, part in enumerate(found)
        for name in part.parameters
    }
