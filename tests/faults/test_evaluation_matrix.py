"""Faults of an evaluation: what it is given, what its libraries do, what its data hold. Each ends in the
right number or in one line.

`evaluate.main` runs in this process, where a fault is quick to put in; in processes of its own where a hang
is to be feared or where several share the work. The first line of a docstring is `row | injected fault |
expected`.
"""

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import png, striped_images, write_parquet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import linear_eval.knn
from linear_eval import EvalError, Features, extract_features, knn_accuracies
from linear_eval.finetune import state_hash
from linear_eval.knn import import_faiss, knn_predictions
from ssl_emp import load_encoder
from ssl_emp.commands import evaluate, subjects
from ssl_emp.data.images import load_images
from ssl_emp.model import build_encoder, save_encoder

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(import_faiss() is None, reason="no faiss")),
]
PLAIN = ("knn.num_neighbors=5", "device=cpu", "cache_dir=null")
EVERY = ("knn", "linear", "fewshot", "finetune", "diagnose")
QUICK = (
    "fewshot.per_class=[2]",
    "fewshot.fractions=[]",
    "fewshot.num_draws=3",
    "finetune.epochs=1",
    "linear.max_iter=20",
)
Ended = SimpleNamespace  # code, out, err, rows, errors, notes
Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`evaluate.main` on words -> its exit code, the rows of its table, its lines on standard error:
    mistakes, and others.
    """

    def call(*words: object) -> Ended:
        capsys.readouterr()
        code = evaluate.main([str(word) for word in words])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        notes = [line for line in captured.err.splitlines() if not line.startswith(("error: ", "report: "))]
        assert code in (0, 2) and len(errors) == (code == 2) and "Traceback" not in captured.err
        assert all(". fix: " in line for line in errors)
        return Ended(
            code=code,
            out=captured.out,
            err=captured.err,
            rows=table(captured.out),
            errors=errors,
            notes=notes,
        )

    return call


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first Markdown table in a text."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [
        dict(zip_longest(lines[0], line, fillvalue="")) for line in lines[2:] if len(line) <= len(lines[0])
    ]


def refused(ended: Ended, message: str) -> None:
    assert ended.code == 2 and message in ended.errors[0], ended.errors


@pytest.fixture
def run_dir(tmp_path: Path, tiny_data: Path) -> Path:
    """What pretrain.py leaves behind, with untrained weights."""
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    save_encoder(
        build_encoder("resnet18", 8, "imagenet", 16, [0.5] * 3, [0.25] * 3).eval(),
        tmp_path / "run" / "encoder",
    )
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"data": {"source": str(tiny_data)}, "seed": 0}))
    return tmp_path / "run"


def random_features(num: int, seed: int, classes: int = 4) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (num,), generator=generator)
    return Features(torch.randn(num, 8, generator=generator) + y[:, None], y)


def data_of(folder: Path, train: list[int], test: list[int], *, images: list[bytes] | None = None) -> Path:
    """A data set with these labels; the images are stripes, all different, or the given ones."""
    drawn = images or striped_images(len(train) + len(test))[0]
    write_parquet(folder / "train.parquet", drawn[: len(train)], train)
    write_parquet(folder / "test.parquet", drawn[len(train) : len(train) + len(test)], test)
    return folder


# ---- what is no encoder


def test_B10_no_encoder(tmp_path: Path, run_dir: Path) -> None:
    """B10 | a directory, a text file, an optimizer's file, a link to /dev/zero, a FIFO as encoder | one line,
    exit code 2, under 5 s

    Also in the place of an encoder's files, and as a suite. One process tries them all under a wall limit,
    and times each.
    """
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("weights are elsewhere")
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "optimizer.pt")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    given = [tmp_path / name for name in ("folder", "notes.txt", "optimizer.pt", "zero", "fifo")]
    for name in given[1:].copy():  # the same in the place of an encoder's files
        for part in ("config.json", "model.safetensors"):
            folder = tmp_path / f"{name.name}-{part}"
            save_encoder(build_encoder("resnet18", 8, "imagenet", 16, [0.5] * 3, [0.25] * 3), folder)
            (folder / part).unlink()
            (folder / part).symlink_to(name)
            given.append(folder)
    commands = [[str(path), "knn", "device=cpu"] for path in given]
    commands += [[str(run_dir), "transfer", f"transfer.suite={path}", "device=cpu"] for path in given[:5]]
    code = (
        "import contextlib, io, json, sys, time, evaluate\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    said, begin = io.StringIO(), time.monotonic()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = evaluate.main(words)\n"
        "    print(json.dumps([words, code, said.getvalue(), time.monotonic() - begin]), flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)),  # /dev/zero has no end
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [words for words, *_ in found] == commands, ended.stderr
    for words, rc, said, seconds in found:
        assert rc == 2 and said.startswith("error: ") and said.count("\n") == 1 and ". fix: " in said, (
            words,
            rc,
            said,
        )
        assert seconds < 5, (words, seconds)


# ---- kNN


@pytest.mark.parametrize("how", ["missing", "broken library", "built for another numpy"])
def test_H1_faiss_that_cannot_be_imported(
    how: str, run: Run, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1 | faiss is missing, or its import fails | torch gives the same numbers, one line says so; asked for
    by name, what to install
    """
    words = (run_dir, "knn", "knn.num_neighbors=[1,5,20]", "device=cpu", "cache_dir=null")
    usual = run(*words)
    if how == "missing":
        monkeypatch.setitem(sys.modules, "faiss", None)
    else:
        error = (
            "OSError('libfaiss.so: cannot open shared object file')"
            if how == "broken library"
            else "AttributeError('_ARRAY_API')"
        )
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/faiss.py").write_text(f"raise {error}\n")
        monkeypatch.syspath_prepend(tmp_path / "broken")
        monkeypatch.delitem(sys.modules, "faiss", raising=False)
    found = run(*words)
    assert found.code == 0 and found.rows == usual.rows
    assert [line for line in found.notes if line not in usual.notes] == [
        line for line in found.notes if "faiss" in line
    ]
    assert sum("pip install faiss" in line for line in found.notes) == 1
    refused(run(*words, "knn.backend=faiss"), "pip install faiss")


def test_H2_k_above_n(run: Run, run_dir: Path, tmp_path: Path) -> None:
    """H2 | k > n, k = 0, k = 1, k = n, an empty bank, no queries | one line, or an answer from the bank:
    never index -1
    """
    words = (run_dir, "knn", "device=cpu", "cache_dir=null")
    refused(run(*words, "knn.num_neighbors=69"), "num_neighbors is 69, the train split has 68 images")
    refused(run(*words, "knn.num_neighbors=[1,69]"), "num_neighbors is 69")
    refused(run(*words, "knn.num_neighbors=0"), "knn.num_neighbors")
    refused(run(*words, "knn.num_neighbors=-1"), "knn.num_neighbors")
    assert len(run(*words, "knn.num_neighbors=[1,68]").rows) == 2
    for backend in ("torch", "auto"):
        bank, queries = random_features(30, 1), random_features(20, 2)
        bank.y[-1] = 99  # what index -1 would answer
        given: dict[str, Any] = {"temperature": None, "backend": backend}
        answers = knn_predictions(bank, queries, num_neighbors=[1, 29, 30], **given)
        assert all(99 not in labels.tolist() or k == 1 for k, labels in answers.items())
        assert len(set(answers[30].tolist())) == 1, "all of the bank votes alike for every query"
        for empty, other in ((bank, queries), (queries, bank)):
            none = Features(empty.x[:0], empty.y[:0])
            pair = (none, other) if empty is bank else (other, none)
            with pytest.raises(EvalError, match="split is empty. fix: "):
                knn_predictions(*pair, num_neighbors=[1], **given)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_H3_weights_that_are_not_finite(value: float, run: Run, run_dir: Path) -> None:
    """H3 | one weight of the encoder is NaN or infinite | one line that counts the features, by every
    evaluator
    """
    path = run_dir / "encoder/model.safetensors"
    weights = load_file(path)
    weights["bn1.bias"][0] = value
    save_file(weights, path)
    for evaluator in EVERY:
        refused(
            run(run_dir, evaluator, *PLAIN, *QUICK),
            "68 of 68 extracted features are not finite. fix: use another checkpoint",
        )


def test_H3_images_that_are_black(run: Run, tmp_path: Path) -> None:
    """H3 | all-zero features: black images as pixels | one line that counts them; a diagnosis says so and
    goes on
    """
    black = [png(np.zeros((16, 16, 3), np.uint8))] * 2 + striped_images(30)[0]
    source = data_of(tmp_path / "data", [0, 1] * 8, [0, 1] * 8, images=black)
    refused(run("pixels", "knn", f"data.source={source}", *PLAIN), "2 of 16 train features are all zero")
    assert run("pixels", "linear", "diagnose", f"data.source={source}", *PLAIN).code == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_H3_features_that_are_all_equal(backend: Any, run: Run, tmp_path: Path) -> None:
    """H3 | every image is the same one | equal neighbours enter in the order of their rows, for both back
    ends, and no evaluator breaks
    """
    same = [png(np.full((16, 16, 3), 90, np.uint8))] * 40
    source = data_of(tmp_path / "data", [3, 1, 1, 2] * 6, [1, 1, 2, 3] * 4, images=same)
    found = run(
        "pixels",
        "knn",
        f"data.source={source}",
        "knn.num_neighbors=[1,3,24]",
        "knn.temperature=null",
        f"knn.backend={backend}",
        "device=cpu",
    )
    assert [row["value"] for row in found.rows] == ["25.00", "50.00", "50.00"], (
        "the first image's label, then the most frequent"
    )
    bank, query = (
        Features(torch.ones(24, 8), torch.tensor([3, 1, 1, 2] * 6)),
        Features(torch.ones(1, 8), torch.tensor([0])),
    )
    answers = knn_predictions(bank, query, num_neighbors=[1, 2, 3, 24], temperature=None, backend=backend)
    # k = 2: one vote each, the lowest class
    assert {k: labels.item() for k, labels in answers.items()} == {1: 3, 2: 1, 3: 1, 24: 1}
    for evaluator in EVERY[1:]:
        assert run("random", evaluator, f"data.source={source}", "model.width=8", *PLAIN, *QUICK).code == 0, (
            evaluator
        )


def neighbours(bank: Features, queries: Features, k: int) -> np.ndarray:
    """Numpy, float64: (Q, k) rows by cosine, equal ones lowest row first."""
    unit = [
        part.x.double().numpy() / np.linalg.norm(part.x.double().numpy(), axis=1, keepdims=True)
        for part in (bank, queries)
    ]
    return np.argsort(-(unit[1] @ unit[0].T).round(9), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("ties", [False, True])
def test_H4_faiss_torch_and_numpy_agree(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """H4 | faiss, torch and numpy in float64, without and with many equal distances | the same neighbours,
    accuracy equal to 1e-12
    """
    bank, queries = random_features(300, 1), random_features(100, 2)
    if ties:
        # four of eight are 1 or -1: of length 2, so that float32 holds every cosine
        for part in (bank, queries):
            part.x.copy_(part.x.sign() * (part.x.argsort(1).argsort(1) < 4))
    chosen: dict[str, list[Tensor]] = {}
    settle = linear_eval.knn._settle
    for backend in ("torch", *(["faiss"] if import_faiss() is not None else [])):
        chosen[backend] = []

        def kept(*given: Any, into: list[Tensor] = chosen[backend]) -> tuple[Tensor, ...]:
            found = settle(*given)
            into.append(found[1])
            return found

        monkeypatch.setattr(linear_eval.knn, "_settle", kept)
        for k in (1, 7, 50):
            rows = neighbours(bank, queries, k)
            votes = np.stack([np.bincount(bank.y.numpy()[row], minlength=4) for row in rows])
            expected = float((votes.argmax(1) == queries.y.numpy()).mean())
            found = knn_accuracies(bank, queries, num_neighbors=[k], temperature=None, backend=backend)  # type: ignore[arg-type]
            assert abs(found[k] - expected) <= 1e-12
            assert np.array_equal(np.sort(chosen[backend].pop().numpy(), axis=1), np.sort(rows, axis=1))


@pytest.mark.skipif(import_faiss() is None, reason="no faiss")
@pytest.mark.parametrize("error", [RuntimeError("Error in cudaMalloc: out of memory"), MemoryError()])
@pytest.mark.parametrize("when", ["made", "filled", "searched"])
def test_H5_a_full_gpu(error: Exception, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H5 | faiss runs out of GPU memory: when its index is made, filled, searched | the CPU answers, with the
    same numbers
    """
    import faiss

    class Index:
        def __init__(self, *given: object) -> None:
            self.fails("made")

        def add(self, bank: object) -> None:
            self.fails("filled")

        def search(self, queries: object, k: int) -> None:
            self.fails("searched")

        def fails(self, now: str) -> None:
            seen.append(now)
            if now == when:
                raise error

    seen: list[str] = []
    bank, queries = random_features(60, 1), random_features(50, 2)
    given: dict[str, Any] = {"num_neighbors": [1, 7], "temperature": 0.1}
    expected = knn_predictions(bank, queries, **given, backend="torch")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(
        faiss, "StandardGpuResources", lambda: SimpleNamespace(setTempMemory=lambda size: None), raising=False
    )
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", Index, raising=False)
    found = knn_predictions(bank, queries, **given, backend="faiss", device="cuda:0")
    assert seen[-1] == when and all(torch.equal(found[k], expected[k]) for k in expected)


# ---- labels


def test_H6_a_test_class_that_train_lacks(run: Run, run_dir: Path, tmp_path: Path) -> None:
    """H6 | test images of a class without train images | every evaluator counts them as wrong"""
    source = data_of(tmp_path / "data", [0, 1] * 12, [0, 1, 2, 2] * 4)
    words = (f"data.source={source}", *PLAIN, *QUICK)
    for evaluator in ("knn", "linear", "fewshot", "finetune"):
        assert float(run(run_dir, evaluator, *words).rows[0]["value"]) <= 50
    for protocol in ("cached", "augmented"):
        assert (
            float(
                run(run_dir, "linear", f"linear.protocol={protocol}", "linear.epochs=1", *words).rows[0][
                    "value"
                ]
            )
            <= 50
        )
    assert run(run_dir, "diagnose", *words).code == 0


def test_H6_one_class_for_all(run: Run, run_dir: Path, tmp_path: Path) -> None:
    """H6 | one class for all images | kNN is right by definition; what fits a classifier refuses in one
    line
    """
    source = data_of(tmp_path / "data", [0] * 24, [0] * 16)
    words = (f"data.source={source}", *PLAIN, *QUICK)
    assert run(run_dir, "knn", *words).rows[0]["value"] == "100.00"
    for evaluator in ("linear", "fewshot", "finetune"):
        refused(run(run_dir, evaluator, *words), "class")
    for protocol in ("cached", "augmented"):
        refused(run(run_dir, "linear", f"linear.protocol={protocol}", "linear.epochs=1", *words), "class")
    assert run(run_dir, "diagnose", *words).code == 0


def test_H6_labels_that_are_missing(run: Run, run_dir: Path, tmp_path: Path) -> None:
    """H6 | labels of -1, for some images and for all of a split | one line"""
    source = data_of(tmp_path / "some", [0, 1] * 12, [0, 1, -1, 1] * 4)
    refused(run(run_dir, "knn", f"data.source={source}", *PLAIN), "4 of 16 labels of")
    source = data_of(tmp_path / "all", [0, 1] * 12, [-1] * 16)
    refused(run(run_dir, "knn", f"data.source={source}", *PLAIN), "the test split of")


# ---- several processes


PAIR = """
import contextlib, io, json, os, signal, sys
from ssl_emp.commands import evaluate, evaluators
from ssl_emp.errors import UserError

def fails(*given, **options):
    if os.environ["RANK"] == "1":
        raise UserError("an image is damaged", "fetch it again")
    return original(*given, **options)

def dies(*given, **options):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given, **options)

for name, port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    if name == "dies":  # the one that is left ends at once
        evaluators.extract_features, original = dies, evaluators.extract_features
        sys.exit(evaluate.main(words))
    load_splits = original = evaluate.load_splits
    evaluate.load_splits = fails if name == "fails" else original
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = evaluate.main(words)
    evaluate.load_splits = load_splits
    print(json.dumps([name, code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.mark.slow
def test_H7_two_processes(run: Run, run_dir: Path, tmp_path: Path, tiny_data: Path) -> None:
    """H7 | two processes and 68 + 40 images in batches of 7; one cannot read, one is killed | what one
    process gives; one line each

    The table, the files and the features are equal to the bit, and what the second process cannot do, the
    first one tells.
    """
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "targets": [{"name": "a", "source": str(tiny_data)}, {"name": "b", "source": "x"}],
            }
        )
    )
    words = [
        str(run_dir),
        "random",
        "knn",
        "linear",
        "transfer",
        f"transfer.suite={suite}",
        "transfer.num_draws=100",
        "batch_size=7",
    ]
    words += ["knn.num_neighbors=[1,9]", "device=cpu", "seed=1"]
    alone = run(*words, f"cache_dir={tmp_path / 'one'}", "--out", tmp_path / "alone")
    together = [*words, f"cache_dir={tmp_path / 'two'}", "--out", str(tmp_path / "together")]
    judged = [
        ("shares", together),
        ("again", together),
        ("fails", [str(run_dir), "knn", *PLAIN]),
        ("dies", [str(run_dir), "knn", *PLAIN]),
    ]
    commands = [(name, free_port(), given) for name, given in judged]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, json.dumps(commands)],
            cwd=ROOT,
            env=os.environ
            | {
                "WORLD_SIZE": "2",
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [3, -signal.SIGKILL], outputs
    first, second = (
        {(line := json.loads(text))[0]: line[1:] for text in out.splitlines()} for out, _ in outputs
    )
    assert first["shares"] == [0, alone.out, alone.err] and alone.rows and "not judged: b" in alone.out
    assert first["again"] == [0, alone.out, alone.err], "from the cache, where there is nothing to share"
    for name in ("knn.json", "linear.json", "transfer.json"):
        assert (tmp_path / "together" / name).read_text() == (tmp_path / "alone" / name).read_text()
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(files) == 4 and files == {
        path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()
    }
    code, out, err = first["fails"]
    assert (code, err) == (2, "error: rank 1: an image is damaged. fix: fetch it again\n")
    assert [row["value"] for row in table(out)] == [""], "a row without a number"
    (line,) = outputs[0][1].splitlines()
    assert line.startswith("error: rank 1 is lost (") and line.endswith(
        "fix: see what it wrote, and start all of them again"
    )
    assert second == {"shares": [0, "", ""], "again": [0, "", ""], "fails": [2, "", ""]}, (
        "only the first one speaks"
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_H7_half_a_launch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """H7 | RANK without WORLD_SIZE, a rank that is no number | one line"""
    monkeypatch.setenv("RANK", "1")
    refused(
        run("pixels", "knn"), "RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. fix: "
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(
        run("pixels", "knn"), "RANK, WORLD_SIZE is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT. fix: "
    )


# ---- the encoder and the splits


def test_H8_the_encoder_stays_as_it_was(run: Run, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H8 | every evaluator on one encoder, training ones among them | its weights, BatchNorm buffers, modes
    and files are what they were, but for the model card, which tells the results
    """

    def files() -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in (run_dir / "encoder").iterdir()}
        return {name: data for name, data in found.items() if name != "README.md"}

    before_all = files()
    built: list[tuple[nn.Module, str]] = []
    build = evaluate.build

    def kept(*given: Any) -> nn.Module:
        encoder = build(*given)
        built.append((encoder, state_hash(encoder)))
        return encoder

    monkeypatch.setattr(evaluate, "build", kept)
    few = ("fewshot.finetune=true", "fewshot.epochs=1")
    assert run(run_dir, *EVERY, *PLAIN, *QUICK, *few).code == 0
    for protocol in ("cached", "augmented"):
        assert run(run_dir, "linear", f"linear.protocol={protocol}", "linear.epochs=1", *PLAIN).code == 0
    assert len(built) == 3 and all(state_hash(encoder) == before for encoder, before in built)
    assert any(name.endswith("running_mean") for name, _ in built[0][0].named_buffers())
    assert files() == before_all and set(before_all) == {"config.json", "model.safetensors"}


def test_H8_an_encoder_that_changes_itself(
    run: Run, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H8 | an encoder that writes a buffer in eval mode | one line, no number"""

    class Counting(subjects.Pixels):
        def __init__(self, image_size: int) -> None:
            super().__init__(image_size)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            self.get_buffer("seen").add_(len(images))
            return super().forward(images)

    monkeypatch.setattr(subjects, "Pixels", Counting)
    found = run("pixels", "knn", f"data.source={tiny_data}", *PLAIN)
    refused(found, "pixels changed while knn judged it")
    assert [row["value"] for row in found.rows] == [""]


def test_H9_test_images_in_train(run: Run, run_dir: Path, tmp_path: Path) -> None:
    """H9 | test images that also occur in train, or in val, among them one twice | a warning with the count,
    also for a suite's targets
    """
    data, _ = striped_images(60)
    train, test = data[:30], [data[0], data[7], data[7], *data[40:53]]
    source = data_of(tmp_path / "data", [0, 1] * 15, [0, 1] * 8, images=train + test)
    warning = "2 of 15 distinct test images also occur in the train split, pixel by pixel"
    assert run(run_dir, "pixels", "knn", f"data.source={source}", *PLAIN).notes == [f"warning: {warning}"]
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": "tiny", "targets": [{"name": "leaky", "source": str(source)}]}))
    found = run(run_dir, "transfer", f"transfer.suite={suite}", "transfer.num_draws=100", *PLAIN)
    assert [line for line in found.notes if line.startswith("warning")] == [f"warning: leaky: {warning}"]
    clean = data_of(tmp_path / "clean", [0, 1] * 15, [0, 1] * 8)
    assert run(run_dir, "knn", f"data.source={clean}", *PLAIN).notes == []


@pytest.mark.parametrize("how", ["batches of 1", "batches of 7", "2 threads"])
def test_H4_features_do_not_depend_on_batches_or_threads(
    how: str, run_dir: Path, tmp_path: Path, tiny_data: Path
) -> None:
    """H4 | another batch size, another number of threads | features within 1e-5, the same table"""
    torch.manual_seed(1)
    encoder = load_encoder(run_dir)
    images = load_images(str(tiny_data), "train")
    usual = extract_features(encoder, images.pixels, images.labels, batch_size=256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if how == "2 threads" else threads)
        size = {"batches of 1": 1, "batches of 7": 7}.get(how, 256)
        found = extract_features(encoder, images.pixels, images.labels, batch_size=size)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found.x, usual.x, atol=1e-5, rtol=1e-5)
    assert usual.x.std() > 0.01
