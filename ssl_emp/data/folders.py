"""A folder of images -> a `Source`: which files are images, which of them make a split, what their classes
are.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ssl_emp.data import decode
from ssl_emp.data.decode import Encoded, reason
from ssl_emp.data.sniff import HEAD_BYTES, image_format
from ssl_emp.data.source import NoSplit, Source, Unused, counted, normal, some_of, sorted_classes, version_of
from ssl_emp.data.splits import both_sides, split_called, split_named, splits_of_folders
from ssl_emp.errors import UserError
from ssl_emp.text import decodable

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
# decoded where Pillow can
MODERN = {".avif": "AVIF", ".avifs": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}
NEEDS = {
    "AVIF": "of AVIF, which this Pillow cannot read",
    "HEIF": "of HEIC, which pip install pillow-heif makes readable",
}
TABLES = (".parquet", ".pq", ".parq")
# that lie beside images in masses: not looked into any more after PROBES of a kind that held no image
SIDECARS = (
    ".txt",
    ".json",
    ".jsonl",
    ".xml",
    ".csv",
    ".tsv",
    ".yaml",
    ".yml",
    ".npy",
    ".npz",
    ".pt",
    ".pth",
    ".pkl",
    ".mat",
    ".md",
)
PROBES = 100
# of all images: a folder with so many that holds the splits is looked for past what lies beside it
MOSTLY = 0.9
# what storage devices, systems and archives leave behind; the thumbnails among them are copies of images that
# are there already
SERVICE_FOLDERS = {
    "__macosx",
    "lost+found",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "found.000",
    "__pycache__",
}
SERVICE_FOLDERS |= {"recycled", "~snapshot", "network trash folder", "temporary items"}
# what a run directory holds from its first step on
RUN_FILES = {"config.yaml", "environment.json", "train.log"}
SERVICE_PREFIXES = (
    "@eadir",
    "@syno",
    "@__thumb",
    "@recycle",
    "@recently-snapshot",
    "@tmp",
    "@sharebin",
    "#recycle",
    "#snapshot",
)
SERVICE_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
# containers of images that are not read, and how to come by something that is
CONTAINERS = {
    ".arrow": "write them as parquet: datasets.load_from_disk(FOLDER)['train'].to_parquet('train.parquet')",
    **dict.fromkeys(
        (".tar", ".zip", ".tgz", ".gz", ".7z", ".rar", ".xz", ".bz2"),
        "unpack it, and give the folder of the images",
    ),
    **dict.fromkeys(
        (".h5", ".hdf5", ".npz", ".npy", ".mat", ".pkl", ".tfrecord", ".lmdb", ".mdb", ".beton", ".rec"),
        "write the images as files, or into a .parquet file with the encoded images in a column of bytes",
    ),
    **dict.fromkeys(
        (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".yaml", ".yml"),
        "give the folder of the images themselves; for labels, sort them into a folder for each class, "
        "or write a .parquet file",
    ),
    **dict.fromkeys(
        (".mp4", ".avi", ".mov", ".mkv"), "write their frames as images: ffmpeg -i FILE FOLDER/%06d.png"
    ),
}


# ---- which files there are
# -------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """What lies below a folder. Within each split a file or folder counts once, however many links lead to
    it.
    """

    root: str
    # images: (path from root, what tells a changed file), sorted
    files: list[tuple[str, list[int]]] = field(default_factory=list)
    tables: list[tuple[str, list[int]]] = field(default_factory=list)  # parquet files, as above
    # (name, why it could not be looked at), sorted
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)
    links_between_splits: bool = False  # there may be some: there are links, and folders with words of splits


def list_folder(root: str, *, splits_apart: bool = True) -> Listing:
    """Everything below root; folders may nest to any depth, and links may lead in circles.

    Args:
        splits_apart: a file that links bring into folders of several splits counts in each of them.

    Raises:
        OSError: root itself cannot be read.
    """
    found = Listing(root)
    met = _Met(root)
    probes: Counter[str] = Counter()  # suffix -> files without an image since the last one that is one
    # (path below root, whether a link led there, its split): a stack, for Python's recursion has a limit
    folders = [("", False, "")]
    while folders:
        folder, folder_linked, split = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as unsorted:
                entries = sorted(unsorted, key=lambda entry: entry.name)
        except OSError as exc:
            if not folder:
                raise
            found.skipped.append((decodable(folder), reason(exc)))
            continue
        if folder and RUN_FILES <= {entry.name for entry in entries}:  # the pictures in it are no one's data
            found.unused.add("run folders", folder.rstrip("/"))
            continue
        inner = []
        for entry in entries:
            path = folder + entry.name
            if entry.name.startswith("."):
                found.unused.add("hidden", path)
                continue
            try:
                linked = folder_linked or entry.is_symlink()
                is_folder = entry.is_dir()
                why = _service(entry.name) if is_folder else _no_image(entry, probes)
                if why:
                    found.unused.add(why, path)
                    continue
                info = os.stat(entry.path)
            except OSError as exc:
                found.skipped.append((decodable(path), reason(exc)))
                continue
            own = split
            if is_folder and splits_apart:
                own = split or split_named(entry.name) or ""
            if not is_folder and not stat.S_ISREG(info.st_mode):  # a pipe called x.jpg would block for ever
                found.skipped.append((decodable(path), "not a regular file"))
            elif not met.is_new(path, info, linked, own):
                found.unused.add("second links", path)
            elif is_folder:
                inner.append((path + "/", linked, own))
            else:
                to = found.tables if _suffix(entry.name) in TABLES else found.files
                to.append((path, [info.st_size, info.st_mtime_ns, info.st_ctime_ns]))
        folders += reversed(inner)
    found.files.sort()
    found.tables.sort()
    found.skipped.sort()
    found.links_between_splits = met.has_links and met.has_splits
    return found


class _Met:
    """Which files and folders were met, so that no link makes them count twice.

    Entries of one device and inode number are one and the same if a link led to one of them, or if it is a
    file with several names. Some file systems give one number to all: where that shows, or where it is 0,
    real paths are compared.
    """

    def __init__(self, root: str) -> None:
        self.root, self.real_root = root, os.path.realpath(root)
        self.has_links = self.has_splits = False
        self.linked: dict[object, bool] = {}  # (split, identity) -> whether a link led there
        self.without_numbers: set[int] = set()  # devices
        info = os.stat(root)
        self.root_places = (info.st_dev, info.st_ino), self.real_root
        self.is_new("", info, False, "")

    def _place(self, path: str, info: os.stat_result, linked: bool) -> object:
        if info.st_ino and info.st_dev not in self.without_numbers:
            return info.st_dev, info.st_ino
        return (
            os.path.realpath(os.path.join(self.root, path))
            if linked
            else os.path.join(self.real_root, path).rstrip("/")
        )

    def is_new(self, path: str, info: os.stat_result, linked: bool, split: str) -> bool:
        several_names = not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1
        self.has_links |= linked or several_names
        self.has_splits |= bool(split)
        place = self._place(path, info, linked)
        if self.linked.get((split, place)) is False and not linked and not several_names:
            self.without_numbers.add(info.st_dev)
            place = self._place(path, info, linked)
        before = self.linked.get((split, place))
        self.linked[split, place] = linked or bool(before)
        return before is None and not (linked and place in self.root_places)


def _service(name: str) -> str:
    folded = name.casefold()
    return "service folders" if folded in SERVICE_FOLDERS or folded.startswith(SERVICE_PREFIXES) else ""


def _no_image(entry: os.DirEntry[str], probes: Counter[str]) -> str:
    """Why a file is neither image nor table, in words that follow a number; empty where it is one.

    A file without a known suffix is looked into: browsers, phones and downloaders write .jfif, none at all,
    or `x.jpg?w=640`.
    """
    suffix = _suffix(entry.name)
    if suffix in EXTENSIONS or suffix in TABLES:
        return ""
    kind = (
        f"{suffix} files"
        if re.fullmatch(r"\.\w{1,10}", suffix) and not suffix[1:].isdigit()
        else "files of no known kind"
    )
    if entry.name.casefold() in SERVICE_FILES:
        return "service files"
    form = MODERN.get(suffix)
    if form is None:
        if (suffix in SIDECARS and probes[suffix] >= PROBES) or not entry.is_file():
            return kind
        try:
            with open(entry.path, "rb", buffering=0) as file:
                form = image_format(file.read(HEAD_BYTES))
        except OSError:
            return kind
        probes[suffix] = probes[suffix] + 1 if form is None else 0
        if form is None:
            return kind
    return "" if form in decode.FORMATS else NEEDS.get(form, kind)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# ---- which files make a split
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the splits are.

    Attributes:
        split: of the images of every folder, "" where they belong to none.
        class_folder: of every folder, the one on its path that names the class; None where there is none.
        folders: split -> the folders that it is, as `train/`; empty where there are none, and all images are
        the train split. level: words for the folders that name the classes. rest_is_train: no folder is the
        train split, but one is another: what lies beside it is trained on.
    """

    split: dict[str, str]
    class_folder: dict[str, str | None]
    folders: dict[str, list[str]]
    level: str = "the first folder level"
    rest_is_train: bool = False


def find_layout(counts: Mapping[str, int]) -> Layout:
    """The splits of a folder of images, by the names of the folders at the first level where these differ.

    `train/CLASS/x.png` beside `test/CLASS/y.png`; also if one folder holds both, or both and nearly all other
    images; or `CLASS/train/x.png` beside `CLASS/test/y.png`. See `splits_of_folders`.

    Args:
        counts: images in every folder, by its path from the root; "" is the root.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in counts}
    rows, without = list(counts), None
    inside: list[str] = []  # where `rows` are; `without`: the layout without splits further in
    while True:
        depth = len(inside)
        below: dict[str, list[str]] = {}
        for folder in rows:
            if len(parts[folder]) > depth:
                below.setdefault(parts[folder][depth], []).append(folder)
        sizes = {name: sum(counts[folder] for folder in folders) for name, folders in below.items()}
        loose = sum(counts[folder] for folder in rows) - sum(sizes.values())
        found = splits_of_folders(below, more=loose >= sum(sizes.values())) if below else None
        if found and without is None:
            return _by_level(parts, inside, found)
        if found and both_sides(found.values()):
            # the same names in a folder that is left aside: classes with splits of their own, and one that
            # lacks a part
            alike = any(
                part[depth] in found
                for part in parts.values()
                if len(part) > depth and part[:depth] != inside
            )
            return without if alike and without else _by_level(parts, inside, found)
        if without is None and (len(below) != 1 or loose >= sum(sizes.values())):
            called = None if loose else _in_every_folder(parts, depth, below)
            if called:
                split = {
                    folder: called.get(part[depth + 1], "") if len(part) > depth + 1 else ""
                    for folder, part in parts.items()
                }
                folders = {
                    kind: [f"*/{name}/" for name in called if called[name] == kind]
                    for kind in called.values()
                }
                return Layout(
                    split,
                    {folder: part[depth] if len(part) > depth else None for folder, part in parts.items()},
                    folders,
                )
            without = Layout(
                dict.fromkeys(parts, "train"),
                {folder: part[0] if part else None for folder, part in parts.items()},
                {},
            )
        largest = max(sizes, key=sizes.__getitem__, default="")
        if without and MOSTLY * sum(counts.values()) >= sizes.get(largest, 0):
            return without
        rows, inside = below[largest], [*inside, largest]


def _by_level(parts: dict[str, list[str]], inside: list[str], found: dict[str, str]) -> Layout:
    """The folders in the folder `inside` are the splits, as `found` has it."""
    depth, rest_is_train = len(inside), "train" not in found.values()
    rest = {
        tuple(part[depth : depth + 2])
        for part in parts.values()
        if not (len(part) > depth and part[depth] in found)
    }
    # one folder of folders beside the test split is as good as a folder called train, whatever its name
    one = rest_is_train and len({part[:1] for part in rest}) == 1 and all(len(part) == 2 for part in rest)
    split, class_folder = {}, {}
    folders: dict[str, list[str]] = {}
    for folder, part in parts.items():
        kind = found.get(part[depth], "") if len(part) > depth and part[:depth] == inside else ""
        class_depth = depth + 1 if kind or one else depth
        split[folder] = kind or ("train" if rest_is_train else "")
        class_folder[folder] = part[class_depth] if len(part) > class_depth else None
        if kind and (name := "/".join(part[: depth + 1]) + "/") not in folders.setdefault(kind, []):
            folders[kind].append(name)
    if rest_is_train:
        level = f"the folders in {'/'.join([*inside, next(iter(rest))[0]])}/" if one else Layout.level
        return Layout(split, class_folder, folders, level, rest_is_train=True)
    return Layout(split, class_folder, folders, f"the folders in {' and '.join(folders['train'])}")


def _in_every_folder(
    parts: dict[str, list[str]], depth: int, below: dict[str, list[str]]
) -> dict[str, str] | None:
    """Folder name -> split, where each of the folders at `depth` holds a train folder, and one of them a test
    or val folder.
    """
    called: dict[str, str] = {}
    for folders in below.values():
        names = {parts[folder][depth + 1] for folder in folders if len(parts[folder]) > depth + 1}
        own = {name: kind for name in sorted(names) if (kind := split_called(name))}
        if "train" not in own.values():
            return None
        called |= own
    return called if set(called.values()) > {"train"} else None


# ---- a split as a source
# ---------------------------------------------------------------------------------------------


def folder_source(listing: Listing, split: str, labels: str) -> Source:
    """The images of a split, `train` or `test`. A test split without labels gives way to a val split that has
    some.

    Raises:
        NoSplit, or UserError where there are no images at all.
    """
    if not listing.files:
        raise no_images(listing)
    folders, layout = _laid_out(listing)
    # what was kept apart is one split
    if listing.links_between_splits and len(set(layout.split.values())) == 1:
        listing = list_folder(listing.root, splits_apart=False)
        folders, layout = _laid_out(listing)
    present = set(layout.split.values())
    kinds = [kind for kind in (("train",) if split == "train" else ("test", "val")) if kind in present]
    if not kinds:
        raise _no_split(listing.root, split, layout)
    notes, stand_in = [], ""
    chosen = train = _label(folders, layout, "train", labels, None)
    if split == "train" and layout.rest_is_train:
        held = some_of([folder for its_folders in layout.folders.values() for folder in its_folders])
        notes.append(f"held back as a test split, and not trained on: {held}")
    if split == "test":
        chosen = _label(folders, layout, kinds[0], labels, train.class_names)
        if chosen.labels is None and labels != "none" and len(kinds) > 1:
            val = _label(folders, layout, "val", labels, train.class_names)
            if val.labels is not None:
                chosen, stand_in = val, layout.folders["val"][0]
                notes.append(f"{layout.folders['test'][0]} has no labels, so {stand_in} is the test split")

    outside = [row for row, folder in enumerate(folders) if not layout.split[folder]]
    for why, rows in (("outside of the splits", outside), ("beside the class folders", chosen.loose)):
        if rows:
            listing.unused.add(why, listing.files[rows[0]][0], len(rows))
    if listing.tables:
        listing.unused.add("tables", listing.tables[0][0], len(listing.tables))
    files = [listing.files[row] for row in chosen.rows]

    def read(positions: np.ndarray) -> Iterator[Encoded]:
        return (os.path.join(listing.root, files[position][0]) for position in positions)

    return Source(
        [decodable(path) for path, _ in files],
        chosen.labels,
        chosen.class_names,
        version_of(files),
        read,
        listing.skipped,
        chosen.labels_from,
        listing.unused.listed(),
        notes,
        stand_in,
    )


def _laid_out(listing: Listing) -> tuple[list[str], Layout]:
    """The folder of every image, one text for all images of a folder, and where the splits are."""
    counts: dict[str, int] = {}
    same: dict[str, str] = {}
    folders = []
    for path, _ in listing.files:
        folder = path.rpartition("/")[0]
        folder = same.setdefault(folder, folder)
        counts[folder] = counts.get(folder, 0) + 1
        folders.append(folder)
    return folders, find_layout(counts)


@dataclass(frozen=True)
class _Labelled:
    """A split: the files that are used (rows of the listing), their labels, and the files that lie beside the
    class folders.
    """

    rows: list[int]
    labels: np.ndarray | None
    class_names: list[str] | None
    labels_from: str
    loose: list[int] = field(default_factory=list)


def _label(folders: list[str], layout: Layout, kind: str, labels: str, known: list[str] | None) -> _Labelled:
    """Labels by folder; those of another split than train are numbered as in train (`known`), its further
    classes behind.

    A few images beside the class folders have no class and are left out; where they are no fewer than a class
    has on average, the folders are taken for no classes, and every image is used.
    """
    rows = [row for row, folder in enumerate(folders) if layout.split[folder] == kind]
    if labels == "none":
        return _Labelled(rows, None, None, "labels are off")
    used = {folder: layout.class_folder[folder] for folder in layout.split if layout.split[folder] == kind}
    names = {folder: normal(decodable(name)) for folder, name in used.items() if name is not None}
    found = sorted_classes(names.values())
    loose = [row for row in rows if folders[row] not in names]
    if not found:
        return _Labelled(rows, None, None, "the images lie in no class folders")
    if len(found) < 2 and found[0] not in (known or ()):
        return _Labelled(rows, None, None, f"all images lie in one folder, {found[0]}/")
    if len(loose) * len(found) >= len(rows) - len(loose):
        return _Labelled(rows, None, None, f"{len(loose):,} of {len(rows):,} images lie beside the folders")
    others = set(known or ())
    class_names = [*(known or ()), *(name for name in found if name not in others)]
    number = {name: label for label, name in enumerate(class_names)}
    kept = [row for row in rows if folders[row] in names] if loose else rows
    numbers = np.fromiter((number[names[folders[row]]] for row in kept), np.int64, len(kept))
    return _Labelled(kept, numbers, class_names, layout.level, loose)


def no_images(listing: Listing) -> UserError:
    """The error for a folder without any, which says what it holds instead."""
    unused = listing.unused.listed()
    there = [f"{counted(count, why)}, such as {first}" for why, count, first in unused[:3]]
    there += [f"{name}: {why}" for name, why in listing.skipped[:1]]
    fix = next(
        (CONTAINERS[suffix] for why, _, _ in unused if (suffix := why.removesuffix(" files")) in CONTAINERS),
        None,
    )
    if fix is None and any(why == NEEDS["HEIF"] for why, _, _ in unused):
        fix = "pip install pillow-heif, or write them as JPEG"
    found = f" ({'; '.join(there)})" if there else ""
    what = f"no images in {listing.root}{found}"
    return UserError(
        what, fix or f"put files such as {', '.join(EXTENSIONS[:4])} into it, or name another folder"
    )


def _no_split(root: str, split: str, layout: Layout) -> NoSplit:
    if split == "train":
        there = [folder for folders in layout.folders.values() for folder in folders]
        own = os.path.join(root, there[0].rstrip("/"))
        return NoSplit(
            f"{root} has no train split, only {some_of(there)}",
            f"a test split is not trained on; to do so anyway, name it: {own}",
        )
    fix = (
        f"sort the images into {root}/train and {root}/test, "
        "or give the folder of the test images as a source of its own"
    )
    return NoSplit(f"{root} has no {split} split", fix)
