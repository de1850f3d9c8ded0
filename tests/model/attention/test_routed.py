"""The routed families within a model: against dense masks made in Python, causality through the router, its loss."""

import dataclasses

import pytest
import torch

from kernels.patterns import Dense, Hierarchical, NativeSparse, Routed, Window
from kernels.selection.indexer_loss import SCORES_AT_ONCE
from model import AttentionPlan, Transformer
from tests.kernels.oracle import packing
from tests.kernels.routing_oracle import window_start
from tests.model.attention.naive import Naive
from tests.model.small import INDEXER, config, lively, plan, positions_of
from tests.model.test_causality import CHANGES, FIRST, LAST, POSITIONS, QUERIES, observe, perturbed, random_tokens
from tests.model.test_causality import DOCUMENTS as THREE

SETTINGS = dict(
    window=5,
    block=16,
    top_k=1,
    router="mean_key",
    share="group",
    first_block=False,
    indexer_dim=4,
)
BRANCHES = dict(summary_span=8, pooling="learned", combine="lse")


def routed(**changes) -> Routed:
    return Routed(**SETTINGS | changes)


def native_sparse(**changes) -> NativeSparse:
    return NativeSparse(**SETTINGS | BRANCHES | changes)


INDEXED = routed(router="indexer", top_k=2)
GATED = native_sparse(combine="gates", router="indexer", top_k=2, pooling="mean", first_block=True)
PLANS: dict[str, AttentionPlan] = {
    "mean_key": plan(routed()),
    "mean_key_by_head": plan(routed(share="head", first_block=True)),
    "indexer": plan(INDEXED),
    "indexer_by_head": plan(routed(router="indexer", share="head", top_k=2)),
    "indexer_with_gradient": plan(INDEXED, indexer=dataclasses.replace(INDEXER, indexer_gradient=True)),
    "indexer_in_warm_up": plan(INDEXED, indexer=dataclasses.replace(INDEXER, indexer_warmup=3)),
    "native_sparse": plan(native_sparse()),
    "native_sparse_gated": plan(GATED),
}
ALONE = plan(INDEXED, indexer=dataclasses.replace(INDEXER, indexer_warmup=3, indexer_warmup_alone=True))
every_plan = pytest.mark.parametrize("attention", PLANS.values(), ids=PLANS)
DOCUMENTS = packing([37, 6, 52], [80, 15, 0])
LENGTH = DOCUMENTS.shape[1]


def build(attention: AttentionPlan, naive: bool = False, **sizes) -> Transformer:
    model = lively(Transformer(config(sink_logits=True, **sizes), attention).double())
    for name, parameter in model.named_parameters():
        if "pool.query" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    if naive:
        for layer in model.layers:
            object.__setattr__(layer.self_attn.core, "forward", Naive(layer.self_attn.core, DOCUMENTS))
    return model


def gradients(model: Transformer, documents: torch.Tensor = DOCUMENTS) -> dict[str, torch.Tensor]:
    tokens = torch.randint(64, documents.shape, generator=torch.Generator().manual_seed(0))
    layouts = model.build_layouts(documents, documents.shape[1])
    out = model.loss(tokens, tokens.roll(-1, 1), positions_of(documents), layouts)
    auxiliary = torch.zeros(()) if out.auxiliary is None else out.auxiliary
    model.zero_grad()
    (out.total + auxiliary).backward()
    found = {name: torch.zeros(()) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": out.per_token, "auxiliary": auxiliary.detach()} | found


@every_plan
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1), (16, 1)])
def test_outputs_and_all_gradients_are_those_of_dense_masks(attention, heads, kv_heads):
    sizes = {"heads": heads, "kv_heads": kv_heads}
    actual, expected = gradients(build(attention, **sizes)), gradients(build(attention, naive=True, **sizes))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: n + m)
    if attention.patterns["only"].router == "indexer":
        assert actual["auxiliary"] > 0
        assert all(actual[name].any() for name in actual if "indexer" in name)


def build_deep(attention: AttentionPlan, **changes) -> Transformer:
    return lively(Transformer(config(layers=3, **changes), attention).double())


@every_plan
@pytest.mark.parametrize("i", QUERIES)
def test_nothing_depends_on_later_tokens_or_other_documents(attention, i, choices):
    """Neither hidden states nor gradients, nor any layer's choice up to `i`, bit by bit."""
    model, tokens = build_deep(attention), random_tokens(0)
    before = observe(model, tokens, i)
    chosen_before = [c[:, :, FIRST : i + 1].clone() for c in choices]
    assert len(chosen_before) == 6

    def differences(change: str) -> list[str]:
        choices.clear()
        after = observe(model, perturbed(tokens, CHANGES[change](i)), i)
        found = [name for name in before if not float((before[name] - after[name]).abs().max()) <= 1e-12]
        kept = [torch.equal(c[:, :, FIRST : i + 1], d) for c, d in zip(choices, chosen_before, strict=True)]
        return found + [f"choice {number}" for number, same in enumerate(kept) if not same]

    if differences("all_of_these"):  # the other changes are parts of this one: they tell where it comes from
        pytest.fail(", ".join(f"{change} made a difference to {differences(change)}" for change in CHANGES))


@pytest.fixture
def choices(monkeypatch):
    """What each call of kernels.select by a layer has chosen."""
    import model.attention.routed.core as module

    found = []

    def recorded(*arguments, **settings):
        selection = module_select(*arguments, **settings)
        found.append(selection.chosen)
        return selection

    module_select = module.select
    monkeypatch.setattr(module, "select", recorded)
    return found


@every_plan
def test_control_a_chosen_token_does_make_a_difference(attention, choices):
    """A token in a block that the last query of the document chose, beyond the reach of the windows."""
    model, tokens = build_deep(attention), random_tokens(0)
    before = observe(model, tokens, LAST)
    block = int(choices[0][0, 0, LAST].max())
    assert (block + 1) * 16 <= LAST - 5
    where = torch.arange(tokens.shape[1])[None] == max(block * 16, FIRST)
    after = observe(model, perturbed(tokens, where), LAST)
    assert float((before["hidden"][:, -1] - after["hidden"][:, -1]).abs().max()) > 1e-5


@every_plan
def test_activation_checkpointing_repeats_the_choice_and_all_gradients_bitwise(attention, choices):
    plain, again = build(attention), build(attention, activation_checkpointing=True)
    expected = gradients(plain)
    first = [c.clone() for c in choices]
    choices.clear()
    actual = gradients(again)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert len(choices) == 4, "two layers, computed twice"
    assert all(torch.equal(a, b) for a, b in zip(choices, [*first, first[1], first[0]], strict=True))
    choices.clear()
    actual = gradients(build(attention, activation_checkpointing="selective"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert len({chosen.data_ptr() for chosen in choices}) == 2, "two layers, computed once and kept"


@pytest.mark.parametrize("pattern", [routed, native_sparse])
def test_a_larger_top_k_than_blocks_chooses_them_all_and_takes_no_more_room(pattern, choices):
    """10^9 slots a query would be 1.5 TB."""
    expected, actual = gradients(build(plan(pattern(top_k=LENGTH // 16)))), gradients(build(plan(pattern(top_k=10**9))))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(each.shape[3] == LENGTH // 16 for each in choices)


@every_plan
def test_packed_documents_with_whole_blocks_give_the_logits_of_each_alone(attention):
    documents = packing([48, 32, 15])
    model, tokens = build(attention), random_tokens(0)
    with torch.no_grad():
        layouts = model.build_layouts(documents, 95)
        packed = model.logits(model(tokens, positions_of(documents), layouts))
        for start, stop in ((0, 48), (48, 80), (80, 95)):
            position = torch.arange(stop - start)[None]
            alone = model(tokens[:, start:stop], position, model.build_layouts(None, stop - start))
            torch.testing.assert_close(packed[:, start:stop], model.logits(alone), rtol=0, atol=1e-10)


def test_the_indexer_leaves_the_main_branch_alone_unless_asked():
    def main_gradients(attention):
        model = build(attention)
        tokens = random_tokens(0)
        out = model.loss(tokens, tokens, POSITIONS, model.build_layouts(THREE, LENGTH))
        out.auxiliary.backward()
        return {n: p.grad for n, p in model.named_parameters() if "indexer" not in n and p.grad is not None}

    assert not any(grad.any() for grad in main_gradients(PLANS["indexer"]).values())
    assert any(grad.any() for grad in main_gradients(PLANS["indexer_with_gradient"]).values())


def test_the_loss_of_the_indexer_is_no_part_of_evaluation():
    model, tokens = build(PLANS["indexer"]), random_tokens(0)
    layouts = model.build_layouts(THREE, LENGTH)
    training = model.loss(tokens, tokens, POSITIONS, layouts)
    with torch.no_grad():
        evaluation = model.eval().loss(tokens, tokens, POSITIONS, layouts)
    assert training.auxiliary is not None and evaluation.auxiliary is None
    torch.testing.assert_close(training.per_token, evaluation.per_token, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["indexer", "indexer_in_warm_up"])
def test_the_indexers_loss_in_pieces_is_the_same(name, monkeypatch):
    expected = gradients(build(PLANS[name]))
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 1)
    actual = gradients(build(PLANS[name]))
    for each in expected:
        torch.testing.assert_close(actual[each], expected[each], rtol=0, atol=1e-12)


def test_the_warm_up_ends():
    """One document of six blocks: the target over all of them is far from the target over the two chosen ones."""
    model, tokens, position = build(PLANS["indexer_in_warm_up"]), random_tokens(0), torch.arange(LENGTH)[None]
    layouts = model.build_layouts(None, LENGTH)
    losses = []
    for step in (0, 2, 3):
        model.set_step(step)
        losses.append(model.loss(tokens, tokens, position, layouts).auxiliary.item())
    after = build(PLANS["indexer"]).loss(tokens, tokens, position, layouts).auxiliary.item()
    assert losses == pytest.approx([losses[0], losses[0], after], rel=1e-12)
    assert abs(losses[0] - after) > 1


def test_layers_attend_densely_while_their_indexers_train_alone():
    """In training: evaluation is that of the routed model throughout."""
    model, dense, routed_alone = build(ALONE), build(plan(Dense())), build(PLANS["indexer"])
    tokens, position = random_tokens(0), torch.arange(LENGTH)[None]
    given = tokens, tokens, position
    dense.load_state_dict({name: value for name, value in model.state_dict().items() if "indexer" not in name})
    whole, sparse = (each.loss(*given, each.build_layouts(None, LENGTH)).per_token for each in (dense, routed_alone))
    assert (sparse - whole).abs().max() > 1e-2
    pairs = []
    for step, training, expected in ((0, True, whole), (2, True, whole), (2, False, sparse), (3, True, sparse)):
        model.set_step(step)
        model.train(training)
        layouts = model.build_layouts(None, LENGTH)
        torch.testing.assert_close(model.loss(*given, layouts).per_token, expected, rtol=0, atol=1e-12)
        pairs.append(model.cost(layouts).attention.visible_pairs)
    assert pairs[0] == pairs[1] == dense.cost(dense.build_layouts(None, LENGTH)).attention.visible_pairs
    assert pairs[2] == pairs[3] < pairs[0]


def test_an_indexer_alone_learns_the_mass_of_dense_attention():
    """Packed documents; the loss and its gradients are those of a dense layer's attention, made query by query."""
    actual, expected = gradients(build(ALONE)), gradients(build(ALONE, naive=True))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: n + m)
    assert actual["auxiliary"] > 0 and all(actual[name].any() for name in actual if "indexer" in name)


def test_health_of_the_router_is_noted():
    model, tokens = build(PLANS["indexer"]), random_tokens(0)
    layouts = model.build_layouts(THREE, LENGTH)
    model.loss(tokens, tokens, POSITIONS, layouts)
    noted = model.diagnostics()
    assert noted.keys() == {"entropy", "never_chosen", "age", "indexer_loss"}
    assert 0 <= noted["entropy"] <= 1 and 0 <= noted["never_chosen"] < 1 and noted["age"] > 0
    model.eval().collect_diagnostics(True)
    with torch.no_grad():
        model.loss(tokens, tokens, POSITIONS, layouts)
    assert 0 < float(model.diagnostics()["recall"]) <= 1 + 1e-12
    assert 1 / 8 <= float(model.diagnostics()["union"]) <= 1


def test_recall_is_the_dense_mass_that_is_covered():
    """1 where everything is chosen; else what the dense softmax gives to window and chosen blocks."""
    tokens = random_tokens(0)
    recalls = {}
    for top_k in (1, 20):
        model = build(plan(routed(top_k=top_k))).eval()
        model.collect_diagnostics(True)
        with torch.no_grad():
            model.loss(tokens, tokens, POSITIONS, model.build_layouts(THREE, LENGTH))
        recalls[top_k] = float(model.diagnostics()["recall"])
    assert recalls[20] == pytest.approx(1, abs=1e-12) and recalls[1] < 0.999


def test_families_mix_by_depth():
    patterns = {"local": Window(9), "far": routed(), "three": native_sparse(), "full": Dense()}
    model = lively(Transformer(config(layers=4), plan(patterns)).double())
    found = gradients(model)
    assert all(value.any() for name, value in found.items() if name != "auxiliary")
    cost = model.cost(model.build_layouts(DOCUMENTS, LENGTH)).attention
    assert cost.visible_pairs > 0 and cost.flops > 0


def test_cost_counts_window_choice_and_scores():
    """One document of 64 tokens, window 5, blocks of 16, top_k 1."""
    pattern = routed()
    model = Transformer(config(layers=1, heads=4, kv_heads=2), plan(pattern))
    (layout,) = model.build_layouts(None, 64)
    starts = [window_start(t, 5, 16) for t in range(64)]
    window = sum(t + 1 - max(start, 0) for t, start in enumerate(starts))
    chosen = sum(16 for start in starts if start >= 16)
    scored = sum(max(start, 0) // 16 for start in starts)
    assert layout.parts() == {"window": window, "chosen blocks": chosen, "router scores": scored}
    (core,) = model.cores
    cost = core.cost(layout, batch=1)
    assert cost.visible_pairs == 4 * (window + chosen)
    assert cost.flops == 12 * 8 * cost.visible_pairs + 2 * 8 * 2 * scored


def test_settings_that_cannot_be_are_named():
    for change, message in (
        (dict(window=0), "window=0: must be an integer >= 1"),
        (dict(block=48), "block=48: must be one of 16, 32, 64, 128"),
        (dict(router="oracle"), "router='oracle': must be one of mean_key, indexer"),
        (dict(share="all"), "share='all': must be one of group, head"),
        (dict(first_block=1), "first_block=1: must be true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            routed(**change)
    with pytest.raises(ValueError, match="combine='sum': must be one of lse, gates"):
        native_sparse(combine="sum")
    for change, message in (
        (dict(indexer_loss=0), "indexer_loss=0: must be a positive, finite number"),
        (dict(indexer_warmup=-1), "indexer_warmup=-1: must be an integer >= 0"),
        (dict(indexer_gradient=1), "indexer_gradient=1: must be true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(INDEXER, **change)


def test_an_indexer_must_be_told_how_it_is_trained():
    untrained = dataclasses.replace(PLANS["indexer"], training={})
    with pytest.raises(ValueError, match="router='indexer': must come with IndexerTraining"):
        Transformer(config(), untrained)
    Transformer(config(), dataclasses.replace(PLANS["mean_key"], training={}))


@pytest.mark.parametrize(
    "attention",
    [*PLANS.values(), plan(Hierarchical(window=5, spans=(16, 32), reaches=(20,), pooling="learned"))],
    ids=[*PLANS, "hierarchical"],
)
@pytest.mark.parametrize("length", [5, 15, 40])
def test_every_parameter_has_a_gradient_in_sequences_of_any_length(attention, length):
    """Also where no block or span is whole: data-parallel training stops at a parameter without one."""
    pattern = attention.patterns["only"]
    if isinstance(pattern, NativeSparse):
        attention = dataclasses.replace(attention, patterns={"only": dataclasses.replace(pattern, summary_span=16)})
    model = lively(Transformer(config(sink_logits=True), attention)).train()
    tokens, position = torch.arange(length + 1)[None] * 7 % 64, torch.arange(length)[None]
    out = model.loss(tokens[:, :-1], tokens[:, 1:], position, model.build_layouts(None, length))
    (out.total if out.auxiliary is None else out.total + out.auxiliary).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
