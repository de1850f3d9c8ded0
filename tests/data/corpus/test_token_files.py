"""Files of tokens that others prepared are read in place, with their documents."""

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data import BPE, CorpusError, Files, InMemoryDocuments, prepare
from data.baselines import bigram_bits_per_byte, gzip_bits_per_byte
from data.collation import Packed, row_of
from data.corpus import Corpus
from data.in_memory import digest
from data.sequences.packing import pack
from data.sources import GeneratingSource, MixedSource, Mixture, TokenShards
from data.tokenizers import Saved, TokenIds, hugging_face_files
from tests.data.conftest import random_text

TEXTS = [random_text(20 + 17 * number, seed=number) + "é" for number in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    trained, file = BPE(300), tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.fit(TEXTS)
    trained.save(file)
    return Saved(str(file))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder


def encoded(tokenizer, texts, first: bool) -> np.ndarray:
    """The tokens of texts, with the separator before each (`first`) or after it."""
    separator = [tokenizer.bos]
    parts = [[separator, tokenizer.encode(text)] if first else [tokenizer.encode(text), separator] for text in texts]
    return np.concatenate([part for pair in parts for part in pair])


def header(tokens: int, magic: int = 20240520, version: int = 1) -> bytes:
    numbers = np.zeros(256, "<i4")
    numbers[:3] = magic, version, tokens
    return numbers.tobytes()


def nanogpt(folder: Path, tokenizer) -> None:
    encoded(tokenizer, TEXTS[:9], first=False).astype("<u2").tofile(folder / "train.bin")
    encoded(tokenizer, TEXTS[9:], first=False).astype("<u2").tofile(folder / "val.bin")


def llm_c(folder: Path, tokenizer) -> None:
    """Documents go on in the next file."""
    train = encoded(tokenizer, TEXTS[:9], first=True).astype("<u2")
    for number, part in enumerate(np.array_split(train, 4)):
        (folder / f"fineweb_train_{number:06}.bin").write_bytes(header(len(part)) + part.tobytes())
    held_out = encoded(tokenizer, TEXTS[9:], first=True).astype("<u4")
    (folder / "fineweb_val_000000.bin").write_bytes(header(len(held_out), 20240801, 7) + held_out.tobytes())


def olmo(folder: Path, tokenizer) -> None:
    for name, texts in (("train/0", TEXTS[:5]), ("train/1", TEXTS[5:9]), ("validation/0", TEXTS[9:])):
        (folder / name).parent.mkdir(exist_ok=True)
        encoded(tokenizer, texts, first=False).astype("<u4").tofile(folder / f"{name}.npy")


def numpy_files(folder: Path, tokenizer) -> None:
    np.save(folder / "train.npy", encoded(tokenizer, TEXTS[:9], first=True).astype(np.int32))
    np.save(folder / "val.npy", encoded(tokenizer, TEXTS[9:], first=True).astype(np.uint16))


def source(dtype: str = "uint16") -> TokenShards:
    return TokenShards((".bin", ".npy"), dtype)


def opened(shards, tokenizer, dtype: str = "uint16", minimum_tokens: int = 0) -> Corpus:
    return prepare(source(dtype), str(shards), tokenizer, minimum_tokens, shards.parent / "cache", "error")


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


@pytest.fixture
def mixture(shards, tokenizer, books):
    """A mixture of token files, three samples in four, and of books, one."""
    llm_c(shards, tokenizer)
    return Mixture(
        [MixedSource("web", source(), str(shards), 3), MixedSource("books", Files("text"), str(books), 1)],
        tokens_at_a_time=None,
    )


def test_a_mixture_of_token_files_and_texts(mixture, shards, tokenizer, make, books):
    data = make(source=mixture, path=None, tokenizer=tokenizer, sequence_length=32, batch_size=1)
    data.setup()
    alone = opened(shards, tokenizer)
    texts = prepare(Mixture(mixture.sources[1:]), None, tokenizer, 0, shards.parent / "cache", "error")
    for name, split in data.corpus.splits.items():
        assert len(split) == len(alone.splits[name]) + len(texts.splits[name]) and split.folder.name == name
        for document in range(len(split)):
            inside = document - len(alone.splits[name])
            part, index = (alone, document) if inside < 0 else (texts, inside)
            of_part = part.splits[name]
            assert split.tokens(document).tolist() == of_part.tokens(index).tolist()
            assert split.text(document) == of_part.text(index) and split.words[document] == of_part.words[index]
            assert split.names[document] == ("web/" if inside < 0 else "") + of_part.names[index]
            assert split.bytes[document] == of_part.bytes[index]
        assert split.flat.tolist() == [token for n in range(len(split)) for token in split.tokens(n)]
        assert split.lengths.sum() == split.total_tokens == len(split.flat) and split.total_bytes == split.bytes.sum()
        assert 0 < len(split.head(60)) <= 60 and len(split.head(10**9)) == split.total_tokens
        assert (
            pickle.loads(pickle.dumps(split)).tokens(len(split) - 1).tolist() == split.tokens(len(split) - 1).tolist()
        )
    assert 1 < bigram_bits_per_byte(data.corpus, data.corpus.splits["test"]) < 8
    names = [data.document_names(n, n + 1)[0].partition("/")[0] for n in range(40)]
    assert names.count("web") == 30 and names.count("books") == 10
    whole = [batch["tokens"] for batch in islice(data.train_dataloader(), 9)]
    data.advance(4)
    resumed = make(source=mixture, path=None, tokenizer=tokenizer, sequence_length=32, batch_size=1)
    resumed.setup()
    resumed.load_state_dict(data.state_dict())
    assert all(map(torch.equal, [b["tokens"] for b in islice(resumed.train_dataloader(), 5)], whole[4:]))
    stored = data.state_dict()
    stored["contents"] = {**stored["contents"], "test": texts.contents["test"]}
    with pytest.raises(CorpusError, match=r"its test split changed"):
        data.check_unchanged(stored, "a run")


def test_a_mixture_of_token_files_alone_and_what_it_refuses(mixture, shards, tokenizer, tmp_path, books):
    web, _ = mixture.sources
    corpus = prepare(Mixture([web]), None, tokenizer, 0, tmp_path / "cache", "error")
    assert corpus.splits["train"].names[0] == "web/fineweb_train_000000.bin:0"
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: web: data/tokenizer=bpe: must be "):
        prepare(mixture, None, BPE(300), 0, tmp_path / "cache", "error")
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: web: .* files of tokens are for training alone$"):
        InMemoryDocuments.load(mixture, None, tokenizer, "error", "test")
    recall = MixedSource("recall", Generating(), None, 1)
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: must have a source of text for web and recall$"):
        Mixture([web, recall])
    (shards / "fineweb_train_000001.bin").write_bytes(b"\0")
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: web: data\.path: \S+_train_000001\.bin: must hold"):
        prepare(mixture, None, tokenizer, 0, tmp_path / "cache", "error")


class Generating(GeneratingSource):
    """Keeps the documents in which it was asked to generate."""

    def __init__(self):
        self.seen = []

    @property
    def settings(self):
        return {}

    def check(self, path):
        pass

    def identity(self, path, cache=None):
        return {}

    def load(self, path, arrow_cache, bad):
        return {}

    def generate(self, documents, tokenizer, length, generator):
        self.seen.append(documents)
        return row_of(Packed(documents.tokens(0)[:9], [9], length, tokenizer.bos, True))

    def check_length(self, documents, tokenizer, length):
        self.seen.append(documents)


def test_generated_sequences_of_a_mixture_use_its_texts(mixture, tokenizer, make):
    generating = Generating()
    sources = Mixture([*mixture.sources, MixedSource("recall", generating, None, 4)])
    data = make(source=sources, path=None, tokenizer=tokenizer, sequence_length=32, validation_sequences=3)
    data.setup()
    assert len(list(data.val_dataloader())) == 2
    assert {split.folder.name for split in generating.seen} == {"train", "validation"}
    assert {name.partition("/")[0] for split in generating.seen for name in split.names} == {"books"}


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


def test_texts_need_a_tokenizer_of_text(mixture, shards, tokenizer, books, tmp_path):
    ids = TokenIds(300, tokenizer.bos)
    for function, arguments in (
        (prepare, (Files("text"), str(books), ids, 0, tmp_path / "cache", "error")),
        (prepare, (mixture, None, ids, 0, tmp_path / "cache", "error")),
        (InMemoryDocuments.load, (Files("text"), str(books), ids, "error", "test")),
    ):
        with pytest.raises(CorpusError, match=r"data/tokenizer=token_ids: must be a tokenizer of text: only "):
            function(*arguments)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CorpusError, match=r"^data/tokenizer=token_ids: must be bytes, bpe or saved, "):
        hugging_face_files(ids, 1000)
    with pytest.raises(CorpusError, match=r"^data/tokenizer=token_ids: must be a tokenizer\.json to encode"):
        ids.encode("text")
    with pytest.raises(CorpusError, match=r"^data\.tokenizer\.bos=300: must be less than \S+=300$"):
        TokenIds(300, 300)
    with pytest.raises(
        CorpusError, match=r"^data/tokenizer=token_ids: must be the one that wrote .* vocabulary of 200\b"
    ):
        opened(shards, TokenIds(200, tokenizer.bos))
