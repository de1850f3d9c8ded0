"""Excerpts: which text a limit leaves, and that it is the same for every tokenizer."""

import numpy as np
import pytest

from data.excerpts import SMALLEST, Excerpts, default_limit, excerpts, within_limit
from data.in_memory import InMemoryDocuments, digest
from data.tokenizers import BPE, Bytes


def documents(texts: list[str], tokenizer=None) -> InMemoryDocuments:
    return InMemoryDocuments([{"name": f"{n}.txt", "text": text} for n, text in enumerate(texts)], tokenizer or Bytes())


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([10, 20, 30], 60, [10, 20, 30]),  # all of it
        ([10, 20, 30], 45, [10, 17, 17]),  # cut to the same size, as large as they fit
        ([30, 10, 20], 45, [17, 10, 17]),
        ([10, 20, 30], 59, [10, 20, 29]),
        ([1000], 64, [64]),  # a genome
    ],
)
def test_documents_are_cut_to_the_largest_size_with_which_all_fit(sizes, limit, expected):
    found = within_limit(np.array(sizes), limit)
    assert [found.get(number, 0) for number in range(len(sizes))] == expected


def test_of_many_documents_some_are_drawn_with_a_sixteenth_each():
    sizes = np.full(1000, 500)
    sizes[::2] = 40
    found = within_limit(sizes, 1600)
    assert set(found.values()) == {40, 100} and 1500 < sum(found.values()) <= 1600
    assert list(found) == sorted(found) and max(found) > 500, "drawn from all, in their order"
    assert found == within_limit(sizes, 1600)
    long = within_limit(np.full(1000, 10**6), 1600)
    assert len(long) == 16 and set(long.values()) == {100}


def test_the_text_is_the_same_for_every_tokenizer_and_its_tokens_are_those_of_that_text():
    texts = ["über " * 40, "short", "a river under the stones " * 20]
    bpe = BPE(300)
    bpe.fit(texts)
    ours, theirs = (excerpts(documents(texts, each), 301, each) for each in (Bytes(), bpe))
    assert digest(ours) == digest(theirs) != digest(documents(texts))
    assert ours.names == theirs.names == ["0.txt", "1.txt", "2.txt"] and ours.bytes == theirs.bytes == [148, 5, 148]
    for found, tokenizer in ((ours, Bytes()), (theirs, bpe)):
        alone = documents([found.text(number) for number in range(3)], tokenizer)
        assert found.words == alone.words and found.total_bytes == alone.total_bytes
        assert np.array_equal(found.flat, alone.flat)
        assert [len(found.tokens(number)) for number in range(3)] == [len(alone.tokens(number)) for number in range(3)]


def test_a_character_is_not_cut():
    found = Excerpts(documents(["aüü"]), {0: 4}, Bytes())
    assert found.text(0) == "aü" and found.bytes == [3]


CUT_OWLS = 40 * [*"🦉".encode()[:3], 32, 32]
"""As many bytes as its text has, in which U+FFFD, of three bytes, stands for the first three of each owl."""


@pytest.mark.parametrize("contents", [np.arange(200, 250).repeat(4).tolist(), CUT_OWLS], ids=["any", "as long"])
def test_tokens_that_are_not_utf8_are_kept(contents):
    class Files:
        names, bytes, total_bytes, own = ["a"], [200], 200, np.r_[256, contents]
        tokens = lambda self, document: self.own  # noqa: E731
        text = lambda self, document: Bytes().decode(self.own[1:])  # noqa: E731
        raw = lambda self, document: bytes(self.own[1:].tolist())  # noqa: E731
        __len__ = lambda self: 1  # noqa: E731

    found = excerpts(Files(), 50, Bytes())
    assert found.tokens(0).tolist() == Files.own[:51].tolist()
    assert found.bytes == [50] and found.text(0) == Bytes().decode(Files.own[1:51])
    assert found.raw(0) == bytes(contents[:50])


def test_tokens_without_text_are_limited_by_number():
    class Tokens:
        names, bytes, total_bytes = ["a", "b"], [0, 0], 0
        tokens = staticmethod(lambda document: np.arange(101 if document else 11))
        __len__ = lambda self: 2  # noqa: E731

    found = excerpts(Tokens(), 50, Bytes())
    assert [len(found.tokens(document)) for document in range(2)] == [11, 41], "with bos"
    assert found.bytes == [0, 0] and found.words == [0, 0] and found.total_bytes == 0


def test_each_source_of_a_mixture_has_the_limit():
    texts = ["x" * 100] * 3 + ["y" * 1000]
    rows = [{"name": f"{'books' if n < 3 else 'code'}/{n}", "text": text} for n, text in enumerate(texts)]
    found = excerpts(InMemoryDocuments(rows, Bytes()), 150, Bytes(), ["books", "code"])
    assert found.bytes == [50, 50, 50, 150]


def test_what_is_within_the_limit_stays_and_what_is_not_is_logged(caplog):
    own = documents(["x" * 100, "y" * 10])
    with caplog.at_level("INFO"):
        assert excerpts(own, 110, Bytes()) is own and not caplog.messages
        excerpts(own, 30, Bytes())
    assert caplog.messages == [
        "evaluation.limit=30: 2 of 2 documents are scored, at most their first 20 bytes: 30 of 110 bytes; null scores"
        " everything"
    ]


def test_the_default_grows_with_the_sequences():
    assert default_limit(4096) == default_limit(8192) == SMALLEST == 1_048_576
    assert default_limit(65536) == 8 * SMALLEST
