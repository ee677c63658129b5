"""Optimisers and the curves of their learning rate and momentum."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from linear_eval.numeric import takes_weight_decay


class Lars(Optimizer):
    """LARS with momentum (arXiv 1708.03888): each tensor's step is scaled by ||w|| / ||g + wd * w||.

    Tensors in a group with `adapt=False` (biases, BatchNorm) take a plain momentum step, as in SimCLR. The
    norms of all tensors are taken in one call and compared on the device: no branch waits for the GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # closures are not supported
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            updates = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                weight_norms, update_norms = torch._foreach_norm(weights), torch._foreach_norm(updates)
                ratios = [
                    torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                    for w, g in zip(weight_norms, update_norms, strict=True)
                ]
                torch._foreach_mul_(updates, ratios)
            momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in weights]
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            before = None if found_inf is None else [momentum.clone() for momentum in momenta]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            moves = momenta
            if before is not None and found_inf is not None:  # see step_where
                moves = [torch.where(found_inf > 0, 0.0, momentum) for momentum in momenta]
                torch._foreach_copy_(
                    momenta, [torch.where(found_inf > 0, *pair) for pair in zip(before, momenta, strict=True)]
                )
            torch._foreach_add_(weights, moves, alpha=-group["lr"])


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    lr_scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """`sgd`, `lars` or `adamw`.

    Biases, norms, position embeddings and class tokens, and what timm's `no_weight_decay` names, take no
    weight decay and no LARS scaling.

    Args:
        lr_scales: parameter of `model` -> factor of its learning rate (layer-wise decay), 1 for all others.
    """
    backbone = getattr(model, "backbone", model)
    no_weight_decay: Any = getattr(backbone, "no_weight_decay", set)  # timm's networks have it
    own = no_weight_decay()
    scales: dict[float, tuple[list[Tensor], list[Tensor]]] = {1.0: ([], [])}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = takes_weight_decay(key, parameter) and key.removeprefix("backbone.") not in own
            scale = 1.0 if lr_scales is None else lr_scales.get(key, 1.0)
            scales.setdefault(scale, ([], []))[0 if decays else 1].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": part, "weight_decay": weight_decay if decays else 0.0}
        | ({} if scale == 1.0 else {"lr_scale": scale})
        | ({} if decays or name != "lars" else {"adapt": False})
        for scale, parts in scales.items()
        for part, decays in zip(parts, (True, False), strict=True)
        if part or scale == 1.0
    ]
    params = [parameter for group in groups for parameter in group["params"]]
    if name == "lars":
        return Lars(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    assert name == "sgd", name
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    for p in params if momentum else ():  # else a first step that is skipped would leave them unset
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def auto_name(backbone: nn.Module) -> str:
    """The optimizer for a backbone: `adamw` where it has layer norms (or RMS norms), else `sgd`.

    These are what transformers and the convolutional networks after them (Swin, ConvNeXt, CoAtNet) have in
    common, and the published recipes of all of them train with AdamW.
    """
    names = {
        type(module).__name__.lower() for module in backbone.modules()
    }  # every library has its own RmsNorm
    has_layer_norm = any(isinstance(module, nn.LayerNorm) for module in backbone.modules())
    return "adamw" if has_layer_norm or any("rmsnorm" in name for name in names) else "sgd"


def auto_lr(name: str, batch_size: int) -> float:
    """The peak learning rate of a SimCLR run, to four digits.

    lars: 0.075 sqrt(B), SimCLR's own for small batches and few epochs (arXiv 2002.05709, appendix B.1).
    sgd: 0.06 sqrt(B), through the best rates that were measured at batches of 64 (0.48) and 256 (0.96), both
    within a factor of two (experiments/README.md, "The temperature and the batch"). adamw: 1.5e-4 B / 256,
    MoCo v3's for vision transformers (arXiv 2104.02057).

    Args:
        name: `sgd`, `lars` or `adamw`.
        batch_size: B, of all processes together.
    """
    rates = {
        "lars": 0.075 * math.sqrt(batch_size),
        "sgd": 0.06 * math.sqrt(batch_size),
        "adamw": 1.5e-4 * batch_size / 256,
    }
    return float(f"{rates[name]:.4g}")


def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients, 0-d on the device, not finite where one of them is not; no read back."""
    return torch.stack(torch._foreach_norm([p.grad for p in params if p.grad is not None])).norm()


def step_where(optimizer: Optimizer, where: Tensor) -> None:
    """`optimizer.step()` where `where` (0-d bool on the device), else no change; reads nothing back.

    torch's fused optimisers take the flag that its gradient scaler gives them, and so does `Lars`.
    """
    optimizer.found_inf = (~where).float()  # type: ignore[attr-defined]
    optimizer.step()


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum of every step, counted from 0.

    Args:
        peak_lr: the highest learning rate.
        warmup_steps: of the cosine: steps until the peak is reached, in a straight line.
        curves: of each plan of the run, the last one last: the first step not run under it, and its steps
            in all. A run that is made longer begins a curve over all its steps.
        one_cycle: torch's OneCycleLR instead of the cosine; it moves the momentum too.
    """

    peak_lr: float
    warmup_steps: int
    curves: tuple[tuple[int, int], ...]
    one_cycle: bool = False

    def planned_steps(self, step: int) -> int:
        """Steps of the plan that `step` is run under: what its curve is laid over."""
        return next((total for end, total in self.curves if step < end), self.curves[-1][0])

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        if self.one_cycle:
            return one_cycle_lr(step, self.planned_steps(step), self.peak_lr)
        return lr_at(step, self.planned_steps(step), self.warmup_steps, self.peak_lr)

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Write the rates of a step into every group of parameters."""
        moving = {"lr": self.lr(step)}
        if self.one_cycle:
            moving["momentum"] = one_cycle_momentum(step, self.planned_steps(step))
        for group in optimizer.param_groups:
            group.update(moving)
            group["lr"] *= group.get("lr_scale", 1.0)  # layer-wise decay


def lr_at(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """Linear warm-up, then half a cosine to zero, over the steps that are planned for the pruned run.

    Args:
        step: 0 for the first optimiser step.
        total_steps: of the run, as it is pruned.
        warmup_steps: steps until `peak_lr` is reached.
        peak_lr: the highest learning rate.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak_lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def one_cycle_lr(
    step: int,
    total_steps: int,
    peak_lr: float,
    pct_start: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
) -> float:
    """torch's OneCycleLR (cosine): from peak / div up to the peak, then down to peak / div / final_div.

    Args:
        step: 0 for the first optimiser step, total_steps - 1 for the last, which takes the lowest rate.
        total_steps: of the run, as it is pruned.
        peak_lr: the highest learning rate, reached after pct_start of the steps.
        pct_start: share of the steps that rise, 0 <= pct_start < 1.
        div: peak over first rate.
        final_div: first over last rate.
    """
    return _one_cycle(step, total_steps, pct_start, peak_lr / div, peak_lr, peak_lr / div / final_div)


def one_cycle_momentum(
    step: int, total_steps: int, pct_start: float = 0.3, base: float = 0.85, high: float = 0.95
) -> float:
    """The default momentum of torch's OneCycleLR, against the learning rate: high -> base -> high.

    InfoBatch's CIFAR example leaves that default on, which overrides the 0.9 that it gives its optimiser.
    """
    return _one_cycle(step, total_steps, pct_start, high, base, high)


def _one_cycle(
    step: int, total_steps: int, pct_start: float, first: float, middle: float, last: float
) -> float:
    """Half a cosine from `first` to `middle`, another on to `last`."""
    assert 0 <= step < total_steps and 0 <= pct_start < 1, (step, total_steps, pct_start)
    turn = pct_start * total_steps - 1  # a step, not always a whole number; at or below 0 nothing rises
    rises = 0 < turn and step <= turn
    begin, end, progress = (
        (first, middle, step / turn) if rises else (middle, last, (step - turn) / (total_steps - 1 - turn))
    )
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * progress))
