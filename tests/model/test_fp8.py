"""Training steps with products in fp8: SwiGLU and logits against float64; what stays in other precisions; on a GPU."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from kernels.patterns import Window
from model import Transformer
from model.loss import IGNORE, linear_cross_entropy
from model.transformer import FeedForward
from tests.kernels import fp8_oracle as oracle
from tests.kernels.oracle import packing
from tests.kernels.test_fp8 import GPU
from tests.model.small import config, plan
from tests.model.test_compiled import PACKINGS, TOKENS, step

DOCUMENT = packing([40, 56], [95, 1])


def test_swiglu_and_its_gradients_are_those_of_products_of_rounded_operands(fp8_on_cpu):
    torch.manual_seed(0)
    mlp = FeedForward(config(width=32, mlp_width=64))
    mlp.trains_in_fp8 = True
    x, grad = torch.randn(30, 32, requires_grad=True), torch.randn(30, 32)
    found = mlp(x)
    found.backward(grad)

    weights = [p.weight.detach().double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    joined = torch.cat(weights[:2])
    exact = x.detach().double()
    between = (oracle.rounded(exact) @ oracle.rounded(joined).T).requires_grad_()
    gate, up = between.chunk(2, 1)
    inner = F.silu(gate) * up
    out, grad_inner, grad_down = oracle.linear(inner.detach(), weights[2], grad.double())
    (grad_between,) = torch.autograd.grad(inner, between, grad_inner)
    _, grad_x, grad_joined = oracle.linear(exact, joined, grad_between)
    expected = [out, grad_x, *grad_joined.chunk(2), grad_down]
    actual = [found.detach(), x.grad, *(p.weight.grad for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))]
    for one, other in zip(actual, expected, strict=True):
        # A number that float32 rounds otherwise than float64 may be rounded to its neighbour, 1/8 apart.
        assert (one.double() - other).norm() < 3e-3 * other.norm()
    plain = copy.deepcopy(mlp).eval()(x)
    assert (found - plain).norm() > 0.02 * plain.norm()


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_no_weight_that_fsdp_gathers_is_kept_for_the_backward_pass(fp8_on_cpu, one_rank):
    """What the forward pass saves of weights are the gathered ones alone, whose memory FSDP2 frees and fills again."""
    torch.manual_seed(0)
    mlp = FeedForward(config(width=32, mlp_width=64))
    mlp.trains_in_fp8 = True
    whole, tokens, saved = copy.deepcopy(mlp), 30, []
    fully_shard(mlp, mesh=one_rank, reshard_after_forward=True)
    x, grad = torch.randn(tokens, 32), torch.randn(tokens, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        found = mlp(x)
    weights = [each for each in saved if each.shape[0] != tokens]
    assert sum(each.numel() for each in weights) == 3 * 32 * 64
    assert all(each.untyped_storage().nbytes() == 0 for each in weights)
    found.backward(grad)
    expected = whole(x)
    expected.backward(grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for one, other in zip(mlp.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=0, atol=0)


def test_logits_are_products_of_rounded_operands_and_their_gradients_are_not(fp8_on_cpu):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 32, generator=generator).requires_grad_() for rows in (40, 48))
    targets = torch.randint(48, (40,), generator=generator)
    targets[[3, 20]] = IGNORE
    total, per_token = linear_cross_entropy(hidden, weight, targets, in_fp8=True)
    total.backward()
    exact = [each.detach().double() for each in (hidden, weight)]
    logits = (oracle.rounded(exact[0]) @ oracle.rounded(exact[1]).T).requires_grad_()
    wanted = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    (grad,) = torch.autograd.grad(wanted.sum(), logits)
    torch.testing.assert_close(per_token.double(), wanted.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(total.double(), wanted.sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), grad @ exact[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), grad.T @ exact[0], rtol=0, atol=1e-5)
    plain = linear_cross_entropy(hidden, weight, targets)[1]
    assert (per_token - plain).abs().max() > 0.01


def test_a_step_is_near_that_in_float32_and_evaluation_and_checkpoint_are_equal(fp8_on_cpu):
    torch.manual_seed(0)
    model = Transformer(config(width=32, mlp_width=64), plan(Window(7))).train()
    in_fp8 = copy.deepcopy(model)
    in_fp8.train_in_fp8("mlp_and_head")
    wanted, found = step(model, DOCUMENT, 0), step(in_fp8, DOCUMENT, 0)
    assert wanted.keys() == found.keys()
    differences = {key: float((found[key] - value).norm() / value.norm()) for key, value in wanted.items()}
    assert differences["loss"] < 1e-4 and max(differences.values()) < 0.15, differences
    assert all(difference > 0.02 for key, difference in differences.items() if "mlp" in key), differences
    torch.testing.assert_close(in_fp8.state_dict(), model.state_dict(), rtol=0, atol=0)
    arguments = TOKENS.roll(-1, 1), torch.arange(96).expand(TOKENS.shape), model.build_layouts(DOCUMENT, 96)
    with torch.no_grad():
        evaluated = [each.eval().loss(TOKENS, *arguments).per_token for each in (model, in_fp8)]
    torch.testing.assert_close(*evaluated, rtol=0, atol=0)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_a_compiled_step_on_a_gpu_is_near_that_in_bf16_waits_for_nothing_and_compiles_once(checkpointing):
    torch.manual_seed(0)
    sizes = config(width=256, head_dim=64, mlp_width=512, activation_checkpointing=checkpointing)
    model, tokens = Transformer(sizes, plan(Window(7))).train().cuda(), TOKENS.cuda()
    documents = [document.cuda() for document in PACKINGS]
    wanted = [step(model, document, 0, tokens) for document in documents]
    torch._dynamo.reset()
    model.train_in_fp8("mlp_and_head")
    model.compile_layers()
    for document in documents[:2]:
        step(model, document, 0, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = [step(model, document, 0, tokens) for document in documents]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, wanted, strict=True):
        differences = {key: float((one[key] - value).norm() / value.norm()) for key, value in other.items()}
        assert differences["loss"] < 1e-3 and max(differences.values()) < 0.2, differences
        assert all(difference > 0.02 for key, difference in differences.items() if "mlp" in key), differences


@pytest.mark.gpu
@GPU
def test_a_run_continues_in_fp8_and_is_evaluated_without_it(tmp_path):
    """A checkpoint of either kind is one of the other; a run in fp8 ends with its evaluation."""
    from scripts.evaluate import evaluate
    from tests.commands import compose
    from tests.scripts.runs import SMALL, write_books
    from train import train

    data = ("data=files", f"data.path={write_books(tmp_path / 'books')}", f"data.cache={tmp_path / 'cache'}")
    steps = ("trainer=gpu", "trainer.compile=false", "trainer.cuda_graph=false", "trainer.validate_every=null")
    steps += ("trainer.max_steps=2",)
    settings = (*SMALL, *data, *steps, "evaluation=chunked", "evaluation.baselines=false", "model.head_dim=32")
    train(compose(*settings), tmp_path / "run")
    for fp8, end in (("mlp_and_head", 4), ("false", 6)):
        config = compose(*settings, f"trainer.fp8={fp8}", f"trainer.max_steps={end}")
        summary = train(config | {"resume": str(tmp_path / "run")})
        assert (summary["state"], summary["step"]) == ("finished", end)
        run = compose(f"checkpoint={tmp_path / 'run' / 'last'}", "evaluation=chunked", config_name="evaluate")
        assert evaluate(run)["loss"] == pytest.approx(summary["loss"], rel=0.01)
