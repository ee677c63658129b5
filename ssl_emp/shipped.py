"""The configs that come with the package, by name: `demo` for pretraining, `small` for a transfer suite.

In a clone they are the folder configs/. Building a wheel copies that to ssl_emp/configs/ (setup.py).
"""

import os
from pathlib import Path

from linear_eval.errors import did_you_mean
from ssl_emp.errors import UserError
from ssl_emp.text import shorten

PACKAGE = Path(__file__).parent


def configs_folder() -> Path:
    inner = PACKAGE / "configs"
    return inner if inner.is_dir() else PACKAGE.parent / "configs"


def shipped_configs(suites: bool = False) -> dict[str, Path]:
    """Name -> file, in the order of the names: configs for pretraining, or transfer suites."""
    folder = configs_folder() / "suites" if suites else configs_folder()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(given: str | Path, suites: bool = False) -> Path:
    """The file that a path or the name of a shipped config stands for; what is there under a path wins.

    Raises:
        UserError: there is neither. For a path (`x/y`, `x.yaml`) that is not there, opening it will tell.
    """
    name = os.fspath(given)
    is_name = os.path.basename(name) == name and not os.path.splitext(name)[1]
    if not is_name or (os.path.exists(name) and not os.path.isdir(name)):
        return Path(given)
    known = shipped_configs(suites)
    if name not in known:
        kind = "suite" if suites else "config"
        what = f"there is no file {shorten(name)}, and no {kind} of that name comes with ssl_emp"
        otherwise = f"give the path of a YAML file, or one of {', '.join(known)}"
        raise UserError(what, did_you_mean(name, known, otherwise))
    return known[name]
