"""The loss of an indexer is autograd's KL divergence, by operators that compute slices of any size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from kernels import Selection, document_starts
from kernels.selection.indexer_loss import SCORES_AT_ONCE, dense_indexer_loss, indexer_loss
from tests.kernels.oracle import packing
from tests.kernels.routing_oracle import random_choice, window_start

LENGTH, BLOCK, WINDOW, SELECTORS, HEADS, KV_HEADS, DIM, HEAD_DIM = 70, 16, 9, 2, 4, 2, 4, 8
BLOCKS = LENGTH // BLOCK
DOCUMENTS = packing([70], [16, 50, 4])
BATCH = len(DOCUMENTS)
CHOSEN = random_choice(DOCUMENTS, SELECTORS, 3, WINDOW, BLOCK, seed=0)
SELECTION = Selection.from_chosen(CHOSEN, LENGTH, BLOCK, document_starts(DOCUMENTS))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERIES = draw(BATCH, LENGTH, SELECTORS, DIM).transpose(1, 2)
SUMMARIES = draw(BATCH, 1, BLOCKS, DIM, seed=1).expand(-1, SELECTORS, -1, -1)
Q, K = draw(BATCH, HEADS, LENGTH, HEAD_DIM, seed=2), draw(BATCH, KV_HEADS, LENGTH, HEAD_DIM, seed=3)
MASS = torch.where(CHOSEN >= 0, draw(*CHOSEN.shape, seed=4).sigmoid(), 0.0)
LOSSES = {
    "chosen": lambda queries, summaries: indexer_loss(queries, summaries, SELECTION, MASS.to(queries.dtype)),
    "dense": lambda queries, summaries: dense_indexer_loss(
        queries, summaries, Q.to(queries.dtype), K.to(queries.dtype), SELECTION, WINDOW
    ),
}
OPERATORS = {
    "chosen": (torch.ops.farsight.indexer_loss.default, (CHOSEN, MASS)),
    "dense": (
        torch.ops.farsight.dense_indexer_loss.default,
        (Q, K, SELECTION.document_start, SELECTION.query_index, WINDOW, BLOCK, 0.3),
    ),
}
both_targets = pytest.mark.parametrize("target", LOSSES)


def blocks_and_mass(target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(takes part, attention received), both `[batch, selectors, length, blocks]`, of whole dense masks."""
    if target == "chosen":
        matches = CHOSEN[..., None] == torch.arange(BLOCKS)
        return matches.any(3), (matches * MASS[..., None]).sum(3)
    index = torch.arange(LENGTH)
    past = (index <= index[:, None]) & (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])
    scores = Q @ K.repeat_interleave(HEADS // KV_HEADS, 1).mT * HEAD_DIM**-0.5
    weights = torch.where(past[:, None], scores, -torch.inf).softmax(-1)
    cut = lambda of_keys: of_keys[..., : BLOCKS * BLOCK].unflatten(-1, (BLOCKS, BLOCK))  # noqa: E731
    before_window = index < torch.tensor([window_start(t, WINDOW, BLOCK) for t in range(LENGTH)])[:, None]
    takes_part = cut(past & before_window).any(-1)[:, None].expand(-1, SELECTORS, -1, -1)
    return takes_part, cut(weights).sum(-1).unflatten(1, (SELECTORS, -1)).mean(2)


def divergence(queries: torch.Tensor, summaries: torch.Tensor, target: str) -> torch.Tensor:
    takes_part, received = blocks_and_mass(target)
    wanted = torch.where(takes_part, received, 0.0)
    wanted = wanted / wanted.sum(-1, keepdim=True).where(takes_part.any(-1, keepdim=True), 1.0)
    log_shares = torch.where(takes_part, queries @ summaries.mT, -1e300).log_softmax(-1)
    terms = torch.special.xlogy(wanted, wanted) - torch.where(takes_part, wanted * log_shares, 0.0)
    return terms.sum() / SELECTORS


def loss_and_gradients(function, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    leaves = [each.to(dtype, copy=True).requires_grad_() for each in (QUERIES, SUMMARIES)]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@both_targets
@pytest.mark.parametrize("at_once", [1 << 9, 1 << 20])
def test_loss_and_gradients_are_those_of_autograd_in_slices_of_any_size(target, at_once, monkeypatch):
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", at_once)
    wanted = loss_and_gradients(lambda *leaves: divergence(*leaves, target))
    assert wanted[0] > 1
    torch.testing.assert_close(loss_and_gradients(LOSSES[target]), wanted, rtol=1e-12, atol=1e-13)


@both_targets
def test_autocast_changes_nothing(target):
    plain = loss_and_gradients(LOSSES[target], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_and_gradients(LOSSES[target], torch.float32)
    torch.testing.assert_close(rounded, plain, rtol=1e-6, atol=1e-6)
    assert rounded[0].dtype == torch.float32


@both_targets
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(target, dtype):
    """They have no derivative, so their autograd is not asked for."""
    operator, arguments = OPERATORS[target]
    floats = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    tensors = (QUERIES.to(dtype), SUMMARIES.to(dtype))
    torch.library.opcheck(operator, (*tensors, *floats), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("target", "attention"), [("chosen", 0), ("dense", 2 * BATCH * HEADS * LENGTH**2 * HEAD_DIM)])
def test_flops_are_those_of_the_products(target, attention):
    """The scores and their two gradients; a dense target adds attention's scores."""
    with FlopCounterMode(display=False) as counter:
        LOSSES[target](QUERIES, SUMMARIES)
    assert counter.get_total_flops() == 3 * 2 * BATCH * SELECTORS * LENGTH * DIM * BLOCKS + attention


@both_targets
def test_a_compiler_captures_as_many_operators_for_any_number_of_slices(target, monkeypatch):
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 1 << 9)
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[target], fullgraph=True, backend=graphs)
    torch.testing.assert_close(loss_and_gradients(compiled), loss_and_gradients(LOSSES[target]), rtol=1e-12, atol=1e-13)
    assert len(graphs.graphs) == 1 and graphs.op_count < 30
