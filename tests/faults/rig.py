"""A tiny real run that can be broken on purpose: start it, hurt it, compare what it left bit for bit.

64 images, batch 8, a network of width 8, 4 epochs, 26 steps, CPU. Every run is a process of its own, forked
by a server that has imported torch (`inject.py --serve`): a SIGKILL is a real one, and a run takes a second.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import striped_images, write_parquet
from torch import Tensor

from ssl_emp.run.checkpoint import load_checkpoint

ROOT = Path(os.environ.get("FAULTS_ROOT", Path(__file__).parents[2]))
INJECT = Path(__file__).with_name("inject.py")
CONFIG = """data: {{source: '{source}'}}
model: {{width: 8, stem: imagenet, projection_dim: 16}}
epochs: 4
batch_size: 8
optimizer: {{lr: 0.05, warmup_epochs: 1}}
augment: {{crop_scale: [0.5, 1.0]}}
prune: {{fraction: 0.4, anneal_fraction: 0.25}}
device: cpu
monitor: {{tensorboard: false, knn_every: 2, reliability_every: 1, reliability_images: 16}}
"""
STEPS = (8, 5, 5, 8)  # of the epochs: the first and the last are full
TOTAL = sum(STEPS)
CLOCK = ("seconds", "per_second")  # parts of the names of what may differ between equal runs
NOT_COMPARED = ("/config", "/seconds", "/written_by", "/versions", "/world_size")


def some(quick: list[Any], cases: list[Any]) -> list[Any]:
    """Parameters of a test; `make test` runs the quick ones only, `make faults` the others."""
    parts = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        case if case in quick else pytest.param(*part, marks=pytest.mark.faults)
        for case, part in zip(cases, parts, strict=True)
    ]


@functools.cache
def scratch() -> Path:
    """A folder of this process that goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def config() -> Path:
    """The config of the tiny run; its data lie beside it."""
    write_parquet(scratch() / "data" / "train.parquet", *striped_images(64))
    path = scratch() / "tiny.yaml"
    path.write_text(CONFIG.format(source=scratch() / "data"))
    return path


class Server:
    """Forks a process for every request; one a test process, started when it is first needed."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(INJECT), "--serve"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.count = 0
        self.told: dict[int, dict[str, int]] = {}
        atexit.register(self.stop)
        assert "ready" in self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server died"
        values: dict[str, Any] = json.loads(line)
        self.told.setdefault(values.pop("id", -1), {}).update(values)
        return values

    def wait_for(self, number: int, what: str) -> int:
        while what not in self.told.get(number, {}):
            self.read()
        return self.told[number][what]

    def start(self, request: dict[str, Any]) -> int:
        self.count += 1
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps({"id": self.count} | request) + "\n").encode())
        self.process.stdin.flush()
        self.wait_for(self.count, "pid")
        return self.count

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=10)


@functools.cache
def server() -> Server:
    return Server()


@dataclass
class Result:
    """What a process left. rc: exit code, minus the signal where one ended it; seconds: from the fault, else
    the start, to its end.
    """

    rc: int
    stdout: str
    stderr: str
    seconds: float
    tree: str = ""
    hung: bool = False


@dataclass
class Started:
    """A process that runs. `end()` waits for it."""

    number: int
    pid: int
    folder: Path
    out: Path | None
    began: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        """Send a signal; the seconds until the end count from here."""
        self.began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.pid, number)

    def running(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    def end(self, timeout: float = 60) -> Result:
        """Wait for the end; after `timeout` seconds it is killed and counts as hung."""
        deadline, hung = time.monotonic() + timeout, False
        while self.running():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                hung = True
                break
            time.sleep(0.002)
        at = self.folder / "at"
        seconds = time.monotonic() - (float(at.read_text()) if at.exists() else self.began)
        rc = server().wait_for(self.number, "rc")
        stdout, stderr = ((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Result(rc, stdout, stderr, seconds, tree_hash(self.out) if self.out else "", hung)


def start(
    args: list[str],
    fault: str = "",
    *,
    record: Path | None = None,
    note: Path | None = None,
    cwd: Path | None = None,
    limits: dict[str, int] | None = None,
    user: int = 0,
    env: dict[str, str] | None = None,
) -> Started:
    """Start pretrain.py with `args` and a fault, see inject.py. `limits`: of the module resource; `user`: a
    number to become.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    environment = (
        {"FAULT": fault}
        | ({} if record is None else {"RECORD": str(record)})
        | ({} if note is None else {"FAULT_NOTE": str(note)})
    )
    request: dict[str, Any] = {
        "argv": [str(part) for part in args],
        "env": environment | (env or {}),
        "stdout": str(folder / "stdout"),
        "stderr": str(folder / "stderr"),
        "cwd": str(cwd or folder),
        "limits": limits or {},
        "user": user,
    }
    number = server().start(request)
    return Started(number, server().told[number]["pid"], folder, out_of(request["argv"]))


def run(args: list[str], fault: str = "", timeout: float = 60, **options: Any) -> Result:
    """`start` and wait."""
    return start(args, fault, **options).end(timeout)


def out_of(argv: list[str]) -> Path | None:
    if "--resume" in argv:
        return Path(argv[argv.index("--resume") + 1])
    return next((Path(part.removeprefix("out=")) for part in argv if part.startswith("out=")), None)


def fresh(out: Path, *overrides: str) -> list[str]:
    """The arguments of a new tiny run in `out`."""
    return ["--config", str(config()), f"out={out}", *overrides]


def go_on(out: Path, *overrides: str) -> list[str]:
    """What a person types after a crash: the same command while the run has not begun, then --resume."""
    return ["--resume", str(out), *overrides] if (out / "config.yaml").is_file() else fresh(out, *overrides)


def tree_hash(folder: Path) -> str:
    """Of every name and every byte below a folder; empty where it is not there."""
    if not os.path.isdir(folder):
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def open_to_all(folder: Path) -> None:
    """Let another user pass through pytest's folders, and read the data."""
    for place in (folder, *folder.parents, scratch()):
        if "pytest-" in place.name or place in (folder, scratch()):
            place.chmod(place.stat().st_mode | 0o055)


# ----------------------------------------------------------------------------------------------------
# comparison


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint by its path."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {
            path: leaf for key, branch in items for path, leaf in leaves(branch, f"{prefix}/{key}").items()
        }
    return {prefix: tree}


def final_hash(out: Path) -> str:
    """SHA-256 over all that the last checkpoint holds, the exported encoder, the table of samples and the
    metrics.
    """
    state, warnings = load_checkpoint(out / "checkpoints")
    assert state is not None and not warnings, warnings
    assert state["finished"]
    digest = hashlib.sha256()
    for path, leaf in leaves(state).items():
        if not path.startswith(NOT_COMPARED):
            digest.update(path.encode())
            digest.update(
                leaf.contiguous().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode()
            )
    digest.update((out / "encoder" / "model.safetensors").read_bytes())
    digest.update(repr(pq.read_table(out / "pruning" / "samples.parquet").to_pydict()).encode())
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        digest.update(
            repr(
                {key: value for key, value in row.items() if not any(part in key for part in CLOCK)}
            ).encode()
        )
    return digest.hexdigest()


def steps_of(record: Path) -> list[tuple[int, str, tuple[int, ...]]]:
    """(step, loss in hex, sorted indices) of every optimizer step, in order."""
    return [
        (step, loss, tuple(index)) for step, loss, index in map(json.loads, record.read_text().splitlines())
    ]


@functools.cache
def reference(*overrides: str) -> tuple[str, dict[int, tuple[str, tuple[int, ...]]]]:
    """(hash, steps) of the uninterrupted run."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    result = run(fresh(folder / "run", *overrides), record=folder / "record")
    assert result.rc == 0, result.stderr
    steps = {step: (loss, index) for step, loss, index in steps_of(folder / "record")}
    assert list(steps) == list(range(1, len(steps) + 1))
    return final_hash(folder / "run"), steps


def assert_same(out: Path, record: Path, *overrides: str) -> int:
    """The run in `out` is bit for bit the uninterrupted one: every step that ever happened, and all it left.
    -> steps done twice.
    """
    expected, steps = reference(*overrides)
    done = steps_of(record)
    for step, loss, index in done:
        assert steps[step] == (loss, index), f"step {step} differs"
    assert {step for step, *_ in done} == set(steps)
    assert final_hash(out) == expected, "what the run left differs"
    strays = [path for path in out.rglob("*") if path.suffix == ".tmp" or path.name == ".lock"]
    assert not strays, strays
    return len(done) - len(steps)


def assert_one_line(result: Result, rc: int, *said: str) -> None:
    """One line on standard error, `error: … fix: …`, and the exit code."""
    assert not result.hung, "hung"
    lines = result.stderr.splitlines()
    assert result.rc == rc, (result.rc, result.stderr[-2000:])
    assert len(lines) == 1 and lines[0].startswith("error: ") and "fix: " in lines[0], result.stderr[-2000:]
    for part in said:
        assert part in lines[0], lines[0]


def newest_step(out: Path) -> int:
    """Step of the newest checkpoint by its name; 0 without one."""
    return max((int(path.stem[5:]) for path in out.glob("checkpoints/step_*.pt")), default=0)
