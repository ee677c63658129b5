"""Text from outside (names of files and classes, settings, messages of libraries), safe to show in a line.

`printable` is for terminals, logs, tables and pictures, `quoted` for paths in commands to copy, and
`command_line` and `resume_command` are such commands.
"""

import os
import re
import shlex
import sys
from pathlib import Path

SCRIPTS = ("pretrain", "evaluate")  # of the clone, NAME.py


def printable(text: str) -> str:
    """One line of text: characters that cannot be printed are escaped (`\\x1b`, `\\u202e`)."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shorten(text: str, limit: int = 60) -> str:
    """At most `limit` characters of a text, on one line."""
    line = printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def decodable(path: str) -> str:
    """A file name as text that can be encoded: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as a printable word of a command line in bash, zsh or ksh.

    `./` is put before a leading dash, so that no program takes the path for an option.
    """
    text = os.fspath(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_in_ansi_quotes, text)) + "'"


def _in_ansi_quotes(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def command_line(name: str) -> str:
    """How to start the command `name`, in the way in which this program was started.

    `ssl-emp NAME`; after `python pretrain.py` of a clone `python NAME.py` beside it, where there is one;
    after `python -m ssl_emp` the same.
    """
    started = Path(sys.argv[0] if sys.argv else "")
    is_script = started.suffix == ".py" and started.stem in SCRIPTS
    if is_script and name in SCRIPTS:
        return f"python {quoted(started.with_name(f'{name}.py'))}"
    if is_script or started.parts[-2:] == ("ssl_emp", "__main__.py"):
        return f"python -m ssl_emp {name}"
    return f"ssl-emp {name}"


def resume_command(run: str | os.PathLike[str]) -> str:
    """The command that goes on with the run in this directory."""
    return f"{command_line('pretrain')} --resume {quoted(run)}"


LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, of Linux


def home(path: str) -> str:
    """`~/x` and `~user/x` as paths in that home folder, other paths unchanged; `./~` is a file of that name.

    Raises:
        ValueError: there is no such user, and a folder called `~user` would be created here; a name that is
            longer than any file's, at which every look at it would raise an OSError.
    """
    found = os.path.expanduser(path)
    names = found.encode(errors="surrogatepass").split(b"/")
    if max(map(len, names)) > LONGEST_NAME or sum(map(len, names)) + len(names) > LONGEST_PATH:
        raise ValueError(f"{shorten(path)} is longer than a path can be; give the one that was meant")
    if path.startswith("~") and found == path:
        user = path.partition("/")[0]
        fix = f"write ./{user} for a file or folder of that name"
        raise ValueError(f"{user} is nobody's home folder here; {fix}")
    return found


def markdown_text(text: str) -> str:
    """Text as it is in Markdown, on one line: no markup, HTML, link or end of a cell begins in it."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~&$!@:^])", r"\\\1", printable(text))
    return re.sub(r"(?i)\bwww\.", r"www\\.", escaped)
