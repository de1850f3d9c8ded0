"""Datasets of the hub keep their own splits, or are divided by a hash."""

import json
import shutil

import pytest

from data import CorpusError, Hub
from tests.data.sources.rows import STRICT


@pytest.fixture
def hub_folder(tmp_path):
    """A dataset folder as the hub has them: its README names a configuration and the files of each split."""
    folder = tmp_path / "pg"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 2), ("test", 3)):
        rows = [{"book": f"{split} {number}", "year": 1900} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: novels\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: validation, path: validation.jsonl}\n  - {split: test, path: test.jsonl}\n---\n"
    )
    return folder


def hub(**changes) -> Hub:
    return Hub(**(dict(config="novels", split=None, revision=None, text_column="book") | changes))


def test_hub_reads_the_datasets_own_splits(hub_folder, tmp_path):
    splits = hub().load(str(hub_folder), tmp_path / "arrow", STRICT)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 2, "test": 3}
    assert splits["test"][1] == {"text": "test 1", "name": f"{hub_folder}/test:1"}


def test_hub_splits_one_split_by_hash(hub_folder, tmp_path):
    splits = hub(split="train").load(str(hub_folder), tmp_path / "arrow", STRICT)
    assert sum(map(len, splits.values())) == 40 and len(splits["train"]) > 25


def test_a_local_dataset_elsewhere_is_the_same_one(hub_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(hub_folder, copy)
    source = hub(split="train", split_by="content")
    assert source.identity(str(copy)) == source.identity(str(hub_folder))
    splits = [source.load(str(path), tmp_path / path.name, STRICT) for path in (hub_folder, copy)]
    assert [rows["text"][:] for rows in splits[0].values()] == [rows["text"][:] for rows in splits[1].values()]
    (file,) = [file for file in copy.rglob("*") if file.suffix in (".parquet", ".jsonl")][:1]
    file.write_bytes(file.read_bytes() + b" ")
    assert source.identity(str(copy)) != source.identity(str(hub_folder))


def test_hub_errors(hub_folder, tmp_path):
    with pytest.raises(CorpusError, match=r"^data\.source\.text_column=text: must .* book, year$"):
        hub(text_column="text").load(str(hub_folder), tmp_path / "arrow", STRICT)
    with pytest.raises(CorpusError, match=rf"^data\.path={hub_folder}, data\.source\.config=poems: must "):
        hub(config="poems").load(str(hub_folder), tmp_path / "arrow", STRICT)
    with pytest.raises(CorpusError, match=r", data\.source\.split=valid: must "):
        hub(split="valid").load(str(hub_folder), tmp_path / "arrow", STRICT)
    with pytest.raises(CorpusError, match=r"^data\.path=nobody/nothing, .*: must "):
        hub().load("nobody/nothing", tmp_path / "arrow", STRICT)
    with pytest.raises(CorpusError, match=r"^data\.path=null: must be "):
        hub().check(None)
    assert hub().identity(str(hub_folder)) != hub(revision="main").identity(str(hub_folder))
