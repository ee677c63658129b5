"""Pretrain an image encoder with SimCLR, training each epoch on the samples worth it (EMP, arXiv 2408.16031).

    python pretrain.py --config configs/demo.yaml
    python pretrain.py --config configs/cifar10_emp.yaml data.source=./images prune.fraction=0.5 out=runs/mine
    python pretrain.py --config configs/demo.yaml --dry-run  # what would happen, and a picture of the views
    python pretrain.py --resume runs/mine
    python pretrain.py --config configs/cifar10_emp.yaml devices=2  # or by torchrun --nproc-per-node 2

config -> job (images, network, pruner) -> epochs of choose, train, look -> encoder. Exit codes: 0 done, 2 the
user can fix it, 3 the run failed with its last checkpoint intact, 130/143 stopped by SIGINT/SIGTERM after
saving.
"""

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from linear_eval.errors import first_line
from ssl_emp.augment import Recipe, cut_views, draw_features, draw_params, grid_of_views
from ssl_emp.commands.arguments import pretrain_parser
from ssl_emp.commands.card import try_to_renew
from ssl_emp.commands.given import FROM_A_SHELL, Given
from ssl_emp.commands.job import Job, prepare, view_sizes
from ssl_emp.commands.monitoring import Monitor
from ssl_emp.commands.next_command import next_command
from ssl_emp.commands.resume import (
    broken_files,
    check_same,
    is_finished,
    is_run,
    load_state,
    longer_line,
    missing_source,
    read_run,
    repair,
    with_places,
    write_config,
)
from ssl_emp.config import PretrainConfig, load_config
from ssl_emp.data.images import ImageSet
from ssl_emp.data.objects import IN_MEMORY
from ssl_emp.device import pick_device
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.keyed import seed_generators
from ssl_emp.loggers.feed import check_installed
from ssl_emp.loss import dcl, nt_xent, nt_xent_and_dcl
from ssl_emp.model import save_encoder
from ssl_emp.optim import build_optimizer
from ssl_emp.prune import Seen, closeness, entropy
from ssl_emp.prune.plan import shuffled_batches
from ssl_emp.run.lock import START, Held, is_unused, sole_writer
from ssl_emp.run.pace import seconds_of
from ssl_emp.run.ranks import (
    ALONE,
    LostRank,
    NoPlace,
    Ranks,
    end_with_line,
    is_exchange,
    join_ranks,
    leave_ranks,
)
from ssl_emp.run.report import Report, duration, write_environment, write_samples
from ssl_emp.run.run import Run
from ssl_emp.run.stop import Stop
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.safe_files import as_json, inner_folder, replacing, write_atomically
from ssl_emp.supervised import Classifier, cross_entropy
from ssl_emp.text import command_line, quoted

# for the other processes of a run that was started from Python: this very package, wherever it lies
AS_COMMAND = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
    "from ssl_emp.commands.pretrain import main; sys.exit(main())"
)

TRAINED, SCORED = 1, 2  # streams of what a network draws by itself
OUT_OF_MEMORY = (
    "--resume where there is more memory, or start again with a lower batch_size or model.width, and "
    "another out=DIR"
)


# ---- the method --------------------------------------------------------------------------------------------


def forward(
    job: Job, network: Any, views_of: Any, index: Tensor, images: Tensor, epoch: int, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A batch through the network, its augmentation keyed on (seed, epoch, index).

    Returns:
        loss (b,) in nats to train on; scored (b,), the loss that scores are made of, which is the same one
        unless `prune.scoring_loss` asks for another, and memory (b,), of which EMP's score is scored + beta *
        memory (`Emp.score` in prune/policies.py); and what was drawn (b, F), where the pruner uses it.
    """
    config, policy, side = job.config, job.pruner.policy, images.shape[-1]
    draw = draw_params(config.seed, epoch, index, recipe, side)
    if config.objective == "supervised":
        assert job.labels is not None
        (view,) = views_of(images, draw[:1], recipe)
        _, logits = through(job, network, view)
        loss = cross_entropy(logits, job.labels.values[index], config.label_smoothing)
        return loss, loss, entropy(logits), None
    view_a, view_b = views_of(images, draw, recipe)
    h, z = through(job, network, torch.cat([view_a, view_b]))  # one BatchNorm pass over both views, as SimCLR
    (h_a, h_b), (z_a, z_b) = h.chunk(2), z.chunk(2)
    loss, scored = contrastive(config.loss, config.scored_loss, z_a, z_b, config.temperature, job.ranks)
    memory = closeness(h_a, h_b, normalized=policy.memory == "normalized")
    return loss, scored, memory, draw_features(*draw, side) if policy.adjusts else None


def contrastive(
    trained: str, scored: str, z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The losses (b,) of these names, `nt_xent` or `dcl`, to train on and to score by; one pass for both."""
    if trained == scored:
        loss = (nt_xent if trained == "nt_xent" else dcl)(z_a, z_b, temperature, ranks)
        return loss, loss
    coupled, decoupled = nt_xent_and_dcl(z_a, z_b, temperature, ranks)
    return (coupled, decoupled) if trained == "nt_xent" else (decoupled, coupled)


def through(job: Job, network: Any, views: Tensor) -> tuple[Tensor, Tensor]:
    """Views (M, 3, S, S) -> backbone features (M, D) and projections or logits (M, P)."""
    with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.bf16):
        return network(views.to(memory_format=job.memory_format))


def pretrain(job: Job, run: Run, stop: Stop) -> int:
    """Train `job` from where `run` stands to its end, or until `stop`. Returns the exit code."""
    config, pruner, ranks, guard, report = job.config, job.pruner, job.ranks, run.guard, run.report
    model, views_of = compiled(job, report)
    network = ranks.share_gradients(model)  # after the weights are those of the checkpoint on all ranks
    score = partial(score_batches, job, model, views_of)
    monitor = Monitor(job, report)
    if run.step < job.total_steps:
        report.say(f"columns   {monitor.columns()}")
    job.model.train()
    with run.clock("monitoring"):
        monitor.start(run.step)
    for epoch in range(run.epoch, len(pruner.steps)):
        recipe = job.recipe_at(epoch)  # the size of its views
        # ---- choose: which samples, in which order
        with run.clock("scoring"):
            # nothing where scores are stale, the default; the views of a scoring pass may be smaller
            size = getattr(config.prune, "scoring_size", None) or recipe.size
            pruner.rescore(epoch, partial(score, recipe=replace(recipe, size=size)))
        with run.clock("training"):
            batches = pruner.batches(epoch)  # (steps, B) on the device
            known = (pruner.record.terms, pruner.record.times_trained)
            ranks.agree_on(f"the samples of epoch {epoch + 1}", batches, *known)

            # ---- train
            for index, images in run.stream(job.store, batches, epoch):
                seed_generators(job.device, config.seed, TRAINED, run.step, ranks.rank)  # for dropout
                loss, scored, memory, draw = forward(job, network, views_of, index, images, epoch, recipe)
                run.optimizer.zero_grad(set_to_none=True)
                pruner.weighted(index, loss).backward()
                seen = pruner.gather(index, scored, memory, draw)  # of all ranks
                job.schedule.set(run.optimizer, run.step)
                finite = guard.step(seen.terms, run.step_in_epoch, batches)  # 0-d bool: no host sync
                pruner.observe(seen, where=finite)
                if signal := run.save_if_due(stop, batches, epoch):
                    return 128 + signal
        guard.check(batches, epoch)

        # ---- look
        with run.clock("monitoring"):
            knn = monitor.knn(epoch)
            reliability = monitor.reliability(epoch, partial(score, recipe=recipe))
        labels, is_noisy = (job.labels.values, job.labels.is_noisy) if job.labels else (None, None)
        row = run.figures(batches) | pruner.figures(labels, is_noisy) | reliability | guard.figures() | knn
        row["lr"] = job.schedule.lr(run.step - 1)
        said = pruner.advice(row, job.images.class_names)
        run.end_epoch(row, guard.skipped_line(batches, epoch), monitor.below_start(row), said)
    guard.check_weights(run.step)
    if ranks.is_first:
        export(job, run)
    return 0


@torch.no_grad()
def score_batches(
    job: Job, network: Any, views_of: Any, batches: Tensor, key: int, recipe: Recipe | None = None
) -> Seen:
    """Batches (steps, B) through the network of now without training it: what all ranks see, in order.

    The network is in training mode, so that scores can be compared with those of trained samples: BatchNorm
    normalises by the batch, dropout and dropped paths are drawn, keyed on (seed, key, batch, rank). Running
    statistics and other buffers are as before afterwards.
    """
    buffers = list(job.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    parts = []
    for number, (index, images) in enumerate(job.store.stream(job.ranks.part(batches))):
        seed_generators(job.device, job.config.seed, SCORED, key, number, job.ranks.rank)
        _, scored, memory, draw = forward(job, network, views_of, index, images, key, recipe or job.recipe)
        parts.append(job.pruner.gather(index, scored, memory, draw))
    if buffers:  # torch copies no empty list
        torch._foreach_copy_(buffers, before)
    draws = [part.covariates for part in parts if part.covariates is not None]
    terms = torch.cat([part.terms for part in parts], dim=1)
    return Seen(torch.cat([part.index for part in parts]), terms, torch.cat(draws) if draws else None)


def compiled(job: Job, report: Report) -> tuple[Any, Any]:
    """(network, cut_views), through torch.compile where it is asked for and a compiler is found."""
    if not job.config.compile:
        return job.model, cut_views
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=job.device))
    except Exception as error:  # dynamo wraps a missing C++ compiler or triton in many types
        report.say(f"compile   not available ({type(error).__name__}), going on without it")
        return job.model, cut_views
    if job.config.cuda_graphs and job.device.type == "cuda":
        replayed = compiled_by_size(cut_views, job, report, mode="reduce-overhead")

        def views_of(*arguments: Any) -> tuple[Tensor, ...]:
            # every step, trained or scored, begins here: the outputs of the last one may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
            return replayed(*arguments)

        return torch.compile(job.model, mode="reduce-overhead"), views_of
    if job.config.cuda_graphs:
        report.say("compile   cuda_graphs needs a GPU, going on without it")
    return torch.compile(job.model), compiled_by_size(cut_views, job, report)


def compiled_by_size(function: Callable[..., Any], job: Job, report: Report, **options: Any) -> Any:
    """torch.compile with room for a version of the function for each size of the views. Beyond its limit of
    eight versions, torch would run the function uncompiled.
    """
    sizes = {*job.sizes.all, getattr(job.config.prune, "scoring_size", None) or job.recipe.size}
    versions = 2 * len(sizes)  # trained on, and scored without gradients
    if versions > torch._dynamo.config.recompile_limit:
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options["recompile_limit"] = versions
        else:
            report.say(f"compile   this torch compiles no {len(sizes)} sizes of views; the last are slower")
    return torch.compile(function, dynamic=False, **options)


# ---- what a run leaves behind ------------------------------------------------------------------------------


def export(job: Job, run: Run) -> None:
    """Encoder, samples.parquet, result.json, and last the checkpoint: a run that says "finished" has
    everything else.
    """
    config, pruner, out, report = job.config, job.pruner, run.folder, run.report
    if run.held is not None:
        run.held.check()
    table = pruner.table()
    unseen = table["memory"] == torch.inf
    if config.objective == "simclr":
        table["distance"] = torch.where(unseen, torch.inf, -table["memory"])
    else:
        table["entropy"] = torch.where(unseen, -torch.inf, table["memory"])
    order = ("loss", "distance", "entropy", "score", "times_trained", "scored_epoch")
    columns = {name: table[name] for name in order if name in table}
    images = job.images
    pixels = images.content["pixels"] if config.data.source == IN_MEMORY else None
    write_samples(out / "pruning" / "samples.parquet", images.names, columns, pixels)
    save_encoder(job.encoder, inner_folder(out, "encoder"), config.epochs)
    accuracy = None if job.test is None else classify(job, job.test)
    if job.test is not None and accuracy is not None:
        result = {
            "test_accuracy": round(100 * accuracy, 2),
            "test_images": len(job.test.names),
            "epoch": len(pruner.steps),
        }
        write_atomically(out / "result.json", (as_json(result) + "\n").encode())
    try_to_renew(out, None, report.say)
    run.epoch = len(pruner.steps)
    if not run.was_finished:
        run.save()
    # a step of the same run without pruning costs what this one's of the same size did
    sizes = view_sizes(job.sizes, replace(pruner.plan, shorter=False), config.epochs)
    unpruned = seconds_of(run.pace(), [job.full_steps // config.epochs] * config.epochs, sizes)
    report.say(f"done      {len(pruner.steps)} epochs in {time_line(run.seconds)}")
    if job.test is not None and accuracy is not None:
        report.say(f"accuracy  {100 * accuracy:.2f}% of {len(job.test.names):,} test images, last epoch")
    trained, full = run.step * config.batch_size, job.full_steps * config.batch_size
    report.say(f"saved     {saved_line(trained, full, run.seconds, unpruned)}")
    report.say(f"encoder   {out / 'encoder'}", folds=False)
    report.say(f"evaluate  {next_command(out, config, run.in_python)}", folds=False)
    report.say(f"report    {command_line('report')} {quoted(out)}", folds=False)


@torch.no_grad()
def classify(job: Job, test: ImageSet) -> float:
    """Accuracy in 0..1 of a supervised run's classifier on all of `test`, in eval mode."""
    assert isinstance(job.model, Classifier) and test.labels is not None
    job.model.eval()
    right = 0
    mean, std = job.encoder.mean, job.encoder.std
    for start in range(0, len(test.names), job.config.batch_size):
        images = test.pixels[start : start + job.config.batch_size].to(job.device)
        _, logits = job.model(((images.float() / 255 - mean) / std).to(memory_format=torch.channels_last))
        right += int((logits.argmax(1).cpu() == test.labels[start : start + job.config.batch_size]).sum())
    job.model.train()
    return right / len(test.names)


def time_line(seconds: dict[str, float]) -> str:
    """What a run took, and where; seconds by part."""
    together = sum(seconds[part] for part in ("training", "scoring", "monitoring"))
    parts = [f"training {duration(seconds['training'])}"]
    parts += [f"scoring passes {duration(seconds['scoring'])}"] if seconds["scoring"] >= 0.5 else []
    beside = seconds["monitoring"]
    parts += [f"monitoring {duration(beside)}, {beside / together:.1%} of it"]
    return f"{duration(together)}: {', '.join(parts)}"


def saved_line(samples: int, unpruned: int, seconds: dict[str, float], unpruned_seconds: float) -> str:
    """What pruning saved, in samples and in time, less what scoring passes took.

    Args:
        samples, unpruned: trained on, over all epochs, in this run and in the same one with every step.
        seconds: of this run, by part.
        unpruned_seconds: of training, of the same run with every step, see `seconds_of`.
    """
    if samples == unpruned:
        return f"nothing: {samples:,} samples, which are all of them in every epoch"
    counts = f"{samples:,} trained on, {unpruned:,} without pruning"
    fewer = f"{1 - samples / unpruned:.0%} of the samples: {counts}"
    saved = unpruned_seconds - seconds["training"] - seconds["scoring"]
    if saved < 0:
        return f"{fewer}; no time: scoring took {duration(-saved)} more than the steps it left out"
    share = saved / unpruned_seconds
    return f"{fewer}; about {duration(saved)} of training, {share:.0%} of {duration(unpruned_seconds)}"


# ---- the command -------------------------------------------------------------------------------------------


def parse_settings(arguments: argparse.Namespace) -> tuple[PretrainConfig, Path, bool]:
    """The command line as (config, run directory, whether that is resumed)."""
    if arguments.resume is None:
        config = load_config(arguments.config, arguments.overrides)
        out = Path(config.out or "runs/default")
        return config, out, arguments.auto_resume and is_run(out)
    out = Path(arguments.resume)
    if any(override.startswith("out=") for override in arguments.overrides):
        fix = "move it first, then --resume the new place, without out="
        raise UserError("a run stays in its directory", fix)
    config, _ = read_run(out, arguments.overrides)
    return config.model_copy(update={"out": str(out)}), out, True


def start_or_resume(
    config: PretrainConfig,
    out: Path,
    resumes: bool,
    ranks: Ranks,
    may_extend: bool = False,
    backbone: nn.Module | None = None,
    given: Given = FROM_A_SHELL,
) -> int:
    """One run, as one of its ranks: what the command and `ssl_emp.pretrain` both do.

    Args:
        may_extend: more epochs than it has are asked for on purpose.
        backbone: the network that `model.arch: custom:CLASS` stands for.
        given: what else the config cannot hold.

    Returns:
        0, or 128 + the number of the signal that stopped it, after a checkpoint was saved.
    """
    report, state, before = Report(not ranks.is_first, given.verbose), None, config
    held: Held | None = None
    with ExitStack() as stack:
        if ranks.is_first:  # before the images are read; a mistake leaves nothing behind
            check_installed(config.monitor.loggers)
            check_unused(out, resumes, given)
            held = stack.enter_context(sole_writer(out))
            # another process may have taken the directory before we held the lock
            check_unused(out, resumes, given)
        finished = False
        if resumes:
            config, before, state = load_state(config, out, report, may_extend)
            finished = state is not None and is_finished(state, config)
            if finished and state is not None and repair(config, before, out, state, report, held, backbone):
                return 0
        try:
            start = first_weights(out, state, resumes)
            job = prepare(config, report, ranks, backbone, given, weights=start)
        except UserError as problem:
            is_missing = resumes and given.images is None
            raise missing_source(config, out, problem) if is_missing else problem from None
        config = job.config  # with the start's normalisation
        before = before if resumes else config
        if state:
            check_same(job, state, before, out)
        check_same_everywhere(job, state, out)
        config = job.config  # with numbers where `auto` stood for one
        kept = with_places(before, config) if resumes else config
        if held is not None:
            held.check()  # reading the images may have taken an hour
            if not resumes or kept != read_run(out, [])[0]:
                write_config(out, kept)
            if resumes and not finished:
                where = "no checkpoint yet, from the beginning"
                if state:
                    where = f"epoch {state['epoch'] + 1}, step {state['step']}"
                report.say(f"resume    {where}")
                if line := longer_line(job, before):
                    report.say(f"longer    {line}")
        if finished and state is not None and not broken_files(out, config, state, backbone):
            report.say(
                f"{out} is finished, nothing to do. next: {next_command(out, config, given.in_python)}",
                folds=False,
            )
            return 0
        code = 3
        try:
            with Stop() as stop:
                stop.ends_process = not given.in_python
                code = pretrain(job, open_run(job, out, state, report, held, given), stop)
            return code
        finally:
            report.close(finished=code == 0)


def first_weights(
    out: Path, state: dict[str, Any] | None, resumes: bool
) -> Path | Literal["model.init", "checkpoint"]:
    """Where a run's weights are: once it has begun it needs model.init no more, which may be gone."""
    if state is not None:
        return "checkpoint"
    kept = out / START
    return kept if resumes and (kept / "config.json").is_file() else "model.init"


def check_unused(out: Path, resumes: bool, given: Given) -> None:
    if not resumes and not is_unused(out):
        again = given.again(out) if given.in_python else f"--resume {quoted(out)}"
        fix = f"go on with {again}, or choose another out=DIR"
        raise UserError(f"{out} exists and is not empty", fix)


def check_same_everywhere(job: Job, state: dict[str, Any] | None, out: Path) -> None:
    """Raise UserError where the ranks see other images or another checkpoint."""
    here = f"{job.fingerprint} {state['step'] if state else 'no checkpoint'}"
    differing = [rank for rank, there in enumerate(job.ranks.barrier(here)) if there != here]
    if differing:
        who = f"rank {differing[0]} and rank {job.ranks.rank}"
        what = f"{who} see other images in {job.config.data.source}, or another checkpoint in {out}"
        raise UserError(what, "give all machines the same files")


def open_run(
    job: Job,
    out: Path,
    state: dict[str, Any] | None,
    report: Report,
    held: Held | None = None,
    given: Given = FROM_A_SHELL,
) -> Run:
    """The run in the directory `out`, from `state` where a checkpoint gave one, with its files open."""
    config, settings = job.config, job.config.optimizer
    fingerprint = json.dumps(job.fingerprint)
    run = Run(
        out,
        held,
        report,
        job.ranks,
        job.model,
        build_optimizer(
            job.model,
            settings.name,
            job.schedule.peak_lr,
            settings.momentum,
            settings.weight_decay,
            job.lr_scales,
        ),
        job.pruner,
        max_bad_steps=config.max_bad_steps,
        every_minutes=config.checkpoint.every_minutes,
        every_steps=config.checkpoint.every_steps,
        source={"config": config.model_dump(), "fingerprint": fingerprint, "bf16": job.bf16},
        state=state,
        view_sizes=job.view_sizes,
        all_sizes=job.sizes.all,
        again=given.again(out),
        in_python=given.in_python,
        threads=job.threads,
        verbose=config.monitor.verbose,
    )
    run.was_finished = (
        state is not None and is_finished(state, config) and state["fingerprint"] == fingerprint
    )
    # that of a finished run is of its training
    if job.ranks.is_first and (run.step < job.total_steps or not (out / "environment.json").is_file()):
        write_environment(out / "environment.json", job.device)
    if job.ranks.is_first and job.taken is not None:
        # the encoder before its first step, which evaluate.py judges beside the run
        save_encoder(job.encoder, inner_folder(out, START))
        size = (out / START / "model.safetensors").stat().st_size
        report.say(f"start     kept in {out / START}, {size / 1e6:.1f} MB")
    report.attach(out, config.monitor.loggers, held)
    report.forget_from(run.epoch + 1 if run.step else 0)
    return run


def dry_run(job: Job, report: Report) -> int:
    """Print the resolved config, draw one batch of views, run one step's arithmetic, train nothing."""
    put("stdout", yaml.safe_dump(job.config.model_dump(), sort_keys=False) + "\n")
    Monitor(job, report)
    batches = shuffled_batches(
        torch.arange(job.num_samples, device=job.device), job.config.batch_size, job.config.seed, 0
    )
    index, images = next(iter(job.store.stream(batches[:1])))
    pace = {}
    for size in job.sizes.all:  # the last is job.recipe's
        for _ in range(2):  # the first time warms up memory and libraries, the second is timed
            began = time.perf_counter()
            recipe = replace(job.recipe, size=size)
            loss = forward(job, job.model, cut_views, index, images, 0, recipe)[0].mean()
            loss.backward()
            value = loss.item()  # waits for the GPU
            pace[size] = 1, time.perf_counter() - began
    took = seconds_of(pace, job.steps, job.view_sizes)
    view_a, view_b = cut_views(
        images, draw_params(job.config.seed, 0, index, job.recipe, images.shape[-1]), job.recipe
    )
    grid = grid_of_views(view_a[:32].cpu(), view_b[:32].cpu(), job.recipe)  # (3, H, W)
    # without the slash at its end, which would lead into it
    out = Path(os.path.normpath(job.config.out or "runs/dry-run"))
    # hidden files are no images
    picture = out.with_name(f".{out.name}.views.png") if out.name not in ("", "..") else out / ".views.png"
    shown = str(picture)
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        with replacing(picture) as file:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG")
    except OSError as error:
        shown = (
            f"cannot be written to {picture} ({error.strerror or error}); give out=DIR in a place "
            "that can be written to"
        )
    report.say(
        f"one batch loss {value:.3f}, {pace[job.sizes.last][1]:.2f}s: about {duration(took)} for "
        "the run, without torch.compile"
    )
    report.say(f"views     {shown}")
    report.say("dry run: nothing was trained")
    return 0


def main(argv: list[str] | None = None) -> int:
    prepare_streams("replace")  # a terminal without a beta, or none at all, is no reason to end a run
    ranks = ALONE
    try:
        arguments = pretrain_parser().parse_intermixed_args(argv)
        if arguments.resume and (arguments.config or arguments.dry_run or arguments.auto_resume):
            raise UserError(
                "--resume takes its config from the run", "drop --config, --auto-resume and --dry-run"
            )
        if not arguments.resume and not arguments.config:
            fix = "give --config FILE, or a name such as --config demo, or --resume RUN"
            raise UserError("nothing to do", fix)
        config, out, resumes = parse_settings(arguments)
        if arguments.dry_run:
            check_installed(config.monitor.loggers)
            return dry_run(prepare(config, report := Report()), report)
        command = [sys.executable, *(sys.orig_argv[1:] if argv is None else ["-c", AS_COMMAND, *argv])]
        ranks = join_ranks(
            config.devices, config.timeout_seconds, pick_device(config.device).type == "cuda", command
        )
        code = start_or_resume(config, out, resumes, ranks, may_extend=arguments.resume is not None)
        leave_ranks(ranks)
        return code
    except UserError as error:
        # without a place this may be the only process, so it tells the user itself
        return end_with_line(str(error), 2, ranks, True if isinstance(error, NoPlace) else None)
    except LostRank as error:
        return end_with_line(str(error), error.code, ranks, error.speaks, error.lost)
    except RunFailed as error:
        return end_with_line(str(error), 3, ranks)
    except OSError as error:  # what a full or vanished disk raises from any of the run's files
        what = f"{error.filename or 'a file of the run'}: {error.strerror or error}"
        return end_with_line(f"{what}. fix: see to the disk and its permissions, then --resume", 3, ranks)
    except KeyboardInterrupt:  # before the first step: nothing to save
        return 130
    except Exception as error:
        # a RuntimeError that says so is how torch reports it on a CPU
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return end_with_line(f"out of memory ({first_line(error)[:100]}). fix: {OUT_OF_MEMORY}", 3, ranks)
        if is_exchange(error, ranks):
            lost = ranks.lost_rank(error)
            return end_with_line(str(lost), lost.code, ranks, lost.speaks, lost.lost)
        ranks.report_failure(f"{type(error).__name__}: {error}", 3)
        ranks.release_children()
        raise  # a bug: the traceback is what helps
