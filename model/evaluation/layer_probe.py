"""The loss of a dense model when one layer, or one of its KV heads, attends by another pattern.

A batch of document chunks is read once with dense attention, and the residual stream before every layer is kept in CPU
memory. For a changed layer, that layer and the later ones are computed: for all L layers of a model these are
L + L (L + 1) / 2 layer passes, in place of L + L * L.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention import AttentionLayout
from model.evaluation.distance_mass import mass_by_distance, octave_edges
from model.evaluation.documents import Documents
from model.evaluation.loss_store import LossStore
from model.evaluation.protocol import Protocol
from model.evaluation.replacement import Replacement, Unit
from model.evaluation.scoring import (
    PackedSegments,
    Progress,
    Work,
    batches,
    counts_from_sequence,
    pack,
    score_segments,
)
from model.inference import evaluating
from model.loss import linear_cross_entropy
from model.transformer import Transformer


@dataclass(frozen=True)
class ProbeLosses:
    """dense: loss in nats of each token of each chunk, float64. changed: the same with one unit changed. mass: share of
    attention by distance, float64 `[layers, kv_heads, octaves]` (distance_mass.py)."""

    dense: list[np.ndarray]
    changed: dict[Unit, list[np.ndarray]]
    mass: np.ndarray


def chunks_to_probe(documents: Documents, length: int, tokens: int, replacement: Replacement) -> list[Work]:
    """Returns disjoint chunks of at most `length` tokens in which the pattern hides something: the first chunk of every
    document, then the second of every document, and so on; at most `tokens` tokens in all, but at least one chunk."""
    protocol = Protocol("chunked", length, None)
    by_document = [
        [(document, segment) for segment in protocol.segments(len(documents.tokens(document)))]
        for document in range(len(documents))
    ]
    chosen, total = [], 0
    for work in (each for turn in zip_longest(*by_document) for each in turn if each):
        size = work[1].stop - work[1].start
        if replacement.hides(size):
            total += size
            if chosen and total > tokens:
                break
            chosen.append(work)
    return chosen


def layer_passes(layers: int, units: Sequence[Unit]) -> int:
    """Returns the number of layers that `probe_units` computes for a batch."""
    return layers + sum(layers - unit.layer for unit in units)


def probe_units(
    model: Transformer,
    replacement: Replacement,
    documents: Documents,
    work: Sequence[Work],
    units: Sequence[Unit],
    *,
    tokens_at_once: int,
    queries: int,
    seed: int,
    store: LossStore,
    progress: Progress,
) -> ProbeLosses:
    """Returns the losses of a dense model on chunks, and those with each unit changed alone.

    Args:
        work: the chunks.
        tokens_at_once: largest number of tokens of a packed sequence; a longer chunk is a sequence of its own.
        queries: number of queries per chunk whose attention is measured by distance; `seed` draws them.
        store: results that it holds are not computed again.
        progress: called with the number of tokens times layers that were computed.

    Raises:
        ValueError: the replacing pattern has trainable parameters, or is not a mask and cannot be given to one KV head.
    """
    dense = replacement.model(model, units, units)
    variants = {
        head: replacement.model(model, units, [unit for unit in units if unit.head != head])
        for head in dict.fromkeys(unit.head for unit in units)
    }
    apart = any(counts_from_sequence(variant) for variant in variants.values())
    layers, longest = len(dense.layers), max(segment.stop - segment.start for _, segment in work)
    octaves = len(octave_edges(longest)) - 1
    found = ProbeLosses([], {unit: [] for unit in units}, np.zeros((layers, dense.config.kv_heads, octaves)))
    for number, batch in enumerate(batches(work, 0 if apart else tokens_at_once)):
        reading = _DenseReading(dense, pack(documents, batch, dense.embed_tokens.weight.device))
        packed, name = reading.packed, f"{number:06d}"
        found.dense.extend(packed.split(_stored(store, f"{name}_dense", lambda r=reading: r.losses)))
        progress(packed.tokens.shape[1] * layers)
        for unit in units:
            changed = _stored(
                store,
                f"{name}_layer_{unit.layer}_head_{unit.head}",
                lambda r=reading, u=unit: r.losses_with(variants[u.head], u.layer),
            )
            found.changed[unit].extend(packed.split(changed))
            progress(packed.tokens.shape[1] * (layers - unit.layer))
        generator = np.random.default_rng((seed, number))
        mass = _stored(store, f"{name}_mass", lambda r=reading, g=generator: r.mass(queries, g, longest))
        found.mass[...] += mass * len(batch) / len(work)
    return found


def schedule_losses(
    model: Transformer,
    replacement: Replacement,
    documents: Documents,
    work: Sequence[Work],
    units: Sequence[Unit],
    kept: Collection[Unit],
    *,
    tokens_at_once: int,
    store: LossStore,
    progress: Progress,
) -> list[np.ndarray]:
    """Returns the losses on chunks of a model in which all units but the `kept` ones are changed. Arguments and errors
    are those of `probe_units`."""
    variant = replacement.model(model, units, kept)
    whole = max(tokens_at_once, *(segment.stop - segment.start for _, segment in work))
    found = []
    for number, batch in enumerate(batches(work, 0 if counts_from_sequence(variant) else tokens_at_once)):
        sizes = [segment.stop - segment.start for _, segment in batch]

        def score(batch: Sequence[Work] = batch) -> np.ndarray:
            scored = score_segments(variant, documents, batch, whole, lambda _: None)
            return np.concatenate([nats for *_, nats in scored])

        losses = _stored(store, f"{number:06d}_kept_{len(kept)}", score)
        found.extend(np.split(losses, np.cumsum(sizes)[:-1]))
        progress(sum(sizes) * len(variant.layers))
    return found


def _stored(store: LossStore, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    found = store.load(name)
    if found is None:
        found = compute()
        store.save(name, found)
    return found


class _DenseReading:
    """The pass of a dense model over a packed batch. It runs when the first result needs it."""

    def __init__(self, model: Transformer, packed: PackedSegments) -> None:
        self.model, self.packed = model, packed
        self._layouts: dict[int, Sequence[AttentionLayout]] = {}

    def _layouts_of(self, model: Transformer) -> Sequence[AttentionLayout]:
        """Returns the layouts of the batch for a model. They are built once a model, since all layers use them."""
        if id(model) not in self._layouts:
            self._layouts[id(model)] = model.build_layouts(self.packed.document, self.packed.tokens.shape[1])
        return self._layouts[id(model)]

    @cached_property
    def _pass(self) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
        """The losses, and the arguments of every layer, of which the residual stream is in CPU memory."""
        arguments: list[tuple[Any, ...]] = []

        def keep(_, given: tuple[Any, ...]) -> None:
            arguments.append((given[0].cpu(), *given[1:]))

        hooks = [layer.register_forward_pre_hook(keep) for layer in self.model.layers]
        try:
            with torch.no_grad(), evaluating(self.model):
                packed, layouts = self.packed, self._layouts_of(self.model)
                losses = self.model.loss(packed.tokens, packed.targets, packed.position, layouts).per_token
        finally:
            for hook in hooks:
                hook.remove()
        return _as_array(losses), arguments

    @property
    def losses(self) -> np.ndarray:
        """The loss of each token, float64 `[tokens]`."""
        return self._pass[0]

    @torch.no_grad()
    def losses_with(self, variant: Transformer, changed: int) -> np.ndarray:
        """Returns the losses as `losses`, with the layer `changed` of `variant`."""
        _, arguments = self._pass
        layout = self._layouts_of(variant)[changed]
        x, *rest, _ = arguments[changed]
        with evaluating(self.model):
            x = variant.layers[changed](x.to(self.packed.tokens.device), *rest, layout).x
            for layer, (_, *rest) in zip(self.model.layers[changed + 1 :], arguments[changed + 1 :], strict=True):
                x = layer(x, *rest).x
            hidden = self.model.norm(x).flatten(0, 1)
            _, per_token = linear_cross_entropy(hidden, self.model.lm_head.weight, self.packed.targets.flatten())
        return _as_array(per_token)

    @torch.no_grad()
    def mass(self, queries: int, generator: np.random.Generator, longest: int) -> np.ndarray:
        """Returns the share of attention by distance, the mean over the chunks: float64 `[layers, kv_heads, octaves up
        to longest]`."""
        sampled = [
            np.sort(generator.choice(np.arange(size // 2, size), min(queries, size - size // 2), replace=False))
            for size in self.packed.sizes
        ]
        _, arguments = self._pass
        by_layer = []
        for layer, (x, rotation, *_) in zip(self.model.layers, arguments, strict=True):
            x = layer.input_layernorm(x.to(self.packed.tokens.device))
            by_layer.append(mass_by_distance(layer.self_attn, x, rotation, self.packed.sizes, sampled, longest))
        return torch.stack(by_layer).double().cpu().numpy()


def _as_array(per_token: Tensor) -> np.ndarray:
    return per_token.flatten().double().cpu().numpy()
