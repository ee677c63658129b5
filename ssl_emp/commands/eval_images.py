"""The images that evaluate.py judges encoders on: a run's splits, and those of a suite's data sets."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from linear_eval.targets import TARGETS, torchvision_target
from linear_eval.transfer import Target
from ssl_emp.commands.eval_config import EvalConfig
from ssl_emp.commands.ledger import Voice
from ssl_emp.config import DataConfig
from ssl_emp.data.holdout import hold_out
from ssl_emp.data.images import (
    EncodedPixels,
    ImageSet,
    NoSplit,
    listed,
    load_images,
    load_source,
    load_test_images,
)
from ssl_emp.data.matching import match_labels
from ssl_emp.data.objects import load_object
from ssl_emp.errors import UserError

DESCRIBED_KEYS = tuple("source image_size test_source max_images subset_seed holdout jpeg_quality".split())
# keys that change no number, or only through those above
UNDESCRIBED_KEYS = ("labels", "label_noise", "download_dir", "store", "cache_dir")

HOLD_OUT = "hold a part of the train images out with data.holdout=0.2"


@dataclass(frozen=True)
class Splits:
    """What encoders are judged on. Some evaluators need no labels, and some no test split."""

    train: ImageSet
    test: ImageSet | None
    data: DataConfig
    held_out: bool = False  # `test` is a part of what was the train split
    no_test: Exception | None = None  # why there is no test split
    no_labels: Exception | None = None  # why nothing can be predicted

    @property
    def labelled(self) -> tuple[ImageSet, ImageSet]:
        """(train, test), labels numbered alike. UserError or EvalError where there is nothing to predict."""
        for problem in (self.no_labels, self.no_test):
            if problem is not None:
                raise problem
        assert self.test is not None
        return self.train, self.test

    @property
    def described(self) -> str:
        """Every setting of the data that moves a number, for the row; `UNDESCRIBED_KEYS` has the others."""
        data = self.data
        parts = [f"{data.source} {self.train.pixels.shape[-1]}px"]
        parts += [f"test {data.test_source}"] if data.test_source else []
        parts += [f"judged on {self.test.stand_in}"] if self.test is not None and self.test.stand_in else []
        subset = f"subset {data.subset_seed} of {data.max_images} images"
        parts += [subset] if data.max_images is not None else []
        share = f"{100 * (data.holdout or 0):g}% of every class"
        parts += [f"{share} held out by seed {data.subset_seed}"] if self.held_out else []
        parts += [f"JPEG quality {data.jpeg_quality}"] if self.train.store == "encoded" else []
        for key, value in data.model_dump().items():
            if value == "object" and key == "kind":
                continue  # as the source says
            if key not in DESCRIBED_KEYS + UNDESCRIBED_KEYS and value != DataConfig.model_fields[key].default:
                parts.append(f"{key}={value}")
        return ", ".join(parts)


@dataclass(frozen=True)
class GivenImages:
    """Splits that were given in Python, as `ssl_emp.data.objects.load_object` takes them; None: not given."""

    train: Any = None
    test: Any = None


NONE_GIVEN = GivenImages()


def load_splits(
    data: DataConfig, image_size: int | None, voice: Voice, given: GivenImages = NONE_GIVEN
) -> Splits:
    """Train and test, of one size and labelled alike. Raises UserError where train or a test source fails."""
    train, test, no_test = _load_train(data, image_size, data.store, voice, given.train), None, None
    try:
        test = _load_test(data, train, voice, given.test)
    except UserError as error:
        if data.test_source is not None or given.test is not None:
            raise
        no_test = error
    held_out = False
    may_hold_out = data.holdout is not None and train.labels is not None
    if may_hold_out and test is not None and test.labels is None and data.test_source is None:
        voice.note(f"the test split of {data.source} has no labels, so data.holdout is in its place")
        what = f"{data.source} has no test split with labels"
        test, no_test = None, NoSplit(what, "name one with data.test_source=LABELLED")
    if data.holdout is not None and test is not None:
        voice.note(f"data.holdout is not used: {data.test_source or data.source} has a test split")
    elif may_hold_out and isinstance(no_test, NoSplit):
        if train.store == "raw":  # indexing a mapped tensor would copy it into memory
            train = _load_train(data, image_size, "encoded", voice, given.train)
        held_out = True
        train, test, no_test = _held_out(data, train, voice)
    elif isinstance(no_test, NoSplit):
        fix = f"{HOLD_OUT}, or name other images with data.test_source=LABELLED"
        no_test = UserError(f"{data.source} has no test split", fix)

    no_labels: UserError | None = None
    for split, images in (("train", train), ("test", test)):
        if images is not None:
            problem = _note_split(data, split, images, voice)
            no_labels = no_labels or problem
    if test is not None:
        if no_labels is None:
            try:
                test, lacking = match_labels(train, test)
                if lacking:
                    voice.note(f"warning: {lacking}")
            except UserError as error:
                no_labels = error
        warn_of_overlap({"train": train}, test, voice)
    return Splits(train, test, data, held_out, no_test, no_labels)


def _load_train(data: DataConfig, image_size: int | None, store: str, voice: Voice, given: Any) -> ImageSet:
    options: dict[str, Any] = {"image_size": image_size, "store": store}
    # of the train split only
    options |= {"max_images": data.max_images, "subset_seed": data.subset_seed}
    options |= {"progress": voice.progress("train images"), **data.shared_options()}
    if given is not None:
        return load_object(given, **options)
    return load_images(data.source, "train", kind=data.kind, **options)


def _load_test(data: DataConfig, train: ImageSet, voice: Voice, given: Any) -> ImageSet:
    # JPEG for both splits or for none
    options: dict[str, Any] = {"store": "encoded" if train.store == "encoded" else data.store}
    options |= {"image_size": train.pixels.shape[-1], "progress": voice.progress("test images")}
    options |= data.shared_options()
    if given is not None:
        return load_object(given, "test", **options)
    if data.kind == "object" and data.test_source is None:
        raise NoSplit("no test images were given", "give data=(train, test)")
    return load_test_images(data.source, data.test_source, kind=data.kind, **options)


def _held_out(
    data: DataConfig, train: ImageSet, voice: Voice
) -> tuple[ImageSet, ImageSet | None, UserError | None]:
    """(train, test, why there is none), the test images held out of train."""
    assert data.holdout is not None
    train, test = hold_out(train, data.holdout, data.subset_seed)
    if not len(test.names):
        what = f"data.holdout={data.holdout:g} leaves no image of {data.source} to test on, since "
        what += "two of every class stay in train"
        return train, None, UserError(what, "raise data.holdout, or give more images of a class")
    counts = f"{len(test.names):,} of {len(train.names) + len(test.names):,} images"
    seen = "an encoder that was trained on this data has seen them, without their labels"
    voice.note(f"{counts} of {data.source} are held out as test; {seen}")
    return train, test, None


def _note_split(data: DataConfig, split: str, images: ImageSet, voice: Voice) -> UserError | None:
    """Say what is odd about a split; the problem where it has no labels."""
    source = data.source if split == "train" else data.test_source or data.source
    if images.skipped:
        voice.note(f"{len(images.skipped)} unreadable images left out of the {split} split of {source}")
    for line in (*images.notes, *([images.dim_line] if images.dim else [])):
        voice.note(f"the {split} split of {source}: {line}")
    if images.labels is not None:
        return None
    fix = "sort the images into a folder for each class, add a column `label`, or name "
    fix += "labelled ones with data.source=LABELLED"
    if split == "test" and data.test_source is None:
        fix = f"{HOLD_OUT}, or name labelled ones with data.test_source=LABELLED"
    what = f"the {split} split of {source} has {images.labelled}, and encoders are judged by "
    return UserError(
        f"{what}predicting them",
        "drop data.labels=none" if data.labels == "none" else f"{fix}; diagnose needs none",
    )


def load_target(
    target: Target, image_size: int | None, config: EvalConfig, voice: Voice
) -> dict[str, ImageSet]:
    """The splits of a target, of one size, labels numbered alike: `train`, `test`, `val` where it has one."""
    splits: dict[str, ImageSet] = {}
    size = target.image_size or image_size
    for part in ("train", "val", "test"):
        split = getattr(target, f"{part}_split")
        if split is None:
            continue
        images = _load_target_split(
            target, split, size, target.max_images if part == "train" else None, config
        )
        if images.labels is None:
            what = f"the {split} split of {target.source} has {images.labelled}"
            raise UserError(what, "leave it out of the suite, or label it")
        size = images.pixels.shape[-1]
        if part != "train":
            images, lacking = match_labels(splits["train"], images, part)
            for line in (*images.notes, *([lacking] if lacking else [])):
                voice.note(f"warning: {target.name}: {line}")
        splits[part] = images
    fitted = {part: images for part, images in splits.items() if part != "test"}
    warn_of_overlap(fitted, splits["test"], voice, f"{target.name}: ")
    return splits


def _load_target_split(
    target: Target, split: str, size: int | None, max_images: int | None, config: EvalConfig
) -> ImageSet:
    data, transfer = config.data, config.transfer
    given: dict[str, Any] = {"image_size": size, "max_images": max_images}
    given |= {name: getattr(data, name) for name in ("jpeg_quality", "cache_dir", "store", "max_pixels")}
    if target.source in TARGETS and target.source not in ("cifar10", "cifar100"):
        listing = torchvision_target(target.source, transfer.root, split, download=transfer.download)
        name = f"{target.source}/{split}"
        source = listed(listing.sources, listing.labels, listing.class_names, name)
        return load_source(source, name, **given)
    return load_images(target.source, split, download_dir=transfer.root, **given)


def warn_of_overlap(fitted: dict[str, ImageSet], test: ImageSet, voice: Voice, where: str = "") -> None:
    """A line for each split, by its name, that holds images of the test split."""
    hashes = image_hashes(test.pixels)
    for name, images in fitted.items():
        shared = len(image_hashes(images.pixels) & hashes)
        if shared:
            voice.note(
                f"warning: {where}{shared} of {len(hashes)} distinct test images also occur in "
                f"the {name} split, pixel by pixel"
            )


def image_hashes(pixels: Tensor | EncodedPixels) -> set[bytes]:
    """Of images (N, 3, S, S), decoded 256 at a time."""
    chunks = (pixels[start : start + 256] for start in range(0, len(pixels), 256))
    images = (image.numpy().tobytes() for chunk in chunks for image in chunk)
    return {hashlib.blake2b(image, digest_size=16).digest() for image in images}


def images_hash(sets: Iterable[ImageSet | None]) -> str:
    """Twelve hexadecimal digits of all pixels, labels and names."""
    contents = [None if images is None else images.content for images in sets]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]
