"""Compiles an element-wise function of tiles; values that depend on the queries or the keys alone are computed
first."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module


def fuse(function: Callable[..., Any], examples: Sequence[Tensor], size: int) -> Callable[..., Any]:
    """Compiles `function` of tensors shaped like `examples` as two kernels.

    A compiler that fuses everything into one kernel recomputes, for each of the `size` elements, values that are equal
    along a row or column of a tile (the hash of a random block, for example). Therefore, results that have fewer than
    `size` elements and depend on no larger tensor are computed by a first kernel. Each call of `fuse` compiles its own
    graph, so that patterns do not share a recompilation limit.
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
