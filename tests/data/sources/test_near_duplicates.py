"""Documents that are nearly the same share a split, or are counted where folders are the splits."""

import random

import pytest
from datasets import Dataset

from data.errors import CorpusError
from data.sources import Files, near_duplicates
from data.sources.bad_documents import BadDocuments
from data.sources.near_duplicates import first_of_group
from data.sources.splits import split_by_name

pytest.importorskip("datasketch")

WORDS = [f"word{number}" for number in range(2000)]


def text(seed: int, words: int = 400) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(original: str, seed: int, changes: int) -> str:
    words, draw = original.split(), random.Random(seed)
    for index in draw.sample(range(len(words)), changes):
        words[index] = "other"
    return " ".join(words)


def test_groups_are_of_similar_texts_in_any_order():
    first, second = text(1), text(2)
    texts = [first, second, "", edited(first, 3, 3), first, "", edited(second, 4, 3), edited(second, 5, 200)]
    assert first_of_group(texts, 0.7) == [0, 1, 2, 0, 0, 5, 1, 7]


def test_a_chain_of_edits_is_one_group():
    steps = [text(1)]
    for step in range(6):
        steps.append(edited(steps[-1], step, 8))
    order = [0, 6, 2, 4, 1, 5, 3]
    assert first_of_group([steps[index] for index in order], 0.6) == [0] * 7


def test_they_share_a_split():
    texts = [edited(text(number // 2, 80), number, number % 2) for number in range(200)]
    rows = Dataset.from_dict({"name": [f"{number}.txt" for number in range(200)], "text": texts})
    apart, together = split_by_name(rows), split_by_name(rows, near_duplicates=0.5)
    pairs = lambda splits: [  # noqa: E731
        {int(name.partition(".")[0]) // 2 for name in rows["name"]} for rows in splits.values()
    ]
    trained, *held_out = pairs(apart)
    assert any(trained & others for others in held_out), "by name alone, pairs are divided"
    trained, *held_out = pairs(together)
    assert held_out and not any(trained & others for others in held_out)
    assert sum(map(len, together.values())) == 200


def test_those_in_two_folders_of_splits_are_counted(tmp_path, caplog):
    original = text(1)
    for name, content in {
        "train/a": original,
        "train/b": text(2),
        "valid/c": edited(original, 3, 2),
        "valid/d": text(4),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(content)
    source = Files("text", near_duplicates=0.8)
    source.load(str(tmp_path), tmp_path, BadDocuments("error", str(tmp_path)))
    assert "validation: 1 of 2 documents are similar to training documents by at least 0.8" in caplog.text


def test_without_the_package_it_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(near_duplicates.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CorpusError, match=r"near_duplicates=0\.8: must be null without the package datasketch"):
        Files("text", near_duplicates=0.8).check(str(tmp_path))
