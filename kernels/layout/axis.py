"""Axis: the tokens, or summaries of tokens, that the queries or keys of an attention call represent."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """The token interval `[start, end)` of every query or key, counted within its document, and that document.

    All tensors are int32 `[batch, length]`. The interval of a token is `[i, i + 1)`; that of a summary is longer.
    `document` is non-decreasing along the axis, and positions rise within a document. `origin` is the sequence index of
    the document's token 0, so that `origin + start` is the position within the packed sequence. Queries and keys of one
    call must number their documents alike.
    """

    start: Tensor
    end: Tensor
    document: Tensor
    origin: Tensor
    key: tuple | None = field(default=None)
    """Cache key of axes that do not depend on the batch's documents. None: their layouts are not cached."""
    limit: int | None = field(default=None)
    """Exclusive upper bound of all positions, within documents and within the sequence, known on the host. None: the
    builder reads it from the device."""
    span: int = field(default=1)
    """Tokens per entry of the axis."""
    ranges: tuple[range, ...] | None = field(default=None)
    """The indices of the whole axis that this one holds (see `take`). None: it is whole."""

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
            raise ValueError(f"offset={offset}: must be 0 for packed documents")
        if documents.shape[-1] != length or documents.dim() != 2:
            raise ValueError(f"documents of shape {tuple(documents.shape)}: must be [batch, {length}]")
        documents = documents.to(device)
        index = torch.arange(length, dtype=torch.int32, device=documents.device).expand(documents.shape)
        changes = torch.zeros_like(documents, dtype=torch.bool)
        changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
        origin = torch.where(changes, index, 0).cummax(-1).values.int()
        start = index - origin
        return Axis(start, start + 1, changes.cumsum(-1, dtype=torch.int32), origin, limit=length)

    @staticmethod
    def summaries(tokens: "Axis", span: int) -> "Axis":
        """The complete spans of `span` tokens in each document of `tokens` (an Axis.tokens with offset 0).

        Spans are counted from their document's start; an incomplete span at its end is left out. The axis has
        tokens.length // span entries for any documents: a span's entry is (origin + start) // span, which no two spans
        share, because their first tokens are at least `span` apart. An entry without a span is *empty*: its interval
        has start == end and contains no token. ValueError: `tokens` is shorter than one span.
        """
        entries = tokens.length // span
        if entries < 1:
            raise ValueError(f"span={span}: must be at most the length of the axis, {tokens.length}")
        index = torch.arange(entries * span, device=tokens.device)
        last = index + span - 1
        fits = (last < tokens.length) & (
            tokens.document[:, last.clamp(max=tokens.length - 1)] == tokens.document[:, index]
        )
        begins = ((tokens.start[:, index] % span == 0) & fits).view(tokens.batch, entries, span)
        has_span = begins.any(-1)
        # An empty entry takes the position after its last token, so that positions do not fall along the axis.
        offset = torch.where(has_span, begins.int().argmax(-1), span - 1)
        token = index[::span] + offset
        start, document, origin = (t.gather(-1, token) for t in (tokens.start, tokens.document, tokens.origin))
        start = start + (~has_span).int()
        key = None if tokens.key is None else ("summaries", span, *tokens.key)
        return Axis(start, start + span * has_span.int(), document, origin, key, tokens.limit, span)

    def take(self, ranges: Sequence[range]) -> "Axis":
        """The entries of this whole axis at `ranges` of its indices, one range after the other.

        Used if several devices share a sequence: for the queries of one device, or for the keys that these may see.
        `ranges` rise and do not overlap. Positions, documents and origins stay those of the whole axis.
        """
        assert self.ranges is None, "ranges are counted on the whole axis"
        ranges = tuple(ranges)
        if ranges == (range(self.length),):
            return self
        start, end, document, origin = (
            torch.cat([t[:, r.start : r.stop] for r in ranges], -1)
            for t in (self.start, self.end, self.document, self.origin)
        )
        key = None if self.key is None else ("taken", ranges, *self.key)
        return Axis(start, end, document, origin, key, self.limit, self.span, ranges)

    def first_of_block(self, block: int) -> Tensor:
        """int64 `[blocks]`: the index in the whole axis of each block's first entry."""
        rows = torch.arange(0, self.length, block, device=self.device)
        return rows if self.ranges is None else _indices_of(self.ranges, self.device)[rows]

    @property
    def is_plain(self) -> bool:
        """Whether these are the tokens of sequences that are one document each; `key` is ("tokens", length, offset)."""
        return self.key is not None and self.key[0] == "tokens"

    @property
    def batch(self) -> int:
        return self.start.shape[0]

    @property
    def length(self) -> int:
        return self.start.shape[1]

    @property
    def device(self) -> torch.device:
        return self.start.device


def _indices_of(ranges: Sequence[range], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop, device=device) for r in ranges])
