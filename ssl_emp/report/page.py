"""Plain data -> one HTML file that needs nothing else: no network, no second file, no library.

Nothing of the data is ever part of the markup. It lies in the page as JSON in which no character can end the
element around it, and the page's script shows it as text only. The page's own policy (Content-Security-
Policy) allows the one style and the one script that it was written with, by their sha256, and pictures that
are in the file: whatever a name of a file might hold, it cannot run and it cannot ask a server.
"""

import base64
import hashlib
import html
import re
from importlib.resources import files
from typing import Any

from ssl_emp.safe_files import as_json

MARK = '<meta name="generator" content="ssl_emp report">'  # a file with it was written here
HOLE = re.compile(r"@@([a-z_]+)@@")


def page(data: dict[str, Any], title: str) -> str:
    """The file's text. `data` holds what JSON can: see `ssl_emp.commands.report_data.gather`."""
    style, script = _part("page.css"), _part("page.js")
    parts = {
        "mark": MARK,
        "title": html.escape(title),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "style": style,
        "script": script,
        "data": script_json(data),
    }
    # one pass over the template alone: what is filled in is not searched again
    return HOLE.sub(lambda hole: parts[hole[1]], _part("page.html"))


def script_json(data: Any) -> str:
    """JSON that may stand in a <script>: `</script`, `<!--` and U+2028 cannot occur in it.

    Outside of strings JSON has no `<`, `>` and `&`, and in strings `\\u003c` stands for `<`.
    """
    text = as_json(data)  # ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
