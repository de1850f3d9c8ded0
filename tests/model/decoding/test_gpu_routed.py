"""Routed decoding on a GPU: kernels choose and attend in one pass, a cache by its own few queries."""

import pytest
import torch

from kernels.patterns import NativeSparse, Routed
from tests.model.decoding import test_gpu
from tests.model.decoding.test_parity import BRANCHES, ROUTED, random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = ROUTED | {"window": 100, "block": 64}
EVERY_BLOCK = SETTINGS | {"top_k": 99}
"""In bfloat16 two ways to one score differ, and so may what is picked by it: there every block is."""
PATTERNS = {
    "routed": (Routed(**SETTINGS | {"top_k": 3}), torch.float32),
    "routed_by_head": (Routed(**SETTINGS | {"top_k": 3, "share": "head", "first_block": True}), torch.float32),
    "routed_by_indexer": (Routed(**SETTINGS | {"top_k": 3, "router": "indexer"}), torch.float32),
    "native_sparse": (NativeSparse(**SETTINGS | BRANCHES | {"top_k": 3, "summary_span": 16}), torch.float32),
    "routed_in_bfloat16": (Routed(**EVERY_BLOCK), torch.bfloat16),
    "native_sparse_in_bfloat16": (NativeSparse(**EVERY_BLOCK | BRANCHES | {"combine": "gates"}), torch.bfloat16),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_give_the_logits_of_one_pass(name, monkeypatch):
    pattern, dtype = PATTERNS[name]
    monkeypatch.setitem(test_gpu.PATTERNS, name, pattern)
    model, tokens = test_gpu.build(name, dtype), random_tokens(2, test_gpu.LENGTH).cuda()
    whole, limit = test_gpu.one_pass(model, tokens), {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for sizes in ([63, 64, 65, 300, 7, *[1] * 101, 300], [1] * 200 + [700]):
        found = test_gpu.cached_logits(model, tokens, sizes)
        assert (found - whole).abs().max() <= limit * max(1.0, float(whole.abs().max())), sizes


@pytest.mark.parametrize("name", PATTERNS)
def test_a_recorded_step_is_the_step_and_as_exact_as_one_pass(name, monkeypatch):
    pattern, dtype = PATTERNS[name]
    monkeypatch.setitem(test_gpu.PATTERNS, name, pattern)
    test_gpu.test_a_recorded_step_is_the_step_and_as_exact_as_one_pass(name, dtype)


@pytest.mark.parametrize("name", ["routed_by_head", "native_sparse_in_bfloat16"])
def test_a_step_waits_for_nothing(name, monkeypatch):
    monkeypatch.setitem(test_gpu.PATTERNS, name, PATTERNS[name][0])
    test_gpu.test_a_step_waits_for_nothing(name)
