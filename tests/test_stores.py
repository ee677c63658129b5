"""The three stores give the same images; files of JPEGs are resumed, found again, and never half-done;
batches from all of them.
"""

import fcntl
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from ssl_emp.data import decode, stores
from ssl_emp.data import images as module
from ssl_emp.data.holdout import choose
from ssl_emp.data.images import (
    DeviceImages,
    EncodedPixels,
    HostImages,
    ImageSet,
    fingerprint,
    load_images,
    place_images,
)
from ssl_emp.errors import UserError

SIZE = 24


def photo(seed: int, size: int = SIZE) -> Image.Image:
    """Smooth colours and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return Image.fromarray(
        (np.asarray(coarse) + rng.normal(0, 8, (size, size, 3))).clip(0, 255).astype(np.uint8)
    )


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


VERBATIM: list[dict[str, Any]] = [
    {"quality": 75},  # 4:2:0
    {"quality": 95, "subsampling": 0},
    {"quality": 85, "subsampling": 1, "progressive": True},
    {"quality": 30, "optimize": True, "comment": b"a comment"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEGs that are stored as they are (a_*), 5 images that are not (b_*), 2 that are left out (c_*, and
    a_07).
    """
    root = tmp_path_factory.mktemp("photos")
    for i in range(40):
        (root / f"a_{i:02}.jpg").write_bytes(jpeg(photo(i), **VERBATIM[i % len(VERBATIM)]))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    (root / "b_rotated.jpg").write_bytes(jpeg(photo(50), exif=rotated))
    (root / "b_grey.jpg").write_bytes(jpeg(photo(51).convert("L")))
    (root / "b_cmyk.jpg").write_bytes(jpeg(photo(52).convert("CMYK")))
    (root / "b_large.jpg").write_bytes(jpeg(photo(53, 3 * SIZE)))
    photo(54).save(root / "b_png.png")
    (root / "a_07.jpg").write_bytes(b"")
    (root / "c_half.jpg").write_bytes(jpeg(photo(60))[:300])
    return root


def load(folder: Path, cache: Path, store: str = "encoded", **options: Any) -> ImageSet:
    return load_images(str(folder), image_size=SIZE, store=store, cache_dir=str(cache), **options)


def finished(cache: Path) -> Path:
    """The one file that a finished build leaves."""
    (path,) = cache.iterdir()
    assert path.suffix == ".jpegs"
    return path


def records(path: Path, count: int) -> list[bytes]:
    """Every record of a file, by its description in `encoded_pixels`."""
    content = path.read_bytes()
    ends = np.frombuffer(content[-32 - 8 * count : -32], "<i8")
    return [content[abs(begin) : abs(end)] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


# --- the encoded store


def test_encoded_pixels_are_what_pillow_decodes_from_the_stored_bytes(folder: Path, tmp_path: Path) -> None:
    images = load(folder, tmp_path)
    pixels = images.pixels
    stored = [record for record in records(finished(tmp_path), 46) if record.startswith(b"\xff\xd8")]
    expected = torch.from_numpy(np.stack([pillow(record) for record in stored]))
    assert isinstance(pixels, EncodedPixels) and images.store == "encoded"
    assert pixels.shape == expected.shape == (44, 3, SIZE, SIZE) and len(pixels) == len(images.names) == 44
    assert pixels.nbytes == finished(tmp_path).stat().st_size and pixels.dtype == torch.uint8
    some = torch.tensor([43, 0, 7, 7, -2])
    for index in (
        slice(None),
        slice(5, 30, 3),
        slice(40, 99),
        slice(0, 0),
        0,
        43,
        -1,
        some,
        some.view(5, 1),
        torch.tensor(3),
    ):
        assert torch.equal(pixels[index], expected[index])
    assert all(torch.equal(image, other) for image, other in zip(pixels, expected, strict=True))  # type: ignore[call-overload]  # by __getitem__
    for beyond in (44, torch.tensor([0, 44])):
        with pytest.raises(IndexError):
            pixels[beyond]


def test_records_are_verbatim_or_jpegs_of_the_memory_stores_pixels(folder: Path, tmp_path: Path) -> None:
    encoded, memory = load(folder, tmp_path, jpeg_quality=80), load(folder, tmp_path, "memory")
    assert encoded.names == memory.names and encoded.skipped == memory.skipped and len(memory.skipped) == 2
    stored = dict(
        zip(sorted(path.name for path in folder.iterdir()), records(finished(tmp_path), 46), strict=True)
    )
    for name, image in zip(memory.names, memory.pixels[:], strict=True):
        if name.startswith("a_"):
            assert stored[name] == (folder / name).read_bytes()
        else:
            expected = Image.fromarray(image.permute(1, 2, 0).numpy())
            assert stored[name] == jpeg(expected, quality=80, subsampling=0)
            assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(stored[name]))) == 0  # 4:4:4
    verbatim = [row for row, name in enumerate(memory.names) if name.startswith("a_")]
    assert (
        torch.equal(encoded.pixels[torch.tensor(verbatim)], memory.pixels[torch.tensor(verbatim)])
        and len(verbatim) == 39
    )
    assert (encoded.pixels[:].float() - memory.pixels[:].float()).abs().mean() < 4


def test_quality_is_part_of_the_key_and_of_the_size(folder: Path, tmp_path: Path) -> None:
    sizes = [load(folder, tmp_path, jpeg_quality=quality).pixels.nbytes for quality in (20, 90)]
    assert sizes[0] < sizes[1] and len(list(tmp_path.iterdir())) == 2


def test_a_jpeg_that_decoders_see_differently_is_encoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(photo(0))
    assert decode.to_jpeg(content, SIZE, 10**6, 90) == content
    monkeypatch.setattr(decode, "decode_jpeg", lambda record: np.zeros((3, SIZE, SIZE), np.uint8))
    assert decode.to_jpeg(content, SIZE, 10**6, 90) == jpeg(
        Image.open(io.BytesIO(content)), quality=90, subsampling=0
    )


@pytest.mark.parametrize("options", [*VERBATIM, {"quality": 90, "subsampling": 0}])
@pytest.mark.parametrize("size", [1, 17, 64])
def test_both_decoders_agree(options: dict[str, Any], size: int) -> None:
    for mode in ("RGB", "L"):
        content = jpeg(photo(1, size).convert(mode), **options)
        record = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        assert np.array_equal(decode.decode_jpeg(record), decode._decode_with_pillow(record))
        assert np.array_equal(decode._decode_with_pillow(record), pillow(content))


def test_finished_file_is_found_again_with_its_reasons(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folder, tmp_path)
    monkeypatch.setattr(stores, "to_jpeg", None)
    calls: list[tuple[int, int]] = []
    again = load(folder, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert (
        again.skipped
        == first.skipped
        == [("a_07.jpg", "empty file"), ("c_half.jpg", dict(first.skipped)["c_half.jpg"])]
    )
    assert again.names == first.names and fingerprint(again) == fingerprint(first) and calls == [(46, 46)]
    assert "Truncated" in dict(again.skipped)["c_half.jpg"]


# --- resuming


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an uninterrupted build."""
    cache = tmp_path_factory.mktemp("whole")
    load(folder, cache)
    return finished(cache)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A list that grows by every image encoded; runs of four images, so a build can stop in many places."""
    calls: list[str] = []
    original = stores.to_jpeg

    def counting(encoded: Any, *args: Any) -> bytes:
        calls.append(encoded)
        return original(encoded, *args)

    monkeypatch.setattr(stores, "to_jpeg", counting)
    monkeypatch.setattr(decode, "RUN", 4)
    yield calls


@pytest.mark.parametrize("stop_at", [4, 20, 46])
def test_interrupted_build_goes_on_where_it_was(
    folder: Path, tmp_path: Path, whole: Path, encodings: list[str], stop_at: int
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path, progress=interrupt)
    assert sorted(path.suffixes[0] for path in tmp_path.iterdir()) == [".ends", ".jpegs"]
    assert not any(path.suffix == ".jpegs" for path in tmp_path.iterdir())
    encodings.clear()
    calls: list[int] = []
    images = load(folder, tmp_path, progress=lambda done, total: calls.append(done))
    assert len(encodings) == 46 - stop_at and calls == list(range(stop_at + 4, 46, 4)) + [46] * (stop_at < 46)
    assert finished(tmp_path).read_bytes() == whole.read_bytes() and len(images.skipped) == 2


@pytest.mark.parametrize(
    ("data_bytes", "log_bytes"),
    [
        (None, None),
        (-1, None),
        (-1500, None),
        (0, None),
        (None, -3),
        (None, -8),
        (None, 0),
        (-700, -21),
        (100, None),
        (None, 5),
        (None, 8),
        (None, 16),
    ],
)
def test_torn_files_of_a_killed_build_are_cut_to_the_last_whole_record(
    folder: Path,
    tmp_path: Path,
    whole: Path,
    encodings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    data_bytes: int | None,
    log_bytes: int | None,
) -> None:
    """What lies on the disk in the middle of a build is what SIGKILL leaves; a power cut leaves less or more
    of either file.
    """
    killed = tmp_path / "killed"
    monkeypatch.setattr(stores, "SAVE_BYTES", 0)

    def snapshot(done: int, total: int) -> None:
        if done == 24:
            shutil.copytree(tmp_path / "first", killed)

    load(folder, tmp_path / "first", progress=snapshot)
    sizes = []
    for pattern, change in (("*.jpegs.part", data_bytes), ("*.ends.part", log_bytes)):
        (path,) = killed.glob(pattern)
        content = path.read_bytes()
        tail = (b"\x7f" if change == 8 else b"\0") * (change or 0)  # some file systems leave zeros
        path.write_bytes(
            content if change is None else content + tail if change > 0 else content[: change or 0]
        )
        sizes.append(path.stat().st_size)
    ends = np.cumsum([len(record) for record in records(whole, 46)[:24]])
    kept = sum(end <= sizes[0] and 8 * (row + 1) <= sizes[1] for row, end in enumerate(ends))
    encodings.clear()
    load(folder, killed)
    assert finished(killed).read_bytes() == whole.read_bytes() and len(encodings) == 46 - kept


def test_full_disk_is_one_line_and_a_second_start_goes_on(
    folder: Path, tmp_path: Path, whole: Path, encodings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(stores, "SAVE_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device. fix: make room there") as caught:
            load(folder, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.jpegs"))
    encodings.clear()
    load(folder, tmp_path)
    assert len(encodings) == 46 - 3 * 4 and finished(tmp_path).read_bytes() == whole.read_bytes()


def test_really_full_disk_leaves_nothing_that_looks_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(UserError, match="File too large. fix: make room"):
            load(folder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*.jpegs")) and load(folder, tmp_path).skipped and finished(tmp_path)


def test_a_file_is_at_its_path_until_that_names_another_or_none(tmp_path: Path) -> None:
    path = tmp_path / "key.jpegs.part"
    with open(path, "a+b") as file:
        assert stores._is_at(file, path)
        path.rename(tmp_path / "key.jpegs")
        assert not stores._is_at(file, path)
        path.write_bytes(b"another")
        assert not stores._is_at(file, path)


def test_two_builders_share_one_build(
    folder: Path, tmp_path: Path, whole: Path, encodings: list[str]
) -> None:
    found = [str(path) for path in sorted(folder.iterdir())]

    def build() -> None:
        request = stores.StoreRequest(
            tmp_path, "key", SIZE, lambda rows: (found[row] for row in rows), np.arange(46), 10**6
        )
        results.append(stores.encoded_pixels(request, 90))

    results: list[Any] = []
    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(results) == 3 and len(encodings) == 46 and finished(tmp_path).read_bytes() == whole.read_bytes()
    )
    assert all(
        torch.equal(pixels[:], results[0][0][:]) and failed == results[0][1] for pixels, failed in results
    )


# --- damage


@pytest.mark.parametrize(
    "where",
    [
        -1,
        -33,
        -40,
        -32 - 8 * 46,
        -32 - 8 * 20 + 3,
        "cut",
        "cut in front",
        "cut to nothing",
        "longer",
        "zeros",
    ],
)
def test_damaged_table_of_contents_says_delete_it(
    folder: Path, tmp_path: Path, whole: Path, where: int | str
) -> None:
    content = whole.read_bytes()
    changes = {
        "cut": content[:-100],
        "cut in front": content[100:],
        "cut to nothing": b"",
        "longer": content + b"x",
        "zeros": bytes(len(content)),
    }
    damaged = tmp_path / whole.name
    damaged.write_bytes(content if isinstance(where, int) else changes[where])
    if isinstance(where, int):
        with open(damaged, "r+b") as file:
            file.seek(where, os.SEEK_END)
            file.write(bytes([content[where] ^ 1]))
    with pytest.raises(
        UserError, match=rf"{re.escape(str(damaged))} is damaged \(.*\)\. fix: delete it"
    ) as caught:
        load(folder, tmp_path)
    assert "\n" not in str(caught.value)
    damaged.unlink()
    assert torch.equal(load(folder, tmp_path).pixels[:], load(folder, whole.parent).pixels[:])


def test_shortened_raw_file_says_delete_it(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path, "raw")
    (path,) = tmp_path.glob("*.u8")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged .*fix: delete it"):
        load(folder, tmp_path, "raw")


@pytest.mark.parametrize("replacement", [bytes(100), jpeg(photo(0, 8))])
def test_damaged_record_reaches_the_consumer_as_one_line(
    folder: Path, tmp_path: Path, whole: Path, replacement: bytes
) -> None:
    content = bytearray(whole.read_bytes())
    begin = sum(len(record) for record in records(whole, 46)[:5])
    content[begin : begin + len(replacement)] = replacement
    (tmp_path / whole.name).write_bytes(content)
    pixels = load(folder, tmp_path).pixels
    assert pixels[:5].shape == (5, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="is damaged .*fix: delete it"):
        pixels[5]
    stream = HostImages(pixels, "cpu").stream(torch.arange(8).view(4, 2))
    assert [next(stream)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="is damaged .*fix: delete it"):
        next(stream)
    assert gather_threads() == []


# --- which store


@pytest.mark.parametrize(
    ("share", "options", "expected"),
    [
        (2.0, {}, "memory"),
        (1.9, {}, "raw"),
        (1.1, {}, "raw"),
        (1.0, {}, "encoded"),
        (0.1, {}, "encoded"),
        (0.1, {"store": "memory"}, "memory"),
        (9.0, {"store": "raw"}, "raw"),
        (9.0, {"store": "encoded"}, "encoded"),
        (9.0, {"memory_limit": 0}, "raw"),
        (0.1, {"memory_limit": 2**40}, "memory"),
    ],
)
def test_store_is_chosen_by_the_available_memory(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    options: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: int(share * 46 * 3 * SIZE * SIZE))
    images = load(folder, tmp_path, **{"store": "auto"} | options)
    suffixes = {"memory": [], "raw": [".json", ".u8"], "encoded": [".jpegs"]}[expected]
    assert images.store == expected and sorted(path.suffix for path in tmp_path.iterdir()) == suffixes
    where = {"memory": "in memory", "raw": "raw in a file", "encoded": "as JPEG in a file"}[expected]
    size = finished(tmp_path).stat().st_size if expected == "encoded" else 44 * 3 * SIZE * SIZE
    assert images.stored == f"{where} ({size / 2**20:.1f} MiB)"


def test_auto_stays_with_the_file_that_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed run could meet other pixels because another program took memory."""
    needed = 46 * 3 * SIZE * SIZE
    for first, share in (("raw", 0.1), ("encoded", 1.5)):
        load(folder, tmp_path / first, first)
        monkeypatch.setattr(module, "available_memory", lambda share=share: int(share * needed))
        assert load(folder, tmp_path / first, "auto").store == first


def test_stale_part_of_a_dead_build_is_removed_and_that_of_a_live_one_is_not(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("dead.u8.part", "live.u8.part", "dead.jpegs.part", "dead.ends.part"):
        (tmp_path / name).write_bytes(b"x")
    with open(tmp_path / "live.u8.part", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        load(folder, tmp_path, "raw")
    left = sorted(path.name for path in tmp_path.glob("*.part"))
    assert left == ["dead.ends.part", "dead.jpegs.part", "live.u8.part"]  # JPEGs can be gone on with


@pytest.mark.parametrize(("option", "value"), [("store", "disk"), ("jpeg_quality", 0), ("jpeg_quality", 101)])
def test_store_options_are_checked(folder: Path, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{option} is '?{value}'?. fix: set {option} to"):
        load_images(str(folder), **{option: value})


# --- whole runs


def test_runs_on_the_three_stores_are_the_same_bit_for_bit(
    pretrain_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from ssl_emp.commands import evaluate

    for split, count in (("train", 68), ("test", 20)):
        for i in range(count):
            path = tmp_path / f"data/{split}/{'ab'[i % 2]}/{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(photo(1000 * (split == "test") + i, 16), **VERBATIM[i % len(VERBATIM)]))
    results = []
    for store, where in (("memory", "in memory"), ("raw", "raw in a file"), ("encoded", "as JPEG in a file")):
        data = (
            f"data.source={tmp_path / 'data'}",
            f"data.store={store}",
            f"data.cache_dir={tmp_path / 'cache' / store}",
        )
        run = pretrain_run(store, *data, "prune.scoring=pruned", "epochs=3")
        assert re.search(rf"images +68 of 16x16 from .*, {where} \(.* MiB\), ", capsys.readouterr().out)
        weights = load_file(next((run / "encoder").glob("*.safetensors")))
        assert evaluate.main([str(run), "pixels", "knn", "device=cpu"]) == 0
        rows = json.loads((run / "eval" / "knn.json").read_text())
        results.append((weights, (run / "pruning" / "samples.parquet").read_bytes(), rows))
    for weights, samples, rows in results:
        assert weights.keys() == results[0][0].keys() and all(
            torch.equal(weights[name], results[0][0][name]) for name in weights
        )
        assert samples == results[0][1]
        assert [row["value"] for row in rows] == [row["value"] for row in results[0][2]] and len(rows) == 2
    # train and test
    assert sorted(path.suffix for path in (tmp_path / "cache/encoded").iterdir()) == [".jpegs", ".jpegs"]


# --- digests


def changed_store(folder: Path, place: Path, store: str, name: str, seed: int) -> str:
    """The fingerprint of the folder where the image `name` is another photo."""
    copy = place / "copy"
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(jpeg(photo(seed), quality=90))
    return fingerprint(load(copy, place / "cache", store))


@pytest.mark.parametrize("store", ["memory", "raw", "encoded"])
def test_every_image_is_part_of_the_fingerprint_and_where_it_lies_is_not(
    store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "HASH_CHUNK_BYTES", 5000)  # parts of two images
    whole = load(folder, tmp_path / "cache", store)
    shutil.copytree(folder, tmp_path / "moved")
    moved = load(tmp_path / "moved", tmp_path / "cache", store)
    assert fingerprint(moved) == fingerprint(whole)
    for number, name in enumerate(("a_00.jpg", "a_01.jpg", "a_20.jpg", "a_39.jpg", "b_grey.jpg")):
        assert changed_store(folder, tmp_path / str(number), store, name, 900) != fingerprint(whole), name


def test_a_fingerprint_holds_names_order_labels_and_class_names() -> None:
    pixels = torch.randint(
        0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels, names, classes = torch.tensor([0, 1, 2, 0, 1, 2]), [f"{i}.png" for i in range(6)], ["a", "b", "c"]
    whole = ImageSet(pixels, labels, names, classes, [])
    swapped = pixels[[1, 0, 2, 3, 4, 5]]
    others = [
        ImageSet(pixels, labels.flip(0), names, classes, []),
        ImageSet(pixels, None, names, None, []),
        ImageSet(pixels, labels, names, ["a", "c", "b"], []),
        ImageSet(pixels, labels, names, None, []),
        ImageSet(pixels, labels.unsqueeze(1), names, classes, []),
        ImageSet(pixels, labels, [*names[1:], names[0]], classes, []),
        ImageSet(swapped, labels, names, classes, []),
        ImageSet(pixels.view(6, 3, 2, 8), labels, names, classes, []),
    ]
    assert len({fingerprint(images) for images in [whole, *others]}) == len(others) + 1
    assert fingerprint(
        ImageSet(pixels.clone(), labels.clone(), list(names), list(classes), [("x", "empty")])
    ) == fingerprint(whole)


@pytest.mark.parametrize("store", ["raw", "encoded"])
def test_a_large_file_is_hashed_once(
    store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(folder, tmp_path, store)
    wanted = fingerprint(plain)
    monkeypatch.setattr(stores, "NOTED_BYTES", 0)
    assert fingerprint(load(folder, tmp_path, store)) == wanted
    (path,) = (found for found in tmp_path.iterdir() if found.suffix in (".u8", ".jpegs"))
    note = path.with_suffix(".json")
    kept = json.loads(note.read_text())
    (which,) = kept["digests"]["blake2b"]
    kept["digests"]["blake2b"][which] = "from the note"
    note.write_text(json.dumps(kept))
    again = load(folder, tmp_path, store)
    assert again.content["pixels"] == "from the note" and again.skipped == plain.skipped
    for damage in (
        "[]",
        "{",
        '{"digests": 3}',
        f'{{"digests": {{"of": [0, 0], "blake2b": {{"{which}": "00"}}}}}}',
        f'{{"digests": {{"blake2b": {{"{which}": "00"}}}}}}',
        '{"digests": {"blake2b": "00"}}',
    ):
        note.write_text(damage)
        assert fingerprint(replace(again)) == wanted, damage


def test_parts_of_a_large_file_have_digests_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held-out part is mapped from the same file as the rest; features are cached under the digest."""
    images = load(folder, tmp_path, "encoded")
    rows = torch.arange(len(images.names))
    parts = [choose(images, rows[0::2]), choose(images, rows[1::2]), choose(images, rows[0::2])]
    plain = [part.content["pixels"] for part in parts]
    assert plain[0] == plain[2] != plain[1]
    monkeypatch.setattr(stores, "NOTED_BYTES", 0)
    for _ in range(2):  # hashed, then read from the note
        assert [replace(part).content["pixels"] for part in parts] == plain


def test_a_file_changed_in_place_is_hashed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "NOTED_BYTES", 0)
    plain = fingerprint(load(folder, tmp_path, "raw"))
    (path,) = tmp_path.glob("*.u8")
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert fingerprint(load(folder, tmp_path, "raw")) != plain


@pytest.mark.parametrize("store", ["raw", "encoded"])
def test_a_cache_that_is_only_readable_is_read(
    store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped for reading alone: root may write into files that are read-only, so the kernel's list of
    mappings is looked at.
    """
    monkeypatch.setattr(stores, "NOTED_BYTES", 0)
    plain = load(folder, tmp_path, store)
    wanted = fingerprint(plain)
    for path in (*tmp_path.iterdir(), tmp_path):
        path.chmod(0o555 if path.is_dir() else 0o444)
    again = load(folder, tmp_path, store)
    assert fingerprint(again) == wanted and torch.equal(again.pixels[:], plain.pixels[:])
    maps = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    assert maps and all(fields[1] == "r--s" for fields in maps)
    tmp_path.chmod(0o755)


# --- serving

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gather_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ssl_emp-gather"]


@pytest.mark.parametrize("device", DEVICES)
def test_both_stores_give_the_same_batches(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 5, 5), dtype=torch.uint8, generator=generator)
    batches = torch.randint(0, 60, (9, 7), generator=generator).to(device)
    stores = DeviceImages(pixels, device), HostImages(pixels, device)
    for index_expected, (index_a, a), (index_b, b) in zip(
        batches.cpu(), *(store.stream(batches) for store in stores), strict=True
    ):
        expected = torch.stack([pixels[i] for i in index_expected.tolist()])
        for index, images in ((index_a, a), (index_b, b)):
            assert index.device.type == images.device.type == device and images.dtype == torch.uint8
            assert torch.equal(index.cpu(), index_expected) and torch.equal(images.cpu(), expected)
    assert [len(store) for store in stores] == [60, 60] and [store.pixels.shape[-1] for store in stores] == [
        5,
        5,
    ]
    assert gather_threads() == []


@pytest.mark.gpu
def test_device_stream_never_waits_for_the_gpu() -> None:
    store = DeviceImages(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), "cuda")
    batches = torch.arange(8, device="cuda").reshape(2, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(store.stream(batches))) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_a_host_stream_early_ends_its_thread(taken: int) -> None:
    stream = HostImages(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), "cpu").stream(
        torch.zeros(50, 2, dtype=torch.int64)
    )
    for _ in range(taken):
        next(stream)
    assert len(gather_threads()) == (1 if taken else 0)
    stream.close()  # type: ignore[attr-defined]  # declared as Iterator, is a generator
    assert gather_threads() == []


def test_host_stream_raises_the_threads_error_after_the_good_batches() -> None:
    batches = torch.tensor([[0, 1], [2, 3], [4, 99]])
    stream = HostImages(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), "cpu").stream(batches)
    next(stream)
    next(stream)
    with pytest.raises((IndexError, RuntimeError)):
        next(stream)
    assert gather_threads() == []


def test_host_stream_reads_ahead_a_bounded_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    original = torch.index_select

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        gathered.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "index_select", counting)
    stream = HostImages(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), "cpu").stream(
        torch.zeros(50, 2, dtype=torch.int64)
    )
    next(stream)
    for _ in range(20):
        threading.Event().wait(0.005)  # time for a thread without a bound to run away
    assert len(gathered) == 1 + stores.PREFETCH_BATCHES  # handed over, and held ahead
    stream.close()  # type: ignore[attr-defined]  # declared as Iterator, is a generator


def test_placement_goes_by_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    for free, kind in ((2 * pixels.nbytes, DeviceImages), (2 * pixels.nbytes - 2, HostImages)):
        monkeypatch.setattr(stores, "available_memory", lambda free=free: free)
        assert type(place_images(pixels, "cpu")) is kind


def test_available_memory_is_positive_and_below_the_physical() -> None:
    assert 0 < stores.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_encoded_images_stream_in_any_order_every_epoch_and_are_decoded_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = load(folder, tmp_path).pixels
    expected, decoded = pixels[:], []
    original = stores.decode_jpeg
    monkeypatch.setattr(stores, "decode_jpeg", lambda record: decoded.append(1) or original(record))  # type: ignore[func-returns-value]  # None or x
    store = place_images(pixels, "cpu")
    assert isinstance(store, HostImages)
    for epoch in range(3):
        batches = torch.randperm(44, generator=torch.Generator().manual_seed(epoch))[:40].view(5, 8)
        for (index, images), index_expected in zip(store.stream(batches), batches, strict=True):
            assert torch.equal(index, index_expected) and torch.equal(images, expected[index_expected])
    assert len(decoded) == 3 * 40


@pytest.mark.parametrize("prefetch_batches", [1, 2, 5])
def test_encoded_stream_holds_a_bounded_number_of_batches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch_batches: int
) -> None:
    gathered = []
    original = EncodedPixels.gather

    def counting(self: EncodedPixels, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        gathered.append(1)
        return original(self, index, out)

    monkeypatch.setattr(EncodedPixels, "gather", counting)
    stream = HostImages(load(folder, tmp_path).pixels, "cpu", prefetch_batches).stream(
        torch.zeros(50, 2, dtype=torch.int64)
    )
    for taken in (1, 2, 3):
        next(stream)
        for _ in range(20):
            threading.Event().wait(0.005)  # time for a thread without a bound to run away
        assert len(gathered) == taken + prefetch_batches
    stream.close()  # type: ignore[attr-defined]  # declared as Iterator, is a generator
    assert gather_threads() == []


@pytest.mark.gpu
def test_encoded_images_are_decoded_onto_a_gpu_that_has_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = load(folder, tmp_path).pixels
    batches = torch.arange(44).view(11, 4)
    resident, streamed = place_images(pixels, "cuda"), HostImages(pixels, "cuda")
    assert isinstance(resident, DeviceImages) and torch.equal(resident.pixels.cpu(), pixels[:])
    for (_, a), (_, b) in zip(resident.stream(batches.cuda()), streamed.stream(batches.cuda()), strict=True):
        assert torch.equal(a, b) and b.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 44 * 3 * SIZE * SIZE - 2, 0))
    assert isinstance(place_images(pixels, "cuda"), HostImages)
