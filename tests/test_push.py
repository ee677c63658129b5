"""The model card, and `ssl-emp push`: what leaves the machine, and that others can load it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Pretrain, striped_images
from hub import SHA, TOKEN, Hub, serving
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt

from ssl_emp import load_encoder
from ssl_emp.__main__ import main
from ssl_emp.commands.card import (
    MARK,
    NAME,
    card_of,
    data_label,
    renew_card,
    short_path,
    try_to_renew,
    without_paths,
)
from ssl_emp.model import build_encoder, save_encoder

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ROOT = Path(__file__).parent.parent
FILES = ["README.md", "config.json", "model.safetensors"]


def save(folder: Path, arch: str = "resnet18", width: int | None = 8, stem: str | None = "cifar") -> Path:
    torch.manual_seed(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    encoder = build_encoder(arch, width, stem, 32, MEAN, STD)
    encoder.train()(torch.rand(8, 3, 32, 32))
    save_encoder(encoder.eval(), folder)
    return folder


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("encoders") / "mine")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of our own, its client pointed to it, and a token in the environment."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def read_card(text: str) -> Any:
    return ModelCard(text)


def push(*words: object) -> int:
    return main(["push", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    capsys.readouterr()
    assert push(*words) == code
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("error: ") and ". fix: " in last and last.isprintable(), said.err
    assert TOKEN not in said.err + said.out
    return last


def run_snippets(card: str, folder: Path | None, monkeypatch: pytest.MonkeyPatch, place: Path) -> list[Any]:
    """The `vectors` of every snippet of a card, of a picture that has their size."""
    (place / "picture.png").write_bytes(striped_images(1, 32)[0][0])
    monkeypatch.chdir(place)
    found = []
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        world: dict[str, Any] = {}
        code = snippet if folder is None else snippet.replace("path/to/this/folder", str(folder))
        exec(compile(code, NAME, "exec"), world)  # noqa: S102
        found.append(world["vectors"])
    return found


# ---- the hub


def test_three_files_go_to_the_hub_and_come_back(
    encoder_dir: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "enc"
    shutil.copytree(encoder_dir, folder)
    (folder / "optimizer.pt").write_text("x")
    assert push(folder, "me/tiny", "--dry-run", "--license=MIT") == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:]] == FILES and not hub.requests
    assert listed.startswith("would upload to me/tiny (private, unless") and not (folder / NAME).exists()

    assert push(folder, "me/tiny", "--license=MIT") == 0
    said = capsys.readouterr()
    assert said.out == listed.replace("would upload", "uploading") + f"done: {hub.url}/me/tiny/commit/{SHA}\n"
    assert sorted(hub.repos["me/tiny"]) == FILES and hub.visibility["me/tiny"] == "private"
    for name in FILES[1:]:
        assert hub.repos["me/tiny"][name] == (folder / name).read_bytes()
    card = hub.repos["me/tiny"][NAME].decode()
    assert read_card(card).data.license == "mit" and card == (folder / NAME).read_text()
    sent = b"".join(path.encode() + body for _, path, body in hub.requests)
    assert str(tmp_path).encode() not in sent and b"optimizer" not in sent
    assert TOKEN not in said.out + said.err

    encoder = load_encoder(folder)
    (vectors,) = run_snippets(card, None, monkeypatch, tmp_path)
    torch.testing.assert_close(vectors, encoder.embed([tmp_path / "picture.png"]))
    # pushed again: another commit, and the licence is kept
    assert push(folder, "me/tiny", "--public") == 0 and hub.visibility["me/tiny"] == "private"
    assert read_card(hub.repos["me/tiny"][NAME].decode()).data.license == "mit"


@pytest.mark.parametrize(
    ("arch", "width", "stem"), [("timm:test_resnet", None, None), ("timm:test_vit", None, None)]
)
def test_timm_loads_it_from_the_hub(
    arch: str, width: int | None, stem: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "enc", arch, width, stem)
    card = card_of(folder, None)
    ours, theirs = run_snippets(card, folder, monkeypatch, tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert push(folder, "me/net", "--public") == 0 and hub.visibility["me/net"] == "public"
    pushed = hub.repos["me/net"][NAME].decode()
    assert read_card(pushed).data.library_name == "timm"
    for vectors in run_snippets(pushed, None, monkeypatch, tmp_path):
        torch.testing.assert_close(vectors, ours, rtol=1e-4, atol=1e-4)


def test_the_token_is_never_shown(
    encoder_dir: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, code, message in (
        (401, 2, "use a token that may write to me/tiny"),
        (403, 2, "use a token that may write to me/tiny"),
        (400, 2, "the hub refuses it"),
        (500, 3, "give the same command again"),
    ):
        hub.refuses = status
        assert message in refused(capsys, encoder_dir, "me/tiny", code=code)
        assert not hub.repos, "nothing was committed"
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN, or log in" in refused(capsys, encoder_dir, "me/tiny")
    assert not (encoder_dir / NAME).exists()


def test_a_hub_that_is_not_there_is_a_line(
    encoder_dir: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "nothing was committed" in refused(capsys, encoder_dir, "me/tiny", code=3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, encoder_dir, "me/tiny")


def test_bad_words_are_a_line(
    encoder_dir: Path,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged, module, own, private = (tmp_path / name for name in ("damaged", "module", "own", "private"))
    for folder in (damaged, module, own, private):
        shutil.copytree(encoder_dir, folder)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:999])
    about = json.loads((module / "config.json").read_text())
    (private / "config.json").write_text(json.dumps(about | {"note": str(private)}))
    about["ssl_emp"] |= {"arch": "custom:Net", "width": None, "stem": None}
    (module / "config.json").write_text(json.dumps(about))
    (own / NAME).write_text("mine")
    (tmp_path / "file").write_text("x")
    cases: list[tuple[str, list[object]]] = [
        ("required: user/name", [encoder_dir]),
        ("is no name of a repository", [encoder_dir, "tiny"]),
        ("is no name of a repository", [encoder_dir, "a/b/c"]),
        ("is no name of a repository", [encoder_dir, "me/../x"]),
        ("is no name of a repository", [encoder_dir, "me/\x1b[2J"]),
        ("is no folder", [tmp_path / "missing", "me/tiny"]),
        ("is no folder", [tmp_path / "file", "me/tiny"]),
        ("no encoder in", [tmp_path, "me/tiny"]),
        ("cannot be read", [damaged, "me/tiny"]),
        ("nobody could build from the hub", [module, "me/tiny"]),
        ("a path of this machine", [private, "me/tiny"]),
        ("no identifier of a licence", [encoder_dir, "me/tiny", "--license=a licence: mine"]),
        ("which --license does not change", [own, "me/tiny", "--license=mit"]),
    ]
    for message, words in cases:
        assert message in refused(capsys, *words), message
    assert not hub.requests and (own / NAME).read_text() == "mine"
    assert push(own, "me/tiny") == 0 and hub.repos["me/tiny"][NAME] == b"mine"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, encoder_dir, "me/tiny")


# ---- the card


def test_the_card_of_a_run(
    pretrain_run: Pretrain, tiny_data: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain_run("runs/mine")
    path = run / "encoder" / NAME
    assert sorted(file.name for file in path.parent.iterdir()) == FILES
    card = read_card(path.read_text())
    assert card.data.license is None and card.data.library_name == "ssl_emp" and not card.data.eval_results
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    seen, unpruned = row["samples_seen"], 5 * 64
    share = f"{seen:,} of {unpruned:,} without pruning ({seen / unpruned:.1%})"
    assert seen < unpruned and share in card.text
    for line in ("| images | tiny", "| number of images | 68 |", "| policy | emp |", "Not evaluated yet"):
        assert line in card.text
    assert "Not given." in card.text
    assert not [place for place in (tiny_data, tmp_path, Path.home()) if str(place) in str(card)]
    (vectors,) = run_snippets(str(card), run / "encoder", monkeypatch, tmp_path)
    assert vectors.shape == (1, 64)

    renew_card(run, licence="cc-by-4.0")
    judge = ["evaluate", str(run), "knn", "device=cpu", "knn.num_neighbors=[5, 9]"]
    assert main([*judge, "random"]) == 0
    card = read_card(path.read_text())
    rows = json.loads((run / "eval" / "knn.json").read_text())
    values = [row["value"] for row in rows if row["encoder"] == str(run)]
    assert card.text.count("| this one | knn |") == card.text.count("| random | knn |") == 2
    assert card.data.license == "cc-by-4.0", "the licence is kept"
    assert [result.metric_value for result in card.data.eval_results] == values and len(values) == 2
    assert all(f"| {value:.2f} | 40 |" in card.text for value in values)
    assert str(tiny_data) not in str(card)

    # rows of other weights are not this encoder's
    assert "Not evaluated yet" in renew_card(run, "0123456789ab")
    with ThreadPoolExecutor(8) as many:  # as evaluations that end together
        assert all("| this one | knn |" in text for text in many.map(renew_card, [run] * 8))
    assert sorted(file.name for file in path.parent.iterdir()) == FILES
    # somebody's own text is left alone, whatever is evaluated
    path.write_text("# mine\n")
    assert main(judge) == 0
    assert path.read_text() == "# mine\n"
    path.unlink()
    # a copy outside of the run keeps what its card says of the run
    renew_card(run, rows[0]["weights"])
    copy = tmp_path / "copied"
    shutil.copytree(run / "encoder", copy)
    for folder in (run, copy):
        assert push(folder, "me/run", "--license=mit") == 0
        pushed = read_card(hub.repos["me/run"][NAME].decode())
        assert pushed.data.license == "mit" and "mit, of the weights" in pushed.text
        assert f"{seen:,} of {unpruned:,}" in pushed.text and len(pushed.data.eval_results) == 2


HOSTILE = "<script>alert(1)</script> | [x](http://evil.example) `![](http://a.example/x.png) www.evil.example"


def test_names_are_text_in_the_card(tmp_path: Path) -> None:
    run = tmp_path / "run | <b>x"
    save(run / "encoder")
    config: dict[str, Any] = {
        "data": {"source": HOSTILE, "image_size": HOSTILE, "max_images": HOSTILE},
        "model": {"init": "/home/me/" + HOSTILE.replace("/", "")},
        "prune": {"policy": HOSTILE},
        "optimizer": [HOSTILE],
        "epochs": HOSTILE,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text('{"epoch": 1, "samples_seen": "x", "real_share": []}\n')
    (run / "environment.json").write_text(json.dumps({"packages": {"torch": HOSTILE}, "device": HOSTILE}))
    (run / "eval").mkdir()
    row = {
        "encoder": HOSTILE,
        "data": HOSTILE,
        "protocol": HOSTILE,
        "metric": HOSTILE,
        "weights": "w",
        "value": 1,
    }
    odd: list[Any] = [row, row | {"metric": "top1 %"}, {"value": 3}, 7, row | {"value": "x"}]
    (run / "eval" / "knn.json").write_text(json.dumps(odd))
    (run / "eval" / "linear.json").write_text("[")
    text = renew_card(run, "w")
    card = read_card(text)
    (result,) = card.data.eval_results
    assert result.dataset_name.endswith("evil.example")
    shown = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(card.text)
    leaves = [leaf for token in shown for leaf in (token.children or [token])]
    kinds = {leaf.type for leaf in leaves}
    assert not kinds & {"link_open", "image", "html_inline"}
    assert [leaf.content.strip() for leaf in leaves if leaf.type == "html_block"] == [MARK]
    assert "td_open" in kinds
    assert HOSTILE in ["".join(leaf.content for leaf in token.children or []) for token in shown]
    assert "/home/me" not in text and "www." not in card.text.replace("www\\.", "")


def test_a_card_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(run / "encoder")
    (run / "config.yaml").write_text("data: {source: mnist5k}\n")
    said: list[str] = []
    os.mkfifo(run / "encoder" / NAME)
    try_to_renew(run, None, said.append)  # reading the pipe would never end
    (run / "encoder" / NAME).unlink()
    (run / "encoder" / NAME).mkdir()
    try_to_renew(run, None, said.append)
    (run / "encoder").rename(elsewhere)
    (run / "encoder").symlink_to(elsewhere)
    try_to_renew(run, None, said.append)
    assert len(said) == 3 and all("encoder/README.md was not written" in line for line in said), said
    assert "is a link to another place" in said[2]
    # a link in the place of the card is replaced, and not followed
    (run / "encoder").unlink()
    elsewhere.rename(run / "encoder")
    (run / "encoder" / NAME).rmdir()
    (run / "encoder" / NAME).symlink_to(tmp_path / "mine")
    try_to_renew(run, None, said.append)
    assert (
        len(said) == 3 and not (tmp_path / "mine").exists() and MARK in (run / "encoder" / NAME).read_text()
    )


def test_paths_lose_their_places() -> None:
    for text, wanted in (
        ("cosine kNN, k=5, T=0.1, bank 54", "cosine kNN, k=5, T=0.1, bank 54"),
        ("l2=1e-3 of 9 in 1e-6/1e2, x", "l2=1e-3 of 9 in 1e-6/1e2, x"),
        ("test /home/me/secret/photos, last epoch", "test photos, last epoch"),
        ("judged on ~/a/b (as train)", "judged on b (as train)"),
        ("/srv/x/", "x"),
    ):
        assert without_paths(text) == wanted
    assert data_label("/home/me/my photos 32px, test /srv/b/c") == "my photos 32px, test c"
    assert [short_path(p) for p in ("cifar10", "/a/b", "~/x", "../y/", "/", "~", ".")] == [
        "cifar10", "b", "x", "y", "images in a folder", "images in a folder", "images in a folder",
    ]  # fmt: skip


@pytest.mark.whole
def test_commands_of_their_own_processes(tmp_path: Path) -> None:
    """As somebody types it, with HF_ENDPOINT and HF_TOKEN; then timm in a process without ssl_emp."""
    folder = save(tmp_path / "enc", "timm:test_resnet", None, None)
    load = "import timm, torch; network = timm.create_model('hf-hub:me/net', pretrained=True).eval()\n"
    load += "print(network(torch.full((1, 3, 32, 32), 0.5)).double().sum().item())"
    with serving() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
        commands = [["-m", "ssl_emp", "push", str(folder), "me/net", "--license", "mit"], ["-I", "-c", load]]
        for words in commands:
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, cwd=ROOT
            )
            assert not done.returncode and TOKEN not in done.stdout + done.stderr, done.stderr
    assert sorted(hub.repos["me/net"]) == FILES
    network = load_encoder(folder).backbone
    with torch.no_grad():
        wanted = network(torch.full((1, 3, 32, 32), 0.5)).double().sum().item()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-4)
