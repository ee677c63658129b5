"""Rows of evaluations as a table for people: Markdown, or on a terminal one with the protocols below it."""

import shutil

from linear_eval.names import markdown_cell
from ssl_emp.commands.rows import COLUMNS, Row
from ssl_emp.errors import printable

ALIKE = (
    "data",
    "metric",
    "std",
    "n_test",
    "seed",
)  # columns that a terminal's table leaves out where all agree


def shown(row: Row, name: str) -> str:
    """A cell as text; accuracies with two digits, other figures with four, counts as they are."""
    value = row[name]
    if value is None:
        return ""
    if name in ("value", "std") and isinstance(value, float):
        return f"{value:.{2 if row['metric'].endswith('%') else 4}f}"
    return printable(str(value))


def markdown_table(rows: list[Row]) -> str:
    """A row without a value ends with the reason, in the column of protocols."""
    reason = COLUMNS.index("protocol")
    cells = [[markdown_cell(shown(row, name)) for name in COLUMNS] for row in rows]
    widths = [len(name) for name in COLUMNS]
    for row, line in zip(rows, cells, strict=True):
        if row["value"] is None:
            del line[reason + 1 :]
        # a reason, which may be long, does not widen its column
        sized = line[:reason] if row["value"] is None else line
        widths[: len(sized)] = map(max, widths, map(len, sized))
    lines = [list(COLUMNS), ["-" * width for width in widths], *cells]
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)


def terminal_table(rows: list[Row]) -> str:
    """With the protocols numbered below it: in a column they would fold into towers. What is the same in all
    rows stands below it too, so that names have room on a narrow terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, force_terminal=True, width=shutil.get_terminal_size().columns)
    cells = [{name: shown(row, name) for name in COLUMNS} for row in rows]
    same = [name for name in ALIKE if len({line[name] for line in cells}) == 1]
    protocols = list(dict.fromkeys(line["protocol"] for line in cells))
    columns = [name for name in COLUMNS if name not in same]
    table = Table(*columns)
    for line in cells:
        place = {"protocol": f"({protocols.index(line['protocol']) + 1})"}
        table.add_row(*(Text((line | place)[name]) for name in columns))
    with console.capture() as captured:  # captured as text, so that one function writes all tables
        console.print(table)
        if alike := [f"{name} {cells[0][name]}" for name in same if cells[0][name]]:
            console.print(Text(f"all: {', '.join(alike)}"))
        for number, protocol in enumerate(protocols, 1):
            console.print(Text(f"({number}) {protocol}"))
    return captured.get()
