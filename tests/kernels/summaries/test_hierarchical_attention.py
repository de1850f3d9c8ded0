"""Pooling and attention to summaries, against a float64 oracle that knows neither slots nor tiles."""

import pytest
import torch

from kernels import Axis, attention
from kernels.patterns import Hierarchical
from kernels.summaries.hierarchy import build_hierarchy
from kernels.summaries.span_pooling import middles, pool
from tests.kernels.oracle import Case, assert_same, dense_attention, packing
from tests.kernels.summaries.test_hierarchy import BLOCK, DOCUMENTS, LENGTH, THREE, TWO


def oracle(pattern, tokens: Axis, q, k, v, queries_by_level, sink_logits=None):
    """Sequence by sequence and document by document: spans are slices, softmax is over a list of keys.

    `queries_by_level` float64 `[levels, kv_heads, head_dim]`, or None for the mean. Returns (out, lse)."""
    out, lse = [], []
    for b in range(q.shape[0]):
        document = tokens.document[min(b, tokens.batch - 1)]
        keys, values, covers = [k[b]], [v[b]], [torch.eye(tokens.length, dtype=torch.bool)]
        finer = {(int(i), 1): (k[b, :, i], v[b, :, i]) for i in range(tokens.length)}
        unit = 1
        for level, span in enumerate(pattern.spans):
            for each in document.unique().tolist():
                where = (document == each).nonzero().flatten().tolist()
                for begin in range(where[0], where[-1] + 2 - span, span):
                    pieces = [finer[(i, unit)] for i in range(begin, begin + span, unit)]
                    piece_keys, piece_values = (torch.stack(part, 1) for part in zip(*pieces, strict=True))
                    if queries_by_level is None:
                        weights = torch.full(piece_keys.shape[:2], unit / span, dtype=q.dtype)
                    else:
                        weights = torch.einsum("hnd,hd->hn", piece_keys, queries_by_level[level]).softmax(-1)
                    summary = [torch.einsum("hn,hnd->hd", weights, part) for part in (piece_keys, piece_values)]
                    finer[(begin, span)] = tuple(summary)
                    keys.append(summary[0][:, None]), values.append(summary[1][:, None])
                    stands_for = torch.arange(tokens.length)
                    covers.append(((stands_for >= begin) & (stands_for < begin + span))[None])
            unit = span
        covers = torch.cat(covers)
        # A query sees the coarsest keys that its pattern lets it see; positions count within the document.
        start = torch.tensor([int((document == d).nonzero()[0]) for d in document.tolist()])
        first = covers.int().argmax(-1)
        size = covers.sum(-1)
        position = torch.arange(tokens.length) - start
        key_start = first - start[first]
        mask = pattern.visible(position[:, None], key_start, key_start + size)
        mask &= (document[:, None] == document[first]) & (key_start + size <= position[:, None] + 1)
        one = dense_attention(
            q[b : b + 1],
            torch.cat(keys, 1)[None],
            torch.cat(values, 1)[None],
            mask[None, None],
            q.shape[-1] ** -0.5,
            sink_logits,
        )
        out.append(one[0]), lse.append(one[1])
    return torch.cat(out), torch.cat(lse)


def hierarchical_attention(pattern, hierarchy, q, k, v, queries_by_level, sink_logits=None, backend="blocked"):
    """Pooling and attention from kernels' pieces (without a rotation, which the kernels know nothing of)."""
    keys, values, unit = k.transpose(1, 2), v.transpose(1, 2), 1
    parts = [(k, v)]
    for i, level in enumerate(hierarchy.levels[1:]):
        scores = None if queries_by_level is None else (keys * queries_by_level[i].to(keys.dtype)).sum(-1)
        keys, values = pool(keys, values, scores, level.axis, level.span, unit)
        parts.append((keys.to(q.dtype).transpose(1, 2), values.to(q.dtype).transpose(1, 2)))
        unit = level.span
    k, v = (hierarchy.join(each) for each in zip(*parts, strict=True))
    return attention(q, k, v, hierarchy.layout, sink_logits=sink_logits, return_lse=True, backend=backend)


def run_both(pattern, documents, pooling, backend, case: Case):
    tokens = Axis.tokens(case.queries, documents)
    hierarchy = build_hierarchy(pattern, tokens, BLOCK)
    if pooling == "learned":
        generator = torch.Generator().manual_seed(1)
        shape = (len(pattern.spans), case.kv_heads, case.head_dim)
        case.tensors["pool"] = torch.randn(shape, generator=generator, dtype=torch.float64)

    def run(function):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
        out, lse = function(
            *(leaves[name] for name in "qkv"), leaves.get("pool"), sink_logits=leaves.get("sink_logits")
        )
        loss = (out.double() * case.out_weight.double()).sum() + (lse.double() * case.lse_weight).sum()
        loss.backward()
        gradients = {f"grad_{name}": leaf.grad.double() for name, leaf in leaves.items()}
        return {"out": out.detach().double(), "lse": lse.detach().double()} | gradients

    actual = run(lambda *args, **kwargs: hierarchical_attention(pattern, hierarchy, *args, **kwargs, backend=backend))
    expected = run(lambda q, k, v, *args, **kwargs: oracle(pattern, tokens, q, k, v, *args, **kwargs))
    return actual, expected


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("pooling", ["mean", "learned"])
@pytest.mark.parametrize("documents", ["none", "packed", "short"])
@pytest.mark.parametrize("pattern", [TWO, THREE], ids=["two_levels", "three_levels"])
def test_outputs_and_all_gradients_equal_the_oracle(pattern, documents, pooling, backend):
    batch = 1 if documents == "none" else 2
    case = Case(LENGTH, LENGTH, batch=batch, kv_heads=2, group=2, head_dim=4)
    assert_same(*run_both(pattern, DOCUMENTS[documents], pooling, backend, case), torch.float64)


@pytest.mark.parametrize("group", [1, 4, 16])
def test_groups_of_heads_equal_the_oracle(group):
    case = Case(53, 53, kv_heads=1 if group == 16 else 2, group=group, head_dim=4)
    assert_same(*run_both(TWO, packing([33, 20]), "learned", "blocked", case), torch.float64)


@pytest.mark.parametrize("length", [2, 3, 4, 15, 16, 17, 33])
def test_ragged_lengths_equal_the_oracle(length):
    spans, reaches = ((2, 4), (5,)) if length >= 4 else ((2,), ())
    case = Case(length, length, kv_heads=2, group=2, head_dim=4)
    assert_same(*run_both(Hierarchical(2, spans, reaches, "learned"), None, "learned", "blocked", case), torch.float64)


def test_bfloat16_is_pooled_in_float32():
    """A mean of many bfloat16 keys keeps what a sum in bfloat16 would lose, autocast or not."""
    tokens = Axis.tokens(512)
    axis = Axis.summaries(tokens, 512)
    keys = (1 + torch.randn(1, 512, 1, 4, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    scores = keys.float().sum(-1)
    for weights in (None, scores):
        with torch.autocast("cpu", torch.bfloat16):
            pooled = pool(keys, keys, weights, axis, 512)[0]
        expected = torch.full((512,), 1 / 512) if weights is None else scores[0, :, 0].softmax(0)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled[0, 0, 0], expected @ keys[0, :, 0].float(), rtol=1e-5, atol=1e-6)


def test_a_summary_stands_in_the_middle_of_its_span():
    axis = Axis.summaries(Axis.tokens(20, packing([9, 11])), 4)
    assert middles(axis, 4).tolist() == [[2, 6, 11, 15, 19]]
    assert (axis.end > axis.start).tolist() == [[True, True, True, True, False]]
