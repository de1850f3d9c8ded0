"""Recall tasks in text: exact lengths, answers that the text before them gives."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from data import CorpusError
from data.collation import NO_TARGET
from data.recall import text
from data.recall.haystack import Material
from data.tokenizers import BPE, Bytes
from model.evaluation.recall import answer_spans

HAYSTACK = "It was a dark and stormy night; the rain fell in torrents, except at intervals. " * 40

TASKS = {
    "passkey": partial(text.passkey, depth=0.5),
    "multikey": partial(text.needles, keys=4, values=1, queries=1),
    "multivalue": partial(text.needles, keys=2, values=3, queries=1),
    "multiquery": partial(text.needles, keys=4, values=1, queries=3),
    "associative_recall": partial(text.associative_recall, pairs=5),
    "scattered": partial(text.scattered, spacing=120),
    "recurring": partial(text.recurring, keys=3),
    "variable_tracking": partial(text.variable_tracking, hops=3),
    "common_words": partial(text.common_words, common=3),
    "copy": partial(text.copy, distance=300, cue=8, size=16),
}


def bpe() -> BPE:
    tokenizer = BPE(vocabulary=300)
    tokenizer.fit([HAYSTACK])
    return tokenizer


@pytest.fixture(scope="module", params=[Bytes, bpe], ids=["bytes", "bpe"])
def material(request) -> Material:
    tokenizer = request.param()
    return Material.of(tokenizer, [np.concatenate([[tokenizer.bos], tokenizer.encode(HAYSTACK)])])


def make(material, name, length=900, seed=0):
    return TASKS[name](material, length, np.random.default_rng(seed))


def read(material, batch) -> tuple[str, list[tuple[str, str]]]:
    """(the whole text, [(the text before the answer, the answer)])."""
    tokens, targets = batch["tokens"][0], batch["targets"][0]
    sequence = torch.cat([tokens, targets[-1:]])
    decode = material.tokenizer.decode
    found = [
        (decode(sequence[: s.start + 1]), decode(sequence[s.start + 1 : s.stop + 1])) for s in answer_spans(targets)
    ]
    return decode(sequence), found


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [900, 1777])
def test_a_sequence_has_the_length_that_was_asked_for_and_targets_are_its_next_tokens(material, name, length):
    batch = make(material, name, length)
    tokens, targets = batch["tokens"][0], batch["targets"][0]
    assert tokens.shape == targets.shape == (length,) and tokens.dtype == targets.dtype == torch.int64
    assert tokens[0] == material.tokenizer.bos and not (tokens[1:] == material.tokenizer.bos).any()
    scored = targets != NO_TARGET
    assert scored[-1] and torch.equal(targets[:-1][scored[:-1]], tokens[1:][scored[:-1]])


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_one_sequence(material, name):
    first, again, other = (make(material, name, seed=seed)["tokens"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_passkey_lies_at_its_depth(material, depth):
    batch = text.passkey(material, 900, np.random.default_rng(3), depth=depth)
    whole, [(before, answer)] = read(material, batch)
    key = re.search(r"Remember it. (\d{5})", whole).group(1)
    assert answer == f" {key}" and before.endswith("What is the pass key? The pass key is")
    assert whole.count(key) == 3
    around = whole.replace(before[-len("\nWhat is the pass key? The pass key is") :], "")
    place = around.index("\nThe pass key is") / (len(around) - len(re.search(r"\nThe.*?key.\n", around, re.S).group()))
    assert place == pytest.approx(depth, abs=0.03)


@pytest.mark.parametrize("name", ["multikey", "multivalue", "multiquery"])
def test_needles_are_answered_by_the_text_before(material, name):
    whole, found = read(material, make(material, name))
    assert len(found) == {"multiquery": 3}.get(name, 1)
    for before, answer in found:
        word = re.search(r"The special numbers? for (\w+) (is|are)$", before).group(1)
        facts = re.findall(rf"The special number for {word} is (\d{{5}})\.", whole)
        assert answer == " " + ", ".join(facts) and len(facts) == (3 if name == "multivalue" else 1)


def test_pairs_are_asked_for_in_the_second_half(material):
    whole, found = read(material, make(material, "associative_recall"))
    assert len(found) == 5 and len({answer for _, answer in found}) == 5
    for before, answer in found:
        word = re.search(r"\n(\w+) =$", before).group(1)
        assert whole.index(f"\n{word} ={answer}") < len(whole) / 3
        assert len(before) > 0.4 * len(whole)


def test_scattered_facts_are_each_asked_for_behind_them(material):
    distances = []
    for seed in range(6):
        whole, found = read(material, make(material, "scattered", length=1777, seed=seed))
        assert len(found) == 1777 // 120 and len({answer for _, answer in found}) == len(found)
        for before, answer in found:
            key = re.search(r"\n([\w ]+ (?:is|=)|What is the pass key\? The pass key is)$", before).group(1)
            fact = "\n" + key.removeprefix("What is the pass key? ") + answer
            assert fact in before
            distances.append((len(before) - before.index(fact)) / len(whole))
        assert "The pass key is" in found[-1][0][-20:] and len({key for key, _ in found}) == len(found)
    assert np.mean([distance < 0.25 for distance in distances]) == pytest.approx(0.7, abs=0.15)  # log-uniform
    assert max(distances) > 0.6


def test_scattered_facts_have_two_words_for_a_key_where_there_are_many(material):
    batch = text.scattered(material, 5000, np.random.default_rng(0), spacing=70)
    whole = material.tokenizer.decode(batch["tokens"][0])
    asked = re.findall(r"\n(?:The special number for )?(\w+ \w+) (?:is|=) \d{5}", whole)
    assert len(asked) == 2 * len(set(asked)) == 2 * (5000 // 70 - 1)
    with pytest.raises(CorpusError, match=r"^facts=\d+: must be at most 4290\b"):
        text.scattered(material, 5000, np.random.default_rng(0), spacing=1)


@pytest.mark.parametrize("keys", [1, 3])
def test_recurring_pairs_are_facts_once_and_then_questions(material, keys):
    whole, found = read(material, text.recurring(material, 900, np.random.default_rng(0), keys=keys))
    lines = re.findall(r"\n(\w+) = (\d{5})", whole)
    facts = dict(lines)
    assert len({*lines}) == len(facts) == keys and len(found) == len(lines) - keys > 25
    for before, answer in found:
        word = re.search(r"\n(\w+) =$", before).group(1)
        assert answer == f" {facts[word]}" and f"\n{word} ={answer}" in before
    targets = text.recurring(material, 900, np.random.default_rng(0), keys=keys)["targets"]
    assert (targets != NO_TARGET).double().mean() > 0.2  # answers are dense, whatever the tokenizer


def test_distances_that_are_not_given_are_log_uniform(material):
    places = {"passkey": [], "copy": []}
    for seed in range(40):
        whole, _ = read(material, text.passkey(material, 900, np.random.default_rng(seed)))
        places["passkey"].append(1 - whole.index("Remember it") / len(whole))
        batch = text.copy(material, 900, np.random.default_rng(seed), cue=8, size=16)
        tail = batch["tokens"][0, -8:].unfold(0, 8, 1)[0]
        starts = (batch["tokens"][0].unfold(0, 8, 1) == tail).all(1).nonzero()[:, 0]
        places["copy"].append(float(starts[-1] - starts[-2]) / 900)
    for distances in places.values():
        assert np.mean(np.array(distances) < 0.25) == pytest.approx(0.66, abs=0.2) and max(distances) > 0.6


def test_text_between_facts_is_without_the_beginnings_of_documents(material):
    tokens, bos = material.haystack[:50], material.tokenizer.bos
    flat = np.concatenate([[bos], tokens[:20], [bos, bos], tokens[20:]])
    sequence = text.passkey(Material(material.tokenizer, flat), 900, np.random.default_rng(0))["tokens"][0]
    assert len(sequence) == 900 and (sequence == bos).nonzero().tolist() == [[0]]


def test_variables_are_tracked_along_the_chain(material):
    whole, [(before, answer)] = read(material, make(material, "variable_tracking"))
    value = re.search(r"have the value (\d{5}),", before).group(1)
    assigned = re.findall(r"VAR (\w+) = (\w+)", whole)
    chain = [value]
    for variable, source in assigned:
        assert source == chain[-1]
        chain.append(variable)
    assert answer == " " + ", ".join(chain[1:]) and len(chain) == 5


def test_the_most_common_words_are_the_most_common(material):
    whole, [(_, answer)] = read(material, make(material, "common_words", length=2500))
    listed = re.search(r"A list of words:(.*)\nThe 3 most", whole).group(1).split()
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert answer == " " + ", ".join(word for _, word in counts[:3])
    assert counts[0][0] > counts[1][0] > counts[2][0] > 2 * counts[3][0]


@pytest.mark.parametrize("distance", [24, 129, 876])
def test_a_copy_lies_at_its_distance(material, distance):
    batch = text.copy(material, 900, np.random.default_rng(0), distance=distance, cue=8, size=16)
    sequence = torch.cat([batch["tokens"][0], batch["targets"][0, -1:]])
    assert torch.equal(sequence[-24:], sequence[-24 - distance : len(sequence) - distance])
    (answer,) = answer_spans(batch["targets"][0])
    assert answer.stop - answer.start == 16


def test_what_cannot_be_is_refused(material):
    generator = np.random.default_rng(0)
    for distance in (23, 877):
        with pytest.raises(CorpusError, match=f"^distance={distance}: must be 24 to 876 for length=900$"):
            text.copy(material, 900, generator, distance=distance, cue=8, size=16)
    with pytest.raises(CorpusError, match=r"^length=47: must be at least 48\b"):
        text.copy(material, 47, generator, distance=24, cue=8, size=16)
    with pytest.raises(CorpusError, match=r"^queries=3: must be at most keys=2$"):
        text.needles(material, 900, generator, keys=2, values=1, queries=3)
    with pytest.raises(CorpusError, match=r"^haystack="):
        Material.of(material.tokenizer, [])


def test_the_least_length_in_the_error_is_the_least_that_works(material):
    with pytest.raises(CorpusError, match=r"^length=20: must be at least ") as error:
        make(material, "passkey", length=20)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert make(material, "passkey", length=least)["tokens"].shape == (1, least)
    with pytest.raises(CorpusError, match=f"^length={least - 1}: must be at least {least}\\b"):
        make(material, "passkey", length=least - 1)


def test_the_list_of_common_words_needs_room(material):
    with pytest.raises(CorpusError, match=r"^length=200: must be at least \d+ .*common=3$"):
        make(material, "common_words", length=200)


def test_a_short_haystack_goes_round(material):
    short = Material(material.tokenizer, material.haystack[:50])
    assert text.passkey(short, 900, np.random.default_rng(0), depth=0.5)["tokens"].shape == (1, 900)
