"""A step that is not finite is counted, and leaves weights, optimiser and BatchNorm as they were."""

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ssl_emp.errors import RunFailed
from ssl_emp.optim import gradient_norm, step_where

FIX = "start again with a lower optimizer.lr or a longer optimizer.warmup_epochs, and another out=DIR"


class Guard:
    """Takes the optimiser's steps. Nothing waits for the device but where a method says so.

    Args:
        model, optimizer: of the run, with the weights to go on from.
        max_bad_steps: so many steps in a row may be skipped; one more ends the run.
        in_a_row: 0-d int64, steps skipped in a row until now.
        norms: (steps,) of the epoch under way, see `norms`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        max_bad_steps: int,
        in_a_row: Tensor,
        norms: Tensor | None,
    ) -> None:
        self.model, self.optimizer, self.max_bad_steps = model, optimizer, max_bad_steps
        self._parameters, self._buffers = list(model.parameters()), list(model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        self.in_a_row, self._longest = in_a_row, torch.zeros_like(in_a_row)
        # (steps,) gradient norm of each step of the epoch; inf: skipped; None between epochs
        self.norms = norms

    def step(self, terms: Tensor, number: int, batches: Tensor) -> Tensor:
        """Step `number`: whether loss, memory (2, B) and all gradients are finite, 0-d bool on the device."""
        if self.norms is None:
            self.norms = torch.zeros(len(batches), device=batches.device)
        norm = gradient_norm(self._parameters)  # of all ranks: the gradients are summed by now
        finite = terms.isfinite().all() & norm.isfinite()
        step_where(self.optimizer, finite)
        if self._buffers:  # a ViT may have none, and torch copies no empty list
            # no branch on `finite`, which would wait for a GPU
            pairs = zip(self._buffers, self._buffers_before, strict=True)
            torch._foreach_copy_(self._buffers, [torch.where(finite, *pair) for pair in pairs])
            torch._foreach_copy_(self._buffers_before, self._buffers)
        self.norms[number] = norm.where(finite, torch.inf)
        self.in_a_row = torch.where(finite, 0, self.in_a_row + 1)
        self._longest = torch.maximum(self.in_a_row, self._longest)
        return finite

    def check(self, batches: Tensor, epoch: int) -> None:
        """Raise RunFailed where too many steps in a row were skipped. Reads from the device."""
        longest = int(self._longest)
        if longest > self.max_bad_steps:
            limit = f"{longest} bad steps in a row, max_bad_steps is {self.max_bad_steps}"
            raise RunFailed(
                f"{limit}; {self.skipped_line(batches, epoch)}; the last checkpoint is intact. fix: {FIX}"
            )

    def check_weights(self, step: int) -> None:
        """Raise RunFailed where every one of `step` steps was skipped, or weights are not finite: no loss has
        seen the last update yet.
        """
        if step and int(self.in_a_row) >= step:
            what = f"none of the {step} steps had a finite loss and gradient, so that nothing was trained"
            raise RunFailed(f"{what}. fix: {FIX}")
        if not torch.stack([tensor.isfinite().all() for tensor in self.model.state_dict().values()]).all():
            what = f"the weights are not finite after step {step}; the last checkpoint is intact"
            raise RunFailed(f"{what}. fix: {FIX}")

    def skipped(self) -> list[int]:
        """The steps of the epoch that were skipped. Reads from the device."""
        return [] if self.norms is None else self.norms.isinf().nonzero().flatten().tolist()

    def skipped_line(self, batches: Tensor, epoch: int) -> str:
        """Which steps of the epoch were skipped, and on which samples; empty where none were."""
        steps = self.skipped()
        if not steps:
            return ""
        samples = batches[steps[0]].tolist()
        shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
        counted = "1 step was" if len(steps) == 1 else f"{len(steps)} steps were"
        what = f"{counted} skipped for a loss or gradient that is not finite"
        return f"epoch {epoch + 1}: {what}, the first is step {steps[0] + 1}, samples {shown}"

    def figures(self) -> dict[str, float]:
        """Of the epoch: mean gradient norm of the loss as it was weighted, and skipped steps if any."""
        assert self.norms is not None
        figures: dict[str, float] = {
            "gradient_norm": float(self.norms[self.norms.isfinite()].mean().nan_to_num())
        }
        count = len(self.skipped())
        return figures | ({"skipped_steps": count} if count else {})
