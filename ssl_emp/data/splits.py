"""Which files make a split, by the words that the Hugging Face Hub reads in the names of folders and files.

    train, training      valid, validation, val, dev      test, testing, eval, evaluation

In any case, between delimiters: `TRAIN`, `train2017`, `my-train-00000-of-00002.parquet`, but neither
`trainer` nor `testimony`.
"""

import re
from collections.abc import Iterable, Sequence

from ssl_emp.errors import UserError

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# words that say nothing about the split
NEUTRAL = set("set split data dataset image images img imgs picture pictures photo photos files".split())
_DELIMITERS = re.compile(r"[\W\d_]+")
_SHARD = re.compile(
    r"(?P<stem>.*?)[-_.]?(?P<number>\d+)(?P<of>[-_]of[-_])(?P<count>\d+)(?!\d)", re.DOTALL | re.IGNORECASE
)


def split_named(name: str) -> str | None:
    """`train`, `val` or `test` if the words of `name` name exactly one of them."""
    found = {WORDS[word] for word in _words(name) if word in WORDS}
    return found.pop() if len(found) == 1 else None


def split_called(name: str) -> str | None:
    """`split_named`, if `name` says nothing else: `train`, `train_images`, but not `training_shoe`."""
    words = [word for word in _words(name) if word not in NEUTRAL]
    return WORDS.get(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    return [word for word in _DELIMITERS.split(name.casefold()) if word]


def splits_of_folders(names: Iterable[str], *, more: bool) -> dict[str, str] | None:
    """Folder name -> split, for those of sibling folders that are splits; None if none is.

    Train and test must both be there, in names that differ only in that word (`train` and `val`,
    `flowers-train` and `flowers-test`) or in the names of all folders. Otherwise only a folder called like a
    test split is one, and everything beside it is the train split. A train folder beside other folders is a
    class: `bus`, `car`, `train`.

    Args:
        names: of the folders.
        more: whether there are images beside the folders.
    """
    folders = list(names)
    named = {name: kind for name in folders if (kind := split_named(name))}
    if len(named) == len(folders) and both_sides(named.values()):
        return named
    called = {name: kind for name in folders if (kind := split_called(name))}
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for name, kind in named.items():
        rest = () if name in called else tuple("" if word in WORDS else word for word in _words(name))
        alike.setdefault(rest, {})[name] = kind
    paired = {
        name: kind for same in alike.values() if both_sides(same.values()) for name, kind in same.items()
    }
    if paired or "train" not in called.values():
        return paired or called or None
    return called if len(called) == len(folders) and not more else None


def both_sides(kinds: Iterable[str]) -> bool:
    """Whether there is a train split and a test or val split."""
    found = set(kinds)
    return "train" in found and bool(found & {"test", "val"})


def split_of_table(path: str) -> str | None:
    """The split of a parquet file by its name, else by its nearest folder that names one."""
    *folders, name = path.split("/")
    for part in (name.rpartition(".")[0], *reversed(folders)):
        if kind := split_named(part):
            return kind
    return None


def check_shards(paths: Sequence[str], where: str, *, complete: bool) -> None:
    """Raise UserError if a table of a split is there in two shardings, or, with `complete`, lacks shards.

    `train-00001-of-00003.parquet` is the second of three. Paths are relative to `where`.
    """
    sets: dict[str, dict[int, dict[int, str]]] = {}  # table -> number of shards -> shard number -> path
    # table -> how the names of its shards are written: start, number of digits, end
    shown: dict[str, tuple[str, int, str]] = {}
    whole = {path.rpartition(".")[0]: path for path in paths}
    for path in paths:
        folder, slash, name = path.rpartition("/")
        found = _SHARD.match(name)
        if found is None:
            continue
        key = folder + slash + found["stem"]
        start = folder + slash + name[: found.start("number")]
        shown[key] = (start, len(found["number"]), found["of"] + found["count"])
        shards = sets.setdefault(key, {}).setdefault(int(found["count"]), {})
        if int(found["number"]) in shards:
            raise _twice(where, shards[int(found["number"])], path)
        shards[int(found["number"])] = path
    for key, shardings in sets.items():
        firsts = [next(iter(shards.values())) for shards in shardings.values()]
        firsts += [whole[key]] if key in whole else []
        if len(firsts) > 1:
            raise _twice(where, *firsts[:2])
        ((count, shards),) = shardings.items()
        first = 1 if count in shards and 0 not in shards else 0  # most writers count from 0, some from 1
        beyond = [path for number, path in shards.items() if not first <= number < first + count]
        if beyond:
            fix = "give it its right name, or move it away"
            raise UserError(f"{beyond[0]} in {where} cannot be one of {count} files", fix)
        if complete and len(shards) < count:
            missing = next(number for number in range(first, first + count) if number not in shards)
            start, width, total = shown[key]
            rest = f" and {count - len(shards) - 1} more" if count - len(shards) > 1 else ""
            raise UserError(
                f"{where} lacks {count - len(shards)} of {count} files: "
                f"{start}{missing:0{width}}{total}{rest}",
                "fetch what is missing, or name the files to do without it by a glob, "
                "such as 'FOLDER/*.parquet'",
            )


def _twice(where: str, one: str, other: str) -> UserError:
    return UserError(
        f"{where} holds one table twice, as {one} and as {other}",
        "delete one of the two sets of files, or name the files of one of them by a glob, "
        "such as 'FOLDER/*-of-00002.parquet'",
    )
