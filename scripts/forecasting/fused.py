"""What torch.compile makes of a module, as far as memory goes, without its compiling anything.

Ahead-of-time autograd traces the forward and backward pass and cuts them where least is kept (its min-cut partitioner):
what it hands from one to the other is what the compiled module saves. Its graphs then run operator by operator, and
only what fused kernels hold in memory is booked: what matrix products read and write, and what a graph returns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scripts.forecasting.ledger import Ledger

Function = Callable[..., Any]


def compile_rehearsed(layer: nn.Module, ledger: Ledger) -> None:
    """As Transformer.compile_around_attention does to one layer, which lives under a FakeTensorMode. (A pool of
    summaries stays as it is: it is small.)"""
    layer.self_attn.project = _compiled(_Project(layer.self_attn), ledger)
    for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
        module.forward = _compiled(module, ledger)


class _Project(nn.Module):
    """Attention.project as a module of its own, with the parameters that it reads."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.project = attention.project
        for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            self.add_module(name, getattr(attention, name))

    def forward(self, *arguments: Any) -> Any:
        return self.project(*arguments)


def _compiled(module: nn.Module, ledger: Ledger) -> Function:
    """`module`'s forward (its class's own), traced at its first call, for the tensors that it is called with."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    names, parameters = zip(*module.named_parameters(), strict=True)
    forward = type(module).forward

    def graph_runner(graph: torch.fx.GraphModule, _: Any) -> Function:
        def run(arguments: list) -> Any:
            with ledger.fused_kernels():
                results = torch.fx.Interpreter(graph).boxed_run(arguments)
                for result in results if ledger.phase else ():  # not of the call that traces it
                    if isinstance(result, Tensor):
                        ledger.book(result)
            return results

        run._boxed_call = True
        return run

    def pure(values: tuple, arguments: tuple) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), arguments)

    traced = aot_function(
        pure,
        fw_compiler=graph_runner,
        bw_compiler=graph_runner,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )

    def run(*arguments: Any) -> Any:
        replaced, module.forward = module.forward, lambda *a: forward(module, *a)
        try:
            return traced(parameters, arguments)
        finally:
            module.forward = replaced

    return run
