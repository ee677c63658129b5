"""What cannot be evaluated, and errors of others in one line."""

import difflib
from collections.abc import Iterable


class EvalError(ValueError):
    """Input that cannot be evaluated. The message is one line, `what. fix: how`."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}. fix: {fix}")


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, or its type where it has none. torch's go on for pages."""
    return next((line for line in str(error).splitlines() if line), type(error).__name__)[:limit]


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6, prefix: str = ""
) -> str:
    """A fix for a word that is not one of `known`: the nearest one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise
