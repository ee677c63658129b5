"""The literature's linear probe: a linear classifier by SGD over a frozen encoder, on augmented images.

Protocol: SimCLR (arXiv 2002.05709, appendix B.6): random crop and flip anew in every epoch, SGD with Nesterov
momentum 0.9, no weight decay, half a cosine from 0.1 * batch / 256 in 90 epochs; judged after the last epoch
on the test images as they are. The head sees the raw features, as there: under augmentation no cached mean
and std belong to them. Their scale is the encoder's own, so that one rate does not suit all; hence several,
chosen on a held-out part of train.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from linear_eval.features import EvalError, check_frozen
from linear_eval.finetune import (
    IndexedPixels,
    Progress,
    Recipe,
    TrainResult,
    Views,
    Warn,
    state_hash,
    train_and_test,
)

LRS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # SimCLR's is 0.1


def augmented_probe(
    encoder: nn.Module,
    feature_dim: int,
    train_pixels: IndexedPixels,
    train_labels: Tensor,
    test_pixels: IndexedPixels,
    test_labels: Tensor,
    *,
    views: Views,
    seed: int,
    epochs: int = 90,
    lr: float | Sequence[float] = LRS,
    batch_size: int = 256,
    bf16: bool = False,
    val_fraction: float = 0.2,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    warn: Warn = warnings.warn,
) -> TrainResult:
    """Trains a linear head over the frozen encoder, and scores it once on the test images.

    Args:
        encoder: (B, 3, S, S) float32 in [0, 1] -> (B, feature_dim); in eval mode and on `device`.
        lr: peak learning rate for 256 images a step, scaled with the real batch; several: chosen on a
            held-out part of train, with all heads over one forward pass, so that any number of them doubles
            the time of one.
        All others: as for `linear_eval.finetune.finetune`.

    Raises:
        EvalError: as for `finetune`; an encoder in training mode or on another device, or one that its
            forward pass changes.
    """
    device = check_frozen(encoder, device)
    recipe = Recipe(
        views,
        epochs,
        batch_size,
        warmup_epochs=0,
        weight_decay=0,
        layer_decay=1,
        label_smoothing=0,
        bf16=bf16,
        seed=seed,
    )
    before = state_hash(encoder)
    splits = (train_pixels, train_labels, test_pixels, test_labels)
    result = train_and_test(
        encoder, feature_dim, *splits, lr, recipe, True, val_fraction, device, checkpoint, progress, warn
    )
    if state_hash(encoder) != before:
        raise EvalError(
            "the encoder changed while it was judged", "use one that has no state written in its forward pass"
        )
    return result
