"""NaN in Triton kernels (on a CPU in the interpreter): for chosen blocks, in decoding and for choices it stays put."""

import pytest
import torch

pytest.importorskip("triton")

from kernels import Axis, Selection, build_layout, document_starts, select
from kernels.backends.triton import decode
from kernels.layout.cached_keys import CachedKeys
from kernels.patterns import Window
from tests.kernels.backends.test_not_finite import inputs, poison, run
from tests.kernels.oracle import packing
from tests.kernels.routing_oracle import random_choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


def test_a_visible_nan_shows_in_out_and_lse():
    q, k, v, grad_out = on_device(inputs(1, 1, 40, 32, torch.float32))
    k[:, :, 25] = torch.nan
    out, lse, grad_q, _, grad_v = run(
        (q, k, v, grad_out), build_layout(Window(8), Axis.tokens(40, device=DEVICE), block=16), "triton"
    )
    for rows in (out[:, :, 25:33], lse[:, :, 25:33], grad_q[:, :, 25:33], grad_v[:, :, 18:33]):
        assert rows.isnan().all()
    assert out[:, :, :25].isfinite().all() and lse[:, :, :25].isfinite().all() and lse[:, :, 33:].isfinite().all()


def test_chosen_blocks():
    documents = packing([24, 40])  # the second document begins within a block that its queries choose
    chosen = random_choice(documents, 1, 2, window=9, block=16)
    chosen[:, :, 60] = torch.tensor([1, 2], dtype=torch.int32)
    selection = Selection.from_chosen(chosen.to(DEVICE), 64, 16, document_starts(documents).to(DEVICE))
    tensors = on_device(inputs(1, 1, 64, 32, torch.float32))
    plain = run(tensors, selection, "triton")
    hidden = poison(poison(tensors, 1, 20, torch.nan), 2, 20, torch.nan)
    for actual, expected in zip(run(hidden, selection, "triton"), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    _, _, grad_q, *of_keys = run(poison(tensors, 3, 60, torch.nan), selection, "triton")
    assert grad_q[:, :, 60].isnan().all() and grad_q[:, :, :60].isfinite().all() and grad_q[:, :, 61:].isfinite().all()
    for grad in of_keys:
        assert grad[:, :, 24:48].isnan().all() and grad[:, :, :24].isfinite().all() and grad[:, :, 48:].isfinite().all()


def test_decoding_several_queries():
    q, k, v, _ = on_device(inputs(1, 2, 40, 32, torch.float32))
    q = q[:, :, :4]
    mask = torch.ones(1, 1, 4, 40, dtype=torch.bool, device=DEVICE)
    mask[:, :, ::2, 7] = False
    plain = decode.forward(q, [CachedKeys(k, v, mask)], 0.4, None)
    for which in range(2):
        keys = [k.clone(), v.clone()]
        keys[which][:, :, 7] = torch.nan
        out, lse = decode.forward(q, [CachedKeys(*keys, mask)], 0.4, None)
        torch.testing.assert_close(out[:, :, ::2], plain[0][:, :, ::2])
        torch.testing.assert_close(lse[:, :, ::2], plain[1][:, :, ::2])
        assert out[:, :, 1::2].isnan().all() and lse[:, :, 1::2].isnan().all() == (which == 0)


def test_scores_that_a_query_may_not_choose_by_change_no_choice():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 1, 128, 16, generator=generator).to(DEVICE)
    summaries = torch.randn(1, 1, 8, 16, generator=generator).to(DEVICE)
    document_start = torch.zeros(1, 128, dtype=torch.int32, device=DEVICE)
    settings = dict(top_k=2, window=9, block=16, backend="triton")
    plain = select(queries, summaries, document_start, **settings).chosen
    summaries[:, :, 4] = torch.nan  # eligible from query 88 on
    chosen = select(queries, summaries, document_start, **settings).chosen
    assert torch.equal(chosen[:, :, :88], plain[:, :, :88]) and (chosen[:, :, 88:] == 4).any(-1).all()
