"""Everything that a config becomes before the first step: images, plan, rule, network, on a device."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ssl_emp.augment import Recipe
from ssl_emp.config import PretrainConfig, PruneConfig
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
from ssl_emp.device import describe_device, keep_freed_memory, pick_device
from ssl_emp.errors import UserError
from ssl_emp.loss import perfect_pair_share
from ssl_emp.model import Encoder, SimCLR, build_encoder
from ssl_emp.optim import lr_at, one_cycle_lr
from ssl_emp.policies import RANKING, SCORING, Rule, load_indices
from ssl_emp.pruning import PrunePlan
from ssl_emp.run.ranks import ALONE, Ranks, share_batch_norm
from ssl_emp.run.report import Report, show_progress
from ssl_emp.supervised import Classifier

LEARNED_SHARE = 0.5  # of its softmax: what `learned_share` in metrics.jsonl counts from
EASILY_LEARNED = 0.95  # what a perfect pair has at the temperature that is advised


@dataclass(frozen=True)
class Job:
    """Everything that a config becomes before the first step."""

    config: PretrainConfig
    device: torch.device
    images: ImageSet
    store: DeviceImages | HostImages
    plan: PrunePlan
    steps: list[int]  # batches of every epoch
    rule: Rule
    recipe: Recipe
    encoder: Encoder
    model: SimCLR | Classifier
    bf16: bool
    # (N,) on the device, noise included: what a supervised run trains on, simclr only looks at class balance
    labels: Tensor | None
    is_noisy: Tensor | None  # (N,) on the device, where labels were made wrong
    test: ImageSet | None  # of a supervised run, for the accuracy of the last epoch
    # of all that is trained on: scores belong to positions, so a resume needs the same set
    fingerprint: dict[str, str | None]
    ranks: Ranks = ALONE

    @property
    def num_samples(self) -> int:
        return len(self.images.names)

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return 0 if self.images.labels is None else count_classes(self.images)

    @cached_property
    def total_steps(self) -> int:
        return sum(self.steps)

    @cached_property
    def curves(self) -> list[tuple[int, int]]:
        """Of each plan, the present one last: the first step that is not run under it, and all its steps."""
        ends = [(end, self.plan.at(end - 1)) for _, end in self.plan.earlier if end] + [
            (len(self.steps), self.plan)
        ]
        return [
            (sum(self.steps[:end]), plan.total_steps(self.num_samples, self.config.batch_size))
            for end, plan in ends
        ]

    def planned_steps(self, step: int) -> int:
        """Steps of the plan that `step` is run under: what its learning rate's curve is laid over."""
        return next((total for end, total in self.curves if step < end), self.total_steps)

    def lr_of(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        optimizer, total = self.config.optimizer, self.planned_steps(step)
        if optimizer.schedule == "onecycle":
            return one_cycle_lr(step, total, optimizer.lr)
        return lr_at(
            step,
            total,
            round(optimizer.warmup_epochs * (self.num_samples // self.config.batch_size)),
            optimizer.lr,
        )

    @property
    def full_steps(self) -> int:
        """Steps of the same run without pruning."""
        return self.config.epochs * (self.num_samples // self.config.batch_size)


def prepare(config: PretrainConfig, report: Report, ranks: Ranks = ALONE) -> Job:
    """Config -> images, network, plan. Raises UserError for whatever the user can fix; writes nothing."""
    if config.batch_size % ranks.world_size:
        near = max(1, config.batch_size // ranks.world_size, -(-2 // ranks.world_size)) * ranks.world_size
        what = f"batch_size={config.batch_size} cannot be shared by {ranks.world_size} processes"
        raise UserError(what, f"set batch_size={near}, or change the number of processes")
    if config.keep_freed_memory:
        keep_freed_memory()
    device = pick_device(config.device)
    data = config.data
    with ranks.first_then_others():
        images = load_images(
            data.source,
            "train",
            kind=data.kind,
            image_size=data.image_size,
            max_images=data.max_images,
            subset_seed=data.subset_seed,
            labels=data.labels,
            image_column=data.image_column,
            label_column=data.label_column,
            max_pixels=data.max_pixels,
            store=data.store,
            jpeg_quality=data.jpeg_quality,
            download_dir=data.download_dir,
            cache_dir=data.cache_dir,
            progress=show_progress("reading images"),
        )
    num_samples, stored_size = len(images.names), images.pixels.shape[-1]
    prune = config.prune
    fraction = 0.0 if prune.policy == "none" else prune.fraction
    earlier = tuple((epochs, end) for epochs, end in config.earlier_plans)
    plan = PrunePlan(
        config.epochs,
        fraction,
        prune.warmup_epochs,
        prune.anneal_fraction,
        prune.policy == "shorter",
        earlier,
    )
    if num_samples < 2:
        raise UserError(f"{data.source} has {num_samples} image to train on", "give more images")
    steps = plan.epoch_steps(num_samples, config.batch_size)
    if not steps or min(steps) < 1:
        fewest = min(plan.kept_count(epoch, num_samples) for epoch in range(config.epochs))
        largest = num_samples // math.ceil(1 / (1 - fraction))
        largest -= largest % ranks.world_size  # each process takes an equal part
        what = (
            f"an epoch keeps {fewest} of the {num_samples} images in {data.source}, too few for "
            f"batch_size={config.batch_size}"
        )
        raise UserError(
            what,
            f"set batch_size={largest} or less, or give more images"
            if largest > 1
            else "give more images, or a smaller prune.fraction",
        )
    subset = load_indices(Path(prune.indices), num_samples) if prune.indices else None
    needed = max(
        (count * config.batch_size for epoch, count in enumerate(steps) if plan.is_pruned(epoch)), default=0
    )
    if subset is not None and len(subset) < needed:
        what = f"{prune.indices} names {len(subset)} samples, and a pruned epoch needs {needed}"
        whole = len(subset) // config.batch_size  # batches that they fill, of those of a full epoch
        fix = f"set prune.fraction={1 - whole / (num_samples // config.batch_size)}"
        if not whole:
            fix = f"name at least the {config.batch_size} samples of a batch"
        raise UserError(what, f"{fix}, or name {needed} samples")

    augment = config.augment.model_dump()
    recipe = Recipe(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in augment.items()}
        | {"size": augment["size"] or stored_size}
    )
    if recipe.crop_padding and not recipe.crop_padding < recipe.size == stored_size:
        what = (
            f"augment.crop_padding={recipe.crop_padding} with images of {stored_size} and views of "
            f"{recipe.size} pixels"
        )
        raise UserError(
            what,
            "give views the size of the images (data.image_size, augment.size), and less padding than that",
        )
    supervised = config.objective == "supervised"
    # are for supervised alone
    clean = " data.label_noise=0 label_smoothing=0" if data.label_noise or config.label_smoothing else ""
    if supervised and images.labels is None:
        why = f" ({images.labels_from})" if images.labels_from else ""
        raise UserError(
            f"objective supervised needs labels, and {data.source} has none{why}",
            f"label the images, or set objective=simclr{clean}",
        )
    labels, is_noisy, num_classes = images.labels, None, 0
    if labels is not None:
        num_classes = count_classes(images)
        if supervised and num_classes < 2:
            raise UserError(
                f"objective supervised needs two classes, {data.source} has {num_classes}",
                f"give more, or set objective=simclr{clean}",
            )
        if data.label_noise:
            labels, is_noisy = noisy_labels(labels, num_classes, data.label_noise, data.subset_seed)
        labels, is_noisy = labels.to(device), None if is_noisy is None else is_noisy.to(device)
    test = None
    if supervised:
        with ranks.first_then_others():
            test = load_test(config, images, stored_size, report)

    torch.manual_seed(config.seed)
    model_config = config.model
    encoder = build_encoder(
        model_config.arch,
        model_config.width,
        model_config.stem,
        recipe.size,
        config.augment.mean,
        config.augment.std,
    )
    hidden = model_config.projection_hidden or encoder.feature_dim
    model: SimCLR | Classifier = SimCLR(encoder, hidden, model_config.projection_dim, tuple(prune.layers))
    if supervised:
        model = Classifier(encoder.backbone, encoder.feature_dim, num_classes)
    encoder.to(device)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs miss this form
    share_batch_norm(model, ranks)  # after the move: it depends on where a BatchNorm is
    bf16 = config.precision == "bf16" or (
        config.precision == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    store = place_images(images.pixels, device)
    rule = Rule(
        policy=prune.policy,
        plan=plan,
        beta=prune.beta,
        beta_end=prune.beta_end,
        loss_weight=prune.loss_weight,
        loss_weight_end=prune.loss_weight_end,
        memory=prune.memory,
        explore=prune.explore_share,
        soften=prune.soften,
        confidence=prune.confidence,
        redraw_every=prune.redraw_every,
        rescale=prune.rescale,
        fixed=None if subset is None else subset.to(device),
    )
    job = Job(
        config,
        device,
        images,
        store,
        plan,
        steps,
        rule,
        recipe,
        encoder,
        model,
        bf16,
        labels,
        is_noisy,
        test,
        what_is_trained_on(images, test, subset, supervised),
        ranks,
    )

    where = (
        f"{images.stored}, "
        f"{'on the device' if isinstance(job.store, DeviceImages) else 'streamed from the host'}"
    )
    shared = (
        f", {ranks.world_size} processes with {config.batch_size // ranks.world_size} of a batch each"
        if ranks.world_size > 1
        else ""
    )
    report.say(f"device    {describe_device(device)}, {'bf16 autocast' if bf16 else 'fp32'}{shared}")
    about = [f"{num_samples:,} of {stored_size}x{stored_size} from {data.source}, {where}", images.labelled]
    about += [
        f"{len(images.skipped)} unreadable",
        *([f"not used: {images.not_used}"] if images.unused else []),
    ]
    report.say(f"images    {'; '.join(about)}")
    for name, reason in images.skipped[:10]:
        report.say(f"          left out: {name} ({reason})")
    if len(images.skipped) > 10:
        report.say(f"          left out: {len(images.skipped) - 10} more")
    for line in (*images.notes, *([images.dim_line] if images.dim else [])):
        report.say(f"          {line}")
    spec = encoder.spec
    report.say(
        f"encoder   {spec['arch']}, width {spec['width']}, {spec['stem']} stem, "
        f"{encoder.feature_dim} features"
    )
    kept = "every epoch keeps every sample"
    if plan.shorter and fraction:
        kept = f"every epoch keeps every sample, and there are {len(steps)} of them"
    elif job.total_steps < job.full_steps:
        kept = f"a pruned epoch keeps {1 - fraction:.0%} of the samples by {prune.policy}"
    share = job.total_steps / job.full_steps
    report.say(f"plan      {config.epochs} epochs, batch {config.batch_size}; {kept}")
    report.say(
        f"          {job.total_steps:,} steps against {job.full_steps:,} unpruned ({share:.1%}, "
        f"asked {plan.asked_share():.1%})"
    )
    if (
        job.total_steps < job.full_steps
        and rule.scores
        and not supervised
        and (said := hard_to_learn(config))
    ):
        report.say(f"note      {said}")
    for line in short_run_lines(job):
        report.say(f"note      {line}")
    if idle := idle_keys(prune):
        report.say(
            f"note      without effect, with policy {prune.policy} and scoring {prune.scoring}: "
            f"{', '.join(idle)}"
        )
    return job


def what_is_trained_on(
    images: ImageSet, test: ImageSet | None, subset: Tensor | None, supervised: bool
) -> dict[str, str | None]:
    """Digests (hex) of all that the bits of a run depend on besides its settings, by what a person would have
    changed.

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


def short_run_lines(job: "Job") -> list[str]:
    """What a run is too short for, with the keys to turn."""
    config, epochs, optimizer, prune = job.config, len(job.steps), job.config.optimizer, job.config.prune
    lines = []
    warmup = optimizer.warmup_epochs * (job.num_samples // config.batch_size)  # steps
    if optimizer.schedule == "cosine" and warmup >= job.total_steps:
        what = (
            f"optimizer.warmup_epochs={optimizer.warmup_epochs:g} is as long as the run, which ends "
            "before the learning rate's peak"
        )
        lines.append(
            f"{what}; try "
            f"optimizer.warmup_epochs={job.total_steps / (job.num_samples // config.batch_size) / 10:.2g}"
        )
    elif optimizer.schedule == "cosine" and warmup > job.total_steps / 2:
        lines.append(
            f"the learning rate rises over {warmup / job.total_steps:.0%} of the run, by "
            "optimizer.warmup_epochs"
        )
    if job.plan.prune_fraction and not job.plan.shorter and job.total_steps == job.full_steps:
        annealing = round(prune.anneal_fraction * epochs)
        what = (
            f"nothing is pruned: prune.warmup_epochs={prune.warmup_epochs} and "
            f"prune.anneal_fraction={prune.anneal_fraction:g}"
        )
        enough = next(
            (
                n
                for n in range(epochs + 1, 10**4)
                if prune.warmup_epochs < n - round(prune.anneal_fraction * n)
            ),
            None,
        )
        turn = "lower prune.anneal_fraction" if enough is None else f"set epochs={enough} or more"
        if any(job.plan.is_pruned(epoch) for epoch in range(epochs)):
            what, turn = (
                f"nothing is pruned: prune.fraction={prune.fraction:g} of {job.steps[0]} batches is none",
                "raise prune.fraction",
            )
        else:
            what += (
                f" ({'1 epoch' if annealing == 1 else f'{annealing} epochs'}) keep every sample in "
                f"all {epochs}"
            )
        lines.append(f"{what}; {turn}")
    return lines


def hard_to_learn(config: PretrainConfig) -> str:
    """A line where temperature and batch let no pair be learned, so that a choice of samples has little to
    leave out; else empty.
    """
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


def idle_keys(prune: PruneConfig) -> list[str]:
    """Keys of `prune` that were changed from their defaults and have no say in what a run with these settings
    keeps or weighs.
    """
    ranks, scores = prune.policy in RANKING, prune.policy in SCORING
    rescores = scores and prune.scoring != "stale"
    counts = {
        **dict.fromkeys(("beta", "beta_end", "loss_weight", "loss_weight_end"), prune.policy == "emp"),
        **dict.fromkeys(("memory", "layers"), prune.policy in ("emp", "distance")),
        **dict.fromkeys(("ema", "adjust", "foresee", "scoring"), scores),  # foresee brings adjust
        **dict.fromkeys(("explore", "soften"), ranks),
        **dict.fromkeys(("scoring_draw", "scoring_draws", "scoring_size", "rescore_every"), rescores),
        "shrink": ranks and prune.foresees,
        "redraw_every": prune.policy == "random",
        "confidence": prune.policy == "ucb",
        "rescale": prune.policy not in ("infobatch", "shorter", "none"),
    }
    return [
        f"prune.{key}"
        for key, heard in counts.items()
        if not heard and getattr(prune, key) != PruneConfig.model_fields[key].default
    ]


def load_test(config: PretrainConfig, train: ImageSet, image_size: int, report: Report) -> ImageSet | None:
    """The test split with labels numbered as in train, before the run and not after hours of it; None where
    there is none.
    """
    data = config.data
    try:
        test = load_test_images(
            data.source,
            data.test_source,
            kind=data.kind,
            image_size=image_size,
            image_column=data.image_column,
            label_column=data.label_column,
            max_pixels=data.max_pixels,
            download_dir=data.download_dir,
            cache_dir=data.cache_dir,
            store=data.store,
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
