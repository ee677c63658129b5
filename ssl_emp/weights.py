"""Weights of others as the start of a backbone: read without running code, matched by name and shape.

A run, an encoder directory, a `.safetensors` or `.pth` file, or a name of timm or torchvision gives tensors
under names that somebody else chose: `module.encoder_q.layer1.0.conv1.weight`, `teacher.backbone.blocks.0…`,
`backbone.4.0…`. Which dictionary of the file and which prefix are meant is found by trying: the pair under
which most numbers of the backbone have a tensor of their name and shape.
"""

import argparse
import logging
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from linear_eval.errors import did_you_mean, first_line
from linear_eval.files import check_uncompressed
from ssl_emp.errors import UserError
from ssl_emp.safe_files import check_regular, read_json
from ssl_emp.text import printable, resume_command, shorten

LEAST_SHARE = 0.9  # default of model.init_share
LARGEST_FILE = 1 << 36  # bytes
LONGEST_NAME = 300  # of a tensor that is looked at
DEEPEST = 4  # dictionaries within dictionaries
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # as timm and transformers call them
SHOWN = 4  # groups of names in a line
POSITIONS = {"pos_embed", "pos_embedding", "position_embedding", "position_embeddings"}
OTHER_TOKENS = (0, 1, 2, 5)  # none; a class token; DeiT's two; one and four registers
MOST_POSITIONS = 1 << 16
# two networks in one file fit equally well: the average of a student is the better one (DINO, timm's EMA),
# but what MoCo and BYOL call key, target or momentum is not what they evaluate
BETTER = {"teacher", "ema"}
WORSE = {"student", "momentum", "k", "key", "target"}
KINDS = "a run, an encoder directory, a .safetensors or .pth file, or timm:NAME"


@dataclass(frozen=True)
class Found:
    """Tensors as they were read: `tables` by their place in the file, such as `state_dict`; `""`: its top."""

    source: str
    tables: dict[str, dict[str, Tensor]]
    mean: list[float] | None = None  # of images in [0, 1], by which the network's input was normalised
    std: list[float] | None = None


@dataclass(frozen=True)
class Taken:
    """What a backbone took, and what it did not.

    Attributes:
        source: the file, directory or name, as it was given.
        place: where in it the tensors were found, such as `state_dict.module.encoder_q.`; `""`: at its top.
        taken, total: tensors of the backbone with weights from there, and all of them; without the counters
            of BatchNorm (`num_batches_tracked`), which nothing depends on.
        share: of the numbers in the backbone, and in what the file has beyond it inside the same layers,
            those that were taken.
        new: names of the backbone's tensors that stay as they were initialised.
        differing: of these, name -> (what it is here, what it is there), such as (`64x3x3x3`, `64x3x7x7`),
            where the source has one of another shape or type.
        unused: names in the source, without the prefix, that nothing took.
        resampled: position embeddings that were interpolated to another grid.
        mean, std: by which the source normalises images in [0, 1]; None: it does not say.
    """

    source: str
    place: str
    taken: int
    total: int
    share: float
    new: tuple[str, ...]
    differing: dict[str, tuple[str, str]]
    unused: tuple[str, ...]
    resampled: tuple[str, ...]
    mean: list[float] | None
    std: list[float] | None

    def __str__(self) -> str:
        """`FILE: 318 of 320 tensors, new: fc.*`."""
        place = f" ({self.place}*)" if self.place else ""
        parts = [printable(f"{self.source}{place}: {self.taken} of {self.total} tensors")]
        parts += [f"new: {grouped(self.new, self.differing)}"] if self.new else []
        parts += [f"not used: {grouped(self.unused)}"] if self.unused else []
        parts += [f"interpolated: {grouped(self.resampled)}"] if self.resampled else []
        return ", ".join(parts)


def take(
    backbone: nn.Module,
    init: str | os.PathLike[str] | Mapping[str, Tensor] | Found,
    least: float = LEAST_SHARE,
) -> Taken:
    """Put the weights of `init` into `backbone`, in place.

    Args:
        init: a run directory, an encoder directory (ours, or timm's local-dir), a `.safetensors`, `.pth`,
            `.pt` or `.ckpt` file, `timm:NAME` or `torchvision:NAME` with their pretrained weights; or tensors
            by name, for weights that were renamed by hand.
        least: refuse where `Taken.share` is below. It counts numbers and not tensors: a first convolution of
            another size is one in a thousand of a ResNet, and a missing stage more than half. What the file
            has beyond the backbone inside its layers counts against it, or a ResNet-34 would fit a ResNet-18
            tensor by tensor.

    Raises:
        UserError: nothing can be read, too little fits, or values are not finite.
    """
    if isinstance(init, Found):
        found = init
    elif isinstance(init, Mapping):
        found = Found("the weights", dict(_tables(init)))
    else:
        found = read(init)
    fit = _best_fit(backbone, found)
    if fit is None:
        raise UserError(f"{found.source} holds no tensors by name", f"give {KINDS}")
    taken, tensors = fit
    if taken.share < least or not taken.taken:
        raise _misfit(backbone, taken, least)
    _check_values(taken, tensors)
    backbone.load_state_dict(tensors, strict=False)
    return taken


# ---- reading -----------------------------------------------------------------------------------------------


def read(init: str | os.PathLike[str]) -> Found:
    """The tensors of `init`, see `take`, on the CPU. Raises UserError."""
    name = os.fspath(init)
    if name.startswith("timm:"):
        return _of_timm(name)
    if name.startswith("torchvision:"):
        return _of_torchvision(name)
    path = Path(os.path.expanduser(name))
    mean = std = None
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be read
        what = f"cannot read {shorten(name)} ({error.strerror})"
        raise UserError(what, f"model.init is {KINDS}") from error
    if is_folder:
        if (path / "config.yaml").is_file() and not (path / "encoder").is_dir():
            fix = f"finish it: {resume_command(path)}"
            raise UserError(f"the run {path} has no encoder yet", fix)
        path = path / "encoder" if (path / "encoder").is_dir() else path
        files = [path / file for file in IN_FOLDER if (path / file).is_file()]
        if not files:
            what = f"{path} has no weights ({' or '.join(IN_FOLDER)})"
            raise UserError(what, f"model.init is {KINDS}")
        mean, std = _normalisation(path / "config.json")
        path = files[0]
    if not path.exists():
        raise UserError(f"there is no {path} to begin from", f"model.init is {KINDS}")
    check_regular(path, LARGEST_FILE)
    tables = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    return Found(name, tables, mean, std)


def _is_safetensors(path: Path) -> bool:
    """By its content, whatever its name: eight bytes of a length, then JSON. By its name what is neither."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        return True
    return path.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")


def _read_safetensors(path: Path) -> dict[str, dict[str, Tensor]]:
    try:
        return {"": load_file(path)}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        fix = "give a whole file of safetensors"
        raise UserError(f"{path} cannot be read ({first_line(error)})", fix) from error


def _read_pickle(path: Path) -> dict[str, dict[str, Tensor]]:
    """A file of `torch.save`: tensors and plain values only; nothing that it names is imported or run."""
    fix = f"give {KINDS}"
    try:
        if zipfile.is_zipfile(path):
            check_uncompressed(path)
        # what authors' scripts save beside their weights; it holds values, and building it runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch on old formats, which are read all the same
            with open(path, "rb") as file:  # given a name, torch would go by its ending
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, runtime, key, memory errors: each means a file not to be used
        text = str(error)
        if named := re.search(r"GLOBAL (\S+)", text):
            what = (
                f"{path} holds more than tensors ({shorten(named[1])}), which could run code, and is not read"
            )
            fix = "save its weights alone where it is trusted: torch.save(model.state_dict(), FILE)"
            raise UserError(what, fix) from error
        reason = first_line(error, 80)
        raise UserError(
            f"{path} is damaged or holds no weights ({type(error).__name__}: {reason})", fix
        ) from error
    if not isinstance(content, Mapping):
        what = f"{path} holds a {type(content).__name__}, not tensors by name"
        raise UserError(what, "save a model's state_dict()")
    return dict(_tables(content))


def _tables(
    content: Mapping[Any, Any], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place, tensors by name) of every dictionary that holds tensors."""
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and len(name) <= LONGEST_NAME and isinstance(value, Tensor)
    }
    if tensors:
        yield place, tensors
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and depth < DEEPEST and name != "optimizer":
            yield from _tables(value, f"{place}{name[:LONGEST_NAME]}.", depth + 1)


def _normalisation(path: Path) -> tuple[list[float] | None, list[float] | None]:
    """(mean, std) that a config.json of ours or of timm's layout has; None where it has none."""
    if not path.is_file():
        return None, None
    try:
        values = read_json(path)
    except UserError:
        return None, None  # the weights are what is asked for
    for name in ("ssl_emp", "pretrained_cfg"):
        section = values.get(name) if isinstance(values, dict) else None
        if isinstance(section, dict):
            return _checked(section.get("mean"), section.get("std"))
    return None, None


def _checked(mean: Any, std: Any) -> tuple[list[float] | None, list[float] | None]:
    """As given, where they can be what images in [0, 1] are normalised by."""

    def three(values: Any) -> list[float] | None:
        is_list = isinstance(values, list | tuple) and len(values) == 3
        if not is_list or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in values):
            return None
        return [float(x) for x in values]

    mean, std = three(mean), three(std)
    return (mean, std) if mean is not None and std is not None and min(std) > 0 else (None, None)


def _of_timm(name: str) -> Found:
    """timm's network with its pretrained weights, from its cache or the network."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{name} needs the package timm", "pip install timm") from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry; ours is enough
    model = name.removeprefix("timm:")
    if ":" in model or "/" in model or not timm.is_model(model):
        near = did_you_mean(model, timm.list_models(), "see timm.list_pretrained()", prefix="timm:")
        raise UserError(f"timm has no model {shorten(model)!r}", near)
    try:
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # no weights, no network: timm and its hub have no common error
        what = f"the weights of {name} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        fix = "connect to the network, or fill timm's cache; timm.list_pretrained() has the names"
        raise UserError(what, fix) from error
    about: Any = network.pretrained_cfg
    mean, std = _checked(about.get("mean"), about.get("std"))
    return Found(name, {"": dict(network.state_dict())}, mean, std)


def _of_torchvision(name: str) -> Found:
    """torchvision's best weights, from torch.hub's cache or the network."""
    from torchvision import models

    model, known = name.removeprefix("torchvision:"), models.list_models(module=models)
    if model not in known:
        near = did_you_mean(model, known, "see torchvision.models.list_models()", prefix="torchvision:")
        raise UserError(f"torchvision has no image classifier {shorten(model)!r}", near)
    weights = models.get_model_weights(model).DEFAULT
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a damaged file: torch.hub and the unpickler have no common error
        what = f"the weights of {name} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        place = f"{torch.hub.get_dir()}/checkpoints"
        fix = f"connect to the network, or put {weights.url.rpartition('/')[2]} into {place}"
        raise UserError(what, fix) from error
    about = weights.transforms()
    mean, std = _checked(list(about.mean), list(about.std))
    return Found(name, {"": dict(tensors)}, mean, std)


# ---- matching ----------------------------------------------------------------------------------------------


def _best_fit(backbone: nn.Module, found: Found) -> tuple[Taken, dict[str, Tensor]] | None:
    """What the best of all dictionaries and prefixes gives, and the tensors for the backbone."""
    own = _tensors_of(backbone)
    best: tuple[tuple[float, ...], str, dict[str, str], str] | None = None
    for table in found.tables:
        for names in _namings(backbone, own):
            for prefix, fitting, named in _prefixes(own, names, found.tables[table]):
                place = f"{table}{prefix}"
                rank = (fitting, named, _preference(place), -len(place))
                if best is None or rank > best[0]:
                    best = (rank, table, names, prefix)
    if best is None:
        first = next(iter(found.tables.items()), None)
        if first is None:
            return None
        best = ((), first[0], {name: name for name in own}, "")
    _, table, names, prefix = best
    return _fit(backbone, found, table, names, prefix)


def _tensors_of(backbone: nn.Module) -> dict[str, Tensor]:
    """Its state, without what modules keep there that is no tensor."""
    return {name: value for name, value in backbone.state_dict().items() if isinstance(value, Tensor)}


def _namings(backbone: nn.Module, own: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Name that a file may use -> name here: the same, or with children numbered, as they are where somebody
    cut the network's head off by `nn.Sequential(*list(network.children())[:-1])`.
    """
    numbers = {name: str(number) for number, (name, _) in enumerate(backbone.named_children())}
    numbered = {}
    for name in own:
        child, dot, rest = name.partition(".")
        numbered[f"{numbers.get(child, child)}{dot}{rest}"] = name
    return [{name: name for name in own}, numbered]


def _prefixes(
    own: Mapping[str, Tensor], names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, int]]:
    """(prefix, numbers that fit, tensors that are there by name) of all prefixes before names of `names`."""
    fitting: dict[str, int] = {}
    named: dict[str, int] = {}
    for key, tensor in tensors.items():
        start = 0
        while start >= 0:
            if (name := names.get(key[start:])) is not None:
                prefix = key[:start]
                fits = _fits(name, own[name], tensor)
                fitting[prefix] = fitting.get(prefix, 0) + (own[name].numel() if fits else 0)
                named[prefix] = named.get(prefix, 0) + 1
            start = key.find(".", start) + 1 or -1
    for prefix in fitting:
        yield prefix, fitting[prefix], named[prefix]


def _preference(place: str) -> int:
    """Of networks that fit equally well: above 0 the average of a student, below 0 what nobody evaluates."""
    words = set(re.split(r"[._]", place))
    return bool(words & BETTER) - bool(words & WORSE)


def _fits(name: str, here: Tensor, there: Tensor) -> bool:
    """Whether a tensor can be copied, or interpolated where it holds a position for each patch."""
    if there.layout != torch.strided or there.is_quantized or there.device.type == "meta":
        return False
    if here.is_floating_point() != there.is_floating_point() or there.is_complex():
        return False
    return here.shape == there.shape or _other_tokens(name, here, there) is not None


def _other_tokens(name: str, here: Tensor, there: Tensor) -> int | None:
    """Of position embeddings (1, P, D) of another square grid: how many are of no patch. Else None."""
    if (
        name.rpartition(".")[2] not in POSITIONS
        or not here.dim() == there.dim() == 3
        or not here.shape[0] == there.shape[0] == 1
        or here.shape[2] != there.shape[2]
        or there.shape[1] > MOST_POSITIONS
    ):
        return None
    counts = (count for count in OTHER_TOKENS if all(_is_square(x.shape[1] - count) for x in (here, there)))
    return next(counts, None)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _fit(
    backbone: nn.Module, found: Found, table: str, names: Mapping[str, str], prefix: str
) -> tuple[Taken, dict[str, Tensor]]:
    own, tensors = _tensors_of(backbone), found.tables[table]
    taken: dict[str, Tensor] = {}
    resampled: list[str] = []
    differing = {}
    for theirs, name in names.items():
        there = tensors.get(prefix + theirs)
        if there is None:
            continue
        if not _fits(name, own[name], there):
            differing[name] = _unlike(own[name], there)
            continue
        if there.shape != own[name].shape:
            there = resampled_positions(there, own[name].shape[1], _other_tokens(name, own[name], there) or 0)
            resampled.append(name)
        taken[name] = there.to(own[name].dtype)
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    unused = [
        key.removeprefix(prefix)
        for key in tensors
        if key.startswith(prefix)
        and key[len(prefix) :] not in names
        and not key.endswith("num_batches_tracked")
    ]
    layers = {child for path in names for child in _parents(path)}
    beyond = sum(
        tensors[prefix + name].numel()
        for name in unused
        if tensors[prefix + name].is_floating_point() and not layers.isdisjoint(_parents(name))
    )
    whole = sum(own[name].numel() for name in counted) + beyond
    share = sum(own[name].numel() for name in counted if name in taken) / max(1, whole)
    about = Taken(
        found.source, f"{table}{prefix}", sum(name in taken for name in counted), len(counted), share,
        tuple(name for name in counted if name not in taken), differing, tuple(unused), tuple(resampled),
        found.mean, found.std,
    )  # fmt: skip
    return about, taken


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`: the modules that a tensor is in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def resampled_positions(positions: Tensor, count: int, others: int) -> Tensor:
    """Position embeddings (1, P, D) of a square grid -> (1, count, D) of another, as timm resamples them.

    Args:
        others: of P and of `count`, the first so many belong to no patch (class token, registers) and stay.
    """
    rest, grid = positions[:, :others].float(), positions[:, others:].float()
    old, new = math.isqrt(grid.shape[1]), math.isqrt(count - others)
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat([rest, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _check_values(taken: Taken, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError where a tensor to be taken is not finite, or a variance is below 0."""
    for name, tensor in tensors.items():
        bad = None
        if not tensor.isfinite().all():
            bad = "values that are not finite"
        elif name.rpartition(".")[2] in ("running_var", "num_batches_tracked") and (tensor < 0).any():
            bad = "values below 0"
        if bad:
            raise UserError(
                f"{taken.source} holds {bad}, first in {name}", "give weights that have not diverged"
            )


def _misfit(backbone: nn.Module, taken: Taken, least: float) -> UserError:
    own = _tensors_of(backbone)
    shown = []
    for name in taken.new[:2]:
        there = taken.differing.get(name)
        here = there[0] if there else _shape(own[name])
        shown.append(f"{name} is {here} here and {there[1] if there else 'missing'} there")
    if taken.unused and not any(name in taken.differing for name in taken.new[:2]):
        shown.append(f"{shorten(taken.unused[0])} is only there")
    fits = f"{100 * taken.share:.3g} % of the backbone's numbers"
    what = f"{taken.source} fits {fits}, model.init_share asks for {100 * least:.3g} %: {'; '.join(shown)}"
    return UserError(what, "set model.arch, model.width and model.stem to the network of these weights")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _unlike(here: Tensor, there: Tensor) -> tuple[str, str]:
    """The shapes of two tensors that do not fit; where these are the same, their types."""
    if here.shape != there.shape:
        return _shape(here), _shape(there)

    def kind(tensor: Tensor) -> str:
        words = [str(tensor.dtype), *([str(tensor.layout)] if tensor.layout != torch.strided else [])]
        words += ["without values"] if tensor.is_meta else []
        return " ".join(words).replace("torch.", "")

    return kind(here), kind(there)


def grouped(names: tuple[str, ...], differing: Mapping[str, tuple[str, str]] | None = None) -> str:
    """Names of tensors in a line: `conv1.weight (64x3x3x3 here, 64x3x7x7 there), layer4.*`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    words = []
    for first, members in groups.items():
        if len(members) > 1:
            words.append(f"{shorten(first)}.*")
        elif differing and members[0] in differing:
            here, there = differing[members[0]]
            words.append(f"{shorten(members[0])} ({here} here, {there} there)")
        else:
            words.append(shorten(members[0]))
    more = [f"and {len(words) - SHOWN} more"] if len(words) > SHOWN else []
    return ", ".join(words[:SHOWN] + more)
