"""Fault matrix, pruning and configuration: rows G1 to G10, YAML bombs, good inputs. A row's docstring is `row
| fault | expected`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Pretrain, striped_images, write_parquet
from PIL import Image
from refused import main_refuses, refusal

from ssl_emp import config as module
from ssl_emp.commands import pretrain
from ssl_emp.config import PretrainConfig, load_config
from ssl_emp.data.images import load_images
from ssl_emp.errors import UserError
from ssl_emp.prune import InfoBatch, Pruner
from ssl_emp.prune.plan import PrunePlan, shuffled_batches

Record = Callable[[str, object], None]


def encoder_hash(run: Path) -> str:
    return hashlib.sha256((run / "encoder" / "model.safetensors").read_bytes()).hexdigest()


# --- G1 to G7: pruning


def test_G1_fraction_0(pretrain_run: Pretrain) -> None:
    """G1 | prune.fraction=0 | the unpruned run bit for bit"""
    runs = [
        pretrain_run(name, "epochs=3", option)
        for name, option in (("a", "prune.policy=none"), ("b", "prune.fraction=0"))
    ]
    assert encoder_hash(runs[0]) == encoder_hash(runs[1])


def test_G2_fraction_near_1(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """G2 | prune.fraction=0.99 with 64 images; 0.01 to 0.99 with 6,400 | refused, or at least one batch and
    the share asked for
    """
    line = main_refuses(
        capsys,
        "--config",
        str(tiny_config),
        f"out={tmp_path / 'out'}",
        "data.max_images=64",
        "prune.fraction=0.99",
    )
    assert "keeps 1 of the 64 images" in line and not (tmp_path / "out").exists()
    for hundredths in range(1, 100):
        plan = PrunePlan(50, hundredths / 100, 1, 0.125)
        steps = plan.epoch_steps(6400, 8)
        pruned = [count for epoch, count in enumerate(steps) if plan.is_pruned(epoch)]
        assert abs(sum(pruned) / len(pruned) - 800 * (1 - hundredths / 100)) < 0.5, (
            "half a batch in the whole run, at most one an epoch"
        )
        assert min(pruned) >= math.floor(800 * (1 - hundredths / 100))


@pytest.mark.parametrize(
    "value", ["1.0", "1.5", "-0.1", ".nan", ".inf", '"0.5"', "null", "half", "[0.5]", "true"]
)
def test_G3_fraction_out_of_range(value: str) -> None:
    """G3 | prune.fraction 1.0, 1.5, -0.1, nan, inf, "0.5", null, a word, a list, true | refused with the
    allowed range
    """
    message = refusal(lambda: load_config(None, [f"prune.fraction={value}"]))
    assert message.startswith("prune.fraction: should be ") and "allowed: 0 <= value < 1" in message


@pytest.mark.parametrize(("batch_size", "largest"), [(42, 34), (68, 34), (10**6, 34)])
def test_G4_fewer_kept_than_a_batch(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int, largest: int
) -> None:
    """G4 | a pruned epoch keeps fewer samples than a batch | refused at the start with the batch size that
    fits, which then works
    """
    base = ["--config", str(tiny_config), f"out={tmp_path / 'out'}"]
    line = main_refuses(capsys, *base, f"batch_size={batch_size}")
    assert (
        "41 of the 68 images" in line
        and f"set batch_size={largest} or less" in line
        and not (tmp_path / "out").exists()
    )
    assert pretrain.main([*base, f"batch_size={largest}"]) == 0


def test_G5_schedules(record_property: Record) -> None:
    """G5 | epochs 1..40 x anneal 0, .5, .875, 1 x warm-up 1, 5, 50 | no weights and all samples in every
    unpruned epoch
    """
    loss = torch.rand(40, generator=torch.Generator().manual_seed(0))
    schedules = 0
    for epochs in range(1, 41):
        for anneal in (0.0, 0.5, 0.875, 1.0):
            for warmup in (1, 5, 50):
                plan = PrunePlan(epochs, 0.5, warmup, anneal)
                full = {
                    epoch
                    for epoch in range(epochs)
                    if epoch < warmup or epoch >= epochs - round(anneal * epochs)
                }
                assert full == {epoch for epoch in range(epochs) if not plan.is_pruned(epoch)}
                steps = plan.epoch_steps(40, 4)
                assert len(steps) == epochs and all(
                    count == 10 for epoch, count in enumerate(steps) if epoch in full
                )
                pruner = Pruner(
                    40, batch_size=4, epochs=epochs, policy=InfoBatch(), fraction=0.5, warmup_epochs=warmup,
                    anneal_fraction=anneal,
                )  # fmt: skip
                pruner.record.observe(torch.arange(40), torch.stack([loss, loss]), None, 0)
                for epoch in {0, epochs - 1, epochs // 2}:
                    pruner.step = pruner.first_step(epoch)
                    kept = pruner.batches(epoch).flatten()
                    losses = torch.ones(len(kept), requires_grad=True)
                    (weights,) = torch.autograd.grad(pruner.weighted(kept, losses), losses)
                    is_full = len(kept.unique()) == 40 and bool((weights == weights[0]).all())
                    assert is_full == (epoch in full)
                schedules += 1
    record_property("schedules", schedules)
    for bad in ("prune.warmup_epochs=0", "prune.scoring_draws=0", "prune.anneal_fraction=1.1", "epochs=0"):
        assert "allowed: " in refusal(lambda bad=bad: load_config(None, [bad]))  # type: ignore[misc]


def test_G6_permuted_labels(pretrain_run: Pretrain, tmp_path: Path) -> None:
    """G6 | the labels permuted, and removed | the same samples are trained equally often, the same encoder
    bit for bit
    """
    images, labels = striped_images(68)
    permuted = np.random.default_rng(0).permutation(labels).tolist()
    seen = []
    for name, some in (("true", labels), ("permuted", permuted), ("none", None)):
        write_parquet(tmp_path / name / "train.parquet", images, some)
        run = pretrain_run(f"run {name}", f"data.source={tmp_path / name}", "epochs=4")
        seen.append(
            (
                encoder_hash(run),
                pq.read_table(run / "pruning" / "samples.parquet")["times_trained"].to_pylist(),
            )
        )
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0][1])) > 1


def test_G7_starvation(record_property: Record) -> None:
    """G7 | what no score favours: remainders, random halves, the same losers in all epochs | nobody is left
    out for good
    """

    def longest_gap(sets: list[torch.Tensor]) -> int:
        last, longest = torch.full((67,), -1), torch.zeros(67, dtype=torch.int64)
        for epoch, index in enumerate(sets):
            longest[index] = torch.maximum(longest[index], epoch - last[index])
            last[index] = epoch
        assert (last >= 0).all(), "a sample was never seen"
        return int(torch.maximum(longest, len(sets) - last).max())

    everything = torch.arange(67)
    full = longest_gap([shuffled_batches(everything, 8, 0, epoch).flatten() for epoch in range(100)])
    assert full == 2  # 3 of 67 are left out of an epoch, never the same one twice in a row
    record_property("longest gap in epochs, unpruned", full)
    for policy in ("random", "emp"):
        pruner = Pruner(67, batch_size=8, epochs=40, policy=policy, fraction=0.5, anneal_fraction=0.125)
        sets = []
        for epoch in range(len(pruner.steps)):
            for index in pruner.batches(epoch):  # high numbers win each time
                pruner.observe(pruner.gather(index, index.float(), torch.zeros(8)))
            sets.append(pruner.batches(epoch).flatten())
        gap = longest_gap(sets)
        record_property(f"longest gap in 40 epochs, {policy}", gap)
        assert gap <= {"random": 20, "emp": 36}[policy], (
            "the worst case for emp: from the warm-up to the annealing"
        )


# --- G8: files that are no config


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "typo": ("prune: {fractoin: 0.5}", "policy emp has no key prune.fractoin, did you mean prune.fraction?"),
    "typo of a section": ("pruning: {fraction: 0.5}", "unknown key pruning, did you mean prune?"),
    "wrong type": ("epochs: many", "epochs: should be a valid integer (is 'many'), allowed: 1 <= value"),
    "duplicate key": ("epochs: 3\nseed: 1\nepochs: 4", "line 3: key 'epochs' stands twice"),
    "number as text": ('optimizer: {lr: "1e-3"}', "optimizer.lr: should be a valid number (is '1e-3')"),
    "no": ("epochs: no", "epochs: should be a valid integer (is False)"),
    "octal": ("epochs: 012", "epochs: should be a valid integer (is '012')"),
    "hexadecimal": ("epochs: 0x10", "epochs: should be a valid integer"),
    "base sixty": ("epochs: 1:30", "epochs: should be a valid integer"),
    "tab": ("prune:\n\tfraction: 0.5", "line 2: found character '\\t'"),
    "binary": (bytes(range(256)), "is not a text file"),
    "UTF-16": ("epochs: 3".encode("utf-16"), "is not a text file"),
    "zero byte": ('data: {source: "a\\0b"}', "data.source: should be text without a zero byte"),
    "control character": ("epochs: \x01", "is not valid YAML"),
    "10 MB": (b"a: 1\n" * 2_000_000, "has more than 1,000,000 bytes"),
    "alias": ("a: &a [1]\nb: *a", "line 2: aliases"),
    "alias bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]", "line 2: aliases"),
    "merge": ("prune: {<<: {fraction: 0.5}}", "line 1"),
    "depth": ("[" * 200_000, "line 1: sections or lists nested more than"),
    "depth of sections": ("{a: " * 9_000, "line 1: sections or lists nested more than"),
    "closed depth": ("a: " + "[" * 9_000 + "]" * 9_000, "line 1: sections or lists nested more than"),
    "call": (
        "x: !!python/object/apply:os.system [touch executed]",
        "line 1: could not determine a constructor",
    ),
    "new object": (
        "x: !!python/object/new:os.system [touch executed]",
        "line 1: could not determine a constructor",
    ),
    "name": ("x: !!python/name:os.system", "line 1: could not determine a constructor"),
    "_target_": ("_target_: os.system\n_args_: [touch executed]", "unknown key _target_"),
    "list": ("- 1", "holds a list"),
    "number": ("3", "holds a int"),
    "two documents": ("epochs: 3\n---\nepochs: 4", "line 2"),
    "key is a list": ("? [a, b]\n: 1", "line 1: key ['a', 'b'] is not a name"),
    "key is a number": ("1: 2", "line 1: key 1 is not a name"),
    "newline in a key": ('"a\\nb": 1', "unknown key a\\nb"),
    "section as a value": ("prune: 0.5", "prune: is 0.5, give a section such as"),
    "300 unknown keys": ("".join(f"key{i}: 1\n" for i in range(300)), "300 problems: "),
    "number of 5,000 digits": ("epochs: 1" + "0" * 5000, "line 1"),
    "text of 100,000 letters": (f"temperature: {'x' * 100_000}", "temperature: should be a valid number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_G8_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """G8 | 35 broken files: typo, type, duplicate, YAML 1.1 traps, binary, 10 MB, bombs, calls | one line
    with key or line number
    """
    monkeypatch.chdir(tmp_path)
    content, said = BROKEN[name]
    path = write(tmp_path, content)
    message = refusal(lambda: load_config(path, []))
    assert said in message and str(path) in message, message
    assert len(message) < 700 + len(str(path)) or name == "300 unknown keys" and len(message) < 5000
    assert sorted(os.listdir(tmp_path)) == ["run.yaml"], "nothing was executed"


def test_G8_readable_oddities(tmp_path: Path) -> None:
    """G8 | empty file, byte order mark, 1e-3, a date as a folder's name, comments only, Windows line ends |
    read as meant
    """
    assert (
        load_config(write(tmp_path, ""), ["out=x"])
        == load_config(write(tmp_path, "# nothing\n"), ["out=x"])
        == PretrainConfig(out="x")
    )
    assert load_config(write(tmp_path, "\ufeffepochs: 3"), []).epochs == 3
    assert load_config(write(tmp_path, "optimizer: {lr: 1e-3}\r\nepochs: 3\r\n"), []).optimizer.lr == 0.001
    assert load_config(write(tmp_path, "data: {source: 2024-05-31}"), []).data.source == "2024-05-31"


def test_G8_paths_that_are_no_files(tmp_path: Path) -> None:
    """G8 | --config of a folder, a missing file, /dev/zero, a file without permission to read | one line with
    the path
    """
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "none.yaml", Path("/dev/zero"), tmp_path / "loop"):
        assert str(path) in refusal(lambda path=path: load_config(path, []))  # type: ignore[misc]


def test_G8_a_yaml_bomb_takes_no_time_or_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8 | billion laughs: ten aliases of ten aliases, nine levels | refused at the first alias"""
    lines = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "line 2: aliases" in refusal(lambda: load_config(write(tmp_path, "\n".join(lines)), []))


# --- G9: every key of the schema


def numeric_keys() -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """(dotted key, its JSON schema, how to write one number there, a policy that has it) for every number in
    the config.
    """
    schema = PretrainConfig.model_json_schema()
    seen: list[tuple[str, dict[str, Any]]] = []

    def walk(
        node: dict[str, Any], prefix: str, policy: str
    ) -> Iterator[tuple[str, dict[str, Any], str, str]]:
        for name, child in node["properties"].items():
            child = next((option for option in child.get("anyOf", []) if option.get("type") != "null"), child)
            sections = [option for option in child.get("oneOf", [child]) if "$ref" in option]
            for section in sections:  # of prune one a policy
                inner = schema["$defs"][section["$ref"].rpartition("/")[2]]
                own = inner["properties"].get("policy", {}).get("default", policy)
                yield from walk(inner, f"{prefix}{name}.", own)
            item = (f"{prefix}{name}", {part: value for part, value in child.items() if part != "default"})
            if sections or item in seen:  # every policy has the plan
                continue
            seen.append(item)
            if child.get("type") in ("integer", "number"):
                yield f"{prefix}{name}", child, "{}", policy
            elif child.get("type") == "array" and child["items"].get("type") in ("integer", "number"):
                fill = ", {}" * (child["minItems"] - 1)
                yield f"{prefix}{name}", child["items"], "[{}" + fill + "]", policy

    return walk(schema, "", "emp")


def values_for(node: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(a value as YAML, whether the schema allows it): bounds, one step beside them, and what is no number of
    use.
    """
    step = node.get("multipleOf", 1) if node["type"] == "integer" else 1e-3

    def allowed(value: float) -> bool:
        above = value >= node.get("minimum", -math.inf) and value > node.get("exclusiveMinimum", -math.inf)
        below = value <= node.get("maximum", math.inf) and value < node.get("exclusiveMaximum", math.inf)
        return (
            above and below and value % node.get("multipleOf", 1) == 0
            if node["type"] == "integer"
            else above and below
        )

    for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if name in node:
            for value in (node[name] - step, node[name], node[name] + step):
                yield (str(int(value)) if node["type"] == "integer" else repr(float(value))), allowed(value)
    if node["type"] == "integer":
        yield from ((text, False) for text in ("1.5", "1e3", str(2**63), str(-(2**63) - 1), "1" + "0" * 400))
    yield from (
        (text, False) for text in (".nan", ".inf", "-.inf", "1e400", "1" + "0" * 400, "1" + "0" * 5000)
    )
    yield from ((text, False) for text in ('"1"', "word", "true", "{a: 1}", '""'))


def is_refused(message: str, key: str, node: dict[str, Any], text: str) -> bool:
    """One line that names the key and what is allowed there."""
    if len(text) > 4000:  # not even read as a number: the text itself is named
        return key in message and "cannot be read" in message
    bounds = [
        node[name] for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum") if name in node
    ]
    return key in message and "allowed: " in message and all(f"{bound:.10g}" in message for bound in bounds)


@pytest.mark.parametrize(
    ("key", "node", "form", "policy"), [pytest.param(*item, id=item[0]) for item in numeric_keys()]
)
def test_G9_every_number(
    key: str, node: dict[str, Any], form: str, policy: str, record_property: Record
) -> None:
    """G9 | every number of the schema at and beside its bounds, nan, inf, 10^400, wrong types | as the schema
    says, else key and range
    """
    accepted = refused = 0
    for text, fine in values_for(node):
        override = f"{key}={form.format(*[text] * form.count('{}'))}"
        try:
            load_config(None, [f"prune.policy={policy}", override])
        except UserError as error:
            message = str(error)
            assert "\n" not in message and ". fix: " in message
            if fine:  # a rule over several keys may still object, but it says so without a range
                assert "allowed: " not in message, message
            else:
                assert is_refused(message, key, node, text), message
            refused += 1
        else:
            assert fine, override[:80]
            accepted += 1
    typo = key[:-1] + ("x" if key[-1] != "x" else "y")
    unknown = f"policy {policy} has no key" if key.startswith("prune.") else "unknown key"
    assert f"{unknown} {typo}, did you mean {key.rpartition('.')[0]}" in refusal(
        lambda: load_config(None, [f"prune.policy={policy}", f"{typo}=1"])
    )
    record_property("accepted", accepted)
    record_property("refused", refused + 1)


def test_G9_every_other_key(record_property: Record) -> None:
    """G9 | every other key with a number, a list, a section, a typo | as the schema says, else the key is
    named
    """
    refused = 0
    numbers = {key for key, *_ in numeric_keys()}
    for key, value in module.flatten(PretrainConfig().model_dump()).items():
        if key in numbers:
            continue
        named = "policy" if key == "prune.policy" else key
        wrong = ["{a: 1}", "[[1]]"] if not isinstance(value, str) and value is not None else []
        wrong += ["1", "sometimes", "[true]"] if isinstance(value, bool) else []
        wrong += ["\0"] if isinstance(value, str) else []
        for text in wrong:
            assert named in refusal(lambda key=key, text=text: load_config(None, [f"{key}={text}"]))  # type: ignore[misc]
            refused += 1
        assert named in refusal(lambda key=key: load_config(None, [f"{key}.x=1"]))  # type: ignore[misc]
        unknown = "policy emp has no key" if key.startswith("prune.") else "unknown key"
        assert unknown in refusal(lambda key=key: load_config(None, [f"{key}zz=1"]))  # type: ignore[misc]
        refused += 2
    record_property("refused", refused)


EXTREME = {
    "optimizer.warmup_epochs": ["1000000"],
    "prune.beta": ["1000000000.0"],
    "prune.loss_weight": ["1000000000.0", "-1000000000.0"],
    "prune.soften": ["1000000000.0"],
    "prune.ema": ["1.0e-06"],
    "augment.brightness": ["1000.0"],
    "augment.crop_ratio": ["[0.1, 10]", "[0.1, 0.1]", "[10, 10]"],
    "augment.crop_scale": ["[1e-30, 1e-30]"],
    "augment.blur_sigma": ["[1e-30, 1000]"],
    "prune.redraw_every": ["1000000"],
    "monitor.knn_images": ["1000000000"],
    "data.subset_seed": [str(-(2**63)), str(2**63 - 1)],
    "optimizer.lr": ["1e20", "1e38"],
    "temperature": ["0.001", "1000"],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(key, value) for key, values in EXTREME.items() for value in values],
)
def test_G9_extremes_that_are_allowed(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    """G9 | a run with the largest and smallest numbers allowed for 15 keys | trains, or stops with one
    line
    """
    quick = [
        "epochs=2",
        "data.max_images=24",
        "augment.blur_prob=1",
        "prune.anneal_fraction=0",
        "prune.scoring=all",
    ]
    if key == "prune.redraw_every":
        quick[-1] = "prune.policy=random"
    code = pretrain.main(["--config", str(tiny_config), f"out={tmp_path / 'out'}", *quick, f"{key}={value}"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code in (0, 3) and len(lines) == (code == 3), lines
    assert code == 0 or key in ("optimizer.lr", "temperature")


# --- G10: the command line


def test_G10_command_line(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """G10 | unknown flag, half an override, unknown key, no config, --resume with --config | one line, exit
    code 2, nothing written
    """
    base = ["--config", str(tiny_config), f"out={tmp_path / 'out'}"]
    for arguments, said in (
        ([*base, "--fast"], "--fast"),
        ([*base, "-x"], "-x"),
        ([*base, "epochs"], "epochs is not an override"),
        ([*base, "=3"], "=3 is not an override"),
        ([*base, "epochs.x=3"], "epochs is a value, not a section"),
        ([*base, "epoch=3"], "did you mean epochs?"),
        ([*base, "prune.fraction=[0.5"], "is not valid YAML"),
        ([*base, "a\nb=1"], "unknown key a\\nb"),
        ([*base, "epochs=" + "9" * 5000], "cannot be read"),
        (["--resume", str(tmp_path), "--config", str(tiny_config)], "--resume"),
        (["--config"], "--config"),
        ([], "--config"),
    ):
        assert said in main_refuses(capsys, *arguments)
    assert os.listdir(tmp_path) == []


def test_G10_precedence(tmp_path: Path) -> None:
    """G10 | the same key in the file, and twice on the command line | the command line wins, its last word
    counts
    """
    path = write(tmp_path, "epochs: 3\nprune: {fraction: 0.1}")
    config = load_config(path, ["epochs=4", "prune.fraction=0.2", "epochs=5"])
    assert (config.epochs, config.prune.fraction) == (5, 0.2)


# --- 30 good inputs


def good_inputs(root: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is, a call that must accept it)."""
    rng = np.random.default_rng(0)

    def folder(name: str, files: dict[str, Image.Image], **options: Any) -> Callable[[], object]:
        for path, image in files.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / name / path)
        return lambda: check(load_images(str(root / name), **options), len(files))

    def same(config: PretrainConfig) -> None:
        assert (config.epochs, config.prune.fraction, config.prune.policy) == (3, 0.5, "random")

    def check(images: Any, count: int) -> None:
        assert len(images.names) == count and not images.skipped

    def pixels(width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)

    for mode, ending in (
        ("RGB", "png"),
        ("L", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
    ):
        yield f"mode {mode}", folder(f"mode {mode}", {f"{i}.{ending}": pixels(mode=mode) for i in range(2)})
    for ending in ("JPG", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"):
        yield f".{ending}", folder(ending, {f"a.{ending}": pixels()})
    yield (
        "all sizes",
        folder(
            "sizes",
            {f"{w}x{h}.png": pixels(w, h) for w, h in ((1, 1), (1, 200), (200, 1), (640, 480), (33, 77))},
        ),
    )
    yield "flat", folder("flat", {"a.png": pixels(), "b.png": pixels()})
    yield "classes", folder("classes", {f"{c}/{i}.png": pixels() for c in "abc" for i in range(2)})
    yield "train and val", folder("splits", {f"train/{c}/0.png": pixels() for c in "ab"})
    yield "deep", folder("deep", {"/".join("abcdefgh") + "/0.png": pixels(), "z/1.png": pixels()})
    yield "subset", lambda: check(load_images(str(root / "classes"), max_images=4, subset_seed=-1), 4)

    images, labels = striped_images(12)
    write_parquet(root / "one.parquet", images, labels)
    yield "parquet file", lambda: check(load_images(str(root / "one.parquet")), 12)
    for part in range(2):
        write_parquet(root / "parts" / f"train-0000{part}-of-00002.parquet", images, labels)
    yield "parquet folder", lambda: check(load_images(str(root / "parts")), 24)
    yield "parquet glob", lambda: check(load_images(str(root / "parts/*.parquet")), 24)
    pq.write_table(
        pa.table({"id": list(range(12)), "img": pa.array(images, pa.large_binary())}), root / "plain.parquet"
    )
    yield "parquet of plain bytes", lambda: check(load_images(str(root / "plain.parquet")), 12)

    for name, text in {
        "sections in one line": "prune: {fraction: 0.5, policy: random}\nepochs: 3",
        "sections in lines": "prune:\n  fraction: 5e-1\n  policy: random\nepochs: 3",
        "byte order mark and Windows lines": "\ufeffepochs: 3\r\nprune: {fraction: .5, policy: random}\r\n",
        "JSON": json.dumps({"epochs": 3, "prune": {"fraction": 0.5, "policy": "random"}}),
        "comments": "# a run\nepochs: 3 # few\nprune: {fraction: +0.5, policy: 'random'}\n",
    }.items():
        (root / f"{name}.yaml").write_text(text)
        yield name, lambda name=name: same(load_config(root / f"{name}.yaml", []))  # type: ignore[misc]
    resolved = yaml.safe_dump(PretrainConfig(epochs=3).model_dump())
    (root / "resolved.yaml").write_text(resolved)
    yield (
        "a resolved config and overrides",
        lambda: same(
            load_config(
                root / "resolved.yaml", ["prune.fraction=0.5", "prune.policy=random", "data.source=x=y z"]
            )
        ),
    )


def test_GOOD_inputs(tmp_path: Path, record_property: Record) -> None:
    """GOOD | 30 good inputs: image modes, formats, sizes, folder, parquet and config layouts | all accepted,
    0 false refusals
    """
    tried, refused = 0, []
    for name, call in good_inputs(tmp_path):
        tried += 1
        try:
            call()
        except UserError as error:
            refused.append(f"{name}: {error}")
    record_property("good inputs", tried)
    record_property("false refusals", len(refused))
    assert tried >= 30 and not refused, refused
