"""Small parts of more than one probe."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# vectors by their meaning, though their tensors have more dimensions: position embeddings, class tokens
NOT_DECAYED = ("pos_embed", "pos_embedding", "cls_token", "class_token", "reg_token", "dist_token")


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Matrix products in full float32 on GPUs, also where the caller trains with TF32: it is off by up to
    1e-3, which ends a descent too early and finds other neighbours.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def cosine_schedule(step: int, num_steps: int, warmup_steps: float = 0) -> float:
    """Share of the peak rate at a step from 0: a linear rise over the warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    return (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps))) / 2


def takes_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether the parameter of this name is a weight: not a bias, a norm, a position embedding, a token."""
    return parameter.dim() > 1 and name.rpartition(".")[2] not in NOT_DECAYED
