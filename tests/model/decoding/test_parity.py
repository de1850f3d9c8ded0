"""The parity proof: decoding with a cache gives the logits of one pass over the whole text.

For every pattern and schedule, past the window, across the edges of blocks, strides and segments, in batches of ragged
prompts, and for chunks of one token, of a few, and around the size of a tile.
"""

import pytest
import torch

from kernels import build_layout
from kernels.patterns import BlockSparse, Dense, Hierarchical, NativeSparse, Pattern, Routed, Strided, Window
from model import Cache, Sampling, Transformer, generate
from model.attention import Family
from model.attention.families import FAMILIES
from model.attention.routed.core import RoutedAttention
from model.decoding import expected_bytes
from tests.kernels.oracle import PATTERNS, Chosen
from tests.model.small import config, lively, plan

BLOCK = 16
LENGTH = 78
ROUTED = dict(
    **dict(window=5, block=BLOCK, top_k=1, router="mean_key", share="group", first_block=False),
    indexer_dim=4,
)
BRANCHES = dict(summary_span=6, pooling="learned", combine="lse")


def routed(**changes) -> Routed:
    return Routed(**ROUTED | changes)


def native_sparse(**changes) -> NativeSparse:
    return NativeSparse(**ROUTED | BRANCHES | changes)


MIXED = {"local": Window(9, 2), "far": Strided(3, 8, 2), "full": Dense(), "blocks": BlockSparse(7, 1, 1, 1)}
PLANS = {name: plan(pattern, block=BLOCK) for name, pattern in PATTERNS.items()} | {
    "blocks_without_random_ones": plan(BlockSparse(8, 2, 1, 0), block=BLOCK),
    "of_ones_own": plan(Chosen(3), block=BLOCK),
    "hierarchical": plan(Hierarchical(window=5, spans=(2, 6), reaches=(11,), pooling="learned"), block=BLOCK),
    "hierarchical_mean": plan(Hierarchical(window=3, spans=(4, 8, 16), reaches=(9, 20), pooling="mean"), block=BLOCK),
    "hierarchical_of_one_level": plan(Hierarchical(window=20, spans=(16,), reaches=(), pooling="mean"), block=BLOCK),
    "windows_below_summaries": plan(
        {"local": Window(9), "far": Hierarchical(window=9, spans=(4,), reaches=(), pooling="learned")},
        ["local", "far", "far"],
        block=BLOCK,
    ),
    "mixed_by_head_and_depth": plan(MIXED, ["local", ["far", "full"], ["blocks", "local"]], block=BLOCK),
    "routed": plan(routed(), block=BLOCK),
    "routed_by_head": plan(routed(share="head", first_block=True), block=BLOCK),
    "routed_to_all_blocks": plan(routed(window=1, top_k=99), block=BLOCK),
    "routed_by_indexer": plan(routed(router="indexer", top_k=2, window=BLOCK), block=BLOCK),
    "routed_by_indexer_and_head": plan(routed(router="indexer", share="head"), block=BLOCK),
    "native_sparse": plan(native_sparse(), block=BLOCK),
    "native_sparse_gated": plan(
        native_sparse(combine="gates", router="indexer", pooling="mean", first_block=True, share="head"), block=BLOCK
    ),
    "families_mixed": plan(
        {
            "local": Window(9, 2),
            "far": routed(top_k=2),
            "branches": native_sparse(),
            "coarse": Hierarchical(window=9, spans=(4,), reaches=(), pooling="learned"),
        },
        ["local", "far", "branches", "coarse"],
        block=BLOCK,
    ),
    "rope_by_pattern": plan(
        {
            "local": Window(11),
            "coarse": Hierarchical(window=9, spans=(4,), reaches=(), pooling="learned"),
            "coarse_too": Hierarchical(window=9, spans=(4,), reaches=(), pooling="learned"),
            "far": routed(),
            "full": Dense(),
        },
        ["local", "coarse", "coarse_too", "far", "full"],
        block=BLOCK,
        rope={"local": 300.0, "coarse": "none", "far": "none", "full": "none"},
    ),
    "five_windows_to_one": plan({"local": Window(11), "full": Dense()}, ["local", "local", "full"], block=BLOCK),
}
CHUNKS = (7, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1)

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference of any two logits, which are 3 to 5 in size."""

every_plan = pytest.mark.parametrize("name", PLANS)


def build(name: str, dtype: torch.dtype = torch.float64) -> Transformer:
    """Weights are a little smaller than elsewhere: with larger ones, a pass in float32 is itself off by 1e-5."""
    layers = max(2, len(PLANS[name].schedule))
    model = lively(Transformer(config(layers=layers, sink_logits=name.startswith("mixed")), PLANS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 / 3 if parameter.dim() == 2 else 1)
    return model.to(dtype)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    hidden = model(tokens, torch.arange(length).expand(tokens.shape), model.build_layouts(None, length))
    return model.logits(hidden)


@torch.no_grad()
def cached_logits(model: Transformer, tokens: torch.Tensor, chunk: int | list[int]) -> torch.Tensor:
    """chunk: the tokens that are read at once, or a list of as many as there are chunks."""
    cache = Cache(model, len(tokens))
    return torch.cat([model.logits(cache.extend(part)) for part in tokens.split(chunk, 1)], 1)


@every_plan
def test_chunks_give_the_logits_of_one_pass(name):
    model, tokens = build(name), random_tokens(2, LENGTH)
    whole = full_logits(model, tokens)
    for chunk in (*CHUNKS, [40] + [1] * (LENGTH - 40)):  # the test of edges reads the first tokens one by one
        assert (cached_logits(model, tokens, chunk) - whole).abs().max() <= LIMITS[torch.float64], chunk


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@every_plan
def test_chunks_of_changing_sizes_give_the_same(name, dtype):
    model, tokens = build(name, dtype), random_tokens(2, LENGTH)
    cache, found = Cache(model, 2), []
    for part in tokens.split([20, 1, 1, 17, 3, 8, 9, 18, 1], 1):
        with torch.no_grad():
            found.append(model.logits(cache.extend(part)))
    assert (torch.cat(found, 1) - full_logits(model, tokens)).abs().max() <= LIMITS[dtype]


@pytest.mark.parametrize("one_mask", [0, 1 << 20])
@every_plan
def test_the_edges_of_pages_groups_and_pieces_are_not_seen(name, one_mask, monkeypatch):
    """Every bound on what is held at once, made so small that it is met."""
    monkeypatch.setattr("model.kv_cache.cache_layout.ONE_MASK", one_mask)
    monkeypatch.setattr("model.kv_cache.cache_layout.PAIRS_AT_ONCE", 40)
    monkeypatch.setattr("model.kv_cache.store.PAGE", 4)
    for module in ("cache_layout", "chunk_attention"):
        monkeypatch.setattr(f"model.kv_cache.{module}.QUERIES_AT_ONCE", 9)
    monkeypatch.setattr("kernels.backends.direct.SCORES_PER_CHUNK", 500)
    model, tokens = build(name), random_tokens(2, LENGTH)
    whole = full_logits(model, tokens)
    sizes = [1] * 23 + [7] * 3 + [17] * 2  # LENGTH tokens
    if list(PLANS).index(name) % 2 == bool(one_mask):  # both orders with both bounds, each in half of the plans
        sizes.reverse()
    assert (cached_logits(model, tokens, sizes) - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk", [7, 4 * BLOCK - 1])  # single tokens follow each of them
@every_plan
def test_ragged_batches_give_the_logits_of_each_text_alone(name, chunk):
    """Prompts of different lengths, padded at the right, then tokens one by one, of which some sequences get none, then
    a chunk that begins at another place in each."""
    model = build(name)
    lengths, steps = [5, 53, 28], [[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]] * 5
    texts = random_tokens(3, LENGTH, seed=1)
    cache, seen, read = Cache(model, 3), [[], [], []], [0, 0, 0]

    def extend(tokens, new):
        with torch.no_grad():
            logits = model.logits(cache.extend(tokens, new))
        for sequence, count in enumerate(new):
            seen[sequence].append(logits[sequence, :count])
            read[sequence] += count

    for start in range(0, max(lengths), chunk):
        new = [min(max(length - start, 0), chunk) for length in lengths]
        noise = random_tokens(3, chunk, seed=2)
        tokens = torch.stack([torch.cat([texts[i, start : start + new[i]], noise[i, new[i] :]]) for i in range(3)])
        extend(tokens, new)
    for new in steps:
        extend(torch.stack([texts[i, read[i] : read[i] + 1] for i in range(3)]), new)
    extend(torch.stack([texts[i, read[i] : read[i] + 10] for i in range(3)]), [10, 10, 9])
    assert cache.lengths == read == [length + 15 + more for length, more in zip(lengths, (10, 10, 9), strict=True)]
    for sequence in range(3):
        alone = full_logits(model, texts[sequence : sequence + 1, : read[sequence]])[0]
        assert (torch.cat(seen[sequence]) - alone).abs().max() <= 1e-12


@every_plan
def test_greedy_generation_is_what_full_passes_choose(name):
    model = build(name)
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, 31, 20)]
    greedy = Sampling(temperature=0, top_k=None, top_p=1, seed=0)
    found = generate(model, prompts, new_tokens=6, sampling=greedy, prefill_chunk=BLOCK)
    for prompt, continuation in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for token in continuation:
            assert token == int(full_logits(model, torch.tensor([tokens]))[0, -1].argmax())
            tokens.append(token)


LEVELS = [level for name in ("hierarchical", "hierarchical_mean") for level in PLANS[name].patterns["only"].levels]


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), BlockSparse(8, 2, 1, 0), *LEVELS], ids=repr)
def test_what_is_neither_within_the_horizon_nor_persistent_is_never_seen(pattern: Pattern):
    """The claim by which keys are forgotten, pair by pair."""
    span = getattr(pattern, "span", 1)
    query, key = torch.arange(150)[:, None], torch.arange(0, 150, span)[None]
    seen = pattern.visible(query, key, key + span).expand(150, key.shape[1]) & (key + span <= query + 1)
    horizon = 150 if pattern.horizon is None else pattern.horizon
    kept = (query - key < horizon) | pattern.persistent(key)
    assert not (seen & ~kept).any()
    if pattern.horizon is not None and pattern.horizon > 1:  # and no later than need be
        assert (seen & (query - key >= pattern.horizon - span) & ~pattern.persistent(key)).any()


def test_a_windows_cache_does_not_grow_with_the_text():
    model = lively(Transformer(config(max_length=4096), plan(Window(20, 3)))).eval()
    cache, sizes = Cache(model, 1), []
    for part in random_tokens(1, 2000).split(50, 1):
        cache.extend(part)
        sizes.append((cache.bytes_stored, cache.bytes_allocated))
    assert len(set(sizes[1:])) == 1
    assert sizes[-1][0] == 2 * 2 * 2 * 8 * 4 * (19 + 3)  # layers, k and v, KV heads, head_dim, bytes; slots


@pytest.mark.parametrize("context", [1, 17, 479])
@every_plan
def test_bytes_stored_and_read_are_those_expected(name, context):
    """No key is kept that the plan does not count, and no more is read than twice what is seen."""
    model = lively(Transformer(config(layers=3, max_length=4096), PLANS[name])).eval()
    tokens, cache = random_tokens(2, context + 1), Cache(model, 2)
    cache.extend(tokens[:, :-1])
    stored, read = expected_bytes(model, context, 2)
    assert cache.bytes_stored == stored <= cache.bytes_allocated
    cache.extend(tokens[:, -1:])
    assert read <= cache.bytes_read <= 2 * read


def test_a_text_longer_than_the_model_takes_is_refused():
    cache = Cache(lively(Transformer(config(max_length=20), plan(Window(4)))), 1)
    cache.extend(random_tokens(1, 15))
    with pytest.raises(ValueError, match=r"a sequence of 21 tokens: the model takes 20"):
        cache.extend(random_tokens(1, 6))


def test_layouts_of_chunks_are_not_kept(monkeypatch):
    """Each is needed once: a million tokens must not fill the memory with layouts."""
    axes = []
    build_one = lambda pattern, *given, block: axes.extend(given) or build_layout(pattern, *given, block=block)  # noqa: E731
    monkeypatch.setattr("model.kv_cache.step.build_layout", build_one)
    for name, count in (("window", 4), ("dense", 4 + 2 * 3)):  # dense: what lies before the chunk is in tiles, too
        cached_logits(build(name), random_tokens(2, LENGTH), 20)
        axes = [axis for axis in axes if axis is not None]
        assert len(axes) == count and all(axis.key is None and axis.batch == 1 for axis in axes)
        axes.clear()


def test_a_family_without_a_cache_is_refused(monkeypatch):
    """It does not decode as another pattern."""
    monkeypatch.setitem(FAMILIES, Routed, Family(RoutedAttention))
    with pytest.raises(ValueError, match=r"pattern=Routed\(.* its family RoutedAttention has no cache"):
        Cache(build("routed"), 1)
