"""Bad input ends with one line that says what is wrong and how to mend it."""

from collections.abc import Callable

import pytest

from ssl_emp.commands import pretrain
from ssl_emp.errors import UserError


def refusal(call: Callable[[], object]) -> str:
    """The message of the UserError that the call ends with: one line that names a fix."""
    with pytest.raises(UserError) as caught:
        call()
    assert ". fix: " in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


def main_refuses(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that pretrain.py says, exit code 2."""
    capsys.readouterr()
    assert pretrain.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ". fix: " in line
    return line
