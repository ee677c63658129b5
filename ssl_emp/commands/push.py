"""`ssl-emp push ENCODER user/name`: an encoder to the Hugging Face hub, in timm's layout.

Three files go there: the weights, config.json and the model card. The words of the command are here, without
torch; what it does begins in `run`.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from linear_eval.files import write_atomically
from ssl_emp.errors import Parser, RunFailed, UserError, path_argument
from ssl_emp.run.ending import ended
from ssl_emp.run.streams import put
from ssl_emp.text import command_line, printable, quoted

USAGE = "ENCODER user/name [--license ID] [--public] [--dry-run]"
DESCRIPTION = """Upload an encoder to the Hugging Face hub, in timm's layout.

ENCODER    a run directory, or an encoder directory (model.safetensors and config.json)
user/name  the repository; it is made where it is not there, private unless --public is given

Exactly three files are uploaded, in one commit: model.safetensors (the encoder's weights), config.json and
README.md (the model card). No optimizer state, no images, no table of samples. --dry-run lists them and does
nothing else. The token is that of HF_TOKEN or of `hf auth login`; it is never shown.

Exit codes: 0 done, 2 you can fix it, 3 the hub could not be reached and the same command can be given again.
"""
FILES = ("README.md", "config.json", "model.safetensors")


def parser() -> Parser:
    made = Parser(
        prog=command_line("push"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{command_line('push')} {USAGE}",
    )
    made.add_argument("encoder", metavar="ENCODER", type=path_argument)
    made.add_argument("repo_id", metavar="user/name")
    made.add_argument(
        "--license", metavar="ID", help="of the weights: apache-2.0, mit, cc-by-nc-4.0, other ..."
    )
    made.add_argument("--public", action="store_true", help="a new repository can be read by everyone")
    made.add_argument("--dry-run", action="store_true", help="list what would be uploaded, change nothing")
    return made


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: run(parser().parse_args(argv)), "stopped; nothing was committed")


def run(arguments: argparse.Namespace) -> None:
    """The whole command. Raises UserError, and RunFailed where the hub cannot be reached."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError("push needs the package huggingface_hub", "pip install huggingface_hub") from error
    repo_id = checked_repo(arguments.repo_id)
    card, folder = prepare(Path(arguments.encoder), repo_id, arguments.license)
    files: dict[str, bytes | Path] = {name: folder / name for name in FILES} | {"README.md": card.encode()}
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in files.items()}
    would = "would upload" if arguments.dry_run else "uploading"
    width = max(map(len, sizes))
    seen_by = "public" if arguments.public else "private"
    say(f"{would} to {repo_id} ({seen_by}, unless it is there already):")
    for name, size in sizes.items():
        say(f"  {name:{width}}  {size:>13,} bytes")
    if arguments.dry_run:
        return
    token = hub.get_token()
    if token is None:
        raise UserError("there is no token for the hub", "set HF_TOKEN, or log in: hf auth login")
    from ssl_emp.commands.card import is_ours

    url = upload(repo_id, files, private=not arguments.public, token=token)
    with suppress(OSError):  # a folder that cannot be written to; else the card there keeps the licence
        if is_ours(card):
            write_atomically(folder / "README.md", card.encode())
    say(f"done: {url}")


def say(line: str) -> None:
    put("stdout", f"{printable(line)}\n")


def checked_repo(repo_id: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it has no user before the name")
    except HFValidationError as error:
        fix = "give user/name: letters, digits, -, _ and ."
        raise UserError(f"{repo_id!r} is no name of a repository", fix) from error
    return repo_id


def prepare(path: Path, repo_id: str, licence: str | None) -> tuple[str, Path]:
    """(the card, the encoder's folder), once both are known to be fit to be read by others."""
    from ssl_emp.commands.card import NAME, card_for_push
    from ssl_emp.commands.evaluators import weights_hash
    from ssl_emp.commands.subjects import is_run
    from ssl_emp.model import load_encoder
    from ssl_emp.safe_files import read_text

    if not path.is_dir():
        raise UserError(f"{path} is no folder", "give a run directory or an encoder directory")
    folder = path / "encoder" if (path / "encoder").is_dir() else path
    parent = folder.resolve().parent
    run = parent if folder.resolve().name == "encoder" and is_run(parent) else None
    check_arch(folder)
    weights = weights_hash(load_encoder(folder))
    card = card_for_push(folder, run, weights, licence, repo_id)
    for name, text in ((NAME, card), ("config.json", read_text(folder / "config.json"))):
        check_private(folder / name, text, folder)
    return card, folder


def check_arch(folder: Path) -> None:
    """Raise UserError for a network that no reader of the hub could build."""
    from ssl_emp.safe_files import read_json

    config = folder / "config.json"
    found: Any = read_json(config) if config.is_file() else {}
    spec = found.get("ssl_emp") if isinstance(found, dict) else None
    arch = spec.get("arch") if isinstance(spec, dict) else None
    if isinstance(arch, str) and arch.startswith("custom:"):
        what = f"{folder} is of {arch}, a network from Python, which nobody could build from the hub"
        fix = f"upload it beside the code of the network: hf upload user/name {quoted(folder)}"
        raise UserError(what, fix)


def check_private(file: Path, text: str, path: Path) -> None:
    """Raise UserError where a text names the home folder, or where the encoder lies on this machine."""
    places = {os.path.expanduser("~"), os.path.abspath(path), os.path.realpath(path)} - {"/", "~"}
    for place in sorted(places, key=len):
        if place in text:
            raise UserError(f"{file} holds {place}, a path of this machine", "take it out, and push again")


def upload(repo_id: str, files: dict[str, bytes | Path], *, private: bool, token: str) -> str:
    """Make the repository where it is not there, and commit the files; the address of the commit."""
    import sys
    import warnings

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    from ssl_emp._version import __version__

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="ssl_emp", library_version=__version__, token=token)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
        for name, data in files.items()
    ]
    with hub_errors(repo_id, token), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a card without front matter, and of the client itself
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message="Upload an encoder of ssl_emp")
    return str(commit.commit_url)


@contextmanager
def hub_errors(repo_id: str, token: str) -> Iterator[None]:
    """The client's errors as a line each, without the token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(
            "the hub's client is offline", "take HF_HUB_OFFLINE out of the environment"
        ) from error
    except Exception as error:  # HTTP, connections and checks of the card have no common type
        cause: BaseException = error
        while cause.__cause__ is not None:  # of an upload the reason is inside
            cause = cause.__cause__
        # a refused card is told over several lines
        reason = " ".join(str(cause).split()).replace(token, "***")[:300] or type(cause).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            fix = f"use a token that may write to {repo_id}: set HF_TOKEN, or hf auth login"
            raise UserError(f"the hub refuses the token ({reason})", fix) from error
        if isinstance(error, ValueError) or (status is not None and 400 <= status < 500 and status != 429):
            raise UserError(f"the hub refuses it ({reason})", "correct what it names") from error
        what = f"the hub could not be reached or failed ({type(error).__name__}: {reason})"
        raise RunFailed(f"{what}; nothing was committed. fix: give the same command again") from error
