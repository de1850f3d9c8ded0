"""A corpus is prepared once, completely or not at all, and its documents come back exactly."""

import errno
import json
import logging
import os
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest

from data import BPE, CorpusError, Files, InMemoryDocuments
from data.baselines import bigram_bits_per_byte, gzip_bits_per_byte
from data.corpus import Corpus
from data.in_memory import count_copies
from data.preparation import prepare
from data.tokenizers import Bytes, Saved
from tests.commands import ROOT


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def prepare_books(books, cache, tokenizer=None, minimum_tokens=0):
    return prepare(Files("text"), str(books), tokenizer or Bytes(), minimum_tokens, cache, "error")


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE(vocabulary=300)], ids=["bytes", "bpe"])
def test_everything_comes_back(books, cache, tokenizer):
    corpus = prepare_books(books, cache, tokenizer)
    for split, folder in (("train", "train"), ("validation", "valid"), ("test", "valid")):
        found = corpus.splits[split]
        files = sorted((books / folder).iterdir())
        assert found.names == [f"{folder}/{file.name}" for file in files]
        for document, file in enumerate(files):
            text, tokens = file.read_text(), found.tokens(document)
            assert found.text(document) == text
            assert tokens[0] == corpus.tokenizer.bos and tokens.dtype == np.uint16
            assert corpus.tokenizer.decode(tokens[1:]) == text
            assert found.bytes[document] == len(text.encode()) == corpus.tokenizer.token_bytes[tokens].sum()
        assert len(found) == len(files)
        assert found.total_tokens == sum(found.lengths) == len(found.flat)
        assert found.total_bytes == sum(found.bytes)
        assert found.words == [len(found.text(document).split()) for document in range(len(found))]
        copy = pickle.loads(pickle.dumps(found))
        assert copy.tokens(1).tolist() == found.tokens(1).tolist()
    assert len(pickle.dumps(corpus.splits["train"])) < 1000  # workers open the file, they are not sent it


def test_documents_that_were_trained_on_are_counted(books, cache):
    trained = prepare_books(books, cache).splits["train"]
    texts = [trained.text(3), trained.text(3)[:-1] + "~", trained.text(3) + "~", trained.text(5), "~"]
    own = InMemoryDocuments([{"name": text, "text": text} for text in texts], Bytes())
    assert count_copies(own, trained) == 2


def test_counting_copies_reads_each_training_document_once_at_most():
    """Documents of one length are hashed, and not compared in pairs."""
    texts = [f"{number:05d}" for number in range(3000)]
    trained, own = (
        InMemoryDocuments([{"name": text, "text": text} for text in each], Bytes())
        for each in ([*texts, "another length"], [*texts[::2], *texts[:4:2], "other"])
    )
    trained.lengths, trained.bytes = np.full(3001, 6), np.full(3001, 5)
    trained.lengths[-1], trained.bytes[-1] = 15, 14
    read, tokens = [], trained.tokens
    trained.tokens = lambda document: read.append(document) or tokens(document)
    assert count_copies(own, trained) == 1502
    assert read == list(range(3000))


def test_a_large_vocabulary_takes_four_bytes_a_token(books, cache, tmp_path):
    small = BPE(vocabulary=300)
    small.fit(["some text"])
    small.save(tmp_path / "small.json")
    settings = json.loads((tmp_path / "small.json").read_text())
    settings["model"]["vocab"] |= {f"never{number}": 300 + number for number in range(70_000)}
    (tmp_path / "large.json").write_text(json.dumps(settings))
    corpus = prepare_books(books, cache, Saved(str(tmp_path / "large.json")))
    assert corpus.splits["train"].flat.dtype == np.uint32
    assert corpus.tokenizer.decode(corpus.splits["train"].tokens(0)[1:]) == corpus.splits["train"].text(0)


@pytest.mark.parametrize("section", [1 << 20, 50], ids=["documents", "sections"])
def test_many_processes_write_the_same(books, cache, tmp_path, monkeypatch, section):
    one = prepare_books(books, cache, BPE(vocabulary=300), minimum_tokens=60)
    monkeypatch.setattr("data.preparation.encoding.PARALLEL_BYTES", 1)
    monkeypatch.setattr("data.preparation.encoding.SECTION", section)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    many = prepare_books(books, tmp_path / "other", BPE(vocabulary=300), minimum_tokens=60)
    for split in ("train", "validation"):
        assert many.splits[split].metadata == one.splits[split].metadata
        assert many.splits[split].names == one.splits[split].names
        assert many.splits[split].offsets.tolist() == one.splits[split].offsets.tolist()
        assert many.splits[split].bytes.tolist() == one.splits[split].bytes.tolist()


def test_a_second_launch_only_opens(books, cache, caplog, monkeypatch):
    first = prepare_books(books, cache, BPE(vocabulary=300))

    def load(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(Files, "load", load)
    again = prepare_books(books, cache, BPE(vocabulary=300))
    assert again.fingerprint == first.fingerprint
    assert {part.name for part in cache.iterdir()} == {first.fingerprint, f"{first.fingerprint}.lock"}
    assert not (cache / first.fingerprint / "arrow").exists()


def test_opening_imports_neither_datasets_nor_torch(books, cache):
    prepare_books(books, cache)
    program = (
        "import sys, data; assert not {'torch', 'datasets', 'lightning', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "from pathlib import Path; from data.tokenizers import Bytes; from data.preparation import prepare\n"
        "corpus = prepare(data.Files('text'), sys.argv[1], Bytes(), 0, Path(sys.argv[2]), 'error')\n"
        "assert not {'torch', 'datasets', 'lightning'} & set(sys.modules); print(corpus.splits['train'].tokens(0)[0])"
    )
    run = subprocess.run([sys.executable, "-c", program, books, cache], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "256", run.stderr


def test_other_settings_are_another_corpus(books, cache):
    corpora = [
        prepare_books(books, cache),
        prepare_books(books, cache, minimum_tokens=100),
        prepare_books(books, cache, BPE(vocabulary=300)),
        prepare_books(books, cache, BPE(vocabulary=301)),
    ]
    (books / "train" / "new.txt").write_text("another document")
    corpora.append(prepare_books(books, cache))
    assert len({corpus.fingerprint for corpus in corpora}) == 5


@pytest.mark.parametrize("file", ["train/tokens.bin", "test/offsets.npy", "metadata.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_corpus_is_made_again(books, cache, caplog, file, damage):
    corpus = prepare_books(books, cache)
    content = corpus.splits["train"].metadata.content
    path = corpus.folder / file
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    again = prepare_books(books, cache)
    assert "the corpus is prepared again" in caplog.text
    assert again.splits["train"].metadata.content == content
    assert len(again.splits["train"].flat) == again.splits["train"].total_tokens


@pytest.mark.parametrize(
    ("file", "earlier"),
    [
        ("train/tokens.bin", False),
        ("validation/offsets.npy", False),
        ("test/bytes.npy", False),
        ("tokenizer.json", False),
        ("train/tokens.bin", True),
    ],
)
def test_a_corpus_whose_bytes_changed_is_named_and_made_again(books, cache, caplog, file, earlier):
    """Metadata of earlier versions have the digest of the tokens alone."""
    corpus = prepare_books(books, cache)
    path = corpus.folder / file
    written = path.read_bytes()
    path.write_bytes(written[:-4] + b"\0\1\0\1")
    if earlier:
        metadata = json.loads((corpus.folder / "metadata.json").read_text())
        del metadata["digests"]
        (corpus.folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(CorpusError, match=rf"^{path}: has another content than was written") as error:
        Corpus(corpus.folder)
    assert "\n" not in str(error.value)
    prepare_books(books, cache)
    assert f"{path}: has another content" in caplog.text and "the corpus is prepared again" in caplog.text
    assert path.read_bytes() == written


def test_short_and_empty_documents_are_counted(books, cache, caplog):
    (books / "train" / "empty.txt").write_text("")
    assert len(prepare_books(books, cache).splits["train"]) == 12
    assert "train: 1 of 13 documents dropped: shorter than 2 tokens" in caplog.text
    corpus = prepare_books(books, cache, minimum_tokens=100)
    assert corpus.splits["train"].lengths.min() >= 100
    assert corpus.splits["train"].metadata.dropped_short == 3


def test_copies_of_training_documents_in_other_splits_are_counted(books, cache, caplog):
    prepare_books(books, cache)
    assert "are copies of" not in caplog.text
    (books / "valid" / "copy.txt").write_text((books / "train" / "03.txt").read_text())
    for split in ("train", "valid"):
        (books / split / "empty.txt").write_text("")
    prepare_books(books, cache)
    assert "validation: 1 of 5 documents are copies of training documents" in caplog.text


def test_the_report(books, cache):
    from rich.console import Console

    corpus = prepare_books(books, cache)
    console = Console(width=160, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(corpus.report())
    shown = capture.get()
    for part in (corpus.fingerprint[:12], "validation", f"{corpus.splits['train'].total_tokens:,}", "longest"):
        assert part in shown


def test_empty_corpora(tmp_path, cache):
    def files(name, **texts):
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / f"{file}.txt").write_bytes(text)
        return tmp_path / name

    with pytest.raises(CorpusError, match=rf"^data\.path={tmp_path}/undecodable: must "):
        prepare_books(files("undecodable", a=b"\xff"), cache)
    with pytest.raises(CorpusError, match=rf"^data\.path={tmp_path}/one: must .* split"):
        prepare_books(files("one", a=b"only one document"), cache)
    with pytest.raises(CorpusError, match=r"^data\.minimum_tokens=1000: must be at most 6\b"):
        prepare_books(files("short", **{f"d{n}": b"%05d" % n for n in range(99)}), cache, minimum_tokens=1000)
    with pytest.raises(CorpusError, match=rf"^data\.path={tmp_path}/empty: must "):
        prepare_books(files("empty", **{f"d{n}": b"" for n in range(99)}), cache)
    assert not list(cache.glob("*.part*"))


def test_baselines(books, cache):
    import gzip

    corpus = prepare_books(books, cache)
    split = corpus.splits["validation"]
    compressed = sum(len(gzip.compress(split.text(document).encode(), 9)) for document in range(len(split)))
    assert gzip_bits_per_byte(split) == pytest.approx(8 * compressed / split.total_bytes)
    # 27 letters of nearly independent draws: 26 of weight 1, the space of weight 3, the newline of weight 1
    weights = np.array([1] * 27 + [3]) / 30
    entropy = -(weights * np.log2(weights)).sum()
    assert entropy < bigram_bits_per_byte(corpus, corpus.splits["validation"]) < entropy + 0.5


def test_a_bigram_model_by_hand(tmp_path, cache):
    """Train 'abac', score 'ab', by Witten and Bell's rule on paper."""
    for split, text in (("train", "abac"), ("valid", "ab")):
        (tmp_path / "tiny" / split).mkdir(parents=True)
        (tmp_path / "tiny" / split / "a.txt").write_text(text)
    corpus = prepare_books(tmp_path / "tiny", cache)
    unigram = {"a": (2 + 3 / 257) / (4 + 3), "b": (1 + 3 / 257) / (4 + 3)}  # of 4 tokens, 3 different ones seen
    first = (1 + 1 * unigram["a"]) / (1 + 1)  # a after bos: once of once, one follower
    second = (1 + 2 * unigram["b"]) / (2 + 2)  # b after a: once of twice, two followers
    measured = bigram_bits_per_byte(corpus, corpus.splits["validation"])
    assert measured == pytest.approx(-(np.log2(first) + np.log2(second)) / 2)


def test_preparation_says_what_it_does(books, cache, caplog):
    caplog.set_level(logging.INFO)
    corpus = prepare_books(books, cache)
    assert f"preparing corpus {corpus.fingerprint[:12]}" in caplog.text
    assert "prepared in" in caplog.text and "longest" in caplog.text


@pytest.mark.parametrize("size", [0, 100, 1_000, 3_000])
def test_a_cache_without_room_is_one_line_and_leaves_nothing(books, cache, size):
    """Whichever file meets the limit first: those of `datasets`, the tokens, or the metadata."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(CorpusError, match=rf"data\.cache={cache}: must be ") as error:
            prepare_books(books, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and [file.suffix for file in cache.iterdir()] == [".lock"]
    assert prepare_books(books, cache).splits["train"].total_tokens


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_the_corpus_is_named(books, cache, monkeypatch, number):
    def refuse(self, *_, **__):
        raise RuntimeError("of a library") from OSError(number, os.strerror(number))

    monkeypatch.setattr("data.preparation.corpus_writer.write", refuse)
    with pytest.raises(CorpusError, match=rf"data\.cache={cache}: must be .*: {os.strerror(number)}") as error:
        prepare_books(books, cache)
    assert ("bytes free" in str(error.value)) == (number == errno.ENOSPC)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_plain_file_in_the_caches_place_is_one_line(books, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=rf"data\.cache={tmp_path / place}: must be "):
        prepare_books(books, tmp_path / place)


def test_a_document_that_cannot_be_read_is_no_fault_of_the_cache(books, cache, monkeypatch):
    error = PermissionError(errno.EACCES, "Permission denied", str(books / "train"))
    monkeypatch.setattr("data.preparation.corpus_writer.write", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(PermissionError):
        prepare_books(books, cache)
