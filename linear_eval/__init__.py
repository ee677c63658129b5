"""Judging encoders by labelled images.

Data flow: encoder + uint8 images -> `extract_features` -> `Features` (cached on the CPU) -> `knn_accuracy` or
`linear_probe` -> a number in 0..1. Only `linear_eval.finetune` trains an encoder, and that a copy: the
encoder that is given never changes. Mistakes in the input raise `EvalError`.
"""

from linear_eval.features import EvalError, Features, extract_features
from linear_eval.knn import knn_accuracies, knn_accuracy, knn_predict, knn_predictions
from linear_eval.linear import LinearResult, MultiLabelResult, linear_probe, multi_label_probe, sgd_probe

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
