"""`python -m ssl_emp COMMAND ...`: the commands that need no clone of the repository."""

import importlib
import sys

COMMANDS = {"embed": "images -> a parquet file of their vectors"}  # each is a module of ssl_emp.commands
USAGE = "python -m ssl_emp COMMAND [...], python -m ssl_emp COMMAND --help"


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        print(f"usage: {USAGE}\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        return 0
    if not words or words[0] not in COMMANDS:
        from linear_eval.errors import did_you_mean
        from ssl_emp.text import printable, shorten

        what = f"there is no command {shorten(words[0])!r}" if words else "no command named"
        fix = did_you_mean(words[0] if words else "", COMMANDS, f"use one of {', '.join(COMMANDS)}: {USAGE}")
        print(printable(f"error: {what}. fix: {fix}"), file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"ssl_emp.commands.{words[0]}").main(words[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
