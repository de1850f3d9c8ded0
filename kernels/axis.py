"""What the queries, or the keys, of one attention call are: tokens (later also summaries) of packed documents."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """For every index of the queries or keys: the token interval `[start, end)` within its document, and the document.

    All tensors are int32 `[batch, length]`. A token is `[i, i + 1)`; a summary of several tokens is longer. `document`
    is non-decreasing along the axis, and positions rise within a document. `origin` is the sequence index of the
    document's token 0, so that `origin + start` is the position within the packed sequence. Queries and keys of one
    call must number their documents alike.
    """

    start: Tensor
    end: Tensor
    document: Tensor
    origin: Tensor
    key: tuple | None = field(default=None)
    """Identifies axes that are equal whatever the batch holds, so that their layouts are cached. None: not cached."""
    limit: int | None = field(default=None)
    """A number that no position reaches, from whichever origin it is counted, known without asking the device. None:
    the builder asks."""
    span: int = field(default=1)
    """Tokens that each index stands for at least: so many fewer indices meet an interval of positions."""

    @staticmethod
    def tokens(
        length: int,
        documents: Tensor | None = None,
        device: torch.device | str | None = None,
        offset: int = 0,
    ) -> "Axis":
        """The tokens of sequences of `length`.

        `documents`: integer `[batch, length]`; a document is a run of equal numbers, and its positions start at 0 with
        the run. None: every sequence is one document, and the axis (of batch 1) serves any batch. `offset`: the first
        token's position, for queries that continue behind `offset` cached keys. ValueError: shapes disagree.
        """
        if length < 1:
            raise ValueError(f"length={length}: must be at least 1")
        if documents is None:
            index = torch.arange(offset, offset + length, dtype=torch.int32, device=device)[None]
            zero = torch.zeros_like(index)
            return Axis(index, index + 1, zero, zero, key=("tokens", length, offset), limit=length + offset)
        if offset:
            raise ValueError(f"offset={offset}: packed documents start at 0")
        if documents.shape[-1] != length or documents.dim() != 2:
            raise ValueError(f"documents of shape {tuple(documents.shape)}: must be [batch, {length}]")
        documents = documents.to(device)
        index = torch.arange(length, dtype=torch.int32, device=documents.device).expand(documents.shape)
        changes = torch.zeros_like(documents, dtype=torch.bool)
        changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
        origin = torch.where(changes, index, 0).cummax(-1).values.int()
        start = index - origin
        return Axis(start, start + 1, changes.cumsum(-1, dtype=torch.int32), origin, limit=length)

    @property
    def batch(self) -> int:
        return self.start.shape[0]

    @property
    def length(self) -> int:
        return self.start.shape[1]

    @property
    def device(self) -> torch.device:
        return self.start.device
