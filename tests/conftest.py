"""A tiny real run's ingredients: 64 images with structure, a narrow network, four epochs."""

import io
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    # a shell's background job, or nohup: the tests and their children would inherit it
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)  # no clock and no luck decides
hypothesis.settings.load_profile("suite")
# small tensors: a second thread costs more than it brings, and bit-exact comparisons need one number
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every row of the fault matrix starts processes of its own: `make test-whole`, and the long ones `make
    faults`.
    """
    for item in items:
        if item.path.parent.name == "faults":
            item.add_marker(pytest.mark.whole)


@pytest.fixture(autouse=True)
def same_world() -> Iterator[None]:
    """Every test begins with the same random numbers, and leaves the process as it found it: their order does
    not matter.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

    def world() -> dict[str, object]:
        # what importing scikit-learn, torch._inductor and lightly sets is theirs; evaluate.py sets what
        # guards the loading of weights
        theirs = (
            "PYTEST_",
            "KMP_",
            "TORCHINDUCTOR_",
            "_TORCHINDUCTOR_",
            "PYTORCH_NVML_",
            "TRITON_",
            "CUBLAS_WORKSPACE_CONFIG",
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        modes = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        )
        return {
            "directory": os.getcwd(),
            "environment": environment,
            "threads": torch.get_num_threads(),
            "modes": modes,
        }

    before = world()
    yield
    assert world() == before


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> an encoded image."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list[int] | None) -> Path:
    """A file in the Hugging Face layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": pa.array([{"bytes": data, "path": None} for data in images])}
    pq.write_table(
        pa.table(columns | ({} if labels is None else {"label": pa.array(labels, pa.int64())})), path
    )
    return path


def striped_images(count: int, size: int = 16, seed: int = 0) -> tuple[list[bytes], list[int]]:
    """Images of four classes (direction and colour of stripes) with noise, so that there is something to
    learn.
    """
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:size, :size]
    images, labels = [], []
    for i in range(count):
        label = i % 4
        wave = np.sin((rows if label % 2 else cols) * (0.6 + 0.3 * rng.random()) + 6 * rng.random())
        tint = np.array([1.0, 0.5, 0.2] if label < 2 else [0.2, 0.5, 1.0])
        pixels = 128 + 80 * wave[..., None] * tint + rng.normal(0, 20, (size, size, 3))
        images.append(png(pixels.clip(0, 255).astype(np.uint8)))
        labels.append(label)
    return images, labels


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet (68 images: 8 batches of 8 and a remainder) and test.parquet (40)."""
    folder = tmp_path_factory.mktemp("tiny")
    write_parquet(folder / "train.parquet", *striped_images(68))
    write_parquet(folder / "test.parquet", *striped_images(40, seed=1))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(
        f"data: {{source: '{tiny_data}'}}\nmodel: {{width: 8, stem: imagenet, projection_dim: 16}}\n"
        "epochs: 5\nbatch_size: 8\n"
        "optimizer: {lr: 0.05, warmup_epochs: 1}\naugment: {crop_scale: [0.5, 1.0]}\n"
        "prune: {fraction: 0.4, anneal_fraction: 0.2}\ndevice: cpu\n"
        "monitor: {tensorboard: false, knn_every: 2, reliability_every: 1, reliability_images: 16}\n"
    )
    return path


Pretrain = Callable[..., Path]


@pytest.fixture
def pretrain_run(tiny_config: Path, tmp_path: Path) -> Pretrain:
    """Run pretrain.py's main on the tiny config with overrides, expect success, give the run directory."""
    from ssl_emp.commands.pretrain import main

    def run(name: str, *overrides: str) -> Path:
        out = tmp_path / name
        assert main(["--config", str(tiny_config), f"out={out}", *overrides]) == 0
        return out

    return run
