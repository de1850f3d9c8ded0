"""Compiles an element-wise function of large tiles so that what depends on one side alone is computed once a side."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module


def fuse(function: Callable[..., Any], examples: Sequence[Tensor], size: int) -> Callable[..., Any]:
    """`function` of tensors shaped like `examples`, as two compiled parts.

    A compiler that fuses everything into one kernel recomputes, for each of a tile's `size` elements, what is the same
    for a whole line of it (a random block's hash, say). So what is smaller than `size` elements, and not computed from
    something larger, is a kernel of its own before. Each call of `fuse` compiles a graph of its own: no pattern can run
    into another's recompilation limit.
    """
    traced = make_fx(function, tracing_mode="fake")(*examples)
    small: dict[Node, bool] = {}
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        fits = not isinstance(value, Tensor) or value.numel() < size
        small[node] = fits and all(small[n] for n in node.all_input_nodes)
    split = split_module(traced, traced, lambda node: 0 if small[node] else 1)
    for name, part in list(split.named_children()):
        if isinstance(part, GraphModule):
            setattr(split, name, torch.compile(part, dynamic=False, fullgraph=True))
    return split
