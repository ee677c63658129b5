"""`ssl-emp configs [NAME ...]`: the configs that come with the package, listed or copied."""

import argparse
import os
from pathlib import Path

from linear_eval.files import write_atomically
from ssl_emp.errors import Parser, UserError, path_argument
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.shipped import shipped_configs
from ssl_emp.text import command_line, printable, quoted, shorten

DESCRIPTION = """List the configs that come with ssl_emp, or copy those that are named, to be changed.

    {configs}                 # the names, and what each is for
    {configs} folder_emp      # ./folder_emp.yaml
    {configs} demo --out mine.yaml

A file that is there is never overwritten.
"""


def parser() -> Parser:
    made = Parser(
        prog=command_line("configs"),
        description=DESCRIPTION.format(configs=command_line("configs")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="configs to copy")
    made.add_argument("--out", type=path_argument, metavar="PLACE", help="a file, or a folder for NAME.yaml")
    return made


def main(argv: list[str] | None = None) -> int:
    prepare_streams()
    try:
        arguments = parser().parse_intermixed_args(argv)
        if not arguments.names and arguments.out:
            raise UserError("--out is where copies go, and nothing is named", "name a config to copy")
        said = copies(arguments.names, arguments.out) if arguments.names else listing()
    except UserError as error:
        put("stderr", f"error: {printable(str(error))}\n")
        return 2
    put("stdout", said)
    return 0


def listing() -> str:
    kinds = {f"{command_line('pretrain')} --config NAME": shipped_configs()}
    kinds[f"{command_line('evaluate')} RUN transfer transfer.suite=NAME"] = shipped_configs(suites=True)
    width = max(len(name) for known in kinds.values() for name in known)
    lines = []
    for usage, known in kinds.items():
        lines += [usage, *(f"  {name:{width}}  {about(path)}" for name, path in known.items()), ""]
    return "\n".join([*lines, f"a copy to change: {command_line('configs')} NAME", ""])


def about(path: Path) -> str:
    """What a config is for: its first line, which is a comment."""
    with open(path, encoding="utf-8") as file:
        return shorten(file.readline().strip("# \n"), 110)


def copies(names: list[str], out: str | None) -> str:
    """Copy the configs; what was written, and how it is used. Raises UserError before anything is written."""
    from linear_eval.errors import did_you_mean

    suites = shipped_configs(suites=True)
    known = shipped_configs() | suites
    for name in names:
        if name not in known:
            fix = did_you_mean(name, known, f"name one of {', '.join(known)}")
            raise UserError(f"no config called {shorten(name)!r} comes with ssl_emp", fix)
    names = list(dict.fromkeys(names))
    places = {name: place_of(name, out, len(names)) for name in names}
    for place in places.values():
        if os.path.lexists(place):
            raise UserError(f"{place} exists", "give --out PLACE, or move it away")
    lines = []
    for name, place in places.items():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, known[name].read_bytes(), shared=True)
        except OSError as error:
            what = f"cannot write {place} ({error.strerror or error})"
            raise UserError(what, "give --out PLACE elsewhere") from error
        use = f"{command_line('pretrain')} --config {quoted(place)}"
        if name in suites:
            use = f"{command_line('evaluate')} RUN transfer transfer.suite={quoted(place)}"
        lines += [f"{printable(str(place))} is a copy of {name}: {use}\n"]
    return "".join(lines)


def place_of(name: str, out: str | None, count: int) -> Path:
    if out is None:
        return Path(f"{name}.yaml")
    if count > 1 or out.endswith(os.sep) or os.path.isdir(out):
        return Path(out) / f"{name}.yaml"
    return Path(out)
