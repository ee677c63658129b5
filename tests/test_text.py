"""Names of strangers are text wherever they are shown, copied into a shell, or taken for a path."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_emp.commands import embed, evaluate, pretrain
from ssl_emp.commands.eval_config import EvalConfig, check
from ssl_emp.config import check_config, flatten
from ssl_emp.errors import UserError
from ssl_emp.text import decodable, home, printable, quoted, shorten

# rich's markup and emoji, escape sequences of 7 and 8 bits, what forges a line, what turns a line about or
# hides in it
HOSTILE = [
    "[bold]x[/bold]",
    "a[/b]",
    ":apple:",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31mred",
    "one\ntwo\rthree\x0bfour\x85five\u2028six",
    "photo\u202egnp.exe",
    "zero\u200bwidth\u2060\ufeff",
    "del\x7f\x00\x08\x08",
    "\udcff is no UTF-8",
    "tab\tand\u00a0space",
    "$5^^$",
]


@given(st.text())
def test_printable_text_is_one_line_that_moves_nothing(text: str) -> None:
    line = printable(text)
    assert line.isprintable() and line.splitlines() in ([line], []) and printable(line) == line
    line.encode("utf-8")
    assert line == text or not text.isprintable(), "what can be printed stays as it is"
    assert len(shorten(text, 20)) <= 20 and shorten(text, 20).isprintable()


@pytest.mark.parametrize(
    "name",
    [*HOSTILE, "a b", "it's", '"q"', "$HOME", "`id`", "-rf", "!!", "~", "#x", "*", "é😀", "\\n", "a;b|c&d>e"],
)
def test_a_quoted_path_copied_to_a_shell_is_that_path(name: str) -> None:
    name = name.replace("\x00", "")
    word = quoted(name)
    assert word.isprintable()
    got = subprocess.run(["bash", "-c", f"printf %s {word}"], stdout=subprocess.PIPE, check=True).stdout
    assert os.path.normpath(os.fsdecode(got)) == name and not got.startswith(b"-")


def test_file_names_of_any_bytes_are_text() -> None:
    assert decodable(os.fsdecode(b"\xff\xfe.jpg")) == "\\xff\\xfe.jpg" and decodable("é") == "é"


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


PATHS = ("out", "data.source", "data.test_source", "data.download_dir", "data.cache_dir", "prune.indices")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/x", "{home}/x"),
        ("~", "{home}"),
        ("./~/x", "./~/x"),
        ("a/~", "a/~"),
        ("~root/x", "{root}/x"),
        ("/a~/x", "/a~/x"),
        ("x~", "x~"),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(written: str, meant: str, own_home: str) -> None:
    meant = meant.format(home=own_home, root=os.path.expanduser("~root"))
    assert home(written) == meant
    for key in PATHS:
        section, _, name = key.rpartition(".")
        given = {section: {name: written}} if section else {name: written}
        if key == "prune.indices":
            given["prune"]["policy"] = "indices"  # type: ignore[index]
        assert flatten(check_config(given, "here").model_dump())[key] == meant, key
    values = {
        "data": {"source": written},
        "transfer": {"suite": written, "root": written},
        "cache_dir": written,
    }
    config = check(EvalConfig, values, "here")
    assert {config.data.source, config.transfer.suite, config.transfer.root, config.cache_dir} == {meant}


def test_every_text_of_the_settings_that_is_a_path_is_one() -> None:
    """A key added later, of a plain string, is either no path or named here."""
    no_paths = {"device", "data.kind", "optimizer.name"}
    for config in (check_config({}, "here"), EvalConfig()):
        for key in [
            key
            for key, value in flatten(config.model_dump()).items()
            if isinstance(value, str) and key not in no_paths
        ]:
            section, _, name = key.rpartition(".")
            given = {section: {name: "~/x"}} if section else {name: "~/x"}
            try:
                found = flatten(type(config).model_validate(given).model_dump())[key]
            except ValueError:  # one of several words
                continue
            assert found == os.path.expanduser("~/x"), key


@pytest.mark.parametrize("key", PATHS)
def test_nobodys_home_folder_is_refused(key: str) -> None:
    section, _, name = key.rpartition(".")
    given = {name: "~nobody-here/x"} | ({"policy": "indices"} if section == "prune" else {})
    with pytest.raises(UserError, match=r"~nobody-here is nobody's home folder here; write \./~nobody-here"):
        check_config({section: given} if section else given, "here")


@pytest.mark.parametrize("long", ["x" * 256, "é" * 128, "a/" * 2048, "~/" + "x" * 256])
def test_a_path_that_no_file_can_have_is_one_line(
    long: str, own_home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert home("x" * 255 + "/" + "é" * 127)
    for main, *words in (
        (pretrain.main, "--resume", long),
        (pretrain.main, "--config", "demo", f"out={long}"),
        (evaluate.main, long, "knn"),
        (evaluate.main, "pixels", "knn", "--out", long),
        (evaluate.main, "predict", long, "images"),
        (embed.main, long, "images", "--out", "v.parquet"),
        (embed.main, "encoder", long, "--out", "v.parquet"),
        (embed.main, "encoder", "images", "--out", long),
    ):
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "is longer than a path can be" in line


def test_a_tilde_that_the_shell_left_alone(own_home: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--config=~/c.yaml"], ["--resume=~/run"]):
        assert pretrain.main(arguments) == 2
        assert f"{own_home}/" in capsys.readouterr().err
    assert pretrain.main(["--resume=~nobody-here/run"]) == 2
    assert "./~nobody-here" in capsys.readouterr().err


def test_half_a_character_is_no_path() -> None:
    with pytest.raises(UserError, match="can be encoded"):
        check_config({"out": "runs/\ud800"}, "here")
