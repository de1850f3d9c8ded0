"""The norm of every layer, and of queries and keys."""

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) in the dtype of its input, so that autocast's bf16 meets the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
