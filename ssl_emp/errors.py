"""The two ways a run ends early: the user can fix it (exit code 2), or the run failed (exit code 3)."""

import argparse
from typing import NoReturn

from ssl_emp.text import home, printable


class UserError(Exception):
    """Something the user can fix. Printed as one line, `error: what. fix: how`; exit code 2.

    Args:
        what: what is wrong and where (file, key, value).
        fix: what to type or change.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(printable(f"{what}. fix: {fix}"))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "see --help")


def path_argument(text: str) -> str:
    """For `add_argument(type=...)`: a path, with `~` for the home folder even where no shell did that."""
    try:
        return home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_word(word: str) -> str:
    """The same for one of several words of a command line. Raises UserError."""
    try:
        return home(word)
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        raise UserError(what, fix) from error


class RunFailed(Exception):
    """The run cannot go on (a non-finite loss, a full disk); the last checkpoint is intact. Exit code 3."""
