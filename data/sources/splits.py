"""The split of a document: training, validation or test.

The documents' own folders or dataset splits decide. If there are none, a hash of the document's name decides, so an
added document moves no other document to another split.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CorpusError
from .file_rows import names_of, texts_of
from .near_duplicates import first_of_group

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
"""Names of folders and of dataset splits, and the split that each stands for."""

HELD_OUT_PERCENT = 5
"""Percent of the names that go to validation, and as many again to test."""
SMALLEST_HELD_OUT = 5
"""The fewest groups of documents in validation and test, unless only larger groups exist (`split_by_size`)."""

# Packages are few and of unequal size, so most salts give splits of unequal size too. This salt was chosen by bytes and
# gzip's ratio alone: with the libraries of Python 3.11, 3.12 and 3.13, with or without their tests, validation and test
# have about 5 % of the bytes each and compress about as well as the whole.
SALT = "317:"


def split_of(name: str) -> str:
    """Returns the split of a document by its name: the same one on every machine (Python's own `hash` is salted)."""
    percent = _hash(name) % 100
    if percent < HELD_OUT_PERCENT:
        return "validation"
    return "test" if percent < 2 * HELD_OUT_PERCENT else "train"


def split_by_size(groups: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """Returns the split of each document: validation and test get about 5 % of the bytes each.

    Groups are taken in the order of a hash of their names. A group larger than 1 % of all goes to train, so that no few
    documents decide a score. If that leaves less than 1 % for validation or test, it is the group nearest to 5 %: not
    the largest one, and none below 0.1 % (an empty file, for example) while there are others.

    groups: bytes of documents by name; a group stays together. There must be at least three groups.
    """
    ordered = sorted(groups, key=lambda group: _hash(min(group)))
    size = [sum(group.values()) for group in ordered]
    share = sum(size) * HELD_OUT_PERCENT / 100
    largest = share / SMALLEST_HELD_OUT
    chosen: dict[str, list[int]] = {}
    left = list(range(len(ordered)))
    for split in ("validation", "test"):
        filled = 0
        chosen[split] = []
        for index in left:
            if size[index] <= largest and filled + size[index] <= share:
                filled += size[index]
                chosen[split].append(index)
        if filled < largest:
            largest_left = max(left, key=size.__getitem__)
            worth = [index for index in left if index != largest_left and size[index] * 1000 >= sum(size)]
            chosen[split] = [min(worth or left, key=lambda index: abs(size[index] - share))]
        left = [index for index in left if index not in chosen[split]]
    chosen["train"] = left
    return {name: split for split, indices in chosen.items() for index in indices for name in ordered[index]}


def split_by_name(rows: "Dataset", near_duplicates: float | None = None) -> "dict[str, Dataset]":
    """Divides rows of `name` and `text` into splits by a hash of the name. An empty split is left out.

    Copies of a text are in the split of the first one, so that no test document is also trained on. If
    `near_duplicates` is given, so are texts with at least this similarity (near_duplicates.py).
    """
    return _divided(rows, {name: split_of(name) for name in names_of(rows)}, _digests(rows), near_duplicates)


def split_by_content(rows: "Dataset", near_duplicates: float | None = None) -> "dict[str, Dataset]":
    """As `split_by_name`, by a hash of the text: a document that is renamed or copied elsewhere keeps its split."""
    digests = _digests(rows)
    keys = {name: digest.hex() if digest else name for name, digest in zip(names_of(rows), digests, strict=True)}
    return _divided(rows, {name: split_of(key) for name, key in keys.items()}, digests, near_duplicates)


def split_by_folder(rows: "Dataset", near_duplicates: float | None = None) -> "dict[str, Dataset]":
    """As `split_by_name`, but documents with the same first folder in their names share a split, which `split_by_size`
    chooses. A document without a folder is a group of its own."""
    folders: dict[str, dict[str, int]] = {}
    for name, text in zip(names_of(rows), texts_of(rows), strict=True):
        folder, slash, _ = name.partition("/")
        folders.setdefault(folder + slash, {})[name] = len(text)
    if len(folders) < len(SPLITS):
        return _divided(rows, dict.fromkeys(names_of(rows), "train"), _digests(rows), near_duplicates)
    return _divided(rows, split_by_size(folders.values()), _digests(rows), near_duplicates)


def _divided(
    rows: "Dataset", split_of_name: Mapping[str, str], digests: Sequence[bytes | None], near_duplicates: float | None
) -> "dict[str, Dataset]":
    originals: dict[bytes, str] = {}
    split_of_row, texts = [], 0
    for name, digest in zip(names_of(rows), digests, strict=True):
        if digest:
            texts += 1
            name = originals.setdefault(digest, name)
        split_of_row.append(split_of_name[name])
    if copies := texts - len(originals):
        log.warning(f"{copies} of {texts} documents are copies of another one, and are in its split")
    if near_duplicates is not None:
        first = first_of_group(texts_of(rows), near_duplicates)
        split_of_row = [split_of_row[number] for number in first]
        similar = sum(number != own for own, number in enumerate(first))
        log.warning(
            f"{similar} of {texts} documents are similar to another one by at least {near_duplicates}, and are in its"
            " split"
        )
    sides = np.array(split_of_row)
    indices = {split: np.flatnonzero(sides == split) for split in SPLITS}
    return {split: rows.select(chosen) for split, chosen in indices.items() if len(chosen)}


def with_test_split(splits: dict, path: str) -> dict:
    """Returns the splits that the data defines itself. Without a test split, validation serves as test.

    Raises:
        CorpusError: train or validation is missing.
    """
    if "train" not in splits or "validation" not in splits:
        found = " and ".join(splits) or "neither"
        raise CorpusError(f"data.path={path}: must hold a train and a validation split, and holds {found}")
    if "test" not in splits:
        _say_once(f"{path} has no test split: validation serves as test")
        splits["test"] = splits["validation"]
    return splits


@cache
def _say_once(message: str) -> None:
    """Logs a message the first time only: a command lists the files several times, and would repeat it."""
    log.info(message)


def warn_of_copies(splits: "dict[str, Dataset]") -> None:
    """Logs how many documents of validation and test are also training documents, if there is any."""
    trained = set(_digests(splits["train"])) - {None}
    for split in ("validation", "test"):
        copies = sum(digest in trained for digest in _digests(splits[split]))
        if copies:
            log.warning(f"{split}: {copies} of {len(splits[split])} documents are copies of training documents")


def warn_of_near_duplicates(splits: "dict[str, Dataset]", threshold: float) -> None:
    """Logs how many documents of validation and test are similar to a training document by at least `threshold`."""
    names = [split for split in SPLITS if split in splits]
    first = first_of_group(chain.from_iterable(texts_of(splits[split]) for split in names), threshold)
    start, trained = len(splits["train"]), set(first[: len(splits["train"])])
    for split in names[1:]:
        similar = sum(group in trained for group in first[start : start + len(splits[split])])
        start += len(splits[split])
        log.warning(
            f"{split}: {similar} of {len(splits[split])} documents are similar to training documents by at least"
            f" {threshold}"
        )


def _hash(name: str) -> int:
    digest = hashlib.sha256(f"{SALT}{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def _digests(rows: "Dataset") -> list[bytes | None]:
    """Returns the sha256 of each text; None for an empty one."""
    return [digest_of(text) if text else None for text in texts_of(rows)]


def digest_of(text: str) -> bytes:
    """Returns the sha256 of a text, by which copies of a document are found."""
    return hashlib.sha256(text.encode()).digest()
