"""Files of tokens that others prepared are read in place, with their documents."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data import CorpusError, Files, prepare
from data.baselines import bigram_bits_per_byte, gzip_bits_per_byte
from data.corpus import Corpus
from data.excerpts import excerpts
from data.in_memory import digest
from data.sequences.packing import pack
from data.sources import MixedSource, Mixture
from data.tokenizers import Bytes, TokenIds
from tests.data.corpus.material import TEXTS, encoded, llm_c, opened, source


def nanogpt(folder: Path, tokenizer) -> None:
    encoded(tokenizer, TEXTS[:9], first=False).astype("<u2").tofile(folder / "train.bin")
    encoded(tokenizer, TEXTS[9:], first=False).astype("<u2").tofile(folder / "val.bin")


def olmo(folder: Path, tokenizer) -> None:
    for name, texts in (("train/0", TEXTS[:5]), ("train/1", TEXTS[5:9]), ("validation/0", TEXTS[9:])):
        (folder / name).parent.mkdir(exist_ok=True)
        encoded(tokenizer, texts, first=False).astype("<u4").tofile(folder / f"{name}.npy")


def numpy_files(folder: Path, tokenizer) -> None:
    np.save(folder / "train.npy", encoded(tokenizer, TEXTS[:9], first=True).astype(np.int32))
    np.save(folder / "val.npy", encoded(tokenizer, TEXTS[9:], first=True).astype(np.uint16))


@pytest.mark.parametrize(
    ("write", "dtype"), [(nanogpt, "uint16"), (llm_c, "uint16"), (olmo, "uint32"), (numpy_files, "uint16")]
)
def test_every_format_gives_its_documents(shards, tokenizer, write, dtype):
    write(shards, tokenizer)
    corpus = opened(shards, tokenizer, dtype)
    assert list(corpus.splits) == ["train", "validation", "test"]  # the order of the table
    first_has_none = write in (nanogpt, olmo)  # of the first document of a split, the separator is missing
    for split, texts in (("train", TEXTS[:9]), ("validation", TEXTS[9:]), ("test", TEXTS[9:])):
        found = corpus.splits[split]
        assert len(found) == len(texts)
        for document, text in enumerate(texts):
            tokens = tokenizer.encode(text).tolist()
            if document or not first_has_none:
                tokens = [tokenizer.bos, *tokens]
            assert found.tokens(document).tolist() == tokens
            assert found.text(document) == tokenizer.decode(tokens[1:])
            assert found.bytes[document] == len(found.text(document).encode("utf-8", "replace"))
            assert found.lengths[document] == len(tokens)
        assert found.flat.tolist() == [token for each in range(len(found)) for token in found.tokens(each)]
        assert found.head(50).tolist() == found.flat[:50].tolist()
        assert found.total_tokens == len(found.flat) and found.total_bytes == found.bytes.sum()
        assert pickle.loads(pickle.dumps(found)).tokens(1).tolist() == found.tokens(1).tolist()
    trailing = 1 if first_has_none else 0  # a separator at the end of a stream begins an empty document
    assert corpus.splits["validation"].metadata.dropped_short == trailing
    assert not list(corpus.folder.rglob("tokens.bin"))
    assert isinstance(corpus.splits["train"].tokens(0).base, np.ndarray)  # a view of the file
    assert opened(shards, tokenizer, dtype).contents == corpus.contents


def test_documents_are_packed_and_scored(shards, tokenizer):
    llm_c(shards, tokenizer)
    corpus = opened(shards, tokenizer)
    train, held_out = corpus.splits["train"], corpus.splits["validation"]
    sequences = pack("contiguous", train, 32, tokenizer.bos)
    targets = np.concatenate([sequences[index]["targets"].numpy() for index in range(len(sequences))])
    assert targets[targets >= 0].tolist() == [each for n in range(9) for each in tokenizer.encode(TEXTS[n])]
    assert train.names[0] == "fineweb_train_000000.bin:0" and len(set(train.names)) == 9
    assert {name.partition(":")[0] for name in train.names} >= {f"fineweb_train_00000{n}.bin" for n in (0, 2, 3)}
    assert held_out.words == [len(text.split()) for text in TEXTS[9:]]
    assert 1 < bigram_bits_per_byte(corpus, held_out) < 8 and gzip_bits_per_byte(held_out) > 1


@pytest.mark.parametrize("alone", [True, False])
def test_gzip_compresses_the_bytes_of_documents_that_are_not_utf8(shards, books, alone):
    """Their text has U+FFFD instead, three bytes for each byte of random ones, which gzip compresses well."""
    generator, tokenizer, web = np.random.default_rng(0), Bytes(), source()
    documents = {name: generator.integers(128, 256, (2, 3000)) for name in ("train", "val")}
    for name, own in documents.items():
        np.insert(own, 0, tokenizer.bos, axis=1).ravel().astype("<u2").tofile(shards / f"{name}.bin")
    if not alone:
        web = Mixture([MixedSource("web", web, str(shards), 1), MixedSource("books", Files("text"), str(books), 1)])
    path = str(shards) if alone else None
    held_out = prepare(web, path, tokenizer, 0, shards.parent / "cache", "error").splits["validation"]
    raw = [held_out.raw(number) for number in range(len(held_out))]
    assert raw[:2] == [bytes(own.tolist()) for own in documents["val"]]
    assert "".join(map(held_out.text, range(2))).encode() != b"".join(raw[:2])
    expected = 8 * sum(len(gzip.compress(each, 9)) for each in raw) / sum(map(len, raw))
    assert gzip_bits_per_byte(held_out) == pytest.approx(expected, rel=1e-12)
    assert not alone or 7 < expected < 8
    cut = excerpts(held_out, 2000, tokenizer)
    assert [cut.raw(n) for n in range(2)] == [each[: cut.bytes[n]] for n, each in enumerate(raw[:2])]


def test_a_hash_of_each_document_decides_without_names(shards, tokenizer):
    texts = [f"document {number}" for number in range(300)]
    for name, part in (("a", texts[:150]), ("b", texts[150:] + texts[:20])):
        encoded(tokenizer, part, first=True).astype("<u2").tofile(shards / f"{name}.bin")
    corpus = opened(shards, tokenizer)
    documents = {name: [split.text(n) for n in range(len(split))] for name, split in corpus.splits.items()}
    assert sorted(text for each in documents.values() for text in each) == sorted(texts + texts[:20])
    assert all(5 <= len(documents[name]) <= 40 for name in ("validation", "test"))
    assert not set(documents["train"]) & set(documents["validation"]) and len(set(corpus.contents.values())) == 3


def test_short_documents_are_dropped_and_counted(shards, tokenizer):
    llm_c(shards, tokenizer)
    whole = opened(shards, tokenizer).splits["train"]
    limit = int(whole.lengths[3])
    train = opened(shards, tokenizer, minimum_tokens=limit).splits["train"]
    assert [train.text(document) for document in range(len(train))] == TEXTS[3:9]
    dropped = train.metadata.dropped_short, train.metadata.dropped_tokens, train.metadata.dropped_bytes
    assert dropped == (3, whole.lengths[:3].sum(), sum(len(text.encode()) for text in TEXTS[:3]))


def test_documents_are_looked_for_once_unless_a_file_changes(shards, tokenizer, monkeypatch, caplog):
    nanogpt(shards, tokenizer)
    first = opened(shards, tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr("data.preparation.shard_index.write", lambda *_: pytest.fail("looked for again"))
        assert opened(shards, tokenizer).fingerprint == first.fingerprint
    tokens = np.fromfile(shards / "train.bin", "<u2")
    tokens[3] = tokenizer.bos
    tokens.tofile(shards / "train.bin")
    second = opened(shards, tokenizer)
    assert second.contents["train"] != first.contents["train"] and len(second.splits["train"]) == 10
    assert second.contents["validation"] == first.contents["validation"]


def cut(shards, tokenizer):
    file = shards / "fineweb_train_000001.bin"
    file.write_bytes(file.read_bytes()[:-2])


def too_large(shards, tokenizer):
    np.array([7, tokenizer.vocabulary, 7], "<u2").tofile(shards / "fineweb_train_9.bin")


def negative(shards, tokenizer):
    np.save(shards / "train.npy", np.array([7, -1, 7], np.int32))


def other_dtype(shards, tokenizer):
    np.arange(99, dtype="<u4").tofile(shards / "train.bin")


def two_dimensions(shards, tokenizer):
    np.save(shards / "train.npy", np.zeros((2, 2), np.uint16))


def half_a_token(shards, tokenizer):
    (shards / "train.bin").write_bytes(b"\1\0\2")


def without_a_split(shards, tokenizer):
    np.arange(9, dtype="<u2").tofile(shards / "more.bin")


def compressed(shards, tokenizer):
    (shards / "train.bin.gz").write_bytes(b"")


def no_validation(shards, tokenizer):
    (shards / "fineweb_val_000000.bin").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"^data\.path: \S+_train_000001\.bin: must hold [\d,]+ tokens of uint16, and has [\d,]+ bytes$"),
        (too_large, r"^data\.tokenizer\.path=.*: must be .*fineweb_train_9\.bin: token 300 is beyond .* 300\b[^\n]*$"),
        (negative, r"^data\.tokenizer\.path=.*: must be .*train\.npy: token -1 "),
        (other_dtype, r"^data\.source\.dtype=uint16: must be the one of \S+train\.bin, .* uint32$"),
        (two_dimensions, r"^data\.path: \S+train\.npy: must be an array of one dimension"),
        (half_a_token, r"^data\.path: \S+train\.bin: must hold a whole number of tokens of uint16, and has 3 bytes$"),
        (without_a_split, r"^data\.path=\S+: must hold files that all have train, .* more\.bin has none"),
        (compressed, r"^data\.path=\S+: must hold files that are not compressed, and holds \S+train\.bin\.gz$"),
        (no_validation, r"^data\.path=\S+: must hold a train and a validation split, and holds train$"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(shards, tokenizer, change, message):
    llm_c(shards, tokenizer)
    change(shards, tokenizer)
    with pytest.raises(CorpusError, match=message):
        opened(shards, tokenizer)
    assert not [path for path in (shards.parent / "cache").glob("*") if path.is_dir()]


def test_the_index_has_its_digest_and_its_paths(shards, tokenizer, caplog):
    nanogpt(shards, tokenizer)
    corpus = opened(shards, tokenizer)
    metadata = json.loads((corpus.folder / "metadata.json").read_text())
    assert {Path(each["path"]).name for each in metadata["shards"]["train"]} == {"train.bin"}
    offsets = corpus.folder / "train" / "starts.npy"
    offsets.write_bytes(offsets.read_bytes()[:-1] + b"\1")
    with pytest.raises(CorpusError, match=rf"^{offsets}: has another content"):
        Corpus(corpus.folder)
    assert opened(shards, tokenizer).splits["train"].starts[0] == 0 and "prepared again" in caplog.text


def test_token_files_without_a_tokenizer_have_tokens_and_no_bytes(shards, tokenizer):
    llm_c(shards, tokenizer)
    known, corpus = opened(shards, tokenizer), opened(shards, TokenIds(300, tokenizer.bos))
    corpus = Corpus(corpus.folder)
    assert isinstance(corpus.tokenizer, TokenIds) and corpus.tokenizer.vocabulary == 300
    assert corpus.contents == known.contents and corpus.fingerprint != known.fingerprint
    train, held_out = corpus.splits["train"], corpus.splits["validation"]
    assert train.flat.tolist() == known.splits["train"].flat.tolist()
    assert train.offsets.tolist() == known.splits["train"].offsets.tolist()
    assert train.total_bytes == 0 and train.words == [0] * 9 and corpus.tokenizer.token_bytes.tolist() == [0] * 300
    assert digest(train) != digest(held_out) != digest(known.splits["validation"])
    table = corpus.report()
    cells = {column.header: list(column.cells) for column in table.columns}
    assert "tokens" in cells and not cells.keys() & {"MB", "bytes/token"}
    with pytest.raises(CorpusError, match=r"^data/tokenizer=token_ids: must be a tokenizer\.json to decode"):
        opened(shards, TokenIds(300, tokenizer.bos)).splits["train"].text(0)
