"""The table of commands: help and mistakes without torch, and the command that a person typed in messages."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ssl_emp import __main__
from ssl_emp._version import __version__
from ssl_emp.commands.arguments import EVALUATOR_NAMES, evaluate_parser
from ssl_emp.commands.checks import FOR_DEVELOPERS
from ssl_emp.commands.eval_config import TransferConfig
from ssl_emp.commands.evaluate import ALL_EVALUATORS
from ssl_emp.commands.transfer import read_suite
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.shipped import shipped_configs
from ssl_emp.text import command_line

ROOT = Path(__file__).parent.parent

# everything that takes longer to import than the help takes to read
HEAVY = ("torch", "torchvision", "lightly", "pyarrow", "pydantic", "PIL", "yaml", "numpy")


def test_help_of_every_command_comes_without_torch() -> None:
    code = f"""
import contextlib, io, json, sys
from ssl_emp import __main__
said = {{}}
for words in [["--help"], ["--version"], ["pretrian"], ["pretrain", "--confi"], ["evaluate", "predict", "-h"],
              *([name, "--help"] for name in __main__.COMMANDS)]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            __main__.main(words)
        except SystemExit as end:
            assert end.code == 0, words
    said[" ".join(words)] = out.getvalue()
print(json.dumps([said, [name for name in {HEAVY} if name in sys.modules]]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, imported = json.loads(found.stdout)
    assert imported == []
    assert all(f"  {name} " in said["--help"] for name in __main__.COMMANDS)
    for name in __main__.COMMANDS:
        assert said[f"{name} --help"].startswith(f"usage: ssl-emp {name} "), said[f"{name} --help"]
    assert said["evaluate predict -h"].startswith("usage: ssl-emp evaluate predict CLASSIFIER IMAGES ")
    assert said["--version"] == f"ssl_emp {__version__}\n"
    assert said["pretrian"] == "error: there is no command 'pretrian'. fix: did you mean pretrain?\n"
    assert said["pretrain --confi"].endswith("expected one argument. fix: see --help\n")


def test_no_command_and_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [""], ["\x1b[2J"], ["zzz" * 100]):
        assert __main__.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and ". fix: use one of pretrain, " in said and said.count("\n") == 1
        assert "\x1b" not in said and len(said) < 300


@pytest.mark.parametrize(
    ("started", "pretrain", "embed"),
    [
        ("/opt/bin/ssl-emp", "ssl-emp pretrain", "ssl-emp embed"),
        ("pretrain.py", "python pretrain.py", "python -m ssl_emp embed"),
        ("evaluate.py", "python pretrain.py", "python -m ssl_emp embed"),
        ("../a clone/evaluate.py", "python '../a clone/pretrain.py'", "python -m ssl_emp embed"),
        ("/lib/ssl_emp/__main__.py", "python -m ssl_emp pretrain", "python -m ssl_emp embed"),
        ("/lib/pytest/__main__.py", "ssl-emp pretrain", "ssl-emp embed"),
        ("-c", "ssl-emp pretrain", "ssl-emp embed"),
        ("", "ssl-emp pretrain", "ssl-emp embed"),
    ],
)
def test_messages_name_the_command_that_was_typed(
    started: str, pretrain: str, embed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert (command_line("pretrain"), command_line("embed")) == (pretrain, embed)


def test_the_help_of_evaluate_names_every_evaluator() -> None:
    assert EVALUATOR_NAMES == ALL_EVALUATORS
    assert all(f"`{name}`" in evaluate_parser().format_help() for name in ALL_EVALUATORS)


def test_the_page_about_installing_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    extras = set(project["optional-dependencies"]) - set(FOR_DEVELOPERS)
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == extras


# ---- shipped configs


def test_a_shipped_config_by_name_and_a_path_that_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no config
    by_name = load_config("demo", [])
    assert by_name == load_config(ROOT / "configs" / "demo.yaml", []) and by_name.out == "runs/demo"
    (tmp_path / "cifar10_emp").write_text("epochs: 3\n")
    assert load_config("cifar10_emp", []).epochs == 3 != load_config("cifar100_emp", []).epochs
    with pytest.raises(UserError, match="cannot read demo.yaml.*a name that `ssl-emp configs` lists"):
        load_config("demo.yaml", [])  # a path, whatever ships
    with pytest.raises(UserError, match="no file foldr_emp, and no config of .*did you mean folder_emp\\?"):
        load_config("foldr_emp", [])
    with pytest.raises(UserError, match="give the path of a YAML file, or one of cifar100_emp, "):
        load_config("", [])


def test_a_shipped_suite_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_suite(TransferConfig().suite).name == "small" and read_suite("simclr").name == "simclr"
    (tmp_path / "small").write_text("name: mine\ntargets: [{name: x, source: mnist5k}]\n")
    assert read_suite("small").name == "mine"
    with pytest.raises(UserError, match="no suite of that name .*did you mean simclr\\?"):
        read_suite("simcrl")
    with pytest.raises(UserError, match="demo.*no suite of that name"):
        read_suite("demo")


def test_configs_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["configs"]) == 0
    listed = capsys.readouterr().out
    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    assert re.findall(r"^  (\w+) +\S", listed, re.MULTILINE) == [
        *(path.stem for path in shipped if path.parent.name == "configs"),
        *(path.stem for path in shipped if path.parent.name == "suites"),
    ]
    assert max(map(len, listed.splitlines())) <= 140
    assert __main__.main(["configs", "demo", "small"]) == 0
    assert "ssl-emp pretrain --config demo.yaml\n" in capsys.readouterr().out
    assert (tmp_path / "demo.yaml").read_bytes() == (ROOT / "configs" / "demo.yaml").read_bytes()
    assert (tmp_path / "small.yaml").read_bytes() == (ROOT / "configs" / "suites" / "small.yaml").read_bytes()
    (tmp_path / "demo.yaml").write_text("mine")
    for words, line in (
        (["simclr", "demo"], "demo.yaml exists. fix: give --out PLACE"),
        (["demp"], "no config called 'demp' comes with ssl_emp. fix: did you mean demo?"),
        (["../../etc/passwd"], "no config called '../../etc/passwd' comes with ssl_emp. fix: name one of"),
        (["demo", "--out", "small.yaml/x"], "cannot write small.yaml/x"),
        (["--out", "x"], "nothing is named. fix: name a config"),
    ):
        assert __main__.main(["configs", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and line in said and said.count("\n") == 1, said
    assert (tmp_path / "demo.yaml").read_text() == "mine" and not (tmp_path / "simclr.yaml").exists()
    assert __main__.main(["configs", "demo", "--out", "new/a b.yaml"]) == 0
    assert "ssl-emp pretrain --config 'new/a b.yaml'" in capsys.readouterr().out
    assert __main__.main(["configs", "demo", "simclr", "--out", "new"]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a b.yaml", "demo.yaml", "simclr.yaml"}


def test_no_suite_has_the_name_of_a_config() -> None:
    assert not shipped_configs().keys() & shipped_configs(suites=True).keys()
