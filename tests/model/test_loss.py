"""The chunked cross-entropy against PyTorch's, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from kernels.cross_entropy import cross_entropy_
from model import loss
from model.loss import IGNORE, linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 23, 6, 11


def inputs(dtype=torch.float64, ignored=()):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[list(ignored)] = IGNORE
    return hidden, weight, targets


def chunks_of(size: int):
    return lambda tokens, *_: [slice(first, first + size) for first in range(0, tokens, size)]


@pytest.mark.parametrize("ignored", [(), (0, 5, 6, 7, 22), range(TOKENS)], ids=["none", "some", "all"])
@pytest.mark.parametrize("size", [1, 2, 7, 22, 23, 24])
@pytest.mark.parametrize("more", [None, 0, 3], ids=["not counted", "counted", "at most"])
def test_equals_pytorchs_cross_entropy_whatever_the_chunks(size, ignored, more, monkeypatch):
    monkeypatch.setattr(loss, "token_chunks", chunks_of(size))
    monkeypatch.setattr(loss, "TILE", 4)
    hidden, weight, targets = inputs(ignored=ignored)
    scored = None if more is None else TOKENS - len(ignored) + more
    total, per_token = linear_cross_entropy(hidden, weight, targets, scored=scored)
    gradients = torch.autograd.grad(2.5 * total, (hidden, weight))
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE)
    wanted_gradients = torch.autograd.grad(2.5 * wanted.sum(), (hidden, weight))
    torch.testing.assert_close(per_token, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(total, wanted.sum(), rtol=0, atol=1e-12)
    for actual, expected in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert (per_token[targets == IGNORE] == 0).all() and (per_token[targets != IGNORE] > 0).all()
    assert not per_token.requires_grad
    assert not gradients[0][targets == IGNORE].any()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("scored", [None, TOKENS - 5])
def test_gradcheck(z_loss, scored, monkeypatch):
    monkeypatch.setattr(loss, "TILE", 4)
    hidden, weight, targets = inputs(ignored=(3, 4, 8, 9, 10))
    total = lambda h, w: linear_cross_entropy(h, w, targets, z_loss, scored=scored)[0]  # noqa: E731
    assert torch.autograd.gradcheck(total, (hidden, weight))


@pytest.mark.parametrize(
    ("scored", "rows"), [(None, 2304), (2048, 2304), (1793, 2304), (1792, 1792), (257, 512), (1, 256), (0, 0)]
)
def test_logits_are_those_of_scored_tokens_in_whole_tiles_where_these_are_few(scored, rows, monkeypatch):
    computed = []

    def compute(logits, targets, *settings):
        computed.append(targets)
        return cross_entropy_(logits, targets, *settings)

    monkeypatch.setattr(loss, "cross_entropy_", compute)
    targets = torch.full((2304,), IGNORE)
    targets[torch.randperm(2304, generator=torch.Generator().manual_seed(0))[: scored or 0]] = 1
    linear_cross_entropy(torch.zeros(2304, 2), torch.zeros(3, 2), targets, scored=scored)
    assert sum(map(len, computed)) == rows
    assert sum(int((each == 1).sum()) for each in computed) == (scored or 0)


def test_z_loss_is_in_the_total_and_not_in_the_losses_of_tokens():
    hidden, weight, targets = inputs(ignored=(3, 4))
    total, per_token = linear_cross_entropy(hidden, weight, targets, z_loss=0.25)
    plain, plain_per_token = linear_cross_entropy(hidden, weight, targets)
    penalties = 0.25 * (hidden @ weight.T).logsumexp(-1).square()[targets != IGNORE]
    torch.testing.assert_close(total, plain + penalties.sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(per_token, plain_per_token, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_frozen_side_gets_no_gradient(which):
    leaves = inputs()
    leaves[which].requires_grad_(False)
    linear_cross_entropy(*leaves)[0].backward()
    expected = inputs()
    linear_cross_entropy(*expected)[0].backward()
    assert leaves[which].grad is None
    assert torch.equal(leaves[1 - which].grad, expected[1 - which].grad)


def test_float32_accumulates_in_float32_and_is_close():
    exact = linear_cross_entropy(*inputs())[1]
    total, per_token = linear_cross_entropy(*inputs(torch.float32))
    assert total.dtype == per_token.dtype == torch.float32
    torch.testing.assert_close(per_token.double(), exact, rtol=1e-5, atol=1e-5)


def test_under_bfloat16_autocast_it_is_close_and_gradients_keep_their_dtype():
    hidden, weight, targets = inputs(torch.float32, ignored=(4,))
    with torch.autocast("cpu", torch.bfloat16):
        total, per_token = linear_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.dtype == per_token.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact_hidden, exact_weight, _ = inputs()
    exact, exact_per_token = linear_cross_entropy(exact_hidden, exact_weight, targets)
    exact.backward()
    step = 2.0**-8  # bfloat16's rounding; logits reach about 8
    assert (per_token - exact_per_token).abs().max() < 8 * step
    for leaf, wanted in ((hidden, exact_hidden), (weight, exact_weight)):
        assert (leaf.grad - wanted.grad).norm() < 4 * step * wanted.grad.norm()


def test_bfloat16_inputs_give_a_float32_loss():
    hidden, weight, targets = inputs(torch.bfloat16)
    total, _ = linear_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert abs(total.double() - exact) < 2.0**-8 * exact


def test_without_gradients_none_are_computed(monkeypatch):
    """Evaluation pays for the logits alone."""
    monkeypatch.setattr(torch.Tensor, "exp_", lambda *_: pytest.fail("a gradient was computed"))
    hidden, weight, targets = inputs()
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden, weight, targets)
    assert not total.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_host_does_not_wait_for_the_choice_of_scored_tokens():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(size, 64, generator=generator, device="cuda").requires_grad_() for size in (2000, 500)
    )
    targets = torch.randint(500, (2000,), generator=generator, device="cuda")
    targets[torch.arange(2000, device="cuda") % 7 > 0] = IGNORE

    def results(scored: int | None) -> list[torch.Tensor]:
        total, per_token = linear_cross_entropy(hidden, weight, targets, scored=scored)
        return [total, per_token, *torch.autograd.grad(total, (hidden, weight))]

    counted = len(range(0, 2000, 7))
    whole = results(None)
    results(counted)  # compiles kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        selected = results(counted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(selected, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("vocabulary, device, size", [(1 << 18, "cpu", 4), (50304, "cuda", 3072), (1 << 30, "cpu", 1)])
def test_chunks_hold_a_fixed_number_of_logits_and_cover_all_tokens(vocabulary, device, size):
    chunks = loss.token_chunks(3000, vocabulary, device)
    assert [i for part in chunks for i in range(3000)[part]] == list(range(3000))
    assert all(part.stop - part.start == size for part in chunks)


def test_chunks_on_a_gpu_are_equal_full_and_within_the_limit():
    chunks = loss.token_chunks(131072, 50304, "cuda")
    sizes = {part.stop - part.start for part in chunks}
    assert len(sizes) == 1 and all(size % loss.TILE == 0 for size in sizes)
    assert max(sizes) * 50304 <= loss.LOGITS + loss.TILE * 50304
    assert chunks[-1].start < 131072 <= chunks[-1].stop


def test_logits_of_all_tokens_are_never_there_at_once(monkeypatch):
    shapes = []
    nll_loss = F.nll_loss
    monkeypatch.setattr(F, "nll_loss", lambda x, *a, **k: shapes.append(x.shape) or nll_loss(x, *a, **k))
    monkeypatch.setattr(loss, "token_chunks", chunks_of(5))
    linear_cross_entropy(*inputs())
    assert shapes == [(5, VOCABULARY)] * 4 + [(3, VOCABULARY)]
