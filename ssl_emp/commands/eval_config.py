"""The settings of evaluate.py: one section an evaluator, and how `key=value` fills them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from linear_eval.diagnose import MAX_SAMPLES, NUM_NEIGHBORS, NUM_QUERIES
from linear_eval.errors import did_you_mean
from linear_eval.features import BATCH_SIZE
from linear_eval.fewshot import MIN_SUBSETS, NUM_SUBSETS
from linear_eval.finetune import LR as FINETUNE_LR
from linear_eval.finetune import Recipe
from linear_eval.linear import MAX_ITER, VAL_FRACTION
from linear_eval.metrics import NUM_RESAMPLES
from ssl_emp.config import (
    LARGEST_BATCH,
    MOST_EPOCHS,
    DataConfig,
    NetworkConfig,
    Override,
    Patience,
    Place,
    PretrainConfig,
    Section,
    apply_override,
)
from ssl_emp.errors import UserError
from ssl_emp.run.ranks import TIMEOUT_SECONDS

Checked = TypeVar("Checked", bound=Section)
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class KnnConfig(Section):
    # k, one or several, which share one search
    num_neighbors: Annotated[list[Count], Field(min_length=1), BeforeValidator(as_list)] = [20]
    # T of a vote's weight, exp(similarity / T); null: every neighbour has one vote
    temperature: Annotated[float, Field(ge=0.001, le=1000)] | None = 0.1
    backend: Literal["auto", "faiss", "torch"] = "auto"  # what searches; the numbers are the same


class LinearConfig(Section):
    # lbfgs: logistic regression, 45 strengths of l2; cached: SGD, 50 heads at once; augmented: SGD on crops,
    # as in the literature's tables
    protocol: Literal["lbfgs", "cached", "augmented"] = "lbfgs"
    val_fraction: Share = VAL_FRACTION  # of the train split, held out to choose l2, or the learning rate
    max_iter: Count = MAX_ITER  # of lbfgs: steps a fit
    precision: Literal["float32", "float64"] = "float32"  # of lbfgs
    epochs: Count | None = None  # of cached and augmented; null: 100 and 90
    # keep the classifier, for `evaluate.py predict`, in classifier-linear/ beside the rows
    save: bool = False


class FewshotConfig(Section):
    fractions: Annotated[list[Share], BeforeValidator(as_list)] = [0.01, 0.1]  # of the labels
    per_class: Annotated[list[Count], BeforeValidator(as_list)] = []  # labels, besides the fractions
    num_draws: Annotated[int, Field(ge=MIN_SUBSETS, le=1000)] = (
        NUM_SUBSETS  # of the labels, for mean and spread
    )
    finetune: bool = False  # train the network too, besides the frozen features
    epochs: Count = 60  # of finetune


class FinetuneConfig(Section):
    epochs: Count = Recipe.epochs  # passes over the train split
    # the peak for 256 images a step, scaled with batch_size; several: chosen on a held-out part of train
    lr: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1), BeforeValidator(as_list)
    ] = [FINETUNE_LR]
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Recipe.weight_decay  # not of biases and BatchNorm
    batch_size: Annotated[int, Field(ge=4, le=LARGEST_BATCH)] = Recipe.batch_size  # most images a step
    # below 1: each stage of a ResNet learns at so much of the rate of the stage above it
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Recipe.layer_decay
    # share of the target that is spread over all classes
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Recipe.label_smoothing
    # of linear rise to the peak; the rest falls as half a cosine
    warmup_epochs: Annotated[float, Field(ge=0, le=MOST_EPOCHS)] = Recipe.warmup_epochs
    bf16: bool = Recipe.bf16  # the encoder in bfloat16 autocast; head and loss stay in float32
    val_fraction: Share = Recipe.val_fraction  # of every class, held out to choose between several lr
    # keep the classifier, for `evaluate.py predict`, in classifier-finetune/ beside the rows
    save: bool = False


class DiagnoseConfig(Section):
    # a run's train split has scores and times trained beside its embeddings
    split: Literal["test", "train"] = "test"
    max_samples: Annotated[int, Field(ge=2, le=50_000)] = MAX_SAMPLES  # that the figures come from
    num_queries: Annotated[int, Field(ge=1, le=64)] = NUM_QUERIES  # rows of the picture of neighbours
    num_neighbors: Annotated[int, Field(ge=1, le=20)] = NUM_NEIGHBORS  # its columns
    map: Literal["pca", "umap"] = "pca"  # umap: of the extra `umap`


class TransferConfig(Section):
    # a YAML file of data sets, or the name of a shipped one: small, simclr
    suite: Place = "small"
    root: Place = "data"  # where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch what is missing
    num_draws: Annotated[int, Field(ge=100, le=100_000)] = NUM_RESAMPLES  # of the bootstrap


class EvalConfig(Section):
    data: DataConfig = DataConfig()
    model: NetworkConfig = NetworkConfig()  # of `random`
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    fewshot: FewshotConfig = FewshotConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    transfer: TransferConfig = TransferConfig()
    start: bool = True  # beside a run of model.init, judge what it began from as well
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # initialises `random`, draws what is held out
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    batch_size: Count = BATCH_SIZE  # images a forward pass
    # of several processes: how long one may give no sign of life before the others end
    timeout_seconds: Patience = TIMEOUT_SECONDS
    cache_dir: Place | None = ".cache/ssl_emp/features"  # where features are kept; null: they are not


def keys_of(settings: type[Section]) -> list[str]:
    """The dotted keys of a config. (Which ones `prune` has depends on the policy; it is one key here.)"""
    found: list[str] = []
    for name, field in settings.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        found += [name] if section is None else [f"{name}.{key}" for key in section]
    return found


def parse_overrides(overrides: Sequence[Override], settings: type[Section] = EvalConfig) -> dict[str, Any]:
    """`["knn.num_neighbors=5", "seed=1"]` -> `{"knn": {"num_neighbors": 5}, "seed": 1}`, or UserError."""
    known = keys_of(settings)
    values: dict[str, Any] = {}
    for override in overrides:
        key = override[0] if isinstance(override, tuple) else override.partition("=")[0]
        if key in keys_of(PretrainConfig) and key not in known or key.startswith("prune."):
            raise UserError(f"{key} is a setting of pretraining, and does nothing here", "leave it out")
        if key not in known and not key.startswith("model.args."):
            otherwise = f"use one of {', '.join(known)}"
            raise UserError(f"unknown key {key!r}", did_you_mean(key, known, otherwise, cutoff=0.4))
        apply_override(settings, values, override)
    return values


def check(section: type[Checked], values: Any, where: str) -> Checked:
    """`section` filled with `values`, or a UserError that names the first one that does not fit."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(part for part in first["loc"] if isinstance(part, str))  # without places in lists
        what = f"{key}: {first['msg']} (is {str(first['input'])[:60]!r}), in {where}"
        raise UserError(what, f"correct {key}") from error
