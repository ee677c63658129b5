"""The benchmarks: contenders take turns, ratios are those of a round, and each command leaves a well-formed
file.
"""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import striped_images, write_parquet

from benchmarks import common, evaluation, lightly_loop, memory, parity, shared_machine, time_to_quality
from benchmarks.common import Ratio
from ssl_emp.errors import UserError
from ssl_emp.model import build_encoder, save_encoder

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 96 small images in train.parquet."""
    folder = tmp_path_factory.mktemp("bench")
    write_parquet(folder / "train.parquet", *striped_images(96))
    return folder


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} in a result")


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str, figure: float) -> Any:
        def measure() -> float:
            calls.append(name)
            return figure * len(calls)

        return measure

    figures = common.interleave({"a": contender("a", 1.0), "b": contender("b", 10.0)}, repeats=3)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [1.0, 3.0, 5.0], "b": [20.0, 40.0, 60.0]}


def test_ratios_are_of_a_round_and_then_the_median() -> None:
    # 2, 10, 1: not the ratio of the medians, 4 / 3
    figures = {"ours": [2.0, 30.0, 4.0], "peer": [1.0, 3.0, 4.0]}
    ratios = [
        Ratio("ours", "peer", goal=1.9),
        Ratio("ours", "peer", goal=2.1, name="strict"),
        Ratio("ours", "peer", per=4.0, goal=0.5, at_most=True, name="share of 4"),
        Ratio("peer", goal=2.0, at_most=True),
        Ratio("ours", "missing", goal=1.0),
    ]
    result = common.summary(figures, ratios, "images/s")
    assert result["contenders"]["ours"] == {
        "median": 4.0,
        "min": 2.0,
        "max": 30.0,
        "rounds": [2.0, 30.0, 4.0],
    }
    assert list(result["ratios"]) == ["ours / peer", "strict", "share of 4", "peer"], (
        "a peer that was not measured has no ratio"
    )
    plain = result["ratios"]["ours / peer"]
    assert (plain["median"], plain["min"], plain["max"], plain["rounds"]) == (
        2.0,
        1.0,
        10.0,
        [2.0, 10.0, 1.0],
    )
    assert result["ratios"]["share of 4"]["rounds"] == [0.5, 2.5, 0.25]
    assert [row["met"] for row in result["ratios"].values()] == [True, False, True, False]


def test_a_quick_run_writes_only_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    payload = {"cases": {"one": common.summary({"a": [1.0]}, [], "seconds")}}
    common.write("name", payload, common.parse(common.parser("test"), ["--quick", "--device", "cpu"]))
    assert not (tmp_path / "results").exists()
    common.write("name", payload, common.parse(common.parser("test"), ["--device", "cpu"]))
    result = json.loads((tmp_path / "results" / "name.json").read_text())
    assert result["cases"] == payload["cases"] and (
        result["benchmark"],
        result["quick"],
        result["repeats"],
    ) == ("name", False, 3)
    environment = result["environment"]
    assert environment["torch"].startswith(torch.__version__.partition("+")[0]) and environment["cores"] >= 1
    assert environment["gpu"] is None and not any(
        "/" in str(value) for name, value in environment.items() if name != "cpu"
    ), "no path"


def test_mistakes_of_the_user_and_failed_contenders() -> None:
    with pytest.raises(UserError, match="--repeats is 0"):
        common.parse(common.parser("test"), ["--repeats", "0"])
    with pytest.raises(UserError, match="ended with 3: the last line. fix: run it by hand"):
        common.run_python(
            [
                "-c",
                (
                    "import sys; print('first', file=sys.stderr); print('the last line', "
                    "file=sys.stderr); sys.exit(3)"
                ),
            ]
        )
    assert common.run_python(["-c", "print('out')"]) == "out\n"


def test_peak_memory_is_that_of_the_process() -> None:
    """Against a process of known size; the one that measures, with torch in it, does not count."""
    python = [sys.executable, "-c"]
    little, _ = memory.peak_megabytes([*python, "print(1)"], quick=True)
    much, output = memory.peak_megabytes([*python, "x = b'x' * 500_000_000; print(len(x))"], quick=True)
    assert output == "500000000\n" and little < 50 and 500 < much < 550
    sleeper = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('epoch 1/9', "
        "flush=True); time.sleep(60)"
    )
    assert memory.peak_megabytes([*python, sleeper], quick=True, stop_at="epoch 1/")[1] == "epoch 1/9\n"
    with pytest.raises(UserError, match="ended with 0"):
        memory.peak_megabytes([*python, "print('never began')"], quick=True, stop_at="epoch 1/")


def test_growth_of_the_peak_counts_every_new_byte() -> None:
    """Also where the peak so far is far above what is in use."""
    program = """
import torch
from benchmarks import common
big = torch.ones(400_000_000, dtype=torch.uint8); del big
print(common.peak_growth(lambda: torch.ones(100_000_000, dtype=torch.uint8)))
"""
    assert 95e6 < float(common.run_python(["-c", program])) < 110e6


def test_activations_are_counted_once_each() -> None:
    per_view = memory.activation_megabytes(8, 4) / 8
    assert memory.activation_megabytes(8, 8) / 16 == pytest.approx(per_view, rel=0.02), (
        "they grow with the batch"
    )
    # stage by stage five convolutions' outputs of 8 x 32 x 32, halving; kept twice: BatchNorm its input, what
    # follows its output
    outputs = 5 * 8 * 32 * 32 * (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert 1.5 * 4 * outputs / 1e6 < per_view < 2.1 * 4 * outputs / 1e6


def test_lightlys_loop_hands_out_two_views(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightly_loop, "cores", lambda: 0)  # the loader works in this process
    sizes = ["--width", "8", "--batch-size", "4", "--steps", "2", "--warmup-steps", "1", "--image-size", "16"]
    lightly_loop.main(["--data", str(data), "--device", "cpu", *sizes])
    result = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert result["images_per_second"] == pytest.approx(2 * 4 / result["seconds"]) and result["loss"] > 0


def test_the_sweeps_are_compared_at_the_same_objective() -> None:
    """Ours is no worse than scikit-learn for any l2, and a doctored solution is found out."""
    pytest.importorskip("sklearn")
    train, val = evaluation.make_features(300, 200, 16, 10, spread=1.5)
    assert 0.2 < (train.x == 0).double().mean() < 0.6, "rectified"
    contenders, facts = evaluation.sweep_contenders(train, val, 10, torch.device("cpu"))
    for work in contenders.values():
        work()
    solutions = facts["solutions"]
    fair = evaluation.compare_sweeps(solutions, train)
    assert fair["ours_above_sklearn_at_most"] < 1e-3 and fair["ours_above_sklearn_warm_at_most"] < 1e-3
    best = fair["best_accuracy"]
    assert best["ours"] == pytest.approx(best["sklearn"], abs=1) and 40 < best["ours"] < 95
    found, accuracy = solutions["ours"]
    solutions["ours"] = [(2 * weight, bias) for weight, bias in found], accuracy
    assert evaluation.compare_sweeps(solutions, train)["ours_above_sklearn_at_most"] > 0.1


@pytest.mark.parametrize(
    ("name", "takes_data", "ratios"),
    [
        ("images", True, {"ours / lightly"}),
        pytest.param("augmentation", False, {"ours / lightly", "ours / ours_eager"}, marks=pytest.mark.slow),
        pytest.param(
            "training", True, {"ours / L", "ours / L+", "ours / ours_eager"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "pruning",
            True,
            {"speed-up, s=0.3", "speed-up, s=0.7", "added to a step / step"},
            marks=pytest.mark.slow,
        ),
        ("checkpoint", False, {"save_checkpoint / torch.save", "share of the time, every 10 minutes"}),
        ("knn", False, {"faiss / ours", "lightly / ours"}),
        (
            "evaluation",
            False,
            {
                "sklearn / ours",
                "sklearn_warm / ours",
                "ours_50 / ours_1",
                "ours_50 / torch_loop",
                "lightly / ours",
            },
        ),
        pytest.param("loss", False, {"lightly / ours", "ours / lightly"}, marks=pytest.mark.slow),
        ("plain_loop", False, {"pruner / plain"}),
        pytest.param(
            "selection",
            False,
            {"select_kept, seconds", "select_kept, memory / scores"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "step", False, {"returned / kept", "views / step", "floor / step"}, marks=pytest.mark.slow
        ),
        pytest.param("memory", True, {"difference in MB"}, marks=pytest.mark.slow),
        pytest.param("cost", True, {"16 px / 32 px / area"}, marks=pytest.mark.slow),
    ],
)
def test_a_quick_run_of_each(
    name: str, takes_data: bool, ratios: set[str], data: Path, tmp_path: Path
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    out = tmp_path / "deep" / "result.json"
    module.main(
        ["--quick", "--device", "cpu", "--out", str(out), *(["--data", str(data)] if takes_data else [])]
    )
    text = out.read_text()
    result = json.loads(text, parse_constant=no_constant)
    assert str(data) not in text and result["quick"] and result["benchmark"] == name and result["cases"]
    found: dict[str, dict[str, Any]] = {}
    for case in result["cases"].values():
        assert case["unit"] and all(
            len(row["rounds"]) == 1 and row["median"] > 0 for row in case["contenders"].values()
        )
        found |= case["ratios"]
    assert ratios <= found.keys()
    assert all(math.isfinite(row["median"]) and row["median"] > 0 for row in found.values())


def test_the_evaluators_are_those_of_the_libraries(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    save_encoder(build_encoder("resnet18", 8, "cifar", 16, [0.5] * 3, [0.25] * 3), tmp_path / "encoder")
    out = tmp_path / "parity.json"
    parity.main([str(tmp_path / "encoder"), "--data", str(tiny_data), "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text(), parse_constant=no_constant)
    assert [row["same label"] for row in result["knn"]] == [100.0] * 4 and all(
        row["ours"] == row["theirs"] for row in result["knn"]
    )
    assert [row["l2"] for row in result["logistic"]] == list(parity.L2)
    above = [abs(row["objective above theirs"]) for row in result["logistic"] if row["l2"] >= 1]
    assert max(above) < 1e-4, (
        "68 images are separable: below, the objective goes to 0, and an absolute tolerance ends the fit"
    )
    assert str(tiny_data) not in out.read_text() and "| l2 |" in capsys.readouterr().out


def test_time_to_quality(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each contender gets longer runs until it is past the last target; lightly's pace and encoders are two
    commands; a finished run is not run again.
    """
    write_parquet(data / "test.parquet", *striped_images(40))
    settings = {
        "lightly": (time_to_quality.THEIRS | {"batch-size": 16}, [1]),
        "ours": ({"prune.policy": "none", "batch_size": 16}, [1, 2]),
    }
    monkeypatch.setattr(time_to_quality, "CONTENDERS", settings)
    monkeypatch.setattr(time_to_quality, "TARGETS", (0.0, 101.0))
    out, words = tmp_path / "runs.jsonl", ["--data", str(data), "--images", "64", "--repeats", "1"]
    words += ["--out", str(out), "--device", "cpu", "--quick"]
    for more in ([], [], ["--encoders", "--jobs", "2"]):
        time_to_quality.main([*words, *more])
    rows = time_to_quality.read(out)
    ran = [(row["contender"], row["epochs"], "knn" in row, "seconds" in row) for row in rows]
    assert ran == [
        ("lightly", time_to_quality.PACE, False, True),
        ("ours", 1, True, True),
        ("ours", 2, True, True),
        ("lightly", 1, True, False),
    ]
    assert all(row.get("seconds", 1) > 0 and 0 <= row.get("knn", 0) <= 100 for row in rows)
    assert "not reached" in capsys.readouterr().out
    with pytest.raises(UserError, match="--jobs is 2"):
        time_to_quality.main([*words, "--jobs", "2"])


def test_the_shortest_length_whose_mean_is_there_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths: dict[str, Any] = {"lightly": ({}, [10, 20, 40, 80]), "a": ({}, [10, 20]), "b": ({}, [10, 20])}
    monkeypatch.setattr(time_to_quality, "CONTENDERS", lengths)
    knn = [("a", 10, 46.0), ("a", 10, 43.0), ("a", 20, 47.0), ("a", 20, 48.0), ("b", 10, 51.0)]
    rows = [
        {"contender": contender, "epochs": epochs, "seed": number % 2, "knn": value, "seconds": 6.0 * epochs}
        for number, (contender, epochs, value) in enumerate(knn)
    ]
    rows += [{"contender": "lightly", "epochs": 3, "seed": 0, "seconds": 90.0}]
    rows += [
        {"contender": "lightly", "epochs": epochs, "seed": 0, "knn": value}
        for epochs, value in [(10, 40.0), (20, 46.0)]
    ]
    assert time_to_quality.lengths_to(rows, "a", 45.0) == (10, 20), "44.5 is not there"
    assert time_to_quality.lengths_to(rows, "a", 50.0) == (20, None)
    assert time_to_quality.lengths_to(rows, "b", 50.0) == (None, 10)
    assert time_to_quality.minutes_of(rows, "a", 20) == [2.0, 2.0]
    assert time_to_quality.minutes_of(rows, "lightly", 20) == [10.0], "by its pace of 30 s"
    rows[4]["seed"] = 0
    ours = list(time_to_quality.to_run(rows, 2, encoders=False))
    assert ours == [("lightly", time_to_quality.PACE, 1), ("b", 10, 1)], "b is past the last target"
    assert ("lightly", 40, 0) in time_to_quality.to_run(rows, 2, encoders=True)
    time_to_quality.show(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = [line for line in lines if line[:2] == ["45", "a"] or line[:2] == ["50", "b"]]
    assert found[0][-4:] == ["5.0,", "at", "least", "2.5"], "10 minutes over 2, and 5"
    assert found[1][-3:] == ["more", "than", "10.0"], "10 minutes did not do, ours took 1"


@pytest.mark.slow
def test_a_shared_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every contender has its rounds in turn, and a finished run is not run again."""
    contenders = {name: shared_machine.CONTENDERS[name] for name in ("default", "ours", "one thread")}
    monkeypatch.setattr(shared_machine, "CONTENDERS", contenders)
    rows, out = tmp_path / "rows.jsonl", tmp_path / "table.json"
    words = ["--quick", "--device", "cpu", "--seconds", "0.2", "--rows", str(rows), "--out", str(out)]
    shared_machine.main(["busy", "--programs", "1", *words])
    found = shared_machine.read(rows)
    assert [row["contender"] for row in found] == list(contenders)
    assert all(row["images_per_second"] > 0 and row["steps"] >= 1 for row in found)
    assert all(row["cores_of_others"] > 0 for row in found), "the busy program"
    assert capsys.readouterr().err.count("busy, ") == 3
    shared_machine.main(["busy", *words])
    assert shared_machine.read(rows) == found and "busy, " not in capsys.readouterr().err
    case = json.loads(out.read_text(), parse_constant=no_constant)["cases"]["busy"]
    assert case["ratios"]["ours / one thread"]["median"] == pytest.approx(
        found[1]["images_per_second"] / found[2]["images_per_second"]
    )
    quiet = [found[0] | {"case": "quiet", "cores_of_others": used} for used in (0.1, 0.9)]
    assert [shared_machine.disturbed(row) for row in [*quiet, *found]] == [False, True, False, False, False]
    with pytest.raises(UserError, match="there is no case 'calm'"):
        shared_machine.main(["calm", *words])
