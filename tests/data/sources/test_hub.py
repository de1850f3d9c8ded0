"""Datasets of the hub keep their own splits, or are divided by a hash."""

import bz2
import gzip
import io
import json
import lzma
import shutil
from types import SimpleNamespace

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from data import CorpusError, Hub
from data.sources.file_rows import connection_error
from data.sources.hub_shards import ShardFile, first_documents, list_shards, read_shard
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


def test_the_corpus_of_a_streamed_dataset_is_its_first_documents(hub_folder, tmp_path, monkeypatch):
    """Of the dataset's own splits, or of the training split where it has none, without copies."""

    def loaded(**changes):
        source = hub(streaming=True, held_out_documents=2, **changes)
        splits = source.load(str(hub_folder), tmp_path / "arrow", STRICT)
        return {split: rows["text"][:] for split, rows in splits.items()}

    own = {"validation": ["validation 0", "validation 1"], "test": ["test 0", "test 1"]}
    assert loaded() == {"train": [f"train {number}" for number in range(40)], **own}
    monkeypatch.setattr("data.sources.hub.SAMPLE", 20)
    assert loaded() == {"train": ["train 0", "train 1", "train 2"], **own}
    rows = [{"book": text} for text in ("a", "b", "b", "", "c", "a", "d", "long" * 10, "e")]
    (hub_folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    divided = {"validation": ["a", "b"], "test": ["c", "d"], "train": ["long" * 10]}
    assert loaded(split="train") == divided
    (hub_folder / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows[:6]))
    with pytest.raises(CorpusError, match=r"^data\.source\.held_out_documents=2: must leave .* has 3 different ones$"):
        loaded(split="train")


def test_the_files_of_a_streamed_dataset_identify_it(hub_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(hub_folder, copy)
    one, other = (hub(streaming=True).identity(str(path)) for path in (hub_folder, copy))
    assert one == other and one["shards"]["train"] == [["train.jsonl", (copy / "train.jsonl").stat().st_size, None]]
    assert one == hub(streaming=True, streams=1).identity(str(copy))
    assert one != hub(streaming=True, held_out_documents=3).identity(str(copy))
    assert "shards" not in hub().identity(str(copy))
    with pytest.raises(
        CorpusError, match=r"^data\.source\.streams=2: must be null without data\.source\.streaming=true"
    ):
        hub(streams=2).check(str(copy))
    (copy / "README.md").write_text("---\nconfigs:\n- config_name: novels\n  data_files: a.csv\n---\n")
    (copy / "a.csv").write_text("book\na\n")
    with pytest.raises(CorpusError, match=r"must hold \.jsonl, \.json, \.parquet files .* and holds a\.csv$"):
        hub(streaming=True).identity(str(copy))


def zstandard(content: bytes) -> bytes:
    compressed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(compressed, "zstd") as stream:
        stream.write(content)
    return compressed.getvalue().to_pybytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_another_format_are_counted(hub_folder, tmp_path, caplog, streaming):
    (hub_folder / "README.md").unlink()
    (hub_folder / "empty.jsonl").touch()
    (hub_folder / ".hidden.csv").write_text("book\na\n")
    source = hub(config=None, streaming=streaming)
    source.load(str(hub_folder), tmp_path / "arrow", STRICT)
    assert "left out" not in caplog.text
    (hub_folder / "more.csv").write_text("book\na\n")
    hub(config=None, streaming=streaming).load(str(hub_folder), tmp_path / "arrow", STRICT)
    assert "3 files are read, and 1 is left out: more.csv" in caplog.text


def test_a_file_of_the_hub_has_the_same_identity_in_every_commit_that_holds_it(monkeypatch):
    system = SimpleNamespace(info=lambda place: {"size": 9, "blob_id": "hash"})
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (system, url))
    files = {"train": ["hf://datasets/a/b@0123abc/data/x.jsonl.gz"]}
    (shard,) = list_shards(SimpleNamespace(config=SimpleNamespace(data_files=files)), "a/b")["train"]
    assert shard.identity == ["data/x.jsonl.gz", 9, "hash"] and shard.url == files["train"][0]


def test_the_first_documents_are_those_of_files_that_are_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.hub_shards.SAMPLED_SHARDS", 2)
    shards = [ShardFile(f"{number}.jsonl", str(tmp_path / f"{number}.jsonl"), 9, None) for number in range(5)]
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a"}\n' * (number + 1))
    names = [row["name"] for row in first_documents(shards, "text", STRICT)]
    assert names == ["0.jsonl:0", "2.jsonl:0", "2.jsonl:1", "2.jsonl:2"]


def test_a_lost_connection_is_one_line(monkeypatch):
    def lost(*_):
        raise connection_error()("the network is unreachable")

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (SimpleNamespace(open=lost), url))
    with pytest.raises(CorpusError, match=r"in a\.jsonl, which cannot be read: the network is unreachable$"):
        next(read_shard(ShardFile("a.jsonl", "hf://a.jsonl", 9, None), 0, "text", STRICT))


def test_a_file_is_read_from_any_row_of_any_file_system():
    texts = [f"text {number} " * number for number in range(30)]
    lines = "\n\n".join(json.dumps({"text": text}) for text in texts).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table, row_group_size=7)
    compressed = {".gz": gzip.compress, ".zst": zstandard, ".xz": lzma.compress, ".bz2": bz2.compress}
    files = {".parquet": table.getvalue(), ".jsonl": lines}
    files |= {f".json{ending}": compress(lines) for ending, compress in compressed.items()}
    for ending, content in files.items():
        with fsspec.open(f"memory://file{ending}", "wb") as stream:
            stream.write(content)
        shard = ShardFile(f"file{ending}", f"memory://file{ending}", len(content), None)
        for start in (0, 1, 7, 13, 29, 30):
            assert list(read_shard(shard, start, "text", STRICT)) == list(enumerate(texts))[start:], (ending, start)
    with pytest.raises(CorpusError, match=r"must hold a whole \.parquet file in gone\.parquet, which cannot be read"):
        next(read_shard(ShardFile("gone.parquet", "memory://gone.parquet", 9, None), 0, "text", STRICT))
