"""Everything that a config becomes before the first step: images, network, pruner, on a device."""

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssl_emp.augment import Recipe, ViewSizes, draw_features, draw_params
from ssl_emp.backbones import check_trains, described, feature_dim, needs_network
from ssl_emp.commands.given import FROM_A_SHELL, Given
from ssl_emp.config import AugmentConfig, PretrainConfig
from ssl_emp.data.decode import reason
from ssl_emp.data.images import (
    DeviceImages,
    EncodedPixels,
    HostImages,
    ImageSet,
    count_classes,
    fingerprint,
    load_images,
    load_test_images,
    place_images,
    sampled_fingerprint,
)
from ssl_emp.data.label_noise import noisy_labels
from ssl_emp.data.matching import match_labels
from ssl_emp.data.objects import load_object
from ssl_emp.device import describe_device, keep_freed_memory, pick_device
from ssl_emp.errors import UserError
from ssl_emp.loss import perfect_pair_share
from ssl_emp.model import Encoder, SimCLR, build_encoder
from ssl_emp.optim import Schedule, auto_lr, auto_name
from ssl_emp.parts import Part, freeze, lr_scales
from ssl_emp.prune import Pruner
from ssl_emp.prune.figures import LEARNED_BELOW, LEARNED_SHARE
from ssl_emp.prune.plan import PrunePlan
from ssl_emp.run.ranks import ALONE, Ranks, share_batch_norm
from ssl_emp.run.report import Report
from ssl_emp.run.threads import Threads
from ssl_emp.supervised import Classifier
from ssl_emp.weights import Found, Taken, take
from ssl_emp.weights import read as read_weights

LARGEST_NARROW_MAP = 40  # pixels a side, see `memory_format`
HIGH_FOR_A_START = 0.01  # learning rate of SGD at which pretrained weights were lost (docs/starts.md)
EASILY_LEARNED = 0.95  # share of its softmax that a perfect pair has at the temperature that is advised


@dataclass(frozen=True)
class Labels:
    """What a supervised run trains on; a SimCLR run only looks at class balance."""

    values: Tensor  # (N,) on the device, label noise included
    num_classes: int
    is_noisy: Tensor | None  # (N,) on the device, where labels were made wrong


@dataclass(frozen=True)
class Job:
    """Everything that a config becomes before the first step."""

    config: PretrainConfig  # with numbers where `auto` stood for one
    device: torch.device
    images: ImageSet
    store: DeviceImages | HostImages
    pruner: Pruner
    schedule: Schedule  # of the learning rate
    recipe: Recipe  # of views of the last size, see `recipe_at`
    sizes: ViewSizes
    encoder: Encoder
    model: SimCLR | Classifier
    bf16: bool
    labels: Labels | None
    test: ImageSet | None  # of a supervised run, for the accuracy of the last epoch
    fingerprint: dict[str, str | None]  # of all that is trained on: scores belong to positions
    ranks: Ranks = ALONE
    taken: Taken | None = None  # of model.init; None: none, or a checkpoint has the weights
    frozen: Sequence[Part] = ()
    threads: Threads | None = None  # of torch, where it computes on the CPU

    @property
    def lr_scales(self) -> dict[str, float]:
        """Parameter of `model` -> factor of the learning rate, by optimizer.layer_decay; the head has 1."""
        decay = self.config.optimizer.layer_decay
        scales = {} if decay == 1 else lr_scales(self.model.backbone, decay)
        return {f"backbone.{name}": scale for name, scale in scales.items()}

    @cached_property
    def memory_format(self) -> torch.memory_format:
        """Of the network and its views."""
        return memory_format(self.encoder.backbone, self.sizes.last, self.device)

    @property
    def num_samples(self) -> int:
        return len(self.images.names)

    @property
    def steps(self) -> list[int]:
        """Batches of every epoch."""
        return self.pruner.steps

    @property
    def total_steps(self) -> int:
        return sum(self.pruner.steps)

    @property
    def full_steps(self) -> int:
        """Steps of the same run without pruning."""
        return self.config.epochs * (self.num_samples // self.config.batch_size)

    @cached_property
    def view_sizes(self) -> list[int]:
        """Side of the views of every epoch, pixels."""
        return view_sizes(self.sizes, self.pruner.plan, len(self.steps))

    def recipe_at(self, epoch: int) -> Recipe:
        """What the views of an epoch are drawn from."""
        return replace(self.recipe, size=self.view_sizes[epoch])


def prepare(
    config: PretrainConfig,
    report: Report,
    ranks: Ranks = ALONE,
    backbone: nn.Module | None = None,
    given: Given = FROM_A_SHELL,
    *,
    weights: Path | Literal["model.init", "checkpoint"] = "model.init",
) -> Job:
    """Config -> images, network, pruner. Raises UserError for whatever the user can fix; writes nothing.

    Args:
        backbone: the network that `model.arch: custom:CLASS` stands for; it is trained in place.
        given: what else the config cannot hold.
        weights: where those to begin with are: a path stands in for model.init, a checkpoint's come later.
    """
    if config.model.arch.startswith("custom:") and backbone is None:
        raise needs_network(config.model.arch)
    if config.batch_size % ranks.world_size:
        near = max(1, config.batch_size // ranks.world_size, -(-2 // ranks.world_size)) * ranks.world_size
        what = f"batch_size={config.batch_size} cannot be shared by {ranks.world_size} processes"
        raise UserError(what, f"set batch_size={near}, or change the number of processes")
    if config.keep_freed_memory:
        keep_freed_memory()
    start = None
    if config.model.init is not None and weights != "checkpoint":
        with ranks.first_then_others():
            start = read_weights(config.model.init if weights == "model.init" else weights)
        config = normalised_alike(config, start)
    device = pick_device(config.device)
    # what is compiled has the number in it
    threads = Threads(config.threads, moves=not config.compile) if device.type == "cpu" else None
    with ranks.first_then_others():
        images = train_images(config, report, given)
    stored_size = images.pixels.shape[-1]
    recipe = recipe_of(config, stored_size)
    labels = labels_of(config, images, device)
    subset = None
    if path := getattr(config.prune, "indices", None):
        subset = load_indices(Path(path), len(images.names))
    pruner = build_pruner(config, images, subset, recipe, device, ranks)
    test = None
    if config.objective == "supervised":
        with ranks.first_then_others():
            test = load_test(config, images, stored_size, report)
    sizes = config.augment.sizes(stored_size)
    encoder, model = build_model(config, sizes, labels, device, ranks, backbone)
    check_sizes(config, encoder, images)
    taken = None if start is None else take(encoder.backbone, start, config.model.init_share)
    frozen = freeze_parts(encoder.backbone, config.model.freeze)
    config = without_auto(config, encoder)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16)
    job = Job(
        config, device, images, place_images(images.pixels, device), pruner, schedule_of(config, pruner),
        recipe, sizes, encoder, model, bf16, labels, test,
        what_is_trained_on(images, test, subset, config.objective == "supervised"), ranks,
        taken, frozen, threads,
    )  # fmt: skip
    for line in job_lines(job):
        report.say(line)
    return job


def without_auto(config: PretrainConfig, encoder: Encoder) -> PretrainConfig:
    """The config with a name and a number where `optimizer` has `auto`."""
    settings = config.optimizer
    name = auto_name(encoder.backbone) if settings.name == "auto" else settings.name
    lr = auto_lr(name, config.batch_size) if settings.lr == "auto" else settings.lr
    return config.model_copy(update={"optimizer": settings.model_copy(update={"name": name, "lr": lr})})


def train_images(config: PretrainConfig, report: Report, given: Given = FROM_A_SHELL) -> ImageSet:
    data, progress = config.data, report.counted("reading images")
    options: dict[str, Any] = {name: getattr(data, name) for name in ("image_size", "max_images")}
    options |= {"subset_seed": data.subset_seed, "store": data.store, "progress": progress}
    options |= data.shared_options()
    if given.images is not None:
        images = load_object(given.images, **options)
    else:
        images = load_images(data.source, "train", kind=data.kind, **options)
    if len(images.names) < 2:
        raise UserError(f"{data.source} has {len(images.names)} image to train on", "give more images")
    return images


def recipe_of(config: PretrainConfig, stored_size: int) -> Recipe:
    """What views are drawn from."""
    augment: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.augment.model_dump().items()
    }
    sizes = config.augment.sizes(stored_size)
    recipe = Recipe(**augment | {"size": sizes.last})
    if recipe.crop_padding and not (recipe.crop_padding < stored_size and sizes.all == [stored_size]):
        views = " and ".join(map(str, sizes.all))
        shown = f"images of {stored_size} and views of {views} pixels"
        what = f"augment.crop_padding={recipe.crop_padding} with {shown}"
        fix = "give views the size of the images (data.image_size, augment.size), and less padding than that"
        raise UserError(what, fix)
    return recipe


def view_sizes(sizes: ViewSizes, plan: PrunePlan, epochs: int) -> list[int]:
    """Side of the views, pixels, of each of `epochs` epochs; what was run under an earlier plan stays."""
    if plan.shorter:  # all sizes in fewer epochs; it has one plan
        return [sizes.at(epoch, epochs) for epoch in range(epochs)]
    return [sizes.at(epoch, plan.at(epoch).epochs) for epoch in range(epochs)]


def labels_of(config: PretrainConfig, images: ImageSet, device: torch.device) -> Labels | None:
    """Labels on the device, some made wrong if asked. UserError where a supervised run cannot use them."""
    data, supervised = config.data, config.objective == "supervised"
    # both keys are for supervised runs alone
    clean = " data.label_noise=0 label_smoothing=0" if data.label_noise or config.label_smoothing else ""
    if images.labels is None:
        if supervised:
            why = f" ({images.labels_from})" if images.labels_from else ""
            what = f"objective supervised needs labels, and {data.source} has none{why}"
            raise UserError(what, f"label the images, or set objective=simclr{clean}")
        return None
    values, is_noisy, num_classes = images.labels, None, count_classes(images)
    if supervised and num_classes < 2:
        what = f"objective supervised needs two classes, {data.source} has {num_classes}"
        raise UserError(what, f"give more, or set objective=simclr{clean}")
    if data.label_noise:
        values, is_noisy = noisy_labels(values, num_classes, data.label_noise, data.subset_seed)
    return Labels(values.to(device), num_classes, None if is_noisy is None else is_noisy.to(device))


def build_pruner(
    config: PretrainConfig,
    images: ImageSet,
    subset: Tensor | None,
    recipe: Recipe,
    device: torch.device,
    ranks: Ranks,
) -> Pruner:
    """What chooses the samples of each epoch. Raises UserError where one would keep less than a batch."""
    prune, num_samples, batch_size = config.prune, len(images.names), config.batch_size
    earlier = tuple((epochs, end) for epochs, end in config.earlier_plans)
    policy = prune.build(None if subset is None else subset.to(device))
    fraction = prune.fraction if policy.prunes else 0.0
    plan = PrunePlan(
        config.epochs, fraction, prune.warmup_epochs, prune.anneal_fraction, policy.is_shorter, earlier
    )
    steps = plan.epoch_steps(num_samples, batch_size)
    if not steps or min(steps) < 1:
        fewest = min(plan.kept_count(epoch, num_samples) for epoch in range(config.epochs))
        largest = num_samples // math.ceil(1 / (1 - fraction))
        largest -= largest % ranks.world_size  # each process takes an equal part
        kept = f"an epoch keeps {fewest} of the {num_samples} images in {config.data.source}"
        too_few = f"too few for batch_size={batch_size}"
        if fewest >= batch_size:  # epochs are of whole batches
            kept = f"the {num_samples} images in {config.data.source} fill {num_samples // batch_size} x "
            kept += f"batch_size={batch_size}"
            too_few = f"and {1 - fraction:.0%} of that, a pruned epoch, is no whole batch"
        fix = "give more images, or a smaller prune.fraction"
        if largest > 1:
            fix = f"set batch_size={largest} or less, or give more images"
        raise UserError(f"{kept}, {too_few}", fix)
    needed = max(
        (count * batch_size for epoch, count in enumerate(steps) if plan.is_pruned(epoch)), default=0
    )
    if subset is not None and len(subset) < needed:
        what = (
            f"{getattr(prune, 'indices', '')} names {len(subset)} samples, and a pruned epoch needs {needed}"
        )
        whole = len(subset) // batch_size  # batches that they fill, of those of a full epoch
        fix = f"set prune.fraction={1 - whole / (num_samples // batch_size)}"
        if not whole:
            fix = f"name at least the {batch_size} samples of a batch"
        raise UserError(what, f"{fix}, or name {needed} samples")

    side = images.pixels.shape[-1]

    def coming_views(epoch: int, index: Tensor) -> Tensor:
        return draw_features(*draw_params(config.seed, epoch, index, recipe, side), side)

    return Pruner(
        num_samples,
        batch_size=batch_size,
        epochs=config.epochs,
        policy=policy,
        fraction=prune.fraction,
        warmup_epochs=prune.warmup_epochs,
        anneal_fraction=prune.anneal_fraction,
        seed=config.seed,
        device=device,
        covariates=coming_views if config.objective == "simclr" else None,
        gather=ranks.gather if ranks.world_size > 1 else None,
        scoring=getattr(prune, "scoring", "stale"),
        scoring_draws=getattr(prune, "scoring_draws", 1),
        earlier=earlier,
        # where the positive outweighs all negatives it has half of the softmax: a DCL of 0
        learned_below=0.0 if config.scored_loss == "dcl" else LEARNED_BELOW,
    )


def schedule_of(config: PretrainConfig, pruner: Pruner) -> Schedule:
    """The learning rate's curve over the planned steps; of a run that was made longer, one curve a plan."""
    plan, num_samples, batch_size = pruner.plan, pruner.num_samples, pruner.batch_size
    optimizer = config.optimizer
    ends = [(end, plan.at(end - 1)) for _, end in plan.earlier if end] + [(len(pruner.steps), plan)]
    curves = [(sum(pruner.steps[:end]), sum(part.epoch_steps(num_samples, batch_size))) for end, part in ends]
    assert not isinstance(optimizer.lr, str), optimizer.lr
    warmup_steps = round(optimizer.warmup_epochs * (num_samples // batch_size))
    return Schedule(optimizer.lr, warmup_steps, tuple(curves), optimizer.schedule == "onecycle")


def build_model(
    config: PretrainConfig,
    sizes: ViewSizes,
    labels: Labels | None,
    device: torch.device,
    ranks: Ranks,
    backbone: nn.Module | None = None,
) -> tuple[Encoder, SimCLR | Classifier]:
    """Encoder, and the network that is trained, on the device; weights by the seed; or `backbone`."""
    torch.manual_seed(config.seed)
    settings, mean, std = config.model, config.augment.mean, config.augment.std
    arch = settings.arch if backbone is None else backbone
    encoder = build_encoder(arch, settings.width, settings.stem, sizes.last, mean, std, settings.args)
    check_trains(encoder.backbone, sizes.last, settings.arch)
    hidden = settings.projection_hidden or encoder.feature_dim
    model: SimCLR | Classifier = SimCLR(encoder, hidden, settings.projection_dim)
    if config.objective == "supervised":
        assert labels is not None
        model = Classifier(encoder.backbone, encoder.feature_dim, labels.num_classes)
    encoder.to(device)
    layout = memory_format(encoder.backbone, sizes.last, device)
    model.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch's stubs miss this form
    share_batch_norm(model, ranks)  # after the move: it depends on where a BatchNorm is
    return encoder, model


def memory_format(backbone: nn.Module, size: int, device: torch.device) -> torch.memory_format:
    """Channels last, which is faster, but where it crashes on a CPU.

    In torch 2.14 (oneDNN, AVX-512) the backward pass of a strided 1x1 convolution of channels-last maps with
    fewer than 16 channels, from 48 pixels a side on, writes beyond its memory. A ResNet of width 8 has one.
    No map is larger than the view.
    """
    narrow = any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 16
        for module in backbone.modules()
    )
    crashes = device.type == "cpu" and size > LARGEST_NARROW_MAP and narrow
    return torch.contiguous_format if crashes else torch.channels_last


def check_sizes(config: PretrainConfig, encoder: Encoder, images: ImageSet) -> None:
    """Raise UserError where the network does not take images of each size that the run will give it."""
    stored, small = images.pixels.shape[-1], getattr(config.prune, "scoring_size", None)
    one = "give one augment.size, or of a ViT set model.args.dynamic_img_size=true"
    sizes = dict.fromkeys(config.augment.sizes(stored).all, one)
    sizes |= {small: "set prune.scoring_size=null"} if small else {}
    if images.labels is not None and config.monitor.knn_every != 0:
        sizes[stored] = "set monitor.knn_every=0, or data.image_size and augment.size alike"
    for size, fix in sizes.items():
        if size != encoder.image_size:
            try:
                feature_dim(encoder.backbone, size, config.model.arch)
            except UserError as error:
                raise UserError(str(error).partition(". fix: ")[0], fix) from error


def normalised_alike(config: PretrainConfig, start: Found) -> PretrainConfig:
    """With the mean and std that the start's images had, unless the config gives its own: other inputs would
    change every feature that the start has.
    """
    if start.mean is None or {"mean", "std"} & config.augment.model_fields_set:
        return config
    augment = config.augment.model_copy(update={"mean": start.mean, "std": start.std})
    return config.model_copy(update={"augment": augment})


def freeze_parts(backbone: nn.Module, count: int) -> list[Part]:
    """`freeze` as the config asks for it. Raises UserError."""
    try:
        return freeze(backbone, count) if count else []
    except ValueError as error:
        raise UserError(f"model.freeze={count}: {error}", "freeze fewer") from error


def weights_lines(job: Job) -> Iterator[str]:
    """What the backbone begins with, what of it stays, and what its images are normalised by."""
    init, taken, augment = job.config.model.init, job.taken, job.config.augment
    begun = "untrained" if init is None else f"of the checkpoint; the run began from {init}"
    yield f"weights   {begun if taken is None else taken}"
    if job.frozen:
        sizes = [(p.numel(), p.requires_grad) for p in job.encoder.backbone.parameters()]
        still = sum(size for size, trains in sizes if not trains)
        names = ", ".join(part.name for part in job.frozen)
        yield f"frozen    {names}: {still:,} of {sum(size for size, _ in sizes):,} parameters"
    if taken is None:
        return
    shown = f"mean {taken.mean} and std {taken.std}"
    if taken.mean is not None and (taken.mean, taken.std) != (augment.mean, augment.std):
        yield (
            f"note      the start was trained on images normalised by {shown}, and this run has augment.mean="
            f"{augment.mean} and augment.std={augment.std}; leave these two out to have the start's"
        )
    elif taken.mean is not None and (taken.mean, taken.std) != (AugmentConfig().mean, AugmentConfig().std):
        yield f"          images are normalised as the start's were, by {shown}"


def job_lines(job: Job) -> Iterator[str]:
    """The plan of a run for a person: device, images, encoder, steps, and what the settings will not do."""
    config, images, pruner, ranks = job.config, job.images, job.pruner, job.ranks
    shared = ""
    if ranks.world_size > 1:
        shared = (
            f", {ranks.world_size} processes with {config.batch_size // ranks.world_size} of a batch each"
        )
    yield f"device    {describe_device(job.device)}, {'bf16 autocast' if job.bf16 else 'fp32'}{shared}"
    if job.threads is not None and job.threads.line:
        yield f"threads   {job.threads.line}"
    size = images.pixels.shape[-1]
    on = "on the device" if isinstance(job.store, DeviceImages) else "streamed from the host"
    about = [f"{job.num_samples:,} of {size}x{size} from {config.data.source}, {images.stored}, {on}"]
    about += [images.labelled, f"{len(images.skipped)} unreadable"]
    about += [f"not used: {images.not_used}"] if images.unused else []
    yield f"images    {'; '.join(about)}"
    yield from (f"          left out: {name} ({why})" for name, why in images.skipped[:10])
    if len(images.skipped) > 10:
        yield f"          left out: {len(images.skipped) - 10} more"
    yield from (f"          {line}" for line in (*images.notes, *([images.dim_line] if images.dim else [])))
    spec = job.encoder.spec
    yield f"encoder   {described(spec)}, {job.encoder.feature_dim} features"
    yield from weights_lines(job)
    yield f"optimizer {config.optimizer.name}, learning rate {config.optimizer.lr:g} at its peak"
    rate = config.optimizer.lr
    is_high = config.optimizer.name == "sgd" and isinstance(rate, float) and rate > HIGH_FOR_A_START
    if job.taken is not None and is_high:
        yield "note      a rate for untrained networks loses a start; try optimizer.lr=0.001 (docs/starts.md)"
    plan, pruned = pruner.plan, job.total_steps < job.full_steps
    kept = "every epoch keeps every sample"
    if plan.shorter and plan.prune_fraction:
        kept = f"every epoch keeps every sample, and there are {len(job.steps)} of them"
    elif pruned:
        share, policy = f"{1 - plan.prune_fraction:.0%}", pruner.policy
        kept = f"a pruned epoch trains on {share} of the images, {policy.chooses} (policy {policy.name})"
    share = f"{job.total_steps / job.full_steps:.1%}, asked {plan.asked_share():.1%}"
    yield f"plan      {config.epochs} epochs, batch {config.batch_size}; {kept}"
    yield f"          {job.total_steps:,} steps against {job.full_steps:,} unpruned ({share})"
    if len(job.sizes.all) > 1:
        yield f"views     {sizes_line(job.view_sizes)}"
    if "dcl" in (config.loss, config.scored_loss):
        other = "" if config.loss == config.scored_loss else f"; scores are made of {config.scored_loss}"
        yield f"loss      {config.loss}{other}"
    if (
        pruned
        and pruner.policy.uses_scores
        and config.objective == "simclr"
        and (line := hard_to_learn(config))
    ):
        yield f"note      {line}"
    yield from (f"note      {line}" for line in (*short_run_lines(job), *idle_key_lines(config)))


def idle_key_lines(config: PretrainConfig) -> Iterator[str]:
    """Keys that were given and have no effect beside the others."""
    prune, fields = config.prune, type(config).model_fields
    if getattr(prune, "scoring", None) == "stale":
        for key in ("scoring_draws", "scoring_size"):
            if getattr(prune, key) != type(prune).model_fields[key].default:
                yield f"prune.{key} has no effect with prune.scoring=stale, scores come from training"
    if getattr(prune, "shrink", False) and not getattr(prune, "foresee", False):
        yield "prune.shrink has no effect without prune.foresee"
    if config.objective == "supervised" and config.temperature != fields["temperature"].default:
        yield "temperature has no effect with objective=supervised"


def sizes_line(view_sizes: list[int]) -> str:
    """Such as `16 px for 12 epochs, then 24 px for 8`."""
    parts = [(size, len(list(epochs))) for size, epochs in groupby(view_sizes)]
    (size, count), *rest = parts
    first = f"{size} px for {count} epoch{'s' if count > 1 else ''}"
    return ", then ".join([first, *(f"{size} px for {count}" for size, count in rest)])


def what_is_trained_on(
    images: ImageSet, test: ImageSet | None, subset: Tensor | None, supervised: bool
) -> dict[str, str | None]:
    """Digests (hex) of what a run's bits depend on besides its settings, by what a person would have changed.

    Where the images lie is no part of it, nor are labels that nothing is trained on.
    """
    content = images.content
    parts = {
        "shape": "x".join(map(str, images.pixels.shape)),
        "names": content["names"],
        "pixels": content["pixels"],
    }
    chosen = None if subset is None else hashlib.sha256(subset.numpy().tobytes()).hexdigest()
    as_jpegs = isinstance(images.pixels, EncodedPixels)
    return parts | {
        "kept_as": "jpegs" if as_jpegs else "pixels",
        # compares a set kept as JPEGs with the same one kept as pixels
        "sample": sampled_fingerprint(images),
        "labels": content["labels"] if supervised else None,
        "test": None if test is None else fingerprint(test),
        "indices": chosen,
    }


def short_run_lines(job: Job) -> Iterator[str]:
    """What a run is too short for, with the keys to turn."""
    optimizer, prune, plan = job.config.optimizer, job.config.prune, job.pruner.plan
    epochs, total, full = len(job.steps), job.total_steps, job.num_samples // job.config.batch_size
    warmup = optimizer.warmup_epochs * full  # steps
    if optimizer.schedule == "cosine" and warmup >= total:
        what = f"optimizer.warmup_epochs={optimizer.warmup_epochs:g} is as long as the run"
        turn = f"try optimizer.warmup_epochs={total / full / 10:.2g}"
        yield f"{what}, which ends before the learning rate's peak; {turn}"
    elif optimizer.schedule == "cosine" and warmup > total / 2:
        yield f"the learning rate rises over {warmup / total:.0%} of the run, by optimizer.warmup_epochs"
    if not plan.prune_fraction or plan.shorter or total < job.full_steps:
        return
    if any(plan.is_pruned(epoch) for epoch in range(epochs)):
        what = f"nothing is pruned: prune.fraction={prune.fraction:g} of {job.steps[0]} batches is none"
        yield f"{what}; raise prune.fraction"
        return
    warm, share = prune.warmup_epochs, prune.anneal_fraction
    annealing = round(share * epochs)
    keys = f"prune.warmup_epochs={warm} and prune.anneal_fraction={share:g}"
    keep = f"({'1 epoch' if annealing == 1 else f'{annealing} epochs'}) keep every sample in all {epochs}"
    enough = next((n for n in range(epochs + 1, 10**4) if warm < n - round(share * n)), None)
    turn = "lower prune.anneal_fraction" if enough is None else f"set epochs={enough} or more"
    yield f"nothing is pruned: {keys} {keep}; {turn}"


def hard_to_learn(config: PretrainConfig) -> str:
    """A line where the loss, or temperature and batch, let no pair fall silent, so that pruning has little to
    do; or "".
    """
    if config.loss == "dcl":
        why = "loss dcl gives every pair its full weight, learned or not (docs/method.md)"
        return f"{why}, so a choice has little to leave out"
    share = perfect_pair_share(config.batch_size, config.temperature)
    if share >= LEARNED_SHARE:
        return ""
    negatives = 2 * config.batch_size - 2
    low = 1 / math.log(negatives * EASILY_LEARNED / (1 - EASILY_LEARNED))
    why = (
        f"no pair is ever learned (a perfect one has {share:.0%} of its softmax), so a choice has "
        "little to leave out"
    )
    return (
        f"at temperature {config.temperature:g} and batch {config.batch_size} {why}; try "
        f"temperature={low:.2f}"
    )


def load_test(config: PretrainConfig, train: ImageSet, image_size: int, report: Report) -> ImageSet | None:
    """The test split, labels as in train; looked at before hours of a run. None where there is none."""
    data = config.data
    try:
        test = load_test_images(
            data.source,
            data.test_source,
            kind=data.kind,
            image_size=image_size,
            store=data.store,
            **data.shared_options(),
        )
    except UserError as error:
        report.say(f"test      none, so no test accuracy at the end: {error}")
        return None
    if test.labels is None:
        report.say(f"test      has {test.labelled}, so no test accuracy at the end")
        return None
    test, lacking = match_labels(train, test)
    for line in (*test.notes, *([lacking] if lacking else [])):
        report.say(f"test      {line}")
    return test


def load_indices(path: Path, num_samples: int) -> Tensor:
    """A fixed subset, most wanted first, from a `.npy` file or a text file with an index a line: (M,) int64.

    Such files come from methods that choose once, before training: SAS, prototypes, SemDeDup.

    Raises:
        UserError: the file cannot be read, or does not hold distinct places of the data set.
    """
    fix = "give a .npy file or a text file with one index a line"
    if path.exists() and not path.is_file():  # a pipe would block for ever, /dev/zero fill the memory
        raise UserError(f"cannot read the indices in {path} (not a regular file)", fix)
    try:
        if path.suffix == ".npy":
            # mapped: a header may declare more than memory holds; refuses pickles and archives
            values: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        else:
            # given a name, numpy would also unpack archives
            with open(path, encoding="utf-8") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its word on an empty file: ours follows
                values = np.loadtxt(file, dtype=np.int64, ndmin=1)
    except Exception as error:  # damaged headers make numpy raise half a dozen types, EOFError among them
        raise UserError(f"cannot read the indices in {path} ({reason(error)})", fix) from error
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or not len(values):
        what = f"{path} holds {values.dtype} of shape {values.shape}"
        raise UserError(what, "give one list of whole numbers")
    if values.min() < 0 or values.max() >= num_samples:
        what = f"{path} holds the index {values.max() if values.max() >= num_samples else values.min()}"
        raise UserError(what, f"use 0 to {num_samples - 1}")
    if len(np.unique(values)) < len(values):
        what = f"{path} holds {len(values) - len(np.unique(values))} indices twice"
        raise UserError(what, "name each sample once")
    return torch.from_numpy(values.astype(np.int64))
