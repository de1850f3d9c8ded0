"""Training draws from each source its exact share, in an order that resumes exactly; validation keeps sources apart."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import CorpusError, Files
from data.collation import NO_TARGET
from data.ordering.mixed_sampler import MixedSampler
from data.ordering.sampler import Phase
from data.sources import MixedSource, Mixture
from tests.data.conftest import random_text
from tests.data.sources.rows import STRICT, by_name

WEIGHTS = {"books": 3, "notes": 1}


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    for split, count in (("train", 3), ("valid", 2)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            (folder / split / f"{number}.txt").write_text(random_text(150 + 97 * number, 1000 + number + 7 * count))
    return folder


@pytest.fixture
def mixture(books, notes):
    def build(books_weight: float = 0.75, notes_weight: float = 0.25, **settings) -> Mixture:
        parts = {"books": (books, books_weight), "notes": (notes, notes_weight)}
        return Mixture(
            [MixedSource(name, Files("text"), str(path), w) for name, (path, w) in parts.items()], **settings
        )

    return build


@pytest.fixture
def mixed(make, mixture):
    """mixed(...) -> a DataModule on three samples of books for each one of notes, set up."""

    def build(**changes):
        data = make(**(dict(source=mixture(), path=None) | changes))
        data.setup()
        return data

    return build


class Numbered:
    """As MixedSequences, with the numbers of sequences as its items."""

    weights = WEIGHTS
    at_a_time = 1
    starts = torch.tensor([0, 10, 13]).numpy()

    def __len__(self):
        return 13

    def __getitem__(self, index):
        return index


ONE = (Phase(0, 1),)


def sampler(cursor=0, seed=0, rank=0, world_size=1, phases=ONE) -> MixedSampler:
    return MixedSampler(Numbered(), seed, 25, lambda: cursor, rank, world_size, phases)


def test_every_block_has_the_exact_shares_and_every_pass_the_whole_source():
    samples = list(islice(sampler(), 400))
    for block in range(100):
        assert sum(index < 10 for index in samples[4 * block : 4 * block + 4]) == 3
    orders = {tuple(index < 10 for index in samples[4 * block : 4 * block + 4]) for block in range(100)}
    assert len(orders) == 4
    for source in (set(range(10)), set(range(10, 13))):
        own = [index for index in samples if index in source]
        passes = [own[start : start + len(source)] for start in range(0, len(own) - len(source) + 1, len(source))]
        assert all(set(one) == source for one in passes)
        assert len(set(map(tuple, passes))) > 1
        number, first = (0, 0) if 0 in source else (1, 10)
        numpys = np.random.default_rng((0, number + 1, 2)).permutation(len(source))
        assert passes[2] == (first + numpys).tolist(), "as earlier versions read"
    assert samples != list(islice(sampler(seed=1), 400))


@pytest.mark.parametrize("cursor", [0, 1, 4, 13, 39, 40, 101])
def test_it_resumes_at_any_sample_on_any_number_of_ranks(cursor):
    whole = list(islice(sampler(), cursor + 60))[cursor:]
    assert list(islice(sampler(cursor), 60)) == whole
    ranks = [list(islice(sampler(cursor, rank=rank, world_size=3), 20)) for rank in range(3)]
    assert [ranks[i % 3][i // 3] for i in range(60)] == whole
    assert [sampler().at(cursor + n) for n in range(60)] == whole


def test_phases_of_shorter_samples_read_the_same_sequences():
    whole = list(islice(sampler(), 40))
    phases = (Phase(0, 2), Phase(26, 1))
    growing = list(islice(sampler(phases=phases), 52 + 14))
    assert sorted(index // 2 for index in growing[:52]) == sorted(whole[:26] * 2)
    assert sorted(growing[:26]) != sorted(growing[26:52])  # two passes of 13 sequences, each shuffled apart
    assert [index - 26 for index in growing[52:]] == whole[26:]


def test_several_samples_at_a_time_are_of_one_source():
    class InFives(Numbered):
        at_a_time = 5

    grouped = list(islice(MixedSampler(InFives(), 0, 25, lambda: 0, 0, 1), 400))
    alone = list(islice(sampler(), 400))
    for source in (range(10), range(10, 13)):  # each source's samples in the order that they have anyway
        own = [index for index in grouped if index in source]
        assert own == [index for index in alone if index in source][: len(own)]
    for start in range(0, 400, 20):
        fives = [{index < 10 for index in grouped[place : place + 5]} for place in range(start, start + 20, 5)]
        assert sorted(fives, key=str) == [{False}, {True}, {True}, {True}]
    assert list(islice(MixedSampler(InFives(), 0, 25, lambda: 33, 0, 1), 60)) == grouped[33:93]


def test_a_corpus_of_all_documents_with_the_splits_of_their_sources(mixture, books, notes, tmp_path):
    loaded = mixture().load(None, tmp_path / "arrow", STRICT)
    expected = {
        f"{name}/{document}": text
        for name, path in (("books", books), ("notes", notes))
        for document, text in by_name(Files("text").load(str(path), tmp_path / name, STRICT)).items()
    }
    assert by_name(loaded) == expected
    assert Counter(name.partition("/")[0] for name in loaded["train"]["name"]) == {"books": 12, "notes": 3}
    # Both advance at an even rate: a tokenizer that learns from the first documents learns from both.
    assert [n for n, name in enumerate(loaded["train"]["name"]) if name.startswith("notes")] == [4, 9, 14]


def test_batches_of_one_source_each_in_their_share(mixed):
    data = mixed(batch_size=1)
    (train,) = data.train_dataloader().dataset.datasets
    names = [data.document_names(n, n + 1) for n in range(80)]
    assert all(len({name.partition("/")[0] for name in each}) == 1 for each in names)
    assert Counter(each[0].partition("/")[0] for each in names) == {"books": 60, "notes": 20}
    batches = islice(data.train_dataloader(), 8)
    expected = [train[MixedSampler(train, 7, 0, lambda: 0, 0, 1).at(n)]["tokens"] for n in range(8)]
    assert all(torch.equal(batch["tokens"][0], tokens) for batch, tokens in zip(batches, expected, strict=True))
    assert "source" not in train[0]
    others = mixed(batch_size=3, workers=1).train_dataloader()
    rows = torch.cat([batch["tokens"] for batch in islice(others, 3)])
    assert torch.equal(rows[:8], torch.stack(expected)), "workers and the batch size change no order"
    crossing = mixed(document_mask=False).train_dataloader()
    assert not any((batch["document"] * (batch["targets"] != NO_TARGET)).any() for batch in islice(crossing, 8))


def test_a_mixture_of_best_fit_sequences_resumes_on_any_number_of_ranks(mixed):
    settings = dict(packing="best_fit", length_weights={200: 2})
    data = mixed(**settings)
    whole = torch.cat([batch["tokens"] for batch in islice(data.train_dataloader(), 12)])
    data.advance(5)
    ranks = []
    for rank in range(2):
        resumed = mixed(batch_size=1, **settings)
        resumed.load_state_dict(data.state_dict())
        resumed.trainer = SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=1, max_steps=60)
        ranks.append([batch["tokens"] for batch in islice(resumed.train_dataloader(), 9)])
    assert torch.equal(torch.cat([tokens for pair in zip(*ranks, strict=True) for tokens in pair]), whole[5:23])
    names = [data.document_names(n, n + 1) for n in range(40)]
    assert all(len({name.partition("/")[0] for name in each}) == 1 for each in names)


def test_a_run_packs_each_split_of_each_source_once(mixed, caplog):
    caplog.set_level("INFO")
    data = mixed(packing="best_fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        next(iter(loader))
    assert data.state_dict() and data.document_names(0, 1)
    assert caplog.text.count("data.packing=best_fit: ") == 2 * len(data.corpus.splits)


def test_a_resumed_loader_reads_on_and_other_weights_are_refused(mixed, mixture):
    data = mixed()
    whole = [batch["tokens"] for batch in islice(data.train_dataloader(), 12)]
    for _ in range(5):
        data.advance(2)
    state = data.state_dict()
    resumed = mixed()
    resumed.load_state_dict(state)
    assert all(map(torch.equal, [b["tokens"] for b in islice(resumed.train_dataloader(), 7)], whole[5:]))
    in_a_row = [batch["tokens"] for batch in islice(mixed(source=mixture(tokens_at_a_time=128)).train_dataloader(), 12)]
    assert sum(map(torch.equal, in_a_row, whole)) < 12
    other = mixed(source=mixture(0.5, 0.5))
    assert other.corpus.fingerprint == data.corpus.fingerprint  # weights change no document
    other.load_state_dict(state)
    with pytest.raises(CorpusError, match=r"the weights of data\.source\.sources: must be those of the checkpoint"):
        other.train_dataloader()


def test_validation_has_as_many_sequences_of_each_source(mixed):
    whole = mixed().val_dataloader().dataset
    few = mixed(validation_sequences=4, batch_size=4).val_dataloader()
    (batch,) = list(few)
    assert batch["source"].shape == batch["tokens"].shape
    assert batch["source"][:, 0].tolist() == [0, 0, 1, 1] and batch["source"].unique().tolist() == [0, 1]
    for index in range(len(whole)):
        name = mixed().corpus.splits["validation"].names[whole.documents(index)[0]]
        assert name.startswith(["books/", "notes/"][whole[index]["source"][0]])


def test_wrong_mixtures(mixture, books, tmp_path, mixed):
    part = MixedSource("books", Files("text"), str(books), 1)
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: must have different names, and 2 are books$"):
        Mixture([part, part])
    assert mixture(0.3333, 0.6667).weights == {"books": 3333, "notes": 6667}
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: must have weights .* and has 33331:66669$"):
        mixture(0.33331, 0.66669)
    with pytest.raises(CorpusError, match=r"^data\.path=x: must be null"):
        mixture().check("x")
    missing = Mixture([part, MixedSource("gone", Files("text"), str(tmp_path / "gone"), 1)])
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: gone: data\.path=\S+/gone: must be "):
        missing.check_settings(None, "error")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text("a document alone")
    few = Mixture([part, MixedSource("few", Files("text"), str(tmp_path / "few"), 1)])
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: few: must hold documents of every split"):
        few.load(None, tmp_path / "arrow", STRICT)
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: books: must have a document .* validation split$"):
        mixed(minimum_tokens=200)
