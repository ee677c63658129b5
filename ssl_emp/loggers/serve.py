"""The process of one logger: tells it what the run directory holds and it lacks, at every word of the run.

    python -c '… serve(…)' NAME RUN NUMBER

NUMBER is the descriptor of a pipe. Every byte that arrives says that there is news; `.` or `!` that the run
has ended, finished or not. A pipe that closes says that the training process has died. What the logger has is
kept in RUN/loggers/NAME.json, so that a resumed run, and its evaluation, go on with the same run of the
logger. The last line on standard error says why it ended early.
"""

import hashlib
import importlib
import os
import queue
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import yaml

from linear_eval.errors import first_line
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.loggers.base import About, Logger
from ssl_emp.loggers.evaluation import evaluated, evaluation_rows
from ssl_emp.loggers.secrets import without_secrets
from ssl_emp.run.metrics import read_metrics, scalars
from ssl_emp.safe_files import as_json, check_inner, read_json, read_text, write_atomically

NEWS, FINISHED, STOPPED = b"+", b".", b"!"
LONGEST_SECONDS = 1800.0
ID = re.compile(r"[\w.-]{1,128}")
# what else a logger is given of a run: name in the run directory -> its kind
FILES = {"report.html": "report", "encoder": "model"}


class Delivery:
    """What a logger has of the run in `folder`, and lacks."""

    def __init__(self, logger: Logger, name: str, folder: Path) -> None:
        self.logger, self.folder = logger, folder
        self.path = check_inner(folder, "loggers") / f"{name}.json"
        self.state = read_state(self.path)
        config = yaml.safe_load(read_text(folder / "config.yaml"))
        path = folder / "environment.json"
        about = without_secrets([config, read_json(path) if path.is_file() else {}])
        # resolved: a run may be called `.`
        self.state["id"], known = logger.open(About(folder.resolve().name, *about), self.state["id"])
        if known is not None:
            self.state["epoch"] = known
        if known == -1:  # a new run of the logger
            self.state["sent"] = {}
        self._keep()

    def _keep(self) -> None:
        write_atomically(self.path, (as_json(self.state) + "\n").encode())

    def rows(self) -> None:
        """Epochs that the logger lacks. One that ran again after a crash has the same numbers, and is not
        sent twice.
        """
        for row in read_metrics(self.folder):
            if row["epoch"] > self.state["epoch"]:
                self.logger.epoch(row["epoch"], dict(scalars(row)))
                self.state["epoch"] = row["epoch"]
                self._keep()

    def rest(self) -> None:
        """Evaluations, the report and the encoder, where they are new."""
        rows = evaluation_rows(self.folder)
        if rows and self._is_new("evaluation", hashlib.sha256(as_json(rows).encode()).hexdigest()):
            found = without_secrets(rows)
            self.logger.evaluation(evaluated(found, self.folder), found, self.state["epoch"])
        for name, kind in FILES.items():
            path = check_inner(self.folder, name)
            if path.exists() and self._is_new(name, hash_of(path)):
                self.logger.file(path, name, kind)
        self._keep()

    def _is_new(self, name: str, content: str) -> bool:
        """Whether what is about to be sent under a name has another hash than before."""
        before, self.state["sent"][name] = self.state["sent"].get(name), content
        return before != content


def read_state(path: Path) -> dict[str, Any]:
    """What a logger has of a run: its id there, the last epoch, and hashes of what was sent beside them."""
    state: dict[str, Any] = {"id": None, "epoch": -1, "sent": {}}  # a start has the row of epoch 0
    if path.exists():
        found = read_json(path)
        is_ours = isinstance(found, dict) and found.keys() == state.keys()
        if not is_ours or not ID.fullmatch(str(found["id"])) or not isinstance(found["epoch"], int):
            raise UserError(f"{path} is no file of a run", "remove it, and the logger begins a new run")
        state = found
    return state


def hash_of(path: Path) -> str:
    """A hash of a file, or of the files in a folder and their names."""
    found = hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            found.update(f"{part.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def make_logger(name: str, folder: Path) -> Logger:
    """The logger of this name, whose package is imported here."""
    module = importlib.import_module(f"ssl_emp.loggers.{name}_logger")
    return getattr(module, f"{name.capitalize()}Logger")(folder)


def listen(descriptor: int, words: "queue.SimpleQueue[bytes]") -> None:
    """Pass on what arrives, and end this process some time after the run, should nobody else do it."""
    word = NEWS
    while word == NEWS:
        word = (os.read(descriptor, 1 << 16) or STOPPED)[-1:]
        if word != NEWS or words.empty():
            words.put(word)
    timer = threading.Timer(LONGEST_SECONDS, end_all)
    timer.daemon = True
    timer.start()


def end_all() -> None:
    """End this process and what it has started, at once: what packages do at exit may hang too."""
    os.killpg(os.getpid(), signal.SIGKILL)


def serve(name: str, run: str, descriptor: int) -> int:
    """Until the run ends. The exit code is not 0 where something did not reach the logger."""
    # it ends with the run, which hears these
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # the training step comes first
    words: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(descriptor, words), daemon=True).start()
    folder = Path(run)
    try:
        logger = make_logger(name, check_inner(folder, "loggers"))
        delivery = Delivery(logger, name, folder)
        while (word := words.get()) == NEWS:
            delivery.rows()
        delivery.rows()
        delivery.rest()
        logger.close(word == FINISHED)
    except BaseException as error:  # wandb also raises what is no Exception
        traceback.print_exc()
        is_line = isinstance(error, UserError | RunFailed)
        reason = str(error) if is_line else f"{type(error).__name__}: {first_line(error)}"
        print(without_secrets(reason), file=sys.stderr, flush=True)
        end_all()
    return 0
