"""merge(): attention over disjoint keys, part by part, is one softmax over all of them, gradients included."""

import itertools

import pytest
import torch

from kernels import Axis, attention, build_layout, merge
from kernels.patterns import Dense, Window
from tests.kernels.layout.test_layout import summaries
from tests.kernels.oracle import Case, assert_same, brute_force_mask, dense_attention, packing
from tests.kernels.test_attention import both_backends


def test_merge_over_disjoint_keys_is_one_softmax_over_all():
    """Three disjoint sets: a window, what the window leaves, and summaries as further keys."""
    tokens, case = Axis.tokens(60, packing([25, 35])), Case(60, 60, batch=2, group=2, sinks=False)
    extra = summaries([25, 35], span=6)
    more = Case(60, extra.length, batch=2, group=2, sinks=False, seed=1).tensors
    near, far = brute_force_mask(Window(9), tokens), brute_force_mask(Dense(), tokens)
    masks = [near, far & ~near, brute_force_mask(Dense(), tokens, extra)]

    def merged(q, k, v, _):
        parts = [dense_attention(q, k, v, mask, 0.3) for mask in masks[:2]]
        return merge([*parts, dense_attention(q, more["k"], more["v"], masks[2], 0.3)])

    def at_once(q, k, v, _):
        keys, values = torch.cat([k, more["k"]], 2), torch.cat([v, more["v"]], 2)
        return dense_attention(q, keys, values, torch.cat([far, masks[2]], -1), 0.3)

    assert_same(case.run(merged), case.run(at_once), torch.float64)


@both_backends
def test_merge_of_kernel_outputs_with_gradients_through_lse(backend):
    """Every second key from one call, the others from another: gradients of q, k, v are those of one softmax."""
    axis, case = Axis.tokens(50), Case(50, 50, group=2, sinks=False)
    even, odd = (
        Axis(*(getattr(axis, name)[:, first::2] for name in ("start", "end", "document", "origin"))) for first in (0, 1)
    )
    layouts = [build_layout(Dense(), axis, half, 16) for half in (even, odd)]

    def merged(q, k, v, _):
        halves = [(k[:, :, first::2], v[:, :, first::2]) for first in (0, 1)]
        return merge(
            [
                attention(q, *half, layout, return_lse=True, backend=backend)
                for half, layout in zip(halves, layouts, strict=True)
            ]
        )

    expected = case.run(lambda q, k, v, _: dense_attention(q, k, v, brute_force_mask(Dense(), axis), 8**-0.5))
    assert_same(case.run(merged), expected, torch.float64)


def test_merge_gives_no_weight_to_parts_that_see_nothing():
    out = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[1.0, -torch.inf, 2.0]] * 2, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf).requires_grad_()
    merged, total = merge([(out, lse), nothing])
    assert torch.equal(merged[:, [0, 2]], out[:, [0, 2]]) and torch.equal(total, lse)
    assert not merged[:, 1].any()
    (merged.sum() + total[:, [0, 2]].sum()).backward()
    assert all(t.grad.isfinite().all() for t in (out, lse, nothing[1]))
    assert not nothing[1].grad.any()


def test_merge_does_not_overflow_and_does_not_mind_order():
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(5, 4, generator=generator), 3000 * torch.randn(5, generator=generator)) for _ in range(3)]
    results = [merge(order) for order in itertools.permutations(parts)]
    for out, lse in results:
        assert out.isfinite().all() and lse.isfinite().all()
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(lse, torch.stack([lse for _, lse in parts]).logsumexp(0))


def test_merge_of_one_part_is_that_part():
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged, total = merge([(out, lse)])
    assert torch.equal(merged, out)
    torch.testing.assert_close(total, lse, rtol=0, atol=1e-6)


def test_merge_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"results=\[\]: must hold at least one"):
        merge([])
