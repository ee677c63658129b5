"""The real pretrain.py with faults put into it from outside: nothing in the product knows of this file.

    FAULT="after_step:3:kill" RECORD=steps.jsonl python tests/faults/inject.py --config c.yaml out=runs/x
    python tests/faults/inject.py --serve       # imports torch once and forks a process for every request on
    standard input

FAULT is `point:count:kind`, several joined by `;`: at the count-th visit of the point (0: at every one), the
kind happens.

points: forward, backward, step, observe, choose, save with `before_` or `after_`; and what the process
    does to files below the run directory: io (before any of the following), open, write (between its two
    halves), fsync, replace, unlink, mkdir, and the same with `_checkpoint`, `_log` or `_events` for
    checkpoints, train.log, TensorBoard; data (a batch of images is there), gather (the decoding thread
    fetches one).
kinds: kill (SIGKILL to itself), term, int, hup, usr1 (real signals to itself), twice (SIGTERM two times),
enospc, eio, eacces
    (OSError), nan, inf (the loss, at forward points), raise (RuntimeError), oom (torch's message), sleep (for
    an hour), clear (remove the run directory), fill (a file beside the run directory takes the rest of the
    disk).

RECORD gets a line per optimizer step: its number, the loss in hex, the sorted indices of its batch.
FAULT_NOTE gets a line for every visit of an I/O point, so that a run without faults tells how many there are.
FAULT_AT gets the time of the last fault. CORES is the number of cores that the decoding threads believe in.
"""

import builtins
import errno
import functools
import importlib
import io
import json
import math
import os
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ.get("FAULTS_ROOT", str(Path(__file__).resolve().parents[2])))

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402

import ssl_emp.data.stores  # noqa: E402
from ssl_emp.commands import (
    pretrain,  # noqa: E402
    resume,  # noqa: E402
)
from ssl_emp.data import decode  # noqa: E402
from ssl_emp.prune import Pruner  # noqa: E402
from ssl_emp.run import run as run_module  # noqa: E402

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
    "usr1": signal.SIGUSR1,
}
FILES = ("io", "open", "write", "fsync", "replace", "unlink", "mkdir")
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "eacces": errno.EACCES, "erofs": errno.EROFS}


class Faults:
    """What shall happen where, and how often each point was visited."""

    def __init__(self, text: str, out: str | None, note: str | None) -> None:
        self.plan = [
            (point, int(count), kind)
            for point, count, kind in (part.split(":") for part in text.split(";") if part)
        ]
        self.seen: Counter[str] = Counter()
        self.out = None if out is None else os.path.abspath(out)
        self.note = None if note is None else os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.busy = False
        self.writes: Counter[str] = Counter()

    def visit(self, point: str, what: str = "") -> str | None:
        """Count a visit and do what is planned. Returns the kinds left to the caller: nan, inf."""
        self.seen[point] += 1
        for where, count, kind in self.plan:
            if where == point and count in (0, self.seen[point]):
                if kind in ("nan", "inf"):
                    return kind
                self.happen(kind, point)
        return None

    def happen(self, kind: str, point: str) -> None:
        if "FAULT_AT" in os.environ:
            descriptor = os.open(os.environ["FAULT_AT"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, repr(time.monotonic()).encode())
            os.close(descriptor)
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind == "twice":  # SIGTERM, and again before anything could be done about it
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind in ERRORS:
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        elif kind == "raise":
            raise RuntimeError(f"injected at {point}")
        elif kind == "oom":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate"
            )
        elif kind == "sleep":
            time.sleep(3600)
        elif kind == "clear" and self.out is not None:
            shutil.rmtree(self.out)
        elif kind == "fill" and self.out is not None:
            with open(os.path.join(os.path.dirname(self.out), "ballast"), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.out).free)
        else:
            raise ValueError(f"unknown kind {kind}")

    def io(self, name: str, path: Any) -> None:
        """A visit of an I/O point, for paths below the run directory only."""
        if self.busy or not self.inside(path):
            return
        # torch.save writes hundreds of pieces: the 1st, 2nd, 4th, 8th, ... of a file will do
        if name == "write":
            self.writes[os.fspath(path)] += 1
            number = self.writes[os.fspath(path)]
            if number & (number - 1):
                return
        elif name == "open":
            self.writes[os.fspath(path)] = 0
        self.busy = True
        try:
            if self.note is not None:
                os.write(self.note, f"{name} {os.path.relpath(os.fspath(path), self.out)}\n".encode())
            self.visit("io")
            self.visit(name)
            for part, group in ((".step_", "checkpoint"), ("train.log", "log"), ("tfevents", "events")):
                if part in os.fspath(path):
                    self.visit(f"{name}_{group}")
        finally:
            self.busy = False

    def inside(self, path: Any) -> bool:
        if self.out is None or not isinstance(path, str | os.PathLike):
            return False
        return (os.path.abspath(os.fspath(path)) + os.sep).startswith(self.out + os.sep)


class HalfWay:
    """A file opened for writing: each write goes to the disk in two halves, with a point between them."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:
        self.file, self.path, self.faults = file, path, faults

    def write(self, data: Any) -> int:
        half = len(data) // 2
        if half:
            self.file.write(data[:half])
            self.file.flush()
        self.faults.io("write", self.path)
        rest = self.file.write(data[half:])
        return half + rest

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> "HalfWay":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def around(
    function: Callable[..., Any], before: Callable[..., Any], after: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        value = function(*args, **kwargs)
        after(value)
        return value

    return wrapped


def replace_everywhere(function: Any, other: Any) -> None:
    """In every module that has it under any name: `from x import f` binds f there."""
    for module in [
        module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ("ssl_emp", "linear_eval", "pretrain")
    ]:
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, other)


def patch_files(faults: Faults) -> None:
    """Count open, write, fsync, replace, unlink and mkdir below the run directory."""
    real_open, real_fsync = builtins.open, os.fsync

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if not writes or not faults.inside(file):
            return real_open(file, mode, *args, **kwargs)
        faults.io("open", file)
        return HalfWay(real_open(file, mode, *args, **kwargs), file, faults)

    def fsync(descriptor: int) -> None:
        faults.io("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def at(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *args: Any, **kwargs: Any) -> Any:
            faults.io(name, path)
            return real(path, *args, **kwargs)

        return called

    builtins.open = opened
    io.open = opened
    os.fsync = fsync  # type: ignore[assignment]
    for name in ("replace", "unlink", "mkdir"):
        setattr(os, name, at(name, getattr(os, name)))


class Recorder:
    """The number of the step, its loss and its samples: one line for every optimizer step that happened."""

    def __init__(self, path: str | None) -> None:
        self.descriptor = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.step, self.loss, self.index = 0, "", [0]

    def note(self) -> None:
        self.step += 1
        if self.descriptor is not None:
            os.write(self.descriptor, (json.dumps([self.step, self.loss, self.index]) + "\n").encode())


def patch_training(faults: Faults, recorder: Recorder) -> None:
    """Points in the step, and what the recorder notes of it."""
    nt_xent = pretrain_function("nt_xent", "ssl_emp.loss")

    def loss_of(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # a scoring pass, no step of training
            return nt_xent(*args, **kwargs)
        kind = faults.visit("before_forward")
        loss = nt_xent(*args, **kwargs)
        recorder.loss = float(loss.detach().double().mean()).hex()
        kind = faults.visit("after_forward") or kind
        return loss if kind is None else loss * (math.nan if kind == "nan" else math.inf)

    replace_everywhere(nt_xent, loss_of)

    backward = torch.Tensor.backward
    torch.Tensor.backward = around(  # type: ignore[method-assign]
        backward, lambda *_: faults.visit("before_backward"), lambda _: faults.visit("after_backward")
    )

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        faults.visit("before_step")

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        recorder.note()
        faults.visit("after_step")

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)

    for store in (ssl_emp.data.stores.DeviceImages, ssl_emp.data.stores.HostImages):
        stream: Any = store.stream

        def streamed(
            self: Any, batches: Any, *args: Any, stream: Any = stream, **kwargs: Any
        ) -> Iterator[Any]:
            for index, images in stream(self, batches, *args, **kwargs):
                recorder.index = sorted(index.tolist())
                faults.visit("data")
                yield index, images

        store.stream = streamed  # type: ignore[assignment,method-assign]

    visits = {
        "observe": (Pruner, "observe"),
        "choose": (Pruner, "batches"),
        "save": (run_module, "save_checkpoint"),
    }
    for point, (owner, name) in visits.items():
        before = functools.partial(visit, faults, f"before_{point}")
        setattr(
            owner,
            name,
            around(getattr(owner, name), before, functools.partial(visit, faults, f"after_{point}")),
        )

    gather = ssl_emp.data.stores.EncodedPixels.gather

    def gathered(*args: Any) -> Any:
        faults.visit("gather")
        return gather(*args)

    ssl_emp.data.stores.EncodedPixels.gather = gathered  # type: ignore[assignment,method-assign]
    if "CORES" in os.environ:
        replace_everywhere(decode.cores, lambda: int(os.environ["CORES"]))

    def from_step(value: Any) -> None:
        recorder.step = value[0]["step"] if value[0] else 0

    replace_everywhere(resume.load_checkpoint, around(resume.load_checkpoint, lambda *_: None, from_step))


def visit(faults: Faults, point: str, *_: Any) -> None:
    faults.visit(point)


def pretrain_function(name: str, module: str) -> Any:
    return getattr(sys.modules[module], name)


def out_of(argv: list[str]) -> str | None:
    """The run directory of a command line."""
    if "--resume" in argv:
        return argv[argv.index("--resume") + 1]
    return next((part.removeprefix("out=") for part in argv if part.startswith("out=")), None)


def run(argv: list[str]) -> int:
    faults = Faults(os.environ.get("FAULT", ""), out_of(argv), os.environ.get("FAULT_NOTE"))
    patch_training(faults, Recorder(os.environ.get("RECORD")))
    if faults.note is not None or any(point.partition("_")[0] in FILES for point, *_ in faults.plan):
        patch_files(faults)
    return pretrain.main(argv)


# ------------------------------------------------------------------------------------------------------------
# forkserver


def child(request: dict[str, Any]) -> None:
    """The forked process: its own session, files for its output, its own environment; then as if it had been
    started so.
    """
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup make faults
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        if request["limits"]:
            import resource

            for name, value in request["limits"].items():
                resource.setrlimit(getattr(resource, name), (value, value))
        if "RLIMIT_FSIZE" in request["limits"]:
            # as Python does at its start: the write fails instead
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(open(number, "wb", closefd=False), encoding="utf-8") for number in (1, 2)
        )
        if request["user"]:
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        sys.argv = ["pretrain.py", *request["argv"]]
        code = run(request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    os._exit(code)


def serve() -> None:
    """Requests as JSON lines in, {"id", "pid"} and {"id", "rc"} out."""
    for name in (
        "lightly.models.modules",
        "linear_eval.knn",
        "pyarrow.parquet",
        "PIL.Image",
        "encodings.utf_8_sig",
    ):
        # what pretrain.py imports when it needs it: once here, not a second in every process
        importlib.import_module(name)
    # ctrl-C is for pytest, which ends this process by closing its input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, int] = {}
    buffer = b""

    def tell(**values: Any) -> None:
        os.write(1, (json.dumps(values) + "\n").encode())

    tell(ready=True)
    while True:
        if select.select([0], [], [], 0.01 if running else None)[0]:
            data = os.read(0, 65536)
            if not data:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    child(request)
                running[pid] = request["id"]
                tell(id=request["id"], pid=pid)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            tell(id=running.pop(pid), rc=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(run(sys.argv[1:]))
