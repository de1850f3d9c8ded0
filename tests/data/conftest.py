"""Small corpora for the tests of data/: seeded, in tmp_path, no network."""

import os
import random
import string

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anybody imports datasets

from data import DataModule, Files
from data.tokenizers import Bytes


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """Nothing of a test is found again by the next one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def random_text(length: int, seed: int) -> str:
    letters = random.Random(seed)
    return "".join(letters.choice(string.ascii_lowercase + "   \n") for _ in range(length))


@pytest.fixture
def books(tmp_path):
    """A folder of documents of many lengths, with splits: 12 for training, 3 for validation."""
    folder = tmp_path / "books"
    for split, count in (("train", 12), ("valid", 3)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            text = random_text(37 + 61 * number, seed=number + 100 * (split == "valid"))
            (folder / split / f"{number:02}.txt").write_text(text)
    return folder


@pytest.fixture
def make(books, tmp_path):
    """make(packing="whole", ...) -> a DataModule on `books`, set up."""

    def build(**changes) -> DataModule:
        settings = dict(
            source=Files(text_column="text"),
            path=str(books),
            tokenizer=Bytes(),
            packing="contiguous",
            document_mask=True,
            length_weights=None,
            sequence_length=64,
            batch_size=2,
            validation_sequences=None,
            minimum_tokens=0,
            on_bad_document="error",
            workers=0,
            cache=str(tmp_path / "cache"),
            seed=7,
        )
        return DataModule(**(settings | changes))

    return build
