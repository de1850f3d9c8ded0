"""Exact match from one forward pass is what greedy decoding, token by token, would find."""

from functools import partial

import pytest
import torch

from kernels.patterns import Dense, Window
from model.evaluation import Answer, answer, effective_length
from model.evaluation.recall import BAR, answer_spans
from model.loss import IGNORE
from tests.model.evaluation.documents import build
from tests.model.synthetic_recall import associative_recall, needle


@torch.no_grad()
def greedy(network, prompt: list[int], count: int) -> list[int]:
    """The `count` tokens that greedy decoding appends, each from a pass over all before it."""
    tokens = list(prompt)
    for _ in range(count):
        read = torch.tensor([tokens])
        hidden = network(read, torch.arange(len(tokens))[None], network.build_layouts(None, len(tokens)))
        tokens.append(int(network.logits(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("pattern", [Dense(), Window(6, 1)], ids=["dense", "window"])
def test_exact_match_is_greedy_decoding(pattern):
    """Answers of 3 tokens: the model's own greedy ones, and the same with a wrong first, middle or last token."""
    network, size = build(pattern), 3
    generator = torch.Generator().manual_seed(0)
    rows, expected = [], []
    for spoiled in (None, 0, 1, 2) * 4:
        prompt = torch.randint(64, (20,), generator=generator).tolist()
        wanted = greedy(network, prompt, size)
        if spoiled is not None:
            wanted[spoiled] = (wanted[spoiled] + 1) % 64
        rows.append(prompt + wanted)
        expected.append(greedy(network, prompt, size) == wanted)
    sequences = torch.tensor(rows)
    targets = sequences[:, 1:].clone()
    targets[:, :-size] = IGNORE
    batch = {"tokens": sequences[:, :-1], "targets": targets, "position": torch.arange(22).repeat(16, 1)}
    found = answer(network, batch)
    assert [a.exact for a in found] == expected and sum(expected) == 4
    assert {a.tokens for a in found} == {size}


def test_no_id_beyond_the_tokenizers_vocabulary_is_an_answer():
    """A model that loves a padded id best: generation never chooses it, so it is not what was answered either."""
    network = build()
    tokens = torch.randint(50, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layouts = network.build_layouts(None, 20)
        hidden = network(tokens[:, :-1], torch.arange(20)[None], layouts)[0, -1]
        network.lm_head.weight[60] = 100 * hidden
        tokens[0, -1] = network.logits(hidden)[:60].argmax()
    targets = tokens[:, 1:].clone()
    targets[:, :-1] = IGNORE
    batch = {"tokens": tokens[:, :-1], "targets": targets, "position": torch.arange(20)[None]}
    assert [answer(network, batch, vocabulary)[0].exact for vocabulary in (None, 60, 64)] == [False, True, False]


def test_the_nll_is_that_of_the_answers_alone():
    network = build()
    batch = needle(3, 40, vocabulary=64, size=2, generator=torch.Generator().manual_seed(1))
    found = answer(network, batch)
    for row, got in enumerate(found):
        hidden = network(
            batch["tokens"][row : row + 1], batch["position"][row : row + 1], network.build_layouts(None, 40)
        )
        log_probabilities = network.logits(hidden)[0].log_softmax(-1)
        nats = -sum(float(log_probabilities[i, batch["targets"][row, i]].detach()) for i in (38, 39))
        assert got.nll == pytest.approx(nats, rel=1e-5) and got.tokens == 2


def test_every_query_is_an_answer_of_its_own():
    task = partial(associative_recall, 4, 60, pairs=5, vocabulary=64, min_distance=20)
    batch = task(generator=torch.Generator().manual_seed(0))
    assert len(answer(build(), batch)) == 20


def test_answers_are_runs_of_scored_tokens():
    targets = torch.tensor([5, -100, 0, 7, -100, -100, 3])
    assert list(answer_spans(targets)) == [slice(0, 1), slice(2, 4), slice(6, 7)]
    assert not list(answer_spans(torch.full((4,), IGNORE)))


def test_a_sequence_beyond_the_model_is_refused():
    batch = needle(1, 40, vocabulary=64, generator=torch.Generator())
    with pytest.raises(ValueError, match="sequences of 40 tokens: the model takes 39"):
        answer(build(max_length=39), batch)


def test_the_effective_length_is_the_longest_at_the_bar():
    assert effective_length({1024: 1.0, 2048: 0.9, 4096: 0.856, 8192: 0.85}) == 4096
    assert effective_length({1024: 0.5}) is None and BAR == 0.856
    assert Answer(True, 0.5, 1) == Answer(True, 0.5, 1)
