"""Whole tiny runs are, to the bit, what they were: SHA-256 of what each writes and of the batches it reads.

Of every case four values are held in tests/pins.json:

    encoder  names, shapes and values in encoder/model.safetensors
    samples  names and values of the columns of pruning/samples.parquet
    metrics  metrics.jsonl without what a clock measured
    batches  the indices of every batch, in order: the kept list of each epoch, shuffled, and scoring passes

They hold where the arithmetic is the same, so they are kept by torch's version and by what its kernels give
on this processor (`machine`). On a machine that has none the tests are skipped. It gets them by

    PYTHONPATH=. python tests/test_pins.py

on a revision that is known to be right. To compare two revisions on such a machine, run this command on the
earlier one, copy its tests/pins.json into the later one and run `python -m pytest -m "" tests/test_pins.py`.

A commit that changes values on purpose writes them anew with the same command. Those of other machines are
then dropped, since they are of the code before. With ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 before
it, or with =default and =SSE41, the command adds what simpler processors give.
"""

import functools
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import striped_images, write_parquet
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import pretrain
from ssl_emp.data.stores import DeviceImages

ROOT = Path(__file__).parent.parent
PINS = Path(__file__).with_name("pins.json")
CLOCK = ("seconds", "per_second")  # parts of the names of what may differ between equal runs
CONFIG = """
data: {{source: '{source}'}}
model: {{width: 8, stem: imagenet, projection_dim: 16}}
device: cpu
precision: fp32
epochs: 5
batch_size: 8
optimizer: {{lr: 0.05, warmup_epochs: 1}}
augment: {{crop_scale: [0.5, 1.0]}}
monitor: {{tensorboard: false, knn_every: 2, reliability_every: 2, reliability_images: 16}}
"""
INDICES = range(60, 4, -1)  # a fixed subset, most wanted first
PRUNED = ["prune.fraction=0.4", "prune.anneal_fraction=0.2"]  # epochs 2, 3 and 4 of 5

SCORED = ("emp", "foresight", "loss", "distance", "epsilon_greedy", "ucb", "infobatch", "scan")
VARIANTS = {
    "standardized": ["prune.memory=standardized"],
    "normalized": ["prune.memory=normalized"],
    "loss_weight": ["prune.loss_weight=-1", "prune.beta=0.05"],
    "beta": ["prune.beta=0.1"],
    "ema": ["prune.ema=0.3"],
    "adjust": ["prune.adjust=true"],
    "foresee": ["prune.foresee=true"],
    "shrink": ["prune.foresee=true", "prune.shrink=true", "prune.ema=0.3"],
    "explore": ["prune.explore=0.2"],
    "soften": ["prune.soften=0.5"],
    "rescale": ["prune.rescale=true"],
    "warmup": ["prune.warmup_epochs=2"],
    "scoring_draws": ["prune.scoring=all", "prune.scoring_draws=2"],
    "scoring_size": ["prune.scoring=pruned", "prune.scoring_size=8"],
    "lars": ["optimizer.name=lars"],
    "adamw": ["optimizer.name=adamw", "optimizer.lr=0.001"],
    "onecycle": ["optimizer.schedule=onecycle"],
    "crop_padding": ["augment.crop_padding=2"],
    "seed": ["seed=1"],
}
SUPERVISED = ["objective=supervised"]
NOISY = ["data.label_noise=0.2", "label_smoothing=0.1", "prune.memory=standardized"]
# a name -> what is changed of CONFIG
CASES: dict[str, list[str]] = {
    f"{policy}-{scoring}": [*PRUNED, f"prune.policy={policy}", f"prune.scoring={scoring}"]
    for policy in SCORED
    for scoring in ("stale", "pruned", "all")
}
CASES |= {
    "random": [*PRUNED, "prune.policy=random"],
    "random-redraw": [*PRUNED, "prune.policy=random", "prune.redraw_every=2"],
    "random-rescale": [*PRUNED, "prune.policy=random", "prune.rescale=true"],
    "shorter": [*PRUNED, "prune.policy=shorter"],
    "none": ["prune.policy=none"],
    "indices": [*PRUNED, "prune.policy=indices", "prune.indices={indices}"],
}
CASES |= {f"emp-{name}": [*PRUNED, "prune.policy=emp", *changes] for name, changes in VARIANTS.items()}
CASES |= {
    "supervised-emp": [*SUPERVISED, *PRUNED, "prune.policy=emp"],
    "supervised-loss": [*SUPERVISED, *PRUNED, "prune.policy=loss"],
    "supervised-infobatch": [*SUPERVISED, *PRUNED, "prune.policy=infobatch"],
    "supervised-ucb": [*SUPERVISED, *PRUNED, "prune.policy=ucb"],
    "supervised-none": [*SUPERVISED, "prune.policy=none"],
    "supervised-emp-noisy": [*SUPERVISED, *PRUNED, *NOISY, "prune.policy=emp"],
    "supervised-emp-all": [*SUPERVISED, *PRUNED, "prune.policy=emp", "prune.scoring=all"],
}
# of these cases, the last batch before a stop, scoring included: in the second pruned epoch, steps 14 to 18
STOPPED = {
    "emp-stale": 19,
    "emp-pruned": 25,
    "foresight-stale": 19,
    "infobatch-stale": 15,
    "supervised-emp": 19,
}
TWO_RANKS = ("emp-stale", "emp-pruned", "emp-shrink", "supervised-infobatch")


@functools.cache
def machine() -> str:
    """What decides about the last bits: torch's version, its kernels, and what these give on this processor.

    The last part is a digest of three steps of a small network and of the images that the runs train
    on. The processor's name would not do: environment variables choose among the kernels too.
    """
    digest = hashlib.sha256()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in striped_images(68)[0]])
    digest.update(pixels.tobytes())
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(0)
    widths = ((8, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2))
    shapes = [(8, 3, 7, 7), (64, 64), (16, 64)]
    shapes += [shape for i, o, _ in widths for shape in ((o, i, 3, 3), (o, o, 3, 3), (o, i, 1, 1))]
    weights = [nn.Parameter(torch.randn(shape, generator=generator) * 0.2) for shape in shapes]

    def normed(hidden: Tensor) -> Tensor:
        return F.batch_norm(hidden, None, None, training=True)

    def features(images: Tensor) -> Tensor:
        hidden = F.max_pool2d(normed(F.conv2d(images, weights[0], stride=2, padding=3)).relu(), 3, 2, 1)
        for number, (_, _, stride) in enumerate(widths):
            first, second, skip = weights[3 * number + 3 : 3 * number + 6]
            inner = normed(F.conv2d(hidden, first, stride=stride, padding=1)).relu()
            inner = normed(F.conv2d(inner, second, padding=1))
            hidden = (inner + normed(F.conv2d(hidden, skip, stride=stride))).relu()
        return hidden.mean((2, 3))

    for step in range(3):
        views = F.interpolate(images[step * 16 : step * 16 + 16], size=16, mode="bilinear").pow(1.1).sin()
        z = F.normalize((features(views) @ weights[1]).relu() @ weights[2].t())
        loss = (z @ z.t()).div(0.5).logsumexp(1).mean()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data.sub_(gradient, alpha=0.1)
    digest.update(features(images).detach().numpy().tobytes())
    for weight in weights:
        digest.update(weight.detach().numpy().tobytes())
    version = ".".join(torch.__version__.split(".")[:2])
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {version}, {platform.machine()}, {capability}, {digest.hexdigest()[:8]}"


def written(run: Path) -> dict[str, str]:
    """SHA-256 of what a run's directory holds in the end."""
    encoder, samples, metrics = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(load_file(run / "encoder" / "model.safetensors").items()):
        encoder.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.numpy().tobytes())
    table = pq.read_table(run / "pruning" / "samples.parquet")
    for name in table.column_names:
        column = table[name]
        samples.update(f"{name} {column.type}\n".encode())
        if str(column.type) == "string":
            samples.update("\n".join(column.to_pylist()).encode())
        else:
            samples.update(column.to_numpy().tobytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in [name for name in row if any(part in name for part in CLOCK)]:
            del row[name]
        metrics.update(f"{json.dumps(row, sort_keys=True)}\n".encode())
    return {"encoder": encoder.hexdigest(), "samples": samples.hexdigest(), "metrics": metrics.hexdigest()}


@contextmanager
def noted_batches(stop_in: int = 0) -> Iterator[list[Tensor]]:
    """The index (B,) of every batch read in the block; a SIGTERM comes in batch `stop_in`, from 1."""
    original, read = DeviceImages.stream, []

    def stream(self: DeviceImages, index_batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for index, pixels in original(self, index_batches):
            read.append(index.clone())
            if len(read) == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            yield index, pixels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceImages, "stream", stream)
        yield read
    assert read, "nothing was read through this class"


def digest_of(batches: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for index in batches:
        digest.update(f"{tuple(index.shape)} {index.dtype}\n".encode() + index.numpy().tobytes())
    return digest.hexdigest()


def arguments(folder: Path, case: str, out: Path) -> list[str]:
    """The command line of a case, whose data and config are written into a folder, once."""
    config, indices = folder / "config.yaml", folder / "indices.txt"
    if not config.exists():
        write_parquet(folder / "data" / "train.parquet", *striped_images(68))  # 8 batches of 8 and 4 more
        write_parquet(folder / "data" / "test.parquet", *striped_images(40, seed=1))
        indices.write_text("".join(f"{index}\n" for index in INDICES))
        config.write_text(CONFIG.format(source=folder / "data"))
    return [
        "--config",
        str(config),
        f"out={out}",
        *(change.format(indices=indices) for change in CASES[case]),
    ]


def uninterrupted(folder: Path, case: str, out: Path) -> dict[str, str]:
    with noted_batches() as batches:
        assert pretrain.main(arguments(folder, case, out)) == 0
    return {**written(out), "batches": digest_of(batches)}


def on_two_ranks(folder: Path, case: str, out: Path) -> dict[str, str]:
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments(folder, case, out), "devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return written(out)


def pinned(case: str) -> dict[str, str]:
    """The pins of a case on this machine; skips the test where there are none."""
    pins = json.loads(PINS.read_text()).get(machine(), {})
    if case not in pins:
        how = "`PYTHONPATH=. python tests/test_pins.py` on a revision that is right writes them"
        pytest.skip(f"no pins of {case} on {machine()}: {how}")
    return dict(pins[case])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pins")


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_what_it_was(case: str, folder: Path, tmp_path: Path) -> None:
    wanted = pinned(case)
    assert uninterrupted(folder, case, tmp_path / "run") == wanted


@pytest.mark.parametrize("case", STOPPED)
def test_a_run_resumed_in_a_pruned_epoch_is_what_it_was(case: str, folder: Path, tmp_path: Path) -> None:
    wanted, out = pinned(case), tmp_path / "run"
    with noted_batches(stop_in=STOPPED[case]) as batches:
        assert pretrain.main(arguments(folder, case, out)) == 128 + signal.SIGTERM
        assert 13 < max(int(path.stem[5:]) for path in out.glob("checkpoints/step_*.pt")) < 18
        assert pretrain.main(["--resume", str(out)]) == 0
    assert {**written(out), "batches": digest_of(batches)} == wanted


@pytest.mark.whole
@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_are_what_they_were(case: str, folder: Path, tmp_path: Path) -> None:
    wanted = pinned(f"2 ranks {case}")
    assert on_two_ranks(folder, case, tmp_path / "run") == wanted


def test_pins_differ_where_settings_do() -> None:
    """No two cases are one: a case that sets nothing apart would pin nothing."""
    for pins in json.loads(PINS.read_text()).values():
        cases: dict[str, list[str]] = {}
        for case, values in pins.items():
            cases.setdefault(values["samples"] + values["encoder"], []).append(case)
        assert not [alike for alike in cases.values() if len(alike) > 1]


def write_pins() -> None:
    """Take the pins of this machine; drop those of others where one has changed here."""
    assert Path(pretrain.__file__).parent == ROOT, f"{pretrain.__file__} is of another tree: set PYTHONPATH=."
    everything: dict[str, dict[str, dict[str, str]]] = json.loads(PINS.read_text()) if PINS.exists() else {}
    before, now = everything.get(machine(), {}), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in CASES:
            now[case] = uninterrupted(folder, case, folder / f"run {case}")
        for case in TWO_RANKS:
            now[f"2 ranks {case}"] = on_two_ranks(folder, case, folder / f"run 2 ranks {case}")
    changed = {case for case in before if case in now and before[case] != now[case]}
    others = {} if changed else everything
    PINS.write_text(json.dumps(others | {machine(): now}, indent=1, sort_keys=True) + "\n")
    print(f"\n{len(now)} pins of {machine()}: {len(changed)} changed, {len(now.keys() - before.keys())} new")
    if changed:
        print(f"changed: {', '.join(sorted(changed))}; pins of other machines dropped: {len(everything) - 1}")


if __name__ == "__main__":
    write_pins()
