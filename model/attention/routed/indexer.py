"""The indexer: small projections that score past blocks, and the settings of their training.

The score of a block is the product of the query and the mean of the indexer keys of its tokens, over sqrt(dim). Each
selector has a query; all share the keys. The loss (kernels/selection/indexer_loss.py) covers the chosen blocks; during
the warm-up, all past blocks under dense attention.

A trained dense model is converted in the two stages of DSA (DeepSeek-V3.2, 2025): in the warm-up the layers attend
densely as before, and the indexers alone train; then all parameters train under routed attention."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from kernels.patterns import Routed
from kernels.patterns.base import require, require_int
from model.config import ModelConfig


@dataclass(frozen=True)
class IndexerTraining:
    """How an indexer is trained. A config gives these settings beside those of the routed pattern.

    A KL loss of weight `indexer_loss` trains the indexer to predict the attention that each chosen block receives. In
    the first `indexer_warmup` optimizer steps the target is dense attention to every past block, at the cost of dense
    attention. `indexer_gradient`: the loss also trains the layers below. `indexer_warmup_alone`: in the warm-up, no
    other parameter trains, and the layer attends densely.
    """

    indexer_loss: float
    indexer_warmup: int
    indexer_gradient: bool
    indexer_warmup_alone: bool = False

    def __post_init__(self) -> None:
        is_number = isinstance(self.indexer_loss, int | float) and not isinstance(self.indexer_loss, bool)
        in_range = is_number and 0 < self.indexer_loss < math.inf
        require(in_range, "indexer_loss", self.indexer_loss, "a positive, finite number")
        require_int("indexer_warmup", self.indexer_warmup, 0)
        gradient = self.indexer_gradient
        require(isinstance(gradient, bool), "indexer_gradient", gradient, "true or false")
        alone = self.indexer_warmup_alone
        require(isinstance(alone, bool), "indexer_warmup_alone", alone, "true or false")
        accepted = "false with indexer_warmup=0, a warm-up without steps"
        require(not alone or self.indexer_warmup > 0, "indexer_warmup_alone", alone, accepted)


class Indexer(nn.Module):
    def __init__(self, pattern: Routed, config: ModelConfig, training: IndexerTraining) -> None:
        super().__init__()
        self.pattern, self.train_input = pattern, training.indexer_gradient
        self.selectors = config.kv_heads if pattern.share == "group" else config.heads
        self.q_proj = nn.Linear(config.width, self.selectors * pattern.indexer_dim, bias=False)
        self.k_proj = nn.Linear(config.width, pattern.indexer_dim, bias=False)

    def queries(self, x_BTW: Tensor) -> Tensor:
        """Queries of all tokens, divided by sqrt(dim): `[batch, selectors, length, dim]`."""
        dim = self.pattern.indexer_dim
        found = self.q_proj(self._input(x_BTW)).unflatten(-1, (self.selectors, dim))
        return found.transpose(1, 2) * dim**-0.5

    def keys(self, x_BTW: Tensor) -> Tensor:
        """Keys of all tokens, which the selectors share: `[batch, 1, length, dim]`."""
        return self.k_proj(self._input(x_BTW))[:, None]

    def _input(self, x_BTW: Tensor) -> Tensor:
        return x_BTW if self.train_input else x_BTW.detach()
