"""What evaluate.py judges: encoders of runs, exported, untrained, timm's, torchvision's, or plain pixels."""

import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from linear_eval.errors import did_you_mean, first_line
from ssl_emp.backbones import check_name, copy_of, described, is_own, make_timm, make_torchvision, timm_names
from ssl_emp.commands.eval_config import EvalConfig, check
from ssl_emp.config import AugmentConfig, DataConfig, parse_yaml
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, build_encoder, load_encoder
from ssl_emp.run.lock import START
from ssl_emp.safe_files import read_json, read_text
from ssl_emp.text import resume_command

Made = TypeVar("Made")


@dataclass(frozen=True)
class Subject:
    """One encoder to judge, and on what."""

    name: str
    weights: str  # what they are, for the protocol column
    data: DataConfig
    image_size: int | None  # pixels a side that it wants; None: as the images are
    build: Callable[[int], nn.Module]  # image size S -> module: (B, 3, S, S) float in [0, 1] -> (B, D)
    eval_dir: Path | None  # where its rows go
    problem: UserError | None = None  # why it cannot be loaded: costs its own rows, and not those of others

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem


class Pixels(nn.Module):
    """No encoder: images (B, 3, S, S) -> (B, 3 S S), the floor that every encoder should beat."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.feature_dim = 3 * image_size**2

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def find_subjects(
    names: list[str],
    config: EvalConfig,
    given: dict[str, Any],
    evaluators: Iterable[str],
    backbones: Mapping[str, nn.Module] = MappingProxyType({}),
) -> list[Subject]:
    """The encoders by their names on the command line. All files are read here: mistakes show at once.

    What is no run is judged beside the first run: on its data, `random` with its architecture and
    normalisation. What cannot be loaded becomes a Subject with a `problem`; a word that is neither a name nor
    a folder is a UserError at once, with the nearest of `evaluators`, which it may have been meant for.
    Runs whose network is a module from Python are given one like it in `backbones`.
    """
    names = with_starts(names, asked=config.start)
    for name in names:
        if not (
            name in ("random", "pixels") or name.startswith(("timm:", "torchvision:")) or Path(name).is_dir()
        ):
            kinds = (
                "a run directory, an encoder directory, start, random, pixels, timm:NAME or torchvision:NAME"
            )
            fix = did_you_mean(name, [*evaluators, "start", "random", "pixels"], f"ENCODER is {kinds}")
            raise UserError(f"{name!r} is no directory, encoder or evaluator", fix)

    runs: dict[str, Encoder | UserError] = {}
    for name in filter(lambda name: is_run(Path(name)), names):
        own = copy_of(backbones.get(name))
        runs[name] = _or_problem(partial(load_encoder, name, check_range=False, backbone=own))
    datas = {name: _or_problem(partial(read_run_data, Path(name), given)) for name in runs}
    host = _Host(config, given, next(iter(runs), None), runs, datas)

    def start_subject(name: str) -> Subject:
        """What the run `name` began from, on the run's images."""
        own = copy_of(backbones.get(name))
        start = load_encoder(Path(name) / START, check_range=False, backbone=own)
        run, data = _right(runs[name]), _right(datas[name])
        size = config.data.image_size or run.image_size
        weights = "before the first step"
        return Subject(str(Path(name) / START), weights, data, size, fixed(start), Path(name) / "eval")

    def run_subject(name: str) -> Subject:
        run, data = _right(runs[name]), _right(datas[name])
        size = config.data.image_size or run.image_size
        behind = plan_behind(Path(name))
        weights = "last epoch" if behind is None else f"epoch {behind[0]} of {behind[1]}"
        return Subject(name, weights, data, size, fixed(run), Path(name) / "eval")

    subjects = []
    for name in names:
        parent = str(Path(name).parent)
        if name in runs:
            made = _or_problem(partial(run_subject, name))
        elif Path(name).name == START and parent in runs:
            made = _or_problem(partial(start_subject, parent))
        else:
            made = _or_problem(partial(host.guest, name))
        if isinstance(made, UserError):
            made = Subject(name, "", config.data, None, Pixels, None, made)
        subjects.append(made)
    return subjects


def with_starts(names: list[str], asked: bool) -> list[str]:
    """The names, and after each run what it began from, where it did; `start` is that of the first run."""
    begun = [name for name in names if is_run(Path(name)) and (Path(name) / START / "config.json").is_file()]
    if "start" in names and not Path("start").is_dir() and not begun:
        fix = "name a run with model.init, which has a folder start"
        raise UserError(
            "there is no start to judge: none of the encoders is a run that began from weights", fix
        )
    found: list[str] = []
    for name in names:
        found += [str(Path(begun[0]) / START)] if name == "start" and begun else [name]
        found += [str(Path(name) / START)] if name in begun and asked else []
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Host:
    """The first run, if there is one, beside which what is no run itself is judged."""

    config: EvalConfig
    given: dict[str, Any]
    name: str | None
    runs: dict[str, Encoder | UserError]
    datas: dict[str, DataConfig | UserError]

    def guest(self, name: str) -> Subject:
        """What is no run: on the host's data and images of its size, its rows among the host's."""
        run = None if self.name is None else self.runs[self.name]
        data = self.config.data if self.name is None else self.datas[self.name]
        if isinstance(run, UserError) or isinstance(data, UserError):
            what = f"{name} is judged on the data of the first run, {self.name}, which cannot be loaded"
            raise UserError(what, f"see to {self.name}, leave it out, or name another run first")
        eval_dir = None if self.name is None else Path(self.name) / "eval"
        given_size = self.config.data.image_size
        size = given_size if run is None or given_size else run.image_size
        if name == "random":
            weights, untrained = self._untrained(run)
            return Subject(name, weights, data, size, untrained, eval_dir)
        if name == "pixels":
            return Subject(name, "raw pixels", data, size, Pixels, eval_dir)
        if name.startswith("timm:"):
            network, own_size, is_fixed = load_timm(name.removeprefix("timm:"))
            size = own_size if is_fixed else given_size or own_size
            return Subject(name, "timm weights", data, size, fixed(network), eval_dir)
        if name.startswith("torchvision:"):
            network, own_size, is_fixed, weights = load_torchvision(name.removeprefix("torchvision:"))
            size = own_size if is_fixed else given_size or own_size
            return Subject(name, f"torchvision weights {weights}", data, size, fixed(network), eval_dir)
        if (Path(name) / "config.yaml").is_file():
            what = f"the run {name} has no encoder yet"
            raise UserError(what, f"finish it: {resume_command(name)}")
        encoder = load_encoder(name, check_range=False)
        size = given_size or encoder.image_size
        return Subject(name, "as exported", data, size, fixed(encoder), eval_dir)

    def _untrained(self, run: Encoder | None) -> tuple[str, Callable[[int], nn.Module]]:
        """What `random` is and how it is built: with the run's architecture where there is a run."""
        model, mean, std = self.config.model, AugmentConfig().mean, AugmentConfig().std
        spec = {name: getattr(model, name) for name in ("arch", "width", "stem", "args")}
        if run is not None:
            given = self.given.get("model", {})
            mean, std = run.mean.flatten().tolist(), run.std.flatten().tolist()
            own: dict[str, Any] = {"width": None, "stem": None, "args": {}}
            arch = given.get("arch", run.spec["arch"])
            if arch == run.spec["arch"] or is_own(arch) and is_own(run.spec["arch"]):
                own |= run.spec
            spec = {name: value for name, value in (own | given).items() if name in spec}

        def untrained(image_size: int) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                return build_encoder(**spec, image_size=image_size, mean=mean, std=std)

        if is_own(spec["arch"]):
            return f"untrained {spec['arch']} of width {spec['width']}, {spec['stem']} stem", untrained
        return f"untrained {described(spec)}", untrained


def _or_problem(make: Callable[[], Made]) -> Made | UserError:
    try:
        return make()
    except UserError as problem:
        return problem


def _right(made: Made | UserError) -> Made:
    if isinstance(made, UserError):
        raise made
    return made


def plan_behind(run: Path) -> tuple[int, int] | None:
    """(epochs of the plan that RUN/encoder ended, epochs planned now) of a run that was extended and has not
    ended again; None of every other.
    """
    try:
        ended = read_json(run / "encoder" / "config.json")["ssl_emp"]["epochs"]
        planned = parse_yaml(read_text(run / "config.yaml"), str(run / "config.yaml"))["epochs"]
    except (UserError, OSError, ValueError, KeyError, TypeError):  # damaged: whoever reads the rest says so
        return None
    are_counts = all(type(epochs) is int for epochs in (ended, planned))
    return (ended, planned) if are_counts and ended < planned else None


def is_run(path: Path) -> bool:
    return (path / "encoder").is_dir() and (path / "config.yaml").is_file()


def read_run_data(run: Path, given: dict[str, Any]) -> DataConfig:
    """RUN/config.yaml's data section under overrides. Another source does not inherit its description."""
    path = run / "config.yaml"
    values = parse_yaml(read_text(path), str(path))
    own = values.get("data") if isinstance(values, dict) else None
    if not isinstance(own, dict):
        raise UserError(f"{path} has no data section", "give a run directory that pretraining wrote")
    overrides = given.get("data", {})
    # a run may train without labels; judging needs them
    inherited = {} if "source" in overrides else own | {"labels": "auto"}
    if inherited and overrides.get("holdout") is not None and values.get("objective") == "supervised":
        what = (
            f"{run} was trained with the labels of all its train images, so data.holdout can hold "
            "none out as test"
        )
        fix = "name other labelled images with data.source=LABELLED or data.test_source=LABELLED"
        raise UserError(what, fix)
    return check(DataConfig, inherited | overrides, str(path))


def fixed(network: nn.Module) -> Callable[[int], nn.Module]:
    return lambda image_size: network


class Normalized(nn.Module):
    """A network behind its input normalisation: images (B, 3, H, W) float in [0, 1] -> (B, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def known(name: str) -> None:
    """Raise UserError where timm or torchvision has no network of this name."""
    try:
        if name.startswith("timm:") and re.search("[:/]", name[5:]):
            timm_names()  # a place of a hub, which nobody can list
        else:
            check_name(name)
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        raise UserError(what, fix) from error


def load_timm(name: str) -> tuple[nn.Module, int, bool]:
    """A pretrained timm model without its classifier: (module, image size, whether only that size)."""
    known(f"timm:{name}")
    # it logs every retry; the error below is enough
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        network = make_timm(name, {}, pretrained=True)
    except Exception as error:  # unknown name, no weights, no network: timm and its hub have no common error
        reason = first_line(error)
        fix = (
            "check the name with timm.list_pretrained(), and that the network or timm's cache has the weights"
        )
        raise UserError(f"timm:{name} cannot be loaded ({type(error).__name__}: {reason})", fix) from error
    about: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]  # typed as any attribute of a module
    module = Normalized(network, list(about["mean"]), list(about["std"]))
    return module, about["input_size"][-1], bool(about.get("fixed_input_size"))


def load_torchvision(name: str) -> tuple[nn.Module, int, bool, str]:
    """A torchvision model with its best weights, headless: (module, image size, whether fixed, weights)."""
    from torchvision import models

    known(f"torchvision:{name}")
    weights = models.get_model_weights(name).DEFAULT
    try:
        # torch.hub prints that it downloads
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            network = make_torchvision(name, {}, weights, sys.stderr.isatty())
    # no network, a damaged or another file: torch.hub and the unpickler have no common error
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"the weights of torchvision:{name} cannot be loaded ({type(error).__name__}: {reason})",
            f"connect to the network, or put {weights.url.rpartition('/')[2]} into "
            f"{torch.hub.get_dir()}/checkpoints",
        ) from error
    about = weights.transforms()
    # position embeddings and windows fix the image size
    is_fixed = isinstance(network, models.VisionTransformer | models.MaxVit)
    return Normalized(network, list(about.mean), list(about.std)), about.crop_size[0], is_fixed, weights.name
