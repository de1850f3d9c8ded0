"""Decoding on a GPU: the kernels that training uses, and a cache, give what one pass gives."""

import time

import pytest
import torch

from kernels.patterns import BlockSparse, Dense, Hierarchical, Strided, Window
from model import Cache, Transformer
from tests.model.decoding.test_parity import random_tokens
from tests.model.small import config, lively, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERNS = {
    "dense": Dense(),
    "window": Window(200, 4),
    "strided": Strided(100, 256, 32),
    "blocks": BlockSparse(64, 2, 1, 2),
    "hierarchical": Hierarchical(window=128, spans=(16, 64), reaches=(256,), pooling="learned"),
}
LENGTH = 900


def build(name: str, dtype: torch.dtype) -> Transformer:
    sizes = dict(head_dim=32, width=64, max_length=1 << 20)
    model = lively(Transformer(config(**sizes), plan(PATTERNS[name], block=64))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.dim() == 2 else 1)
    return model.to("cuda", dtype)


@torch.no_grad()
def cached_logits(model: Transformer, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = Cache(model, len(tokens))
    return torch.cat([model.logits(cache.extend(part)) for part in tokens.split(sizes, 1)], 1)


def one_pass(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    position = torch.arange(tokens.shape[1], device="cuda").expand(tokens.shape)
    with torch.no_grad():
        return model.logits(model(tokens, position, model.build_layouts(None, tokens.shape[1])))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_chunks_give_the_logits_of_one_pass(name, dtype, limit):
    """float32 to the bound of the CPU's proof; bfloat16 to a few roundings of the largest logit."""
    model, tokens = build(name, dtype), random_tokens(2, LENGTH).cuda()
    whole = one_pass(model, tokens)
    for sizes in ([63, 64, 65, 300, 7, *[1] * 101, 300], [1] * 200 + [700]):
        found = cached_logits(model, tokens, sizes)
        assert (found - whole).abs().max() <= limit * max(1.0, float(whole.abs().max()))


def test_a_windows_token_costs_the_same_behind_any_context():
    """By the clock, within a factor of 1.5: 8,192 and 131,072 tokens of context, 16 sequences."""
    model, medians = build("window", torch.bfloat16), []
    for context in (8192, 131072):
        cache = Cache(model, 16)
        for part in random_tokens(16, context).split(8192, 1):
            cache.extend(part.cuda())
        token, times = random_tokens(16, 1).cuda(), []
        for _ in range(30):
            torch.cuda.synchronize()
            started = time.perf_counter()
            cache.extend(token)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        medians.append(sorted(times)[15])
    assert medians[1] <= 1.5 * medians[0], medians
