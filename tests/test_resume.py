"""What a resumed run notices, repairs and keeps: its directory, its files, its images, its plan."""

import hashlib
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import striped_images, write_parquet
from PIL import Image
from safetensors.torch import load_file, save_file

from ssl_emp import load_encoder
from ssl_emp.commands import evaluate, pretrain
from ssl_emp.commands.job import short_run_lines
from ssl_emp.config import PRUNE_SECTIONS, load_config
from ssl_emp.data.images import sampled_fingerprint
from ssl_emp.errors import UserError
from ssl_emp.prune import POLICIES
from ssl_emp.prune.figures import describe_terms
from ssl_emp.prune.plan import PrunePlan
from ssl_emp.run.checkpoint import load_checkpoint, save_checkpoint
from ssl_emp.run.report import Report
from ssl_emp.safe_files import as_json


class AtStep(pretrain.Stop):
    """Stands in for `pretrain.Stop`: `act` happens within step `step`, and a signal comes in the step where
    `stop` says so.
    """

    step, stop = 0, 0
    act: Callable[[], None] | None = None

    def __init__(self) -> None:
        self.reads = 0

    @property
    def signal(self) -> int:  # type: ignore[override]  # each step reads it once
        self.reads += 1
        if self.reads == AtStep.step and AtStep.act is not None:
            AtStep.act()
        return int(signal.SIGTERM) if self.reads == AtStep.stop else 0


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> type[AtStep]:
    monkeypatch.setattr(pretrain, "Stop", AtStep)
    monkeypatch.setattr(AtStep, "step", 0)
    monkeypatch.setattr(AtStep, "stop", 0)
    monkeypatch.setattr(AtStep, "act", None)
    return AtStep


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- the run's own directory
# -----------------------------------------------------------------------------------------


def stranger(out: Path) -> None:
    """Another run's directory under the name `out`."""
    (out / "checkpoints").mkdir(parents=True)
    for name in (
        "config.yaml",
        ".lock",
        "metrics.jsonl",
        "train.log",
        "checkpoints/step_00000002.pt",
        "checkpoints/manifest.json",
    ):
        (out / name).write_text(f"{name} of another\n")


def moved(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def replaced(out: Path) -> None:
    moved(out)
    stranger(out)


def replaced_by_a_link(out: Path) -> None:
    moved(out)
    stranger(out.with_name("target"))
    out.symlink_to("target")


def emptied(out: Path) -> None:
    moved(out)
    out.mkdir()


def taken_over(out: Path) -> None:
    """Somebody removed the lock, and a second run holds a new one."""
    (out / ".lock").unlink()
    (out / ".lock").write_text("process 1 on elsewhere\n")


@pytest.mark.parametrize(
    ("change", "step"), [(moved, 8), (replaced, 3), (replaced_by_a_link, 4), (emptied, 13), (taken_over, 3)]
)
def test_a_directory_that_is_another_gets_nothing(
    change: Callable[[Path], None],
    step: int,
    tiny_config: Path,
    tmp_path: Path,
    at_step: type[AtStep],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, after = tmp_path / "run", {}

    def act() -> None:
        change(out)
        after.update(content(out) if out.exists() else {})

    at_step.step, at_step.act = step, act
    assert (
        pretrain.main(["--config", str(tiny_config), f"out={out}", "epochs=2", "checkpoint.every_steps=2"])
        == 3
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line and "another is in its place" in line and "fix: " in line
    assert (content(out) if out.exists() else {}) == after, "the other's files are as they were"
    at_step.act = None
    now = out if change is taken_over else tmp_path / "elsewhere"
    if change is taken_over:
        (out / ".lock").unlink()
    state, warnings = load_checkpoint(now / "checkpoints")
    assert (state is None or state["step"] < step) and not warnings
    if change is replaced:
        assert pretrain.main(["--resume", str(now)]) == 0, "it goes on where it went"


def test_a_lock_that_was_only_removed_ends_no_run(
    tiny_config: Path, tmp_path: Path, at_step: type[AtStep]
) -> None:
    out = tmp_path / "run"
    at_step.step, at_step.act = 3, (out / ".lock").unlink
    assert (
        pretrain.main(["--config", str(tiny_config), f"out={out}", "epochs=2", "checkpoint.every_steps=2"])
        == 0
    )


def test_a_directory_moved_while_images_are_read_is_noticed(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    prepare = pretrain.prepare

    def slow(*arguments: object, **named: object) -> object:
        replaced(out)
        return prepare(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "prepare", slow)
    assert pretrain.main(["--config", str(tiny_config), f"out={out}"]) == 3
    assert (out / "config.yaml").read_text() == "config.yaml of another\n" and (
        out / ".lock"
    ).read_text() == ".lock of another\n"


# ---- a finished run
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each objective, to be copied."""
    runs = {}
    for objective in ("simclr", "supervised"):
        runs[objective] = tmp_path_factory.mktemp("finished") / objective
        words = [
            f"out={runs[objective]}",
            f"objective={objective}",
            "epochs=2",
            "monitor.reliability_every=0",
        ]
        assert pretrain.main(["--config", str(tiny_config), *words]) == 0
    return runs


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def other_weights(path: Path) -> None:
    weights = load_file(path)
    save_file(
        {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}, path
    )


def fewer_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def other_scores(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(
            table.schema.names.index("loss"), "loss", pa.array([0.5] * len(table), pa.float32())
        ),
        path,
    )


def emptied_file(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(b"\xff\x00{[: -\n")


def other_mean(path: Path) -> None:
    path.write_text(path.read_text().replace("0.485", "0.5"))


DAMAGES: list[tuple[str, str, Callable[[Path], None]]] = [
    ("simclr", "encoder/model.safetensors", Path.unlink),
    ("simclr", "encoder/model.safetensors", cut),
    ("simclr", "encoder/model.safetensors", other_weights),
    ("simclr", "encoder/config.json", emptied_file),
    ("simclr", "encoder/config.json", other_mean),
    ("simclr", "encoder", shutil.rmtree),
    ("simclr", "pruning/samples.parquet", Path.unlink),
    ("simclr", "pruning/samples.parquet", fewer_rows),
    ("simclr", "pruning/samples.parquet", other_scores),
    ("simclr", "pruning/samples.parquet", noise),
    ("simclr", "pruning", shutil.rmtree),
    ("simclr", "config.yaml", Path.unlink),
    ("simclr", "config.yaml", emptied_file),
    ("simclr", "config.yaml", noise),
    ("simclr", "environment.json", noise),
    ("supervised", "result.json", Path.unlink),
    ("supervised", "result.json", noise),
    ("supervised", "encoder/model.safetensors", cut),
]


@pytest.mark.parametrize(
    ("objective", "name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_finished_run_is_made_whole_again_with_the_same_bits(
    objective: str, name: str, damage: Callable[[Path], None], finished_runs: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = shutil.copytree(finished_runs[objective], tmp_path / finished_runs[objective].name)
    (out / "config.yaml").write_text(
        (out / "config.yaml").read_text().replace(str(finished_runs[objective]), str(out))
    )
    before = content(out)
    damage(out / name)
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"repair    {out / name}" in said or f"repair    {(out / name).parent}: " in said, said
    assert not re.search(r"^epoch +\d", said, re.MULTILINE), "nothing is trained"
    after = content(out)
    assert after.keys() == before.keys()
    kept = {path for path in before if not path.startswith(("checkpoints", "train.log", "environment"))}
    if name == "config.yaml":
        kept -= {"config.yaml"}
        settings = [yaml.safe_load(files["config.yaml"]) | {"out": None} for files in (before, after)]
        assert settings[0] == settings[1]
    assert {path for path in kept if after[path] != before[path]} == set()
    assert pretrain.main(["--resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said and "repair" not in said and content(out) == after


def test_rows_that_only_training_could_write_are_told(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(("", '{"epoch": 2}\n', '{"epoch": 1}\n{"ep')):
        out = shutil.copytree(finished_runs["simclr"], tmp_path / str(number))
        (out / "metrics.jsonl").write_text(text)
        assert pretrain.main(["--resume", str(out)]) == 0
        said = capsys.readouterr().out
        assert "warning   metrics.jsonl has no row of " in said and "nothing to do" in said
        assert f"{[2, 1, 1][number]} of 2 epochs, the first is epoch {[1, 1, 2][number]}" in said


def test_an_encoder_comes_back_when_the_images_are_gone(
    finished_runs: dict[str, Path],
    tiny_data: Path,
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "run"
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", "epochs=2", f"data.source={data}"]) == 0
    weights = (out / "encoder" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "encoder")
    data.rename(tmp_path / "elsewhere")
    assert pretrain.main(["--resume", str(out)]) == 0
    assert (out / "encoder" / "model.safetensors").read_bytes() == weights
    (out / "pruning" / "samples.parquet").unlink()  # holds the images' names
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out)]) == 2
    assert f"--resume {out} data.source=NEW" in capsys.readouterr().err
    assert pretrain.main(["--resume", str(out), f"data.source={tmp_path / 'elsewhere'}"]) == 0
    assert (out / "pruning" / "samples.parquet").is_file()
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["source"] == str(
        tmp_path / "elsewhere"
    ), "for evaluate.py"


@pytest.mark.parametrize("damage", [Path.unlink, cut, emptied_file])
def test_whoever_loads_a_missing_encoder_is_told_how_to_get_it(
    damage: Callable[[Path], None], finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(finished_runs["simclr"], tmp_path / "a run")
    damage(out / "encoder" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_encoder(out)
    assert f"fix: write it again from the run's last checkpoint: ssl-emp pretrain --resume '{out}'" in str(
        caught.value
    )


# ---- settings and images
# ---------------------------------------------------------------------------------------------


def write_folder(root: Path, images: list[bytes], labels: list[int]) -> Path:
    for number, (data, label) in enumerate(zip(images, labels, strict=True)):
        for split in ("train", "test"):
            path = root / split / f"c{label}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def stopped_runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `subset.txt`, and a run of each kind that was stopped at step 3."""
    root = tmp_path_factory.mktemp("stopped")
    write_folder(root / "data", *striped_images(40))
    (root / "subset.txt").write_text("".join(f"{number}\n" for number in range(32)))
    kinds = {
        "simclr": [],
        "supervised": ["objective=supervised"],
        "indices": ["prune.policy=indices", f"prune.indices={root / 'subset.txt'}"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "Stop", AtStep)
        patch.setattr(AtStep, "stop", 3)
        for name, words in kinds.items():
            words = [f"out={root / name}", f"data.source={root / 'data'}", "epochs=3", *words]
            assert pretrain.main(["--config", str(tiny_config), *words]) == 143
    return root


def rename_a_class(data: Path) -> None:
    for split in ("train", "test"):
        (data / split / "c3").rename(data / split / "c4")


def replace_one(data: Path) -> None:
    (data / "train" / "c1" / "021.png").write_bytes(striped_images(1, seed=9)[0][0])


def blacken_one(data: Path) -> None:
    with Image.open(data / "train" / "c2" / "038.png") as image:
        Image.new("RGB", image.size).save(data / "train" / "c2" / "038.png")


def replace_a_test_image(data: Path) -> None:
    (data / "test" / "c1" / "021.png").write_bytes(striped_images(1, seed=9)[0][0])


def drop_the_test_split(data: Path) -> None:
    (data / "test").rename(data.with_name("test of another"))


def reorder_the_subset(data: Path) -> None:
    path = data.with_name("subset.txt")
    path.write_text("\n".join(path.read_text().split()[::-1]) + "\n")


def another_subset(data: Path) -> None:
    data.with_name("subset.txt").write_text("".join(f"{number}\n" for number in range(8, 40)))


CHANGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("simclr", replace_one, "pixels differ"),
    ("simclr", blacken_one, "pixels differ"),
    ("simclr", rename_a_class, "names"),
    ("supervised", replace_a_test_image, "the test split"),
    ("supervised", drop_the_test_split, "the test split"),
    ("indices", another_subset, "subset.txt does not hold"),
    ("indices", reorder_the_subset, "subset.txt does not hold"),
]


@pytest.mark.parametrize(
    ("kind", "change", "named"), CHANGES, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_was_changed_under_a_run_is_one_line(
    kind: str,
    change: Callable[[Path], None],
    named: str,
    stopped_runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = shutil.copytree(stopped_runs, tmp_path / "all")
    change(root / "data")
    before = content(root / kind)
    where = ["prune.indices=" + str(root / "subset.txt")] if kind == "indices" else []
    assert pretrain.main(["--resume", str(root / kind), f"data.source={root / 'data'}", *where]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and "fix: restore" in line, line
    assert content(root / kind) == before


def test_labels_of_a_table_changed_under_a_supervised_run_only(
    tiny_config: Path, tmp_path: Path, at_step: type[AtStep], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = striped_images(40)
    write_parquet(tmp_path / "data" / "train.parquet", images, labels)
    at_step.stop = 3
    for objective in ("simclr", "supervised"):
        words = [
            f"out={tmp_path / objective}",
            f"data.source={tmp_path / 'data'}",
            f"objective={objective}",
            "epochs=2",
        ]
        assert pretrain.main(["--config", str(tiny_config), *words]) == 143
    at_step.stop = 0
    labels[17] = (labels[17] + 1) % 4
    write_parquet(tmp_path / "data" / "train.parquet", images, labels)
    capsys.readouterr()
    assert pretrain.main(["--resume", str(tmp_path / "supervised")]) == 2
    assert "the labels in " in capsys.readouterr().err
    assert pretrain.main(["--resume", str(tmp_path / "simclr")]) == 0, "it trains on none"


@pytest.mark.parametrize("kind", ["simclr", "supervised", "indices"])
def test_images_that_moved_are_no_change(
    kind: str, stopped_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, still = (shutil.copytree(stopped_runs, tmp_path / name) for name in ("all", "still"))
    moved = (root / "data").rename(root / "job 2")
    (root / "subset.txt").rename(root / "of job 2.txt")
    capsys.readouterr()
    words = [
        f"data.source={moved}",
        "data.kind=folder",
        *([f"prune.indices={root / 'of job 2.txt'}"] if kind == "indices" else []),
    ]
    assert pretrain.main(["--resume", str(root / kind), *words]) == 0
    assert pretrain.main(["--resume", str(still / kind)]) == 0, "the same run where the images are"
    exported = Path("encoder", "model.safetensors")
    assert (root / kind / exported).read_bytes() == (still / kind / exported).read_bytes()
    saved = yaml.safe_load((root / kind / "config.yaml").read_text())
    assert saved["data"]["source"] == str(moved) and saved["data"]["kind"] == "folder"


def test_a_checkpoint_that_knows_a_sample_of_its_images_goes_on(
    stopped_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written before all images were looked at: the same images go on, others are refused."""
    root = shutil.copytree(stopped_runs, tmp_path / "all")
    job = pretrain.prepare(
        load_config(root / "simclr" / "config.yaml", [f"data.source={root / 'data'}"]), Report()
    )
    for digest, code in (("0" * 64, 2), (sampled_fingerprint(job.images), 0)):
        state, _ = load_checkpoint(root / "simclr" / "checkpoints")
        assert state is not None
        save_checkpoint(root / "simclr" / "checkpoints", {**state, "fingerprint": digest}, 3)
        assert pretrain.main(["--resume", str(root / "simclr"), f"data.source={root / 'data'}"]) == code
    assert "not those of the checkpoint" in capsys.readouterr().err


def test_a_config_file_changed_under_auto_resume_is_refused(
    tiny_config: Path, tmp_path: Path, at_step: type[AtStep], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "c.yaml", tmp_path / "run"
    text = tiny_config.read_text() + "checkpoint: {every_steps: 4}\n"
    config.write_text(text)
    start = ["--config", str(config), "--auto-resume", f"out={out}"]
    at_step.stop = 3
    assert pretrain.main(start) == 143
    before = content(out)
    changes = {
        "epochs: 5": ("epochs: 50", "epochs was 5 and is now 50"),
        "epochs: 5\n": ("epochs: 4\n", "epochs was 5 and is now 4"),
        "lr: 0.05": ("lr: 0.1", "optimizer.lr was 0.05 and is now 0.1"),
        "fraction: 0.4": ("fraction: 0.3", "prune.fraction was 0.4 and is now 0.3"),
        "crop_scale: [0.5, 1.0]": (
            "crop_scale: [0.4, 1.0]",
            "augment.crop_scale was [0.5, 1.0] and is now [0.4, 1.0]",
        ),
        "width: 8, ": ("", "model.width was 8 and is now 64"),
    }
    for old, (new, said) in changes.items():
        config.write_text(text.replace(old, new))
        capsys.readouterr()
        assert pretrain.main(start) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and "fix: " in line, line
        assert content(out) == before
    config.write_text(text.replace("every_steps: 4", "every_steps: 2").replace("device: cpu", "device: auto"))
    at_step.stop = 2
    assert pretrain.main([*start, "device=cpu"]) == 143, "free keys stay free"
    at_step.stop = 0
    config.write_text(text)
    assert pretrain.main(start) == 0
    assert pretrain.main(start) == 0 and "nothing to do" in capsys.readouterr().out


# ---- trained longer
# --------------------------------------------------------------------------------------------------


def figures(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    left_out = ("seconds", "per_second", "reliability", "share")
    return [
        {key: value for key, value in row.items() if not any(part in key for part in left_out)}
        for row in rows
    ]


LONGER = {
    "emp": ["prune.ema=0.5", "prune.scoring=pruned"],
    "one cycle": ["objective=supervised", "optimizer.schedule=onecycle", "prune.policy=infobatch"],
    "random": ["prune.policy=random", "optimizer.warmup_epochs=4.5", "prune.redraw_every=2"],
    "sizes": ["augment.size=[[8, 0.3], [12, 0.6], [16, 1]]", "prune.policy=foresight"],
}


@pytest.mark.parametrize("kind", list(LONGER))
def test_a_run_trained_longer_is_the_run_of_its_own_settings(
    kind: str, tiny_config: Path, tmp_path: Path, at_step: type[AtStep], capsys: pytest.CaptureFixture[str]
) -> None:
    """3 epochs, then 5 of them, then 6, stopped within: bit for bit the run that is given the final
    config.yaml from the start.
    """
    words = ["epochs=3", "monitor.reliability_every=0", "monitor.knn_every=0", *LONGER[kind]]
    out = tmp_path / "longer"
    assert pretrain.main(["--config", str(tiny_config), f"out={out}", *words]) == 0
    first = (out / "metrics.jsonl").read_bytes()
    at_step.stop = 3
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out), "epochs=5"]) == 143
    assert "longer    3 epochs were planned, and are 5 now: from epoch 4 on" in capsys.readouterr().out
    at_step.stop = 2
    assert pretrain.main(["--resume", str(out), "epochs=6"]) == 143
    at_step.stop = 0
    assert pretrain.main(["--resume", str(out)]) == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(first), "what was trained stays as it was"
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["epochs"] == 6 and saved["earlier_plans"] == [[3, 3], [5, 4]]

    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(saved | {"out": None}))
    reference = tmp_path / "reference"
    assert pretrain.main(["--config", str(again), f"out={reference}"]) == 0
    for name in ("encoder/model.safetensors", "pruning/samples.parquet"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert figures(out) == figures(reference) and [row["epoch"] for row in figures(out)] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out)]) == 0 and "nothing to do" in capsys.readouterr().out


def test_the_plan_of_what_was_trained_stays_and_the_rest_is_laid_anew() -> None:
    """By hand: 100 images in batches of 10, half of them pruned; 4 epochs with one of annealing, then 8 with
    two.
    """
    plan = PrunePlan(8, 0.5, 1, 0.25, earlier=((4, 4),))
    assert plan.epoch_steps(100, 10) == [10, 5, 5, 10, 5, 5, 10, 10]
    assert [plan.at(epoch).epochs for epoch in range(8)] == [4] * 4 + [8] * 4
    within = PrunePlan(8, 0.5, 1, 0.25, earlier=((4, 2), (6, 3)))
    assert within.epoch_steps(100, 10) == [10, 5, 5, 5, 5, 5, 10, 10] and [
        within.at(epoch).epochs for epoch in (1, 2, 3)
    ] == [4, 6, 8]
    assert PrunePlan(8, 0.5, 1, 0.25, earlier=((4, 0),)).epoch_steps(100, 10) == PrunePlan(
        8, 0.5, 1, 0.25
    ).epoch_steps(100, 10)


def test_the_learning_rate_of_a_longer_run(tiny_config: Path) -> None:
    """The old curve to its end, then the new one where it stands at that step."""

    def rates(*words: str) -> list[float]:
        job = pretrain.prepare(load_config(tiny_config, [*words]), Report())
        return [job.schedule.lr(step) for step in range(job.total_steps)]

    short, long = rates("epochs=3", "prune.policy=none"), rates("epochs=6", "prune.policy=none")
    assert rates("epochs=6", "prune.policy=none", "earlier_plans=[[3, 3]]") == short + long[len(short) :]
    assert short[-1] < 0.002 < 0.02 < long[len(short)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["epochs=1"], ["epochs was 2 and is now 1", "give 2 or more"]),
        (["epochs=4", "temperature=0.2"], ["temperature was 0.5 and is now 0.2"]),
        (["epochs=0"], ["epochs"]),
        (["epochs=4", "earlier_plans=[[1, 1]]"], ["earlier_plans"]),
        (["earlier_plans=[[1, 1]]"], ["earlier_plans"]),
        (["epochs=4", "prune.policy=shorter"], ["prune.policy was emp and is now shorter"]),
    ],
)
def test_what_is_no_longer_run_is_refused(
    overrides: list[str],
    said: list[str],
    finished_runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = shutil.copytree(finished_runs["simclr"], tmp_path / "run")
    before = content(out)
    assert pretrain.main(["--resume", str(out), *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in said), line
    assert content(out) == before


def test_a_longer_run_killed_at_any_file_goes_on(
    finished_runs: dict[str, Path], tmp_path: Path, at_step: type[AtStep]
) -> None:
    """config.yaml says 4 while the newest usable checkpoint is one of 2: those of 4 are damaged."""
    out, reference = (
        shutil.copytree(finished_runs["simclr"], tmp_path / name) for name in ("run", "reference")
    )
    assert pretrain.main(["--resume", str(reference), "epochs=4"]) == 0
    shutil.copy(reference / "config.yaml", out / "config.yaml")
    assert pretrain.main(["--resume", str(out)]) == 0
    assert content(out)["encoder/model.safetensors"] == content(reference)["encoder/model.safetensors"]
    cut(max((out / "checkpoints").glob("step_*.pt")))
    assert pretrain.main(["--resume", str(out)]) == 0
    assert content(out)["encoder/model.safetensors"] == content(reference)["encoder/model.safetensors"]


# ---- what is shown and written
# ---------------------------------------------------------------------------------------


def points(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # as the files are, whatever a reader would leave out
    found = EventAccumulator(str(out), purge_orphaned_data=False)
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


@pytest.mark.parametrize("fault", ["none", "events lost", "metrics lost", "off and on", "events damaged"])
def test_tensorboard_shows_what_metrics_hold(
    fault: str, tiny_config: Path, tmp_path: Path, at_step: type[AtStep]
) -> None:
    """Stopped within the second and the third epoch, gone back behind a checkpoint: each epoch once, with the
    numbers of metrics.jsonl.
    """
    out = tmp_path / "run"
    start = [
        "--config",
        str(tiny_config),
        f"out={out}",
        "epochs=4",
        "checkpoint.every_steps=1",
        "monitor.tensorboard=true",
    ]
    at_step.stop = 20
    assert pretrain.main(start) == 143
    for path in sorted((out / "checkpoints").glob("step_*.pt")):
        path.unlink()
    if fault == "events lost":
        for path in out.glob("events.*"):
            path.unlink()
    if fault == "metrics lost":
        (out / "metrics.jsonl").unlink()
    if fault == "events damaged":
        cut(next(out.glob("events.*")))
    at_step.stop = 10
    off = ["monitor.tensorboard=false"] if fault == "off and on" else []
    assert pretrain.main(["--resume", str(out), *off]) == 143
    at_step.stop = 0
    assert pretrain.main(["--resume", str(out)]) == 0
    wanted: dict[str, list[tuple[int, Any]]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "epoch" and value is not None:
                wanted.setdefault(name, []).append((row["epoch"], pytest.approx(value, rel=1e-6)))
    found = points(out)
    assert found.keys() == wanted.keys()
    assert {tag: sorted(found[tag]) == wanted[tag] for tag in wanted} == dict.fromkeys(wanted, True)


@pytest.mark.parametrize(
    "out", ["runs/mine/", "runs/mine", "runs/mine//", "here/data/run", "here/data/c0/", "./x/../runs/mine/"]
)
def test_a_dry_run_is_in_nobodys_way(
    out: str,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_folder(tmp_path / "here" / "data", *striped_images(40))
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    out = f"{out}run/" if out.endswith("c0/") else out
    start = [
        "--config",
        str(tiny_config),
        f"out={out}",
        "data.source=here/data/train",
        "epochs=1",
        "monitor.knn_every=0",
    ]
    assert pretrain.main([*start, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    picture = Path(
        next(line for line in dry.splitlines() if line.startswith("views ")).removeprefix("views").strip()
    )
    with Image.open(picture) as image:
        assert image.size[0] > 100
    assert pretrain.main(start) == 0
    counted = [
        next(line for line in said.splitlines() if line.startswith("images"))
        for said in (dry, capsys.readouterr().out)
    ]
    assert counted[0] == counted[1]


def test_a_dry_run_that_cannot_write_says_so(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'file' / 'run'}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "views     cannot be written to " in said and "give out=DIR" in said and "nothing was trained" in said
    )


def test_json_has_no_word_for_what_is_not_finite(tiny_config: Path, tmp_path: Path) -> None:
    assert as_json(
        {"a": float("nan"), "b": [1.5, float("inf"), (float("-inf"), None)], "c": {"d": True}}
    ) == ('{"a": null, "b": [1.5, null, [null, null]], "c": {"d": true}}')
    report = Report()
    report.attach(tmp_path, ["tensorboard"])
    report.metrics({"epoch": 1, "loss": float("nan"), "x": float("inf"), "y": 2.0})
    report.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "loss": null, "x": null, "y": 2.0}\n'
    assert points(tmp_path) == {"y": [(1, 2.0)]}


def test_figures_of_what_is_constant_or_was_skipped_are_numbers() -> None:
    loss, alike = torch.tensor([0.5, 1.0, 2.0]), torch.ones(3)
    assert describe_terms(torch.stack([loss, -alike]), 5.0, True)["std_beta_memory"] == 0
    assert set(describe_terms(torch.stack([alike, -alike]), 5.0, True).values()) <= {0.0, 1.0}
    seen = torch.stack([loss, -loss])
    unseen = torch.cat([seen, torch.full((2, 2), torch.inf)], 1)
    assert describe_terms(unseen, 5.0, False) == describe_terms(seen, 5.0, False)


# ---- advice
# ----------------------------------------------------------------------------------------------------------


def advised(config: Path, words: list[str]) -> int:
    """How often the advice of an error must be followed until the job can be prepared."""
    for rounds in range(4):
        try:
            pretrain.prepare(load_config(config, words), Report())
        except UserError as error:
            fix = str(error).partition("fix: ")[2]
            keys = re.findall(r"\b([a-z_]+(?:\.[a-z_]+)?=[^\s,;]+)", fix)
            assert keys, f"no key to set: {error}"
            words = [*words, *keys]
        else:
            return rounds
    raise AssertionError(f"the advice leads nowhere: {words}")


@pytest.mark.parametrize("policy", ["emp", "random", "none", "shorter", "infobatch"])
@pytest.mark.parametrize(
    ("batch", "fraction"), [(69, 0.0), (64, 0.5), (40, 0.9), (68, 0.3), (34, 0.51), (30, 0.66)]
)
def test_a_batch_size_that_is_advised_can_be_trained(
    policy: str, batch: int, fraction: float, tiny_config: Path
) -> None:
    assert (
        advised(tiny_config, [f"batch_size={batch}", f"prune.fraction={fraction}", f"prune.policy={policy}"])
        <= 1
    )


@pytest.mark.parametrize("named", [8, 9, 17, 31, 39])
@pytest.mark.parametrize(
    "words", [[], ["prune.fraction=0.05"], ["epochs=200"], ["prune.anneal_fraction=0.0", "epochs=3"]]
)
def test_a_fraction_that_is_advised_for_a_few_samples_can_be_trained(
    named: int, words: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("".join(f"{number}\n" for number in range(named)))
    assert (
        advised(tiny_config, ["prune.policy=indices", f"prune.indices={tmp_path / 'few.txt'}", *words]) == 1
    )


@pytest.mark.parametrize("fraction", [0.4, 0.9, 0.994])
def test_one_sample_is_too_few_for_any_fraction(fraction: float, tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("7\n")
    words = [
        "prune.policy=indices",
        f"prune.indices={tmp_path / 'one.txt'}",
        f"prune.fraction={min(fraction, 0.87)}",
    ]
    with pytest.raises(UserError, match=r"fix: name at least the 8 samples of a batch"):
        pretrain.prepare(load_config(tiny_config, words), Report())


@pytest.mark.parametrize("noise", [[], ["data.label_noise=0.1"], ["label_smoothing=0.1"]])
def test_a_run_without_labels_is_led_to_simclr(noise: list[str], tiny_config: Path) -> None:
    assert advised(tiny_config, ["objective=supervised", "data.labels=none", *noise]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.warmup_epochs=5", "epochs=3"], "optimizer.warmup_epochs=5 is as long as the run"),
        (["optimizer.warmup_epochs=2", "epochs=3"], "the learning rate rises over"),
        (["epochs=1"], "nothing is pruned: prune.warmup_epochs=1"),
        (["prune.warmup_epochs=9"], "nothing is pruned: prune.warmup_epochs=9"),
        (["prune.anneal_fraction=1.0"], "lower prune.anneal_fraction"),
        (["prune.anneal_fraction=0.9", "epochs=2"], "nothing is pruned"),
        (["prune.fraction=0.01"], "prune.fraction=0.01 of 8 batches is none; raise prune.fraction"),
        (["epochs=20", "optimizer.warmup_epochs=1"], ""),
        (["prune.policy=none", "epochs=4"], ""),
        (["optimizer.schedule=onecycle", "optimizer.warmup_epochs=50"], ""),
    ],
)
def test_what_a_run_is_too_short_for_is_told(words: list[str], said: str, tiny_config: Path) -> None:
    job = pretrain.prepare(load_config(tiny_config, words), Report())
    lines = list(short_run_lines(job))
    assert any(said in line for line in lines) if said else not lines, lines
    for line in lines:
        keys = re.findall(r"; (?:try|set) (\S+=\S+)", line)
        again = (
            list(short_run_lines(pretrain.prepare(load_config(tiny_config, [*words, *keys]), Report())))
            if keys
            else []
        )
        assert line not in again and not any(
            "nothing is pruned" in other for other in again if "nothing is pruned" in line
        )


# ---- runs of ssl_emp 0.1
# ------------------------------------------------------------------------------------------------

# the section `prune` as ssl_emp 0.1 wrote it into config.yaml: every policy had all keys
FLAT: dict[str, Any] = {
    "policy": "emp", "fraction": 0.4, "beta": 5.0, "beta_end": None, "loss_weight": 1.0,
    "loss_weight_end": None, "warmup_epochs": 1, "anneal_fraction": 0.2, "scoring": "stale",
    "scoring_draw": "own", "scoring_draws": 1, "scoring_size": None, "rescore_every": 1, "memory": "raw",
    "layers": [], "ema": None, "adjust": False, "foresee": False, "shrink": False, "rescale": False,
    "explore": None, "soften": 0.0, "redraw_every": 1, "confidence": 1.0, "indices": None,
}  # fmt: skip
GONE_KEYS = {
    "beta_end": 1.0, "loss_weight_end": -1.0, "scoring_draw": "common", "rescore_every": 2,
    "layers": ["layer4"], "confidence": 0.5,
}  # fmt: skip


def as_of_0_1(out: Path, **keys: Any) -> Path:
    """The run, with the settings and the checkpoint format of ssl_emp 0.1."""
    settings = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"prune": FLAT | keys}, sort_keys=False))
    newest = max((out / "checkpoints").glob("step_*.pt"))
    state = torch.load(newest, weights_only=True)
    state |= {"format": 5, "written_by": "ssl_emp 0.1.0"}
    torch.save(state, newest)
    manifest = json.loads((out / "checkpoints" / "manifest.json").read_text())
    old, new = manifest[newest.name], hashlib.sha256(newest.read_bytes()).hexdigest()
    manifest[newest.name] = new if isinstance(old, str) else [new]
    (out / "checkpoints" / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_a_run_of_0_1_is_evaluated_and_not_resumed(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(FLAT) == 25
    out = as_of_0_1(shutil.copytree(finished_runs["simclr"], tmp_path / "run"))
    assert evaluate.main([str(out), "knn", "device=cpu"]) == 0
    assert (out / "knn.json").is_file() or list(out.glob("**/knn*.json"))
    before = content(out)
    capsys.readouterr()
    for more in ([], ["epochs=9"], ["device=cpu"]):
        assert pretrain.main(["--resume", str(out), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "was written by ssl_emp 0.1.0 in format 5, this is ssl_emp " in line
        assert line.endswith("reads format 6. fix: resume with the version that wrote it")
    assert content(out) == before


@pytest.mark.parametrize("key", list(GONE_KEYS))
def test_a_key_that_is_gone_and_was_used_is_one_line(
    key: str, finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its encoder is evaluated all the same; going on with it needs what this version does not have."""
    out = as_of_0_1(shutil.copytree(finished_runs["simclr"], tmp_path / "run"), **{key: GONE_KEYS[key]})
    assert evaluate.main([str(out), "knn", "device=cpu"]) == 0
    capsys.readouterr()
    assert pretrain.main(["--resume", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was written by ssl_emp 0.1.0 in format 5" in line
    shutil.rmtree(out / "checkpoints")  # then only its settings tell
    before = content(out)
    assert pretrain.main(["--resume", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    used = f"was trained with prune.{key}={GONE_KEYS[key]}, which this version does not have"
    assert f"{out / 'config.yaml'} {used}. fix: use ssl_emp 0.1 for this run" in line, line
    assert content(out) == before


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "indices"])
def test_the_settings_of_0_1_are_those_of_the_policy(policy: str, tmp_path: Path) -> None:
    """What had no effect is left out, null is the policy's own default, and what had one is kept."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"prune": FLAT | {"policy": policy}}))
    section = PRUNE_SECTIONS[policy]
    plan = {"policy": policy, "fraction": 0.4, "anneal_fraction": 0.2}
    read = load_config(file, [], of_run=True).prune
    assert read == section.model_validate(plan) and read.build() == POLICIES[policy]()
    file.write_text(
        yaml.safe_dump({"prune": FLAT | {"policy": policy, "ema": 0.7, "explore": 0.3, "rescale": True}})
    )
    read = load_config(file, [], of_run=True).prune
    turned = {"ema": 0.7, "explore": 0.3, "rescale": True}
    own = {key: value for key, value in turned.items() if key in section.model_fields}
    assert read == section.model_validate(plan | own)
    assert load_config(file, []).prune == read, "a copy of a run's config, given as --config"
    file.write_text(yaml.safe_dump({"prune": {"policy": policy, "confidence": 1.0}}))
    with pytest.raises(UserError, match="prune.confidence is not a key any more"):
        load_config(file, [])  # a config file of now has no such keys


def test_the_fixed_subset_of_a_run_of_0_1_stays(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"prune": FLAT | {"policy": "indices", "indices": "/data/some.txt"}}))
    read = load_config(file, [], of_run=True).prune
    own = {"policy": "indices", "fraction": 0.4, "anneal_fraction": 0.2, "indices": "/data/some.txt"}
    assert read == PRUNE_SECTIONS["indices"].model_validate(own)
