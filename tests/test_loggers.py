"""Loggers have all of a run once, cost it nothing, and learn no secrets; `wandb` is a small module here that
writes down what it is told, or fails where a test says.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_resume import AtStep

from ssl_emp.commands import pretrain
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.loggers.base import About, own_place
from ssl_emp.loggers.evaluation import evaluated, evaluation_rows
from ssl_emp.loggers.feed import Feed, check_installed, close_all, how_to_look, tell_evaluation
from ssl_emp.loggers.secrets import without_secrets
from ssl_emp.loggers.serve import Delivery
from ssl_emp.run.report import Report, read_metrics

RECORDER = """
import getpass, json, os, sys, time

def say(what, value):
    if "torch" in sys.modules:
        raise AssertionError("a logger's process has torch")
    if os.environ.get("FAILS") == what:
        raise OSError(f"no {what} today, key {os.environ['MY_TOKEN']}")
    if os.environ.get("EXITS") == what:
        raise SystemExit(f"no {what} today")
    if os.environ.get("HANGS") == what:
        time.sleep(600)
    if os.environ.get("ASKS") == what:
        getpass.getpass("your key: ")
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps([what, value]) + "\\n")

class Run:
    def __init__(self, id):
        self.id, self.summary = id, self
    def log(self, figures, step):
        tables = {name: value.rows for name, value in figures.items() if isinstance(value, Table)}
        say("log", [step, figures | tables])
    def update(self, figures):
        say("summary", figures)
    def log_artifact(self, artifact):
        say("artifact", artifact.paths)
    def finish(self, exit_code):
        say("finish", exit_code)

class Artifact:
    def __init__(self, name, type):
        self.paths = [name, type]
    def add_dir(self, path):
        self.paths += sorted(os.listdir(path))
    def add_file(self, path):
        self.paths.append(os.path.basename(path))

class Table:
    def __init__(self, columns, data):
        self.rows = [columns, *data]

def init(id, **given):
    say("init", {"id": id, "mode": os.environ["WANDB_MODE"], **given})
    return Run(id)

if "torch" not in sys.modules:  # timm imports it too, in the process that trains
    say("import", None)
"""
ROWS = [{"epoch": n, "step": 4 * n, "loss": 3.0 - n, "nan": None, "inf": float("inf")} for n in (1, 2, 3)]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the recording `wandb` writes, a line a call."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("RECORD", str(tmp_path / "recorded.jsonl"))
    monkeypatch.setenv("MY_TOKEN", "open-sesame")
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    yield tmp_path / "recorded.jsonl"
    if getattr(sys.modules.get("wandb"), "say", None) is not None:  # imported by timm
        del sys.modules["wandb"]


def calls(recorded: Path, what: str) -> list[Any]:
    found = [json.loads(line) for line in recorded.read_text().splitlines()]
    return [value for name, value in found if name == what]


def make_run(folder: Path, epochs: int = 3) -> Path:
    """What a run leaves that loggers read."""
    (folder / "encoder").mkdir(parents=True)
    (folder / "loggers").mkdir()
    (folder / "encoder" / "model.safetensors").write_bytes(b"weights")
    config = {"epochs": 3, "data": {"source": "https://me:pass-word@host/images"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"command": ["x", "open-sesame"], "cpu_count": 2}))
    write_rows(folder, epochs)
    return folder


def write_rows(folder: Path, epochs: int) -> None:
    lines = [json.dumps(row | {"inf": None}) for row in ROWS[:epochs]]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"epoch": 9, "lo')


def write_evaluation(folder: Path, value: float = 70.5) -> None:
    row = {"encoder": str(folder), "evaluator": "knn", "data": "d", "metric": "top1 %", "seed": 0}
    rows = [row | {"protocol": f"cosine kNN, k={k}, T=0.1, bank 9", "value": value + k} for k in (5, 20)]
    rows += [row | {"encoder": f"{folder}/start", "protocol": "cosine kNN, k=5", "value": 10.0}]
    rows += [row | {"encoder": "random", "protocol": "cosine kNN, k=5", "value": 1.0}]
    rows += [row | {"protocol": "not judged: no labels", "value": None}]
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "knn.json").write_text(json.dumps(rows))
    (folder / "eval" / "linear.json").write_text("{")


# ---- what a logger is told


def test_the_row_of_the_start_reaches_a_logger(tmp_path: Path) -> None:
    """A run from weights measures them before its first step, as epoch 0."""
    run = make_run(tmp_path / "run", epochs=1)
    path = run / "metrics.jsonl"
    path.write_text('{"epoch": 0, "step": 0, "knn_train_split": 0.5}\n' + path.read_text())
    told = delivered(run, -1)
    assert [part[0] for part in told] == [0, 1, "encoder"] and told[0][1]["knn_train_split"] == 0.5
    assert delivered(run, None) == []


class Recorder:
    """A logger that keeps what it is told; `stored` is what it had before."""

    def __init__(self, stored: int | None = -1) -> None:
        self.stored, self.told = stored, list[Any]()

    def open(self, about: About, known: str | None) -> tuple[str, int | None]:
        self.about, self.known = about, known
        return known or "abc-1", self.stored

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        self.told.append((number, scalars))

    def evaluation(self, scalars: dict[str, float], rows: list[dict[str, Any]], epoch: int) -> None:
        self.told.append((epoch, scalars, len(rows)))

    def file(self, path: Path, name: str, kind: str) -> None:
        self.told.append((name, kind))

    def close(self, finished: bool) -> None:
        self.told.append(finished)


def delivered(run: Path, stored: int | None) -> list[Any]:
    logger = Recorder(stored)
    delivery = Delivery(logger, "wandb", run)
    delivery.rows()
    delivery.rest()
    return logger.told


def test_everything_reaches_a_logger_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=1)
    told = [(row["epoch"], {"step": row["step"], "loss": row["loss"]}) for row in ROWS]
    assert delivered(run, -1) == [told[0], ("encoder", "model")]
    write_rows(run, 3)
    write_evaluation(run)
    (run / "report.html").write_text("report")
    names = ("eval/knn/k5/top1_percent", "eval/knn/k20/top1_percent", "eval/start/knn/k5/top1_percent")
    values = dict(zip(names, (75.5, 90.5, 10.0), strict=True))
    assert delivered(run, None) == told[1:] + [(3, values, 5), ("report.html", "report")]
    # nothing is new
    assert delivered(run, None) == []
    # an epoch that ran again after a crash
    write_rows(run, 2)
    assert delivered(run, None) == []
    write_rows(run, 3)
    write_evaluation(run, 71.5)
    (run / "encoder" / "model.safetensors").write_bytes(b"others")
    assert [part[0] for part in delivered(run, None)] == [3, "encoder"]
    # the logger knows better: it lost an epoch, or everything
    assert delivered(run, 2) == told[2:]
    assert len(delivered(run, -1)) == 3 + 3


def test_a_state_that_is_none_is_no_state(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for state in (
        "[]",
        "{}",
        '{"id": "a/b", "epoch": 1, "sent": {}}',
        '{"id": "a", "epoch": "1", "sent": {}}',
    ):
        (run / "loggers" / "wandb.json").write_text(state)
        with pytest.raises(UserError, match="remove it"):
            delivered(run, None)


def test_names_of_numbers_are_the_same_for_every_run(tmp_path: Path) -> None:
    def named(folder: str, **row: Any) -> list[str]:
        given = {"encoder": folder, "value": 1.0, "metric": "top1 %", "protocol": "p", "data": "my data"}
        return list(evaluated([given | row], Path(folder)))

    for folder in ("runs/a", "/x/runs/a", "runs/a/"):
        assert named(folder, evaluator="linear") == ["eval/linear/top1_percent"]
    few = "few labels: 5 a class, 20 labels, 3 draws, "
    assert named("a", evaluator="fewshot", protocol=f"{few}logistic") == [
        "eval/fewshot/5_a_class/top1_percent"
    ]
    tuned = ["eval/fewshot/5_a_class/fine-tuned/top1_percent"]
    assert named("a", evaluator="fewshot", protocol=f"{few}fine-tuned 3 epochs") == tuned
    assert named("a", evaluator="transfer", data="../<b>\n") == ["eval/transfer/.._b/top1_percent"]
    assert named("a", evaluator="knn", value=True) == named("a", evaluator="knn", value="1") == []
    assert evaluation_rows(tmp_path) == []


def test_secrets_are_not_told() -> None:
    environment = {"HF_TOKEN": "hf_abcdef", "WANDB_API_KEY": "1", "HOME": "/home/me", "MONKEY": "bananas"}
    told = {
        "command": ["p.py", "x=hf_abcdef", "--api-key=abc", "monitor.token: abc", "s3://id:pa@b/c"],
        "home": ("/home/me", 1, None, True),
        "url": "https://h/?a=1&access_token=abc&b=2",
        "keys": "prune.policy=emp key=1 bananas",
    }
    assert without_secrets(told, environment) == {
        "command": ["p.py", "x=***", "--api-key=***", "monitor.token: ***", "s3://***@b/c"],
        "home": ["/home/me", 1, None, True],
        "url": "https://h/?a=1&access_token=***&b=2",
        "keys": "prune.policy=emp key=1 ***",
    }


# ---- its process


def test_a_run_is_told_by_a_process_of_its_own(recorded: Path, tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "my run"), list[str]()
    feed = Feed("wandb", run, said.append)
    for _ in range(100_000):  # more than a pipe holds: it never waits
        feed.news()
    feed.close(finished=False)
    assert not said and calls(recorded, "finish") == [1]
    (start,) = calls(recorded, "init")
    assert start["name"] == "my run" and start["mode"] == "offline" and start["resume"] == "allow"
    assert start["config"]["data"]["source"] == "https://***@host/images"
    assert start["config"]["environment"] == {"command": ["x", "***"], "cpu_count": 2}
    assert [step for step, _ in calls(recorded, "log")] == [1, 2, 3]
    write_evaluation(run)
    (run / "loggers" / "trackio.json").write_text("{}")  # whose package cannot be found
    tell_evaluation(run, said.append)
    again = calls(recorded, "init")[1]
    assert again["id"] == start["id"] and calls(recorded, "finish") == [1, 0]
    assert len(calls(recorded, "log")) == 4 and "eval/knn/k5/top1_percent" in calls(recorded, "summary")[0]
    assert calls(recorded, "artifact") == [[f"{start['id']}-encoder", "model", "model.safetensors"]]
    assert len(said) == 1 and "the logger trackio" in said[0]


@pytest.mark.parametrize("what", ["import", "init", "log", "artifact", "finish"])
def test_a_logger_that_fails_is_one_warning(
    what: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv({"init": "EXITS", "log": "ASKS"}.get(what, "FAILS"), what)
    run, said = make_run(tmp_path / "run"), list[str]()
    feed = Feed("wandb", run, said.append)
    feed.news()
    until = time.monotonic() + 30
    while what != "artifact" and what != "finish" and not said and time.monotonic() < until:
        time.sleep(0.02)
        feed.news()
    feed.close(finished=True)
    feed.close(finished=True)
    assert len(said) == 1 and "the logger wandb has stopped (" in said[0] and "open-sesame" not in said[0]
    assert ("EOF" if what == "log" else f"no {what} today") in said[0]
    assert "open-sesame" not in (run / "loggers" / "wandb.json").read_text() if what == "finish" else True


@pytest.mark.parametrize("what", ["init", "finish"])
def test_a_logger_that_hangs_is_left_in_time(
    what: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", what)
    said = list[str]()
    feeds = [Feed("wandb", make_run(tmp_path / str(n)), said.append, patience=3.0) for n in range(3)]
    processes = [feed.process for feed in feeds]
    began = time.monotonic()
    close_all(feeds, finished=True)
    assert 3 <= time.monotonic() - began < 8 and all(
        p is not None and p.poll() is not None for p in processes
    )
    assert len(said) == 3 and all("did not end within 3 seconds" in line for line in said)


def test_a_run_that_was_killed_is_told_to_its_last_row(recorded: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from ssl_emp.loggers.feed import Feed; "
        "Feed('wandb', Path(sys.argv[1]), print); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'packages'}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", program, str(make_run(tmp_path / "run"))]
    assert subprocess.run(command, env=environment).returncode == -9
    until = time.monotonic() + 60
    while not (recorded.exists() and calls(recorded, "finish")) and time.monotonic() < until:
        time.sleep(0.05)
    assert [step for step, _ in calls(recorded, "log")] == [1, 2, 3] and calls(recorded, "finish") == [1]


def test_a_place_that_cannot_be_written_to_is_one_warning(tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    for break_it in (
        lambda: (run / "loggers").symlink_to(tmp_path),
        lambda: (run / "loggers").write_text(""),
    ):
        run.mkdir()
        break_it()
        feed = Feed("wandb", run, said.append)
        feed.news()
        feed.close(finished=True)
        (run / "loggers").unlink()
        run.rmdir()
    assert len(said) == 2 and all("could not be started" in line for line in said)


def test_a_strangers_run_sends_nothing_elsewhere(recorded: Path, tmp_path: Path) -> None:
    """wandb would take a server from its settings, and send a key there; links lead out of the run."""
    run, said = make_run(tmp_path / "run"), list[str]()
    (run / "loggers" / "wandb.json").write_text('{"id": "a", "epoch": 0, "sent": {}}')
    (run / "loggers" / "wandb").mkdir()
    (run / "loggers" / "wandb" / "settings").write_text("base_url = https://elsewhere")
    tell_evaluation(run, said.append)
    assert len(said) == 1 and "wandb/settings is no file of a run" in said[0] and not calls(recorded, "init")
    (tmp_path / "elsewhere").mkdir()
    for number, path in enumerate(("trackio", "trackio/x", "trackio/a/b/x")):
        folder = tmp_path / str(number)
        (folder / path).parent.mkdir(parents=True)
        (folder / path).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="is a link"):
            own_place(folder, "trackio")
    (tmp_path / "3" / "trackio" / "a").mkdir(parents=True)
    (tmp_path / "3" / "trackio" / "a" / "x.db").hardlink_to(run / "config.yaml")
    with pytest.raises(UserError, match="other names"):
        own_place(tmp_path / "3", "trackio")


def test_only_the_first_rank_tells(recorded: Path, tmp_path: Path) -> None:
    report = Report(silent=True)
    report.attach(tmp_path / "run", ["tensorboard", "wandb"])
    report.metrics({"epoch": 1})
    report.close()
    assert not recorded.exists() and not (tmp_path / "run").exists()


# ---- the command


def test_a_missing_package_is_one_line_at_the_start(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package, logger in (("wandb", "wandb"), ("trackio", "trackio"), ("sqlalchemy", "mlflow")):
        monkeypatch.setitem(sys.modules, package, None)
        out = tmp_path / "run"
        for more in ([], ["--dry-run"]):
            words = ["--config", str(tiny_config), f"out={out}", f"monitor.loggers=[{logger}]", *more]
            assert pretrain.main(words) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"pip install {logger}" in error and not out.exists()


def test_a_folder_called_wandb_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match="pip install wandb"):
        check_installed(["wandb"])


@pytest.mark.parametrize(
    ("values", "loggers"),
    [
        ([], ["tensorboard"]),
        (["monitor.tensorboard=false"], []),
        (["monitor.tensorboard=true"], ["tensorboard"]),
        (["monitor.loggers=[wandb, tensorboard, wandb]"], ["wandb", "tensorboard"]),
        (["monitor.loggers=[wandb, tensorboard]", "monitor.tensorboard=false"], ["wandb"]),
        (["monitor.loggers=[wandb]", "monitor.tensorboard=true"], ["tensorboard", "wandb"]),
    ],
)
def test_the_key_of_before_is_understood(values: list[str], loggers: list[str]) -> None:
    assert load_config(None, values).monitor.loggers == loggers


@pytest.mark.parametrize("value", ["loggers=[wadnb]", "loggers=wandb", "tensorboard=2"])
def test_what_is_no_list_of_loggers_is_told(value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [f"monitor.{value}"])
    assert "loggers" in str(caught.value)


def test_how_to_look_at_it(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    assert how_to_look("wandb", run, {}).endswith(f"wandb sync '{run}/loggers/wandb'/offline-run-*")
    assert f"'sqlite:///{run}/loggers/mlflow/mlflow.db'" in how_to_look("mlflow", run, {})
    assert f"TRACKIO_DIR='{run}/loggers/trackio'" in how_to_look("trackio", run, {})
    for name, variable in (("wandb", "WANDB_MODE"), ("mlflow", "MLFLOW_TRACKING_URI")):
        assert variable in how_to_look(name, run, {variable: "http://me:secret@host"})
        assert "secret" not in how_to_look("mlflow", run, {variable: "http://me:secret@host"})


@pytest.mark.whole
def test_a_run_is_told_once_however_often_it_is_stopped(
    recorded: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch, gone back behind its checkpoints, resumed twice, trained longer."""
    monkeypatch.setattr(pretrain, "Stop", AtStep)
    monkeypatch.setattr(AtStep, "stop", 20)
    out = tmp_path / "run"
    words = [f"out={out}", "epochs=4", "checkpoint.every_steps=1", "monitor.loggers=[wandb]"]
    assert pretrain.main(["--config", str(tiny_config), *words]) == 143
    for path in sorted((out / "checkpoints").glob("step_*.pt")):
        path.unlink()
    monkeypatch.setattr(AtStep, "stop", 10)
    assert pretrain.main(["--resume", str(out)]) == 143
    monkeypatch.setattr(AtStep, "stop", 0)
    assert pretrain.main(["--resume", str(out), "monitor.loggers=[]"]) == 0
    assert pretrain.main(["--resume", str(out), "epochs=5"]) == 0
    rows = read_metrics(out)
    logged = calls(recorded, "log")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    timed = re.compile("seconds|images_per_second")
    for row, (_, told) in zip(rows, logged, strict=True):
        wanted = {name: value for name, value in row.items() if value is not None and not timed.search(name)}
        assert {name: value for name, value in told.items() if not timed.search(name)} == wanted
    assert len({start["id"] for start in calls(recorded, "init")}) == 1
    assert calls(recorded, "finish") == [1, 1, 0]
    assert "warning" not in (out / "train.log").read_text()
