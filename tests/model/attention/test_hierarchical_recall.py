"""Learning, not only wiring: summaries carry what a later query asks for, and a window alone does not.

A haystack with one needle (a key and its value, side by side) hidden in each coarsest span, then noise, then the keys
once more in random order: their values are the targets. Whoever answers must have found the key that was asked for, in
a summary of 16 tokens or of 4, since the questions are further away than both layers' windows reach.
"""

import pytest
import torch

from kernels.patterns import Hierarchical, Pattern, Window
from model import Transformer
from model.training.optimizer import build_optimizer
from tests.model.small import config, lively, plan
from tests.model.synthetic_recall import alphabet

NEAR, FINE, COARSE, REACH = 8, 4, 16, 32
LEARNED = Hierarchical(window=NEAR, spans=(FINE, COARSE), reaches=(REACH,), pooling="learned")
NEEDLES, NOISE, VOCABULARY = 4, 24, 64
LENGTH = NEEDLES * COARSE + NOISE + 2 * NEEDLES - 1
QUESTIONS = torch.arange(LENGTH - 2 * NEEDLES + 1, LENGTH, 2)
"""Where the keys come again, each followed by its value: what a question's hidden state must predict."""

RATE = 5e-3

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def needles(batch: int, generator: torch.Generator) -> Batch:
    """(tokens, int64 `[batch, LENGTH]`; the values asked for, `[batch, NEEDLES]`; the coarsest span of each)."""
    parts = alphabet(VOCABULARY)
    draw = lambda ids, *shape: torch.randint(ids.start, ids.stop, shape, generator=generator)  # noqa: E731
    shuffled = lambda n: torch.rand(batch, n, generator=generator).argsort(1)[:, :NEEDLES]  # noqa: E731
    sequence = draw(parts.noise, batch, LENGTH + 1)
    keys, values = parts.keys.start + shuffled(len(parts.keys)), draw(parts.values, batch, NEEDLES)
    where = torch.arange(NEEDLES) * COARSE + torch.randint(COARSE - 1, (batch, NEEDLES), generator=generator)
    span = shuffled(NEEDLES)
    for place, chosen in ((where, torch.arange(NEEDLES).expand(batch, -1)), (QUESTIONS.expand(batch, -1), span)):
        sequence.scatter_(1, place, keys.gather(1, chosen)).scatter_(1, place + 1, values.gather(1, chosen))
    return sequence[:, :-1].contiguous(), values.gather(1, span), span


def accuracy_by_span(model: Transformer, seed: int) -> torch.Tensor:
    """The share of right answers about the needle of each coarsest span, over 256 sequences."""
    tokens, values, span = needles(256, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hidden = model(tokens, torch.arange(LENGTH).expand_as(tokens), model.build_layouts(None, LENGTH))
        right = model.logits(hidden[:, QUESTIONS]).argmax(-1) == values
    return torch.stack([right[span == each].float().mean() for each in range(NEEDLES)])


def train(pattern: Pattern, steps: int, settle: int, enough: float) -> tuple[Transformer, int]:
    """A model of two layers, trained until it is right about `enough` of the needles of every span, or for `steps`; and
    then for `settle` steps in which the learning rate falls to 0. Returns it with the number of steps."""
    torch.manual_seed(3)
    sizes = dict(width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=64, vocabulary=VOCABULARY)
    model = Transformer(config(**sizes), plan(pattern))
    optimizer = build_optimizer(
        model, name="muon", learning_rate=RATE, weight_decay=0.01, momentum=0.95, betas=(0.9, 0.95), epsilon=1e-8
    )
    generator = torch.Generator().manual_seed(3)
    layouts, position = model.build_layouts(None, LENGTH), torch.arange(LENGTH).expand(32, -1)
    step, last = 0, steps + settle
    while step < last:
        rate = RATE * min(1.0, (step + 1) / 50, (last - step) / settle)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, values, _ = needles(32, generator)
        targets = torch.full_like(tokens, -100).index_copy_(1, QUESTIONS, values)
        loss = model.loss(tokens, targets, position, layouts)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0 and step < last - settle and accuracy_by_span(model, seed=1).min() >= enough:
            last = step + settle
    return model, step


@pytest.mark.slow
def test_learned_summaries_find_the_needle_of_every_coarsest_span():
    # No needle reaches a question through two layers of windows, not even rounded up to a whole span.
    assert QUESTIONS[0] - (NEEDLES * COARSE - 1) > 2 * (NEAR + FINE - 2)
    model, steps = train(LEARNED, steps=900, settle=75, enough=0.93)
    found = accuracy_by_span(model, seed=2)
    print(f"hierarchical, {steps} steps: {found.tolist()} by span")
    assert found.min() >= 0.95


def test_a_window_alone_can_do_no_better_than_chance():
    """Values are drawn independently of one another, and no logit at a question depends on the haystack, which holds
    its value. With summaries every question's logits do."""
    (tokens, _, _), (others, _, _) = (needles(4, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    other_haystack = torch.cat([others[:, : NEEDLES * COARSE], tokens[:, NEEDLES * COARSE :]], 1)
    largest = {}
    for name, pattern in (("window", Window(NEAR)), ("summaries", LEARNED)):
        model = lively(Transformer(config(vocabulary=VOCABULARY), plan(pattern)).double())
        views, position = model.build_layouts(None, LENGTH), torch.arange(LENGTH).expand_as(tokens)
        with torch.no_grad():
            one, other = (model.logits(model(t, position, views)[:, QUESTIONS]) for t in (tokens, other_haystack))
        largest[name] = (one - other).abs().amax(-1)
    assert (largest["window"] <= 1e-12).all() and (largest["summaries"] > 1e-4).all()


def test_questions_ask_for_every_needle_once():
    tokens, values, span = needles(50, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, LENGTH)
    assert torch.equal(span.sort(1).values, torch.arange(NEEDLES).expand(50, -1))
    for row, answers, spans in zip(tokens, values, span, strict=True):
        for question, answer, each in zip(QUESTIONS, answers, spans, strict=True):
            hidden = row[each * COARSE : (each + 1) * COARSE]
            (place,) = (hidden == row[question]).nonzero()[:, 0]
            assert hidden[place + 1] == answer
            assert question + 1 == LENGTH or row[question + 1] == answer
