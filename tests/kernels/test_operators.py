"""To PyTorch, attention is one well-behaved operator: opcheck, torch.compile, checkpointing, meta tensors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import Axis, attention, build_layout
from kernels.attention import _backward, _forward
from kernels.patterns import Dense, Window
from tests.kernels.oracle import PATTERNS, Case, Chosen, packing


def inputs(dtype: torch.dtype = torch.float64, transposed: bool = False, documents=None):
    layout = build_layout([Window(5, 1), Chosen(3)], Axis.tokens(21, documents), block=16)
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        if transposed:
            return torch.randn(2, 21, heads, 8, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        return torch.randn(2, heads, 21, 8, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = draw(4), draw(2), draw(2)
    return q, k, v, layout, (layout.queries, layout.keys, layout.block, layout.window, 0.3, True, "blocked", "blocked")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_forward_operator_passes_opcheck(dtype, transposed):
    q, k, v, layout, scalars = inputs(dtype, transposed)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(_forward, (*leaves, layout.tensors(), *scalars))  # schema, fake, autograd, aot with autograd


def test_backward_operator_passes_opcheck():
    """It has no derivative of its own, so its autograd is not asked for."""
    q, k, v, layout, scalars = inputs(transposed=True)
    out, lse = _forward(q, k, v, layout.tensors(), *scalars)
    arguments = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, layout.tensors(), *scalars[:-1])
    torch.library.opcheck(_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("documents", [None, packing([8, 13], [21, 0])], ids=["one_document", "packed"])
def test_compiles_to_one_graph_with_the_same_results(documents):
    _, _, _, layout, _ = inputs(documents=documents)
    case = Case(21, 21, batch=2, group=2)

    def function(q, k, v, sinks):
        out, lse = attention(q * 2, k, v, layout, sink_logits=sinks, return_lse=True)
        return out + 1, lse

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = case.run(function), case.run(compiled)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-13)


def test_a_new_layout_is_no_new_graph():
    """Documents change every step: what is compiled once must serve them all."""
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def function(q, tensors, scalars):
        return torch.ops.farsight.attention(q, q, q, tensors, *scalars, None, 0.3, True, "blocked", "blocked")[0]

    torch.compiler.reset()
    q = torch.randn(1, 2, 40, 8)
    for pattern in (Window(4), Window(30), Dense()):
        layout = build_layout(pattern, Axis.tokens(40, packing([20, 20])), block=16)
        out = function(q, layout.tensors(), (layout.queries, layout.keys, layout.block))
        assert torch.equal(out, attention(q, q, q, layout, scale=0.3))
    assert len(graphs) <= 2  # sizes of 0 and 1 are always their own


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_checkpointing_gives_identical_gradients(pattern):
    layout, case = build_layout(pattern, Axis.tokens(60), block=16), Case(60, 60, group=2, dtype=torch.float32)
    plain = lambda q, k, v, s: attention(q, k, v, layout, sink_logits=s, return_lse=True)  # noqa: E731
    expected = case.run(plain)
    actual = case.run(lambda *tensors: checkpoint(plain, *tensors, use_reentrant=False))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_fake_results_have_the_shapes_and_dtypes_of_real_ones():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v, layout, scalars = inputs(dtype)
        real = torch.ops.farsight.attention(q, k, v, layout.tensors(), *scalars)
        meta = [t.to("meta") for t in layout.tensors()]
        fake = torch.ops.farsight.attention(q.to("meta"), k.to("meta"), v.to("meta"), meta, *scalars)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


def test_inputs_are_left_as_they_were():
    q, k, v, layout, _ = inputs()
    tensors = [q, k, v, *layout.tensors()]
    before = [t.clone() for t in tensors]
    attention(q.requires_grad_(), k, v, layout).sum().backward()
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))
