"""Files for people: written beside their place and moved there whole; matplotlib only where something is
drawn.
"""

import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from linear_eval.features import EvalError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is pale on white: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder (made if missing) that becomes `path` at the end, or goes
    away on an error.

    Raises:
        EvalError: the folder or the file cannot be written.
    """
    # nobody can have put a link under a name that nobody knows
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise EvalError(
            f"cannot write {path} ({error.strerror or error})", "make it writable, or name another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def new_figure(width: float, height: float) -> "Figure":
    """A matplotlib figure (inches) outside of pyplot's global state: drawn without a screen, freed with its
    last reference.

    Raises:
        EvalError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvalError(
            "drawing needs the package matplotlib", "pip install matplotlib (extra `experiments`)"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """As PNG, 150 dots an inch. All that is written in it is text: no mathematics between dollars, no TeX."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    # the setting is for texts that are made while it is drawn, such as those of the ticks
    with (
        replacing(path) as temporary,
        warnings.catch_warnings(),
        rc_context({"text.parse_math": False, "text.usetex": False}),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
            text.set_usetex(False)
        figure.savefig(temporary, format="png", dpi=150)
