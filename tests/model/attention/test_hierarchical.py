"""The hierarchical family within a model: where summaries stand, gradients, precision, weights, cost."""

import logging

import pytest
import torch

from kernels import Axis
from kernels.patterns import Dense, Hierarchical, Window
from kernels.summaries.hierarchy import build_hierarchy
from model import Transformer
from model.attention.hierarchical.core import HierarchicalAttention
from model.attention.hierarchical.pooling import SummaryPool
from model.rope import RotaryEmbedding, rotate
from model.training.checkpoints import CheckpointError, CheckpointFile, load_weights
from tests.kernels.oracle import packing
from tests.model.small import config, lively, plan, positions_of

LEARNED = Hierarchical(window=6, spans=(4, 12), reaches=(17,), pooling="learned")
MEAN = Hierarchical(window=6, spans=(4, 12), reaches=(17,), pooling="mean")
DOCUMENTS = packing([37, 46, 12], [50, 13, 32])
LENGTH = DOCUMENTS.shape[1]


def observe(model: Transformer, documents: torch.Tensor = DOCUMENTS) -> dict[str, torch.Tensor]:
    """The loss of every token and the gradients of their sum."""
    tokens = torch.randint(64, (len(documents), documents.shape[1]), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    layouts = model.build_layouts(documents, documents.shape[1])
    loss = model.loss(tokens, tokens.roll(-1, 1), positions_of(documents), layouts)
    loss.total.backward()
    return {"loss": loss.per_token} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **limits: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **limits)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (16, 1)])
@pytest.mark.parametrize("pattern", [LEARNED, MEAN], ids=["learned", "mean"])
def test_backends_give_the_same_model_and_gradients(pattern, heads, kv_heads):
    sizes = {"heads": heads, "kv_heads": kv_heads, "sink_logits": True}
    build = lambda backend: lively(Transformer(config(**sizes), plan(pattern, backend=backend)).double())  # noqa: E731
    expected = observe(build("reference"))
    assert_close(observe(build("blocked")), expected, rtol=0, atol=1e-11)
    assert all(gradient.any() for gradient in expected.values())


def test_a_summary_is_the_pooled_key_turned_as_its_middle_token():
    sizes = config(kv_heads=2, head_dim=8)
    torch.manual_seed(0)
    pool = SummaryPool(LEARNED.spans, "learned", sizes)
    torch.nn.init.normal_(pool.query)
    position = positions_of(DOCUMENTS[:1]) + 5  # what the caller says, whatever it may be
    rotation = RotaryEmbedding(sizes)(position)
    keys, values = torch.randn(2, 1, LENGTH, 2, 8)
    levels = build_hierarchy(LEARNED, Axis.tokens(LENGTH, DOCUMENTS[:1]), 16).levels[1:]
    fine, coarse = pool(keys, values, rotation, levels)
    # The second document's first coarse span: tokens 37 to 48, three summaries of four, in the slot of token 37.
    parts = []
    for begin in (37, 41, 45):
        k, v = keys[0, begin : begin + 4], values[0, begin : begin + 4]
        weights = torch.einsum("nkd,kd->nk", k, pool.query[0]).softmax(0)
        parts.append([torch.einsum("nk,nkd->kd", weights, each) for each in (k, v)])
        expected = rotate(parts[-1][0][None, None], *(t[:, begin + 2 : begin + 3] for t in rotation))
        torch.testing.assert_close(fine[0][0, :, begin // 4], expected[0, 0])
        torch.testing.assert_close(fine[1][0, :, begin // 4], parts[-1][1])
    k, v = (torch.stack(each) for each in zip(*parts, strict=True))
    weights = torch.einsum("nkd,kd->nk", k, pool.query[1]).softmax(0)
    expected = rotate(torch.einsum("nk,nkd->kd", weights, k)[None, None], *(t[:, 43:44] for t in rotation))
    torch.testing.assert_close(coarse[0][0, :, 37 // 12], expected[0, 0])
    torch.testing.assert_close(coarse[1][0, :, 37 // 12], torch.einsum("nk,nkd->kd", weights, v))


def test_a_learned_pool_begins_as_the_mean():
    torch.manual_seed(0)
    learned = Transformer(config(), plan(LEARNED))
    mean = Transformer(config(), plan(MEAN))
    mean.load_state_dict(learned.state_dict(), strict=False)
    torch.testing.assert_close(observe(learned)["loss"], observe(mean)["loss"])
    lively(learned)
    mean.load_state_dict(learned.state_dict(), strict=False)
    assert float((observe(learned)["loss"] - observe(mean)["loss"]).abs().max()) > 1e-2


def test_a_window_over_everything_is_dense_attention():
    wide = Hierarchical(window=LENGTH, spans=(4,), reaches=(), pooling="mean")
    hierarchical, dense = (lively(Transformer(config(), plan(p)).double()) for p in (wide, Dense()))
    assert_close(observe(hierarchical), observe(dense), rtol=0, atol=1e-11)


def test_a_sequence_shorter_than_the_coarsest_span_has_fewer_levels():
    model = lively(Transformer(config(), plan(LEARNED)).double())
    short = observe(model, packing([11]))
    long = observe(model, packing([11, 30]))
    torch.testing.assert_close(short["loss"][0, :10], long["loss"][0, :10])


def test_bfloat16_autocast_is_close_to_float32():
    model = lively(Transformer(config(), plan(LEARNED)))
    exact = observe(model)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = observe(model)["loss"]
    assert abs(rounded.sum() - exact.sum()) < 0.02 * exact.sum()
    assert (rounded - exact).abs().max() > 1e-2, "nothing was rounded"


@pytest.mark.parametrize("documents", [None, DOCUMENTS[:1]], ids=["one_document", "packed"])
def test_pooling_keeps_no_float32_copy_of_the_tokens_for_the_backward_pass(documents):
    sizes = config(kv_heads=2, head_dim=8)
    pool = SummaryPool(LEARNED.spans, "learned", sizes)
    torch.nn.init.normal_(pool.query)
    levels = build_hierarchy(LEARNED, Axis.tokens(LENGTH, documents), 16).levels[1:]
    rotation = RotaryEmbedding(sizes)(torch.arange(LENGTH)[None])
    keys, values = (torch.randn(1, LENGTH, 2, 8).bfloat16().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summaries = pool(keys, values, rotation, levels)
    assert all(t.dtype == torch.bfloat16 for level in summaries for t in level)
    assert any(t.dtype == torch.float32 for t in kept)  # weights, coarser levels
    largest = LENGTH // 4 * 2 * 8  # the fine level's summaries
    assert all(t.numel() <= largest for t in kept if t.dtype != torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", [LEARNED, MEAN], ids=["learned", "mean"])
def test_a_training_step_on_the_gpu_waits_for_nothing_and_equals_the_cpu(pattern):
    """bf16 autocast, packed documents: the second step in a mode in which waiting for the device is an error."""
    sizes = config(width=64, heads=4, kv_heads=2, head_dim=32)
    model = lively(Transformer(sizes, plan(pattern)), seed=1)
    exact = observe(model)
    model = model.cuda().train()
    tokens = torch.randint(64, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0)).cuda()
    targets, position = tokens.roll(-1, 1), positions_of(DOCUMENTS).cuda()

    def step(documents: torch.Tensor):
        layouts = model.build_layouts(documents, LENGTH)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, targets, position, layouts)
        loss.total.backward()
        return loss, layouts

    step(packing([95, 0, 0], [20, 30, 45]).cuda())
    model.zero_grad()
    documents = DOCUMENTS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, layouts = step(documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not model.overflow(layouts)
    torch.testing.assert_close(loss.per_token.sum().cpu(), exact["loss"].sum(), rtol=0.02, atol=0)
    pool = [(p.grad.cpu(), exact[name]) for name, p in model.named_parameters() if ".pool." in name]
    for got, wanted in pool:
        assert (got - wanted).norm() < 0.1 * wanted.norm()


# Weights


def checkpoint(model: Transformer, path) -> None:
    torch.save({"state_dict": {f"model.{name}": t for name, t in model.state_dict().items()}}, path)


def test_weights_go_to_another_pattern_and_the_log_says_what_does_not(tmp_path, caplog):
    hierarchical, window = (lively(Transformer(config(), plan(p)), seed=3) for p in (LEARNED, Window(9)))
    checkpoint(hierarchical, tmp_path / "hierarchical.ckpt")
    checkpoint(window, tmp_path / "window.ckpt")
    with caplog.at_level(logging.INFO):
        load_weights(target := Transformer(config(), plan(Window(9))), CheckpointFile(tmp_path / "hierarchical.ckpt"))
    assert caplog.text.count("is left out: this pattern has none") == 2
    assert torch.equal(target.layers[1].mlp.up_proj.weight, hierarchical.layers[1].mlp.up_proj.weight)
    with caplog.at_level(logging.INFO):
        load_weights(target := Transformer(config(), plan(LEARNED)), CheckpointFile(tmp_path / "window.ckpt"))
    assert caplog.text.count("it keeps its initial value") == 2
    assert torch.equal(target.embed_tokens.weight, window.embed_tokens.weight)
    assert not target.layers[0].self_attn.core.pool.query.any()


def test_pools_of_another_shape_are_refused(tmp_path):
    checkpoint(Transformer(config(), plan(LEARNED)), tmp_path / "two.ckpt")
    one = Hierarchical(window=6, spans=(4,), reaches=(), pooling="learned")
    with pytest.raises(CheckpointError, match=r"attend\.pool\.query is \[2, 2, 8\] in the checkpoint and \[1, 2, 8\]"):
        load_weights(Transformer(config(), plan(one)), CheckpointFile(tmp_path / "two.ckpt"))


# Cost


def test_a_models_cost_adds_layers_of_all_families():
    model = Transformer(config(layers=3), plan({"near": Window(5), "far": LEARNED}, ["near", "far"]))
    assert [isinstance(layer.self_attn.core, HierarchicalAttention) for layer in model.layers] == [False, True, False]
    layouts = model.build_layouts(DOCUMENTS, LENGTH)
    assert layouts[0] is layouts[2]
    cost = model.cost(layouts)
    near, far = int(layouts[0].pairs.sum()), sum(layouts[1].parts().values())
    assert cost.attention.visible_pairs == 4 * (2 * near + far)
    assert cost.attention.causal_pairs == 3 * 4 * 2 * LENGTH * (LENGTH + 1) // 2
    shared = model.build_layouts(None, LENGTH)
    assert model.cost(shared, batch=3).attention.flops == 3 * model.cost(shared).attention.flops
