"""Each token is a target once, no target crosses a document's end, nothing is dropped."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from data import CorpusError
from data.collation import NO_TARGET, collate
from data.sequences.best_fit import best_fit_decreasing
from data.sequences.packing import Contiguous, pack, weighted

BOS = 0


def split_of_lengths(lengths: list[int]) -> SimpleNamespace:
    """A split whose documents are bos and then numbers that occur nowhere else: a token names its place."""
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(start, start + length) + 1 for start, length in zip(starts, lengths, strict=False)]
    for document in documents:
        document[0] = BOS

    class Documents(SimpleNamespace):
        def __len__(self):
            return len(lengths)

    return Documents(
        lengths=np.array(lengths), total_tokens=sum(lengths), tokens=documents.__getitem__, documents=documents
    )


cases = given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    sequence_length=st.integers(1, 50),
    packing=st.sampled_from(["contiguous", "whole", "best_fit"]),
    seed=st.sampled_from([None, 0, 1]),
)


@cases
def test_every_token_is_a_target_exactly_once_and_never_across_documents(lengths, sequence_length, packing, seed):
    split = split_of_lengths(lengths)
    sequences = pack(packing, split, sequence_length, BOS, seed)
    targets = []
    document_of = {int(token): n for n, document in enumerate(split.documents) for token in document[1:]}
    for index in range(len(sequences)):
        sequence = sequences[index]
        for token, target in zip(sequence["tokens"].tolist(), sequence["targets"].tolist(), strict=True):
            if target != NO_TARGET:
                targets.append(target)
                # the very next token of the same document; a document's first token follows bos
                document = split.documents[document_of[target]]
                assert target == (token + 1 if token != BOS else document[1])
    expected = [token for document in split.documents for token in document[1:].tolist()]
    assert sorted(targets) == expected


@cases
def test_document_and_position_count_from_zero_in_contiguous_runs(lengths, sequence_length, packing, seed):
    split = split_of_lengths(lengths)
    sequences = pack(packing, split, sequence_length, BOS, seed)
    for index in range(len(sequences)):
        sequence = {name: tensor.numpy() for name, tensor in sequences[index].items()}
        assert {len(array) for array in sequence.values()} == {sequence_length}
        assert [sequence[name].dtype.name for name in ("tokens", "targets", "document", "position")] == [
            "int64",
            "int64",
            "int32",
            "int32",
        ]
        document, position = sequence["document"], sequence["position"]
        step = np.diff(document, prepend=0)
        assert document[0] == 0 and set(step) <= {0, 1}
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], sequence_length], strict=True):
            assert position[start:stop].tolist() == list(range(stop - start))
        # a new document begins with bos; so does a run of padding, which asks for nothing. The rest of a document that
        # best_fit cut begins with the last target of its part before.
        begins = {BOS}
        if packing == "best_fit":
            begins |= {int(token) for each in split.documents for token in each[::sequence_length]}
        assert all(sequence["tokens"][start] in begins for start in starts[1:])


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 4000), max_size=40))
def test_best_fit_decreasing_equals_the_rule(sizes):
    """Also where rooms lie in several words: sizes and rooms beyond 1,024."""
    sizes, capacity = np.array(sizes, dtype=np.int64), 4000
    bins = best_fit_decreasing(sizes, capacity, np.arange(len(sizes)))
    rooms: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    assert sorted(capacity - np.bincount(bins, sizes).astype(int)) == sorted(rooms)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    sequence_length=st.integers(1, 50),
    seed=st.sampled_from([None, 0]),
)
def test_best_fit_cuts_only_documents_longer_than_a_sequence(lengths, sequence_length, seed):
    lengths = [*lengths, 2]  # one with a target
    sequences = pack("best_fit", split_of_lengths(lengths), sequence_length, BOS, seed)
    held = [sequences.documents(index) for index in range(len(sequences))]
    for document, length in enumerate(lengths):
        places = [index for index, documents in enumerate(held) if document in documents]
        assert len(places) == -(-(length - 1) // sequence_length)
        if 1 < length <= sequence_length + 1:
            (place,) = places
            pieces = sequences.packed(place).sizes
            assert pieces[held[place].index(document)] == length
    emptiest = sorted(len(sequences.packed(index).tokens) for index in range(len(sequences)))[:2]
    assert len(emptiest) < 2 or sum(emptiest) > sequence_length + 1, "two sequences would fit into one"


def test_best_fit_by_hand(caplog):
    caplog.set_level("INFO")
    sequences = pack("best_fit", split_of_lengths([4, 12, 3, 1, 2]), 6, BOS)
    assert [sequences.documents(index) for index in range(len(sequences))] == [[1], [0, 2], [4], [1]]
    assert sequences[1]["tokens"].tolist() == [0, 2, 3, 4, 0, 18]
    assert sequences[1]["targets"].tolist() == [2, 3, 4, -100, 18, 19]
    assert sequences[3]["targets"].tolist() == [6, 7, 8, 9, 10, 11]
    assert "4 documents in 4 sequences, 16.67% padding; 1 longer than a sequence, and cut" in caplog.text


@pytest.mark.parametrize("packing", ["contiguous", "whole", "best_fit"])
def test_length_weights_repeat_long_documents(packing):
    """Each length up to which a weight holds, and one below it; copies lie in sequences of their own."""
    split = split_of_lengths([3, 9, 10, 11, 19, 20, 21, 64, 2])
    expected = np.repeat(np.arange(9), [1, 1, 2, 2, 2, 5, 5, 5, 1])
    sequences = pack(packing, weighted(split, {20: 5, 10: 2}), 24, BOS, seed=3)
    assert sequences.split.total_tokens == split.lengths[expected].sum()
    held = [sequences.documents(index) for index in range(len(sequences))]
    scored = torch.cat([sequences[index]["targets"] for index in range(len(sequences))])
    tokens = [token for document in expected for token in split.documents[document][1:].tolist()]
    assert sorted(scored[scored != NO_TARGET].tolist()) == sorted(tokens)
    assert {number for documents in held for number in documents} == set(range(9))
    if packing == "best_fit":
        assert all(len(set(documents)) == len(documents) for documents in held)
        assert sum(2 in documents for documents in held) == 2


def test_padding_is_its_own_document_without_targets():
    sequence = pack("whole", split_of_lengths([4]), 6, BOS)[0]
    assert sequence["tokens"].tolist() == [0, 2, 3, 4, 0, 0]
    assert sequence["targets"].tolist() == [2, 3, 4, -100, -100, -100]
    assert sequence["document"].tolist() == [0, 0, 0, 0, 1, 1]
    assert sequence["position"].tolist() == [0, 1, 2, 3, 0, 1]


@settings(max_examples=30)
@cases
def test_without_a_document_mask_a_sequence_is_one_document_with_the_same_targets(
    lengths, sequence_length, packing, seed
):
    split = split_of_lengths(lengths)
    masked = pack(packing, split, sequence_length, BOS, seed)
    crossing = pack(packing, split, sequence_length, BOS, seed, document_mask=False)
    assert len(masked) == len(crossing)
    for index in range(len(masked)):
        one, other = masked[index], crossing[index]
        assert one["tokens"].equal(other["tokens"]) and one["targets"].equal(other["targets"])
        held = len(masked.packed(index).tokens)
        document, position = other["document"].tolist(), other["position"].tolist()
        assert document[:held] == [0] * min(held, sequence_length)
        assert position[:held] == list(range(min(held, sequence_length)))
        padding = max(0, sequence_length - held)
        assert document[held:] == [1] * padding if held else document == [0] * padding
        assert position[held:] == list(range(padding))


def test_the_batch_of_a_loader_is_the_stack_of_its_items():
    """In the process itself and from a worker."""
    sequences = pack("contiguous", split_of_lengths([7, 2, 30, 5, 11]), 16, BOS, seed=1)
    expected = default_collate([sequences[index] for index in range(len(sequences))])
    for workers in (0, 1):
        loader = DataLoader(sequences, len(sequences), collate_fn=collate, num_workers=workers)
        (batch,) = list(loader)
        assert type(batch) is dict and list(batch) == list(expected)
        for name, tensor in expected.items():
            assert batch[name].dtype == tensor.dtype and batch[name].equal(tensor) and batch[name].is_contiguous()


def test_token_arrays_and_tensors_in_one_batch():
    sequences = pack("whole", split_of_lengths([7, 4]), 8, BOS)
    packed, tensors = sequences.packed(0), sequences[1]
    batch = collate([packed, tensors])
    assert all(torch.equal(batch[name], torch.stack([sequences[0][name], tensors[name]])) for name in tensors)


def test_contiguous_by_hand():
    sequences = pack("contiguous", split_of_lengths([3, 2, 4]), 4, BOS)
    assert len(sequences) == 2
    first, second = sequences[0], sequences[1]
    assert first["tokens"].tolist() == [0, 2, 3, 0]
    assert first["targets"].tolist() == [2, 3, -100, 5]
    assert first["document"].tolist() == [0, 0, 0, 1]
    assert second["tokens"].tolist() == [5, 0, 7, 8]
    assert second["targets"].tolist() == [-100, 7, 8, 9]
    assert second["position"].tolist() == [0, 0, 1, 2]


def test_the_seed_orders_documents():
    split = split_of_lengths([10] * 20)
    streams = [[pack("contiguous", split, 199, BOS, seed)[0]["tokens"].tolist()] for seed in (None, 1, 1, 2)]
    assert streams[1] == streams[2] != streams[3] != streams[0]


def test_an_unknown_packing_is_refused():
    with pytest.raises(CorpusError, match=r"^data\.packing=loose: must be contiguous, whole, best_fit$"):
        pack("loose", split_of_lengths([3]), 4, BOS)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12), short=st.integers(1, 12), cuts=st.integers(1, 5))
def test_shorter_sequences_are_cuts_of_the_longer_ones(lengths, short, cuts):
    """Also those behind the last token, which hold no target."""
    split = split_of_lengths(lengths)
    whole = Contiguous(split, short * cuts, BOS, seed=1)
    pieces = Contiguous(split, short, BOS, seed=1, multiple=cuts)
    assert len(pieces) == cuts * len(whole)
    for index in range(len(whole)):
        parts = [pieces[cuts * index + number] for number in range(cuts)]
        for name in ("tokens", "targets"):
            assert torch.cat([part[name] for part in parts]).equal(whole[index][name])
        assert all(part["position"][0] == 0 for part in parts)
        named = {number for part in range(cuts) for number in pieces.documents(cuts * index + part)}
        assert named == set(whole.documents(index))
