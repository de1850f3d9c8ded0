"""The Triton kernel of the loss against PyTorch's cross-entropy in float64, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from kernels.backends.triton.cross_entropy import cross_entropy_  # noqa: E402
from kernels.cross_entropy import IGNORE  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def problem(tokens, vocabulary, dtype, scale=4.0):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (scale * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[1::4] = IGNORE
    targets[0], targets[2] = 0, vocabulary - 1
    return logits, targets


def truth(logits, targets, z_loss):
    """(losses, penalties, gradients), float64."""
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none", ignore_index=IGNORE)
    penalties = z_loss * leaf.logsumexp(-1).square() * (targets != IGNORE)
    (gradient,) = torch.autograd.grad((losses + penalties).sum(), leaf)
    return losses.detach(), penalties.detach(), gradient


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(5, torch.float32), (64, torch.bfloat16), (4096, torch.float16), (4097, torch.float32), (9001, torch.bfloat16)],
)
def test_equals_the_oracle(vocabulary, dtype, z_loss):
    logits, targets = problem(9, vocabulary, dtype)
    losses, penalties, gradient = truth(logits, targets, z_loss)
    ours = logits.to(DEVICE, copy=True)
    actual = cross_entropy_(ours, targets.to(DEVICE), z_loss, gradient=True)
    torch.testing.assert_close(actual[0].cpu().double(), losses, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(actual[1].cpu().double(), penalties, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.cpu().double(), gradient, rtol=2 * ROUNDING[dtype], atol=2e-6)
    assert not ours[targets == IGNORE].any()


def test_without_gradient_the_logits_stay():
    logits, targets = problem(9, 300, torch.float32)
    ours = logits.to(DEVICE, copy=True)
    losses, _ = cross_entropy_(ours, targets.to(DEVICE), 0.0, gradient=False)
    torch.testing.assert_close(losses.cpu().double(), truth(logits, targets, 0.0)[0], rtol=1e-5, atol=2e-5)
    assert torch.equal(ours.cpu(), logits)


@pytest.mark.parametrize("column", [0, 4095, 4096, 4999])
def test_large_logits_do_not_overflow(column):
    """exp(1e4) is infinite in float32; the largest logit may stand in either step over the row, or in its rest."""
    logits, targets = problem(4, 5000, torch.float32)
    logits[:, column] = 1e4
    losses, _, gradient = truth(logits, targets, 0.0)
    ours = logits.to(DEVICE, copy=True)
    actual, _ = cross_entropy_(ours, targets.to(DEVICE), 0.0, gradient=True)
    torch.testing.assert_close(actual.cpu().double(), losses, rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(ours.cpu().double(), gradient, rtol=1e-4, atol=2e-3)


def test_a_logit_that_is_not_a_number_makes_its_token_and_no_other_not_a_number():
    logits, targets = problem(4, 5000, torch.float32)
    logits[2, 4500] = torch.nan
    ours = logits.to(DEVICE, copy=True)
    losses, _ = cross_entropy_(ours, targets.to(DEVICE), 0.0, gradient=True)
    assert losses.isnan().tolist() == [False, False, True, False]
    assert ours.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_from_hidden_states_on_a_gpu(dtype):
    from model.loss import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 64, generator=generator, dtype=torch.float64).to("cuda")
    weight = torch.randn(50304, 64, generator=generator, dtype=torch.float64).to("cuda") / 8
    targets = torch.randint(50304, (1500,), generator=generator).to("cuda")
    targets[::7] = IGNORE
    exact, ours = (
        [t.detach().to(d).requires_grad_() for t in (hidden, weight)] for d in (torch.float64, torch.float32)
    )
    wanted = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none", ignore_index=IGNORE)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        total, per_token = linear_cross_entropy(*ours, targets)
    wanted.sum().backward()
    total.backward()
    error = 4 * max(ROUNDING[dtype], 2.0**-20)
    torch.testing.assert_close(per_token.double(), wanted, rtol=error, atol=4 * error)
    for actual, leaf in zip(ours, exact, strict=True):
        assert (actual.grad - leaf.grad).norm() < error * leaf.grad.norm()
