"""Retrieval: real documents end to end, a passage of one of them, and the number in its header as the answer."""

import re

import numpy as np
import pytest
import torch

from data import CorpusError
from data.collation import NO_TARGET
from data.recall.haystack import Material
from data.recall.retrieval import distances_that_fit, retrieval
from data.tokenizers import BPE, Bytes

generator = np.random.default_rng(5)
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz "))
DOCUMENTS = ["".join(generator.choice(LETTERS, size)) for size in (400, 30, 90, 700, 55, 250)]


def bpe() -> BPE:
    tokenizer = BPE(vocabulary=300)
    tokenizer.fit(DOCUMENTS)
    return tokenizer


def material_of(tokenizer, documents) -> Material:
    return Material.of(tokenizer, [np.array([tokenizer.bos, *tokenizer.encode(text)]) for text in documents])


@pytest.fixture(scope="module", params=[Bytes, bpe], ids=["bytes", "bpe"])
def material(request) -> Material:
    return material_of(request.param(), DOCUMENTS)


def ask(material, seed=0, **settings):
    """(tokens with the last target, the question's answer as text, tokens of the answer)."""
    batch = retrieval(material, 700, np.random.default_rng(seed), **({"excerpt": 120, "passage": 12} | settings))
    tokens, targets = batch["tokens"][0], batch["targets"][0]
    assert tokens.shape == targets.shape == (700,)
    scored = targets != NO_TARGET
    size = int(scored.sum())
    assert scored[-size:].all() and torch.equal(targets[-size:-1], tokens[-size + 1 :])
    assert tokens[0] == material.tokenizer.bos and not (tokens[1:] == material.tokenizer.bos).any()
    sequence = torch.cat([tokens, targets[-1:]])
    return sequence, material.tokenizer.decode(sequence[-size:]), size


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_the_number_of_the_document_that_holds_the_passage(material, seed):
    sequence, answer, _ = ask(material, seed)
    whole = material.tokenizer.decode(sequence)
    context, passage = re.fullmatch(rf"(.*)\nThe passage\n(.*)\nis in document{answer}", whole, re.S).groups()
    assert context.count(passage) == 1
    numbers = re.findall(r"\nDocument (\d{5}):\n", context)
    assert len(set(numbers)) == len(numbers) > 3
    before = context[: context.index(passage)]
    assert answer == " " + re.findall(r"\nDocument (\d{5}):\n", before)[-1]


def test_documents_are_excerpts_of_one_document_each(material):
    sequence, _, _ = ask(material, excerpt=100)
    texts = re.split(r"\nDocument \d{5}:\n|\nThe passage\n", material.tokenizer.decode(sequence))[1:-1]
    assert len(texts) > 5
    for text in texts:  # a filler that is cut may end in a part of a header
        assert any(text.partition("\n")[0] in document for document in DOCUMENTS)
        assert len(material.tokenizer.encode(text)) <= 100
    assert any(text in DOCUMENTS for text in texts)  # short ones are whole


def test_the_number_lies_at_its_distance(material):
    nearest, farthest = distances_that_fit(material.tokenizer, 700, 12)
    assert nearest < 100 and farthest > 650
    for seed, distance in enumerate((nearest, 200, 451, farthest)):
        sequence, _, size = ask(material, seed, distance=distance)
        first = len(sequence) - size
        assert torch.equal(sequence[first - distance : first - distance + size], sequence[first:])
        assert material.tokenizer.decode(sequence[: first - distance]).endswith("\nDocument")


def test_distances_are_drawn_by_octaves(material):
    nearest, farthest = distances_that_fit(material.tokenizer, 700, 12)
    drawn = []
    for seed in range(40):
        sequence, _, size = ask(material, seed)
        windows = np.lib.stride_tricks.sliding_window_view(sequence.numpy(), size)
        first, answer = np.flatnonzero((windows == windows[-1]).all(1))
        drawn.append(answer - first)
    assert nearest - 6 <= min(drawn) and max(drawn) <= farthest + 6
    assert 10 < sum(distance < np.sqrt(nearest * farthest) for distance in drawn) < 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": 10}, r"^distance=10: must be \d+ to \d+ for length=700$"),
        ({"distance": 699}, r"^distance=699: must be"),
        ({"passage": 121}, r"^passage=121: must be at most excerpt=120$"),
        ({"passage": 350, "excerpt": 350}, r"^length=700: must be at least \d+ tokens"),
    ],
)
def test_what_does_not_fit_is_named(material, settings, message):
    with pytest.raises(CorpusError, match=message):
        ask(material, **settings)


@pytest.mark.parametrize("documents", [["ab" * 300], ["short", "texts"]])
def test_documents_without_a_passage_that_occurs_once_are_refused(documents):
    with pytest.raises(CorpusError, match=r"^passage=12: must be a length of which most documents"):
        ask(material_of(Bytes(), documents))
