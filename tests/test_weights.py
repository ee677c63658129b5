"""Starts: what is found in files of others, what is refused, and what a run that begins so leaves behind."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Pretrain
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import ssl_emp
from ssl_emp import load_encoder
from ssl_emp.backbones import WidthResNet
from ssl_emp.commands.evaluate import main as evaluate_main
from ssl_emp.commands.job import prepare
from ssl_emp.commands.monitoring import Monitor
from ssl_emp.commands.pretrain import main
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.run.report import Report
from ssl_emp.weights import grouped, read, resampled_positions, take


def resnet(seed: int, arch: str = "resnet18", stem: str = "imagenet") -> WidthResNet:
    torch.manual_seed(seed)
    network = WidthResNet(arch, 8, stem)
    for buffer in network.buffers():  # else all networks have the same
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return network


def tensors(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def assert_same(ours: nn.Module, theirs: nn.Module, but: tuple[str, ...] = ()) -> None:
    for (name, here), there in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert here.equal(there) is (name not in but), name


def shapes_of(files: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(files, path)
    return path


SOURCE, OTHER = 1, 2  # seeds: what is to be found, and what lies beside it
LAYOUTS: dict[str, tuple[Any, str]] = {
    "plain": (lambda a, b: tensors(a), ""),
    "with its classifier": (lambda a, b: tensors(a) | {"fc.weight": torch.zeros(10, 64)}, ""),
    "data parallel": (lambda a, b: {"state_dict": tensors(a, "module.")}, "state_dict.module."),
    "compiled": (lambda a, b: {"model": tensors(a, "_orig_mod.")}, "model._orig_mod."),
    "encoder": (lambda a, b: tensors(a, "encoder."), "encoder."),
    "MoCo": (
        lambda a, b: {
            "epoch": 3, "arch": "resnet50",
            "state_dict": tensors(b, "module.encoder_k.") | tensors(a, "module.encoder_q.") | {
                "module.queue": torch.zeros(4, 9)
            },
        },
        "state_dict.module.encoder_q.",
    ),
    "BYOL": (lambda a, b: tensors(b, "backbone_momentum.") | tensors(a, "backbone."), "backbone."),
    "DINO": (
        lambda a, b: {
            "args": argparse.Namespace(lr=0.1),
            "student": tensors(b, "module.backbone."), "teacher": tensors(a, "backbone."),
        },
        "teacher.backbone.",
    ),
    "Lightning": (
        lambda a, b: {
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
            "state_dict": tensors(a, "student.backbone.") | {"projection_head.0.weight": torch.zeros(2, 2)},
        },
        "state_dict.student.backbone.",
    ),
    "timm's EMA": (lambda a, b: {"state_dict": tensors(b), "state_dict_ema": tensors(a)}, "state_dict_ema."),
    "half precision": (
        lambda a, b: {k: v.to(v.dtype, copy=True) for k, v in tensors(a).items()}, ""),
    # lightly's examples: SimCLR(nn.Sequential(*list(resnet.children())[:-1]))
    "lightly": (
        lambda a, b: {"state_dict": tensors(nn.Sequential(*list(a.children())[:-1]), "backbone.")},
        "state_dict.backbone.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefix_and_dictionary_are_found(layout: str, tmp_path: Path) -> None:
    make, place = LAYOUTS[layout]
    theirs, ours = resnet(SOURCE), resnet(3)
    taken = take(ours, shapes_of(make(theirs, resnet(OTHER)), tmp_path))
    assert_same(ours, theirs)
    assert (taken.place, taken.new, taken.share, taken.taken) == (place, (), 1.0, taken.total)


def test_safetensors_and_tensors_by_hand(tmp_path: Path) -> None:
    """A network under other names is mapped by its user: a dictionary, or a file written from one."""
    theirs, ours = resnet(SOURCE), resnet(3)
    save_file(tensors(theirs, "a.b."), tmp_path / "a.safetensors")
    assert take(ours, tmp_path / "a.safetensors").place == "a.b."
    assert_same(ours, theirs)
    ours = resnet(4)
    renamed = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    assert take(ours, renamed).taken == len([name for name in renamed if "num_batches" not in name])
    assert_same(ours, theirs)


def test_a_stem_of_another_size_stays_new_and_is_told(tmp_path: Path) -> None:
    theirs, ours, before = resnet(SOURCE), resnet(3, stem="cifar"), resnet(3, stem="cifar")
    taken = take(ours, shapes_of(tensors(theirs), tmp_path))
    assert taken.new == ("conv1.weight",) and ours.conv1.weight.equal(before.conv1.weight)
    assert ours.layer4.state_dict()["1.conv2.weight"].equal(theirs.layer4.state_dict()["1.conv2.weight"])
    assert str(taken).endswith("99 of 100 tensors, new: conv1.weight (8x3x3x3 here, 8x3x7x7 there)")


def test_old_batch_norms_without_a_counter_are_whole(tmp_path: Path) -> None:
    theirs, ours = resnet(SOURCE), resnet(3)
    old = {name: value for name, value in tensors(theirs).items() if "num_batches_tracked" not in name}
    taken = take(ours, shapes_of(old, tmp_path))
    assert taken.share == 1 and not taken.new
    assert_same(ours, theirs)


def refused(network: nn.Module, init: Any, least: float = 0.9) -> str:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        take(network, init, least)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert "\n" not in str(error.value) and ". fix: " in str(error.value)
    return str(error.value)


def test_other_networks_are_refused_with_shapes(tmp_path: Path) -> None:
    wide = WidthResNet("resnet18", 16, "imagenet")
    line = refused(resnet(0), shapes_of(tensors(wide), tmp_path))
    assert "fits 0 %" in line and "conv1.weight is 8x3x7x7 here and 16x3x7x7 there" in line
    deeper = refused(resnet(0), shapes_of(tensors(resnet(1, "resnet34")), tmp_path))
    assert "fits 52.7 %" in deeper and "layer1.2.conv1.weight is only there" in deeper
    shallower = refused(resnet(0, "resnet34"), shapes_of(tensors(resnet(1)), tmp_path))
    assert "layer1.2.conv1.weight is 8x8x3x3 here and missing there" in shallower
    other = refused(resnet(0), shapes_of(tensors(mobilenet_v2()), tmp_path))
    assert "fits 0 % of the backbone's numbers, model.init_share asks for 90 %" in other


def test_numbers_of_another_type_are_told_by_it(tmp_path: Path) -> None:
    """The shapes are the same: they would say nothing."""
    good = tensors(resnet(1))
    for kind in (torch.int8, torch.bool, torch.complex64):
        others = {name: value.to(kind) for name, value in good.items()}
        line = refused(resnet(0), shapes_of(others, tmp_path))
        assert f"conv1.weight is float32 here and {str(kind)[6:]} there" in line
    sparse = good | {"conv1.weight": good["conv1.weight"].to_sparse()}
    line = str(take(resnet(0), shapes_of(sparse, tmp_path)))
    assert "new: conv1.weight (float32 here, float32 sparse_coo there)" in line


def test_a_file_is_read_by_what_it_is(tmp_path: Path) -> None:
    """People rename files; and both kinds of torch.save are there."""
    theirs = resnet(SOURCE)
    save_file(tensors(theirs), tmp_path / "a.pth")
    torch.save(tensors(theirs), tmp_path / "b.safetensors")
    torch.save(tensors(theirs), tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.safetensors", "c.safetensors"):
        ours = resnet(3)
        take(ours, tmp_path / name)
        assert_same(ours, theirs)


def test_names_of_strangers_stay_on_their_line(tmp_path: Path) -> None:
    found = {f"a\n\x1b[2J.{name}": value for name, value in tensors(resnet(SOURCE)).items()}
    line = str(take(resnet(0), shapes_of(found | {"a\n\x1b[2J.x\ry": torch.zeros(1)}, tmp_path)))
    assert line.isprintable() and r"(a\n\x1b[2J.*): 100 of 100 tensors, not used: x\ry" in line


def test_share_counts_numbers(tmp_path: Path) -> None:
    """Against counting by hand; a lower model.init_share takes what fits."""
    theirs = {name: value for name, value in tensors(resnet(1)).items() if not name.startswith("layer4")}
    ours = resnet(3)
    total = sum(v.numel() for k, v in ours.state_dict().items() if "num_batches" not in k)
    share = sum(v.numel() for k, v in theirs.items() if "num_batches" not in k) / total
    assert f"fits {100 * share:.3g} %" in refused(ours, shapes_of(theirs, tmp_path))
    taken = take(ours, shapes_of(theirs, tmp_path), 0.2)
    assert taken.share == share and "new: layer4.*" in str(taken)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch starts-bomb",)


def test_files_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network, good = resnet(0), tensors(resnet(1))
    for name, protocol in (("code.pth", 2), ("code.ckpt", 4)):
        Path(name).write_bytes(pickle.dumps({"state_dict": good, "x": Bomb()}, protocol=protocol))
        refused(network, name)
    torch.save({"state_dict": good, "x": Bomb()}, "code.pt")
    assert "which could run code, and is not read" in refused(network, "code.pt")
    assert not Path("starts-bomb").exists()
    torch.save(good, "whole.pth")
    save_file(good, "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        data = Path(name).read_bytes()
        Path(f"cut-{name}").write_bytes(data[: len(data) // 2])
        refused(network, f"cut-{name}")
    Path("empty").mkdir()
    assert "empty has no weights (model.safetensors or pytorch_model.bin)" in refused(network, "empty")
    assert "there is no nowhere.pth" in refused(network, "nowhere.pth")
    assert "xxx... (File name too long)" in refused(network, "x" * 5000)
    torch.save([1, 2], "list.pth")
    assert "list.pth holds a list" in refused(network, "list.pth")
    torch.save({"epoch": 3}, "none.pth")
    assert "none.pth holds no tensors" in refused(network, "none.pth")
    os.mkfifo("pipe.pth")
    assert "not a regular file" in refused(network, "pipe.pth")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("layer1.0.conv1.weight", float("nan"), "not finite, first in layer1.0.conv1.weight"),
        ("bn1.running_var", -1.0, "below 0, first in bn1.running_var"),
        ("bn1.weight", 1e300, "not finite, first in bn1.weight"),
    ],
)
def test_values_that_no_network_has(name: str, value: float, told: str, tmp_path: Path) -> None:
    theirs = tensors(resnet(1))
    theirs[name] = torch.full_like(theirs[name], value, dtype=torch.float64)
    assert told in refused(resnet(0), shapes_of(theirs, tmp_path))


def test_tensors_that_cannot_be_copied_are_left_out(tmp_path: Path) -> None:
    theirs = tensors(resnet(1))
    theirs["bn1.weight"] = theirs["bn1.weight"].to_sparse()
    theirs["bn1.bias"] = theirs["bn1.bias"].to(torch.complex64)
    assert take(resnet(0), shapes_of(theirs, tmp_path)).new == ("bn1.weight", "bn1.bias")


@pytest.mark.parametrize(("count", "others"), [(16, 0), (17, 1), (37, 1), (69, 5)])
def test_positions_are_resampled_as_timm_does(count: int, others: int) -> None:
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 49 + others, 12)
    side = int((count - others) ** 0.5)
    theirs = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=others)
    torch.testing.assert_close(resampled_positions(positions, count, others), theirs)


def test_a_vit_of_another_grid() -> None:
    import timm

    ours = timm.create_model("test_vit", num_classes=0, img_size=64)
    theirs = timm.create_model("test_vit", num_classes=10, img_size=160)
    taken = take(ours, dict(theirs.state_dict()))
    assert (
        taken.resampled == ("pos_embed",) and not taken.new and taken.unused == ("head.weight", "head.bias")
    )
    assert ours.get_parameter("blocks.0.attn.qkv.weight").equal(
        theirs.get_parameter("blocks.0.attn.qkv.weight")
    )


def test_timm_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    theirs = timm.create_model("test_vit", pretrained=False)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    create = timm.create_model

    def from_file(name: str, **options: Any) -> nn.Module:  # timm's own way without a hub
        return create(name, pretrained_cfg_overlay={"file": str(tmp_path / "theirs.pth")}, **options)

    monkeypatch.setattr(timm, "create_model", from_file)
    ours = create("test_vit", num_classes=0)
    state = torch.get_rng_state()
    taken = take(ours, "timm:test_vit")
    assert torch.get_rng_state().equal(state), "what is drawn next does not depend on the start"
    assert taken.share == 1 and taken.mean == [0.5, 0.5, 0.5]
    assert "timm has no model 'tset_vit'; did you mean" in refused(ours, "timm:tset_vit").replace(
        ". fix: ", "; "
    )


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"the weights of timm:test_vit cannot be loaded .*\. fix: connect"):
        read("timm:test_vit")


def test_names_are_shortened_and_escaped() -> None:
    assert grouped(("a.b", "a.c", "d\x1b[31m", "e", "f", "g.h")) == "a.*, d\\x1b[31m, e, f, and 1 more"


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def first(pretrain_run: Pretrain) -> Path:
    return pretrain_run("first", "epochs=1")


def test_a_run_begins_where_another_ended(
    first: Path, pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain_run("second", f"model.init={first}", "augment.mean=[0.4, 0.4, 0.4]", "epochs=1")
    said = capsys.readouterr().out
    assert f"weights   {first}: 100 of 100 tensors\n" in said
    assert "note      the start was trained on images normalised by mean [0.485, 0.456, 0.406]" in said
    started, ended = load_encoder(run / "start"), load_encoder(first)
    assert_same(started.backbone, ended.backbone)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init"] == str(first)


def test_normalisation_comes_with_the_start(
    first: Path, pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the config has its own; it stands in config.yaml, so that nothing needs the start for it."""
    third = pretrain_run("third", "augment.mean=[0.4, 0.4, 0.4]", "epochs=1")
    capsys.readouterr()
    run = pretrain_run("fourth", f"model.init={third / 'encoder'}", "epochs=1", "optimizer.lr=0.1")
    said = capsys.readouterr().out
    assert "normalised as the start's were, by mean [0.4, 0.4, 0.4] and std" in said
    assert "a rate for untrained networks loses a start; try optimizer.lr=0.001" in said
    assert yaml.safe_load((run / "config.yaml").read_text())["augment"]["mean"] == [0.4, 0.4, 0.4]
    assert load_encoder(run).mean.flatten().tolist() == pytest.approx([0.4] * 3)


def test_a_mistake_writes_nothing(
    first: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for override, told in (
        (f"model.init={tmp_path / 'empty'}", "has no weights"),
        ("model.init=timm:tset_vit", "timm has no model"),
        ("model.init_share=0", "model.init_share: should be greater than 0"),
        ("model.freeze=5", "the backbone has 5 parts (conv1, layer1, layer2, layer3, layer4)"),
        ("model.freeze=-1", "model.freeze: should be greater than or equal to 0"),
    ):
        assert main(["--config", str(tiny_config), f"out={tmp_path / 'x'}", override]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error
        assert not (tmp_path / "x").exists()


def test_resume_needs_no_start(
    first: Path, tiny_config: Path, pretrain_run: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, also before the first checkpoint: RUN/start has the weights. Another start is told."""
    start = tmp_path / "start"
    shutil.copytree(first / "encoder", start)
    words = [f"model.init={start}", "epochs=2", "model.freeze=1"]
    whole = pretrain_run("whole", *words, "checkpoint.every_steps=1")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(start)
    for path in sorted((cut / "checkpoints").glob("step_*.pt"))[1:]:
        path.unlink()
    capsys.readouterr()
    assert main(["--resume", str(cut)]) == 0
    assert f"weights   of the checkpoint; the run began from {start}" in capsys.readouterr().out
    early = tmp_path / "early"
    shutil.copytree(whole, early)
    shutil.rmtree(early / "checkpoints")
    shutil.rmtree(early / "encoder")
    assert main(["--resume", str(early)]) == 0
    for run in (cut, early):
        for name in ("encoder", "start"):
            file = f"{name}/model.safetensors"
            assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert main(["--resume", str(cut), f"model.init={first}"]) == 2
    assert f"model.init was {start} and is now {first}" in capsys.readouterr().err


def test_frozen_parts_stay_bit_for_bit(
    first: Path, pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain_run("frozen", f"model.init={first}", "model.freeze=2", "epochs=2")
    network = load_encoder(run).backbone
    before, after = load_encoder(first).backbone.state_dict(), network.state_dict()
    for name, value in after.items():
        is_frozen = name.startswith(("conv1", "bn1", "layer1"))
        assert value.equal(before[name]) is is_frozen, name
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    still = sum(size for name, size in sizes.items() if name.startswith(("conv1", "bn1", "layer1")))
    told = f"frozen    conv1, layer1: {still:,} of {sum(sizes.values()):,} parameters"
    assert told in capsys.readouterr().out


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_knn_of_the_start_is_epoch_0(
    first: Path, pretrain_run: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where kNN is seldom taken afterwards; once, however often it is resumed; nothing changes by it."""
    words = [f"model.init={first}", "epochs=2", "monitor.knn_every=2", "checkpoint.every_steps=1"]
    run = pretrain_run("measured", *words)
    assert "start     kNN " in capsys.readouterr().out
    assert [row["epoch"] for row in rows_of(run)] == [0, 1, 2]
    start = rows_of(run)[0]
    assert start.keys() == {"epoch", "step", "samples_seen", "knn_train_split"} and start["samples_seen"] == 0
    assert 0 <= start["knn_train_split"] <= 1
    early, late = tmp_path / "early", tmp_path / "late"
    for cut, kept in ((early, 0), (late, 1)):
        shutil.copytree(run, cut)
        shutil.rmtree(cut / "encoder")
        for path in sorted((cut / "checkpoints").glob("step_*.pt"))[kept:]:
            path.unlink()
        assert main(["--resume", str(cut)]) == 0
        assert [(row["epoch"], row.get("knn_train_split")) for row in rows_of(cut)] == [
            (row["epoch"], row.get("knn_train_split")) for row in rows_of(run)
        ]
    silent = pretrain_run("silent", f"model.init={first}", "epochs=2", "monitor.knn_every=0")
    assert [row["epoch"] for row in rows_of(silent)] == [1, 2]
    weights = [(each / "encoder" / "model.safetensors").read_bytes() for each in (run, silent, early, late)]
    assert len(set(weights)) == 1, "measuring changes nothing"


def test_an_encoder_that_falls_below_its_start_is_told_once(
    first: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny_config, [f"model.init={first}", f"out={tmp_path / 'x'}"])
    report = Report(silent=True)
    monitor = Monitor(prepare(config, report), report)
    assert monitor.below_start({"knn_train_split": 0.1}) is None, "no start was measured"
    monitor.start_knn = 0.8
    assert monitor.below_start({"knn_train_split": 0.75}) is None, "within what few queries tell"
    assert monitor.below_start({}) is None
    told = monitor.below_start({"knn_train_split": 0.2})
    assert told is not None and "kNN is 20.0%, below the 80.0% that training began from" in told
    assert monitor.below_start({"knn_train_split": 0.1}) is None, "once"


def test_evaluate_puts_the_start_beside_the_run(
    first: Path, pretrain_run: Pretrain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = pretrain_run("judged", f"model.init={first}", "epochs=2")
    words = ["knn", f"cache_dir={tmp_path / 'cache'}", "knn.num_neighbors=1"]

    def judged() -> list[str]:
        return [row["encoder"] for row in json.loads((run / "eval" / "knn.json").read_text())]

    assert evaluate_main([str(run), *words, "start=false"]) == 0
    assert judged() == [str(run)]
    for named in ([], ["start"], [str(run / "start")]):
        (run / "eval" / "knn.json").unlink()
        assert evaluate_main([str(run), *named, *words]) == 0
        assert judged() == [str(run), str(run / "start")], named
    rows = json.loads((run / "eval" / "knn.json").read_text())
    assert "before the first step" in rows[1]["protocol"]
    began, theirs = load_encoder(run / "start").state_dict(), load_encoder(first).state_dict()
    assert all(began[name].equal(theirs[name]) for name in theirs)
    cache = {"cache_dir": str(tmp_path / "cache"), "knn": {"num_neighbors": 1}}
    untrained = load_encoder(first)
    table = ssl_emp.evaluate([untrained, run, "random"], None, "knn", config=cache)
    assert [row.encoder for row in table] == [str(run), str(run / "start"), "random", "Encoder"]
    capsys.readouterr()
    assert evaluate_main([str(first), "start", *words]) == 2
    error = capsys.readouterr().err
    assert "there is no start to judge" in error and error.count("\n") == 1


def test_layer_decay_resumes_bit_for_bit(
    first: Path, pretrain_run: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.init={first}", "epochs=2", "checkpoint.every_steps=1", "optimizer.layer_decay=0.5"]
    run = pretrain_run("decayed", *words)
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "encoder")
    for path in sorted((cut / "checkpoints").glob("step_*.pt"))[1:]:
        path.unlink()
    assert main(["--resume", str(cut)]) == 0
    plain = pretrain_run("undecayed", *words[:-1])
    decayed, resumed, whole = (load_encoder(each).state_dict() for each in (run, cut, plain))
    began = load_encoder(first).state_dict()
    assert all(decayed[name].equal(resumed[name]) for name in decayed)
    moved, free = (
        (each["backbone.conv1.weight"] - began["backbone.conv1.weight"]).norm() for each in (decayed, whole)
    )
    assert 0 < moved < free / 4, "the stem learns at 1/32 of the rate"
