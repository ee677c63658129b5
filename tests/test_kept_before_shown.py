"""What an evaluation found is on disk before it is shown, and one failure costs one row."""

import errno
import io
import json
import multiprocessing
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import striped_images, write_parquet
from test_evaluate import SMALL, make_run, table

from ssl_emp.commands import eval_images, evaluate, pretrain, transfer
from ssl_emp.commands.eval_config import EvalConfig
from ssl_emp.commands.rows import ROW_KEY, row_key, write_rows
from ssl_emp.config import DataConfig
from ssl_emp.run.interrupts import Interrupts, Stopped


@pytest.fixture
def run_dir(tmp_path: Path, tiny_data: Path) -> Path:
    return make_run(tmp_path / "run", {"source": str(tiny_data)})


class Failing(io.StringIO):
    """A stream that nothing can be written to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


FULL, LEFT = OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError(errno.EPIPE, "Broken pipe")
BAD_DISK, CLOSED = OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file")


@pytest.mark.parametrize(("error", "code"), [(FULL, 2), (LEFT, 0), (BAD_DISK, 2), (CLOSED, 2)])
def test_rows_are_kept_whatever_standard_output_is(
    error: Exception,
    code: int,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(error))
    assert evaluate.main([str(run_dir), "knn", "diagnose", *SMALL]) == code
    assert {path.name for path in (run_dir / "eval").glob("*.json")} == {"knn.json", "diagnose.json"}
    told = [line for line in capsys.readouterr().err.splitlines() if "the table" in line]
    assert len(told) == 1 and str(run_dir / "eval") in told[0]


def test_standard_error_that_fails_ends_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Failing(FULL))
    assert (
        evaluate.main([str(run_dir), "diagnose", "linear", "knn", "knn.num_neighbors=500", *SMALL[1:]]) == 2
    )
    assert [bool(row["value"]) for row in table(capsys.readouterr().out)] == [True] * 5 + [False]


def test_without_a_folder_a_table_that_cannot_be_shown_is_an_error(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(LEFT))
    assert evaluate.main(["pixels", "knn", f"data.source={tiny_data}", *SMALL]) == 2
    assert "keep the rows with --out DIR" in capsys.readouterr().err


def test_a_run_of_training_needs_no_streams(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", str(tiny_config), "epochs=1", "monitor.knn_every=0", "prune.policy=none"]
    for number, (out, err) in enumerate(((Failing(FULL), None), (None, Failing(FULL)), (None, None))):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            assert pretrain.main([*words, f"out={tmp_path / str(number)}"]) == 0
            for stream in (sys.stdout, sys.stderr):  # the null device where there was none
                stream.close()
        assert (tmp_path / str(number) / "encoder/model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_keeps_what_was_judged(
    number: signal.Signals,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(judged: Any) -> list[Any]:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came too late")

    before = signal.getsignal(number)
    monkeypatch.setitem(evaluate.EVALUATORS, "linear", stopped)
    assert evaluate.main([str(run_dir), "knn", "linear", "diagnose", *SMALL]) == 128 + number
    assert signal.getsignal(number) == before
    assert [row["evaluator"] for row in table(capsys.readouterr().out)] == ["knn"] and (
        run_dir / "eval/knn.json"
    ).is_file()


def test_a_signal_waits_for_what_is_being_written_and_nohup_is_heard() -> None:
    done = []
    with pytest.raises(Stopped) as caught, Interrupts() as interrupts:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("written")
        done.append("too late")
    assert done == ["written"] and caught.value.number == signal.SIGTERM
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_one_failure_costs_one_row(
    run_dir: Path, tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_text("data: {}")
    gone = make_run(tmp_path / "gone", {"source": str(tmp_path / "nowhere")})
    broken = make_run(tmp_path / "broken", {"source": str(tiny_data)})
    (broken / "encoder/model.safetensors").write_bytes(b"no weights")
    names = [str(path) for path in (run_dir, half, gone, broken)]
    assert evaluate.main([*names, "torchvision:resnet19", "pixels", "knn", *SMALL]) == 2
    said = capsys.readouterr()
    rows = {row["encoder"]: row for row in table(said.out)}
    assert [name for name, row in rows.items() if row["value"]] == [str(run_dir), "pixels"]
    assert (
        all("not judged: " in row["protocol"] for row in rows.values() if not row["value"]) and len(rows) == 6
    )
    assert said.err.count("error: ") == 1 and "(and 3 more, see the table)" in said.err
    assert evaluate.main([str(broken), "pixels", "knn", *SMALL]) == 2
    assert "first run" in table(capsys.readouterr().out)[1]["protocol"], (
        "it would be judged on other data than it says"
    )


def test_an_error_of_the_program_costs_one_row_too(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, told in (
        (KeyError("x"), 1, "KeyError: 'x'"),
        (MemoryError(), 2, "batch_size"),
        (RuntimeError("boom"), 1, "boom"),
    ):

        def fails(judged: Any, error: Exception = error) -> list[Any]:
            raise error

        monkeypatch.setitem(evaluate.EVALUATORS, "linear", fails)
        assert evaluate.main([str(run_dir), "linear", "knn", *SMALL]) == code
        said = capsys.readouterr()
        assert [bool(row["value"]) for row in table(said.out)] == [False, True] and told in said.err
        assert ("Traceback" in said.err) == (code == 1)


def test_pictures_never_cost_a_number(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate.main([str(run_dir), "diagnose", "knn", *SMALL]) == 0
    assert "map.png is not made" in capsys.readouterr().err
    assert {path.name for path in (run_dir / "eval/diagnose").iterdir()} == {
        "neighbors.png",
        "embeddings.parquet",
    }
    monkeypatch.undo()
    out = tmp_path / "out/run"
    (tmp_path / "out").mkdir()
    for name in (str(run_dir), "pixels"):
        out = tmp_path / "out" / evaluate.safe_name(name) / "diagnose"
        for left in ("map.png", "neighbors.png", "embeddings.parquet"):  # folders in the place of files
            (out / left / "x").mkdir(parents=True)
    (tmp_path / "cache").write_text("a file where the cache's folder should be")
    words = [*SMALL[:2], f"cache_dir={tmp_path / 'cache'}", "--out", str(tmp_path / "out")]
    assert evaluate.main([str(run_dir), "pixels", "diagnose", "knn", *words]) == 0
    said = capsys.readouterr()
    assert all(row["value"] for row in table(said.out)) and said.err.count("is not made") >= 3
    assert len(json.loads((tmp_path / "out/knn.json").read_text())) == 2


def add_rows(folder: Path, tag: str) -> None:
    for number in range(40):
        write_rows(folder, [{"encoder": f"{tag}{number}", "evaluator": "knn", "protocol": "p", "value": 1.0}])


def test_rows_of_several_writers_are_all_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_rows, args=(tmp_path / "eval", tag)) for tag in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads((tmp_path / "eval/knn.json").read_text())) == 120
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["knn.json"], (
        "the lock goes with its last holder"
    )


@pytest.mark.parametrize(
    "damage", ["{", "[1]", '{"encoder": 1}', "[NaN]", '[{"encoder": []}]', "[" * 100_000, "\ud800"]
)
def test_what_holds_no_rows_is_moved_aside(damage: str, tmp_path: Path) -> None:
    said: list[str] = []
    row = {"encoder": "a", "evaluator": "knn", "value": 1.0}
    for count in (1, 2):
        (tmp_path / "knn.json").write_bytes(damage.encode("utf-8", "surrogatepass"))
        write_rows(tmp_path, [row], said.append)
        assert json.loads((tmp_path / "knn.json").read_text()) == [row] and len(said) == count
        assert (tmp_path / f"knn.json.damaged-{count}").read_bytes() == damage.encode(
            "utf-8", "surrogatepass"
        )


def test_a_row_that_could_not_be_written_is_written_with_the_next(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "eval").write_text("in the way")
    original = evaluate.EVALUATORS["linear"]

    def cleared(judged: Any) -> list[Any]:
        (run_dir / "eval").unlink(missing_ok=True)
        return original(judged)

    monkeypatch.setitem(evaluate.EVALUATORS, "linear", cleared)
    assert evaluate.main([str(run_dir), "knn", "linear", *SMALL]) == 0
    assert {path.name for path in (run_dir / "eval").iterdir()} == {"knn.json", "linear.json"}


def test_a_suite_keeps_its_cells(
    run_dir: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suites = []
    for name in ("one", "two"):
        suites.append(tmp_path / f"{name}.yaml")
        targets = [{"name": target, "source": str(tiny_data), "protocol": "knn"} for target in ("a", "b")]
        suites[-1].write_text(yaml.safe_dump({"name": name, "targets": targets}))
    words = [str(run_dir), "pixels", "transfer", "transfer.num_draws=100", *SMALL]
    original, calls = transfer.judge_target, []

    def stopped(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Stopped(signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(transfer, "judge_target", stopped)
    assert evaluate.main([*words, f"transfer.suite={suites[0]}"]) == 143
    path = run_dir / "eval/transfer.json"
    assert sum(row["value"] is not None for row in json.loads(path.read_text()) if row["data"] in "ab") == 3
    assert "stopped before it was judged" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for suite in suites:
        assert evaluate.main([*words, f"transfer.suite={suite}"]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 12 and all(row["value"] is not None for row in rows), (
        "two suites, two encoders, two data sets and their means"
    )
    assert "transfer.png is not made" in capsys.readouterr().err


# ---- rows are keyed by what they depend on

# cannot move a number of a row, or only through a column or text that is named here
UNMOVED = {
    "device": "rounding",
    "batch_size": "rounding",
    "start": "which encoders are judged",
    "cache_dir": "where features are kept",
    "timeout_seconds": "how long to wait for another process",
    "seed": "a column",
    "model.arch": "in the weights of `random`",
    "model.args": "in the weights of `random`, and in its protocol",
    "model.width": "in the weights of `random`",
    "model.stem": "in the weights of `random`",
    "knn.backend": "the same neighbours",
    "linear.save": "a file",
    "finetune.save": "a file",
    "diagnose.num_queries": "a picture",
    "diagnose.num_neighbors": "a picture",
    "diagnose.map": "a picture",
    "transfer.suite": "a column",
    "transfer.root": "where data sets lie",
    "transfer.download": "where data sets come from",
    "transfer.num_draws": "a column",
}
MOVED = {  # two values of each, with what else they need
    "knn.num_neighbors": ("knn", ["3"], ["4"]),
    "knn.temperature": ("knn", ["0.1"], ["0.2"]),
    "linear.protocol": ("linear", ["lbfgs"], ["cached"]),
    "linear.val_fraction": ("linear", ["0.2"], ["0.3"]),
    "linear.max_iter": ("linear", ["5"], ["6"]),
    "linear.precision": ("linear", ["float32"], ["float64"]),
    "linear.epochs": ("linear", ["1", "linear.protocol=cached"], ["2", "linear.protocol=cached"]),
    "fewshot.fractions": ("fewshot", ["0.2"], ["0.4"]),
    "fewshot.per_class": ("fewshot", ["2"], ["3"]),
    "fewshot.num_draws": ("fewshot", ["3"], ["4"]),
    "fewshot.finetune": ("fewshot", ["false"], ["true", "fewshot.epochs=1"]),
    "fewshot.epochs": ("fewshot", ["1", "fewshot.finetune=true"], ["2", "fewshot.finetune=true"]),
    "finetune.epochs": ("finetune", ["1"], ["2"]),
    "finetune.lr": ("finetune", ["0.05"], ["0.01"]),
    "finetune.weight_decay": ("finetune", ["0"], ["0.1"]),
    "finetune.batch_size": ("finetune", ["8"], ["16"]),
    "finetune.label_smoothing": ("finetune", ["0"], ["0.1"]),
    "finetune.warmup_epochs": ("finetune", ["0"], ["0.5"]),
    "finetune.bf16": ("finetune", ["false"], ["true"]),
    "finetune.layer_decay": ("finetune", ["1"], ["0.5"]),
    "finetune.val_fraction": (
        "finetune",
        ["0.2", "finetune.lr=[0.05,0.01]"],
        ["0.3", "finetune.lr=[0.05,0.01]"],
    ),
    "diagnose.split": ("diagnose", ["train"], ["test"]),
    "diagnose.max_samples": ("diagnose", ["20"], ["30"]),
}


def test_every_setting_is_in_the_row_or_known_to_move_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = []
    for name, field in EvalConfig.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        keys += [name] if section is None else [f"{name}.{key}" for key in section if name != "data"]
    assert sorted(keys) == sorted([*UNMOVED, *MOVED, "data"][:-1]), (
        "say of a new key whether it can move a number"
    )
    said = {*eval_images.DESCRIBED_KEYS, *eval_images.UNDESCRIBED_KEYS}
    assert said < set(DataConfig.model_fields), "what is in neither list is named where it is not the default"
    quick = (
        "finetune.epochs=1",
        "linear.max_iter=20",
        "fewshot.fractions=[]",
        "fewshot.num_draws=3",
        "fewshot.per_class=2",
    )
    for key, (evaluator, *pair) in MOVED.items():
        found = []
        for value, *more in pair:
            words = dict(word.split("=") for word in [*SMALL, *quick, *more, f"{key}={value}"])
            assert (
                evaluate.main([str(run_dir), evaluator, *(f"{name}={text}" for name, text in words.items())])
                == 0
            ), key
            found.append({(row["data"], row["protocol"]) for row in table(capsys.readouterr().out)})
        assert found[0] != found[1], f"{key} is not in the protocol"


def test_weights_and_images_of_a_name_may_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for split, seed in (("train", 0), ("test", 1)):
        write_parquet(data / f"{split}.parquet", *striped_images(24, seed=seed))
    run = make_run(tmp_path / "run", {"source": str(data)})

    def count() -> int:
        assert evaluate.main([str(run), "knn", *SMALL]) == 0
        return len(json.loads((run / "eval/knn.json").read_text()))

    assert (count(), count()) == (1, 1)
    make_run(run, {"source": str(data)}, seed=5)  # trained anew under the same name
    assert count() == 2
    write_parquet(data / "test.parquet", *striped_images(24, seed=2))  # other images under the same name
    assert count() == 3
    images, labels = striped_images(24, seed=2)
    write_parquet(data / "test.parquet", images, [*labels[1:], labels[0]])  # other labels
    assert (
        count() == 4 == len({row_key(row) for row in json.loads((run / "eval/knn.json").read_text())})
        and "weights" in ROW_KEY
    )


# ---- what pretrain.py advises


@pytest.mark.parametrize(
    "kind",
    [
        "no labels",
        "labels",
        "labels and test",
        "labels off",
        "one image a class",
        "other classes in test",
        "labels, none in test",
    ],
)
def test_the_next_command_works(
    kind: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = striped_images(40)
    labels = list(range(40)) if kind == "one image a class" else labels
    write_parquet(tmp_path / "data set/train.parquet", images, None if kind == "no labels" else labels)
    if kind in ("labels and test", "other classes in test"):
        test_labels = [label + 10 * (kind != "labels and test") for label in labels[:20]]
        write_parquet(tmp_path / "data set/test.parquet", striped_images(20, seed=1)[0], test_labels)
    if kind == "labels, none in test":
        write_parquet(tmp_path / "data set/test.parquet", striped_images(20, seed=1)[0], [-1] * 20)
    more = ["data.labels=none"] if kind == "labels off" else []
    out = tmp_path / "a run's $folder"
    words = [
        f"data.source={tmp_path / 'data set'}",
        "epochs=1",
        "prune.policy=none",
        "monitor.knn_every=0",
        f"out={out}",
        *more,
    ]
    assert pretrain.main(["--config", str(tiny_config), *words]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["evaluate"]]
    command = shlex.split(line)[3:]
    expected = {
        "no labels": "diagnose",
        "labels and test": "knn linear",
        "labels": "knn linear data.holdout=0.2",
    }
    expected |= dict.fromkeys(("labels off", "labels, none in test"), expected["labels"])
    expected |= {"one image a class": "diagnose", "other classes in test": "diagnose"}
    assert command == [str(out), *expected[kind].split()]
    assert evaluate.main([*command, "device=cpu", "cache_dir=null"]) == 0
    assert all(row["value"] for row in table(capsys.readouterr().out))
