"""The training process's side of a logger: start its process, say that there is news, end it in time."""

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ssl_emp.errors import UserError
from ssl_emp.loggers.secrets import without_secrets
from ssl_emp.loggers.serve import FINISHED, NEWS, STOPPED
from ssl_emp.safe_files import inner_folder, open_own
from ssl_emp.text import quoted, shorten

# name -> packages that it cannot do without
PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy"), "trackio": ("trackio",)}
PATIENCE_SECONDS = 120.0  # for the end of a logger, and
SECONDS_PER_MB = 1.0  # more for the encoder that it may have to send
COMMAND = (
    "import sys; sys.path.insert(0, {root!r}); from ssl_emp.loggers.serve import serve; "
    "sys.exit(serve(sys.argv[1], sys.argv[2], int(sys.argv[3])))"
)


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError where a package is missing, without importing one."""
    for name in names:
        for package in PACKAGES.get(name, ()):
            spec = importlib.util.find_spec(package)
            # without an origin it is a folder that happens to have this name, as wandb leaves them
            if spec is None or spec.origin is None:
                fix = f"pip install {' '.join(PACKAGES[name])}, or leave it out of monitor.loggers"
                raise UserError(f"the logger {name} needs the package {package}, which is not installed", fix)


def how_to_look(name: str, folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Where a logger of the run in `folder` writes, and a command that shows it."""
    place = folder / "loggers" / name
    if name == "wandb":
        mode = environment.get("WANDB_MODE", "offline")
        if mode != "offline":
            return f"as WANDB_MODE={shorten(mode)} says"
        return f"offline, send it: wandb sync {quoted(place)}/offline-run-*"
    if name == "mlflow":
        if environment.get("MLFLOW_TRACKING_URI"):
            return "to the MLFLOW_TRACKING_URI of the environment"
        return f"look: mlflow ui --backend-store-uri {quoted(f'sqlite:///{place.resolve()}/mlflow.db')}"
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DIR"):
        if environment.get(variable):
            return f"to the {variable} of the environment"
    return f"look: TRACKIO_DIR={quoted(place)} trackio show"


def tell_evaluation(folder: Path, warn: Callable[[str], None]) -> None:
    """Give what an evaluation has left in the run directory to the loggers that know the run."""
    feeds = []
    for name in PACKAGES:
        if (folder / "loggers" / f"{name}.json").is_file():
            try:
                check_installed([name])
            except UserError as error:
                warn(f"the logger {name} is not told of the evaluation: {error}")
            else:
                feeds.append(Feed(name, folder, warn))
    close_all(feeds, finished=True)


def close_all(feeds: Sequence["Feed"], finished: bool) -> None:
    """Wait for all of them at once: several that hang cost no more time than one."""
    began = time.monotonic()
    for feed in feeds:
        feed.end(finished)
    for feed in feeds:
        feed.close(finished, began)


class Feed:
    """One logger of the run in `folder`. Nothing of it raises or waits, but for `close`, in bounded time.

    Args:
        warn: is told why the logger ended early, once.
        patience: seconds that it may take to end; None: by the size of the encoder.
    """

    def __init__(
        self, name: str, folder: Path, warn: Callable[[str], None], patience: float | None = None
    ) -> None:
        self.name, self.folder, self.warn, self.patience = name, folder, warn, patience
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "loggers" / f"{name}.log"
        try:
            self._start()
        except (OSError, UserError) as error:
            self._warn(f"could not be started ({error})")

    def _start(self) -> None:
        inner_folder(self.folder, "loggers")
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        command = COMMAND.format(root=str(Path(__file__).parents[2]))
        words = [self.name, str(self.folder.resolve()), str(reader)]
        try:
            with open_own(self.log, "a+b") as log:
                self._said_from = log.seek(0, os.SEEK_END)
                # -P: no package is taken from the working directory. A session of its own has no terminal to
                # ask for a password, and gets no Ctrl-C
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", command, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[reader],
                    start_new_session=True,
                    cwd=self.folder / "loggers",
                )
        except BaseException:
            os.close(self.writer)
            raise
        finally:
            os.close(reader)

    def _limit(self) -> float:
        if self.patience is not None:
            return self.patience
        size = 0
        with suppress(OSError):
            size = (self.folder / "encoder" / "model.safetensors").stat().st_size
        return PATIENCE_SECONDS + SECONDS_PER_MB * size / 1e6

    def news(self) -> None:
        """There is a new row in metrics.jsonl."""
        if self.process is not None:
            self._send(NEWS)
            if self.process.poll() is not None:
                self._end()

    def end(self, finished: bool) -> None:
        """The run has ended: the logger should too."""
        if self.process is not None:
            self._send(FINISHED if finished else STOPPED)

    def close(self, finished: bool, began: float | None = None) -> None:
        """Wait until the logger has everything, or time is up, which counts from `began` (time.monotonic)."""
        if self.process is None:
            return
        limit, began = self._limit(), time.monotonic() if began is None else began
        try:
            # full, should the logger have been slow; to say it twice does no harm
            select.select([], [self.writer], [], limit)
            self.end(finished)
            self.process.wait(max(0.1, limit - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            self._kill()
            self._end(f"did not end within {limit:.0f} seconds")
        except BaseException:  # a signal: whoever waits here has waited enough
            self._kill()
            self._end("was not waited for")
            raise
        else:
            self._end()

    def _send(self, word: bytes) -> None:
        # a full pipe has news enough, a broken one is seen by poll()
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.writer, word)

    def _kill(self) -> None:
        assert self.process is not None
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has started too
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def _end(self, why: str | None = None) -> None:
        assert self.process is not None
        os.close(self.writer)
        code, self.process = self.process.returncode, None
        if why is None and code:
            why = f"has stopped ({self._reason() or f'exit code {code}'})"
        if why is not None:
            self._warn(why)

    def _reason(self) -> str:
        """The last line that the logger's process has said."""
        try:
            with open_own(self.log, "rb") as log:
                log.seek(max(self._said_from, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
        except (OSError, UserError):
            return ""
        return shorten(lines[-1], 300) if lines else ""

    def _warn(self, why: str) -> None:
        line = f"the logger {self.name} {why}, and the run goes on without it; see {self.log}"
        self.warn(without_secrets(line))
