"""Muon on stacks of matrices of one shape, and MuonWithAdamW.

One optimizer step, for each shape of matrix:

    gradients, momentum buffers --lerp--> updates --stack, bf16--> [count, rows, columns] --orthogonalize--> weights

`torch.optim.Muon` makes the same update matrix by matrix, in about 40 small kernels each. Here a kernel works on all
matrices of one shape, which a model of equal layers has many of.

Of sharded parameters (FSDP2) each rank holds some rows of every matrix. A rank receives all rows of its share of the
matrices, orthogonalizes these, and returns to each rank its rows of the results (`orthogonalize_shards`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

STACK_DTYPE = torch.bfloat16
"""The dtype of the orthogonalization."""

STACK_BYTES = 256 << 20
"""Largest size of a rank's stack in bf16; more matrices of one shape are updated in several stacks. An update holds up
to six times as much: the new stack of an iteration beside the old one, and the results in float32."""


def orthogonalize(stack: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """Returns nearly the closest semi-orthogonal matrix to each matrix of a stack, by Newton-Schulz iteration.

    Each step maps a singular value s to a s + b s^3 + c s^5, and leaves the singular vectors as they are. The usual
    coefficients (a, b, c) bring every s in (0, 1] close to 1, but not to 1 exactly (Jordan et al. 2024).

    Args:
        stack: [count, rows, columns], in the dtype to compute in. It is not changed.
        epsilon: smallest Frobenius norm by which a matrix is divided.
    """
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack  # the Gram matrices of the shorter side are the smaller ones
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """The update of `torch.optim.Muon` up to rounding in bf16, with its arguments and its state, in few kernels.

    compile: compile `orthogonalize`; after a few shapes one graph serves all sizes.
    """

    def __init__(self, *arguments: Any, compile: bool = False, **settings: Any):
        super().__init__(*arguments, **settings)
        self.orthogonalize = torch.compile(orthogonalize, fullgraph=True) if compile else orthogonalize

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs the closure once, then one update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
            for parameters in alike.values():
                ranks = parameters[0].device_mesh.size() if isinstance(parameters[0], DTensor) else 1
                count = ranks * max(1, STACK_BYTES // (2 * parameters[0].numel()))
                for start in range(0, len(parameters), count):
                    self._update(parameters[start : start + count], group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One update of parameters of one shape, dtype and device."""
        first, momentum = parameters[0], group["momentum"]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        weights = [_own_rows(p) for p in parameters]
        gradients = [_own_rows(p.grad) for p in parameters]
        buffers = [_own_rows(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        stack = weights[0].new_empty((len(weights), *weights[0].shape), dtype=STACK_DTYPE)
        torch._foreach_copy_(stack.unbind(), updates)
        del updates
        function = functools.partial(
            self.orthogonalize, coefficients=group["ns_coefficients"], steps=group["ns_steps"], epsilon=group["eps"]
        )
        if isinstance(first, DTensor):
            mesh = first.device_mesh
            exchange = functools.partial(dist.all_to_all_single, group=mesh.get_group())
            stack = orthogonalize_shards(stack, len(first), mesh.size(), exchange, function)
        else:
            stack = function(stack)
        # In the layout and dtype of the parameters, for which one kernel adds them all.
        updates = stack.to(first.dtype).contiguous().unbind()
        del stack
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * _rate_factor(group["adjust_lr_fn"], *first.shape))


def _own_rows(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, which share the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalize_shards(
    stack: Tensor,
    rows: int,
    ranks: int,
    exchange: Callable[[Tensor, Tensor], Any],
    orthogonalize: Callable[[Tensor], Tensor],
) -> Tensor:
    """Orthogonalizes matrices whose rows lie on several ranks, in torch.chunk's shares.

    Each rank orthogonalizes an equal share of whole matrices. Two exchanges send each rank, there and back,
    (ranks - 1) / ranks of the stack's bytes.

    Args:
        stack: [count, rows that this rank holds, columns]
        rows: of a whole matrix
        exchange: (received, sent), as dist.all_to_all_single
        orthogonalize: maps [count, rows, columns] to the same

    Returns:
        A tensor like `stack`: this rank's rows of the results.
    """
    (count, own, columns), share, most = stack.shape, -(-len(stack) // ranks), -(-rows // ranks)
    sent = stack.new_zeros(ranks, share, most, columns)  # [rank that orthogonalizes, its matrix, row, column]
    sent.flatten(0, 1)[:count, :own] = stack
    received = torch.empty_like(sent)  # [rank that holds the rows, own matrix, row, column]
    exchange(received, sent)
    whole = received.transpose(0, 1).flatten(1, 2)  # chunks have equally many rows, but for the last of them
    whole[:, :rows] = orthogonalize(whole[:, :rows])
    sent.copy_(whole.unflatten(1, (ranks, most)).transpose(0, 1))
    exchange(received, sent)
    return received.flatten(0, 1)[:count, :own]


def _rate_factor(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """The factor of the learning rate for a matrix of this shape: `match_rms_adamw` gives an update AdamW's root mean
    square (Moonlight, arXiv:2502.16982), `original` is Jordan's."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


class MuonWithAdamW(Optimizer):
    """Two optimizers as one, which Lightning, LambdaLR and checkpoints handle like any optimizer.

    The parts own no state: groups and state live here and are shared with them by reference, so that PyTorch's own
    `state_dict` and `load_state_dict` work on the whole.
    """

    def __init__(self, muon_groups: list, muon: dict, adamw_groups: list, adamw: dict):
        self.muon = Muon(muon_groups, **muon)
        self.adamw = AdamW(adamw_groups, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        split = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs the closure once, then both updates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss
