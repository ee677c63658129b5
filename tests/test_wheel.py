"""What `pip install` gives: a wheel that is built, installed and used outside of the clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what a wheel is made of; without files that lie about in a clone
SOURCES = ("ssl_emp", "linear_eval", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: building writes into the folder."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_COPIED)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(sources: Path) -> Path:
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return sources / "dist" / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the source distribution, so that what that lacks is missing here too."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sdist))
    (found,) = out.glob("*.whl")
    return found


def pip(*words: str) -> None:
    """Without an index: nothing is downloaded."""
    command = [sys.executable, "-m", "pip", *words, "--no-index", "--quiet", "--disable-pip-version-check"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def held(sources: Path) -> set[str]:
    """Every file of the packages, under the name that it has in a wheel."""
    found = [path for name in ("ssl_emp", "linear_eval") for path in (sources / name).rglob("*")]
    names = {str(path.relative_to(sources)) for path in found if path.is_file()}
    configs = (sources / "configs").rglob("*.yaml")
    return names | {f"ssl_emp/{path.relative_to(sources)}" for path in configs}


def test_the_wheel_and_the_source_distribution_hold_everything(
    sources: Path, sdist: Path, wheel: Path
) -> None:
    expected = held(sources)
    assert {"ssl_emp/py.typed", "linear_eval/py.typed", "ssl_emp/configs/suites/small.yaml"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        version = re.findall(r"^Version: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    assert names == expected
    assert version == re.findall(r'^__version__ = "(.*)"$', (ROOT / "ssl_emp/_version.py").read_text(), re.M)
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert {str(path.relative_to(sources)) for path in (sources / "configs").rglob("*.yaml")} <= packed
    assert {name for name in expected if "/configs/" not in name} <= packed


def test_it_is_used_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Pretraining by the name of a config, judging the run, and lists: as after `pip install`."""
    target, here = tmp_path / "installed", tmp_path / "empty"
    here.mkdir()
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def ssl_emp(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(target / "bin" / "ssl-emp"), *words]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)

    small = "data.max_images=64 batch_size=32 epochs=1 prune.policy=none model.width=8 device=cpu".split()
    small += ["compile=false", "monitor.tensorboard=false", "monitor.reliability_every=0"]
    trained = ssl_emp("pretrain", "--config", "demo", *small)
    assert trained.returncode == 0, trained.stderr
    assert "ssl-emp evaluate runs/demo" in trained.stdout, "the next command is the one that is there"
    judged = ssl_emp("evaluate", "runs/demo", "knn", "device=cpu")
    assert judged.returncode == 0 and re.search(r"^\| runs/demo +\| knn ", judged.stdout, re.M), judged
    listed = ssl_emp("configs")
    shipped = [path.stem for path in (ROOT / "configs").rglob("*.yaml")]
    assert sorted(re.findall(r"^  (\w+) ", listed.stdout, re.MULTILINE)) == sorted(shipped)
    where = "import ssl_emp, linear_eval; print(ssl_emp.__file__, linear_eval.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", where], env=environment, stdout=subprocess.PIPE)
    assert found.stdout.decode().count(str(target)) == 2, "not those of the clone"
