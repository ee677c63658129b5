"""Pretrain an image encoder with SimCLR, training each epoch on the samples worth it (EMP, arXiv 2408.16031).

    python pretrain.py --config configs/demo.yaml
    python pretrain.py --config configs/cifar10_emp.yaml data.source=./images prune.fraction=0.5 out=runs/mine
    python pretrain.py --config configs/demo.yaml --dry-run      # what would happen, and a picture of the
    views
    python pretrain.py --resume runs/mine
    python pretrain.py --config configs/cifar10_emp.yaml devices=2        # or: torchrun --nproc-per-node 2
    pretrain.py --config …

config -> job (ssl_emp/commands/job.py) -> epochs(select, stream, score, step) -> encoder. Exit codes: 0 done,
2 the user can fix it, 3 the run failed with its last checkpoint intact, 130/143 stopped by SIGINT/SIGTERM
after saving.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from ssl_emp.augment import cut_views, draw_params, grid_of_views
from ssl_emp.commands.job import LEARNED_SHARE, Job, prepare
from ssl_emp.commands.monitoring import monitor_knn, pick_monitor_set, schedule, schedule_line
from ssl_emp.commands.next_command import next_command
from ssl_emp.commands.resume import (
    broken_files,
    check_same,
    image_size,
    is_finished,
    is_run,
    load_state,
    lost_epochs,
    missing_source,
    read_run,
    restore_encoder,
    with_places,
)
from ssl_emp.config import PretrainConfig, load_config
from ssl_emp.data.images import ImageSet
from ssl_emp.device import pick_device
from ssl_emp.diagnostics import Finding, diagnose, findings, next_to_say
from ssl_emp.errors import Parser, RunFailed, UserError, path_argument
from ssl_emp.model import save_encoder
from ssl_emp.optim import (
    build_optimizer,
    gradient_norm,
    one_cycle_momentum,
    set_lr,
    set_momentum,
    step_where,
)
from ssl_emp.passes import (
    compiled,
    foresee,
    gathered,
    measure_reliability,
    score_passes,
    split_by_age,
    terms_of,
)
from ssl_emp.pruning import shuffled_batches
from ssl_emp.run.checkpoint import save_checkpoint
from ssl_emp.run.lock import Held, is_unused, sole_writer
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
from ssl_emp.run.report import Report, duration, rank_correlation, write_environment, write_samples
from ssl_emp.run.state_check import check_state
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.safe_files import as_json, inner_folder, replacing, write_atomically
from ssl_emp.scores import ScoreState
from ssl_emp.supervised import Classifier
from ssl_emp.text import quoted

# for the other processes of a run that was started from Python: this very package, wherever it lies
AS_COMMAND = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
    "from ssl_emp.commands.pretrain import main; sys.exit(main())"
)

OUT_OF_MEMORY = (
    "--resume where there is more memory, or start again with a lower batch_size or model.width, and "
    "another out=DIR"
)


class Stop:
    """SIGTERM, SIGINT, SIGUSR1, SIGHUP: finish the step, save, leave. A second signal leaves at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal: int = 0

    def __enter__(self) -> "Stop":
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number, handler in self.before.items():
            # nohup ignores it, so that a run outlives its terminal
            if number != signal.SIGHUP or handler != signal.SIG_IGN:
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for again in self.SIGNALS:
            if signal.getsignal(again) == self._note:
                signal.signal(again, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            if handler is not None:  # else it is not Python's
                signal.signal(number, handler)


def pretrain(
    job: Job, out: Path, state: dict[str, Any] | None, report: Report, stop: Stop, held: Held | None = None
) -> int:
    """Train `job` to its end in `out`, from `state` where a checkpoint gave one, or until `stop`. Returns the
    exit code.

    `held` is the directory as it was locked, of the process that writes.
    """
    config, prune, plan, device = job.config, job.config.prune, job.plan, job.device
    num_samples, batch_size, total_steps, ranks = (
        job.num_samples,
        config.batch_size,
        job.total_steps,
        job.ranks,
    )
    model, views_of = compiled(job, report)
    optimizer = build_optimizer(
        job.model,
        config.optimizer.name,
        config.optimizer.lr,
        config.optimizer.momentum,
        config.optimizer.weight_decay,
    )
    one_cycle = config.optimizer.schedule == "onecycle"
    measuring = schedule(job)
    rescores = job.rule.scores and prune.scoring != "stale"

    scores = ScoreState(num_samples, prune.score_ema, prune.adjusts, device, prune.shrink)
    start, step_in_epoch, step, batches, weight = 0, 0, 0, None, None
    # (steps,) of the epoch, of their gradients; inf where the loss or a gradient was not finite
    norms: Tensor | None = None
    # steps that were skipped: in a row until now, the longest row since the start
    bad = torch.zeros(2, dtype=torch.int64, device=device)
    before: dict[str, Tensor] = {}  # what the epoch's diagnosis compares with
    said: dict[str, tuple[int, float]] = {}  # what it told, when, and how bad it was
    seconds = {"training": 0.0, "scoring": 0.0, "monitoring": 0.0}

    def snapshot(
        epoch: int, step_in_epoch: int, batches: Tensor | None, weight: Tensor | None
    ) -> dict[str, Any]:
        model_state = {"model": job.model.state_dict(), "optimizer": optimizer.state_dict()}
        per_sample = {
            "scores": scores.state_dict(),
            "batches": batches,
            "weight": weight,
            "before": before,
            "said": said,
        }
        per_sample |= {"norms": norms, "bad_in_a_row": bad[0]}
        position = {
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "step": step,
            "finished": step == total_steps,
            "seconds": dict(seconds),
        }
        source = {"config": config.model_dump(), "fingerprint": json.dumps(job.fingerprint), "bf16": job.bf16}
        return {**model_state, **per_sample, **position, **source}

    def save(epoch: int, step_in_epoch: int, batches: Tensor | None, weight: Tensor | None) -> None:
        check_weights(job.model, step)
        if ranks.is_first:
            if held is not None:
                held.check()
            save_checkpoint(out / "checkpoints", snapshot(epoch, step_in_epoch, batches, weight), step)

    if state is not None:
        check_state(state, snapshot(0, 0, None, None), optimizer, out / "checkpoints", job.steps, batch_size)
        job.model.load_state_dict(state["model"])
        # its groups as the config makes them, since another torch has other keys there; what moves is that of
        # the last step
        groups = [
            own | {name: group[name] for name in ("lr", "momentum") if name in own and name in group}
            for own, group in zip(
                optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"], strict=True
            )
        ]
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        scores.load_state_dict(state["scores"])
        start, step_in_epoch, step, seconds = (
            state["epoch"],
            state["step_in_epoch"],
            state["step"],
            dict(state["seconds"]),
        )
        if step_in_epoch:
            batches, weight = (
                None if part is None else part.to(device) for part in (state["batches"], state["weight"])
            )
            before = {name: part.to(device) for name, part in state["before"].items()}
            norms = state["norms"].to(device)
        bad[0], said = state["bad_in_a_row"], dict(state["said"])
    # else it is that of the training
    if ranks.is_first and (step < total_steps or not (out / "environment.json").is_file()):
        write_environment(out / "environment.json", device)
    report.attach(out, config.monitor.tensorboard, held)
    report.forget_from(start + 1)
    trained = ranks.share_gradients(model)  # after the weights are those of the checkpoint on all ranks
    parameters, buffers = list(job.model.parameters()), list(job.model.buffers())
    kept_buffers = [buffer.clone() for buffer in buffers]

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once an epoch: a time without it is the time to queue the work
        return time.perf_counter()

    through_network = terms_of(job)
    saved_at, saved_step = time.monotonic(), step
    monitor_set = pick_monitor_set(job) if ranks.is_first and measuring.knn_every else None
    if line := schedule_line(job, measuring):
        report.say(f"monitor   {line}")
    job.model.train()
    for epoch in range(start, len(job.steps)):
        began = clock()
        if batches is None:
            if plan.is_pruned(epoch):
                before = {
                    "trained_epoch": scores.trained_epoch.clone(),
                    "scored_epoch": scores.scored_epoch.clone(),
                }
                before |= (
                    {"score": job.rule.score(scores.last, scores.variance, epoch)} if job.rule.ranks else {}
                )
            if (
                rescores
                and plan.is_pruned(epoch)
                and (epoch - prune.warmup_epochs) % prune.rescore_every == 0
            ):
                left_out, others = split_by_age(job, scores.scored_epoch, epoch)
                if len(left_out):
                    terms, draws = score_passes(job, model, views_of, left_out, others, epoch)
                    known = terms.isfinite().all(0)  # the others stay as they were
                    # older than whatever this epoch trains on
                    scores.observe(
                        left_out[known], terms[:, known], None if draws is None else draws[known], epoch - 1
                    )
                seconds["scoring"] += clock() - began
                began = clock()
            foreseen = foresee(job, scores, epoch) if prune.foresees and plan.is_pruned(epoch) else None
            kept = job.rule.choose(scores, epoch, job.steps[epoch] * batch_size, config.seed, foreseen)
            # shorter ends within an epoch
            batches = shuffled_batches(kept.index, batch_size, config.seed, epoch)[: job.steps[epoch]]
            weight = None
            if kept.weight is not None:
                weight = torch.ones(num_samples, device=device)
                weight[kept.index] = kept.weight
            norms = torch.zeros(len(batches), device=device)
            ranks.agree_on(f"the samples of epoch {epoch + 1}", batches, scores.terms, scores.times_trained)
        assert norms is not None
        first_step, seconds_before = step_in_epoch, seconds["training"]
        label = f"epoch {epoch + 1}/{len(job.steps)}"

        with report.progress(
            job.store.stream(ranks.part(batches[first_step:])), len(batches), label, first_step
        ) as stream:
            for index, images in stream:
                torch._foreach_copy_(kept_buffers, buffers)
                loss, memory, draw = through_network(job, trained, views_of, index, images, epoch, job.recipe)
                weighted = loss if weight is None else loss * weight[index]
                optimizer.zero_grad(set_to_none=True)
                weighted.mean().backward()
                terms, draws = gathered(job, loss, memory, draw)
                norm = gradient_norm(parameters)  # of all ranks: the gradients are summed by now
                good = terms.isfinite().all() & norm.isfinite()
                set_lr(optimizer, job.lr_of(step))
                if one_cycle:
                    set_momentum(optimizer, one_cycle_momentum(step, job.planned_steps(step)))
                step_where(optimizer, good)
                restore_unless(good, buffers, kept_buffers)
                scores.observe(batches[step_in_epoch], terms, draws, epoch, good)
                scores.count_trained(batches[step_in_epoch], epoch, good)
                norms[step_in_epoch] = norm.where(good, torch.inf)
                bad = count_in_a_row(bad, good)
                step, step_in_epoch = step + 1, step_in_epoch + 1
                minutes, steps = (time.monotonic() - saved_at) / 60, step - saved_step
                is_due = minutes > config.checkpoint.every_minutes or steps == config.checkpoint.every_steps
                # read once: a signal may come at any moment
                stopping, due = ranks.highest(stop.signal, is_due)
                # on a GPU, reading the count waits for it: seldom
                if device.type == "cpu" or due or stopping:
                    check_bad_steps(bad, config.max_bad_steps, norms.isinf(), batches, epoch)
                if due or stopping:
                    seconds["training"] += clock() - began
                    save(epoch, step_in_epoch, batches, weight)
                    began, saved_at, saved_step = clock(), time.monotonic(), step
                if stopping:
                    name = signal.Signals(stopping).name
                    report.say(
                        f"stopped by {name} after step {step}, saved. go on: python pretrain.py "
                        f"--resume {quoted(out)}"
                    )
                    return 128 + stopping

        check_bad_steps(bad, config.max_bad_steps, norms.isinf(), batches, epoch)
        seconds["training"] += clock() - began
        rate = (len(batches) - first_step) * batch_size / (seconds["training"] - seconds_before)
        began = clock()
        knn = monitor_knn(job, monitor_set, report) if monitor_set and measuring.measures_knn(epoch) else None
        seconds["monitoring"] += clock() - began

        began = clock()
        reliability = {}
        if plan.is_pruned(epoch + 1) and measuring.measures_reliability(epoch):
            reliability = measure_reliability(job, model, views_of, scores, epoch)
        seconds["monitoring"] += clock() - began

        row = {
            "epoch": epoch + 1,
            "step": step,
            "samples_seen": step * batch_size,
            "kept_share": len(batches) * batch_size / num_samples,
            **describe_terms(scores.last[:, batches.flatten()], job.rule.beta_at(epoch), prune.memory),
            **reliability,
            "images_per_second": rate,
            "lr": job.lr_of(step - 1),
            # of the loss as it was weighted
            "gradient_norm": float(norms[norms.isfinite()].mean().nan_to_num()),
            **{f"{name}_seconds": value for name, value in seconds.items()},
            **({} if knn is None else {"knn_train_split": knn}),
        }
        if epoch + 1 == len(job.steps):
            row |= {"asked_share": plan.asked_share(), "real_share": step / job.full_steps}
        if bad_steps := norms.isinf().nonzero().flatten().tolist():
            row["skipped_steps"] = len(bad_steps)
        if before:
            row |= diagnosis(job, scores, before, epoch)
        report.metrics(row)
        beside = seconds["scoring"] + seconds["monitoring"]
        eta = (total_steps - step) * seconds["training"] / step + (len(job.steps) - epoch - 1) * beside / (
            epoch + 1
        )
        report.say(f"{label}  {epoch_line(row)}  eta {duration(eta)}")
        if bad_steps:
            report.say(f"warning   {skipped_line(bad_steps, batches, epoch)}")
        found = next_to_say(what_is_off(job, row, epoch), said, epoch) if before else None
        if found is not None:
            said[found.kind] = (epoch, found.severity)
            report.say(f"warning   {found.line}")
        batches, norms, step_in_epoch, before = None, None, 0, {}

    check_weights(job.model, step)
    if not ranks.is_first:
        return 0
    if held is not None:
        held.check()
    write_samples(
        out / "pruning" / "samples.parquet",
        job.images.names,
        {
            "loss": scores.last[0],
            **(
                {"distance": scores.last[1]} if config.objective == "simclr" else {"entropy": -scores.last[1]}
            ),
            "score": job.rule.score(scores.terms, scores.variance, len(job.steps) - 1),
            "times_trained": scores.times_trained,
            "scored_epoch": scores.scored_epoch,
        },
    )
    save_encoder(job.encoder, inner_folder(out, "encoder"))
    accuracy = None if job.test is None else classify(job, job.test)
    if job.test is not None and accuracy is not None:
        result = {
            "test_accuracy": round(100 * accuracy, 2),
            "test_images": len(job.test.names),
            "epoch": len(job.steps),
        }
        write_atomically(out / "result.json", (as_json(result) + "\n").encode())
    if state is None or not (
        is_finished(state, config) and state["fingerprint"] == json.dumps(job.fingerprint)
    ):
        # last: a run whose checkpoint says "finished" has everything else
        save(len(job.steps), 0, None, None)
    samples, full = total_steps * batch_size, job.full_steps * batch_size
    rows = [] if accuracy is None else [("test accuracy", f"{100 * accuracy:.2f} % of the last epoch")]
    rows += [
        (
            "samples seen",
            f"{samples:,} of {full:,} unpruned ({samples / full:.1%}, asked {plan.asked_share():.1%})",
        ),
        ("training", duration(seconds["training"])),
        ("scoring passes", duration(seconds["scoring"])),
        (
            "monitoring",
            (
                f"{duration(seconds['monitoring'])}, "
                f"{seconds['monitoring'] / sum(seconds.values()):.1%} of the time"
            ),
        ),
        *saved_time(seconds, total_steps, job.full_steps),
        ("encoder", str(out / "encoder")),
        ("next", next_command(out, config)),
    ]
    report.table("done", rows)
    return 0


def diagnosis(job: Job, scores: ScoreState, before: dict[str, Tensor], epoch: int) -> dict[str, float]:
    """The figures of a pruned epoch, see `ssl_emp.diagnostics.diagnose`."""
    after_pruned = job.plan.is_pruned(epoch - 1)
    fresh = (scores.scored_epoch == epoch) & (before["scored_epoch"] == epoch - 1)
    # not means: they resemble themselves
    now = job.rule.score(scores.last, scores.variance, epoch) if "score" in before else None
    return diagnose(
        epoch,
        times_trained=scores.times_trained,
        last_trained=scores.trained_epoch,
        last_trained_before=before["trained_epoch"] if after_pruned else None,
        scores=now,
        scores_before=before.get("score"),
        fresh=fresh,
        labels=job.labels,
        num_classes=job.num_classes,
        is_noisy=job.is_noisy,
    )


def what_is_off(job: Job, row: dict[str, Any], epoch: int) -> list[Finding]:
    """Findings on the figures of a pruned epoch."""
    prune = job.config.prune
    return findings(
        row,
        num_samples=job.num_samples,
        policy=prune.policy,
        beta=job.rule.beta_at(epoch),
        loss_weight=job.rule.loss_weight_at(epoch),
        memory=prune.memory,
        ema=prune.score_ema,
        adjust=prune.adjusts or job.config.objective == "supervised",  # nothing to turn there
        foresees=prune.foresees,
        explore=prune.explore_share,
        redraw_every=prune.redraw_every,
        class_names=job.images.class_names,
    )


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


def describe_terms(trained: Tensor, beta: float, memory: str) -> dict[str, float]:
    """What decides the ranking, over the samples of an epoch, (2, K): is one term drowned by the other? One
    read-out.

    `learned_share`: of the samples with a loss below ln 2, so that the positive (or the right class) has more
    than half of the softmax. Where it is 0 there is nothing yet that a loss could tell to leave out.
    """
    loss, distance = trained
    # in nats: what the rule subtracts, times the loss's spread; nothing where all are alike
    if memory == "standardized":
        distance = torch.where(distance.std() > 0, distance / distance.std() * loss.std(), 0.0)
    figures = {"loss": loss.mean(), "std_loss": loss.std(), "std_beta_memory": (beta * distance).std()}
    figures |= {
        "rank_correlation": rank_correlation(loss, distance),
        "learned_share": (loss < -math.log(LEARNED_SHARE)).float().mean(),
    }
    values = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
    # samples of steps that were skipped have no loss
    known = trained.isfinite().all(0) if not math.isfinite(values["loss"]) else None
    return values if known is None or known.sum() < 2 else describe_terms(trained[:, known], beta, memory)


def epoch_line(row: dict[str, Any]) -> str:
    """The metrics of an epoch as a person reads them."""
    knn = f"  kNN (train split) {100 * row['knn_train_split']:.1f}" if "knn_train_split" in row else ""
    spread = (
        f"std(loss) {row['std_loss']:.3f}  std(β·memory) {row['std_beta_memory']:.3f}  rank corr "
        f"{row['rank_correlation']:+.2f}"
    )
    return (
        f"loss {row['loss']:.3f}{knn}  kept {row['kept_share']:.1%}  {spread}  "
        f"{row['images_per_second']:.0f} images/s"
    )


def saved_time(seconds: dict[str, float], steps: int, full_steps: int) -> list[tuple[str, str]]:
    """A row of the last table: what the steps that were left out would have taken, less what scoring took;
    none where none were.
    """
    if steps == full_steps:
        return []
    saved = seconds["training"] / steps * (full_steps - steps) - seconds["scoring"]
    share = saved / (seconds["training"] / steps * full_steps)
    if saved < 0:
        return [
            ("pruning saved", f"nothing: scoring took {duration(-saved)} more than the steps it left out")
        ]
    return [("pruning saved", f"about {duration(saved)} of training, {share:.0%} of that without pruning")]


def restore_unless(good: Tensor, tensors: list[Tensor], before: list[Tensor]) -> None:
    """Put back what `tensors` were before where not `good` (0-d bool). No branch, which would wait for a GPU.
    """
    torch._foreach_copy_(tensors, [torch.where(good, *pair) for pair in zip(tensors, before, strict=True)])


def count_in_a_row(bad: Tensor, good: Tensor) -> Tensor:
    """(bad steps in a row until now, the longest row), one step on."""
    now = torch.where(good, 0, bad[0] + 1)
    return torch.stack([now, torch.maximum(now, bad[1])])


def skipped_line(steps: list[int], batches: Tensor, epoch: int) -> str:
    """Which steps of the epoch were skipped, and on which samples."""
    samples = batches[steps[0]].tolist()
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    counted = "1 step was" if len(steps) == 1 else f"{len(steps)} steps were"
    what = f"{counted} skipped for a loss or gradient that is not finite"
    return f"epoch {epoch + 1}: {what}, the first is step {steps[0] + 1}, samples {shown}"


def check_bad_steps(bad: Tensor, most: int, skipped: Tensor, batches: Tensor, epoch: int) -> None:
    """Raise RunFailed where more than `most` steps in a row were skipped. Reads two numbers from the device.
    """
    longest = int(bad[1])
    if longest > most:
        line = skipped_line(skipped.nonzero().flatten().tolist(), batches, epoch)
        fix = "start again with a lower optimizer.lr or a longer optimizer.warmup_epochs, and another out=DIR"
        raise RunFailed(
            f"{longest} bad steps in a row, max_bad_steps is {most}; {line}; the last checkpoint "
            f"is intact. fix: {fix}"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """Raise RunFailed before a sick network is saved: the last update may be the bad one, and no loss has
    seen it yet.
    """
    if not torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()]).all():
        what = f"the weights are not finite after step {step}; the last checkpoint is intact"
        fix = "start again with a lower optimizer.lr or a longer optimizer.warmup_epochs, and another out=DIR"
        raise RunFailed(f"{what}. fix: {fix}")


def dry_run(job: Job, report: Report) -> int:
    """Print the resolved config, draw one batch of views, run one step's arithmetic, train nothing."""
    put("stdout", yaml.safe_dump(job.config.model_dump(), sort_keys=False) + "\n")
    if line := schedule_line(job, schedule(job)):
        report.say(f"monitor   {line}")
    batches = shuffled_batches(
        torch.arange(job.num_samples, device=job.device), job.config.batch_size, job.config.seed, 0
    )
    index, images = next(iter(job.store.stream(batches[:1])))
    for _ in range(2):  # the first time warms up memory and libraries, the second is timed
        began = time.perf_counter()
        loss = terms_of(job)(job, job.model, cut_views, index, images, 0, job.recipe)[0].mean()
        loss.backward()
        value = loss.item()  # waits for the GPU
        took = time.perf_counter() - began
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
        f"one batch loss {value:.3f}, {took:.2f}s: about {duration(took * job.total_steps)} for "
        "the run, without torch.compile"
    )
    report.say(f"views     {shown}")
    report.say("dry run: nothing was trained")
    return 0


def settle(arguments: argparse.Namespace) -> tuple[PretrainConfig, Path, bool]:
    """What is asked for: the config, the run directory, and whether that is gone on with."""
    if arguments.resume is None:
        config = load_config(arguments.config, arguments.overrides)
        out = Path(config.out or "runs/default")
        return config, out, arguments.auto_resume and is_run(out)
    out = Path(arguments.resume)
    if any(override.startswith("out=") for override in arguments.overrides):
        raise UserError(
            "a run stays in its directory", "move it first, then --resume the new place, without out="
        )
    config, _ = read_run(out, arguments.overrides)
    return config.model_copy(update={"out": str(out)}), out, True


def run(config: PretrainConfig, out: Path, resumes: bool, ranks: Ranks, may_extend: bool = False) -> int:
    """Start or resume one run, as one of its ranks. `may_extend`: more epochs than it has are asked for on
    purpose.
    """
    report, state, before = Report(silent=not ranks.is_first), None, config
    held: Held | None = None
    with ExitStack() as stack:
        if not resumes and ranks.is_first and not is_unused(out):
            raise UserError(
                f"{out} exists and is not empty",
                f"go on with --resume {quoted(out)}, or choose another out=DIR",
            )
        if ranks.is_first:  # before the images are read; a mistake leaves nothing behind
            held = stack.enter_context(sole_writer(out))
            if not resumes and not is_unused(out):  # another run was quicker
                raise UserError(
                    f"{out} exists and is not empty",
                    f"go on with --resume {quoted(out)}, or choose another out=DIR",
                )
        finished = False
        if resumes:
            config, before, state = load_state(config, out, report, may_extend)
            if finished := state is not None and is_finished(state, config):
                assert state is not None
                if mend(config, before, out, state, report, held):
                    return 0
        try:
            job = prepare(config, report, ranks)
        except UserError as problem:
            raise missing_source(config, out, problem) if resumes else problem from None
        if state:
            check_same(job, state, before, out)
        here = f"{job.fingerprint} {state['step'] if state else 'no checkpoint'}"
        differing = [rank for rank, there in enumerate(ranks.barrier(here)) if there != here]
        if differing:
            what = (
                f"rank {differing[0]} and rank {ranks.rank} see other images in {config.data.source}, "
                f"or another checkpoint in {out}"
            )
            raise UserError(what, "give all machines the same files")
        kept = with_places(before, config)
        if held is not None:
            held.check()  # reading the images may have taken an hour
            if not resumes or kept != read_run(out, [])[0]:
                write_config(out, kept)
            if resumes and not finished:
                where = (
                    f"epoch {state['epoch'] + 1}, step {state['step']}"
                    if state
                    else "no checkpoint yet, from the beginning"
                )
                report.say(f"resume    {where}")
                if line := longer_line(job, before):
                    report.say(f"longer    {line}")
        if finished and state is not None and not broken_files(out, config, state):
            report.say(f"{out} is finished, nothing to do. next: {next_command(out, config)}")
            return 0
        try:
            with Stop() as stop:
                return pretrain(job, out, state, report, stop, held)
        finally:
            report.close()


def write_config(out: Path, config: PretrainConfig) -> None:
    write_atomically(out / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())


def mend(
    config: PretrainConfig,
    before: PretrainConfig,
    out: Path,
    state: dict[str, Any],
    report: Report,
    held: Held | None,
) -> bool:
    """Look at every file of a finished run, and restore what its checkpoint alone can. Whether nothing is
    left to do.

    The images are needed for samples.parquet (their names), result.json (the test split), and where
    data.source is another now.
    """
    if lost := lost_epochs(out, state["epoch"]):
        what = (
            f"metrics.jsonl has no row of {len(lost)} of {state['epoch']} epochs, the first is epoch "
            f"{lost[0]}"
        )
        report.say(f"warning   {what}: only training could write them again")
    broken = broken_files(out, config, state)
    for name, problem in broken.items():
        report.say(f"repair    {out / name}: {problem}")
    if with_places(before, config) != before:  # written once it is known that they are the same images
        return False
    size, mended = image_size(config, state), bool(broken)
    for name in list(broken):
        if name == "encoder" and size is None or name in ("pruning/samples.parquet", "result.json"):
            continue
        if held is not None and name == "config.yaml":
            write_config(out, before)
        if held is not None and name == "environment.json":
            write_environment(out / name, pick_device(config.device))
        if held is not None and name == "encoder" and size is not None:
            restore_encoder(out, config, state, size)
        del broken[name]
    if not broken:
        rest = "and whole again" if mended else "nothing to do"
        report.say(f"{out} is finished, {rest}. next: {next_command(out, config)}")
    return not broken


def longer_line(job: Job, before: PretrainConfig) -> str:
    """What it means that the run is trained longer than was planned, when that begins; else empty."""
    if job.config.epochs == before.epochs or not job.config.earlier_plans:
        return ""
    _, end = job.config.earlier_plans[-1]
    step = sum(job.steps[:end])
    rates = (
        f"the learning rate goes from {job.lr_of(step - 1):.3g} to {job.lr_of(step):.3g} there"
        if step
        else "from the beginning"
    )
    what = (
        f"{before.epochs} epochs were planned, and are {job.config.epochs} now: from epoch {end + 1} "
        "on the learning rate's curve,"
    )
    return f"{what} pruning and annealing are laid out anew over all {job.config.epochs}; {rates}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description="Pretrain an image encoder with SimCLR and EMP data pruning.",
        epilog="Every key is in ssl_emp/config.py; override it with key=value.",
    )
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="YAML file, such as configs/demo.yaml"
    )
    parser.add_argument(
        "--resume", type=path_argument, metavar="RUN", help="go on with the run in this directory"
    )
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="start, or go on where the run directory has a run: for restarts",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would happen, train nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as epochs=20 prune.fraction=0.5"
    )
    prepare_streams("replace")  # a terminal without a beta, or none at all, is no reason to end a run
    ranks = ALONE
    try:
        arguments = parser.parse_intermixed_args(argv)
        if arguments.resume and (arguments.config or arguments.dry_run or arguments.auto_resume):
            raise UserError(
                "--resume takes its config from the run", "drop --config, --auto-resume and --dry-run"
            )
        if not arguments.resume and not arguments.config:
            raise UserError("nothing to do", "give --config FILE, such as configs/demo.yaml, or --resume RUN")
        config, out, resumes = settle(arguments)
        if arguments.dry_run:
            return dry_run(prepare(config, report := Report()), report)
        command = [sys.executable, *(sys.orig_argv[1:] if argv is None else ["-c", AS_COMMAND, *argv])]
        ranks = join_ranks(
            config.devices, config.timeout_seconds, pick_device(config.device).type == "cuda", command
        )
        code = run(config, out, resumes, ranks, may_extend=arguments.resume is not None)
        leave_ranks(ranks)
        return code
    except NoPlace as error:
        return end_with_line(str(error), 2, ranks, True)
    except UserError as error:
        return end_with_line(str(error), 2, ranks)
    except LostRank as error:
        return end_with_line(str(error), error.code, ranks, error.speaks, error.lost)
    except RunFailed as error:
        return end_with_line(str(error), 3, ranks)
    except (MemoryError, torch.OutOfMemoryError) as error:
        what = f"out of memory ({(str(error).splitlines() or [''])[0]})"
        return end_with_line(f"{what}. fix: {OUT_OF_MEMORY}", 3, ranks)
    except OSError as error:  # what a full or vanished disk raises from any of the run's files
        what = f"{error.filename or 'a file of the run'}: {error.strerror or error}"
        return end_with_line(f"{what}. fix: see to the disk and its permissions, then --resume", 3, ranks)
    except KeyboardInterrupt:  # before the first step: nothing to save
        return 130
    except Exception as error:
        if "can't allocate memory" in str(error):  # how torch says it on a CPU
            what = f"out of memory ({str(error).splitlines()[0][:100]})"
            return end_with_line(f"{what}. fix: {OUT_OF_MEMORY}", 3, ranks)
        if is_exchange(error, ranks):
            lost = ranks.lost_rank(error)
            return end_with_line(str(lost), lost.code, ranks, lost.speaks, lost.lost)
        ranks.report_failure(f"{type(error).__name__}: {error}", 3)
        ranks.release_children()
        raise  # a bug: the traceback is what helps
