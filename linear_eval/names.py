"""Names of classes, encoders and suites as plain text in pictures and tables."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes what begins so for a formula


def printable(text: str) -> str:
    """One line; what cannot be printed is escaped. As `ssl_emp.text.printable`: this package stands alone."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shorten(text: str, limit: int = 40) -> str:
    """`printable` and at most `limit` characters: a picture grows with the longest name in it."""
    line = printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown_cell(text: str) -> str:
    """In a table of Markdown: one line, without an end of the cell."""
    return printable(text).replace("|", "\\|")


def csv_cell(text: str) -> str:
    """For a table in a spreadsheet: an apostrophe before what it would take for a formula, and run."""
    return f"'{text}" if text.startswith(FORMULA) else text
