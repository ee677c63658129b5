"""`ssl-emp report RUN [RUN ...]`: what runs did, as one HTML file."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_emp.errors import Parser, UserError, path_argument
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.text import command_line, printable, quoted

if TYPE_CHECKING:
    from ssl_emp.data.images import ImageSet

DESCRIPTION = """Write one HTML file that shows what runs did: samples and time against no pruning, curves,
the images that were trained on and those that were not, warnings and what they mean, evaluations.

    {report} runs/demo                       # runs/demo/report.html
    {report} runs/emp runs/random --out both.html

It needs nothing but itself: no network, no server. `{evaluate} RUN ...` writes RUN/report.html as well.
Several runs are laid side by side, with what differs in their configs, in ./report.html.
"""
NAME = "report.html"


def parser() -> Parser:
    names = {name: command_line(name) for name in ("report", "evaluate")}
    made = Parser(
        prog=names["report"],
        description=DESCRIPTION.format(**names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("runs", nargs="*", type=path_argument, metavar="RUN", help="run directories")
    made.add_argument("--out", type=path_argument, metavar="FILE", help="the file; one that is there and no "
                      "report is not overwritten")  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> int:
    prepare_streams()
    try:
        arguments = parser().parse_intermixed_args(argv)
        runs = [Path(run) for run in dict.fromkeys(map(os.path.normpath, arguments.runs))]
        if not runs:
            raise UserError("report has no run to tell of", f"{command_line('report')} RUN [RUN ...]")
        written = write_report(runs, None if arguments.out is None else Path(arguments.out))
    except UserError as error:
        put("stderr", f"error: {printable(str(error))}\n")
        return 2
    put("stdout", f"{printable(os.fspath(written))}\n")
    return 0


def write_report(runs: list[Path], out: Path | None = None, images: "ImageSet | None" = None) -> Path:
    """Write the report of these runs, whole or not at all; where it is.

    Args:
        out: the file; None: RUN/report.html of one run, ./report.html of several.
        images: those that a run was trained on, where no file has them.

    Raises:
        UserError: a directory that is no run, or a file that cannot be written.
    """
    from ssl_emp._version import __version__
    from ssl_emp.commands.report_data import gather, side_by_side
    from ssl_emp.report.page import page
    from ssl_emp.safe_files import check_own, write_atomically

    if out is None:
        out = runs[0] / NAME if len(runs) == 1 else Path(NAME)
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is not a run directory", "give the directory that a run wrote")
    check_own(out, replaced=True)
    if os.path.lexists(out) and not is_report(out):
        fix = f"move it away, or give --out FILE: mv {quoted(out)} elsewhere"
        raise UserError(f"{out} is there, and is no report", fix)
    found = [gather(run, share=len(runs), images=images) for run in runs]
    data = {"version": __version__, "runs": found} | side_by_side(found)
    title = " · ".join(run["name"] for run in found[:3]) + (" …" if len(found) > 3 else "")
    text = page(data, f"{title} — ssl_emp report")
    try:
        write_atomically(out, text.encode(), shared=True)
    except OSError as error:
        what = f"cannot write {out} ({error.strerror or error})"
        raise UserError(what, "give --out FILE elsewhere") from error
    return out


def is_report(path: Path) -> bool:
    """Whether a file begins as those that are written here do."""
    from ssl_emp.report.page import MARK

    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return MARK.encode() in file.read(1024)
    except OSError:
        return False
