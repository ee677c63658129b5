"""`ssl_emp.pretrain`, `ssl_emp.resume`, `ssl_emp.evaluate`: the commands for scripts and notebooks.

What the commands do with a config is done here with arguments, by the same functions. What they do to their
own process is not: signal handlers, random generators, gradient mode and threads are as before when a
function returns or raises, no stream is touched, and nothing ends the process.
"""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from linear_eval.errors import first_line
from ssl_emp.backbones import copy_of, custom_name
from ssl_emp.commands.eval_config import EvalConfig, check, parse_overrides
from ssl_emp.commands.eval_images import GivenImages
from ssl_emp.commands.evaluate import ALL_EVALUATORS, judge_all, own_device
from ssl_emp.commands.evaluators import Session
from ssl_emp.commands.given import Given
from ssl_emp.commands.ledger import Ledger, Voice
from ssl_emp.commands.pretrain import start_or_resume
from ssl_emp.commands.resume import is_run, read_run
from ssl_emp.commands.row_tables import markdown_table
from ssl_emp.commands.rows import COLUMNS, Row
from ssl_emp.commands.subjects import Subject, find_subjects, fixed, plan_behind
from ssl_emp.config import DataConfig, Override, PretrainConfig, load_config, pairs_of
from ssl_emp.data.objects import IN_MEMORY, KIND, is_labelled
from ssl_emp.device import pick_device
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, load_encoder
from ssl_emp.run.interrupts import Interrupts, Stopped
from ssl_emp.run.ranks import ALONE, LostRank, Ranks, count_devices, join_ranks, leave_ranks
from ssl_emp.run.report import read_metrics
from ssl_emp.safe_files import check_regular

Settings = Mapping[str, Any]
SETTINGS = "the settings"  # where they come from, in messages
FIRST_FOLDER = "runs/python"  # of runs without `out` and config file; python-2, … where it is taken
MEETINGS = count()  # of the processes that torchrun started, in this one


# ---- what a run leaves


class RunFolder:
    """A run directory, read back. Made by `pretrain` and `resume`; `RunFolder("runs/mine")` opens any other.

    Args:
        folder: a run directory.
        backbone: of a run whose network was a module from Python: one like it, which is copied.

    Raises:
        UserError: it is none.
    """

    def __init__(self, folder: str | os.PathLike[str], backbone: nn.Module | None = None) -> None:
        self.folder, self.backbone = Path(os.path.expanduser(folder)), backbone
        if not is_run(self.folder):
            fix = "give the directory of a run, RUN/config.yaml is in it"
            raise UserError(f"{self.folder} is not a run directory", fix)

    @property
    def config(self) -> PretrainConfig:
        """The settings, every key of them, as in RUN/config.yaml: `run.config.prune.fraction`."""
        return read_run(self.folder, [])[0]

    @property
    def finished(self) -> bool:
        """Whether it came to its end, and `encoder` and `samples` are there; of a run that was extended, to
        the end of its longer plan.
        """
        return (self.folder / "encoder").is_dir() and plan_behind(self.folder) is None

    @cached_property
    def encoder(self) -> Encoder:
        """The frozen encoder, images (B, 3, H, W) float in [0, 1] -> (B, D) float32, see `load_encoder`."""
        return load_encoder(self.folder, backbone=copy_of(self.backbone))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row an epoch: loss (nats), kept_share, knn_train_split (both of 1), training_seconds, … ."""
        return read_metrics(self.folder)

    @property
    def samples(self) -> dict[str, np.ndarray]:
        """What is known of every sample, in the order of the data, as columns (N,): index, name, loss (nats),
        distance, score, times_trained, scored_epoch. Raises UserError where the run has not ended.
        """
        path = self.folder / "pruning" / "samples.parquet"
        if not path.is_file():
            fix = f"finish it: ssl_emp.resume({os.fspath(self.folder)!r})"
            raise UserError(f"the run in {self.folder} has no {path.name} yet", fix)
        check_regular(path)
        table = pq.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}

    def __repr__(self) -> str:
        parts = ["finished" if self.finished else "not finished"]
        with suppress(Exception):  # damaged files are no reason why a run has no text
            rows = self.metrics
            last = rows[-1]
            parts += [f"{last['epoch']} epochs", f"loss {last['loss']:.3f}"]
            parts += [
                f"kNN (train split) {100 * row['knn_train_split']:.1f}"
                for row in rows[-1:]
                if "knn_train_split" in row
            ]
            parts += [f"{last['samples_seen']:,} samples seen"]
        return f"RunFolder({os.fspath(self.folder)!r}: {', '.join(parts)})"


@dataclass(frozen=True)
class EvalRow:
    """One number of an evaluation.

    Attributes:
        value: in the unit of `metric`, percent for `top1 %`; None where it was refused: `protocol` says why.
        std: over several draws, where there are any.
        n_test: images it was measured on.
    """

    encoder: str
    evaluator: str
    data: str
    protocol: str
    metric: str
    value: float | None
    std: float | None
    n_test: int | None
    seed: int


class EvalTable(tuple[EvalRow, ...]):
    """Rows of an evaluation; printed, and shown in a notebook, as a Markdown table."""

    def __repr__(self) -> str:
        return markdown_table([{name: getattr(row, name) for name in COLUMNS} for row in self]).rstrip()

    __str__ = __repr__

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return repr(self)


# ---- pretraining


def pretrain(
    data: Any = None,
    model: str | Settings | nn.Module | None = None,
    *,
    config: str | os.PathLike[str] | Settings | PretrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    **settings: Any,
) -> RunFolder:
    """Pretrain an encoder on images; what `ssl-emp pretrain --config FILE key=value` does::

        run = ssl_emp.pretrain(images, "resnet18", epochs=100, batch_size=256, prune={"fraction": 0.5})

    Ctrl-C (and SIGTERM, SIGHUP, SIGUSR1), in the main thread, finishes the step, saves a checkpoint and then
    does what it would have done, raise KeyboardInterrupt; `resume` goes on from there. Under torchrun every
    process calls it with the same arguments.

    Args:
        data: what to train on. A path or a name, as `data.source`; a map-style torch data set, or a list, of
            PIL images or uint8 (3, H, W) or (H, W, 3), alone, or first in a tuple, or in a dict; a Hugging
            Face `Dataset`; an array or tensor of uint8, (N, 3, H, W) or (N, H, W, 3), alone or in a pair
            (images, labels). Labels are not needed: they serve the kNN figures. Images are read once, brought
            to one size and kept as `data.store` says. None: the source in `config`.
        model: `model.arch` (`resnet18`, `timm:NAME`, `torchvision:NAME`), a dict of the section `model`, or a
            module, normalised images (B, 3, S, S) -> features (B, D): its weights are the start, and as it is
            copied, it keeps them.
        config: a YAML file or the name of a shipped one such as `demo`, a dict of the same shape, also with
            dots in its names, such as `{"data.image_size": 64}`, or the config of a run.
        out: run directory. None: runs/NAME for a config file NAME.yaml, else runs/python, runs/python-2, … .
        verbose: print; RUN/train.log has all lines anyway.
        settings: keys of the config, sections as dicts: `prune={"fraction": 0.5}`, or names with dots,
            `**{"prune.fraction": 0.5}`; they win over `config`, which has room for the section `data`. All
            are in ssl_emp/config.py. keep_freed_memory is False here: it would change the whole process.

    Returns:
        The run directory, with `.encoder`, `.metrics`, `.samples`, `.config`, `.folder`.

    Raises:
        UserError: whatever you can fix, in one line: settings, images, a directory that is taken.
        RunFailed: the run cannot go on; its last checkpoint is intact.
        KeyboardInterrupt: stopped; the message says whether a checkpoint was saved and how to go on.
    """
    path: Path | None = None
    overrides: list[Override] = [("keep_freed_memory", False)]
    if isinstance(config, PretrainConfig):
        overrides += pairs_of(config.model_dump(exclude={"out", "earlier_plans", "keep_freed_memory"}))
    elif isinstance(config, Mapping):
        overrides += pairs_of(config)
    elif config is not None:
        path = Path(os.path.expanduser(config))
    overrides += pairs_of(settings) + _of_data(data) + _of_model(model)
    overrides += [] if out is None else [("out", os.fspath(out))]
    checked = load_config(path, overrides, overridden_in=SETTINGS)
    folder = Path(checked.out or _first_free())
    checked = checked.model_copy(update={"out": os.fspath(folder)})
    own = _network(model)
    return _train(checked, folder, False, own, Given(_object(data), True, verbose, own is not None))


def resume(
    run: RunFolder | str | os.PathLike[str],
    data: Any = None,
    model: nn.Module | None = None,
    *,
    verbose: bool = True,
    **settings: Any,
) -> RunFolder:
    """Go on with a run from its newest checkpoint; what `ssl-emp pretrain --resume RUN key=value` does.

    The run ends with the bits of one that was never stopped. A finished run is left as it is, but for files
    of it that are missing, and is trained longer by more `epochs`.

    Args:
        run: a run directory.
        data: the images, where the run was given them as an object; where they moved, their new path.
        model: one like the module that the run was given, where `run` is a path; its weights do not matter.
        verbose: as in `pretrain`.
        settings: `epochs`, and what may change in a run: device, precision, monitor, checkpoint, … .

    Returns, raises: as `pretrain`. UserError where the images are not those of the run.
    """
    out = run.folder if isinstance(run, RunFolder) else Path(os.path.expanduser(run))
    overrides = pairs_of(settings) + _of_data(data)
    if any(key == "out" for key, _ in overrides):
        raise UserError(
            "a run stays in its directory", "move it first, then resume the new place, without out="
        )
    config, _ = read_run(out, overrides, SETTINGS)
    config = config.model_copy(update={"out": os.fspath(out)})
    if "keep_freed_memory" not in settings:
        config = config.model_copy(update={"keep_freed_memory": False})
    own = run.backbone if isinstance(run, RunFolder) and model is None else _network(model)
    return _train(config, out, True, own, Given(_object(data), True, verbose, own is not None))


def _train(
    config: PretrainConfig, out: Path, resumes: bool, backbone: nn.Module | None, given: Given
) -> RunFolder:
    needs_gpu = pick_device(config.device).type == "cuda"
    with _as_before(needs_gpu), _ranks(config.devices, config.timeout_seconds, needs_gpu) as ranks:
        own = copy_of(backbone)
        code = start_or_resume(config, out, resumes, ranks, resumes, own, given)
    if code:
        _deliver(code - 128, f"stopped, and saved in {out}. go on: {given.again(out)}")
    return RunFolder(out, backbone)


def _of_data(data: Any) -> list[tuple[str, Any]]:
    """What the config says of the images."""
    if data is None:
        return []
    if isinstance(data, str | os.PathLike):
        return [("data.source", os.fspath(data))]
    return [("data.source", IN_MEMORY), ("data.kind", KIND)]


def _object(data: Any) -> Any:
    return None if isinstance(data, str | os.PathLike) else data


def _network(model: Any) -> nn.Module | None:
    """A module as it is; None of a name."""
    if isinstance(model, Encoder):
        what = "model is an Encoder, which is frozen and normalises its images, as a run does by itself"
        raise UserError(what, "give the network in it, encoder.backbone.requires_grad_()")
    return model if isinstance(model, nn.Module) else None


def _of_model(model: Any) -> list[tuple[str, Any]]:
    if model is None:
        return []
    if (network := _network(model)) is not None:
        return [("model.arch", custom_name(network))]
    if isinstance(model, str | Mapping):
        return pairs_of({"model": {"arch": model} if isinstance(model, str) else model})
    fix = "give a name such as resnet18, a dict such as {'arch': 'resnet18', 'width': 32}, or a module"
    raise UserError(f"model is of type {type(model).__name__}", fix)


def _first_free() -> str:
    if "RANK" in os.environ:  # the processes of one run must find the same name
        return FIRST_FOLDER
    names = (f"{FIRST_FOLDER}-{number}" if number > 1 else FIRST_FOLDER for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


# ---- judging


def evaluate(
    encoder: Any,
    data: Any = None,
    evaluators: str | Sequence[str] = ("knn", "linear"),
    *,
    config: Settings | None = None,
    out: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    **settings: Any,
) -> EvalTable:
    """Judge encoders on labelled images; what `ssl-emp evaluate ENCODER EVALUATOR key=value` does::

        table = ssl_emp.evaluate(run, data=(train, test), evaluators=["knn", "linear"])

    Args:
        encoder: one, or a list: what `pretrain` returned; a run or an encoder directory; `random`, `pixels`,
            `timm:NAME`, `torchvision:NAME`; or a module, images (B, 3, H, W) float in [0, 1] -> (B, D), which
            normalises them by itself and is copied.
        data: a pair (train, test), each as `pretrain` takes it: `((images, labels), (images, labels))`; a
            path or name; or a single set, of which `config={"data.holdout": 0.2}` holds a part out. None: the
            images of the first run, from its files.
        evaluators: names of `knn`, `linear`, `fewshot`, `finetune`, `diagnose`, `transfer`.
        out: where rows are kept as EVALUATOR.json. None: in RUN/eval for a run, else nowhere.
        verbose: print what is noted on the way.
        settings: keys of the evaluators, `knn={"num_neighbors": [5, 20]}`; they win over `config`, which
            has room for the section `data`. All are in ssl_emp/commands/eval_config.py.

    Returns:
        The rows, in order, those of modules last. What could not be judged has the value None, and why.

    Raises:
        UserError: a mistake in the arguments.
        UserError, EvalError, or the error itself: where nothing at all could be judged.
    """
    names = [evaluators] if isinstance(evaluators, str) else list(dict.fromkeys(evaluators))
    for name in names:
        if name not in ALL_EVALUATORS:
            raise UserError(f"no evaluator is called {name!r}", f"use {', '.join(ALL_EVALUATORS)}")
    is_pair = isinstance(data, tuple) and len(data) == 2 and not is_labelled(data)
    pair = data if is_pair else (data, None)
    overrides: list[Override] = [*pairs_of(config or {}), *pairs_of(settings), *_of_data(pair[0])]
    if isinstance(pair[1], str | os.PathLike):
        overrides += [("data.test_source", os.fspath(pair[1]))]
    values = parse_overrides(overrides)
    checked = check(EvalConfig, values, SETTINGS)
    images = GivenImages(*map(_object, pair))
    folder = None if out is None else Path(os.path.expanduser(out))
    encoders = list(encoder) if isinstance(encoder, list | tuple) else [encoder]
    if not encoders or not names:
        raise UserError("there is nothing to judge", "name at least one encoder and one evaluator")
    needs_gpu = pick_device(checked.device).type == "cuda"
    try:
        with (
            _as_before(needs_gpu),
            _ranks(1, checked.timeout_seconds, False) as ranks,
            Interrupts() as interrupts,
        ):
            device = own_device(pick_device(checked.device), ranks)
            ledger = Ledger(interrupts, Voice(verbose and ranks.is_first), prints=False)
            subjects = _subjects(encoders, checked, values)
            judge_all(Session(checked, device, ranks, ledger), subjects, names, folder, images)
    except Stopped as stopped:
        number = stopped.number
    else:
        number = 0
    if number:
        _deliver(number, "stopped; what was judged is kept")
        return EvalTable()
    rows = list(ledger.found.values())
    if ledger.error is not None and all(row["value"] is None for row in rows):
        raise ledger.error
    return EvalTable(_typed(row) for row in rows)


def _typed(row: Row) -> EvalRow:
    values: dict[str, Any] = {name: row.get(name) for name in COLUMNS}
    return EvalRow(**values)


def _subjects(encoders: list[Any], config: EvalConfig, values: dict[str, Any]) -> list[Subject]:
    """Encoders by name as the command finds them, starts of runs among them, and then the modules."""
    names = [name for encoder in encoders if (name := _name_of(encoder)) is not None]
    runs = [encoder for encoder in encoders if isinstance(encoder, RunFolder)]
    backbones = {os.fspath(run.folder): run.backbone for run in runs if run.backbone is not None}
    found = find_subjects(list(dict.fromkeys(names)), config, values, ALL_EVALUATORS, backbones)
    modules = [encoder for encoder in encoders if isinstance(encoder, nn.Module)]
    has_source = "source" in values.get("data", {})
    if modules and not found and not has_source:
        raise UserError("there are no images to judge a module on", "give data=(train, test)")
    data = found[0].data if found and not has_source else config.data
    return found + [_module_subject(module, data, config) for module in modules]


def _name_of(encoder: Any) -> str | None:
    """An encoder as the command names it; None of a module."""
    if isinstance(encoder, nn.Module):
        return None
    if isinstance(encoder, RunFolder):
        return os.fspath(encoder.folder)
    if isinstance(encoder, str | os.PathLike):
        name = os.path.expanduser(encoder)
        return os.path.normpath(name) if os.path.exists(name) else name
    kind = type(encoder).__name__
    fix = "give a run, a path, random, pixels, timm:NAME, torchvision:NAME, or a module"
    raise UserError(f"an encoder is of type {kind}", fix)


def _module_subject(module: nn.Module, data: DataConfig, config: EvalConfig) -> Subject:
    size = config.data.image_size or getattr(module, "image_size", None)
    copied = copy_of(module)
    return Subject(type(module).__name__, "from Python", data, size, fixed(copied), None)


# ---- the process that calls


@contextmanager
def _as_before(needs_gpu: bool) -> Iterator[None]:
    """Gradients on in here; afterwards torch's generators, threads and modes are what they were."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if needs_gpu else []
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def _ranks(devices: int | str, timeout_seconds: float, needs_gpu: bool) -> Iterator[Ranks]:
    """This process among those that torchrun started, else alone. An error of one ends the work of all."""
    if "RANK" not in os.environ:
        if count_devices(devices) > 1:
            what = f"devices={devices} would start this program {count_devices(devices)} times"
            raise UserError(what, "leave devices out, and start it by torchrun --nproc-per-node N")
        yield ALONE
        return
    ranks = join_ranks(1, timeout_seconds, needs_gpu, call=next(MEETINGS))
    try:
        yield ranks
    except Exception as error:
        if not isinstance(error, LostRank):
            ranks.report_failure(f"{type(error).__name__}: {first_line(error)}", 3)
        raise
    leave_ranks(ranks)


def _deliver(number: int, line: str) -> None:
    """A signal that was held back, to whom it would have gone: Ctrl-C raises KeyboardInterrupt."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(line) from None
