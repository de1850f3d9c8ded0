"""The corpus of a mixture with files of tokens, and what it needs of its tokenizer."""

import pickle
from itertools import islice

import pytest
import torch

from data import BPE, CorpusError, Files, InMemoryDocuments, prepare
from data.baselines import bigram_bits_per_byte
from data.collation import Packed, row_of
from data.sources import GeneratingSource, MixedSource, Mixture
from data.tokenizers import TokenIds, hugging_face_files
from tests.data.corpus.material import llm_c, opened, source


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
    """A source that records the documents from which it was asked to generate sequences."""

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
