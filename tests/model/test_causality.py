"""The proof that no model looks into the future or into another document, under any pattern.

A sequence of three packed documents; a query `i` in the middle one. Whatever happens to later tokens, or to the other
documents, hidden states and logits up to `i` and the gradients of their loss stay the same; and every token that the
masks of all layers let through does make a difference.
"""

import pytest
import torch

from kernels.patterns import Dense, Hierarchical, Pattern, Strided, Window
from model import Transformer
from tests.kernels.oracle import PATTERNS, Axis, BlockSparse, brute_force_mask, packing
from tests.model.small import config, lively, plan, positions_of

MIXED = {"local": Window(9, 2), "far": Strided(3, 8, 2), "full": Dense(), "blocks": BlockSparse(7, 1, 1, 1)}
SCHEDULE = ["local", ["far", "full"], ["blocks", "local"]]
SUMMARIES = {
    "hierarchical": Hierarchical(window=5, spans=(2, 6), reaches=(11,), pooling="learned"),
    "hierarchical_mean": Hierarchical(window=3, spans=(4, 8, 16), reaches=(9, 20), pooling="mean"),
}
PLANS = {name: plan(pattern) for name, pattern in (PATTERNS | SUMMARIES).items()} | {
    "mixed": plan(MIXED, SCHEDULE),
    "mixed_by_depth": plan({"local": Window(9), "far": SUMMARIES["hierarchical"]}, ["local", "far"]),
}
BY_SEQUENCE = [name for name, pattern in PATTERNS.items() if pattern.anchor == "sequence"]
"""These count positions from the sequence's beginning, so a document's place makes a difference, by design."""

FIRST, LAST = 37, 82  # the middle document
DOCUMENTS = packing([37, 46, 12])
POSITIONS = positions_of(DOCUMENTS)
LENGTH, VOCABULARY = DOCUMENTS.shape[1], 64
# The document's first token, one inside, a tile's last and first (sequence index 63, 64), the last but one.
QUERIES = (FIRST, 50, 63, 64, LAST - 1)

every_plan = pytest.mark.parametrize("name", PLANS)
every_query = pytest.mark.parametrize("i", QUERIES)
both_backends = pytest.mark.parametrize("backend", ["reference", "blocked"])


def build(name: str, backend: str = "blocked", **changes) -> Transformer:
    chosen = plan(PLANS[name].patterns, PLANS[name].schedule, backend)
    return lively(Transformer(config(layers=3, sink_logits=name == "mixed", **changes), chosen).double())


def random_tokens(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def perturbed(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Other tokens, everywhere different, where `where` says so."""
    return torch.where(where, (tokens + 1 + random_tokens(7) % (VOCABULARY - 1)) % VOCABULARY, tokens)


def observe(model: Transformer, tokens: torch.Tensor, i: int) -> dict[str, torch.Tensor]:
    """All that may depend on the middle document's tokens up to `i` and on nothing else."""
    scored = torch.zeros(1, LENGTH, dtype=torch.bool)
    scored[0, FIRST : i + 1] = True
    targets = torch.where(scored, random_tokens(3), -100)  # fixed: what follows the perturbed tokens is not looked at
    layouts = model.build_layouts(DOCUMENTS, LENGTH)
    model.zero_grad()
    hidden = model(tokens, POSITIONS, layouts)[:, FIRST : i + 1].detach()
    loss = model.loss(tokens, targets, POSITIONS, layouts)
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden, "logits": model.logits(hidden).detach(), "loss": loss.total.detach()} | gradients


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def tokens_seen(pattern: Pattern | tuple[Pattern, ...], axis: Axis) -> torch.Tensor:
    """Which tokens each query sees, itself or in a summary, under any KV head: booleans `[queries, tokens]`."""
    pattern = Dense() if isinstance(pattern, Hierarchical) else pattern  # proven in tests/kernels/summaries
    return brute_force_mask(pattern, axis)[0].any(0)


def index() -> torch.Tensor:
    return torch.arange(LENGTH)[None]


CHANGES = {
    "later_tokens": lambda i: index() > i,
    "the_next_token": lambda i: index() == i + 1,
    "the_document_before": lambda i: index() < FIRST,
    "the_document_behind": lambda i: index() > LAST,
    "all_of_these": lambda i: (index() > i) | (index() < FIRST),
}


# The reference backend has no tiles, whose edges are between some queries.
@every_plan
@pytest.mark.parametrize(("backend", "i"), [*(("blocked", i) for i in QUERIES), ("reference", 50)])
def test_nothing_depends_on_later_tokens_or_other_documents(name, backend, i):
    model, tokens = build(name, backend), random_tokens(0)
    before = observe(model, tokens, i)

    def difference(change: str) -> float:
        where = CHANGES[change](i)
        assert (perturbed(tokens, where) != tokens).equal(where)
        return largest_difference(before, observe(model, perturbed(tokens, where), i))

    if difference("all_of_these") > 1e-12:  # the other changes are parts of this one: they tell where it comes from
        pytest.fail(", ".join(f"{change} made a difference of {difference(change):.1e}" for change in CHANGES))


@every_plan
@every_query
def test_control_an_earlier_visible_token_does_make_a_difference(name, i):
    """So that the proof above could fail: the furthest token that the first layer lets `i` see."""
    model, tokens = build(name), random_tokens(0)
    seen = tokens_seen(model.plan.pattern(0, kv_heads=2), Axis.tokens(LENGTH, DOCUMENTS))
    furthest = int(seen[i].nonzero()[0])
    before, after = (observe(model, t, i) for t in (tokens, perturbed(tokens, index() == furthest)))
    assert float((before["hidden"][:, -1] - after["hidden"][:, -1]).abs().max()) > 1e-4
    # The softmax of a query that sees one key is constant, so its scores have no gradient to change.
    scores = ("q_proj", "k_proj", "q_norm", "k_norm", ".pool.") if seen[i].sum() == 1 else ()
    for each in before:
        if not any(part in each for part in scores):
            assert float((before[each] - after[each]).abs().max()) > 1e-4, each


@every_plan
@both_backends
def test_each_query_depends_on_exactly_the_tokens_within_reach_of_the_layers(name, backend):
    """Reach: over residual and attention, the boolean product of the layers' masks."""
    model, tokens = build(name, backend), random_tokens(0)
    axis = Axis.tokens(LENGTH, DOCUMENTS)
    reach = torch.eye(LENGTH)
    for layer in range(3):
        mask = tokens_seen(model.plan.pattern(layer, kv_heads=2), axis)
        reach = ((mask.float() + torch.eye(LENGTH)) @ reach > 0).float()
    embedded = []
    model.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[-1]))
    hidden = model(tokens, POSITIONS, model.build_layouts(DOCUMENTS, LENGTH))
    for i in (0, FIRST - 1, *QUERIES, LAST + 1, LENGTH - 1):
        (gradient,) = torch.autograd.grad(hidden[0, i, 0], embedded[0], retain_graph=True)
        assert torch.equal(gradient[0].abs().amax(-1) > 0, reach[i] > 0), f"query {i}"


@every_plan
def test_activation_checkpointing_changes_neither_loss_nor_gradients(name):
    tokens = random_tokens(0)
    expected = observe(build(name), tokens, LAST)
    for checkpointing in (True, "selective"):
        actual = observe(build(name, activation_checkpointing=checkpointing), tokens, LAST)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [name for name in PLANS if name not in BY_SEQUENCE])
def test_packed_documents_give_the_logits_of_each_alone(name):
    model, tokens = build(name).float(), random_tokens(0)
    with torch.no_grad():
        packed = model.logits(model(tokens, POSITIONS, model.build_layouts(DOCUMENTS, LENGTH)))
        for start, stop in ((0, FIRST), (FIRST, LAST + 1), (LAST + 1, LENGTH)):
            layouts = model.build_layouts(None, stop - start)
            alone = model.logits(model(tokens[:, start:stop], index()[:, : stop - start], layouts))
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-5)
