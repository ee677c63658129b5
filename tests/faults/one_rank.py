"""pretrain.py with something wrong on one rank: `python one_rank.py WHAT RANK ARGUMENTS…`. The product itself
has no such hooks.

nan: the loss of the sixth batch. scores: one score is nudged after the second epoch. file: the images cannot
be read. raise: the tenth batch raises. double: nothing is wrong, but the network computes in float64 on every
rank.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ssl_emp.augment import cut_views  # noqa: E402
from ssl_emp.commands import job as job_module  # noqa: E402
from ssl_emp.commands import pretrain  # noqa: E402
from ssl_emp.commands.job import Job  # noqa: E402
from ssl_emp.data.images import ImageSet  # noqa: E402
from ssl_emp.errors import UserError  # noqa: E402
from ssl_emp.loss import nt_xent  # noqa: E402
from ssl_emp.run.ranks import Ranks  # noqa: E402
from ssl_emp.run.report import Report  # noqa: E402
from ssl_emp.run.run import Run  # noqa: E402

what, where = sys.argv.pop(1), sys.argv.pop(1)
calls = 0


def here() -> bool:
    return os.environ.get("RANK", "0") == where


def sick(z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks) -> Tensor:
    global calls
    calls += 1
    loss = nt_xent(z_a, z_b, temperature, ranks)
    if what == "raise" and calls == 10 and here():
        raise ZeroDivisionError("a bug on one rank")
    return loss * torch.nan if what == "nan" and calls == 6 and here() else loss


def unreadable(*args: Any, **kwargs: Any) -> ImageSet:
    if here():
        raise UserError("images/7.jpg is a text file", "remove it")
    return load_images(*args, **kwargs)


def nudged(self: Ranks, name: str, *tensors: Tensor) -> None:
    global calls
    calls += 1
    if calls == 3 and here():
        tensors[1].view(-1)[5] += 1e-6
    agree_on(self, name, *tensors)


def opened_double(job: Job, *args: Any) -> Run:
    job.model.double()  # before the optimizer, whose momentum has the type of its weights
    return open_run(job, *args)


def double(job: Job, report: Report) -> tuple[Any, Any]:
    return job.model, lambda *args: tuple(view.double() for view in cut_views(*args))


load_images, agree_on, open_run = job_module.load_images, Ranks.agree_on, pretrain.open_run
match what:
    case "nan" | "raise":
        pretrain.nt_xent = sick  # type: ignore[assignment]
    case "file":
        job_module.load_images = unreadable
    case "scores":
        Ranks.agree_on = nudged  # type: ignore[method-assign, assignment]
    case "double":
        pretrain.compiled, pretrain.open_run = double, opened_double  # type: ignore[assignment]
if __name__ == "__main__":
    sys.exit(pretrain.main())
