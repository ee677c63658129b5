"""Self-supervised pretraining that spends its steps on the samples worth training on (EMP, arXiv 2408.16031).

Images live as one uint8 tensor on the device or in a mapped file (`data`). Each epoch picks the samples it
trains on from their scores, the plan and the seed (`prune`); each step cuts two views of a batch (`augment`),
trains SimCLR (`model`, `loss`, `optim`) and takes every sample's score from the same forward pass.
`commands/pretrain.py` is that story from top to bottom. It leaves an encoder: `load_encoder("runs/demo")`.
From Python: `pretrain(images)`, `resume(run)`, `evaluate(run)`, see docs/python.md.

Names are imported when they are first used, so that `ssl_emp.prune` costs torch and numpy only.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ssl_emp._version import __version__

if TYPE_CHECKING:
    from ssl_emp.classifier import load_classifier
    from ssl_emp.commands.from_python import EvalTable, RunFolder, evaluate, pretrain, resume
    from ssl_emp.errors import RunFailed, UserError
    from ssl_emp.model import load_encoder

_MODULES = {
    "load_classifier": "ssl_emp.classifier",
    "load_encoder": "ssl_emp.model",
    **dict.fromkeys(("RunFailed", "UserError"), "ssl_emp.errors"),
    **dict.fromkeys(
        ("EvalTable", "RunFolder", "evaluate", "pretrain", "resume"), "ssl_emp.commands.from_python"
    ),
}

__all__ = [
    "EvalTable",
    "RunFailed",
    "RunFolder",
    "UserError",
    "__version__",
    "evaluate",
    "load_classifier",
    "load_encoder",
    "pretrain",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
