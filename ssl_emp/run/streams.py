"""Standard output and error may be closed, full, ASCII only, or a broken pipe: printing never ends a run.

A closed stream is replaced by the null device, letters that an encoding lacks are escaped, and a stream that
failed once is not used again.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Literal, TextIO

Stream = Literal["stdout", "stderr"]


def prepare_streams(errors: str = "backslashreplace") -> None:
    """Call first in a command, before any file is opened.

    Otherwise the next opened file would get a closed descriptor's number, and warnings with it.

    Args:
        errors: how letters are written that the stream's encoding lacks; the default keeps names readable.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Python found it closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=errors))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def is_shown(name: Stream) -> bool:
    """False if the stream was closed when the program started; `> /dev/null` counts as shown."""
    return getattr(sys, name) is not None and getattr(sys, f"__{name}__") is not None


def put(name: Stream, text: str) -> OSError | None:
    """Write a text and flush it. After an error, which is returned, the stream leads to the null device."""
    stream = getattr(sys, name)
    if stream is None:
        return None
    try:
        stream.write(text)
        stream.flush()
    except ValueError as error:  # closed by Python
        return OSError(0, str(error))
    except OSError as error:
        abandon(stream)
        return error
    return None


def abandon(stream: TextIO) -> None:
    """Send the stream to the null device: else Python fails to flush it at exit, with exit code 120."""
    with suppress(OSError, ValueError):
        opened = os.open(os.devnull, os.O_WRONLY)
        os.dup2(opened, stream.fileno())
        os.close(opened)
