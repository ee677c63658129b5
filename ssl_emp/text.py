"""What others named (files, classes, settings, messages of libraries) as text for people: one line, nothing
of it acted upon.

A terminal, a log, a table or a picture shows such text through `printable`; a command to copy names paths
through `quoted`.
"""

import os
import shlex


def printable(text: str) -> str:
    """One line, whatever a file's name holds: what cannot be printed, or would move what can, is escaped
    (`\\x1b`, `\\u202e`).
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shorten(text: str, limit: int = 60) -> str:
    """At most `limit` characters of a text that someone typed, on one line."""
    line = printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def decodable(path: str) -> str:
    """A file's name as text that can be encoded anywhere; bytes that are not UTF-8 become \\xNN. It may hold
    any character.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as a word of a shell's command line, printable too: copied to bash, zsh or ksh, it names that
    path.

    A leading dash gets `./` in front, so that no program takes it for an option.
    """
    text = os.fspath(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_in_ansi_quotes, text)) + "'"


def _in_ansi_quotes(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    return (
        character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
    )


def home(path: str) -> str:
    """`~/x` and `~user/x` as paths in that home folder, all else as it is; `./~` is a file or folder of that
    name.

    Raises:
        ValueError: there is no such user, so that a folder called `~user` would be made here.
    """
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        user = path.partition("/")[0]
        raise ValueError(
            f"{user} is nobody's home folder here; write ./{user} for a file or folder of that name"
        )
    return found
