"""The settings of evaluate.py: one section an evaluator, and how `key=value` fills them."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from linear_eval.errors import did_you_mean
from ssl_emp.config import (
    LARGEST_BATCH,
    MOST_EPOCHS,
    DataConfig,
    ModelConfig,
    Patience,
    Place,
    Section,
    apply_override,
)
from ssl_emp.errors import UserError

Checked = TypeVar("Checked", bound=Section)
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class KnnConfig(Section):
    # one, or several from one search
    num_neighbors: Annotated[list[Count], Field(min_length=1), BeforeValidator(as_list)] = [20]
    temperature: Annotated[float, Field(ge=0.001, le=1000)] | None = 0.1  # null: every neighbour has one vote
    backend: Literal["auto", "faiss", "torch"] = "auto"


class LinearConfig(Section):
    protocol: Literal["lbfgs", "cached", "augmented"] = "lbfgs"
    val_fraction: Share = 0.2  # of the train split, held out to choose l2, or the learning rate
    max_iter: Count = 1000  # lbfgs: steps a fit
    precision: Literal["float32", "float64"] = "float32"  # lbfgs
    epochs: Count | None = None  # null: 100 for cached, 90 for augmented
    # keep the classifier, for `evaluate.py predict`, in classifier-linear/ beside the rows
    save: bool = False


class FewshotConfig(Section):
    fractions: Annotated[list[Share], BeforeValidator(as_list)] = [0.01, 0.1]  # of the labels
    per_class: Annotated[list[Count], BeforeValidator(as_list)] = []
    num_draws: Annotated[int, Field(ge=3, le=1000)] = 5
    finetune: bool = False  # train the network too, besides the frozen features
    epochs: Count = 60  # of finetune


class FinetuneConfig(Section):
    epochs: Count = 30
    lr: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1), BeforeValidator(as_list)
    ] = [0.05]  # for 256 images a step; several: chosen on a held-out part of train
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0
    batch_size: Annotated[int, Field(ge=4, le=LARGEST_BATCH)] = 256
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0, le=MOST_EPOCHS)] = 0.0
    bf16: bool = False
    val_fraction: Share = 0.2
    # keep the classifier, for `evaluate.py predict`, in classifier-finetune/ beside the rows
    save: bool = False


class DiagnoseConfig(Section):
    # a run's train split has scores and times trained beside its embeddings
    split: Literal["test", "train"] = "test"
    max_samples: Annotated[int, Field(ge=2, le=50_000)] = 10_000
    num_queries: Annotated[int, Field(ge=1, le=64)] = 8
    num_neighbors: Annotated[int, Field(ge=1, le=20)] = 8
    map: Literal["pca", "umap"] = "pca"


class TransferConfig(Section):
    suite: Place = "configs/suites/small.yaml"
    root: Place = "data"  # where torchvision keeps its data sets
    download: bool = False
    num_draws: Annotated[int, Field(ge=100, le=100_000)] = 1000  # of the bootstrap


class EvalConfig(Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    fewshot: FewshotConfig = FewshotConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    transfer: TransferConfig = TransferConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # initialises `random`, draws what is held out
    device: str = "auto"
    batch_size: Count = 256
    # of several processes: how long one may give no sign of life before the others end
    timeout_seconds: Patience = 600.0
    cache_dir: Place | None = ".cache/ssl_emp/features"  # null: features are not kept


def parse_overrides(overrides: list[str], settings: type[Section] = EvalConfig) -> dict[str, Any]:
    """`["knn.num_neighbors=5", "seed=1"]` -> `{"knn": {"num_neighbors": 5}, "seed": 1}`; an unknown key is a
    UserError.
    """
    known: list[str] = []
    for name, field in settings.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        known += [name] if section is None else [f"{name}.{key}" for key in section]
    values: dict[str, Any] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if key not in known:
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
        key = ".".join(part for part in first["loc"] if isinstance(part, str))  # not the place in a list
        raise UserError(
            f"{key}: {first['msg']} (is {str(first['input'])[:60]!r}), in {where}", f"correct {key}"
        ) from error
