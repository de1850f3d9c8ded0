"""Queries that are some tokens of a longer sequence choose and attend as they do in the whole sequence."""

import importlib.util

import pytest
import torch

from kernels import attention, block_mass, block_means, document_starts, select
from kernels.selection.routing_health import block_use, recall
from tests.kernels.oracle import packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, BLOCK, WINDOW = 112, 16, 20
SETTINGS = dict(top_k=2, window=WINDOW, block=BLOCK, first_block=True)
SOME = torch.cat([torch.arange(32, 48), torch.arange(64, 104)])
DOCUMENTS = packing([70, 3, 39], [16, 82, 14])
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
backends = pytest.mark.parametrize("backend", ["blocked", pytest.param("triton", marks=TRITON)])


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q `[2, 4, LENGTH, 32]`, k and v `[2, 2, LENGTH, 32]`, and the documents' starts."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(2, heads, LENGTH, 32, generator=generator, dtype=torch.float64).to(DEVICE, dtype)  # noqa: E731
    return draw(4), draw(2), draw(2), document_starts(DOCUMENTS).to(DEVICE)


def selections(backend: str, dtype: torch.dtype):
    """The choice of all queries, and that of some of them."""
    q, k, _, first = inputs(dtype)
    queries, summaries = q[:, ::2], block_means(k, first, BLOCK)
    some = SOME.to(DEVICE)
    whole = select(queries, summaries, first, **SETTINGS, backend=backend)
    own = dict(query=some.int(), keys=LENGTH)
    return whole, select(queries[:, :, some], summaries, first[:, some], **SETTINGS, **own, backend=backend)


@backends
def test_the_choice_is_that_of_the_whole_sequence(backend):
    whole, part = selections(backend, torch.float32)
    assert torch.equal(part.chosen, whole.chosen[:, :, SOME.to(DEVICE)])
    assert (part.queries, part.keys, part.offsets.shape[2]) == (len(SOME), LENGTH, LENGTH // BLOCK + 1)
    counted = (part.chosen.unsqueeze(-1) == torch.arange(LENGTH // BLOCK, device=DEVICE)).sum((2, 3))
    assert torch.equal(part.offsets.diff(dim=2), counted)


@backends
def test_attention_and_its_gradients(backend):
    dtype = torch.float64 if backend == "blocked" else torch.float32
    whole, part = selections(backend, torch.float32)
    q, k, v, _ = (each.requires_grad_(each.is_floating_point()) for each in inputs(dtype))
    some = SOME.to(DEVICE)
    weight = torch.cos(torch.arange(len(SOME) * 32, device=DEVICE)).view(len(SOME), 32).to(dtype)

    def attended(queries, selection):
        out, lse = attention(queries, k, v, selection, return_lse=True, backend=backend)
        return out, lse, block_mass(queries, k, lse, selection, backend=backend)

    found = []
    for results in (attended(q[:, :, some], part), [each[:, :, some] for each in attended(q, whole)]):
        loss = (results[0] * weight).sum() + torch.where(results[1].isfinite(), results[1], 0.0).sum()
        found.append([*results, *torch.autograd.grad(loss, (q, k, v))])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def test_diagnostics_count_from_the_queries_own_places():
    whole, part = selections("blocked", torch.float32)
    q, k, _, _ = inputs(torch.float64)
    some = SOME.to(DEVICE)
    of_part = recall(q[:, :, some], k, part, WINDOW, torch.arange(len(SOME), device=DEVICE))
    torch.testing.assert_close(of_part, recall(q, k, whole, WINDOW, some), rtol=0, atol=1e-14)
    chosen = whole.chosen[:, :, some]
    age = some[:, None] - ((chosen + 1) * BLOCK - 1)
    expected = age[chosen >= 0].double().mean()
    torch.testing.assert_close(block_use(part, WINDOW)["age"].double(), expected, rtol=1e-6, atol=0)


def test_indices_and_keys_must_fit():
    q, k, _, first = inputs(torch.float64)
    summaries = block_means(k, first, BLOCK)
    for own, message in (
        (dict(query=SOME.int(), keys=LENGTH), r"query \(56,\): must be \[112\]"),
        (dict(keys=320), "keys=320: must be the number of queries, 112"),
    ):
        with pytest.raises(ValueError, match=message):
            select(q[:, ::2], summaries, first, **SETTINGS, **own)
