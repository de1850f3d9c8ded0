"""The truth that kernels are held against: masks by brute force, and dense softmax attention in float64.

Nothing here touches the layout code: a mask is made of `Pattern.visible`, the document rule and the causal rule alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import Axis
from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, Pattern, Strided, Window

PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "window": Window(20),
    "window_of_itself": Window(1),
    "window_with_sinks": Window(13, sink_tokens=5),
    "dilated": Dilated(7, 3),
    "strided": Strided(10, 24, 3),
    "strided_by_sequence": Strided(10, 24, 3, align="sequence"),
    "fixed": Fixed(24, 5),
    "fixed_by_sequence": Fixed(24, 5, align="sequence"),
    "blocks_below_the_tile": BlockSparse(6, 2, 1, 2, seed=3),
    "blocks_of_the_tile": BlockSparse(16, 1, 1, 1),
    "blocks_of_the_tile_by_sequence": BlockSparse(16, 1, 1, 1, align="sequence"),
    "blocks_above_the_tile": BlockSparse(37, 1, 0, 1, seed=1),
}
"""Every pattern, with settings that leave tiles of 16 hidden, partial and full within about a hundred tokens."""


@dataclass(frozen=True)
class Chosen(Pattern):
    """Queries whose position is a multiple of `every` see keys at multiples of `every`; all others see nothing."""

    every: int

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        return (query % self.every == 0) & (key_start % self.every == 0) & (key_start < query)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query_start)[..., None], query_stop[..., None]


def brute_force_mask(patterns: Pattern | Sequence[Pattern], queries: Axis, keys: Axis | None = None) -> Tensor:
    """Booleans `[batch, patterns, queries, keys]`."""
    keys = queries if keys is None else keys
    patterns = (patterns,) if isinstance(patterns, Pattern) else patterns
    query, query_document, query_origin = (
        t.long()[:, :, None] for t in (queries.start, queries.document, queries.origin)
    )
    start, end, document, origin = (t.long()[:, None, :] for t in (keys.start, keys.end, keys.document, keys.origin))
    masks = []
    for pattern in patterns:
        if getattr(pattern, "align", "document") == "sequence":
            seen = pattern.visible(query + query_origin, start + origin, end + origin)
        else:
            seen = pattern.visible(query, start, end)
        masks.append(seen & (query_document == document) & (end <= query + 1))
    return torch.stack(masks, 1)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64; K/V heads are copied to the query heads, and mask `[batch, kv heads or 1, queries, keys]`
    too."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    mask = mask.expand(q.shape[0], k.shape[1] // group, *mask.shape[2:]).repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    scores = torch.where(mask, scores, -1e300)  # finite, so that rows that see nothing have no NaN in their gradients
    sees = mask.any(-1)
    if sink_logits is not None:
        sink = sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores, sees = torch.cat([scores, sink], -1), torch.ones_like(sees)
    weights = scores.softmax(-1)[..., : k.shape[2]] * mask
    lse = torch.where(sees, scores.logsumexp(-1), -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), lse


@dataclass
class Case:
    """Seeded inputs of one attention call and the weights of a loss that looks at every output."""

    queries: int
    keys: int
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    sinks: bool = True
    seed: int = 0
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)  # noqa: E731
        self.tensors = {
            "q": draw(self.batch, heads, self.queries, self.head_dim),
            "k": draw(self.batch, self.kv_heads, self.keys, self.head_dim),
            "v": draw(self.batch, self.kv_heads, self.keys, self.head_dim),
        }
        if self.sinks:
            self.tensors["sink_logits"] = draw(heads)
        self.out_weight = draw(self.batch, heads, self.queries, self.head_dim)
        self.lse_weight = draw(self.batch, heads, self.queries).double()

    def run(self, function) -> dict[str, Tensor]:
        """out and lse of `function(q, k, v, sink_logits)` and the gradients of the loss, all float64."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self.tensors.items()}
        out, lse = function(leaves["q"], leaves["k"], leaves["v"], leaves.get("sink_logits"))
        loss = (out.double() * self.out_weight.double()).sum()
        loss = loss + torch.where(lse.isfinite(), lse.double() * self.lse_weight, 0.0).sum()
        loss.backward()
        gradients = {f"grad_{name}": leaf.grad.double() for name, leaf in leaves.items()}
        return {"out": out.detach().double(), "lse": lse.detach().double(), **gradients}


RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Of the largest element: a few roundings of the dtype (with bfloat16 only out and gradients are rounded)."""


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert torch.equal(got.isfinite(), want.isfinite()), f"{name}: infinite or NaN elsewhere"
        assert torch.equal(got[~got.isfinite()], want[~want.isfinite()]), name
        got, want = got[want.isfinite()], want[want.isfinite()]
        limit = RELATIVE_ERROR[dtype] * max(1.0, float(want.abs().max()) if len(want) else 0.0)
        error = float((got - want).abs().max()) if len(want) else 0.0
        assert error <= limit, f"{name}: off by {error:.2e}, allowed {limit:.2e}"


def packing(*batch: Sequence[int]) -> Tensor:
    """Document ids `[batch, length]` from each sequence's document lengths: packing([3, 4], [5, 2])."""
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in batch]
    )
