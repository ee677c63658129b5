"""The literature's linear probe: a linear classifier by SGD over a frozen encoder, on augmented images.

Protocol: SimCLR (arXiv 2002.05709, appendix B.6): random crop and flip anew in every epoch, SGD with Nesterov
momentum 0.9, no weight decay, half a cosine from 0.1 * batch / 256 in 90 epochs; judged after the last epoch
on the test images as they are. The head sees the raw features, as there: under augmentation no cached mean
and std belong to them. Their scale is the encoder's own, so that one rate does not suit all; hence several,
chosen on a held-out part of train.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from linear_eval.errors import EvalError
from linear_eval.features import check_frozen
from linear_eval.finetune import (
    ON_CPU,
    Execution,
    LabelledSplits,
    Recipe,
    TrainResult,
    Views,
    state_hash,
    train_and_test,
)

EPOCHS = 90
LRS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # SimCLR's is 0.1


def probe_recipe(
    views: Views, seed: int, *, epochs: int = EPOCHS, lr: float | Sequence[float] = LRS, **others: Any
) -> Recipe:
    """The recipe of the probe; `others` as in `Recipe`."""
    plain = {"weight_decay": 0, "layer_decay": 1, "label_smoothing": 0, "warmup_epochs": 0}
    return Recipe(views, seed, epochs, lr, **(plain | others))


def augmented_probe(
    encoder: nn.Module,
    feature_dim: int,
    splits: LabelledSplits,
    recipe: Recipe,
    execution: Execution = ON_CPU,
) -> TrainResult:
    """Trains a linear head over the frozen encoder, and scores it once on the test images.

    All learning rates share one forward pass: choosing between any number doubles the time of one.

    Args:
        encoder: (B, 3, S, S) float32 in [0, 1] -> (B, feature_dim); in eval mode and on the device.
        recipe: see `probe_recipe`.

    Raises:
        EvalError: as for `finetune`; an encoder in training mode, elsewhere, or changed by its forward pass.
    """
    check_frozen(encoder, execution.device)
    before = state_hash(encoder)
    result = train_and_test(encoder, feature_dim, splits, recipe, execution, frozen=True)
    if state_hash(encoder) != before:
        fix = "use one that has no state written in its forward pass"
        raise EvalError("the encoder changed while it was judged", fix)
    return result
