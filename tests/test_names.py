"""What strangers named is text in every place where it is shown: console, log, tables, pictures, CSV."""

import csv
import io
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_text import HOSTILE

import linear_eval.names
from linear_eval.diagnose import draw_map, draw_neighbors
from linear_eval.features import EvalError
from linear_eval.transfer import (
    Outcome,
    Suite,
    Target,
    Transfer,
    draw_bars,
    missing_lines,
    run_suite,
    to_csv,
    to_markdown,
)
from ssl_emp.commands.ledger import say
from ssl_emp.commands.row_tables import markdown_table, terminal_table
from ssl_emp.commands.rows import COLUMNS, Row
from ssl_emp.run.report import Report, show_progress
from ssl_emp.text import printable

NAMES = [
    *HOSTILE,
    "_hidden",
    "$\\frac{",
    "😀👩‍👩‍👧",
    "x" * 3000,
    "a|b|c",
    "=HYPERLINK(0)",
    "+1",
    "-1",
    "@sum",
    '"quoted", and more',
    "{task}",
]
ACTS = ("\x1b[2J", "\x1b]0;", "\x9b", "\u202e", "\x7f", "\x08", "\u200b")


@given(st.text())
def test_both_packages_mean_the_same_by_it(text: str) -> None:
    assert linear_eval.names.printable(text) == printable(text)
    assert len(linear_eval.names.shorten(text)) <= 40


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_says_names_as_they_are(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    report, written = Report(), io.StringIO()
    report.console.file = written
    assert report.console.is_terminal == terminal
    report.attach(tmp_path)
    for name in NAMES:
        report.say(f"images    from {name}, in memory")
        report.say(f"evaluate  python evaluate.py {name}", folds=False)
        with report.progress(range(1), 1, name) as items:
            list(items)
    shown, log = written.getvalue(), (tmp_path / "train.log").read_text(encoding="utf-8")
    assert not any(act in shown + log for act in ACTS)
    assert all(line[:2] == "20" and line[4] == "-" for line in log.splitlines()) and "\x1b" not in log
    for text in (log, shown):
        assert (
            "[bold]x[/bold]" in text
            and ":apple:" in text
            and "a[/b]" in text
            and "$5^^$" in text
            and "{task}" in text
        )
        assert "\\x1b[2J" in text and "\\u202e" in text and "one\\ntwo\\rthree" in text


def test_lines_beside_a_result_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        say(f"warning: {name}")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = show_progress(NAMES[3])
    assert progress is not None
    progress(1, 1)
    said = capsys.readouterr().err
    assert not any(act in said for act in ACTS) and said.count("\n") == len(NAMES)
    *_, line, wiped, rest = said.split("\r")
    assert line.endswith(" 1 of 1") and wiped == " " * len(line) and rest == "", "it leaves nothing behind"


def test_a_table_of_rows_has_its_rows_and_columns() -> None:
    rows: list[Row] = [
        dict.fromkeys(COLUMNS, name) | {"metric": "top1 %", "value": 1.0, "std": None, "n_test": 3, "seed": 0}
        for name in NAMES
    ]
    text = markdown_table(rows)
    assert text.count("\n") == len(NAMES) + 2 and not any(act in text for act in ACTS)
    assert {line.replace("\\|", "").count("|") for line in text.splitlines()} == {len(COLUMNS) + 1}
    shown = terminal_table(rows[:11])
    assert not any(act in shown for act in ACTS) and ":apple:" in shown.replace("\n", "")


def transfer_of(names: list[str]) -> Transfer:
    """A suite in which encoders, data sets, the suite and the reasons have these names; the last data set is
    missing.
    """
    names = [name.encode("utf-8", "replace").decode() for name in names]  # a suite's file is UTF-8
    targets = tuple(Target(name=name, source="x") for name in names)

    def evaluate(encoder: str, target: Target) -> Outcome:
        if target.name == names[-1]:
            raise EvalError(f"no {target.name}", "give it")
        return Outcome(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), f"protocol of {target.name}")

    return run_suite(Suite(name=names[0], targets=targets), names[:3], evaluate, num_resamples=100)


@pytest.mark.parametrize("first", range(0, len(NAMES), 4))
def test_a_table_of_a_suite_has_its_rows_and_columns(first: int) -> None:
    names = [*NAMES[first : first + 4], "plain"]
    transfer = transfer_of(names)
    text = to_markdown(transfer)
    assert not any(act in text for act in ACTS) and all(
        line.isprintable() for line in missing_lines(transfer)
    )
    table = [line.replace("\\|", "") for line in text.split("\n") if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(names)
    rows = list(csv.DictReader(io.StringIO(to_csv(transfer), newline="")))
    assert len(rows) == 3 * len(names) + 3 and all(None not in row for row in rows)  # a mean for each encoder
    assert to_csv(transfer).count("\n") == len(rows) + 1
    for row in rows:
        assert not any(
            row[name].startswith(("=", "+", "-", "@"))
            for name in ("encoder", "data", "suite", "protocol", "reason")
        )
    shown = {printable(name.encode("utf-8", "replace").decode()) for name in names}
    assert {row["data"].removeprefix("'") for row in rows} == {*shown, "macro average"}


@pytest.mark.parametrize("usetex", [False, True])
@pytest.mark.parametrize("first", range(0, len(NAMES), 8))
def test_pictures_are_drawn_whatever_the_names(first: int, usetex: bool, tmp_path: Path) -> None:
    from matplotlib import rc_context

    names = NAMES[first : first + 8]
    labels = torch.arange(len(names)).repeat(2)
    coords = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), rc_context({"text.usetex": usetex}):
        warnings.simplefilter("error")
        draw_map(tmp_path / "map.png", coords, labels=labels, class_names=names, title=names[0])
        draw_bars(transfer_of([*names, "plain"]), tmp_path / "bars.png")
        pixels = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
        draw_neighbors(
            tmp_path / "neighbors.png",
            pixels,
            coords,
            labels=labels,
            class_names=names,
            num_queries=2,
            num_neighbors=2,
        )
    for name in ("map.png", "bars.png", "neighbors.png"):
        with Image.open(tmp_path / name) as image:
            assert max(image.size) < 4000


def test_a_dollar_is_a_dollar_and_an_underscore_is_shown(tmp_path: Path) -> None:
    """A formula would be set as letters without dollars, and a name that begins with _ left out: then other
    names look alike.
    """

    def drawn(name: str) -> bytes:
        labels = torch.tensor([0, 1])
        draw_map(tmp_path / "map.png", torch.eye(2), labels=labels, class_names=[name, "other"])
        with Image.open(tmp_path / "map.png") as image:
            return image.tobytes()

    assert len({drawn(name) for name in ("$x$", "x", "_x", "$", "\\x", "")}) == 6
