"""The labels of a test set, numbered as in the train set that it is judged by."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ssl_emp.data.images import ImageSet, count_classes
from ssl_emp.data.source import as_numbers, normal, some_of
from ssl_emp.errors import UserError

Key = str | int


def match_labels(train: ImageSet, test: ImageSet, split: str = "test") -> tuple[ImageSet, str]:
    """`test` with labels numbered as in `train`, and a warning if train lacks some of its classes, else "".

    Classes are equal if their names are (in Unicode NFC). If both sets name whole numbers (`7`, `07`), or one
    does and the other has numbers only, they are equal if the numbers are. Classes that train lacks are
    numbered after those of train, so that every prediction for them is wrong.

    Args:
        train, test: with labels (N,); sets with several labels an image, (N, C), are returned unchanged.
        split: what messages call `test`. For other names than `test`, no class may be missing in train.

    Raises:
        UserError: only one set names its classes; or most of the classes of `test` are not in train.
    """
    assert train.labels is not None and test.labels is not None
    if train.labels.ndim > 1 or test.labels.ndim > 1:
        return test, ""
    occurring = test.labels.unique().tolist()
    train_keys, test_keys = _keys(train, test, occurring, split)
    number: dict[Key, int] = {key: label for label, key in train_keys.items()}
    names = list(train.class_names) if train.class_names else None
    new_label: dict[int, int] = {}
    for label in occurring:
        key = test_keys[label]
        if key not in number:
            if names is None:  # all are numbers
                number[key] = int(key)
            else:
                number[key] = len(names)
                names.append(test.class_names[label] if test.class_names else str(label))
        new_label[label] = number[key]
    table = torch.tensor([new_label[label] for label in occurring])
    labels = table[torch.searchsorted(torch.tensor(occurring), test.labels)]
    matched = replace(test, labels=labels, class_names=names)

    known = set(train.labels.unique().tolist())
    unknown = [label for label in occurring if new_label[label] not in known]
    if not unknown:
        return matched, ""
    called = some_of([test.class_names[label] if test.class_names else str(label) for label in unknown], 5)
    if 2 * len(unknown) > len(occurring) or split != "test":
        what = f"{len(unknown):,} of the {len(occurring):,} classes of the {split} split have no train images"
        raise UserError(
            f"{what}: {called}",
            "call the classes alike in both splits, or give more train images (data.max_images), "
            "or other ones to test on",
        )
    count = int(torch.isin(test.labels, torch.tensor(unknown)).sum())
    plural = "class has" if len(unknown) == 1 else "classes have"
    line = (
        f"{len(unknown):,} test {plural} no train images ({called}): "
        f"{count:,} of {len(test.labels):,} test images count as wrong"
    )
    return matched, line


def _keys(
    train: ImageSet, test: ImageSet, occurring: Sequence[int], split: str
) -> tuple[dict[int, Key], dict[int, Key]]:
    """Label -> key, for train and for test; labels with equal keys are the same class."""
    train_labels = range(count_classes(train))
    train_names = train.class_names and [normal(name) for name in train.class_names]
    test_names = test.class_names and [normal(test.class_names[label]) for label in occurring]
    train_keys: Sequence[Key] | None = as_numbers(train_names) if train_names else train_labels
    test_keys: Sequence[Key] | None = as_numbers(test_names) if test_names else occurring
    if train_keys is None or test_keys is None:
        train_keys, test_keys = train_names or None, test_names or None
    if train_keys is not None and test_keys is not None:
        return dict(zip(train_labels, train_keys, strict=True)), dict(zip(occurring, test_keys, strict=True))
    named, numbered = ("train", split) if train_names else (split, "train")
    shown = some_of(train_names or test_names or [], 3)
    what = f"the {named} split names its classes ({shown}), the {numbered} split only numbers them"
    fix = "give both names, as folders or as text in the column of labels, or both the same numbers"
    raise UserError(what, fix)
