"""Preparation that is killed, that runs twice at once, or that meets odd texts gives the right corpus."""

import json
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data import BPE, CorpusError, Files, prepare
from data.corpus.corpus import Corpus, SplitMetadata
from data.sources import SPLITS
from data.tokenizers import Bytes, Tokenizer

FILES = ("tokens.bin", "offsets.npy", "bytes.npy")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def prepare_books(books: Path, cache: Path, tokenizer: Tokenizer | None = None, minimum_tokens: int = 0) -> Corpus:
    return prepare(Files("text"), str(books), tokenizer or Bytes(), minimum_tokens, cache, "error")


def forked(function: Callable[[], object]) -> int:
    """Starts a copy of this process that calls a function and ends. Returns its number."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return process


def killed_at(operation: int, function: Callable[[], object]) -> int:
    """Calls a function in another process, which kills itself (SIGKILL) before the given one of its operations on
    files. Returns the number of operations that it reached."""
    read, write = os.pipe()
    count = 0

    def hook(event: str, _) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == operation:
                os.write(write, str(count).encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def counted() -> None:
        sys.addaudithook(hook)
        function()
        reached = count
        os.write(write, str(reached).encode())

    os.waitpid(forked(counted), 0)
    os.close(write)
    with open(read) as pipe:
        return int(pipe.read())


def test_killed_at_any_moment_leaves_no_corpus_and_no_leftovers(books, cache, tmp_path):
    whole = prepare_books(books, tmp_path / "other").splits["train"]
    operations = killed_at(0, lambda: prepare_books(books, tmp_path / "counted"))
    assert operations > 20
    for operation in random.Random(1).sample(range(2, operations), 3):
        assert killed_at(operation, lambda: prepare_books(books, cache)) == operation
        corpus = prepare_books(books, cache)
        assert corpus.splits["train"].metadata == whole.metadata
        assert corpus.splits["train"].names == whole.names
        assert {path.name for path in cache.iterdir()} == {corpus.fingerprint, f"{corpus.fingerprint}.lock"}
        (corpus.folder / "metadata.json").unlink()  # the next one is prepared anew


class Recording(Bytes):
    """Records the texts that it encodes, and kills its process at the text number `last`."""

    def __init__(self, last: int | None = None):
        self.last = last
        self.encoded: list[str] = []

    def encode_all(self, names: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.last is not None and len(self.encoded) + len(texts) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.encoded.extend(texts)
        return super().encode_all(names, texts)


@pytest.mark.parametrize("damage", [None, "a byte", "the end", "the record"])
def test_finished_ranges_of_a_killed_preparation_are_kept(books, cache, tmp_path, monkeypatch, damage):
    whole = prepare_books(books, tmp_path / "other").splits["train"]
    monkeypatch.setattr("data.preparation.encoding.RANGE", 1000)
    os.waitpid(forked(lambda: prepare_books(books, cache, Recording(last=9))), 0)
    records = sorted(cache.glob("*.partial/finished/train-*.json"))
    assert len(records) >= 2
    (tokens,) = cache.glob("*.partial/finished/train.bin")
    second, content = json.loads(records[0].read_text())["bytes"], tokens.read_bytes()
    if damage == "a byte":
        tokens.write_bytes(content[: second + 8] + bytes([content[second + 8] ^ 1]) + content[second + 9 :])
    elif damage == "the end":
        tokens.write_bytes(content[: second + 8])
    elif damage:
        records[1].write_bytes(records[1].read_bytes()[:-3])
    else:
        tokens.write_bytes(content + b"of a range that was cut off")
    tokenizer = Recording()
    corpus = prepare_books(books, cache, tokenizer)
    train = corpus.splits["train"]
    assert (corpus.folder / "train" / "tokens.bin").read_bytes() == (whole.folder / "tokens.bin").read_bytes()
    assert train.metadata == whole.metadata and train.names == whole.names
    assert [train.tokens(n).tolist() for n in range(12)] == [whole.tokens(n).tolist() for n in range(12)]
    texts = [train.text(document) for document in range(12)]
    again = [text for text in texts if text in tokenizer.encoded]
    assert texts[0] not in again and len(again) < 12 and texts[11] in again
    in_second = texts[int(np.searchsorted(np.cumsum(train.bytes), 1000, side="right")) + 1]
    assert (in_second in again) == bool(damage)
    assert {path.name for path in cache.iterdir()} == {corpus.fingerprint, f"{corpus.fingerprint}.lock"}
    assert not (corpus.folder / "finished").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_large_split_has_several_files_of_whole_documents(books, cache, tmp_path, monkeypatch, killed):
    whole = prepare_books(books, tmp_path / "other", minimum_tokens=100)
    monkeypatch.setattr("data.preparation.encoding.RANGE", 300)
    monkeypatch.setattr("data.preparation.encoding.FILE", 900)
    if killed:
        os.waitpid(forked(lambda: prepare_books(books, cache, Recording(last=9), minimum_tokens=100)), 0)
        assert len(list(cache.glob("*.partial/finished/train*.bin"))) > 1
    prepare_books(books, cache, minimum_tokens=100)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    files = sorted(file.name for file in (folder / "train").glob("*.bin"))
    assert files == [f"tokens-{number:05}.bin" for number in range(len(files))] and len(files) > 2
    corpus, moved = Corpus(folder), tmp_path / "moved"
    folder.rename(moved)
    assert corpus.contents == whole.contents
    for name, expected in whole.splits.items():
        split = Corpus(moved).splits[name]
        assert split.metadata == expected.metadata and split.flat.tolist() == expected.flat.tolist()
        assert split.offsets.tolist() == expected.offsets.tolist() and split.names == expected.names
        split = pickle.loads(pickle.dumps(split))
        for document in range(len(split)):
            assert split.tokens(document).tolist() == expected.tokens(document).tolist()
        assert split.head(500).tolist() == expected.head(500).tolist()
        assert split.tokens(len(split) - 1).base is not None  # a view of the file
    with pytest.raises(CorpusError, match=r"^data\.path: must hold at most [\d,]+ tokens in train for generated"):
        Corpus(moved).splits["train"].texts  # noqa: B018
    damaged = moved / "train" / files[1]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorpusError, match=rf"^{damaged}: has another content than was written"):
        Corpus(moved)
    damaged.write_bytes(content[:-1])
    with pytest.raises(CorpusError, match=rf"^{damaged}: has {len(content) - 1} bytes instead of {len(content)}$"):
        Corpus(moved)


@pytest.mark.parametrize(
    ("killed_in", "read", "learned"),
    [("load", 1, 1), ("fit", 0, 1), ("encode_all", 0, 0), ("a changed document", 1, 0), ("a changed tokenizer", 0, 1)],
)
def test_what_a_killed_preparation_read_and_learned_is_kept(
    books, cache, tmp_path, monkeypatch, killed_in, read, learned
):
    whole = prepare_books(books, tmp_path / "other", BPE(300))

    def killed() -> None:
        owner = Files if killed_in == "load" else BPE
        name = "encode_all" if "changed" in killed_in else killed_in
        setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        prepare_books(books, cache, BPE(300))

    os.waitpid(forked(killed), 0)
    if "changed" in killed_in:
        pattern = "train.documents/*.arrow" if "document" in killed_in else "learned.json"
        (file,) = cache.glob(f"*.partial/finished/{pattern}")
        file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    counted = {"load": 0, "fit": 0}

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counting(*arguments):
            counted[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counting)

    count(Files, "load")
    count(BPE, "fit")
    corpus = prepare_books(books, cache, BPE(300))
    assert counted == {"load": read, "fit": learned}
    for name in ("tokenizer.json", *(f"{split}/{file}" for split in SPLITS for file in FILES)):
        assert (corpus.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert corpus.splits["train"].names == whole.splits["train"].names
    assert {path.name for path in corpus.folder.iterdir()} == {"metadata.json", "tokenizer.json", *SPLITS}


def test_two_processes_at_once_prepare_one_corpus(books, cache, tmp_path):
    log = tmp_path / "log"

    def prepare_and_write_down() -> None:
        load = Files.load

        def written_down(*arguments):
            with open(log, "a") as file:
                file.write("loaded\n")
            return load(*arguments)

        Files.load = written_down
        content = prepare_books(books, cache, BPE(300)).splits["train"].metadata.content
        with open(log, "a") as file:
            file.write(f"{content}\n")

    processes = [forked(prepare_and_write_down) for _ in range(2)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    first, *contents = log.read_text().splitlines()
    assert first == "loaded" and len(contents) == 2 and len(set(contents)) == 1


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE(300)], ids=["bytes", "bpe"])
def test_odd_texts_come_back(books, cache, tokenizer):
    """Line ends, byte-order marks, NUL, text that spells the special token, and one byte."""
    texts = ["a\r\nb\rc\n", "\ufeffmark", "nul \0 nul", "<|bos|>", "a<|bos|>b <|bos|>", "x", "\n", "\ud7ff\U0010ffff"]
    for number, text in enumerate(texts):
        (books / "train" / f"odd{number}.txt").write_bytes(text.encode())
    corpus = prepare_books(books, cache, tokenizer)
    train = corpus.splits["train"]
    for number, text in enumerate(texts):
        document = train.names.index(f"train/odd{number}.txt")
        tokens = train.tokens(document)
        assert train.text(document) == corpus.tokenizer.decode(tokens[1:]) == text
        assert (tokens == corpus.tokenizer.bos).sum() == 1 and train.bytes[document] == len(text.encode())


def test_what_is_kept_and_dropped_adds_up(books, cache, caplog):
    files = sorted((books / "train").iterdir())
    (books / "train" / "empty.txt").write_text("")
    corpus = prepare_books(books, cache, minimum_tokens=100)
    saved = SplitMetadata(**json.loads((corpus.folder / "metadata.json").read_text())["splits"]["train"])
    assert saved == corpus.splits["train"].metadata
    total = sum(file.stat().st_size for file in files)
    assert saved.dropped_short == 3 and saved.documents + saved.dropped_short == len(files) + 1
    assert saved.dropped_bytes == 37 + 98 and saved.bytes + saved.dropped_bytes == total
    assert saved.tokens + saved.dropped_tokens == total + len(files) + 1
    assert f"train: 3 of 13 documents dropped: shorter than 100 tokens; 138 of {total + 13:,} tokens" in caplog.text


def test_a_corpus_of_an_earlier_version_opens(books, cache):
    corpus = prepare_books(books, cache)
    file = corpus.folder / "metadata.json"
    metadata = json.loads(file.read_text())
    for split in metadata["splits"].values():
        del split["dropped_tokens"], split["dropped_bytes"]
    file.write_text(json.dumps(metadata))
    assert prepare_books(books, cache).splits["train"].metadata.dropped_bytes is None


def test_opening_a_corpus_writes_nothing(books, cache):
    """So a cache that cannot be written serves the corpora that it has."""
    corpus = prepare_books(books, cache)

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}

    before = state()
    assert prepare_books(books, cache).fingerprint == corpus.fingerprint
    assert state() == before


def test_a_source_that_changes_is_prepared_again(books, cache):
    first = prepare_books(books, cache)
    file = books / "train" / "03.txt"
    state, text = file.stat(), file.read_text()
    file.write_text(text.swapcase())
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as many bytes, and the same date
    second = prepare_books(books, cache)
    assert second.fingerprint != first.fingerprint
    assert second.splits["train"].text(second.splits["train"].names.index("train/03.txt")) == text.swapcase()
