"""Judging encoders by labelled images.

Data flow: encoder + uint8 images -> `extract_features` -> `Features` (cached on the CPU) -> `knn_accuracy` or
`linear_probe` -> a number in 0..1. Only `linear_eval.finetune` trains an encoder, and that a copy: the
encoder that is given never changes. Mistakes in the input raise `EvalError`.

Names are imported when they are first used, so that `linear_eval.errors` and `names` come without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linear_eval.errors import EvalError
    from linear_eval.features import Features, extract_features
    from linear_eval.knn import knn_accuracies, knn_accuracy, knn_predict, knn_predictions
    from linear_eval.linear import LinearResult, MultiLabelResult, linear_probe, multi_label_probe, sgd_probe

_MODULES = {
    "EvalError": "linear_eval.errors",
    **dict.fromkeys(("Features", "extract_features"), "linear_eval.features"),
    **dict.fromkeys(("knn_accuracies", "knn_accuracy", "knn_predict", "knn_predictions"), "linear_eval.knn"),
    **dict.fromkeys(
        ("LinearResult", "MultiLabelResult", "linear_probe", "multi_label_probe", "sgd_probe"),
        "linear_eval.linear",
    ),
}

__all__ = [
    "EvalError",
    "Features",
    "LinearResult",
    "MultiLabelResult",
    "extract_features",
    "knn_accuracies",
    "knn_accuracy",
    "knn_predict",
    "knn_predictions",
    "linear_probe",
    "multi_label_probe",
    "sgd_probe",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
