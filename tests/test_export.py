"""`ssl-emp export`: a file that gives the encoder's features without ssl_emp, or no file at all."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from ssl_emp import deploy, load_encoder
from ssl_emp.__main__ import main
from ssl_emp.commands.subjects import Normalized
from ssl_emp.deploy import export_encoder
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.model import build_encoder, save_encoder

ROOT = Path(__file__).parent.parent
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZE = 16


def save(folder: Path, arch: str = "resnet18", size: int = SIZE, **args: Any) -> Path:
    """An encoder whose BatchNorm statistics are those of images."""
    torch.manual_seed(0)
    options = {"width": 8, "stem": "cifar"} if arch == "resnet18" else {"width": None, "stem": None}
    encoder = build_encoder(arch, **options, image_size=size, mean=MEAN, std=STD, args=args)
    encoder.train()(torch.rand(8, 3, size, size))
    save_encoder(encoder.eval(), folder)
    return folder


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("encoders") / "encoder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two photographs."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    for number, photo in enumerate(load_sample_images().images):
        for place in range(4):
            crop = photo[50 * place : 50 * place + 90, 100 * place : 100 * place + 120]
            Image.fromarray(crop).save(folder / f"{number}-{place}.png")
    return folder


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    capsys.readouterr()
    assert export(*words) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and ". fix: " in said.err, said.err
    assert said.err[:-1].isprintable() and not said.out
    return said.err


def batches(folder: Path, photos: Path, size: int) -> list[tuple[Tensor, Tensor]]:
    """(uint8 images, the encoder's features) of photographs and of noise, in batches of several sizes."""
    encoder = load_encoder(folder)
    real = (255 * encoder.preprocess(sorted(photos.glob("*.png")))).round().to(torch.uint8)
    noise = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        return [(part, encoder(part.float() / 255)) for part in (real, real[:1].clone(), noise)]


def check_onnx(path: Path, folder: Path, photos: Path, size: int = SIZE) -> dict[str, Any]:
    """Compare a file with its encoder by onnxruntime; its metadata."""
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "images" and given.type == "tensor(uint8)" and given.shape[1:] == [3, size, size]
    assert isinstance(given.shape[0], str), "the batch is free"
    for images, wanted in batches(folder, photos, size):
        (found,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
        assert wanted.std() > 0.01
    onnx.checker.check_model(onnx.load(path), full_check=True)
    about: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map["ssl_emp"])
    return about


def check_free_of_paths(path: Path) -> None:
    data = path.read_bytes()
    places = (ROOT, Path(torch.__file__).parent, path.parent, Path.home())
    assert not [place for place in places if str(place).encode() in data]
    assert b"site-packages" not in data and b"dist-packages" not in data


def test_onnx_gives_the_features(
    encoder_dir: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "x.onnx"
    assert export(encoder_dir, "--out", out, "--check", photos) == 0
    said = capsys.readouterr()
    assert re.search(r"uint8 \(batch, 3, 16, 16\) -> float32 \(batch, 64\), opset \d+, 0\.7 MB", said.out)
    assert "gives the features of 16 images within" in said.out and said.out.count("\n") == 1 and not said.err
    assert os.listdir(out.parent) == ["x.onnx"], "nothing is left beside it"
    about = check_onnx(out, encoder_dir, photos)
    assert about["inside"] == {"divided_by": 255, "mean": MEAN, "std": STD} and about["image_size"] == SIZE
    assert "in the centre scaled to 16 x 16, bicubic" in about["before"] and about["features"] == 64
    assert about["architecture"] == {"arch": "resnet18", "width": 8, "stem": "cifar"}
    check_free_of_paths(out)

    before = out.read_bytes()
    assert "is there already. fix: give --overwrite" in refused(capsys, encoder_dir, "--out", out)
    assert out.read_bytes() == before


RELOAD = """
import json, sys, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
extra = {"ssl_emp": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
with torch.no_grad():
    found = {name: network(images).contiguous() for name, images in load_file(sys.argv[2]).items()}
save_file(found, sys.argv[3])
print(extra["ssl_emp"])
"""


def check_pt2(path: Path, folder: Path, photos: Path, size: int = SIZE) -> dict[str, Any]:
    """Compare a file with its encoder in a fresh process that cannot see ssl_emp; its metadata."""
    from safetensors.torch import load_file, save_file

    given, found = path.with_suffix(".in"), path.with_suffix(".out")
    parts = batches(folder, photos, size)
    save_file({str(number): images for number, (images, _) in enumerate(parts)}, given)
    words = [sys.executable, "-I", "-c", RELOAD, str(path), str(given), str(found)]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for number, (_, wanted) in enumerate(parts):
        assert load_file(found)[str(number)].equal(wanted)
    about: dict[str, Any] = json.loads(done.stdout)
    return about


@pytest.mark.whole
def test_pt2_gives_the_features(
    encoder_dir: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.pt2"
    assert export(encoder_dir, "--out", out) == 0
    assert "a fresh process gives the features of 8 images exactly" in capsys.readouterr().out
    about = check_pt2(out, encoder_dir, photos)
    assert about["inside"]["mean"] == MEAN and about["input"] == "images: uint8 (batch, 3, 16, 16), RGB"
    check_free_of_paths(out)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("arch", "size", "args"),
    [
        ("timm:vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 48, "patch_size": 8}),
        ("torchvision:mobilenet_v2", 32, {}),
        ("timm:resnet18", 64, {}),
    ],
)
def test_networks_of_others(
    arch: str, size: int, args: dict[str, Any], format: str, photos: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "encoder", arch, size, **args)
    out = tmp_path / f"x.{format}"
    assert export(folder, "--out", out) == 0
    about = (check_onnx if format == "onnx" else check_pt2)(out, folder, photos, size)
    assert about["architecture"]["arch"] == arch
    check_free_of_paths(out)


# ---- what cannot be exported


class Noisy(nn.Module):
    """Draws by itself: no file can give the same features twice."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + torch.rand_like(images.mean((2, 3)))


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.mean() > 0 else images.amax((2, 3))


class Diverged(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) / 0 - images.mean((2, 3)) / 0


def test_what_gives_other_features_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    out.write_text("before")
    for network, error, message in (
        (Noisy(), RunFailed, "features that differ by"),
        (Branching(), UserError, "Normalized cannot be exported|Branching cannot be exported"),
        (Diverged(), UserError, "are not finite"),
    ):
        with pytest.raises(error, match=message) as caught:
            export_encoder(Normalized(network, MEAN, STD), out, SIZE, "onnx")
        assert str(caught.value).count("\n") == 0
        assert out.read_text() == "before" and os.listdir(tmp_path) == ["x.onnx"]


def test_a_missing_package_is_a_line(
    encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    told = refused(capsys, encoder_dir, "--out", tmp_path / "x.onnx")
    assert "missing: onnxscript, onnxruntime. fix: pip install onnxscript onnxruntime, or" in told


def test_a_network_beyond_the_limit_of_onnx_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "ONNX_LIMIT", 1000)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    program = deploy.captured(deploy.Deployed(Normalized(network, MEAN, STD)), 8)
    with pytest.raises(UserError, match="the limit of an ONNX file. fix: give --format pt2"):
        deploy.as_onnx(program, {})


@pytest.mark.whole
def test_a_full_disk_keeps_what_was_there(
    encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.onnx"
    out.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Grey(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        export_encoder(Normalized(Grey(), MEAN, STD), out, SIZE, "onnx")
    assert out.read_text() == "before" and os.listdir(tmp_path) == ["x.onnx"]


def test_bad_words_are_a_line(
    encoder_dir: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling.onnx").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "x.onnx")
    damaged = tmp_path / "damaged"
    shutil.copytree(encoder_dir, damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    module = tmp_path / "module"
    shutil.copytree(encoder_dir, module)
    about = json.loads((module / "config.json").read_text())
    about["ssl_emp"] |= {"arch": "custom:Net", "width": None, "stem": None}
    (module / "config.json").write_text(json.dumps(about))
    cases: list[tuple[str, list[object]]] = [
        ("required: ENCODER", [*out]),
        ("give --out FILE.onnx", [encoder_dir]),
        ("does not say which format", [encoder_dir, "--out", tmp_path / "x.bin"]),
        ("invalid choice: 'torchscript'", [encoder_dir, *out, "--format=torchscript"]),
        ("--format pt2 does not go with the name", [encoder_dir, *out, "--format=pt2"]),
        ("is a folder", [encoder_dir, "--out", tmp_path, "--format=onnx"]),
        ("is no regular file", [encoder_dir, "--out", tmp_path / "pipe.onnx", "--overwrite"]),
        ("is there already", [encoder_dir, "--out", tmp_path / "dangling.onnx"]),
        ("cannot make the folder", [encoder_dir, "--out", tmp_path / "file" / "x.onnx"]),
        ("is no directory, encoder", [tmp_path / "missing\x1b[2J", *out]),
        ("has learned nothing", ["random", *out]),
        ("cannot be read", [damaged, *out]),
        ("network from Python", [module, *out]),
        ("timm has no network 'no_such_model'", ["timm:no_such_model", *out]),
        ("image_size", [encoder_dir, *out, "--image-size=3"]),
        ("invalid int value: 'x'", [encoder_dir, *out, "--image-size=x"]),
        ("no images in", [encoder_dir, *out, "--check", tmp_path / "empty"]),
        ("no such folder, file or data set", [encoder_dir, *out, "--check", tmp_path / "nothing"]),
    ]
    for message, words in cases:
        assert message in refused(capsys, *words), message
    assert not (tmp_path / "x.onnx").exists() and (tmp_path / "pipe.onnx").is_fifo()


def test_help_comes_without_torch() -> None:
    code = "import sys; from ssl_emp.__main__ import main\ntry: main(['export', '--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "False False" and "--overwrite" in found.stdout


@pytest.mark.whole
def test_a_stopped_export_leaves_nothing(encoder_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.pt2"
    words = [sys.executable, "-m", "ssl_emp", "export", str(encoder_dir), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == [f".x.pt2.{started.pid}.tmp"]
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM and "stopped; nothing was written" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.whole
def test_the_page_is_true(
    encoder_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands and snippets run in their order."""
    page = (ROOT / "docs" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder_dir, tmp_path / "runs" / "mine")
    turned = Image.Exif()
    turned[274] = 6  # a quarter to the right
    with Image.open(sorted(photos.glob("*.png"))[0]) as photo:
        photo.crop((0, 0, 47, 30)).save("picture.jpg", exif=turned, quality=95, subsampling=0)
    commands = re.findall(r"^ssl-emp (.*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for line in commands:
        assert main(shlex.split(line.replace("/path/to/images", str(photos)))) == 0
    world: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    encoder = load_encoder(encoder_dir)
    with torch.no_grad():
        wanted = encoder(encoder.preprocess("picture.jpg")[None])
    for snippet in snippets[:2]:
        exec(compile(snippet, "docs/export.md", "exec"), world)  # noqa: S102
        found = torch.as_tensor(world["features"]).detach()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    exec(compile(snippets[2], "docs/export.md", "exec"), world)  # noqa: S102
    assert check_onnx(tmp_path / "again.onnx", encoder_dir, photos) == world["about"]
