"""The report of runs: its figures against the run's files, hostile names, files that are missing, and (whole)
in a browser.
"""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import striped_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_advice import found as findings_of

from ssl_emp.augment import cut_views, draw_params
from ssl_emp.commands import evaluate, report, report_data
from ssl_emp.commands.job import recipe_of
from ssl_emp.commands.pretrain import main as pretrain
from ssl_emp.commands.resume import read_run
from ssl_emp.data.images import ImageSet
from ssl_emp.prune import Emp, Random
from ssl_emp.report.columns import KINDS, front_coded, histogram, packed
from ssl_emp.report.meanings import MEANINGS, meaning_of
from ssl_emp.report.page import script_json
from ssl_emp.run.report import write_samples

CLASSES = ['"><img src=x onerror=alert(1)>', "<script>alert(1)<", "\u202eplain"]
SMALL = ["device=cpu", "cache_dir=null"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run on images whose names and classes are markup; one is `<script>alert(1)</script>.png`."""
    room = tmp_path_factory.mktemp("hostile")
    for number, data in enumerate(striped_images(48)[0]):
        name = "script>.png" if number == 1 else f"</title><!-- {number:02}.png".replace("/", "_")
        path = room / "images" / CLASSES[number % 3] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    words = [f"data.source={room / 'images'}", f"out={room / 'run'}", "epochs=6"]
    assert pretrain(["--config", str(tiny_config), *words]) == 0
    return room / "run"


@pytest.fixture
def run(hostile: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hostile, tmp_path / "run"))


class Page(HTMLParser):
    """What a browser would see: elements, and the text of those without children."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.now = ""
        self.feed(path.read_text())
        (data,) = (text for text in self.texts["script"] if text.startswith("{"))
        self.data = json.loads(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.now = tag

    def handle_endtag(self, tag: str) -> None:
        self.now = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.now, []).append(data)


def written(run: Path, *more: str, code: int = 0) -> Page:
    assert report.main([str(run), *more]) == code
    return Page(Path(more[-1]) if more else run / "report.html")


def unpacked(column: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(column["data"]), KINDS[column["kind"]])


def unpacked_names(coded: dict[str, Any]) -> list[str]:
    names: list[str] = []
    for shared, rest in zip(unpacked(coded["shared"]), coded["rests"].split("\n"), strict=True):
        names.append((names[-1][:shared] if shared else "") + rest)
    return names


# ---- columns


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12), min_size=1))
def test_names_are_what_they_were(names: list[str]) -> None:
    coded = front_coded(names)
    assert unpacked_names(coded) == names
    # where JavaScript counts otherwise, beyond 16 bits, nothing is shared
    for shared, name in zip(unpacked(coded["shared"]), names, strict=True):
        assert not shared or max(name) <= "\uffff"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 255], "u1"),
        ([0, 256], "u2"),
        ([-1, 3], "i4"),
        ([0, 2**31], "f4"),
        ([0.5, np.inf, -np.inf, np.nan, 1e300], "f4"),
        ([], "f4"),
    ],
)
def test_columns_take_the_smallest_kind(values: list[float], kind: str) -> None:
    array = np.array(values)
    column = packed(array)
    assert column["kind"] == kind
    known = np.isfinite(array) & (np.abs(array) < 3e38)
    assert np.array_equal(unpacked(column)[known], array[known].astype(KINDS[kind]))
    assert np.isnan(unpacked(column)[~known].astype(float)).all()


@settings(max_examples=25)
@given(st.lists(st.integers(0, 500), max_size=80))
def test_a_histogram_counts_every_sample_once(values: list[int]) -> None:
    bars = histogram(np.array(values, np.int64), most=20)
    assert sum(bars["counts"]) == len(values) and len(bars["counts"]) <= 20
    for bar, count in enumerate(bars["counts"]):
        low = bars["low"] + bar * bars["width"]
        assert count == sum(low <= value < low + bars["width"] for value in values)


# ---- what it says


def test_figures_of_the_report_are_those_of_the_runs_files(hostile: Path, tmp_path: Path) -> None:
    out = tmp_path / "there.html"
    (found,) = written(hostile, "--out", str(out)).data["runs"]
    table = pq.read_table(hostile / "pruning" / "samples.parquet").to_pydict()
    samples = found["samples"]
    assert samples["count"] == samples["shown"] == 48
    assert unpacked_names(samples["names"]) == [name.replace("\u202e", "\\u202e") for name in table["name"]]
    for name in ("loss", "distance", "score", "times_trained"):
        assert np.array_equal(unpacked(samples["columns"][name]), np.float32(table[name])), name
    assert np.array_equal(unpacked(samples["columns"]["scored_epoch"]), np.array(table["scored_epoch"]) + 1)
    assert samples["class_names"] == sorted(CLASSES[:2]) + ["\\u202eplain"]
    classes = [samples["class_names"][label] for label in unpacked(samples["class"])]
    folders = [name.rpartition("/")[0].removesuffix("/script>.png") for name in table["name"]]
    assert classes == [folder.replace("\u202e", "\\u202e") for folder in folders]

    rows = [json.loads(line) for line in (hostile / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose(found["metrics"]["loss"], [row["loss"] for row in rows], rtol=1e-5)
    budget = found["budget"]
    # 6 epochs of 6 batches of 8; the first and the last (round(0.2 * 6) = 1) are full
    assert budget["unpruned"] == 6 * 6 * 8 and budget["full_epochs"] == 2 and budget["finished"]
    assert budget["seen"] == budget["planned"] == rows[-1]["samples_seen"] < budget["unpruned"]
    pace = rows[-1]["training_seconds"] / rows[-1]["step"]
    assert budget["unpruned_seconds"] == pytest.approx(pace * 36)


def test_pictures_are_of_these_images_and_views_are_those_that_were_trained_on(hostile: Path) -> None:
    found = report_data.gather(hostile)
    images = sorted((hostile.parent / "images").rglob("*.png"))
    names = [str(path.relative_to(hostile.parent / "images")) for path in images]
    table = pq.read_table(hostile / "pruning" / "samples.parquet").to_pydict()
    assert sorted(table["name"]) == sorted(names)

    def tile(sheet: dict[str, Any], number: int) -> np.ndarray:
        picture = Image.open(io.BytesIO(base64.b64decode(sheet["jpeg"])))
        left, top = (part * sheet["tile"] for part in (number % sheet["columns"], number // sheet["columns"]))
        return np.asarray(picture.crop((left, top, left + sheet["side"], top + sheet["side"]))).astype(int)

    pictures = found["pictures"]
    assert sorted(pictures["rows"]) == list(range(48)), "all of so few"
    pixels = np.stack([np.asarray(Image.open(hostile.parent / "images" / name)) for name in table["name"]])
    for number, row in enumerate(pictures["rows"]):
        off = np.abs(tile(pictures, number) - pixels.astype(int)).mean((1, 2, 3))
        assert off.argmin() == row and off[row] < 8, "JPEG of noise; other images are off by 60"

    views, config = found["views"], read_run(hostile, [])[0]
    assert views["each"] == 2 and len(views["rows"]) == len(views["epochs"]) >= 8
    recipe = recipe_of(config, 16)
    mean, std = np.array(recipe.mean), np.array(recipe.std)
    for number, (row, epoch) in enumerate(zip(views["rows"], views["epochs"], strict=True)):
        assert epoch == table["scored_epoch"][row] + 1
        draw = draw_params(config.seed, epoch - 1, torch.tensor([row]), recipe, 16)
        image = torch.tensor(pixels[row].transpose(2, 0, 1))[None]
        for which, view in enumerate(cut_views(image, draw, recipe)):
            wanted = (view[0].numpy().transpose(1, 2, 0) * std + mean).clip(0, 1) * 255
            assert np.abs(tile(views, 2 * number + which) - wanted).mean() < 8, (row, which)


def test_nothing_of_the_data_is_markup(hostile: Path, tmp_path: Path) -> None:
    page = written(hostile, "--out", str(tmp_path / "there.html"))
    text = (tmp_path / "there.html").read_text()
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and tags.count("title") == 1 and "img" not in tags
    assert not [name for _, of in page.elements for name in of if name.startswith("on")]
    asked = [of[name] for _, of in page.elements for name in ("src", "href", "data", "action") if name in of]
    assert asked == ["data:,", "#main"]
    # every `<` of the data is \u003c: no name can end the element, nor begin a comment in it
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert not set("<>&\u2028\u2029") & set(data) and data.isascii()
    # nothing but this style and this script is allowed to act
    (policy,) = (of["content"] for _, of in page.elements if "content-security-policy" in str(of).lower())
    for name in ("style", "script"):
        (part,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; ") and "unsafe" not in str(policy)


@settings(max_examples=25)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_in_a_script_ends_nothing_and_comes_back(text: str) -> None:
    made = script_json({"name": text + "</script><!--\u2028"})
    assert not set("<>&\u2028") & set(made) and json.loads(made)["name"] == text + "</script><!--\u2028"


def test_every_warning_that_is_said_has_its_meaning(run: Path) -> None:
    said = [
        findings_of({"score_repeat": 0.05})["ranking"].line,
        findings_of({"std_beta_memory": 9.0})["drowned"].line,
        findings_of({"kept_overlap": 0.5})["rotation"].line,
        findings_of({"idle_share": 0.3}, policy=Random())["idle"].line,
        findings_of({"noisy_kept": 0.4}, policy=Emp())["noise"].line,
        findings_of({"class_ratio_max": 3.0})["balance"].line,
    ]
    with open(run / "train.log", "w") as log:
        for epoch, line in enumerate(said, 3):
            log.write(f"2026-01-02 03:04:05 epoch {epoch}/99  loss 1.0\n")
            log.write(f"2026-01-02 03:04:05 warning   {line}\n2026-01-02 03:04:05             more <b>\n")
        log.write("2026-01-02 03:04:05 epoch 12/99  loss 1.0\n")
        log.write(f"2026-01-02 03:04:05 warning   {said[3]}\n2026-01-02 03:04:05 note      something\n")
    told = written(run).data["runs"][0]["warnings"]
    assert [one["line"].removesuffix(" more <b>") for one in told] == [*said, "something"]
    assert [one["epochs"] for one in told] == [[3], [4], [5], [6, 12], [7], [8], [12]]
    assert len({one["title"] for one in told}) == 7 and told[-1]["title"] is None
    assert all(one["meaning"] for one in told[:-1])


def test_the_words_that_meanings_are_found_by_are_words_of_the_sources() -> None:
    sources = "".join(path.read_text() for path in Path(report.__file__).parents[1].rglob("*.py"))
    sources = sources.replace(Path(report_data.meaning_of.__code__.co_filename).read_text(), "")
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    for meaning in MEANINGS:
        assert meaning.words in joined, meaning
    assert meaning_of("nothing that is known") is None


def test_runs_side_by_side(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(hostile, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["prune"]["fraction"], config["out"] = 0.5, "elsewhere"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert report.main([str(hostile), str(other), str(hostile)]) == 0
    data = Page(tmp_path / "report.html").data
    assert [found["name"] for found in data["runs"]] == ["run", "other"], "a run named twice is told once"
    assert data["differences"] == [["prune.fraction", "0.4", "0.5"]]


# ---- what may be missing, and what is refused


def test_images_that_moved_cost_pictures_and_a_line(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["source"] = str(run.parent / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (found,) = written(run).data["runs"]
    assert "pictures" not in found and "class" not in found["samples"] and found["samples"]["shown"] == 48
    (line,) = found["notes"]
    assert line.startswith("No pictures and no classes, the images are not there: no such folder")


def test_images_of_which_some_are_gone_or_damaged(hostile: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(hostile.parent / "images", tmp_path / "images"))
    run = Path(shutil.copytree(hostile, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["source"] = str(images)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    first, second = sorted(images.rglob("*.png"))[:2]
    first.unlink()
    second.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (found,) = written(run).data["runs"]
    assert len(found["pictures"]["rows"]) == 46
    assert sorted(found["notes"]) == [
        f"1 of the 48 samples are not in {images} any more.",
        "1 of the images that pictures are made of cannot be read any more.",
    ]


@pytest.mark.parametrize(
    "lost",
    ["pruning/samples.parquet", "metrics.jsonl", "environment.json", "train.log", "encoder/config.json"],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_without_one_of_its_files_is_reported(run: Path, lost: str, damaged: bool) -> None:
    (run / lost).unlink()
    if damaged:
        (run / lost).write_bytes(b'{"epoch": "\xff\x00')
    (found,) = written(run).data["runs"]
    assert found["name"] == "run" and ("samples" in found) == ("parquet" not in lost)
    assert found["budget"]["samples"] == 48


def test_a_run_that_has_only_begun(run: Path) -> None:
    for name in ("pruning", "encoder", "checkpoints"):
        shutil.rmtree(run / name)
    for name in ("metrics.jsonl", "train.log", "environment.json"):
        (run / name).unlink()
    (found,) = written(run).data["runs"]
    assert "budget" not in found and found["metrics"] == {}


def test_what_is_no_run_and_files_of_others_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert report.main(list(words)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and ". fix: " in said and said.count("\n") == 1
        return said

    assert "no run to tell of" in refused()
    assert "is not a run directory" in refused(str(tmp_path / "nothing"))
    assert "has no config.yaml" in refused(str(tmp_path))
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    assert "is there, and is no report" in refused(str(run), "--out", str(mine))
    assert mine.read_text() == "<p>mine"
    (run / "report.html").symlink_to(mine)
    assert "is a link to another place" in refused(str(run))
    assert "cannot write" in refused(str(run), "--out", str(tmp_path / "no" / "such" / "folder.html"))
    assert report.main([str(run), "--out", str(tmp_path / "there.html")]) == 0
    assert report.main([str(run), "--out", str(tmp_path / "there.html")]) == 0, "a report is replaced"


def test_an_evaluation_ends_with_a_report_and_does_not_need_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "pixels", "knn", "knn.num_neighbors=3", "data.holdout=0.25", *SMALL]
    assert evaluate.main(words) == 0
    assert f"report: {run / 'report.html'}\n" in capsys.readouterr().err
    rows = Page(run / "report.html").data["runs"][0]["evaluation"]
    assert [(row["own"], row["evaluator"]) for row in rows] == [(True, "knn"), (False, "knn")]
    moved = Path(shutil.copytree(run, run.parent / "elsewhere" / "run"))
    assert written(moved).data["runs"][0]["evaluation"] == rows, "also after the run was moved"
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert evaluate.main(words) == 0
    assert f"warning: no report of {run} was written (" in capsys.readouterr().err
    shutil.rmtree(run / "report.html")
    assert evaluate.main([*words, "--out", str(run.parent / "rows")]) == 0
    assert not (run / "report.html").exists(), "its rows are not in the run"


# ---- large runs


class Noise:
    """Pixels of a large set, made when they are asked for; noise is what JPEG makes most bytes of."""

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 256, (len(places), 3, 64, 64), dtype=torch.uint8)


def large(run: Path, count: int) -> tuple[Path, ImageSet]:
    """The run as if it had been on so many images."""
    rng = np.random.default_rng(0)
    names = [f"train/n{number % 1000:08}/n{number % 1000:08}_{number}.JPEG" for number in range(count)]
    columns = {name: rng.normal(2, 1, count).astype(np.float32) for name in ("loss", "distance", "score")}
    columns |= {
        name: rng.integers(1, 7, count).astype(np.int32) for name in ("times_trained", "scored_epoch")
    }
    columns["scored_epoch"] -= 1
    write_samples(
        run / "pruning" / "samples.parquet",
        names,
        {name: torch.from_numpy(values) for name, values in columns.items()},
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["image_size"] = 64
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    labels = torch.arange(count) % 10
    pixels: Any = Noise()
    return run, ImageSet(pixels, labels, names, [f"class {n}" for n in range(10)], [])


@pytest.mark.whole
@pytest.mark.parametrize("count", [50_000, 120_000])
def test_the_file_stays_small(run: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "there.html"
    report.write_report([large(run, count)[0]], out, images=large(run, count)[1])
    assert 1_000_000 < out.stat().st_size < 5_000_000
    samples = Page(out).data["runs"][0]["samples"]
    assert samples["count"] == count == sum(samples["times"]["counts"]) and samples["shown"] <= 50_000
    names = unpacked_names(samples["names"])
    index = unpacked(samples["index"])
    assert len(names) == len(index) == samples["shown"] > 40_000
    assert all(name.endswith(f"_{number}.JPEG") for name, number in zip(names, index, strict=True))


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright, for the report's tests")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync"
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=quiet.split())
        yield made
        made.close()


def opened(browser: Any, path: Path, width: int = 1280) -> tuple[Any, list[str]]:
    """(page, what went wrong): a line in the console, a dialog, a request for anything but the file."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: wrong.append(request.url) if request.url[:5] != "data:" else None)
    page.goto(path.as_uri())
    page.wait_for_selector("[data-table=samples] tbody tr")
    assert wrong.pop(0) == path.as_uri()
    return page, wrong


def column(page: Any, name: str) -> list[str]:
    heads = page.locator("[data-table=samples] tr.titles th").all_inner_texts()
    place = [head.strip() for head in heads].index(name) + 1
    found: list[str] = page.locator(f"[data-table=samples] tbody td:nth-child({place})").all_inner_texts()
    return found


def rows_are(page: Any, count: int) -> None:
    """Wait until the table of samples has so many rows."""
    from playwright.sync_api import expect

    expect(page.locator("[data-table=samples] tbody tr")).to_have_count(count)


@pytest.mark.whole
def test_a_browser_shows_it_sorts_and_filters_and_asks_for_nothing(
    hostile: Path, tmp_path: Path, browser: Any
) -> None:
    out = tmp_path / "there.html"
    assert report.main([str(hostile), "--out", str(out)]) == 0
    table = pq.read_table(hostile / "pruning" / "samples.parquet").to_pydict()
    page, wrong = opened(browser, out)

    def shown(values: list[float]) -> list[str]:
        return [f"{value:.2f}" if value >= 10 else f"{value:.3f}" for value in values]

    page.click("[data-column=loss]")
    assert column(page, "loss") == shown(sorted(table["loss"], reverse=True))
    page.click("[data-column=loss]")
    assert column(page, "loss") == shown(sorted(table["loss"]))
    assert page.locator("th[aria-sort=ascending]").inner_text().strip() == "loss"

    page.fill("[aria-label='Only where loss is']", "<= 2.5")
    wanted = sorted(value for value in table["loss"] if value <= 2.5)
    rows_are(page, len(wanted))
    assert column(page, "loss") == shown(wanted)
    page.fill("[aria-label='Only where loss is']", "no number")
    page.wait_for_selector("[aria-label='Only where loss is'][aria-invalid=true]")
    page.get_by_text("Clear filters").click()
    assert len(column(page, "loss")) == 48

    page.fill("[aria-label='Only names that contain']", "SCRIPT>.PNG")
    rows_are(page, 1)
    assert column(page, "name") == ["<script>alert(1)</script>.png"]
    page.click("[data-table=samples] tbody button")
    assert page.locator("dialog[open] h3").first.inner_text() == "<script>alert(1)</script>.png"
    assert page.locator("dialog[open] .picture").count() >= 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.get_by_text("Clear filters").click()

    page.select_option("[aria-label='Only this class']", index=1)
    assert set(column(page, "class")) == {CLASSES[0]} and len(column(page, "class")) == 16
    assert page.locator(".gallery li").count() == 16
    page.click("[data-preset=least]")
    fewest = sorted(
        times for times, name in zip(table["times_trained"], table["name"], strict=True) if CLASSES[0] in name
    )
    assert column(page, "times trained") == [str(times) for times in fewest], "the class stays chosen"
    page.locator(".chart svg").first.press("ArrowRight")
    assert "epoch 1" in page.locator(".chart").first.inner_text()
    assert wrong == []
    page.close()


@pytest.mark.whole
def test_pages_of_a_phone_do_not_scroll_sideways(hostile: Path, tmp_path: Path, browser: Any) -> None:
    out = tmp_path / "there.html"
    shutil.copytree(hostile, tmp_path / "other")
    assert report.main([str(hostile), str(tmp_path / "other"), "--out", str(out)]) == 0
    page, wrong = opened(browser, out, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.get_by_role("button", name="other", exact=True).click()
    assert page.locator("#overview h2").inner_text() == "other" and wrong == []
    page.close()


@pytest.mark.whole
def test_a_browser_takes_fifty_thousand_samples(run: Path, tmp_path: Path, browser: Any) -> None:
    out = tmp_path / "there.html"
    made, images = large(run, 50_000)
    report.write_report([made], out, images=images)
    page, wrong = opened(browser, out)
    page.fill("[aria-label='Only names that contain']", "_49999.jpeg")
    rows_are(page, 1)
    assert column(page, "number") == ["49,999"] and wrong == []
    page.close()
