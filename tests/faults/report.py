"""Run the whole fault matrix and write docs/faults.md: each row with the fault, what is expected, and what
was seen.

python tests/faults/report.py                  # make faults
python tests/faults/report.py --from results.xml   # only write the page, from an earlier run
"""

import argparse
import ast
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "faults.md"
GROUPS = {
    "A": "Crash and resume",
    "B": "Bad checkpoints",
    "C": "Storage",
    "D": "Several processes",
    "E": "Numbers that are not finite",
    "F": "Images and folders",
    "G": "Pruning and configuration",
    "H": "Evaluation",
    "I": "Attacks",
    "control": "Controls",
}
NOT_PROVEN = """## What this does not prove

* **Power loss.** A SIGKILL leaves the page cache, a power cut does not. That files and directories are
  synced, and in which order, is what row A2 sees; that the disk keeps what it was told to sync cannot be
  seen from here.
* **A lost GPU or a lost NCCL rank.** The rows on several processes run gloo on CPUs. NCCL's own watchdog,
  its aborts and its hangs are other code.
* **Other machines.** Bit-identical means one machine, one build of torch, the CPU. File systems over a
  network have other rules for locks and renames; the lock is of no use where the file system has none.
* **A read that hangs.** A disk or a network share that does not answer hangs the process that reads from it;
  nothing here ends that.
* **Files that change while they are mapped.** A cached file that is shortened in place ends the process with
  SIGBUS.
* **Every bomb.** Images have a cap on declared pixels; a parquet file of a billion rows, or with cells of
  gigabytes, has none.
* **A forged end.** A JPEG that is cut and closed again with an end marker can pass for whole.
* **Everything else.** A row shows what was injected, no more.
"""
# figures of which the median and the maximum are told; of others the sum
SPREAD = ("seconds", "steps lost", "megabytes")


@dataclass
class Row:
    """Tests that share a docstring's first line. outcomes: passed, failed or skipped; figures: values by
    name.
    """

    name: str
    injected: str
    expected: str
    outcomes: list[str] = field(default_factory=list)
    figures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """failed where one did, passed where one did and none failed, else skipped."""
        return next(
            (outcome for outcome in ("failed", "passed", "skipped") if outcome in self.outcomes), "not run"
        )


def read_rows() -> dict[tuple[str, str], Row]:
    """(module, function) -> Row, from the first paragraph of each docstring that has three parts."""
    rows: dict[tuple[str, str], Row] = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
                parts = " ".join(paragraph.split()).split(" | ", 2)
                if len(parts) == 3:
                    name, injected, expected = (part.strip() for part in parts)
                    rows[path.stem, node.name] = Row(name, injected, expected)
    return rows


def add_results(rows: dict[tuple[str, str], Row], junit: Path) -> None:
    """Enter outcomes and properties of a pytest run."""
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        row = rows.get((case.get("classname", "").rpartition(".")[2], case.get("name", "").partition("[")[0]))
        if row is None:
            continue
        broken = [*case.findall("failure"), *case.findall("error")]
        row.outcomes.append(
            "failed" if broken else "skipped" if case.find("skipped") is not None else "passed"
        )
        row.failures += [part.get("message", "") for part in broken]
        for value in case.iter("property"):
            row.figures[value.get("name", "")].append(value.get("value", ""))


def together(name: str, values: list[str]) -> str:
    """Several values of one figure as one: sums of `k/n` and of counts, else median and maximum."""
    if all("/" in value for value in values):
        pairs = [tuple(map(int, value.split("/"))) for value in values]
        return f"{sum(pair[0] for pair in pairs)}/{sum(pair[1] for pair in pairs)}"
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return ", ".join(dict.fromkeys(values))
    if name.startswith(SPREAD):
        low, high = statistics.median(numbers), max(numbers)
        return f"{low:.3g}" if low == high else f"median {low:.3g}, max {high:.3g}"
    return f"{sum(numbers):.6g}"


def page(rows: list[Row], seconds: float) -> str:
    """docs/faults.md as text."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.name if row.name == "control" else row.name[:1]].append(row)
    run = [row for row in rows if row.outcome in ("passed", "failed")]
    passed = sum(row.outcome == "passed" for row in run)
    lines = [
        "# Faults",
        "",
        (
            "What happens when a run is killed, a disk is full, a file is damaged, a setting is "
            "wrong. Each row is a test in `tests/faults/`:"
        ),
        (
            "a real run, a fault put into it from outside (the product has no hooks for it), and "
            "what was seen. Written by `make faults`"
        ),
        f"({seconds / 60:.0f} minutes, {os.cpu_count()} cores); a part of it runs in `make test-whole`.",
        "",
        (
            '"Bit-identical" means: SHA-256 over every tensor of the final checkpoint, the exported '
            "encoder, the table of samples and the"
        ),
        (
            "metrics, and the loss in hex and the sorted samples of every step, equal those of the "
            "run that was never interrupted."
        ),
        "",
        "## Figures",
        "",
        "| figure | seen |",
        "| --- | --- |",
        f"| rows passed | {passed}/{len(run)} |",
        (
            "| tests passed | "
            f"{sum(row.outcomes.count('passed') for row in rows)}/{sum(len(row.outcomes) for row in run)} "
            "|"
        ),
        f"| hangs | {sum('hung' in text for row in rows for text in row.failures)} |",
    ]
    figures: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name, values in row.figures.items():
            figures[name] += values
    lines += [
        f"| {name} | {together(name, figures[name])} |"
        for name in sorted(figures)
        if not name.startswith("megabytes")
    ]
    for letter, title in GROUPS.items():
        if groups[letter]:
            lines += [
                "",
                f"## {'' if letter == 'control' else letter + '. '}{title}",
                "",
                "| row | injected | expected | seen |",
                "| --- | --- | --- | --- |",
            ]
            lines += [
                line_of(row)
                for row in sorted(
                    groups[letter], key=lambda row: int(row.name[1:]) if row.name[1:].isdigit() else 0
                )
            ]
    return "\n".join([*lines, "", NOT_PROVEN])


def line_of(row: Row) -> str:
    many = f" ({row.outcomes.count('passed')}/{len(row.outcomes)} cases)" if len(row.outcomes) > 1 else ""
    seen = "; ".join(
        [
            f"{row.outcome}{many}",
            *(f"{name} {together(name, values)}" for name, values in row.figures.items()),
        ]
    )
    return (
        "| "
        + " | ".join(cell.replace("|", "\\|") for cell in (row.name, row.injected, row.expected, seen))
        + " |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--from",
        dest="results",
        type=Path,
        metavar="XML",
        help="results of an earlier run (pytest --junitxml)",
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    arguments = parser.parse_args()
    began, code = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        results = arguments.results or Path(folder) / "results.xml"
        if arguments.results is None:
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-n",
                "auto",
                "--maxprocesses",
                "8",
                "-m",
                "not gpu",
                "-o",
                "junit_family=xunit1",
            ]
            code = subprocess.run(
                [*command, f"--junitxml={results}", str(FOLDER)], cwd=ROOT, check=False
            ).returncode
        rows = read_rows()
        add_results(rows, results)
        seconds = float(
            next(ElementTree.parse(results).getroot().iter("testsuite")).get("time", time.monotonic() - began)
        )
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(page(list(rows.values()), seconds), encoding="utf-8")
    failed = [row.name for row in rows.values() if row.outcome == "failed"]
    print(
        f"{arguments.out}: {len(rows)} rows{', failed: ' + ', '.join(failed) if failed else ', none failed'}"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
