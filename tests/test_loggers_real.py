"""What wandb, MLflow and trackio have kept of a run, read back from their own files without a network.

Where a package is missing its test is skipped: `pip install -e '.[wandb,mlflow,trackio]'`.
"""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_loggers import ROWS, make_run, write_evaluation, write_rows

from ssl_emp.loggers.feed import Feed, tell_evaluation

pytestmark = pytest.mark.slow
SECRETS = ("open-sesame", "pass-word", "0123456789abcdef")
TOLD = {row["epoch"]: {"step": row["step"], "loss": row["loss"]} for row in ROWS}
NUMBERS = {"eval/knn/k5/top1_percent": 75.5, "eval/knn/k20/top1_percent": 90.5}


@pytest.fixture
def told(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after two epochs, resumed to its end and evaluated, as the logger was told."""
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable in [v for v in os.environ if v.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("MY_TOKEN", "open-sesame")
    monkeypatch.setenv("WANDB_API_KEY", 3 * "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):  # whatever asks for a network gets none
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    run, said = make_run(tmp_path / "my run", epochs=2), list[str]()
    (run / "report.html").write_text("<title>report</title>")
    for finished in (False, True):
        feed = Feed(name, run, said.append, patience=200)
        feed.news()
        feed.close(finished)
        write_rows(run, 3)
    write_evaluation(run)
    tell_evaluation(run, said.append)
    assert not said, (run / "loggers" / f"{name}.log").read_text()
    kept = b"".join(path.read_bytes() for path in (run / "loggers").rglob("*") if path.is_file())
    assert not [secret for secret in SECRETS if secret.encode() in kept]
    return run


def state(run: Path, name: str) -> dict[str, Any]:
    found = json.loads((run / "loggers" / f"{name}.json").read_text())
    assert found["epoch"] == 3 and found["sent"].keys() == {"encoder", "report.html", "evaluation"}
    return found


def read_back(program: str, **variables: str) -> Any:
    """The JSON that a program prints last, in a process of its own, as the packages warn of many things."""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MLFLOW = """
import json
from mlflow import MlflowClient
client = MlflowClient()
(experiment,) = client.search_experiments(filter_string="name = 'ssl_emp'")
(run,) = client.search_runs([experiment.experiment_id])
curves = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
          for name in ("step", "loss")}
about = [run.info.run_id, run.info.run_name, run.info.status]
print(json.dumps([about, curves, run.data.metrics, run.data.params]))
"""


@pytest.mark.parametrize("told", ["mlflow"], indirect=True)
def test_mlflow_has_the_run(told: Path) -> None:
    place = told / "loggers" / "mlflow"
    uri = f"sqlite:///{place}/mlflow.db"
    about, curves, metrics, params = read_back(MLFLOW, MLFLOW_TRACKING_URI=uri, MLFLOW_DISABLE_TELEMETRY="1")
    run_id = state(told, "mlflow")["id"]
    assert about == [run_id, "my run", "FINISHED"]
    assert curves == {name: [[n, row[name]] for n, row in TOLD.items()] for name in ("step", "loss")}
    assert NUMBERS.items() <= metrics.items() and params["data.source"] == "https://***@host/images"
    files = place / "artifacts" / run_id / "artifacts"
    kept = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    described = {"config.yaml", "environment.json", "evaluation.json"}
    assert kept == described | {"encoder/model.safetensors", "report.html"}
    # moved, or a stranger's: its database says where files go
    moved, said = told.rename(told.with_name("moved")), list[str]()
    write_evaluation(moved, 80.0)
    tell_evaluation(moved, said.append)
    assert len(said) == 1 and "keeps its files elsewhere" in said[0] and not told.exists()


TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("ssl_emp")
files = str(SQLiteStorage.get_run_artifacts("ssl_emp", run.name, run.id))
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("ssl_emp", run.name), files]))
"""


@pytest.mark.parametrize("told", ["trackio"], indirect=True)
def test_trackio_has_the_run(told: Path) -> None:
    place = str(told / "loggers" / "trackio")
    name, config, logs, files = read_back(TRACKIO, TRACKIO_DIR=place, HF_HUB_OFFLINE="1")
    assert name == state(told, "trackio")["id"] and name.startswith("my_run-")
    assert config["data.source"] == "https://***@host/images" and config["environment.cpu_count"] == 2
    rows = {log["step"]: (log["train_step"], log["loss"]) for log in logs if "loss" in log}
    assert rows == {n: (row["step"], row["loss"]) for n, row in TOLD.items()} and len(logs) == 4
    assert NUMBERS.items() <= logs[-1].items()
    for file in ("encoder", "report.html", "evaluation.json"):
        assert f"{name}-{file}" in files


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: the log format of LevelDB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.parametrize("told", ["wandb"], indirect=True)
def test_wandb_has_the_run(told: Path) -> None:
    files = sorted((told / "loggers" / "wandb").glob("offline-run-*/*.wandb"))
    found = [list(records(file)) for file in files]
    assert len(found) == 3
    runs = [record.run for part in found for record in part if record.HasField("run")]
    assert {run.run_id for run in runs} == {state(told, "wandb")["id"]}
    assert {run.project for run in runs} == {"ssl_emp"} and {run.display_name for run in runs} == {"my run"}
    config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert config["data"]["source"] == "https://***@host/images" and config["environment"]["cpu_count"] == 2

    def values(items: Any) -> dict[str, Any]:
        return {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}

    history = [values(r.history.item) for part in found for r in part if r.HasField("history")]
    rows = [(row["epoch"], row["step"], row["loss"]) for row in history if "loss" in row]
    assert rows == [(n, row["step"], row["loss"]) for n, row in TOLD.items()]
    summary: dict[str, Any] = {}
    for record in (record for part in found for record in part if record.HasField("summary")):
        summary |= values(record.summary.update)
    assert NUMBERS.items() <= summary.items() and summary["evaluation/nrows"] == 5
    exits = [r.exit.exit_code for part in found for r in part if r.HasField("exit")]
    assert exits == [1, 0, 0]
    artifacts = re.findall(r"name: \"\w+-(encoder|report.html)\"", "".join(map(str, found)))
    assert set(artifacts) == {"encoder", "report.html"}
