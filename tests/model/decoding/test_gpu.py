"""Decoding on a GPU: the kernels that training uses, and a cache, give what one pass gives."""

import copy
import time

import pytest
import torch

from kernels.patterns import BlockSparse, Dense, Hierarchical, Strided, Window
from model import Cache, Sampling, Transformer, generate
from model.decoding import TokenStep, fill_with_random_keys
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


def exact_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Of one pass in float64, on the CPU, with the weights as they are."""
    exact = copy.deepcopy(model).cpu().double()
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        return exact.logits(exact(tokens.cpu(), position, exact.build_layouts(None, tokens.shape[1])))


@torch.no_grad()
def steps(model: Transformer, tokens: torch.Tensor, prompts: list[int], count: int, cuda_graph: bool) -> torch.Tensor:
    """Logits `[batch, count, vocabulary]` of the tokens behind ragged prompts, one by one. Every other step leaves out
    one sequence (the tokens of others do not depend on it)."""
    cache, read = Cache(model, len(tokens)), list(prompts)
    cache.extend(tokens[:, : max(prompts)], prompts)
    step = TokenStep(cache, max(prompts) + count, cuda_graph)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(len(each) < count for each in found):
        new = [int(len(each) < count and (i != len(each) % 3 or sum(read) % 2)) for i, each in enumerate(found)]
        new = new if any(new) else [int(len(each) < count) for each in found]
        last = torch.tensor(read, device=tokens.device).clamp(max=tokens.shape[1] - 1)  # what waits is not read
        logits = model.logits(step(tokens.gather(1, last[:, None]), new))
        for i, more in enumerate(new):
            found[i] += [logits[i].clone()] * more
            read[i] += more
    return torch.stack([torch.cat(each) for each in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_recorded_step_is_the_step_and_as_exact_as_one_pass(name, dtype):
    """Replays give the bits of the same kernels started one by one. Their error, against one pass in float64, is that
    of one pass in the same dtype: at most twice as large (largest of thousands of roundings)."""
    prompts, count = [401, 250, 380], 80
    model, tokens = build(name, dtype), random_tokens(3, max(prompts) + count).cuda()
    replayed, started = (steps(model, tokens, prompts, count, graph) for graph in (True, False))
    assert torch.equal(replayed, started)
    exact, whole = exact_logits(model, tokens), one_pass(model, tokens).cpu()
    behind = lambda logits: torch.stack([row[n : n + count] for row, n in zip(logits, prompts, strict=True)])  # noqa: E731
    error = (replayed.cpu().double() - behind(exact)).abs().max()
    assert error <= 2 * (behind(whole).double() - behind(exact)).abs().max()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_step_waits_for_nothing(name):
    """In a mode in which waiting for the device is an error; the same kernels unrecorded, and replayed."""
    model, tokens = build(name, torch.bfloat16), random_tokens(2, 400).cuda()
    with torch.no_grad():
        for graph in (False, True):
            cache = Cache(model, 2)
            cache.extend(tokens)
            step = TokenStep(cache, 500, graph)
            step(tokens[:, :1])
            torch.cuda.set_sync_debug_mode("error")
            try:
                for index in range(70):
                    step(tokens[:, index : index + 1])
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", PATTERNS)
def test_recorded_generation_gives_the_same_text(name):
    model = build(name, torch.float32)
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, 200, 131)]
    settings = dict(new_tokens=100, prefill_chunk=64, sampling=Sampling(temperature=0, top_k=None, top_p=1, seed=0))
    endings = lambda sequence, token: sequence == 1 and token % 16 == 3  # noqa: E731
    plain, recorded = (
        generate(model, prompts, on_token=endings, cuda_graph=graph, **settings) for graph in (False, True)
    )
    assert plain == recorded and len(recorded[0]) == 100


def test_under_autocast_a_recording_outlives_what_autocast_keeps():
    model, tokens = build("window", torch.float32), random_tokens(2, 300).cuda()
    cache = Cache(model, 2)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        cache.extend(tokens[:, :299])
        step = TokenStep(cache, 310, cuda_graph=True)
    junk = [torch.full((64, 64), 1e4, device="cuda", dtype=torch.bfloat16) for _ in range(64)]  # takes what was freed
    with torch.no_grad():
        found = model.logits(step(tokens[:, 299:]).float())[:, 0]
        whole = one_pass(model, tokens)[:, -1]
    del junk
    assert (found - whole).abs().max() <= 5e-2 * whole.abs().max()


@pytest.mark.alone
@pytest.mark.parametrize("name", ["window", "hierarchical"])
def test_a_sparse_token_costs_the_same_behind_any_context(name):
    """By the clock: 8,192 and 131,072 tokens of context, 16 sequences; within a factor of 1.2."""
    model, medians = build(name, torch.bfloat16), []
    for context in (8192, 131072):
        cache, token, times = Cache(model, 16), random_tokens(16, 1).cuda(), []
        cache.reserve(context + 200)
        cache.extend(token)
        fill_with_random_keys(cache, context)
        step = TokenStep(cache, context + 200, cuda_graph=True)
        for _ in range(100):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(token)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        medians.append(sorted(times)[50])
    assert medians[1] <= 1.2 * medians[0], medians
