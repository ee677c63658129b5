"""YAML and `key=value` overrides -> one checked `PretrainConfig`, which only the two scripts know."""

import dataclasses
import functools
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor

from linear_eval.errors import did_you_mean, first_line
from ssl_emp.augment import Recipe, ViewSizes
from ssl_emp.backbones import check_args, check_name, check_options
from ssl_emp.errors import UserError
from ssl_emp.prune.policies import POLICIES, Indices, Policy, policy_named
from ssl_emp.shipped import find_config
from ssl_emp.text import command_line, home, shorten

# A path: `~` and `~user` are home folders, `./~` is not. It is kept as expanded: config.yaml then says where
# the run's files were, whoever reads it, and `~/x` on resume is the /home/me/x of before.
Place = Annotated[str, AfterValidator(home)]
Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[list[Annotated[float, Field(ge=0, le=1000)]], Field(min_length=2, max_length=2)]
# of pixels in [0, 1]: 123.7 is of those in [0, 255]
PerChannel = Annotated[list[Probability], Field(min_length=3, max_length=3)]
# far beyond use, and still far from float32's 3e38: a score that overflows ranks nothing
Weight = Annotated[float, Field(ge=0, le=1e9)]
Pixels = Annotated[int, Field(ge=8, le=1024)]  # a side of a view
# a size, and the share of the epochs at which it ends
Stage = Annotated[list[Pixels | Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]
Stages = Annotated[list[Stage], Field(min_length=1, max_length=100)]
SignedWeight = Annotated[float, Field(ge=-1e9, le=1e9)]
Strength = Annotated[float, Field(ge=0, le=1000)]
# every number has two ends, so that no product, sum or duration of them overflows; a run of a million epochs
# is none
MOST_EPOCHS = 1_000_000
LARGEST_BATCH = 2**20
Every = Annotated[int, Field(ge=0, le=MOST_EPOCHS)]  # epochs from one time to the next; 0: never
Patience = Annotated[float, Field(ge=1, le=604_800)]  # seconds, up to a week


def _checked_args(args: dict[str, Any]) -> dict[str, Any]:
    check_args(args)
    return args


NetworkArgs = Annotated[dict[str, Any], AfterValidator(_checked_args)]  # of timm's and torchvision's networks


class Section(BaseModel):
    """Unknown keys, wrong types, nan and inf are errors; `fraction: "0.5"` is a string, not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        """What the schema has no word for, and torch or the file system would choke on hours later."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("should be a number of 64 bits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("should be text without a zero byte")
        if isinstance(value, str):
            try:
                os.fsencode(value)
            except UnicodeEncodeError as error:  # half a character, such as YAML's "\ud800"
                raise ValueError("should be text that can be encoded") from error
        return value


class DataConfig(Section):
    # folder, parquet file | glob | folder, cifar10, cifar100, stl10, fashion_mnist, mnist5k
    source: Place = "mnist5k"
    # object: images that were given in Python, see docs/python.md; source is then "<in memory>"
    kind: Literal["auto", "folder", "parquet", "torchvision", "mnist5k", "object"] = "auto"
    test_source: Place | None = None  # for evaluate.py, where source has no test split of its own
    # for evaluate.py, where source has labels and no test split: this share of every class is the test split,
    # by a hash of subset_seed and the images' names; pretraining sees these images all the same, without
    # their labels
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None  # stored pixels a side; null: as found
    max_images: Annotated[int, Field(ge=2, le=10**12)] | None = None  # a random subset of the train split
    subset_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = (
        0  # which subset; not tied to seed, so that runs with other seeds see the same images
    )
    # labels serve monitoring and evaluation; only objective: supervised trains on them
    labels: Literal["auto", "none"] = "auto"
    # of parquet; null: the first that holds images, `image` before others
    image_column: Annotated[str, Field(min_length=1)] | None = None
    # of parquet; null: label, labels or fine_label
    label_column: Annotated[str, Field(min_length=1)] | None = None
    # supervised: share of the train labels that are made wrong, which ones by subset_seed
    label_noise: Probability = 0.0
    download_dir: Place = "data"  # where torchvision keeps what it downloads
    # where the pixels are kept. auto: in memory up to half of it, else in a file; raw: uint8 in a file;
    # encoded: JPEGs in one
    store: Literal["auto", "memory", "raw", "encoded"] = "auto"
    # images that declare more are left out undecoded. A pixel takes 4 bytes, of 16 bits more, in each thread
    # that decodes
    max_pixels: Annotated[int, Field(ge=1, le=10_000_000_000)] = 50_000_000
    # of the encoded store; JPEGs of the stored size are kept as they are
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    cache_dir: Place | None = None  # where the file of a set larger than memory is kept; null: .cache/ssl_emp

    def shared_options(self) -> dict[str, Any]:
        """Arguments of `load_images` that are the same for every split."""
        names = "labels image_column label_column max_pixels jpeg_quality download_dir cache_dir"
        return {name: getattr(self, name) for name in names.split()}


class NetworkConfig(Section):
    """Which network."""

    # resnet18, resnet34, resnet50, timm:NAME, torchvision:NAME (docs/backbones.md); from Python a module
    arch: Annotated[str, AfterValidator(check_name)] = "resnet18"
    # of timm:NAME and torchvision:NAME: what their constructor gets, such as {drop_path_rate: 0.1}
    args: NetworkArgs = {}
    # of the three ResNets: channels of the first stage; 64 is the published network
    width: Annotated[int, Field(ge=8, le=512, multiple_of=8)] = 64
    # of the three ResNets; auto: cifar (3x3, stride 1) for views of up to 64 px, else imagenet (7x7,
    # stride 2)
    stem: Literal["auto", "cifar", "imagenet"] = "auto"

    @model_validator(mode="after")
    def _of_this_network(self) -> Self:
        check_options(self.arch, self.width, self.stem, self.args)
        return self


class ModelConfig(NetworkConfig):
    # width of the projection head's hidden layer; null: as wide as the features
    projection_hidden: Annotated[int, Field(ge=1, le=65536)] | None = None
    projection_dim: Annotated[int, Field(ge=1, le=65536)] = 128  # numbers that the projection head gives
    # weights to begin with: a run, an encoder directory, a .safetensors or .pth file, or timm:NAME
    init: Annotated[Place, Field(min_length=1)] | None = None
    # refuse a start that fits less than this share of the backbone's numbers (docs/starts.md)
    init_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    # first parts that are not trained: 1 the stem or patch embedding, then stages or blocks
    freeze: Annotated[int, Field(ge=0, le=1000)] = 0


class OptimizerConfig(Section):
    # auto: adamw where the backbone has layer norms, as transformers do, else sgd; with lr: auto only
    name: Literal["sgd", "lars", "adamw", "auto"] = "sgd"
    # the peak, for the batch size given. auto: by the rule of ssl_emp/optim.py for optimizer and batch size;
    # the run's config.yaml has the number. Beyond the end float32 ends as well
    lr: Annotated[float, Field(gt=0, le=1e38)] | Literal["auto"] = 0.24
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of sgd and lars
    # not of norms, biases, position embeddings and class tokens
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 5e-4
    # below 1: each part of the backbone learns at so much of the rate of the part above it (BEiT)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # of the learning rate, over the steps of the whole plan; onecycle has its own warm-up, and moves the
    # momentum too
    schedule: Literal["cosine", "onecycle"] = "cosine"
    # until the peak of the learning rate, in full epochs; may be a part of one
    warmup_epochs: Annotated[float, Field(ge=0, le=MOST_EPOCHS)] = 1.0


class AugmentConfig(Section):
    # pixels a side of a view; null: the stored size. Or by epoch: [[16, 0.6], [24, 1]] is 16 px for the first
    # 60 % of the planned epochs, then 24 px, which is the encoder's size
    size: Pixels | Stages | None = None
    crop_scale: Range = list(Recipe.crop_scale)  # share of the image's area
    crop_ratio: Range = list(Recipe.crop_ratio)  # width over height of a crop
    # above 0: pad by reflection and crop at random, instead of the resized crop
    crop_padding: Annotated[int, Field(ge=0, le=1024)] = Recipe.crop_padding
    flip_prob: Probability = Recipe.flip_prob  # how often a view is mirrored, left to right
    jitter_prob: Probability = Recipe.jitter_prob  # how often a view's colours change, by the next four
    brightness: Strength = Recipe.brightness  # b: a factor between 1 - b and 1 + b
    contrast: Strength = Recipe.contrast  # as brightness
    saturation: Strength = Recipe.saturation  # as brightness
    # largest turn of the colour circle, 0.5: half of it
    hue: Annotated[float, Field(ge=0, le=0.5)] = Recipe.hue
    gray_prob: Probability = Recipe.gray_prob  # how often a view is made grey
    blur_prob: Probability = Recipe.blur_prob  # how often a view is blurred
    blur_sigma: Range = list(Recipe.blur_sigma)  # in pixels of a Gaussian whose kernel is a tenth of the view
    solarize_prob: Probability = Recipe.solarize_prob  # how often what is brighter than half is inverted
    # what views are normalised by, of pixels in [0, 1]; the default is ImageNet's
    mean: PerChannel = list(Recipe.mean)
    # as mean
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=3, max_length=3)] = list(
        Recipe.std
    )

    @field_validator("size", mode="before")
    @classmethod
    def _stages_rise(cls, value: Any) -> Any:
        """A schedule is checked here, in one line: pydantic has one for each type that it tried."""
        if not isinstance(value, list):
            return value
        pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2]
        sizes, shares = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        fix = None
        if not 0 < len(pairs) == len(value) <= 100:
            fix = "pairs of a size and a share"
        elif any(type(size) is not int or not 8 <= size <= 1024 for size in sizes):
            fix = "sizes of 8 to 1024 whole pixels"
        elif any(type(share) not in (int, float) or not 0 < share <= 1 for share in shares):
            fix = "shares of the epochs, above 0 and up to 1"
        elif shares[-1] != 1:
            fix = "a last share of 1"
        elif shares != sorted(set(shares)):
            fix = "shares that rise"
        elif sizes != sorted(sizes):
            fix = "sizes that do not fall"
        if fix:
            line = "is {shown}, give {fix}, such as [[16, 0.6], [24, 1]]"
            raise PydanticCustomError("schedule", line, {"shown": shorten(repr(value)), "fix": fix})
        return value

    def sizes(self, stored: int | None) -> ViewSizes:
        """Of views of images with `stored` pixels a side; None will do where `size` is given."""
        if isinstance(self.size, list):
            return ViewSizes(tuple((int(size), float(share)) for size, share in self.size))
        side = self.size or stored
        assert side is not None
        return ViewSizes(((side, 1.0),))

    @model_validator(mode="after")
    def _ranges_rise(self) -> "AugmentConfig":
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two rising numbers above 0, is {[low, high]}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale must not exceed 1, is {self.crop_scale}")
        if self.crop_ratio[0] < 0.1 or self.crop_ratio[1] > 10:  # of 8 pixels, a tenth is still one
            raise ValueError(f"crop_ratio must be within 0.1 and 10, is {self.crop_ratio}")
        return self


class PruneConfig(Section):
    """What every policy has; a section has the keys of the policy's class in ssl_emp/prune/policies.py."""

    policy: str = "emp"
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.3  # s: share left out of a pruned epoch
    warmup_epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 1  # first epochs on everything; the paper: 1
    # alpha: last share of the epochs on everything; the paper states no value
    anneal_fraction: Probability = 0.125

    def build(self, index: Tensor | None = None) -> Policy:
        """The policy with these keys. `index`: the samples of policy `indices`, read from its file."""
        policy = POLICIES[self.policy]
        names = [item.name for item in dataclasses.fields(policy) if item.name != "index"]
        keys = {name: getattr(self, name) for name in names} | ({} if index is None else {"index": index})
        return policy(**keys)


class ScoredPruneConfig(PruneConfig):
    """Of policies that look at scores: where these come from."""

    # stale: from the training forward, for free. Before a pruned epoch, passes over what the last one left
    # out (pruned) or over everything (all)
    scoring: Literal["stale", "pruned", "all"] = "stale"
    scoring_draws: Annotated[int, Field(ge=1, le=1000)] = 1  # passes whose mean is taken
    # pixels of their views; null: as in training; half costs a quarter
    scoring_size: Pixels | None = None
    scoring_loss: Literal["nt_xent", "dcl"] | None = None  # the loss in the score; null: the one trained on


class IndicesPruneConfig(PruneConfig):
    indices: Annotated[Place, Field(min_length=1)]  # a .npy or text file


def policy_of(section: Any) -> str:
    """The name of the policy, `emp` where none is given: which section the keys of `prune` are."""
    return str(
        section.get("policy", "emp") if isinstance(section, dict) else getattr(section, "policy", "emp")
    )


def _section_of(policy: type[Policy]) -> type[PruneConfig]:
    keys: dict[str, Any] = {"policy": (Literal[policy.name], policy.name)}
    for item in dataclasses.fields(policy):
        options, bounds = item.metadata.get("options"), {end: item.metadata.get(end) for end in ("ge", "le")}
        if item.name != "index":
            kind = Literal[tuple(options)] if options else Annotated[item.type, Field(**bounds)]  # type: ignore[arg-type]
            keys[item.name] = (kind, item.default)
    base: type[PruneConfig] = ScoredPruneConfig if policy.uses_scores else PruneConfig
    base = IndicesPruneConfig if policy is Indices else base
    return create_model(f"Prune{policy.__name__}", __base__=base, **keys)


PRUNE_SECTIONS = {name: _section_of(policy) for name, policy in POLICIES.items()}
if TYPE_CHECKING:
    AnyPrune = PruneConfig
else:
    tagged = [Annotated[section, Tag(name)] for name, section in PRUNE_SECTIONS.items()]
    AnyPrune = Annotated[functools.reduce(operator.or_, tagged), Discriminator(policy_of)]


LoggerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class MonitorConfig(Section):
    # epochs between two measurements of the encoder's kNN accuracy, where labels exist; 0: never; null: as
    # often as this and reliability_every take at most 5 % of the time together
    knn_every: Every | None = None
    # images for it, taken from the train split: 4/5 bank, 1/5 queries
    knn_images: Annotated[int, Field(ge=100, le=10**9)] = 2000
    # epochs between two measurements of the score's reliability, as knn_every
    reliability_every: Every | None = None
    reliability_images: Annotated[int, Field(ge=2, le=10**9)] = 512  # scored twice for it, in whole batches
    # who else is told of the run: tensorboard, wandb, mlflow, trackio; see docs/loggers.md
    loggers: Annotated[list[LoggerName], Field(max_length=4)] = ["tensorboard"]
    # after each epoch print every figure that metrics.jsonl has of it, not the few that a person needs
    verbose: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_before(cls, values: Any) -> Any:
        """`tensorboard: true | false`, as in ssl_emp 0.1: with or without it in the list."""
        if not isinstance(values, dict) or not isinstance(values.get("tensorboard"), bool):
            return values
        kept = {key: value for key, value in values.items() if key != "tensorboard"}
        others = kept.get("loggers", [])
        if not isinstance(others, list):
            return values
        others = [name for name in others if name != "tensorboard"]
        return kept | {"loggers": ["tensorboard", *others] if values["tensorboard"] else others}

    @field_validator("loggers")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(names))


class CheckpointConfig(Section):
    # minutes between two checkpoints, besides one at the end and one at a stop
    every_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 10.0
    # steps between two, besides every_minutes; null: by the clock alone
    every_steps: Annotated[int, Field(ge=1, le=10**15)] | None = None


class PretrainConfig(Section):
    """Everything a pretraining run depends on; `RUN/config.yaml` is this, resolved."""

    # run directory; null: runs/<name of the config file>
    out: Annotated[Place, Field(min_length=1)] | None = None
    # of the first weights and of all randomness, which is keyed on (seed, epoch, sample, view)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    devices: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = (
        1  # processes on this machine, a GPU each; auto: as many as GPUs; torchrun decides itself
    )
    # of each process, on the CPU; auto: OMP_NUM_THREADS, or one for each core that other programs leave, also
    # during the run. What is to be repeated to the bit needs a number (docs/shared_machine.md)
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    # of several processes: how long one may give no sign of life before the others end
    timeout_seconds: Patience = 600.0
    # steps with a loss or gradient that is not finite are skipped; after so many in a row the run ends
    max_bad_steps: Annotated[int, Field(ge=0, le=10**9)] = 10
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on GPUs that have it, else fp32
    compile: bool = False  # torch.compile the network and the augmentation
    # replay the compiled views, forward and backward as CUDA graphs: for batches that leave a GPU waiting
    cuda_graphs: bool = False
    keep_freed_memory: bool = True  # on Linux CPUs: faster steps for more memory, see benchmarks/README.md
    epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 200  # of the plan, pruned ones included
    # written by --resume RUN epochs=N: of each plan before this one, its epochs and the first epoch that is
    # not run under it
    earlier_plans: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, le=MOST_EPOCHS)]], Field(min_length=2, max_length=2)]],
        Field(max_length=1000),
    ] = []
    # samples a step, of all processes together
    batch_size: Annotated[int, Field(ge=2, le=LARGEST_BATCH)] = 512
    # simclr: without labels. supervised: cross-entropy, and in the score the entropy in the distance's place
    objective: Literal["simclr", "supervised"] = "simclr"
    # of simclr: SimCLR's, or dcl, where the positive is no part of the denominator (decoupled contrastive
    # loss, arXiv 2110.06848)
    loss: Literal["nt_xent", "dcl"] = "nt_xent"
    # of simclr's loss; it settles whether a sample can be learned, and so left out (docs/method.md)
    temperature: Annotated[float, Field(ge=0.001, le=1000)] = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of supervised
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    prune: AnyPrune = PRUNE_SECTIONS["emp"]()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def scored_loss(self) -> str:
        """The contrastive loss that scores are made of, and that metrics.jsonl and samples.parquet show."""
        return getattr(self.prune, "scoring_loss", None) or self.loss

    def plans(self) -> list[tuple[int, list[list[int]]]]:
        """(epochs, earlier_plans) under each plan of the run, the present one last."""
        earlier = [list(plan) for plan in self.earlier_plans]
        return [(epochs, earlier[:number]) for number, (epochs, _) in enumerate(earlier)] + [
            (self.epochs, earlier)
        ]

    @field_validator("prune", mode="before")
    @classmethod
    def _known_policy(cls, value: Any) -> Any:
        if not isinstance(value, dict | PruneConfig):
            raise ValueError(f"is {shorten(repr(value))}, give a section such as prune: {{policy: emp}}")
        policy_named(policy_of(value))  # its ValueError names the nearest
        return value

    @model_validator(mode="after")
    def _plans_rise(self) -> "PretrainConfig":
        lengths, ends = [epochs for epochs, _ in self.plans()], [0, *(end for _, end in self.earlier_plans)]
        rising = all(
            first < then for first, then in zip(lengths, lengths[1:], strict=False)
        ) and ends == sorted(ends)
        if not rising or any(end > epochs for epochs, end in self.earlier_plans):
            raise ValueError(
                "epochs must be more than those of the plans before it, earlier_plans is "
                f"{self.earlier_plans}"
            )
        if self.earlier_plans and POLICIES[self.prune.policy].is_shorter:
            raise ValueError(
                "earlier_plans: policy shorter spends the steps of its epochs in fewer, and "
                "cannot be trained longer"
            )
        return self

    @model_validator(mode="after")
    def _graphs_are_compiled(self) -> "PretrainConfig":
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs needs compile: true")
        return self

    @model_validator(mode="after")
    def _fits_the_objective(self) -> "PretrainConfig":
        if self.optimizer.schedule == "onecycle" and self.optimizer.name in ("adamw", "auto"):
            raise ValueError(
                "optimizer.schedule onecycle moves the momentum, which adamw has not: set "
                "optimizer.name to sgd or lars"
            )
        if self.optimizer.name == "auto" and self.optimizer.lr != "auto":
            raise ValueError(
                "optimizer.name auto needs optimizer.lr auto: a number is the rate of one optimizer"
            )
        if self.optimizer.lr == "auto" and self.objective == "supervised":
            raise ValueError(
                "optimizer.lr auto is for objective simclr: give the rate of a supervised run as a number"
            )
        if self.augment.crop_padding and getattr(self.prune, "scoring_size", None):
            raise ValueError(
                "augment.crop_padding takes views of the images' own size, so prune.scoring_size must be null"
            )
        if self.objective == "supervised":
            if self.loss != "nt_xent" or getattr(self.prune, "scoring_loss", None):
                raise ValueError(
                    "loss and prune.scoring_loss are contrastive losses of objective simclr: supervised "
                    "trains and scores by the cross-entropy"
                )
            policy = self.prune.build()
            if policy.adjusts:
                raise ValueError(
                    "prune.adjust and policy foresight are about the two views of a sample, which objective "
                    "supervised does not have"
                )
            if self.data.holdout is not None:
                raise ValueError(
                    "data.holdout is for evaluate.py, and objective supervised would train on "
                    "the labels that it holds out"
                )
            if policy.memory == "normalized":
                raise ValueError(
                    "prune.memory normalized is about distances, objective supervised has raw "
                    "and standardized"
                )
        elif self.data.label_noise or self.label_smoothing:
            raise ValueError(
                "data.label_noise and label_smoothing are for objective supervised: simclr "
                "trains without labels"
            )
        return self


class _Loader(yaml.SafeLoader):
    """safe_load with `1e-3` as a number and dates as text, without duplicate keys, aliases (a few lines of
    them can fill memory) and depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        if self.depth > MAX_DEPTH:
            problem = f"sections or lists nested more than {MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # a number of thousands of digits; YAML's own complaints are no ValueErrors
        except ValueError as error:
            problem = f"{shorten(str(node.value))} cannot be read"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"key {key!r} {'stands twice' if isinstance(key, str) else 'is not a name'}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
# YAML 1.1 reads 010 as eight: here it is no number at all; and a folder may be called 2024-05-31
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 10
MAX_PROBLEMS = 10  # told at once


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document. Raises UserError with the line number on broken syntax."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        fix = "correct the syntax"
        raise UserError(f"{where} is not valid YAML{line}: {shorten(problem, 150)}", fix) from error


def read_values(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked. Raises UserError where it cannot be read as such."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)  # whatever the path is: /dev/zero has no end
        if len(raw) > MAX_CONFIG_BYTES:
            fix = "give a config file, not a data file"
            raise UserError(f"{path} has more than {MAX_CONFIG_BYTES:,} bytes", fix)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        fix = f"give the path of a YAML file, or a name that `{command_line('configs')}` lists"
        raise UserError(f"cannot read {path} ({error.strerror})", fix) from error
    except UnicodeDecodeError as error:
        fix = f"give the path of a YAML file, or a name that `{command_line('configs')}` lists"
        raise UserError(f"{path} is not a text file", fix) from error
    loaded = parse_yaml(text, str(path))
    if not isinstance(loaded, dict | None):
        what = f"{path} holds a {type(loaded).__name__}, not keys and values"
        raise UserError(what, "write key: value lines")
    return loaded or {}


# `a.b=value` on the command line, the value read as YAML; in Python (`a.b`, value)
Override = str | tuple[str, Any]


def load_config(
    path: str | Path | None,
    overrides: Sequence[Override],
    of_run: bool = False,
    overridden_in: str = "the command line",
) -> PretrainConfig:
    """Read a YAML file, apply overrides, check everything.

    Args:
        path: YAML file, or the name of a shipped one (`demo`); None for the defaults.
        overrides: such as `prune.fraction=0.5`. Another `prune.policy` than the file's drops those of the
            file's keys that this policy does not have.
        of_run: the file is a run's config.yaml, perhaps of ssl_emp 0.1, where every policy had every key; a
            whole copy of such a section is read without it.
        overridden_in: where the overrides come from, for messages.

    Raises:
        UserError: unreadable file, broken syntax, or all unknown keys, wrong types and values at once.
    """
    path = None if path is None else find_config(path)
    values = {} if path is None else read_values(path)
    section = values.get("prune")
    if isinstance(section, dict) and (of_run or GONE.keys() <= section.keys()):
        section = values["prune"] = keys_of_policy(section, str(path))
    where = overridden_in if path is None else str(path)
    for override in overrides:
        name, policy = override if isinstance(override, tuple) else override.partition("=")[::2]
        is_policy = name == "prune.policy" and isinstance(policy, str) and policy in POLICIES
        if is_policy and isinstance(section, dict):
            keys = PRUNE_SECTIONS[policy].model_fields
            values["prune"] = {key: value for key, value in section.items() if key in keys}
    for override in overrides:
        apply_override(PretrainConfig, values, override)
    if values.get("out") is None and path is not None:
        values["out"] = f"runs/{path.stem}"
    return check_config(values, f"{where} and {overridden_in}" if path is not None and overrides else where)


# keys that `prune` had in ssl_emp 0.1 and that no published config or result used, with their defaults
GONE: dict[str, Any] = {
    "beta_end": None, "loss_weight_end": None, "scoring_draw": "own", "rescore_every": 1, "layers": [],
    "confidence": 1.0,
}  # fmt: skip


def keys_of_policy(section: dict[str, Any], where: str) -> dict[str, Any]:
    """The section `prune` of a run of ssl_emp 0.1, where every policy had every key, without unused ones."""
    used = [key for key, default in GONE.items() if key in section and section[key] != default]
    if used:
        what = (
            f"{where} was trained with prune.{used[0]}={section[used[0]]}, which this version does not have"
        )
        raise UserError(what, "use ssl_emp 0.1 for this run")
    known = {key for policy in PRUNE_SECTIONS.values() for key in policy.model_fields}
    name = policy_of(section)
    own = set(PRUNE_SECTIONS[name].model_fields) if name in POLICIES else known
    for item in dataclasses.fields(POLICIES[name]) if name in POLICIES else ():
        if len(item.metadata.get("options", ())) == 1:  # foresight adjusts, whatever was written there
            own.discard(item.name)
    return {
        key: value
        for key, value in section.items()
        if key not in GONE
        and (key in own or key not in known)
        and (value is not None or key == "scoring_size")
    }


def pairs_of(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings from Python, nested and with dotted names, as overrides (dotted key, plain value)."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if not isinstance(key, str) or not all(key.split(".")):
            fix = "use names such as epochs or prune.fraction"
            raise UserError(f"{shorten(repr(key))} is not the name of a setting", fix)
        pairs += (
            pairs_of(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [(f"{prefix}{key}", _plain(value))]
        )
    return pairs


def _plain(value: Any) -> Any:
    """A value as YAML has it: numpy's numbers, paths and tuples are none of YAML."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def apply_override(config: type[BaseModel], values: dict[str, Any], override: Override) -> None:
    """Write it into nested dicts. Text is YAML, but kept as it is where `config` has a string."""
    key, equals, text = (*override, "") if isinstance(override, tuple) else override.partition("=")
    if isinstance(override, str) and (not equals or not all(key.split("."))):
        fix = "write key=value, such as epochs=20 or prune.fraction=0.5"
        raise UserError(f"{shorten(override)} is not an override", fix)
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            fix = f"write {shorten(section)}=value"
            raise UserError(f"{shorten(key)}: {shorten(section)} is a value, not a section", fix)
    if isinstance(override, tuple):
        values[name] = override[1]
        return
    takes_text = str in _types_of(config, key.split("."))
    values[name] = text if takes_text and text != "null" else parse_yaml(text, shorten(override))


def _types_of(config: type[BaseModel], path: list[str]) -> set[Any]:
    """The types that a key may have; those of `prune` are of every policy together."""
    sections: list[Any] = [config]
    for part in path[:-1]:
        kinds = [
            section.model_fields[part].annotation for section in sections if part in section.model_fields
        ]
        kinds = [kind for union in kinds for kind in (get_args(union) or (union,))]
        sections = [kind for kind in kinds if hasattr(kind, "model_fields")]
    last = path[-1]
    kinds = [section.model_fields[last].annotation for section in sections if last in section.model_fields]
    kinds = [kind for kind in kinds if get_origin(kind) is not dict]  # which no text is
    kinds = [option for union in kinds for option in (get_args(union) or (union,))]
    return {get_args(kind)[0] if get_args(kind) else kind for kind in kinds}


def check_config(values: dict[str, Any], where: str) -> PretrainConfig:
    """Check a dict of values. Raises UserError that lists every problem at once."""
    try:
        return PretrainConfig.model_validate(values)
    except ValidationError as error:
        found = {
            _key_and_range(item["loc"])[0] if item["type"] != "extra_forbidden" else item["loc"]: item
            for item in error.errors()[::-1]
        }
        problems = [_describe(item) for item in list(found.values())[::-1][:MAX_PROBLEMS]]
        problems += [f"and {len(found) - MAX_PROBLEMS} more"] if len(found) > MAX_PROBLEMS else []
        count = "" if len(found) == 1 else f"{len(found)} problems: "
        fix = "correct it, or override it with key=value"
        raise UserError(f"{count}{'; '.join(problems)}, in {where}", fix) from error


def _section_at(location: tuple[int | str, ...]) -> tuple[type[BaseModel], tuple[int | str, ...]]:
    """The section in which pydantic found something, and the place in it; of `prune` that of the policy."""
    if location[:1] == ("prune",) and location[1:2] and location[1] in PRUNE_SECTIONS:
        return PRUNE_SECTIONS[str(location[1])], location[2:]
    return PretrainConfig, location


def _describe(item: Any) -> str:
    section, path = _section_at(item["loc"])
    inner, prefix = section, "prune." if issubclass(section, PruneConfig) else ""
    if item["type"] == "extra_forbidden":
        for part in path[:-1]:
            inner = inner.model_fields[str(part)].annotation  # type: ignore[assignment]
            prefix += f"{shorten(str(part))}."
        name = str(path[-1])
        if prefix == "prune." and name in GONE:
            return f"prune.{name} is not a key any more: no published result used it"
        of_policy = "unknown key"
        if prefix == "prune.":
            of_policy = f"policy {inner.model_fields['policy'].default} has no key"
        known = f"known are {', '.join(inner.model_fields)}"
        owners = [policy for policy, keys in PRUNE_SECTIONS.items() if name in keys.model_fields]
        if prefix == "prune." and owners:
            return f"{of_policy} prune.{name}, which policy {owners[0]} has"
        names = did_you_mean(name, inner.model_fields, known, cutoff=0.5, prefix=prefix)
        return f"{of_policy} {prefix}{shorten(name)}, {names}"
    key, range_ = _key_and_range(item["loc"])
    if item["type"] == "schedule":
        return f"{key} {item['msg']}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = f" (is {shorten(repr(item['input']))})" if item["type"] not in ("missing", "value_error") else ""
    return f"{key}: {message}{shown}{range_}".removeprefix(": ")  # a rule of the whole config has no key


@functools.cache
def _schema(section: type[BaseModel]) -> dict[str, Any]:
    return section.model_json_schema()


def _key_and_range(location: tuple[int | str, ...]) -> tuple[str, str]:
    """The dotted key, and what is allowed for a number, such as `, allowed: 0 <= value < 1`; else nothing."""
    section, path = _section_at(location)
    schema = node = _schema(section)
    key = ["prune"] if issubclass(section, PruneConfig) else []
    for part in path:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if inner is None:  # not a key, but which of several types pydantic tried there
            break
        key.append(str(part))
        node = schema["$defs"][inner["$ref"].rpartition("/")[2]] if "$ref" in inner else inner
    options = node.get("anyOf", [node])
    number = next((option for option in options if option.get("type") in ("integer", "number")), None)
    if number is None:
        return ".".join(key), ""

    def end(names: dict[str, str], form: str) -> str:
        return next((form.format(number[name], sign) for name, sign in names.items() if name in number), "")

    low = end({"minimum": "<=", "exclusiveMinimum": "<"}, "{0:.10g} {1} ")
    high = end({"maximum": "<=", "exclusiveMaximum": "<"}, " {1} {0:.10g}")
    step = f", a multiple of {number['multipleOf']}" if "multipleOf" in number else ""
    words = "".join(f", or {option['const']}" for option in options if "const" in option)
    allowed = f"{low}value{high}{step}{words}" if low or high else f"any finite number{words}"
    return ".".join(key), f", allowed: {allowed}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; `model.args`, whose keys are anybody's, is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, dict) and name != "model.args"
        flat |= flatten(value, f"{name}.") if is_section else {name: value}
    return flat
