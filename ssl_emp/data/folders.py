"""A folder of images -> a `Source`: which files are images, which make a split, and their classes."""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ssl_emp.data import decode
from ssl_emp.data.decode import Encoded, reason
from ssl_emp.data.sniff import HEAD_BYTES, image_format
from ssl_emp.data.source import NoSplit, Source, Unused, counted, normal, some_of, sorted_classes, version_of
from ssl_emp.data.splits import both_sides, split_called, split_named, splits_of_folders
from ssl_emp.errors import UserError
from ssl_emp.text import decodable

EXTENSIONS = tuple(".jpg .jpeg .jpe .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm".split())
# read where Pillow can
MODERN = {".avif": "AVIF", ".avifs": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}
NEEDS = {
    "AVIF": "of AVIF, which this Pillow cannot read",
    "HEIF": "of HEIC, which pip install pillow-heif makes readable",
}
TABLES = (".parquet", ".pq", ".parq")
# suffixes of annotations, often one file per image: after PROBES files without an image, none is opened
SIDECARS = tuple(".txt .json .jsonl .xml .csv .tsv .yaml .yml .npy .npz .pt .pth .pkl .mat .md".split())
PROBES = 100
MOSTLY = 0.9  # share of all images: a folder with more is searched for splits, whatever lies beside it
# folders and files of storage devices, systems and archives; their thumbnails are copies of images
SERVICE_FOLDERS = {
    *"__macosx lost+found $recycle.bin recycler recycled found.000 __pycache__ ~snapshot".split(),
    *("system volume information", "network trash folder", "temporary items"),
}
SERVICE_PREFIXES = tuple(
    "@eadir @syno @__thumb @recycle @recently-snapshot @tmp @sharebin #recycle #snapshot".split()
)
SERVICE_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
# a run directory holds them from its first step on
RUN_FILES = {"config.yaml", "environment.json", "train.log"}
# containers that are not read -> how to convert them
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


@dataclass
class Listing:
    """All files below a folder. Within a split a file or folder counts once, however many links lead to it.

    Attributes:
        files: (path from root, numbers that change with the file) of the images, sorted.
        tables: the same of the parquet files.
        skipped: (name, reason) of what could not be read, sorted.
        links_between_splits: there are links, and folders named like splits, so a file may be in two splits.
    """

    root: str
    files: list[tuple[str, list[int]]] = field(default_factory=list)
    tables: list[tuple[str, list[int]]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)
    links_between_splits: bool = False

    def reader(self, files: list[tuple[str, list[int]]]) -> Callable[[np.ndarray], Iterator[Encoded]]:
        """`Source.read` of some of the files."""
        return lambda positions: (os.path.join(self.root, files[position][0]) for position in positions)


def list_folder(root: str, *, splits_apart: bool = True) -> Listing:
    """All files below root. Folders may nest to any depth, and links may form circles.

    Args:
        splits_apart: a file that links bring into folders of several splits counts in each of them.

    Raises:
        OSError: root itself cannot be read.
    """
    walk = _Walk(Listing(root), _Identities(root), splits_apart)
    folders = [_Folder("", False, "")]  # a stack: Python's recursion has a limit
    while folders:
        folders += reversed(walk.inner_folders(folders.pop()))
    found = walk.found
    for names in (found.files, found.tables, found.skipped):
        names.sort()
    found.links_between_splits = walk.identities.has_links and walk.identities.has_splits
    return found


@dataclass(frozen=True)
class _Folder:
    path: str  # below root, with a slash at its end; "" is root
    linked: bool  # whether a link led there
    split: str  # that its name, or one above it, names


@dataclass
class _Walk:
    """Fills `found`, folder by folder."""

    found: Listing
    identities: "_Identities"
    splits_apart: bool
    probes: Counter[str] = field(default_factory=Counter)  # suffix -> files opened since the last image

    def inner_folders(self, folder: _Folder) -> list[_Folder]:
        """List the files of a folder, and return the folders in it."""
        try:
            with os.scandir(os.path.join(self.found.root, folder.path)) as unsorted:
                entries = sorted(unsorted, key=lambda entry: entry.name)
        except OSError as exc:
            if not folder.path:
                raise
            self._skip(folder.path, reason(exc))
            return []
        # pictures in a run directory are drawn by evaluations
        if folder.path and RUN_FILES <= {entry.name for entry in entries}:
            self.found.unused.add("run folders", folder.path.rstrip("/"))
            return []
        return [inner for entry in entries if (inner := self._list(entry, folder))]

    def _list(self, entry: os.DirEntry[str], folder: _Folder) -> _Folder | None:
        path = folder.path + entry.name
        if entry.name.startswith("."):
            self.found.unused.add("hidden", path)
            return None
        try:
            linked = folder.linked or entry.is_symlink()
            is_folder = entry.is_dir()
            why = _service(entry.name) if is_folder else _not_an_image(entry, self.probes)
            if why:
                self.found.unused.add(why, path)
                return None
            info = os.stat(entry.path)
        except OSError as exc:
            self._skip(path, reason(exc))
            return None
        split = folder.split
        if is_folder and self.splits_apart:
            split = split or split_named(entry.name) or ""
        if not is_folder and not stat.S_ISREG(info.st_mode):  # reading a pipe would block for ever
            self._skip(path, "not a regular file")
        elif not self.identities.is_new(path, info, linked, split):
            self.found.unused.add("second links", path)
        elif is_folder:
            return _Folder(path + "/", linked, split)
        else:
            to = self.found.tables if _suffix(entry.name) in TABLES else self.found.files
            to.append((path, [info.st_size, info.st_mtime_ns, info.st_ctime_ns]))
        return None

    def _skip(self, path: str, why: str) -> None:
        self.found.skipped.append((decodable(path), why))


class _Identities:
    """Files and folders listed so far, so that no link makes one count twice.

    Two entries with the same device and inode number are one file if a link led to one of them or the file
    has several names. Some file systems give all files the same number: there, or where the number is 0, real
    paths are compared.
    """

    def __init__(self, root: str) -> None:
        self.root, self.real_root = root, os.path.realpath(root)
        self.has_links = self.has_splits = False
        self.linked: dict[object, bool] = {}  # (split, identity) -> whether a link led there
        self.without_inodes: set[int] = set()  # devices whose inode numbers are not unique
        info = os.stat(root)
        self.root_identities = (info.st_dev, info.st_ino), self.real_root
        self.is_new("", info, False, "")

    def _identity(self, path: str, info: os.stat_result, linked: bool) -> object:
        if info.st_ino and info.st_dev not in self.without_inodes:
            return info.st_dev, info.st_ino
        if linked:
            return os.path.realpath(os.path.join(self.root, path))
        return os.path.join(self.real_root, path).rstrip("/")

    def is_new(self, path: str, info: os.stat_result, linked: bool, split: str) -> bool:
        """Note an entry; False if it is listed already."""
        several_names = not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1
        self.has_links |= linked or several_names
        self.has_splits |= bool(split)
        identity = self._identity(path, info, linked)
        # two entries without any link have one number: this device does not number its files
        if self.linked.get((split, identity)) is False and not linked and not several_names:
            self.without_inodes.add(info.st_dev)
            identity = self._identity(path, info, linked)
        was_linked = self.linked.get((split, identity))
        self.linked[split, identity] = linked or bool(was_linked)
        return was_linked is None and not (linked and identity in self.root_identities)


def _service(name: str) -> str:
    folded = name.casefold()
    return "service folders" if folded in SERVICE_FOLDERS or folded.startswith(SERVICE_PREFIXES) else ""


def _not_an_image(entry: os.DirEntry[str], probes: Counter[str]) -> str:
    """Why a file is neither an image nor a table, as words after a number (`txt files`); "" where it is one.

    Files of other suffixes are opened: browsers and phones write .jfif, no suffix, or `x.jpg?w=640`.
    """
    suffix = _suffix(entry.name)
    if suffix in EXTENSIONS or suffix in TABLES:
        return ""
    if entry.name.casefold() in SERVICE_FILES:
        return "service files"
    is_suffix = re.fullmatch(r"\.\w{1,10}", suffix) and not suffix[1:].isdigit()
    kind = f"{suffix} files" if is_suffix else "files of no known kind"
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


@dataclass(frozen=True)
class Layout:
    """Which folders are splits and which are classes.

    Attributes:
        split: folder -> split of its images, "" if they are in none.
        class_folder: folder -> the folder on its path that names the class, or None.
        folders: split -> its folders, such as `train/`; empty if there are none and all images are train.
        level: words for the folders that name the classes.
        rest_is_train: there is a test split but no train split: everything beside it is train.
    """

    split: dict[str, str]
    class_folder: dict[str, str | None]
    folders: dict[str, list[str]]
    level: str = "the first folder level"
    rest_is_train: bool = False


def find_layout(counts: Mapping[str, int]) -> Layout:
    """The splits of a folder of images, by the names of folders on the first level that has several.

    Either `train/CLASS/x.png` beside `test/CLASS/y.png`, also inside a folder that holds nearly all images;
    or `CLASS/train/x.png` beside `CLASS/test/y.png`. See `splits_of_folders` for the names.

    Args:
        counts: images in every folder, by its path from the root; "" is the root.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in counts}
    rows = list(counts)  # folders at or below `inside`, the path of the level that is looked at
    inside: list[str] = []
    without: Layout | None = None  # the layout if no splits are found further inside
    while True:
        depth = len(inside)
        below: dict[str, list[str]] = {}  # name of a folder on this level -> folders in it
        for folder in rows:
            if len(parts[folder]) > depth:
                below.setdefault(parts[folder][depth], []).append(folder)
        sizes = {name: sum(counts[folder] for folder in folders) for name, folders in below.items()}
        num_below = sum(sizes.values())
        loose = sum(counts[folder] for folder in rows) - num_below  # images beside the folders
        found = splits_of_folders(below, more=loose >= num_below) if below else None
        if found and (without is None or both_sides(found.values())):
            # the same names in another folder: these are classes with splits of their own, in parts
            alike = any(
                part[depth] in found
                for part in parts.values()
                if len(part) > depth and part[:depth] != inside
            )
            return without if without and alike else _by_level(parts, inside, found)
        if without is None and (len(below) != 1 or loose >= num_below):
            names = None if loose else _splits_in_every_folder(parts, depth, below)
            if names:
                return _splits_within_classes(parts, depth, names)
            first = {folder: part[0] if part else None for folder, part in parts.items()}
            without = Layout(dict.fromkeys(parts, "train"), first, {})
        largest = max(sizes, key=sizes.__getitem__, default="")
        if without and MOSTLY * sum(counts.values()) >= sizes.get(largest, 0):
            return without
        rows, inside = below[largest], [*inside, largest]


def _splits_within_classes(parts: dict[str, list[str]], depth: int, names: dict[str, str]) -> Layout:
    """The folders at `depth` are classes, and those in them are splits. names: folder name -> split."""
    split = {
        folder: names.get(part[depth + 1], "") if len(part) > depth + 1 else ""
        for folder, part in parts.items()
    }
    class_folder = {folder: part[depth] if len(part) > depth else None for folder, part in parts.items()}
    folders = {kind: [f"*/{name}/" for name in names if names[name] == kind] for kind in names.values()}
    return Layout(split, class_folder, folders)


def _by_level(parts: dict[str, list[str]], inside: list[str], found: dict[str, str]) -> Layout:
    """The folders in the folder `inside` are the splits. found: folder name -> split."""
    depth, rest_is_train = len(inside), "train" not in found.values()
    rest = {
        tuple(part[depth : depth + 2])
        for part in parts.values()
        if not (len(part) > depth and part[depth] in found)
    }
    # a single folder of folders beside the test split is the train split, whatever its name
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


def _splits_in_every_folder(
    parts: dict[str, list[str]], depth: int, below: dict[str, list[str]]
) -> dict[str, str] | None:
    """Folder name -> split, if all folders at `depth` hold a train folder and one a test or val folder."""
    called: dict[str, str] = {}
    for folders in below.values():
        names = {parts[folder][depth + 1] for folder in folders if len(parts[folder]) > depth + 1}
        own = {name: kind for name in sorted(names) if (kind := split_called(name))}
        if "train" not in own.values():
            return None
        called |= own
    return called if set(called.values()) > {"train"} else None


# ---- a split as a source


def folder_source(listing: Listing, split: str, labels: str) -> Source:
    """The images of a split, `train` or `test`. A val split with labels replaces a test split without.

    Raises:
        NoSplit, or UserError if there are no images at all.
    """
    if not listing.files:
        raise no_images(listing)
    folders, layout = _laid_out(listing)
    # there are no splits: list the files again, each once
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

    return Source(
        names=[decodable(path) for path, _ in files],
        labels=chosen.labels,
        class_names=chosen.class_names,
        version=version_of(files),
        read=listing.reader(files),
        skipped=listing.skipped,
        labels_from=chosen.labels_from,
        unused=listing.unused.listed(),
        notes=notes,
        stand_in=stand_in,
    )


def _laid_out(listing: Listing) -> tuple[list[str], Layout]:
    """The folder of every image, and the layout. Images of a folder share one string, to save memory."""
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
    """A split: rows of the listing that are used, their labels, and the rows beside the class folders."""

    rows: list[int]
    labels: np.ndarray | None
    class_names: list[str] | None
    labels_from: str
    loose: list[int] = field(default_factory=list)


def _label(folders: list[str], layout: Layout, kind: str, labels: str, known: list[str] | None) -> _Labelled:
    """Labels by folder. Other splits are numbered as train is, with further classes after those.

    A few images beside the class folders are left out. If they are as many as a class has on average, the
    folders are not classes and every image is used, without labels.

    Args:
        kind: the split.
        known: the class names of train.
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
    """The error for a folder without images, which says what it holds instead."""
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
        fix = f"a test split is not trained on; to do so anyway, name it: {own}"
        return NoSplit(f"{root} has no train split, only {some_of(there)}", fix)
    fix = (
        f"sort the images into {root}/train and {root}/test, "
        "or give the folder of the test images as a source of its own"
    )
    return NoSplit(f"{root} has no {split} split", fix)
