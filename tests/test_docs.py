"""The README and the pages of docs/: their commands and snippets run, their links lead somewhere, their
numbers are those of the results; the site builds without a warning (whole), and the demo wins (slow).
"""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import striped_images
from torchvision.models import resnet18

from experiments import picture
from ssl_emp import __main__
from ssl_emp.commands import arguments
from ssl_emp.commands.eval_config import EvalConfig, check
from ssl_emp.commands.evaluate import parse_arguments
from ssl_emp.config import apply_override, check_config, load_config
from ssl_emp.shipped import find_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *DOCS,
    *(ROOT / name for name in ("experiments/README.md", "experiments/archive.md", "benchmarks/README.md")),
]
# pages whose Python runs in another test
RUN_ELSEWHERE = {
    "CONTRIBUTING.md": "test_contributing",
    "python.md": "test_python",
    "your_loop.md": "test_examples",
    "embed.md": "test_embed",
    "export.md": "test_export",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of every `ssl-emp` command of a page, and of the clone's scripts, comments dropped."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["ssl-emp"]:
            found.append(words[1:])
        elif words[:2] in (["python", "pretrain.py"], ["python", "evaluate.py"]):
            found.append([words[1].removesuffix(".py"), *words[2:]])
    return found


# ---- commands and snippets


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    """The command exists, its options do, and its keys have values that are allowed."""
    for command, *words in commands(page):
        assert command in __main__.COMMANDS, command
        if command == "pretrain":
            given = arguments.pretrain_parser().parse_intermixed_args(words)
            if given.config in (None, "CONFIG"):
                values: dict[str, Any] = {}
                for override in given.overrides:
                    apply_override(type(load_config(None, [])), values, override)
                check_config(values, "the page")
            else:
                load_config(
                    find_config(given.config.removeprefix("configs/").removesuffix(".yaml")), given.overrides
                )
        elif command == "evaluate" and words[0] != "predict":
            _, evaluators, settings, _ = parse_arguments(words)
            check(EvalConfig, settings, "the page")
            assert evaluators
        else:
            own = arguments.predict_parser if command == "evaluate" else None
            parser = own or importlib.import_module(f"ssl_emp.commands.{command}").parser
            parser().parse_intermixed_args(words)


@pytest.mark.whole
def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of README and quick start, as one story on small images: all but `make`, and one run of two
    processes, in this process. Then the Python of these two pages and of docs/classifiers.md."""
    for split, seed in (("train", 0), ("test", 1)):
        for i, (data, label) in enumerate(zip(*striped_images(48, 24, seed), strict=True)):
            path = tmp_path / "images" / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for name in ("a.jpg", "b.png", "one.jpg", "two.png"):  # a name is no format
        (tmp_path / name).write_bytes(striped_images(1, 24)[0][0])
    sizes = "epochs=2 batch_size=16 model.width=8 data.image_size=24 augment.size=20"
    small = [*sizes.split(), "device=cpu", "monitor.tensorboard=false"]
    story = commands(ROOT / "docs" / "quickstart.md")
    told = commands(ROOT / "README.md")
    story += [words for words in told if words not in story]
    assert len(story) >= 8
    monkeypatch.chdir(tmp_path)
    table = ""
    for words in story:
        words = [word.replace("/path/to", str(tmp_path)) for word in words]
        words += small if "--config" in words else ["--overwrite"] if words[0] == "embed" else []
        if any(word.startswith("devices=") for word in words):
            command = [sys.executable, "-m", "ssl_emp", *words]
            paths = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, timeout=120, env=paths).returncode
        elif words[0] == "pretrain" and (tmp_path / "runs" / "mine").exists() and "out=runs/mine" in words:
            continue  # both pages begin with it
        else:
            code = __main__.main(words)
        said, errors = capfd.readouterr()
        assert code == 0, (words, errors)
        table += said
    for encoder in ("runs/mine", "random", "pixels"):
        assert len(re.findall(rf"^\| {encoder} +\| (?:knn|linear)", table, re.MULTILINE)) >= 2, table
    left = {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    told_of = set(
        re.findall(r"`([\w.]+)/?[\w/.]*`", (ROOT / "docs" / "runs.md").read_text().partition("\nA run")[0])
    )
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "encoder", "pruning", "eval"} <= left & told_of
    assert (tmp_path / "runs" / ".folder_emp.views.png").exists()
    world: dict[str, Any] = {"paths": ["a.jpg", "b.png"]}
    for page in ("README.md", "docs/quickstart.md", "docs/classifiers.md"):
        for snippet in blocks(ROOT / page, "python"):
            if ("load_" in snippet or "RunFolder" in snippet) and "import timm" not in snippet:
                exec(compile(snippet, page, "exec"), world)  # noqa: S102
            elif "import timm" in snippet:  # the network of this test is too narrow for timm's
                exec(compile(snippet.partition("import timm")[0], page, "exec"), world)  # noqa: S102
    assert (
        world["features"].shape == (2, 64) and len(world["vectors"]) == 2 and world["logits"].shape == (2, 4)
    )


def test_the_three_lines_of_the_readme_are_those_of_the_page() -> None:
    """docs/your_loop.md is run by tests/test_examples.py."""
    (mine,) = (block for block in blocks(ROOT / "README.md", "python") if "Pruner" in block)
    page = (ROOT / "docs" / "your_loop.md").read_text()
    names = {"epochs=200": "epochs=20", "loss = pruner": "        loss = pruner"}
    lines = [line for line in mine.splitlines() if line.startswith(("pruner", "loader"))]
    for line in lines:
        assert line.replace("epochs=200", names["epochs=200"]) in page, line
    assert "pruner.update(index, losses, entropy(logits))" in page and len(lines) == 2


def test_snippets_about_starts_and_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The renaming of docs/starts.md. Those of docs/backbones.md run in tests/test_backbones.py."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(ROOT / "docs" / "starts.md", "python")
    assert "resnet50" in snippet
    code = compile(snippet.replace("resnet50", "resnet18"), "docs/starts.md", "exec")
    ours = resnet18().state_dict()
    renamed = {f"{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(ours.items())}
    torch.save(renamed, "theirs.pth")
    exec(code, {})  # noqa: S102
    from safetensors.torch import load_file

    taken = load_file("start.safetensors")
    assert ours.keys() - taken.keys() == {
        name for name in ours if name.startswith("fc.") or name.endswith("num_batches_tracked")
    }
    assert all(torch.equal(value, ours[name]) for name, value in taken.items())
    first, second = list(renamed)[:2]
    torch.save(renamed | {first: renamed[second]}, "theirs.pth")
    with pytest.raises(ValueError, match=r"conv1.weight has another shape: \(64,\)"):
        exec(code, {})  # noqa: S102


def test_all_python_of_the_pages_runs_in_some_test() -> None:
    here = {"README.md", "quickstart.md", "classifiers.md", "starts.md", "backbones.md"}
    with_python = {page.name for page in PAGES if blocks(page, "python")}
    assert with_python <= here | RUN_ELSEWHERE.keys(), "run its snippets in a test, and name the page here"
    for page, test in RUN_ELSEWHERE.items():
        assert page in (ROOT / "tests" / f"{test}.py").read_text()


# ---- the notebook

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def outputs(notebook: dict[str, Any]) -> str:
    """What its cells gave, as one text."""
    given = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(
        "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "")) for output in given
    )


def judged(text: str) -> set[tuple[str, ...]]:
    """(encoder, evaluator) of the table."""
    return set(re.findall(r"^\| ([\w/-]+) +\| (knn|linear) ", text, re.MULTILINE))


def test_the_notebook_was_run() -> None:
    """What is committed are outputs of its own cells, in order, on no one's machine in particular."""
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    given = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in given)
    assert sum("image/png" in output.get("data", {}) for output in given) == 2
    assert len(judged(outputs(notebook))) == 6 and NOTEBOOK.stat().st_size < 200_000
    assert not re.search(r"/home/|/root/|/tmp/", NOTEBOOK.read_text())


# a kernel's sockets are files of the test here: no port is opened
RUN_NOTEBOOK = """
import sys, nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
notebook = nbformat.reads(sys.stdin.read(), 4)
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=sys.argv[1] + "/kernel")
NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": sys.argv[1]}}).execute()
print(nbformat.writes(notebook))
"""


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, with three epochs instead of eight."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = NOTEBOOK.read_text()
    assert text.count("epochs=8") == 1
    command = [sys.executable, "-c", RUN_NOTEBOOK, str(tmp_path)]
    short = text.replace("epochs=8", "epochs=3")
    ran = subprocess.run(command, input=short, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    said = outputs(json.loads(ran.stdout))
    assert judged(said) == judged(outputs(json.loads(text))) and "epoch 3: loss" in said
    assert (tmp_path / "runs" / "quickstart" / "encoder").is_dir()


# ---- text that is made from something else


def test_the_reference_of_keys_is_fresh() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "config_reference.py"))["page"]()
    page = (ROOT / "docs" / "config_reference.md").read_text()
    assert page == made, "a key or its comment has changed: python docs/config_reference.py"
    silent = re.findall(r"^\| (`[\w.]+`) \|.*\|  \|", made, re.MULTILINE)
    assert not silent, "a comment at the field says what a key means"
    for key, row in (
        ("prune.fraction", "0 ≤ number < 1"),
        ("model.width", "8 ≤ whole number ≤ 512, a multiple of 8"),
    ):
        assert f"| `{key}` | {row} |" in page


def test_the_picture_and_the_table_are_of_the_committed_results() -> None:
    assert picture.facts() in picture.PICTURE.read_text(), "python -m experiments.picture"
    assert picture.table() in README, "python -m experiments.picture"
    assert len(picture.table().splitlines()) == 8


@pytest.mark.whole
def test_the_picture_is_drawn_for_light_and_dark() -> None:
    drawn = picture.draw()
    assert drawn.count("<title>") == 1 and "<script" not in drawn
    for name, light, dark, _ in picture.LOOKS.values():
        assert f"stroke: {light}" in drawn and f"stroke:{dark}!important" in drawn and name in drawn


@pytest.mark.parametrize("page", ["choosing.md", "results.md"])
def test_every_figure_with_a_spread_is_one_of_the_experiments(page: str) -> None:
    """Numbers that are quoted are copied: those of a page are found in the experiments, to the last digit."""
    pages = [ROOT / "experiments" / name for name in ("README.md", "archive.md")]
    source = "".join(page.read_text() for page in pages)
    measured = {figure.lstrip("+-") for figure in re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", source)}
    quoted = {
        figure.lstrip("+-")
        for figure in re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", (ROOT / "docs" / page).read_text())
    }
    assert len(quoted) > 20
    unknown = quoted - measured
    assert not unknown if page == "choosing.md" else len(unknown) < len(quoted) / 2, unknown


# ---- the README, links, the site


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150 and len(README.split()) < 1500


def test_links_lead_somewhere() -> None:
    """Files, folders and headings; what GitHub makes of a heading is its words with hyphens."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target, _, heading in re.findall(r"\]\((?!https?://)([^)#\s]*)(#([^)\s]+))?\)", text):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), (page.name, target)
            if heading:
                titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in slugs, (page.name, target, heading)


def test_every_page_is_in_the_site() -> None:
    """Once: it would stand twice in the menu."""
    trees = "\n".join(blocks(ROOT / "docs" / "index.md", r"\{toctree\}"))
    listed = re.findall(r"^\w+$", trees, re.MULTILINE)
    assert sorted(listed) == sorted({page.stem for page in DOCS} - {"index"})


@pytest.mark.whole
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees")]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0 and not built.stderr, built.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    assert all(f'id="{name}"' in reference for name in ("ssl_emp.pretrain", "ssl_emp.prune.Pruner"))
    assert (tmp_path / "site" / "_images" / "policies.svg").exists()
    assert "ssl_long_linear_samples" in (tmp_path / "site" / "experiments.html").read_text()


def test_the_file_tree_is_the_tree() -> None:
    tree = (ROOT / "docs" / "code.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "ssl_emp").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    assert all((ROOT / "configs" / f"{name}.yaml").exists() for name in re.findall(r"\w+_emp(?=[,; ])", tree))


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name
        for page in PAGES
        for name in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(), re.M)
    }
    assert {name for pair in named for name in pair if name} <= targets


@pytest.mark.slow
def test_the_demo_wins(tmp_path: Path) -> None:
    """The pretrained encoder beats an untrained one and raw pixels, by kNN and by a linear probe."""
    run = tmp_path / "demo"
    for words in (
        ["pretrain.py", "--config", "configs/demo.yaml", f"out={run}"],
        ["evaluate.py", str(run), "random", "pixels", "knn", "linear"],
    ):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=1200)
    for evaluator in ("knn", "linear"):
        values = {
            row["encoder"]: row["value"]
            for row in json.loads((run / "eval" / f"{evaluator}.json").read_text())
        }
        assert values[str(run)] == max(values.values()) and len(set(values.values())) == 3, values
