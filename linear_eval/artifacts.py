"""Files for people: pictures and tables. matplotlib is imported only where something is drawn."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from linear_eval.errors import EvalError
from linear_eval.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is pale on white: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")


@contextmanager
def artifact(path: Path) -> Iterator[IO[bytes]]:
    """`replacing` in a folder that is made where it is missing.

    Raises:
        EvalError: the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as file:
            yield file
    except OSError as error:
        fix = "make it writable, or name another folder"
        raise EvalError(f"cannot write {path} ({error.strerror or error})", fix) from error


def new_figure(width: float, height: float) -> "Figure":
    """A matplotlib figure (inches) without pyplot's global state or a screen, freed with its last reference.

    Raises:
        EvalError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install matplotlib (extra `experiments`)"
        raise EvalError("drawing needs the package matplotlib", fix) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """As PNG, 150 dots an inch. All that is written in it is text: no mathematics between dollars, no TeX."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    # the setting is for texts that are made while it is drawn, such as those of the ticks
    with (
        artifact(path) as file,
        warnings.catch_warnings(),
        rc_context({"text.parse_math": False, "text.usetex": False}),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
            text.set_usetex(False)
        figure.savefig(file, format="png", dpi=150)
