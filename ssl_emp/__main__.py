"""`ssl-emp COMMAND ...`, and `python -m ssl_emp COMMAND ...`: one table of commands."""

import importlib
import sys

from ssl_emp._version import __version__
from ssl_emp.commands.arguments import PARSERS
from ssl_emp.errors import UserError
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.text import command_line, printable, shorten

# Each is a module of ssl_emp.commands with a function `main(argv) -> exit code`. It imports torch and the
# like in that function only, or has its parser in ssl_emp/commands/arguments.py: help and mistyped words
# are answered at once.
COMMANDS = {
    "pretrain": "images -> a run: an encoder, and what was trained on",
    "evaluate": "encoders -> a table of accuracies",
    "report": "runs -> one HTML file: what they did, and which images they trained on",
    "embed": "images -> a parquet file of their vectors",
    "export": "an encoder -> one file, ONNX or torch.export, that needs no ssl_emp",
    "push": "an encoder -> the Hugging Face hub, with its model card",
    "configs": "the configs that come with ssl_emp: listed, or copied to be changed",
    "doctor": "is this machine ready, and what to do where it is not",
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    prepare_streams()
    usage = f"{command_line('COMMAND')} [...], {command_line('COMMAND')} --help"
    if words[:1] in (["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
        put("stdout", "\n".join([f"usage: {usage}", "", *lines, ""]))
        return 0
    if words[:1] == ["--version"]:
        put("stdout", f"ssl_emp {__version__}\n")
        return 0
    try:
        if not words or words[0] not in COMMANDS:
            raise _no_such(words, usage)
        if words[0] in PARSERS:
            PARSERS[words[0]](words[1:]).parse_intermixed_args(words[1:])  # ends here for --help
    except UserError as error:
        put("stderr", f"error: {printable(str(error))}\n")
        return 2
    code: int = importlib.import_module(f"ssl_emp.commands.{words[0]}").main(words[1:])
    return code


def _no_such(words: list[str], usage: str) -> UserError:
    from linear_eval.errors import did_you_mean

    what = f"there is no command {shorten(words[0])!r}" if words else "no command named"
    otherwise = f"use one of {', '.join(COMMANDS)}: {usage}"
    return UserError(what, did_you_mean(words[0] if words else "", COMMANDS, otherwise))


if __name__ == "__main__":
    sys.exit(main())
