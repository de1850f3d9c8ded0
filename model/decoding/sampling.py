"""From logits to a token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises ValueError with the name of a wrong field.

    `temperature`: 0 chooses the most probable token (greedy); otherwise the logits are divided by it. `top_k`: only the
    most probable tokens are candidates (Fan et al. 2018; None: all). `top_p`: of these, only the smallest set whose
    probabilities sum to `top_p` (nucleus sampling, Holtzman et al. 2020; 1: all). `first`: the number of a batch's
    first sequence; a sequence's draws depend on the seed and its number.
    """

    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    first: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value}: must be a number")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be an integer >= 0")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k}: must be an integer >= 1, or null")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")

    def generators(self, batch: int) -> list[torch.Generator]:
        """One generator per sequence, so that the tokens of a sequence do not depend on the others in the batch. Seed
        and number are mixed, not added: sequence 0 of seed 1 must not equal sequence 1 of seed 0."""
        states = [np.random.SeedSequence((self.seed, self.first + index)).generate_state(1) for index in range(batch)]
        return [torch.Generator().manual_seed(int(state[0])) for state in states]

    def pick(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """logits `[batch, vocabulary]` -> int64 `[batch]` on the same device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Draw on the host, so that equal logits and seeds give equal tokens on every device.
        probability = self.distribution(logits.float().cpu())
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probability, generators, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)

    def distribution(self, logits: Tensor) -> Tensor:
        """The probabilities `[batch, vocabulary]` of the next token, for a temperature above 0."""
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0: nothing overflows
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            probability = ordered.softmax(-1)
            before = probability.cumsum(-1) - probability
            logits = torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(before >= self.top_p, -torch.inf))
        return logits.softmax(-1)
