"""The loss of each token. Segments of several documents are packed into one sequence; the layout keeps them apart.

A document is [bos] + tokens. Each token of its text is scored once; bos itself is never predicted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.decoding.cache import Cache
from model.evaluation.documents import Documents
from model.evaluation.loss_store import LossStore
from model.evaluation.protocol import Protocol, Segment
from model.inference import evaluating
from model.loss import linear_cross_entropy
from model.transformer import Transformer

Work = tuple[int, Segment]
"""The number of a document, and a segment of it."""

Progress = Callable[[int], None]
"""Called with the number of tokens that were scored since its last call."""


class PackedSegments(NamedTuple):
    """Segments side by side in one sequence, int64 `[1, tokens]`. document: the number of each token's segment; None if
    there is one segment. sizes: tokens of each segment."""

    tokens: Tensor
    targets: Tensor
    position: Tensor
    document: Tensor | None
    sizes: list[int]

    def split(self, per_token: np.ndarray) -> list[np.ndarray]:
        """Splits values of all tokens `[tokens]` by segment."""
        return np.split(per_token, np.cumsum(self.sizes)[:-1])


def token_losses(
    model: Transformer,
    documents: Documents,
    protocol: Protocol,
    *,
    tokens_at_once: int,
    store: LossStore | None = None,
    progress: Progress = lambda tokens: None,
) -> list[np.ndarray]:
    """Returns the loss in nats of each token but the first of each document, float64 `[tokens of the document - 1]`.

    Args:
        tokens_at_once: largest number of tokens of a packed sequence; a longer segment is read in chunks.
        store: its documents are not scored again, and finished documents are saved there.
        progress: called with the number of tokens that were scored.

    Raises:
        ValueError: the protocol's window exceeds the model's limit, or no document has a token to score.
    """
    lengths = [len(documents.tokens(document)) for document in range(len(documents))]
    segments = [list(protocol.segments(length)) for length in lengths]
    longest = max((s.stop - s.start for parts in segments for s in parts), default=0)
    if longest > model.config.max_length:
        raise ValueError(
            f"protocol.name={protocol.name} needs sequences of {longest} tokens: the model takes "
            f"{model.config.max_length}; try protocol.name=sliding"
        )
    if not longest:
        raise ValueError("no document has a token to score")
    losses = [np.full(max(length - 1, 0), np.nan) for length in lengths]
    missing = [len(loss) for loss in losses]
    for document in range(len(documents)):
        kept = store.load(f"{document:06d}") if store else None
        if kept is not None:
            losses[document][:] = kept
            missing[document] = 0
            progress(len(kept))
    work = [(document, segment) for document, parts in enumerate(segments) if missing[document] for segment in parts]
    for document, segment, nats in score_segments(model, documents, work, tokens_at_once, progress):
        scored = losses[document][segment.scored - 1 : segment.stop]
        assert np.isnan(scored).all() and len(scored) == len(nats), "a token was not scored exactly once"
        scored[:] = nats
        missing[document] -= len(nats)
        if store and not missing[document]:
            store.save(f"{document:06d}", losses[document])
    assert not any(missing), "a token was not scored"
    return losses


@torch.no_grad()
def score_segments(
    model: Transformer, documents: Documents, work: Iterable[Work], tokens_at_once: int, progress: Progress
) -> Iterator[tuple[int, Segment, np.ndarray]]:
    """Yields (document, segment, nats of the segment's scored tokens) in the order of `work`.

    A segment of more than `tokens_at_once` tokens is read in chunks through a cache, which bounds the memory. If a
    pattern counts positions from the start of the packed sequence, each segment is a sequence of its own, so that its
    losses do not depend on the segments beside it.
    """
    for batch in batches(work, 0 if counts_from_sequence(model) else tokens_at_once):
        document, segment = batch[0]
        with evaluating(model):
            if segment.stop - segment.start > tokens_at_once:
                scored = [(document, segment, _score_in_chunks(model, documents, batch[0], tokens_at_once, progress))]
            else:
                scored = list(_score(model, documents, batch))
                progress(sum(len(nats) for *_, nats in scored))
        yield from scored


def counts_from_sequence(model: Transformer) -> bool:
    """Whether a pattern counts positions from the start of the packed sequence."""
    by_head = (pattern if isinstance(pattern, tuple) else (pattern,) for pattern in model.patterns)
    return any(pattern.anchor == "sequence" for patterns in by_head for pattern in patterns)


def batches(work: Iterable[Work], tokens_at_once: int) -> Iterator[list[Work]]:
    """Yields the segments in order, as many at once as fit into `tokens_at_once`, and at least one."""
    batch: list[Work] = []
    size = 0
    for document, segment in work:
        length = segment.stop - segment.start
        if batch and size + length > tokens_at_once:
            yield batch
            batch, size = [], 0
        batch.append((document, segment))
        size += length
    if batch:
        yield batch


def pack(documents: Documents, batch: Sequence[Work], device: torch.device) -> PackedSegments:
    """Packs segments into one sequence."""
    texts = [documents.tokens(document)[s.start : s.stop + 1].astype(np.int64) for document, s in batch]
    sizes = [len(text) - 1 for text in texts]
    tokens, targets = np.concatenate([text[:-1] for text in texts]), np.concatenate([text[1:] for text in texts])
    position = np.concatenate([np.arange(size) for size in sizes])
    document = np.repeat(np.arange(len(sizes)), sizes)
    tokens, targets, position, document = (
        torch.from_numpy(x)[None].to(device) for x in (tokens, targets, position, document)
    )
    return PackedSegments(tokens, targets, position, document if len(sizes) > 1 else None, sizes)


def _score(model: Transformer, documents: Documents, batch: list[Work]) -> Iterator[tuple[int, Segment, np.ndarray]]:
    """Scores one packed sequence."""
    packed = pack(documents, batch, model.embed_tokens.weight.device)
    layouts = model.build_layouts(packed.document, packed.tokens.shape[1])
    per_token = model.loss(packed.tokens, packed.targets, packed.position, layouts).per_token[0].double().cpu().numpy()
    for (index, segment), nats in zip(batch, packed.split(per_token), strict=True):
        yield index, segment, nats[segment.scored - 1 - segment.start :]


def _score_in_chunks(
    model: Transformer, documents: Documents, work: Work, chunk: int, progress: Progress
) -> np.ndarray:
    """Returns the nats of the scored tokens of one segment, which is read in chunks."""
    document, segment = work
    device = model.embed_tokens.weight.device
    piece = torch.from_numpy(documents.tokens(document)[segment.start : segment.stop + 1].astype(np.int64))
    cache, nats = Cache(model, batch=1), []
    for start in range(0, len(piece) - 1, chunk):
        stop = min(start + chunk, len(piece) - 1)
        hidden = cache.extend(piece[None, start:stop].to(device))[0]
        first = max(segment.scored - 1 - segment.start, start)
        if first < stop:
            targets = piece[first + 1 : stop + 1].to(device)
            _, per_token = linear_cross_entropy(hidden[first - start :], model.lm_head.weight, targets)
            nats.append(per_token.double().cpu().numpy())
            progress(stop - first)
    return np.concatenate(nats)
