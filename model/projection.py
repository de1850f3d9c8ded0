"""Several projections of one input as one matrix product."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def joined_product(x: Tensor, *projections: nn.Linear) -> Tensor:
    """x `[..., width]` -> the outputs of the projections side by side, `[..., sum of their features]`. All projections
    have a bias, or none has.

    One product reads x once, and its gradient is one product rather than a sum of several. Joining the weights copies
    them, which pays off over the many tokens of a training step: compiled layers, which only train, call this.
    """
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return F.linear(
        x, torch.cat([projection.weight for projection in projections]), torch.cat(biases) if biases else None
    )
