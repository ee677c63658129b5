"""Any backbone: features, a pruned run, export, reload and kNN, of each family; and what is refused.

`docs/backbones.md` has the table of what is tested here.
"""

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import striped_images, write_parquet
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from ssl_emp import load_encoder
from ssl_emp.backbones import ARCHS, build, check_trains, feature_dim
from ssl_emp.classifier import load_classifier
from ssl_emp.commands import evaluate, pretrain
from ssl_emp.commands.job import prepare
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.model import build_encoder, save_encoder
from ssl_emp.run.report import Report

timm = pytest.importorskip("timm")
DOCS = Path(__file__).parent.parent / "docs" / "backbones.md"
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
BASE = """
data: {{source: '{source}'}}
device: cpu
precision: fp32
epochs: 3
batch_size: 8
model: {{projection_hidden: 32, projection_dim: 16}}
optimizer: {{name: adamw, lr: 0.0005, warmup_epochs: 1}}
prune: {{policy: emp, fraction: 0.4, anneal_fraction: 0.0}}
monitor: {{tensorboard: false, knn_every: 3, knn_images: 100, reliability_every: 0}}
"""
# backbone, pixels of its views, D
FAMILIES = [
    ("torchvision:resnet18", 32, 512),
    ("torchvision:resnet50", 32, 2048),
    ("torchvision:convnext_tiny", 32, 768),
    ("torchvision:mobilenet_v2", 32, 1280),
    ("timm:vit_tiny_patch16_224", 64, 192),
    ("timm:vit_tiny_patch16_224", 224, 192),
    ("timm:convnext_atto", 32, 320),
    ("timm:efficientnet_lite0", 32, 1280),
    ("timm:resnet18", 32, 512),
]
SLOW = {("torchvision:resnet50", 32), ("torchvision:convnext_tiny", 32), ("timm:vit_tiny_patch16_224", 224)}


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    size = getattr(request, "param", 32)
    write_parquet(tmp_path / "data/train.parquet", *striped_images(24, size))
    write_parquet(tmp_path / "data/test.parquet", *striped_images(12, size, seed=1))
    path = tmp_path / "config.yaml"
    path.write_text(BASE.format(source=tmp_path / "data"))
    return path


@pytest.mark.parametrize(
    ("arch", "size", "dim", "config"),
    [pytest.param(*row, row[1], marks=[pytest.mark.slow] if row[:2] in SLOW else []) for row in FAMILIES],
    indirect=["config"],
)
def test_a_pruned_run_its_export_and_its_neighbours(
    arch: str, size: int, dim: int, config: Path, tmp_path: Path
) -> None:
    """The row of the table: forward, a pruned run, export, reload, kNN beside an untrained twin."""
    out = tmp_path / "run"
    batch = ["batch_size=4"] if size > 64 else []
    assert pretrain.main(["--config", str(config), f"out={out}", f"model.arch={arch}", *batch]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["kept_share"] < 1 for row in rows] == [False, True, True]
    encoder = load_encoder(out)
    images = torch.rand(2, 3, size, size)
    features = encoder(images)
    assert features.shape == (2, dim) == (2, encoder.feature_dim) and features.isfinite().all()
    state = torch.load(max((out / "checkpoints").glob("*.pt")), weights_only=True)["model"]
    kept = load_file(out / "encoder" / "model.safetensors")
    assert all(state[f"backbone.{name}"].equal(value) for name, value in kept.items())
    if arch.startswith("timm:"):
        theirs = timm.create_model(f"local-dir:{out / 'encoder'}", pretrained=True).eval()
        with torch.no_grad():
            assert theirs((images - encoder.mean) / encoder.std).equal(features)
    words = [str(out), "random", "knn", "knn.num_neighbors=3", f"cache_dir={tmp_path / 'cache'}"]
    assert evaluate.main([*words, "device=cpu"]) == 0
    judged = json.loads((out / "eval" / "knn.json").read_text())
    assert [row["value"] is not None for row in judged] == [True, True]
    assert f"untrained {arch}" in judged[1]["protocol"]
    assert f"| `{arch}` | {size} | {dim} |" in DOCS.read_text(), "the table has this row"


def test_the_table_has_no_row_that_is_not_tested() -> None:
    rows = re.findall(
        r"^\| `(\S+:\S+)` \| (\d+) \| (\d+) \| yes \| yes \| yes \| yes \|$", DOCS.read_text(), re.M
    )
    assert rows == [(arch, str(size), str(dim)) for arch, size, dim in FAMILIES]


# ---- networks that draw random numbers


class StopAt(pretrain.Stop):
    """Stands in for `pretrain.Stop`: a signal comes in this step."""

    step = 0

    def __init__(self) -> None:
        self.reads = 0

    @property
    def signal(self) -> int:  # type: ignore[override]  # each step reads it once
        self.reads += 1
        return int(signal.SIGTERM) if self.reads == StopAt.step else 0


VIT = ["model.arch=timm:test_vit", "model.args.drop_path_rate=0.1", "model.args.patch_drop_rate=0.25"]


@pytest.mark.parametrize("scoring", ["stale", "all"])
def test_dropped_paths_and_patches_resume_bit_for_bit(
    scoring: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", str(config), *VIT, f"prune.scoring={scoring}"]
    assert pretrain.main([*words, f"out={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr(pretrain, "Stop", StopAt)
    for step in (2, 4):  # inside the first epoch, and inside a pruned one
        StopAt.step, out = step, tmp_path / str(step)
        assert pretrain.main([*words, f"out={out}"]) == 143
        StopAt.step = 0
        torch.manual_seed(99)  # another process begins with other numbers
        assert pretrain.main(["--resume", str(out)]) == 0
        ours, theirs = (
            load_file(folder / "encoder/model.safetensors") for folder in (out, tmp_path / "whole")
        )
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        tables = [(folder / "pruning/samples.parquet").read_bytes() for folder in (out, tmp_path / "whole")]
        assert tables[0] == tables[1]


def test_a_scoring_pass_draws_by_its_key_and_leaves_no_trace(config: Path) -> None:
    from ssl_emp.augment import cut_views

    job = prepare(load_config(config, VIT), Report(silent=True))
    job.model.train()
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    batches = torch.arange(24).view(3, 8)
    first, second, other = (
        pretrain.score_batches(job, job.model, cut_views, batches, key).terms for key in (3, 3, 4)
    )
    assert first.equal(second) and not first.equal(other)
    plain = prepare(load_config(config, VIT[:1]), Report(silent=True))
    plain.model.load_state_dict(job.model.state_dict())
    plain.model.train()
    assert not first.equal(pretrain.score_batches(plain, plain.model, cut_views, batches, 3).terms)
    assert all(value.equal(before[name]) for name, value in job.model.state_dict().items())


def test_narrow_networks_train_on_large_views(config: Path, tmp_path: Path) -> None:
    """With channels last the backward pass of torch on a CPU ends the process here."""
    words = ["--config", str(config), "model.width=8", "model.stem=cifar", "augment.size=64", "epochs=1"]
    words += ["prune.policy=none", "data.max_images=8"]
    assert pretrain.main([*words, f"out={tmp_path / 'run'}"]) == 0
    settings = ["augment.size=64", "model.stem=cifar", "monitor.knn_every=0"]
    for width, size, layout in (
        (8, 64, torch.contiguous_format),
        (16, 64, torch.channels_last),
        (8, 32, torch.channels_last),
    ):
        changed = [*settings, f"model.width={width}", f"augment.size={size}"]
        job = prepare(load_config(config, changed), Report(silent=True))
        assert job.memory_format == layout
        assert job.encoder.backbone.get_parameter("layer1.0.conv1.weight").is_contiguous(memory_format=layout)


# ---- building


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvisions_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    ours, spec = build(f"torchvision:{name}", 32)
    torch.manual_seed(0)
    theirs = models.get_model(name, weights=None)
    images = torch.rand(2, 3, 32, 32)
    theirs.eval()
    head = theirs.fc if name == "resnet18" else theirs.classifier[-1]
    with torch.no_grad():
        assert head(ours.eval()(images)).equal(theirs(images))
    assert spec == {"arch": f"torchvision:{name}", "args": {}}


def test_feature_dim_leaves_no_trace() -> None:
    network, _ = build("timm:test_resnet", 32)
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    assert feature_dim(network, 32, "it") == 96
    check_trains(network, 32, "it")
    assert torch.get_rng_state().equal(generator) and all(part.training for part in network.modules())
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_a_vit_takes_views_of_other_sizes_where_patches_fit() -> None:
    encoder = build_encoder("timm:test_vit", None, None, 64, MEAN, STD).eval()
    assert encoder.spec["args"] == {"img_size": 64, "dynamic_img_size": True}
    assert encoder(torch.rand(1, 3, 96, 96)).shape == encoder(torch.rand(1, 3, 64, 64)).shape


class Net(nn.Module):
    """Of one's own; `unused` reaches no feature, as in many networks of others."""

    def __init__(self, ends: str = "features") -> None:
        super().__init__()
        self.ends = ends
        self.conv = nn.Conv2d(3, 6, 3, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Any:
        maps = self.conv(images)
        features = maps.mean((2, 3))
        if self.ends == "in training" and self.training:
            return features, maps
        if self.ends == "nan in training" and self.training:
            return features * torch.nan
        found = {
            "maps": maps, "tuple": (features,), "nothing": features[:, :0], "nan": features * torch.nan,
            "double": features.double(), "detached": features.detach(),
        }  # fmt: skip
        return found.get(self.ends, features)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("maps", "gives (2, 6, 8, 8) for 2 images, which are maps, not features (B, D)"),
        ("tuple", "gives a tuple, not features (B, D)"),
        ("in training", "in training gives a tuple"),
        ("nothing", "gives 0 features"),
        ("nan", "features that are not finite"),
        ("nan in training", "custom:Net in training gives features that are not finite"),
        ("double", "gives 6 features of type float64. fix: end it in features.float()"),
        ("detached", "nothing of custom:Net would learn"),
    ],
)
def test_a_module_that_gives_no_features_is_one_line(ends: str, said: str) -> None:
    network = Net(ends)
    with pytest.raises(UserError) as error:
        check_trains(build_encoder(network, None, None, 32, MEAN, STD).backbone, 32, "custom:Net")
    assert said in str(error.value) and "\n" not in str(error.value) and "custom:Net" in str(error.value)


def test_a_network_that_is_frozen_whole_is_refused() -> None:
    with pytest.raises(UserError, match="nothing of it would learn.*fix: give a network whose parameters"):
        check_trains(Net().requires_grad_(False), 32, "it")
    check_trains(Net(), 32, "it")


def test_a_module_from_python_is_trained_kept_and_loaded(config: Path, tmp_path: Path, capsys: Any) -> None:
    settings = load_config(config, ["model.arch=custom:Net", f"out={tmp_path / 'run'}"])
    network = Net()
    first = network.conv.weight.detach().clone()
    from ssl_emp.run.ranks import ALONE

    def go(backbone: nn.Module | None, resumes: bool) -> int:
        return pretrain.start_or_resume(settings, tmp_path / "run", resumes, ALONE, backbone=backbone)

    assert go(network, False) == 0
    assert not network.conv.weight.equal(first) and not network.unused.weight.requires_grad
    loaded = load_encoder(tmp_path / "run", backbone=Net())
    images = torch.rand(2, 3, 32, 32)
    assert all(
        loaded.backbone.state_dict()[name].equal(value) for name, value in network.state_dict().items()
    )
    with torch.no_grad():  # one of them is in channels-last order
        torch.testing.assert_close(loaded(images), network.eval()((images - loaded.mean) / loaded.std))
    with pytest.raises(UserError, match="custom:Net is a network from Python"):
        load_encoder(tmp_path / "run")
    with pytest.raises(UserError, match="do not fit a Conv2d, first at"):
        load_encoder(tmp_path / "run", backbone=nn.Conv2d(3, 4, 2))
    for backbone in (None, Net()):
        assert go(backbone, True) == 0
    (tmp_path / "run/encoder/model.safetensors").unlink()
    assert go(Net(), True) == 0, "written again from the checkpoint"
    assert load_encoder(tmp_path / "run", backbone=Net())(images).equal(loaded(images))
    capsys.readouterr()
    assert pretrain.main(["--config", str(config), "model.arch=custom:Net", f"out={tmp_path / 'no'}"]) == 2
    assert "custom:Net is a network from Python, and none was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.arch=resnet19"], "no network is called 'resnet19'; did you mean resnet18?"),
        (["model.arch=timm:vit_tinny_patch16_224"], "did you mean timm:vit_tiny_patch16_224?"),
        (["model.arch=torchvision:convnext_tini"], "did you mean torchvision:convnext_tiny?"),
        (["model.arch=timm:hf-hub:a/b"], "timm has no network 'hf-hub:a/b'"),
        (["model.arch=timm:test_vit", "model.width=16"], "model.width=16 is for resnet18"),
        (["model.arch=timm:test_vit", "model.stem=cifar"], "model.stem=cifar is for resnet18"),
        (["model.args.drop_path_rate=0.1"], "model.args is for timm:NAME and torchvision:NAME"),
        (
            ["model.arch=timm:test_vit", "model.args.drop_path_rat=0.1"],
            "did you mean model.args.drop_path_rate?",
        ),
        (["model.arch=timm:test_vit", "model.args.embed_dim=many"], "cannot be built with model.args"),
        (["model.arch=timm:test_vit", "model.args.checkpoint_path=/x"], "does not shape the network"),
        (["model.arch=timm:test_vit", "model.args.pretrained=true"], "does not shape the network"),
        (["model.arch=timm:test_vit", "model.args={a: {b: 1}}"], "model.args.a is {'b': 1}"),
        (["model.arch=timm:test_vit", "model.args=[1]"], "model.args: should be a valid dictionary"),
        (
            ["model.arch=timm:test_vit", "augment.size=40"],
            "views of 40 pixels cannot be cut into the patches",
        ),
        (
            ["model.arch=timm:mixer_s32_224", "data.image_size=64", "augment.size=32"],
            "takes no images of 64x64 pixels",  # kNN looks at the stored ones
        ),
        (
            ["model.arch=timm:test_vit", "prune.scoring=all", "prune.scoring_size=24"],
            "images of 24x24 pixels",
        ),
        (["model.arch=timm:test_resnet", 'model.args.global_pool=""'], "which are maps"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, config: Path, tmp_path: Path, capsys: Any
) -> None:
    assert pretrain.main(["--config", str(config), f"out={tmp_path / 'run'}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "fix: " in line and not (tmp_path / "run").exists()


def test_a_folder_of_another_network_or_of_code_is_refused(tmp_path: Path) -> None:
    save_encoder(build_encoder("timm:test_vit", None, None, 32, MEAN, STD), tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for change, said in (
        ({"arch": "timm:test_vit2"}, "do not fit timm:test_vit2"),
        ({"arch": "timm:local-dir:/tmp"}, "has no network"),
        ({"args": {"embed_dim": 65536}}, "do not fit|cannot be built"),
        ({"args": {"checkpoint_path": "/etc/passwd"}}, "does not shape the network"),
        ({"args": {"norm_layer": {"a": 1}}}, "is damaged"),
        ({"arch": "resnet18", "args": {}}, "width or stem is missing"),
    ):
        path.write_text(json.dumps(whole | {"ssl_emp": whole["ssl_emp"] | change}))
        with pytest.raises(UserError, match=said) as error:
            load_encoder(tmp_path)
        assert "\n" not in str(error.value)


def test_a_classifier_on_a_vit_is_kept_and_loaded(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain.main(["--config", str(config), f"out={out}", *VIT[:1], "augment.size=32"]) == 0
    words = [str(out), "linear", "linear.save=true", "cache_dir=null", "device=cpu"]
    assert evaluate.main(words) == 0
    classifier = load_classifier(out / "eval" / "classifier-linear")
    images = torch.rand(3, 3, 32, 32)
    encoder = load_encoder(out)
    assert classifier(images).equal(classifier.head(encoder(images)))


def test_a_vit_without_buffers_learns_with_labels_too(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [f"out={out}", "objective=supervised", *VIT]
    assert pretrain.main(["--config", str(config), *words]) == 0
    assert json.loads((out / "result.json").read_text())["test_images"] == 12


def test_old_folders_still_load(tmp_path: Path) -> None:
    """Those of 0.1 and 0.2 have arch, width and stem, and nothing of args."""
    encoder = build_encoder("resnet18", 8, "cifar", 16, MEAN, STD).eval()
    save_encoder(encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(config["ssl_emp"]) == {"arch", "width", "stem", "image_size", "mean", "std"}
    images = torch.rand(2, 3, 16, 16)
    assert load_encoder(tmp_path)(images).equal(encoder(images)) and set(ARCHS) == {
        "resnet18",
        "resnet34",
        "resnet50",
    }


# ---- the evaluators that train, and those that look inside


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("torchvision:mobilenet_v2", 32),
        ("timm:test_vit", 32),
        pytest.param("timm:convnext_atto", 32, marks=pytest.mark.whole),
        pytest.param("timm:vit_tiny_patch16_224", 64, marks=pytest.mark.whole),
    ],
    indirect=["config"],
)
def test_finetune_fewshot_and_diagnose_take_any_family(arch: str, config: Path, tmp_path: Path) -> None:
    """With layer decay, a kept classifier that gives the same logits, and few labels fine-tuned."""
    size = 64 if "vit_tiny" in arch else 32
    torch.manual_seed(0)
    save_encoder(build_encoder(arch, None, None, size, MEAN, STD), tmp_path / "encoder")
    words = [
        "data.source=" + str(tmp_path / "data"), f"data.image_size={size}", "device=cpu", "cache_dir=null",
        "finetune.epochs=1", "finetune.batch_size=12", "finetune.layer_decay=0.5", "finetune.save=true",
        "fewshot.fractions=[]", "fewshot.per_class=2", "fewshot.num_draws=3", "fewshot.finetune=true",
        "fewshot.epochs=1", "diagnose.max_samples=12",
    ]  # fmt: skip
    judge = [str(tmp_path / "encoder"), "finetune", "fewshot", "diagnose", *words]
    assert evaluate.main([*judge, f"--out={tmp_path / 'rows'}"]) == 0
    rows = [row for path in (tmp_path / "rows").glob("*.json") for row in json.loads(path.read_text())]
    assert Counter(row["evaluator"] for row in rows) == {"finetune": 1, "fewshot": 2, "diagnose": 4}
    assert all(row["value"] is not None for row in rows)
    assert any("layer decay 0.5" in row["protocol"] for row in rows)
    (folder,) = (tmp_path / "rows").glob("*/classifier-finetune")
    classifier = load_classifier(folder)
    images = torch.rand(2, 3, size, size)
    logits = classifier(images)
    assert logits.shape == (2, 4) and logits.isfinite().all()
    untrained = load_encoder(tmp_path / "encoder")(images)
    assert not classifier.encoder(images).allclose(untrained, atol=1e-6), "the whole network was trained"
