"""The transfer literature's data sets on disk -> image files and labels of a split, as their creators split.

Folders are those that torchvision downloads into, below one root. Labels come from the lists that each data
set ships; splits by SimCLR's appendix B.8 (Chen et al. 2020): the first split of DTD and SUN397, 30 images of
each class as train of Caltech-101.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from linear_eval.errors import EvalError, first_line

CALTECH_TRAIN_PER_CLASS = 30
VOC_CLASSES = (
    *"aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike".split(),
    *"person pottedplant sheep sofa train tvmonitor".split(),
)
# images, labels, class names
Listing = tuple[Sequence[str | Path | np.ndarray], Sequence[int] | Tensor, Sequence[str]]


@dataclass(frozen=True)
class TargetImages:
    """A split of a data set, nothing decoded yet.

    Attributes:
        sources: N image files, or (H, W, 3) uint8 pixels where the data set keeps them as arrays.
        labels: (N,) int64 class ids; of VOC 2007 (N, 20) int64: 1 present, 0 absent, -1 present only in
        objects marked difficult,
            which the challenge does not count.
        class_names: names of the C classes.
    """

    sources: list[str | np.ndarray]
    labels: Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    def images(self) -> Iterator[Image.Image]:
        """The images in order, RGB, decoded one at a time."""
        for source in self.sources:
            with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
                yield image.convert("RGB")


@dataclass(frozen=True)
class TargetSource:
    """A data set's reader: (root, split, download) -> its listing; `advice`: how to get it by hand."""

    read: Callable[[Path, str, bool], Listing]
    splits: tuple[str, ...] = ("train", "test")
    multi_label: bool = False
    advice: str = ""


def torchvision_target(name: str, root: str | Path, split: str, *, download: bool = False) -> TargetImages:
    """Images and labels of a split of one of `TARGETS`.

    No file is unpickled but those of CIFAR, and those only after torchvision has compared their checksums.

    Args:
        name: one of `TARGETS`.
        root: the folder that torchvision downloads into.
        split: one of the data set's `splits`.
        download: let torchvision fetch what is missing; Food-101 alone is 5 GB, SUN397 37 GB.

    Raises:
        EvalError: no such data set or split, not below root, incomplete, no download, scipy missing.
    """
    source = TARGETS.get(name)
    if source is None:
        raise EvalError(f"there is no target data set {name!r}", f"choose one of {', '.join(TARGETS)}")
    if split not in source.splits:
        raise EvalError(f"{name} has no split {split!r}", f"choose one of {', '.join(source.splits)}")
    root = Path(root).expanduser()
    by_torchvision = f"set download=true, or copy torchvision's files of {name} into {root}"
    fix = source.advice.format(root=root) or by_torchvision
    try:
        images, labels, class_names = source.read(root, split, download)
    except ImportError as error:
        what = f"{name} keeps its labels in .mat files, which need scipy"
        raise EvalError(what, "pip install scipy") from error
    # not found, no network; lists of another layout
    except (OSError, RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = first_line(error)
        what = f"{name} ({split}) cannot be read from {root} ({type(error).__name__}: {reason})"
        raise EvalError(what, fix) from error
    if len(images) == 0:
        raise EvalError(f"{name} ({split}) in {root} lists no images", fix)
    sources = [image if isinstance(image, np.ndarray) else str(image) for image in images]
    absent = [path for path in sources if isinstance(path, str) and not Path(path).is_file()]
    if absent:
        what = f"{len(absent)} of {len(sources)} {split} images of {name} are missing, e.g. {absent[0]}"
        raise EvalError(what, fix)
    return TargetImages(sources, torch.as_tensor(labels, dtype=torch.int64), list(class_names))


def _from_torchvision(class_name: str, root: Path, **options: Any) -> Any:
    """torchvision's data set, imported where it is needed."""
    from torchvision import datasets

    return getattr(datasets, class_name)(root, **options)


def _through_torchvision(class_name: str) -> Callable[[Path, str, bool], Listing]:
    """For classes with `split` and `loader`: with `str` as loader an item is (path, label), not decoded."""

    def read(root: Path, split: str, download: bool) -> Listing:
        data = _from_torchvision(class_name, root, split=split, loader=str, download=download)
        items = [data[row] for row in range(len(data))]
        return [path for path, _ in items], [int(label) for _, label in items], data.classes

    return read


def _cifar(class_name: str) -> Callable[[Path, str, bool], Listing]:
    def read(root: Path, split: str, download: bool) -> Listing:
        data = _from_torchvision(class_name, root, train=split == "train", download=download)
        return list(data.data), data.targets, data.classes

    return read


def _pets(root: Path, split: str, download: bool) -> Listing:
    if download:
        _from_torchvision("OxfordIIITPet", root, split="trainval", download=True)
    folder = root / "oxford-iiit-pet"
    file_name = f"{'trainval' if split == 'train' else 'test'}.txt"
    rows = [line.split() for line in _lines(folder / "annotations" / file_name)]
    labels = [int(row[1]) - 1 for row in rows]
    # Abyssinian_100 is of class 1, Abyssinian
    names = dict(zip(labels, (row[0].rpartition("_")[0] for row in rows), strict=True))
    paths = [folder / "images" / f"{row[0]}.jpg" for row in rows]
    return paths, labels, [names[label] for label in sorted(names)]


def _sun397(root: Path, split: str, download: bool) -> Listing:
    """torchvision's class knows no splits: the creators' first one, 50 and 50 images a class."""
    if download:
        _from_torchvision("SUN397", root, download=True)
    folder = root / "SUN397"
    file_name = f"{'Training' if split == 'train' else 'Testing'}_01.txt"
    places = [place / file_name for place in (folder, folder / "Partitions", root / "Partitions")]
    # /a/abbey/sun_aaalbzqrimafwbiv.jpg
    paths = _lines(next((path for path in places if path.is_file()), places[0]))
    class_names = _lines(folder / "ClassName.txt")  # /a/abbey
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[path.rpartition("/")[0]] for path in paths]
    return [folder / path.lstrip("/") for path in paths], labels, [name[3:] for name in class_names]


def _caltech101(root: Path, split: str, download: bool) -> Listing:
    """All 102 folders: the literature counts the background as a class, torchvision's class leaves it out.

    Which 30 of a class are train is drawn by the hash of their names: the same everywhere.
    """
    if download:
        _from_torchvision("Caltech101", root, download=True)
    folder = root / "caltech101" / "101_ObjectCategories"
    class_names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    images: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        files = sorted((folder / class_name).glob("*.jpg"))
        drawn = sorted(
            files, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest()
        )
        train = set(drawn[:CALTECH_TRAIN_PER_CLASS])
        chosen = [path for path in files if (path in train) == (split == "train")]
        images += chosen
        labels += [label] * len(chosen)
    return images, labels, class_names


def _voc2007(root: Path, split: str, download: bool) -> Listing:
    """Labels of the classification task, a file a class: 1, 0 (difficult objects only), -1 (absent)."""
    if download:
        _from_torchvision("VOCDetection", root, year="2007", image_set=split, download=True)
    folder = root / "VOCdevkit" / "VOC2007"
    ids = _lines(folder / "ImageSets" / "Main" / f"{split}.txt")
    columns: list[list[int]] = []
    for name in VOC_CLASSES:
        rows = dict(line.split() for line in _lines(folder / "ImageSets" / "Main" / f"{name}_{split}.txt"))
        columns.append([{"1": 1, "0": -1, "-1": 0}[rows[image]] for image in ids])
    return [folder / "JPEGImages" / f"{image}.jpg" for image in ids], torch.tensor(columns).T, VOC_CLASSES


def _cub200(root: Path, split: str, download: bool) -> Listing:
    folder = root / "CUB_200_2011"

    def column(file_name: str) -> dict[str, str]:  # image number -> value
        return dict((number, text) for number, text in (line.split() for line in _lines(folder / file_name)))

    paths, labels = column("images.txt"), column("image_class_labels.txt")
    is_train = column("train_test_split.txt")
    chosen = [number for number in paths if (is_train[number] == "1") == (split == "train")]
    class_names = list(column("classes.txt").values())
    files = [folder / "images" / paths[number] for number in chosen]
    return files, [int(labels[number]) - 1 for number in chosen], class_names


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


WITH_VAL = ("train", "val", "test")
TARGETS = {
    "food101": TargetSource(_through_torchvision("Food101")),
    "cifar10": TargetSource(_cifar("CIFAR10")),
    "cifar100": TargetSource(_cifar("CIFAR100")),
    "cub200": TargetSource(
        _cub200, advice="unpack CUB_200_2011.tgz (www.vision.caltech.edu/datasets/cub_200_2011) in {root}"
    ),
    "sun397": TargetSource(
        _sun397,
        advice=(
            "put SUN397.tar.gz and the lists of Partitions.zip "
            "(vision.princeton.edu/projects/2010/SUN) into {root}/SUN397, unpacked"
        ),
    ),
    "cars": TargetSource(
        _through_torchvision("StanfordCars"),
        advice="its first home is gone and torchvision cannot download it: copy its files into "
        "{root}/stanford_cars as torchvision's StanfordCars describes",
    ),
    "aircraft": TargetSource(_through_torchvision("FGVCAircraft"), WITH_VAL),
    "voc2007": TargetSource(_voc2007, WITH_VAL, multi_label=True),
    "dtd": TargetSource(_through_torchvision("DTD"), WITH_VAL),
    "pets": TargetSource(_pets),
    "caltech101": TargetSource(_caltech101),
    "flowers102": TargetSource(_through_torchvision("Flowers102"), WITH_VAL),
}
