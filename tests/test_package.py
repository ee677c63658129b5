"""What `import ssl_emp` costs, and what it gives."""

import subprocess
import sys

import pytest

import ssl_emp
from ssl_emp.classifier import load_classifier
from ssl_emp.model import load_encoder

HEAVY = ("torchvision", "lightly", "pyarrow", "pydantic", "PIL", "yaml")


def test_the_pruner_is_imported_without_images_and_configs() -> None:
    code = f"import sys, ssl_emp, ssl_emp.prune; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_names_of_the_package() -> None:
    assert ssl_emp.load_encoder is load_encoder and ssl_emp.load_classifier is load_classifier
    assert ssl_emp.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        ssl_emp.load_everything  # noqa: B018
