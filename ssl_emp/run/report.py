"""What a run prints and writes: console, train.log, metrics.jsonl, TensorBoard, parquet, environment."""

import errno
import os
import platform
import secrets
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ssl_emp.device import describe_device
from ssl_emp.loggers.evaluation import evaluated, evaluation_rows
from ssl_emp.loggers.feed import PACKAGES, Feed, close_all, how_to_look
from ssl_emp.run.checkpoint import cannot_write
from ssl_emp.run.lock import Held
from ssl_emp.run.metrics import read_metrics as read_metrics
from ssl_emp.run.metrics import scalars
from ssl_emp.safe_files import (
    as_json,
    check_regular,
    inner_folder,
    open_own,
    replacing,
    write_atomically,
)
from ssl_emp.text import printable

Item = TypeVar("Item")
PLAIN_EVERY_SECONDS = 60.0  # between two lines of progress within an epoch, where there is no terminal
CHANGES_EVERY_SECONDS = 0.5  # of the line in a notebook
INDENT = " " * 10  # the width of the word that a line begins with, such as `warning`


class _Console(Console):
    """A console that may fail (`| head`, a full disk behind a redirection) without ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # else Python flushes the stream at exit, fails, and exits with 120
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Report:
    """Console of a run, and its files once `attach` names their folder.

    Args:
        silent: print and write nothing, as all ranks but the first.
        verbose: print; train.log has every line anyway.
    """

    def __init__(self, silent: bool = False, verbose: bool = True) -> None:
        self.silent = silent
        # names are shown as they are: without rich's [markup] and :emoji:. In a notebook, lines are text, not
        # a piece of HTML each
        self.console = _Console(
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
            force_jupyter=False,
            quiet=silent or not verbose,
        )
        self.folder: Path | None = None
        self.held: Held | None = None
        self.writer: Any = None
        self.feeds: list[Feed] = []
        # lines not in train.log yet: there is no folder, or its disk is full
        self.unwritten: list[str] = []

    def attach(self, folder: Path, loggers: Sequence[str] = (), held: Held | None = None) -> None:
        """Write train.log (with all lines so far) and metrics.jsonl into `folder`, and start the loggers:
        TensorBoard, whose events are files of it too, and others, see `ssl_emp.loggers`.

        If a `held` folder is moved or replaced, train.log ends there and `metrics` raises RunFailed.
        """
        if self.silent:
            return
        self.folder, self.held = folder, held
        self._log([])
        for name in filter(PACKAGES.__contains__, loggers):
            self.feeds.append(Feed(name, folder, lambda text: self.say(f"warning   {text}")))
            self.say(f"logger    {name}: {how_to_look(name, folder)}")
        if "tensorboard" in loggers:
            self.writer = event_writer(folder)

    def say(self, line: str, *, folds: bool = True) -> None:
        """Write one line to the console and to train.log, escaped by `ssl_emp.text.printable`.

        Args:
            folds: on a terminal that is narrower, go on below, indented. Not for a command, which is copied.
        """
        line = printable(line)
        self._print(folded(line, self.console.width) if folds and self.console.is_terminal else line)
        self._log([line])

    def _print(self, text: str) -> None:
        try:
            self.console.print(text)
        except OSError:
            self.console.on_broken_pipe()

    def _log(self, lines: list[str]) -> None:
        if self.silent:
            return
        self.unwritten += [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in lines]
        if self.folder is not None:
            with suppress(OSError):  # a full disk: the run goes on, and the lines are written later
                if self.held is None or self.held.is_ours():
                    _append(self.folder / "train.log", self.unwritten)
                    self.unwritten = []

    def metrics(self, row: dict[str, Any]) -> None:
        """Write an epoch as a line of JSON, and its numbers to the loggers (key `epoch` is the x axis).

        Raises:
            RunFailed: the line cannot be written. Going on would leave a gap that no resume can fill.
        """
        if self.folder is not None:
            path = self.folder / "metrics.jsonl"
            if self.held is not None:
                self.held.check()
            try:
                _append(path, [as_json(row) + "\n"])
            except OSError as error:
                raise cannot_write(path, error) from error
        if self.writer is not None:
            try:
                for name, value in scalars(row):
                    self.writer.add_scalar(name, value, row["epoch"])
            except OSError as error:
                self.writer = None
                self.say(f"warning   no more TensorBoard events: {error.strerror}")
        for feed in self.feeds:
            feed.news()

    def forget_from(self, epoch: int) -> None:
        """Drop the rows of metrics.jsonl from `epoch` on: a resumed run writes them again."""
        if self.folder is None:
            return
        path, rows = self.folder / "metrics.jsonl", [row for row in self.rows() if row["epoch"] < epoch]
        if path.exists():  # a line that a crash cut off goes, and its epoch runs again
            write_atomically(path, "".join(f"{as_json(row)}\n" for row in rows).encode())
        self._rewrite_events(rows, epoch)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far, see `read_metrics`."""
        return [] if self.folder is None else read_metrics(self.folder)

    def _rewrite_events(self, rows: list[dict[str, Any]], epoch: int) -> None:
        """Make TensorBoard show the rows of metrics.jsonl, each once; a crash may have lost some."""
        assert self.folder is not None
        own = None if self.writer is None else Path(self.writer.file_writer.event_writer._file_name).name
        paths = [path for path in sorted(self.folder.glob("events.out.tfevents.*")) if path.name != own]
        again = {row["epoch"]: row for row in rows} if self.writer is not None else {}
        try:
            times = cut_events(paths, again, epoch)
            for row in rows if self.writer is not None else ():
                for name, value in scalars(row):
                    self.writer.add_scalar(name, value, row["epoch"], times.get(row["epoch"]))
        except Exception as error:  # damaged events; metrics.jsonl has the numbers
            self.say(f"warning   the TensorBoard events of before could not be read ({type(error).__name__})")

    @contextmanager
    def progress(
        self, items: Iterable[Item], total: int, label: str, start: int = 0
    ) -> Iterator[Iterator[Item]]:
        """A progress bar on a terminal, one line that changes in a notebook, else a plain line now and then.
        It never reads a tensor.
        """
        label = printable(label)
        if not self.console.quiet and (line := notebook_line()):
            try:
                yield self._in_line(items, total, label, start, line)
            finally:
                line("")
        elif self.console.is_terminal:
            name = TextColumn("{task.description}", markup=False)
            columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as bar:
                yield iter(bar.track(items, total=total, completed=start, description=label))
        else:
            yield self._plain(items, total, label, start)

    def _plain(self, items: Iterable[Item], total: int, label: str, start: int) -> Iterator[Item]:
        spoke = time.monotonic()
        for done, item in enumerate(items, start + 1):
            yield item
            if time.monotonic() - spoke > PLAIN_EVERY_SECONDS:
                spoke = time.monotonic()
                self._print(f"{label} step {done}/{total}")

    def _in_line(
        self, items: Iterable[Item], total: int, label: str, start: int, line: Callable[[str], None]
    ) -> Iterator[Item]:
        began = spoke = time.monotonic()
        for done, item in enumerate(items, start + 1):
            yield item
            now = time.monotonic()
            if now - spoke > CHANGES_EVERY_SECONDS:
                spoke = now
                left = (now - began) / (done - start) * (total - done)
                line(f"{label} step {done}/{total}, {duration(left)} left in it")

    def counted(self, label: str) -> Callable[[int, int], None] | None:
        """`show_progress` of a run's own work; None where nothing is printed."""
        return None if self.console.quiet else show_progress(label)

    def close(self, finished: bool = True) -> None:
        """End the loggers, each in bounded time."""
        try:
            close_all(self.feeds, finished)
        finally:
            self.feeds = []
            self._close_writer()

    def _close_writer(self) -> None:
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()


def event_writer(folder: Path) -> Any:
    """A writer of a new file of TensorBoard events."""
    # imported here: it takes half a second
    from torch.utils.tensorboard import SummaryWriter

    # the writer would follow a link under the name of its file, so the name cannot be guessed
    return SummaryWriter(str(folder), filename_suffix=f".{secrets.token_hex(8)}")


def add_evaluation_events(folder: Path) -> None:
    """Add what RUN/eval holds to a run's TensorBoard events, where it has such: numbers, and a table as text.

    Raises:
        OSError: they cannot be written.
    """
    rows = evaluation_rows(folder)
    if not rows or not any(folder.glob("events.out.tfevents.*")):
        return
    epoch = max((row["epoch"] for row in read_metrics(folder)), default=0)
    writer = event_writer(folder)
    for name, value in evaluated(rows, folder).items():
        writer.add_scalar(name, value, epoch)
    writer.add_text("evaluation", f"```\n{as_json(rows, 2)}\n```", epoch)
    writer.close()


def cut_events(paths: list[Path], again: dict[int, dict[str, Any]], epoch: int) -> dict[int, float]:
    """Drop points of event files: those from `epoch` on, and those in `again`, epoch -> row to be rewritten.

    Returns:
        Epoch -> wall time (seconds) of a dropped point of that epoch.
    """
    if not paths:
        return {}
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    times: dict[int, float] = {}
    for path in paths:
        if path.is_symlink() or not path.is_file():
            continue
        check_regular(path)
        events = [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]
        kept = []
        for event in events:
            own, late = again.get(event.step, ()), event.step >= epoch
            dropped = [value.tag for value in event.summary.value if late or value.tag in own]
            if dropped:
                times.setdefault(event.step, event.wall_time)
            if not event.HasField("summary") or len(dropped) < len(event.summary.value):
                kept.append(event)
        if not any(event.HasField("summary") for event in kept):
            path.unlink()
        elif len(kept) < len(events):
            with replacing(path) as file:
                writer = RecordWriter(file)
                for event in kept:
                    writer.write(event.SerializeToString())
    return times


def _append(path: Path, lines: list[str]) -> None:
    """Append lines to a file, on a full disk none of them. A line cut off by a crash is ended first."""
    if not lines:
        return
    data = "".join(lines).encode(errors="backslashreplace")  # names of files need not be text
    with open_own(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def write_environment(path: Path, device: torch.device) -> None:
    """Write what results depend on besides the config: versions, device, threads, command."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = "torch torchvision lightly numpy faiss-gpu faiss-cpu pyarrow pillow safetensors".split()
    environment = {
        "command": sys.argv,
        "device": describe_device(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": {name: found for name in packages if (found := installed(name))},
    }
    write_atomically(path, (as_json(environment, 2) + "\n").encode())


PIXELS_KEY = "ssl_emp.pixels"  # in the metadata of samples.parquet


def write_samples(
    path: Path, names: list[str], columns: dict[str, Tensor], pixels: str | None = None
) -> None:
    """Write parquet, a row per sample: its index and name, then the columns, each (N,). `pixels`: the digest
    of images whose names say nothing, for the schema's metadata.
    """
    inner_folder(path.parents[1], path.parent.name)
    table = pa.table(
        {"index": pa.array(range(len(names)), pa.int64()), "name": pa.array(names)}
        | {name: pa.array(values.cpu().numpy()) for name, values in columns.items()}
    )
    with replacing(path) as file:
        pq.write_table(table.replace_schema_metadata(pixels and {PIXELS_KEY: pixels}), file)


def notebook_line() -> Callable[[str], None] | None:
    """In a notebook, a line of output that shows the last text it was called with; None elsewhere.

    rich would ask for the package ipywidgets to draw its bar there.
    """
    ipython = sys.modules.get("IPython")  # where it was never imported, this is no notebook
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):  # none, or IPython in a terminal
        return None
    from IPython.display import display

    shown = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: shown.update({"text/plain": text}, raw=True)


def show_progress(label: str) -> Callable[[int, int], None] | None:
    """A callback (done, total) that prints to standard error or into a notebook; None where neither is."""
    label = printable(label)
    if line := notebook_line():
        seen = [0.0]

        def show(done: int, total: int) -> None:
            if done >= total:
                line("")
            elif time.monotonic() - seen[0] > CHANGES_EVERY_SECONDS:
                seen[0] = time.monotonic()
                line(f"{label} {done:,} of {total:,}")

        return show
    if not sys.stderr.isatty():
        return None

    def show_on_terminal(done: int, total: int) -> None:
        line = f"{label} {done:,} of {total:,}"
        wiped = f"\r{' ' * len(line)}\r"  # it was of use while it moved
        print(f"\r{line}", end=wiped if done >= total else "", file=sys.stderr, flush=True)

    return show_on_terminal


def folded(line: str, width: int) -> str:
    """A line in rows of at most `width` columns where its words allow, all but the first one indented."""
    if len(line) <= width or width < 2 * len(INDENT):
        return line
    rows = textwrap.wrap(
        line, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(rows)


def duration(seconds: float) -> str:
    """Such as `42s`, `3m07s`, `1h12m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
