"""Standard output and error may be closed, full, in ASCII, or left by their reader: showing something never
ends the work.

What is closed leads to the null device, what an encoding lacks is escaped, and a stream that failed once is
not tried again.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Literal, TextIO

Stream = Literal["stdout", "stderr"]


def prepare_streams(errors: str = "backslashreplace") -> None:
    """Call first in a command, before any file is opened.

    A closed descriptor would be given to the next file that is opened, and what a library complains of would
    be written into it.

    Args:
        errors: what becomes of a letter that the stream's encoding lacks; the default leaves names readable.
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
    """False where the stream was closed when the program started; one that is sent to the null device on
    purpose counts as shown.
    """
    return getattr(sys, name) is not None and getattr(sys, f"__{name}__") is not None


def put(name: Stream, text: str) -> OSError | None:
    """Write a text and flush it. Where that fails, the error is given back, and the stream leads to the null
    device from now on.
    """
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
    """Send what is left in its buffer to the null device: the interpreter would complain of it at exit, with
    exit code 120.
    """
    with suppress(OSError, ValueError):
        opened = os.open(os.devnull, os.O_WRONLY)
        os.dup2(opened, stream.fileno())
        os.close(opened)
