"""The grid: cells multiply out, finished ones are skipped, stopped ones go on; the table and the plots say
what the rows say.
"""

import fcntl
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from experiments import information, layers, plots, run
from experiments.table import difference, main, p_value, pairs, spread, table
from ssl_emp import evaluate
from ssl_emp.commands import pretrain

pytestmark = pytest.mark.whole

HERE = Path(__file__).parent.parent


# ---- the grid
# --------------------------------------------------------------------------------------------------------


def test_cells_multiply_out_seeds_first() -> None:
    cells = run.expand(
        [
            {"policy": "none", "seed": [0, 1]},
            {"policy": ["emp", "loss"], "layers": [["a", "b"]], "seed": [0, 1]},
        ]
    )
    assert [(*map(str, cell.values()),) for cell in cells] == [
        *[("none", "0"), ("emp", "['a', 'b']", "0"), ("loss", "['a', 'b']", "0")],
        *[("none", "1"), ("emp", "['a', 'b']", "1"), ("loss", "['a', 'b']", "1")],
    ]
    assert run.expand([{"policy": "emp", "seed": 0}, {"seed": [0, 1], "policy": "emp"}]) == [
        # lines that overlap: two runs in one folder
        *[{"policy": "emp", "seed": 0}, {"policy": "emp", "seed": 1}]
    ]


def test_names_tell_cells_apart_and_are_folder_names() -> None:
    cells: list[dict[str, Any]] = [
        {"a": 1, "b": 2},
        {"a": 1, "c": 2},
        {"a": "1-2"},
        {"a": "/../x y*"},
        {"a": ["p", "q"]},
        {"a": ".."},
        {},
    ]
    names = [run.name_of(cell, {"epochs": epochs}, "c.yaml") for cell in cells for epochs in (1, 2)]
    assert len(set(names)) == len(names) and all(
        set(name) <= set("0123456789abcdefghijklmnopqrstuvwxyz-_.") for name in names
    ), names
    assert all(name[0] not in ".-" for name in names)


def test_planned_work_counts_epochs_of_samples() -> None:
    assert (
        run.planned_work({"prune.fraction": 0.25, "epochs": 8}, {"epochs": 3}) == 6
        and run.planned_work({}, {"epochs": 3}) == 3
    )


def test_planned_work_knows_the_sizes_of_views() -> None:
    sizes = [[12, 0.5], [24, 1]]  # a quarter of the pixels in half of the epochs
    assert run.planned_work({"augment.size": sizes}, {"epochs": 8}) == 5
    assert run.planned_work({}, {"epochs": 8, "augment": {"size": sizes}}) == 5
    assert run.planned_work({"augment.size": 24}, {"epochs": 8, "augment": {"size": sizes}}) == 8
    for wrong in ([], [16, 24], [["a", 1]], [[24]]):  # its cell ends with pretrain.py's line
        assert run.planned_work({"augment.size": wrong}, {"epochs": 8}) == 8


FAKE_PRETRAIN = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
out = Path(sys.argv[sys.argv.index("--resume") + 1] if "--resume" in sys.argv else words["out"])
with open("calls", "a") as file:
    call = ["pretrain", out.name, words, "--resume" in sys.argv, os.environ.get("OMP_NUM_THREADS")]
    file.write(json.dumps(call) + "\\n")
if words["x"] == "fails":
    sys.exit("Traceback\\nerror: no such thing")
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
data = f"{{source: {words.get('data.source')}, cache_dir: {out}}}"
(out / "config.yaml").write_text(f"{{out: {out}, x: {words['x']}, data: {data}}}")
if words["x"] == "stops" and "--resume" not in sys.argv:
    def stopped(*_):
        sys.exit(130)
    signal.signal(signal.SIGINT, stopped)
    os.kill(os.getppid(), signal.SIGINT)  # Ctrl-C
    time.sleep(60)
if words["x"] == "burns":
    while time.process_time() < 0.4:
        pass
(out / "environment.json").write_text('{"command": "no", "device": "cpu"}')
rows = [{"epoch": epoch, "samples_seen": 10 * epoch, "kept_share": share, "training_seconds": 1.5,
         "other_seconds": 2.5, "real_share": 0.7, "asked_share": 0.75, "reliability": epoch, "word": "w"}
        for epoch, share in enumerate([0.9, 0.5, 0.5, 0.9], 1)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "result.json").write_text('{"test_accuracy": 12.5, "note": "text"}')
"""
FAKE_EVALUATE = """
import json, sys
from pathlib import Path
(Path(sys.argv[1]) / "eval").mkdir(exist_ok=True)
for name in sys.argv[2:]:
    rows = [{"value": 50.0, "protocol": f"{name}, l2=3 chosen"}]
    (Path(sys.argv[1]) / "eval" / f"{name}.json").write_text(json.dumps(rows))
"""


class FakeLab:
    """A repository whose two scripts start in no time and do as the cell's `x` says."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.results = root / "experiments" / "results" / "grid.jsonl"
        (root / "pretrain.py").write_text(FAKE_PRETRAIN)
        (root / "evaluate.py").write_text(FAKE_EVALUATE)
        (root / "base.yaml").write_text("epochs: 4")

    def run(self, cells: list[dict[str, Any]], *words: str, **grid: Any) -> tuple[int, str, str]:
        path = self.root / "grid.yaml"
        path.write_text(
            yaml.safe_dump(
                {"config": "base.yaml", "evaluators": ["knn"], "cells": cells} | grid, sort_keys=False
            )
        )
        (self.root / "calls").write_text("")
        code = run.main([str(path), "--runs", str(self.root / "runs"), *words])
        return code, *self.capsys.readouterr()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def calls(self) -> list[Any]:
        return [json.loads(line) for line in (self.root / "calls").read_text().splitlines()]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> FakeLab:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return FakeLab(tmp_path, capsys)


def test_a_row_says_all_and_a_finished_cell_is_skipped_whatever_the_order(lab: FakeLab) -> None:
    words = ["data.source=/here", "epochs=3"]
    code, said, _ = lab.run(
        [{"x": "a", "seed": [0, 1]}], *words, overrides={"k": [1, 2]}, log=["reliability", "word", "absent"]
    )
    assert code == 0 and "[1/2] a-0-" in said and "[2/2] a-1-" in said, said
    row = lab.rows()[0]
    assert row["cell"] == {"x": "a", "seed": 0} and row["settings"] == {
        "k": [1, 2],
        "x": "a",
        "seed": 0,
        "epochs": 3,
    }
    figures = {
        key: row[key]
        for key in (
            "samples_seen",
            "asked_share",
            "real_share",
            "knn",
            "test_accuracy",
            "training_seconds",
            "other_seconds",
        )
    }
    assert list(figures.values()) == [40, 0.75, 0.7, 50.0, 12.5, 1.5, 2.5] and "note" not in row
    assert row["log"] == {"reliability": 2.5} and row["environment"] == {
        "device": "cpu"
    }  # epochs 2 and 3 are pruned, the others drop a remainder
    assert row["config_hash"] == hashlib.sha256(b'{"x": "a"}').hexdigest()[:12], (
        "out, data.cache_dir, data.source left out"
    )
    assert "data.source" in row["config_hash_without"]
    assert lab.calls()[0][2]["data.source"] == "/here" and lab.calls()[0][2]["k"] == "[1, 2]"
    assert not list(lab.root.glob("runs/grid/*/checkpoints"))

    code, said, _ = lab.run(
        [{"seed": [1, 0], "x": ["a", "b"]}],
        "data.source=/there",
        "epochs=3",
        "--keep-checkpoints",
        overrides={"k": [1, 2]},
    )
    assert (
        code == 0
        and said.startswith("2 of 4 cells done")
        and [call[2]["x"] for call in lab.calls()] == ["b", "b"]
    )
    assert len(list(lab.root.glob("runs/grid/*/checkpoints"))) == 2
    lab.run([{"x": "a", "seed": 0}], overrides={"k": [1, 2]})
    assert len(lab.rows()) == 5, "without epochs=3 it is another cell"


def test_a_finished_cell_is_one_of_this_config_file_and_these_evaluators(lab: FakeLab) -> None:
    def run_again(**grid: Any) -> list[bool]:
        assert lab.run([{"x": "a"}], **grid)[0] == 0
        return [resumed for _, _, _, resumed, _ in lab.calls()]

    assert run_again() == [False]
    (lab.root / "base.yaml").write_text("# with a word\nepochs:    4\n")
    assert run_again() == [], "the same values"
    assert run_again(evaluators=[]) == [], "fewer evaluators"
    assert run_again(evaluators=["knn", "linear"]) == [True], "the run is there, a figure is missing"
    assert lab.rows()[-1]["linear"] == 50.0 and run_again(evaluators=["linear"]) == []
    (lab.root / "base.yaml").write_text("epochs: 5")
    assert run_again() == [False] and len(list(lab.root.glob("runs/grid/a-*/config.yaml"))) == 2, (
        "not on with the run of before"
    )
    (lab.root / "base.yaml").write_text("epochs: 4")
    assert run_again() == []
    (lab.root / "base.yaml").write_text("epochs: 4\nx: other")
    assert run_again() == [], "a value that the cell has itself"
    rows = lab.rows()
    for row in rows:
        del row["base_hash"]
    lab.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_again() == [], "lines of before do not say"


def test_a_failed_cell_is_reported_and_the_others_go_on(lab: FakeLab) -> None:
    code, said, errors = lab.run([{"x": ["a", "fails", "b"]}], "--jobs", "2", evaluators=[])
    assert code == 1 and "1 cells failed" in errors
    assert "FAILED pretrain.py ended with 1: error: no such thing" in said
    assert {row["cell"]["x"] for row in lab.rows()} == {"a", "b"} and {call[4] for call in lab.calls()} == {
        "1"
    }
    assert all("knn" not in row and row["test_accuracy"] == 12.5 for row in lab.rows())


def test_cpu_seconds_are_those_of_the_cell_alone(lab: FakeLab) -> None:
    assert lab.run([{"x": ["burns", "a"]}], "--jobs", "2")[0] == 0
    spent = {row["cell"]["x"]: row["cpu_seconds"] for row in lab.rows()}
    assert spent["burns"] >= 0.4 > spent["a"] > 0, spent


def test_ctrl_c_lets_the_running_cell_save_and_the_same_command_goes_on(lab: FakeLab) -> None:
    cells = [{"x": ["a", "stops", "b"]}]
    code, _, errors = lab.run(cells)
    assert code == 130 and len(errors.splitlines()) == 1 and "same command" in errors
    assert [row["cell"]["x"] for row in lab.rows()] == ["a"]
    folder = next(lab.root.glob("runs/grid/stops-*/"))
    first = json.loads((folder / "cpu_seconds.json").read_text())
    assert lab.run(cells)[0] == 0
    assert [(call[2]["x"], call[3]) for call in lab.calls()] == [("stops", True), ("b", False)]
    second = json.loads((folder / "cpu_seconds.json").read_text())
    assert (
        len(first) == 1 and second[:1] == first and lab.rows()[1]["cpu_seconds"] == pytest.approx(sum(second))
    )


def test_the_time_of_an_attempt_that_nobody_took_is_not_made_up(lab: FakeLab) -> None:
    lab.run([{"x": "a"}])
    lab.results.unlink()
    # as if runner and cell had been killed
    (next(lab.root.glob("runs/grid/a-*/")) / "cpu_seconds.json").unlink()
    lab.run([{"x": "a"}])
    assert lab.calls()[0][3] and lab.rows()[0]["cpu_seconds"] is None


def test_a_second_runner_is_refused(lab: FakeLab) -> None:
    lock = lab.root / ".cache" / "experiments" / "grid.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, errors = lab.run([{"x": "a"}])
        assert code == 2 and len(errors.splitlines()) == 1 and "another runner" in errors
    assert not lab.results.exists() and lab.run([{"x": "a"}])[0] == 0


def test_mistakes_are_one_line(lab: FakeLab) -> None:
    for cells, words, grid, what in (
        ([{"x": "a", "seed": 0}], ["seed=1"], {}, "seed is a key of the cells"),
        ([{"x": "a"}], [], {"celsl": 1}, "is not a grid"),
        ([{"x": "a"}], [], {"config": "gone.yaml"}, "gone.yaml, the grid's config"),
        ([{"x": "a"}], ["k=["], {}, "not valid YAML"),
        ([{"x": "a"}], ["--jobs", "0"], {}, "runs nothing"),
    ):
        code, _, errors = lab.run(cells, *words, **grid)
        assert code == 2 and len(errors.splitlines()) == 1 and what in errors, errors
    lab.results.write_text('{"cell": ')
    code, _, errors = lab.run([{"x": "a"}])
    assert code == 2 and "line 1 is damaged" in errors


def test_the_revision_is_dirty_where_code_changed_but_not_for_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    results = tmp_path / "experiments" / "results" / "a.jsonl"
    results.parent.mkdir(parents=True)
    for path in (results, tmp_path / "code.py"):
        path.write_text("1\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = run.git_revision()
    results.write_text("2\n")
    assert len(clean) >= 7 and run.git_revision() == clean
    (tmp_path / "code.py").write_text("2\n")
    assert run.git_revision() == f"{clean}-dirty"


def test_a_real_grid(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pretrain.py", "evaluate.py"):
        (tmp_path / name).symlink_to(HERE / name)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    grid = tmp_path / "grid.yaml"
    overrides = {"epochs": 2, "monitor.knn_every": 0}
    cells = [{"prune.policy": "emp", "seed": 0}]
    content = {
        "config": str(tiny_config),
        "evaluators": ["knn"],
        "overrides": overrides,
        "cells": cells,
        "log": ["loss"],
    }
    grid.write_text(yaml.safe_dump(content))
    assert run.main([str(grid), "--runs", str(tmp_path / "runs"), "batch_size=16"]) == 0, capsys.readouterr()
    row = json.loads((tmp_path / "experiments" / "results" / "grid.jsonl").read_text())
    out = next((tmp_path / "runs" / "grid").glob("emp-0-*/"))
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        row["samples_seen"] == epochs[-1]["samples_seen"] <= 2 * 64
        and 0 <= row["knn"] <= 100
        and row["cpu_seconds"] > 0
    )
    assert row["log"]["loss"] == pytest.approx(epochs[1]["loss"]), "the second epoch is the pruned one"
    assert sum(int(times) * count for times, count in row["times_trained"].items()) == row["samples_seen"]
    assert sum(row["times_trained"].values()) == 68 and not (out / "checkpoints").exists()


# ---- the table
# -------------------------------------------------------------------------------------------------------


def made(policy: str, seed: int, seen: int, knn: float, **more: Any) -> dict[str, Any]:
    cell = {"prune.policy": policy, **{f"prune.{key}": value for key, value in more.items()}, "seed": seed}
    counts = {"samples_seen": seen, "epoch": 20, "test_images": 10}
    return {"cell": cell, **counts, "knn": knn, "linear": knn + 1, "training_seconds": 10.0 + seed}


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00" and spread([4.26]) == "4.3"


def test_the_paired_test_is_the_textbooks() -> None:
    """Differences 1, 2, 3, 6: mean 3, std sqrt(14 / 3), t = 3 / (std / 2) = 2.777; p of Student's t in closed
    form.
    """
    both = [(11.0, 10.0), (22.0, 20.0), (33.0, 30.0), (46.0, 40.0)]
    t = 3 / (np.sqrt(14 / 3) / 2)
    u = t / np.sqrt(3)
    closed_form = 1 - 2 / np.pi * (u / (1 + u**2) + np.arctan(u))
    assert p_value(both) == pytest.approx(closed_form)
    assert difference(both) == "+3.00 ± 2.16 (p=0.069, n=4)"
    assert difference([(2.0, 1.0)]) == "+1.00 (n=1)" and difference([]) == ""
    assert difference([(2.0, 1.0), (3.0, 2.0)]) == "+1.00 ± 0.00 (n=2)", (
        "no p where the differences do not vary"
    )


def test_table() -> None:
    rows = [
        made("none", 0, 100, 40.0),
        made("none", 1, 100, 42.0),
        made("random", 0, 70, 39.5, fraction=0.3),
        made("random", 1, 70, 40.5, fraction=0.3),
        made("shorter", 1, 70, 40.0, fraction=0.3),
        made("emp", 1, 70, 41.0, fraction=0.3, beta=5),
        made("emp", 0, 70, 41.5, fraction=0.3, beta=5),
        made("emp", 0, 50, 30.0, fraction=0.5, beta=5),
    ]
    lines = table(rows, metrics=["knn"]).splitlines()
    assert lines[0] == (
        "| policy | s | β | samples seen | of unpruned | kNN % | kNN - random | kNN - shorter | "
        "training s | n |"
    )
    assert lines[2] == "| none |  |  | 100 | 100.0% | 41.00 ± 1.41 |  |  | 10 | 2 |"
    assert lines[3] == "| random | 0.3 |  | 70 | 70.0% | 40.00 ± 0.71 |  | +0.50 (n=1) | 10 | 2 |"
    assert (
        lines[5]
        == "| emp | 0.3 | 5 | 70 | 70.0% | 41.25 ± 0.35 | +1.25 ± 1.06 (p=0.34, n=2) | +1.00 (n=1) | 10 | 2 |"
    ), "by seed, not by order"
    assert lines[6] == "| emp | 0.5 | 5 | 50 | 50.0% | 30.00 |  |  | 10 | 1 |", (
        "never compared at another fraction"
    )
    assert "Mean over fractions" not in table(rows)


def test_the_mean_over_fractions_takes_seeds_that_have_all() -> None:
    rows = [made("random", seed, 70, 40.0, fraction=s) for s in (0.3, 0.5) for seed in (0, 1, 2)]
    gains = {(0.3, 0): 1.0, (0.5, 0): 3.0, (0.3, 1): 2.0, (0.5, 1): 4.0, (0.3, 2): 90.0}
    rows += [made("emp", seed, 70, 40.0 + gain, fraction=s) for (s, seed), gain in gains.items()]
    lines = table(rows, metrics=["knn"]).splitlines()
    assert lines[-1].startswith("| emp | 0.3, 0.5 | +2.50 ± 0.71 (p=") and lines[-1].endswith(", n=2) |")


def test_other_settings_are_another_group_and_a_rerun_replaces_its_row() -> None:
    def with_epochs(epochs: int, knn: float, policy: str) -> dict[str, Any]:
        return made(policy, 0, 70, knn, fraction=0.3) | {"settings": {"epochs": epochs}, "config": "c"}

    rows = [
        with_epochs(20, 1.0, "emp"),
        with_epochs(20, 40.0, "emp"),
        with_epochs(40, 50.0, "emp"),
        with_epochs(20, 39.0, "random"),
    ]
    lines = table(rows, metrics=["knn"]).splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:5]] == [
        ["| emp", "20", "70", "40.00"],
        ["| emp", "40", "70", "50.00"],
        ["| random", "20", "70", "39.00"],
    ]
    assert "+1.00 (n=1)" in lines[2] and "(n=" not in lines[3]
    assert pairs(rows[2:3], "random", "knn", rows) == []


def test_figures_of_two_protocols_are_not_compared_in_silence() -> None:
    rows = [made("emp", 0, 70, 40.0) | {"protocols": {"linear": "L-BFGS, l2=5.62e-05 of 45 chosen"}}]
    rows += [made("random", 0, 70, 39.0) | {"protocols": {"linear": "L-BFGS, l2=10 of 45 chosen"}}]
    assert "ways" not in table(rows)
    rows[1]["protocols"]["linear"] = "L-BFGS, l2=10 chosen"
    assert "Do not compare: linear % was measured in 2 ways" in table(rows) and "ways" not in table(
        rows, metrics=["knn"]
    )
    assert "not recorded" in table([rows[0], made("random", 0, 70, 39.0)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for results in (HERE / "experiments" / "results").glob("*.jsonl"):
        is_grid = results.stem != "reliability"
        assert main([str(results)]) == (0 if is_grid else 2)
        said = capsys.readouterr()
        assert (
            len(said.out.splitlines()) >= 4 if is_grid else "does not hold the results of a grid" in said.err
        ), results
    path, out = tmp_path / "r.jsonl", tmp_path / "t.md"
    rows = [
        made("emp", seed, 70, 40.0 + seed, beta=beta) | {"log": {"reliability": 0.25}}
        for seed in (0, 1)
        for beta in (1, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(path), "--by", "prune.policy", "--metric", "reliability", "--out", str(out)]) == 0
    assert "| emp | 70 | 0.2500 ± 0.0000 |" in out.read_text()
    path.write_text(path.read_text() + json.dumps(made("none", 0, 100, 45.0)) + "\n")
    assert main([str(path), "--where", "prune.beta=2", "prune.policy=emp"]) == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 70"]
    # unpruned: no β that could differ
    assert main([str(path), "--where", "prune.beta=2", "--by", "prune.policy", "prune.beta"]) == 0
    assert [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["| emp", "2"],
        ["| none", ""],
    ]
    wrong = {
        "prune.policy": ["--by", "prune.polcy"],
        "knn, linear, reliability": ["--metric", "k"],
        "'prune.beta' is not key=value": ["--where", "prune.beta"],
        "prune.beta, prune.policy": ["--where", "prune.bta=2"],
        "no row has prune.beta=3 and prune.policy=emp": ["--where", "prune.beta=3", "prune.policy=emp"],
    }
    for what, words in wrong.items():
        assert main([str(path), *words]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and what in error


# ---- the plots
# -------------------------------------------------------------------------------------------------------


def lines_of(fig: Figure) -> dict[str, tuple[list[float], list[float]]]:
    containers = [
        container for container in fig.axes[0].containers if isinstance(container, ErrorbarContainer)
    ]
    return {
        str(line.get_label()): tuple(np.asarray(line.lines[0].get_data()).tolist()) for line in containers
    }


def test_a_reader_that_has_seen_enough_ends_the_table_in_silence() -> None:
    command = [sys.executable, "-m", "experiments.table", "experiments/results/demo.jsonl"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()  # as head does
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_accuracy_against_samples_and_seconds(tmp_path: Path) -> None:
    rows = [made("none", seed, 1000, 45.0 + seed) | {"cpu_seconds": 30.0} for seed in (0, 1)]
    for policy, gain in (("random", 0.0), ("emp", 1.0)):
        for s, seen in ((0.3, 700), (0.5, 500)):
            histogram = {"times_trained": {"1": 10, "2": 20, "3": 10}, "cpu_seconds": seen / 50}
            rows += [
                made(policy, seed, seen, 40.0 - s + gain + seed, fraction=s) | histogram for seed in (0, 1)
            ]
    fig = plots.against_cost(rows, "knn", "cpu_seconds")
    assert fig is not None
    assert {label: [[round(v, 6) for v in part] for part in xy] for label, xy in lines_of(fig).items()} == {
        "none": [[30.0], [45.5]],
        "random": [[10.0, 14.0], [40.0, 40.2]],
        "emp": [[10.0, 14.0], [41.0, 41.2]],
    }
    shown = fig.axes[0].get_legend()
    assert shown is not None and [text.get_text() for text in shown.get_texts()] == ["none", "emp", "random"]
    assert not fig.axes[0].texts
    began = plots.against_cost([row | {"start": {"knn": 21.0}} for row in rows], "knn", "cpu_seconds")
    assert began is not None and [text.get_text() for text in began.axes[0].texts] == ["start"]
    assert began.axes[0].texts[0].xy[1] == 21.0  # type: ignore[attr-defined]
    samples = plots.against_cost(rows, "knn", "samples_seen")
    assert (
        samples is not None
        and lines_of(samples)["emp"][0] == pytest.approx([500, 700], abs=10)
        and "samples" in samples.axes[0].get_xlabel()
    )
    histograms = plots.times_trained(rows)
    assert histograms is not None and [
        axes.get_title() for axes in histograms.axes if axes.get_visible()
    ] == [*("random s=0.3", "emp s=0.3", "random s=0.5", "emp s=0.5")]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in histograms.axes[0].patches]  # type: ignore[attr-defined]  # bars
    assert bars == [(1, 25), (2, 50), (3, 25)]
    paths = plots.draw_all(rows, tmp_path, ["knn"], "grid")
    assert {path.name for path in paths} == {
        "grid_times_trained.png",
        "grid_knn_samples.png",
        "grid_knn_seconds.png",
    }
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 300 and 0.002 < (pixels < 128).mean() < 0.5, path


def test_the_beta_sweep() -> None:
    rows = [made("random", seed, 70, 39.0 + seed, fraction=0.3) for seed in (0, 1)]
    for memory, slope in (("raw", 1.0), ("normalized", -1.0)):
        for beta in (0, 1, 10):
            rows += [
                made("emp", seed, 70, 40.0 + slope * beta + seed, fraction=0.3, beta=beta, memory=memory)
                for seed in (0, 1)
            ]
    fig = plots.beta_sweep(rows, "knn")
    assert fig is not None and lines_of(fig) == {
        "raw": ([0, 1, 10], [40.5, 41.5, 50.5]),
        "normalized": ([0, 1, 10], [40.5, 39.5, 30.5]),
    }
    axes = fig.axes[0]
    assert axes.get_xscale() == "symlog" and [text.get_text() for text in axes.texts] == ["random"]
    level = [line for line in axes.get_lines() if list(line.get_ydata()) == [39.5, 39.5]]  # type: ignore[arg-type]  # numbers
    assert len(level) == 1
    two = [row for row in rows if row["cell"].get("prune.beta") != 10]
    assert (
        plots.beta_sweep(two, "knn") is None
        and plots.beta_sweep(rows[:2], "knn") is None
        and plots.times_trained(rows) is None
    )


# ---- a memory term of one's own ----------------------------------------------------------------------------


def test_information_is_the_entropy_of_the_mean_less_the_mean_entropy() -> None:
    """In float64, over the visits of a sample; none after the first, where nothing can have changed yet."""
    generator = torch.Generator().manual_seed(0)
    visits = [(torch.randperm(9, generator=generator)[:5], torch.randn(5, 4, generator=generator))
              for _ in range(6)]  # fmt: skip
    predictions, history = information.Predictions(9, 4), [[] for _ in range(9)]  # type: ignore[var-annotated]
    for index, logits in visits:
        found = predictions.information(index, logits)
        for row, i in enumerate(index.tolist()):
            history[i].append(logits[row].double().softmax(0))
            p = torch.stack(history[i])
            expected = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()
            assert float(found[row]) == pytest.approx(float(expected), abs=1e-6)
            assert len(history[i]) > 1 or float(found[row]) == pytest.approx(0, abs=1e-6)
    assert max(map(len, history)) > 2


@pytest.mark.whole
def test_the_runs_of_information_are_those_of_pretrain_but_for_the_memory(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {
        "epochs": 4, "batch_size": 8, "model.width": 8, "augment.size": 16, "augment.crop_padding": 2,
        "prune.fraction": 0.5, "prune.anneal_fraction": 0.25, "compile": False, "data.label_noise": 0.2,
    }  # fmt: skip
    cells = [{"prune.policy": "emp", "memory": ["entropy", "information"], "seed": 0}]
    config = Path("configs/cifar10_supervised_emp.yaml").resolve()
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"config": str(config), "overrides": shared, "cells": cells}))
    source = f"data.source={tiny_data}"
    command = [str(grid), source, "data.image_size=16", f"--results={tmp_path}"]
    assert information.main(command) == 0 and information.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "grid.jsonl").read_text().splitlines()]
    assert [row["cell"]["memory"] for row in rows] == ["entropy", "information"], "and none twice"
    words = [f"{key}={json.dumps(value)}" for key, value in shared.items()]
    out = tmp_path / "run"
    words += [source, "data.image_size=16", "prune.policy=emp", "seed=0", f"out={out}"]
    assert pretrain.main(["--config", str(config), *words]) == 0
    assert json.loads((out / "result.json").read_text())["test_accuracy"] == rows[0]["test_accuracy"]
    capsys.readouterr()
    assert information.main([str(grid), "--until", "soon"]) == 2
    assert capsys.readouterr().err.startswith("error: --until is 'soon'")


def test_the_last_layer_is_what_pretrain_has(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory at layer4 is `prune.memory=normalized`, to the last digit; another stage keeps others."""
    shared = {
        "epochs": 4, "batch_size": 8, "model.width": 8, "augment.size": [[8, 0.5], [12, 1.0]],
        "compile": False, "prune.fraction": 0.5, "prune.anneal_fraction": 0.25, "prune.policy": "distance",
    }  # fmt: skip
    config = Path("configs/cifar10_emp.yaml").resolve()
    grid = tmp_path / "grid.yaml"
    cells = [{"memory": ["layer4", "layer1", "all"], "seed": 0}]
    grid.write_text(yaml.safe_dump({"config": str(config), "overrides": shared, "cells": cells}))
    source = [f"data.source={tiny_data}", "data.image_size=16"]
    assert layers.main([str(grid), *source, f"--results={tmp_path}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "grid.jsonl").read_text().splitlines()]
    out = tmp_path / "run"
    words = [f"{key}={json.dumps(value)}" for key, value in shared.items()]
    words += [*source, "seed=0", "prune.memory=normalized", f"out={out}", "monitor.knn_every=0"]
    assert pretrain.main(["--config", str(config), *words]) == 0
    of_run = evaluate(out, evaluators=["knn", "linear"])
    assert [rows[0][line.evaluator] for line in of_run] == [line.value for line in of_run]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    overlap = [row["kept_overlap"] for row in metrics if "kept_overlap" in row]
    assert rows[0]["log"]["kept_overlap"] == pytest.approx(sum(overlap) / len(overlap))
    assert len({json.dumps(row["log"]) for row in rows}) == 3
    grid.write_text(grid.read_text().replace("layer4", "layer5"))
    capsys.readouterr()
    assert layers.main([str(grid), *source]) == 2
    assert capsys.readouterr().err.startswith("error: memory is 'layer5'")
