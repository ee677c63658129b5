"""What a person sees and what a run leaves behind: console, train.log, metrics.jsonl, TensorBoard, parquet, environment."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ssl_emp.checkpoint import write_atomically
from ssl_emp.device import describe_device

Item = TypeVar("Item")
PLAIN_EVERY_SECONDS = 60.0  # not on a terminal: a line at least this often within an epoch


class Report:
    """Console of one run, and its files once there is a folder for them."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.folder: Path | None = None
        self.writer: Any = None
        self.early: list[str] = []  # said before there was a folder

    def attach(self, folder: Path, tensorboard: bool) -> None:
        """From now on write train.log (with what was said so far), metrics.jsonl and TensorBoard events into `folder`."""
        self.folder = folder
        self._log(self.early)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # half a second of import, so only where it is asked for

            self.writer = SummaryWriter(str(folder))

    def say(self, line: str) -> None:
        """One line to the console and to train.log."""
        self.console.print(line, markup=False)
        self._log([line])

    def _log(self, lines: list[str]) -> None:
        if self.folder is None:
            self.early += lines
            return
        with open(self.folder / "train.log", "a", encoding="utf-8") as file:
            file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in lines)

    def metrics(self, row: dict[str, Any]) -> None:
        """One JSON line an epoch, and the same numbers to TensorBoard (key `epoch` is the x axis)."""
        if self.folder is not None:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "epoch":
                    self.writer.add_scalar(name, value, row["epoch"])

    def forget_from(self, epoch: int) -> None:
        """Drop the lines of metrics.jsonl that a resumed run is about to write again."""
        path = (self.folder or Path()) / "metrics.jsonl"
        if path.exists():
            rows = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    rows += [line] if json.loads(line)["epoch"] < epoch else []
                except ValueError:  # cut off by a kill or a full disk: its epoch runs again
                    break
            write_atomically(path, "".join(f"{line}\n" for line in rows).encode())

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns, name and value; plain lines where the console is not a terminal."""
        if self.console.is_terminal:
            table = Table(title=title, show_header=False, title_justify="left")
            for row in rows:
                table.add_row(*row)
            self.console.print(table)
        width = max(len(name) for name, _ in rows)
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        if not self.console.is_terminal:
            self.console.print("\n".join(lines), markup=False)
        self._log(lines)

    @contextmanager
    def progress(self, items: Iterable[Item], total: int, label: str, start: int = 0) -> Iterator[Iterator[Item]]:
        """A bar on a terminal, now and then a plain line elsewhere. It counts steps and never reads a tensor."""
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
                self.console.print(f"{label} step {done}/{total}", markup=False)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def write_environment(path: Path, device: torch.device) -> None:
    """What a number depends on besides the config: versions, device, threads, command."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "lightly", "numpy", "faiss-gpu", "faiss-cpu", "pyarrow", "pillow", "safetensors")
    environment = {
        "command": sys.argv,
        "device": describe_device(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": {name: installed(name) for name in packages if installed(name)},
    }
    path.write_text(json.dumps(environment, indent=2) + "\n")


def write_samples(path: Path, names: list[str], columns: dict[str, Tensor]) -> None:
    """One row a sample: its index and name, then the columns, each (N,). Readable by pandas and DuckDB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"index": pa.array(range(len(names)), pa.int64()), "name": pa.array(names)}
        | {name: pa.array(values.cpu().numpy()) for name, values in columns.items()}
    )
    tmp = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, tmp)
    os.replace(tmp, path)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two (K,) tensors, a 0-d tensor on their device; 0 where one is constant."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).float()
    ranks = ranks - ranks.mean(1, keepdim=True)
    varies = torch.stack([a.max() > a.min(), b.max() > b.min()]).all()
    return torch.where(varies, (ranks[0] * ranks[1]).sum() / ranks.norm(dim=1).prod().clamp(min=1e-12), 0.0)


def show_progress(label: str) -> Callable[[int, int], None] | None:
    """A counter (done, total) on standard error where a person watches, else None."""
    if not sys.stderr.isatty():
        return None
    return lambda done, total: print(f"\r{label} {done:,} of {total:,}", end="" if done < total else "\n", file=sys.stderr)


def duration(seconds: float) -> str:
    """Such as `42s`, `3m07s`, `1h12m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
