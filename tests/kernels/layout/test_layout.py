"""Layouts against brute force: every tile, every bit, every count."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import Axis, BlockLayout, build_layout
from kernels.layout.block_layout import FULL, TileList
from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, Pattern, Strided, Window
from tests.kernels.oracle import PATTERNS, Chosen, brute_force_mask, packing

Tile = tuple[int, int, int, int]
"""Batch, head, query block, key block."""


def listed_tiles(layout: BlockLayout, by: str) -> dict[Tile, int]:
    """Tile ids by place, read off the rows or the columns; the order within each list is checked on the way."""
    side = getattr(layout, by)
    lines = -(-(layout.queries if by == "rows" else layout.keys) // layout.block)
    assert side.start.shape == side.count.shape == side.partial.shape == (layout.batch, layout.heads, lines)
    assert len(side.blocks) == len(side.tiles)
    found = {}
    for b, h, line in np.ndindex(layout.batch, layout.heads, lines):
        start, count, partial = (int(t[b, h, line]) for t in (side.start, side.count, side.partial))
        blocks, tiles = side.blocks[start : start + count].tolist(), side.tiles[start : start + count].tolist()
        assert len(blocks) == count and 0 <= partial <= count
        assert all(tile >= 0 for tile in tiles[:partial]) and all(tile == FULL for tile in tiles[partial:])
        for kind in (blocks[:partial], blocks[partial:]):
            assert kind == sorted(set(kind)), "each kind rises, without repeats"
        for other, tile in zip(blocks, tiles, strict=True):
            place = (b, h, line, other) if by == "rows" else (b, h, other, line)
            assert place not in found, "a tile is listed once, as partial or as full"
            found[place] = tile
    return found


def assert_exact(layout: BlockLayout, mask: torch.Tensor) -> None:
    """`mask` booleans `[batch, heads, queries, keys]`: what the layout must say, no more and no less."""
    batch, heads, queries, keys = mask.shape
    block = layout.block
    assert (layout.batch, layout.heads, layout.queries, layout.keys) == (batch, heads, queries, keys)
    assert torch.equal(layout.pairs, mask.sum((2, 3))) and layout.pairs.dtype == torch.int64
    padded = torch.nn.functional.pad(mask, (0, -keys % block, 0, -queries % block))
    grid = (
        padded.unflatten(3, (-1, block)).unflatten(2, (-1, block)).transpose(3, 4)
    )  # [b, h, row, column, block, block]

    rows = listed_tiles(layout, "rows")
    expected = {tuple(place): grid[tuple(place)] for place in grid.flatten(4).any(-1).nonzero().tolist()}
    assert rows.keys() == expected.keys(), "exactly the tiles that hold a visible pair"
    bits = (layout.masks[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    bits = bits.bool().reshape(len(layout.masks), block, -1)
    assert not bits[..., block:].any(), "no bit beyond the tile"
    for place, truth in expected.items():
        assert (rows[place] == FULL) == bool(truth.all()), place
        assert rows[place] == FULL or torch.equal(bits[rows[place], :, :block], truth), place

    assert listed_tiles(layout, "columns") == rows, "columns are the transposition, with the same masks"
    unused = set(range(len(layout.masks))) - set(rows.values())
    assert not bits[list(unused)].any(), (
        "every mask is used, but for one of zeros that keeps the table from being empty"
    )
    assert len(torch.unique(layout.masks.flatten(1), dim=0)) == len(layout.masks), "no mask twice"
    assert torch.equal(layout.dense_mask(), mask)
    assert all(t.dtype == torch.int32 for t in layout.tensors()[:-1])


sizes = st.integers(1, 150)
aligns = st.sampled_from(["document", "sequence"])
patterns = st.one_of(
    st.just(Dense()),
    st.builds(Window, sizes, st.integers(0, 40)),
    st.builds(Dilated, st.integers(1, 40), st.integers(1, 20)),
    st.integers(1, 100).flatmap(
        lambda stride: st.builds(Strided, sizes, st.just(stride), st.integers(1, stride), aligns)
    ),
    st.integers(1, 100).flatmap(lambda segment: st.builds(Fixed, st.just(segment), st.integers(1, segment), aligns)),
    st.builds(
        BlockSparse,
        st.integers(1, 70),
        st.integers(1, 4),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 2**33),
        aligns,
    ),
    st.builds(Chosen, st.integers(2, 90)),
)


@st.composite
def packings(draw, longest: int = 260) -> torch.Tensor | int:
    """Document ids of a batch of sequences, or only a length where there are no documents."""
    length = draw(st.integers(1, longest))
    if draw(st.booleans()):
        return length
    batch = draw(st.integers(1, 3))
    cuts = [draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=8)) for _ in range(batch)]
    return torch.stack(
        [sum((torch.arange(length) >= c).long() for c in cut) + torch.zeros(length).long() for cut in cuts]
    )


def axis_of(packed: torch.Tensor | int) -> Axis:
    return Axis.tokens(packed) if isinstance(packed, int) else Axis.tokens(packed.shape[1], packed)


blocks = st.sampled_from([16, 32, 64, 128])


@settings(max_examples=300)
@given(pattern=patterns, packed=packings(), block=blocks)
@example(pattern=Window(128), packed=256, block=128)
@example(pattern=Strided(1, 16, 16), packed=64, block=16)
@example(pattern=Fixed(16, 16, "sequence"), packed=packing([5, 43], [48, 0]), block=16)
@example(pattern=Chosen(90), packed=60, block=16)
@example(pattern=BlockSparse(1, 1, 0, 3, 2**33), packed=packing([100, 30]), block=32)
def test_layout_is_exact(pattern, packed, block):
    axis = axis_of(packed)
    assert_exact(build_layout(pattern, axis, block=block), brute_force_mask(pattern, axis))


@settings(max_examples=100)
@given(per_head=st.lists(patterns, min_size=2, max_size=4), packed=packings(100), block=st.sampled_from([16, 32]))
@example(per_head=[Window(5), Dense(), Window(5)], packed=50, block=16)
def test_one_pattern_per_kv_head_is_exact(per_head, packed, block):
    axis = axis_of(packed)
    mask = brute_force_mask(per_head, axis)
    shared = len(set(per_head)) == 1
    assert_exact(build_layout(per_head, axis, block=block), mask[:, :1] if shared else mask)


@settings(max_examples=150)
@given(pattern=patterns, queries=st.integers(1, 70), offset=st.integers(0, 150), block=st.sampled_from([16, 32, 64]))
@example(pattern=Window(20), queries=1, offset=150, block=16)
def test_queries_behind_cached_keys_are_exact(pattern, queries, offset, block):
    behind, keys = Axis.tokens(queries, offset=offset), Axis.tokens(offset + queries)
    assert_exact(build_layout(pattern, behind, keys, block), brute_force_mask(pattern, behind, keys))


def summaries(lengths: list[int], span: int) -> Axis:
    """Per document of a packed sequence: one key for every `span` tokens, the last one shorter."""
    ends = [[min(end, n) for end in range(span, n + span, span)] for n in lengths]
    tensor = lambda rows: torch.tensor([[x for row in rows for x in row]], dtype=torch.int32)  # noqa: E731
    origins = np.cumsum([0, *lengths])
    return Axis(
        start=tensor([[(end - 1) // span * span for end in row] for row in ends]),
        end=tensor(ends),
        document=tensor([[d] * len(row) for d, row in enumerate(ends)]),
        origin=tensor([[int(origins[d])] * len(row) for d, row in enumerate(ends)]),
    )


@settings(max_examples=150)
@given(
    pattern=patterns,
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    span=st.integers(1, 40),
    block=st.sampled_from([16, 32]),
)
def test_keys_that_are_summaries_of_spans_are_exact(pattern, lengths, span, block):
    queries, keys = Axis.tokens(sum(lengths), packing(lengths)), summaries(lengths, span)
    assert_exact(build_layout(pattern, queries, keys, block), brute_force_mask(pattern, queries, keys))


@settings(max_examples=150)
@given(
    pattern=patterns,
    lengths=st.lists(st.integers(1, 250), min_size=1, max_size=4),
    which=st.sets(st.integers(0, 999), min_size=1, max_size=20),
    span=st.sampled_from([1, 7]),
)
@example(pattern=Dense(), lengths=[250, 50], which={0, 252, 299}, span=7)
@example(pattern=Strided(1, 10, 1, "sequence"), lengths=[180, 170], which={340}, span=7)
def test_a_few_queries_of_packed_documents_see_their_past(pattern, lengths, which, span):
    """Queries taken here and there, as in decoding: there are keys beyond them, and positions beyond their number."""
    tokens = Axis.tokens(sum(lengths), packing(lengths))
    chosen = torch.tensor(sorted({index % sum(lengths) for index in which}))
    queries = Axis(*(getattr(tokens, name)[:, chosen] for name in ("start", "end", "document", "origin")))
    keys = tokens if span == 1 else summaries(lengths, span)
    assert_exact(build_layout(pattern, queries, keys, 16), brute_force_mask(pattern, queries, keys))


def test_one_packing_of_keys_serves_a_batch_of_queries_and_the_reverse():
    packed = packing([20, 30], [7, 43])
    many, one = Axis.tokens(50, packed), Axis.tokens(50)
    for queries, keys in ((many, one), (one, many)):
        assert_exact(build_layout(Window(9), queries, keys, 16), brute_force_mask(Window(9), queries, keys))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_candidates_never_miss_a_visible_key(pattern):
    """Without the builder: every visible key of every run of queries lies in one of the intervals."""
    length, block = 120, 16
    for start in (0, 1, 15, 16, 50, 96, 104):
        stop = min(start + block, length)
        first, last = pattern.candidates(torch.tensor([start]), torch.tensor([stop]), length, block)
        assert first.shape == last.shape == (1, first.shape[-1])
        query, key = torch.arange(start, stop)[:, None], torch.arange(length)[None]
        seen = ((key <= query) & pattern.visible(query, key, key + 1)).any(0)
        covered = ((first[0, :, None] <= key) & (key < last[0, :, None])).any(0)
        assert not (seen & ~covered).any()


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_number_of_candidate_intervals_does_not_depend_on_values(pattern):
    a = pattern.candidates(torch.tensor([0, 16]), torch.tensor([16, 32]), 200, 16)[0].shape[-1]
    b = pattern.candidates(torch.tensor([150, 151]), torch.tensor([166, 152]), 200, 16)[0].shape[-1]
    assert a == b


MILLION = """
import time
from kernels import Axis, build_layout
from kernels.patterns import Window
axis, begin = Axis.tokens(1 << 20), time.process_time()
layout = build_layout(Window(1024), axis)
seconds = time.process_time() - begin  # not the time of other processes on a busy machine
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
rows = layout.rows
print(seconds, peak, int(layout.pairs), int(rows.count.sum()), int(rows.partial.sum()), len(layout.masks))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's peak memory")
def test_a_million_token_window_is_built_in_seconds_and_below_a_gigabyte():
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for each other take CPU time
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, timeout=300, check=True, env=env
    )
    seconds, peak_kilobytes, pairs, tiles, partial, masks = map(float, done.stdout.split())
    assert seconds < 30
    assert peak_kilobytes < 1_000_000
    tokens, width, rows = 2**20, 1024, 2**13
    assert pairs == tokens * width - width * (width - 1) // 2
    assert tiles == 9 * rows - (8 + 7 + 6 + 5 + 4 + 3 + 2 + 1)  # the diagonal's tile, 7 full ones, the far edge's
    assert partial == rows + (rows - 8)
    assert masks == 2


@pytest.mark.parametrize(("pattern", "tiles"), [(Dense(), 16), (Window(256), 16 + 8), (Window(255), 16 + 12 + 8)])
def test_tiles_inside_a_plain_window_are_not_evaluated(pattern, tiles, monkeypatch):
    """Else the layout of full attention over T tokens takes T^2 / 2 evaluations: minutes at 131,072 tokens."""
    evaluated, visible = [], type(pattern).visible

    def counting(self, query, key_start, key_end):
        seen = visible(self, query, key_start, key_end)
        evaluated.append(torch.broadcast_tensors(seen, query, key_start)[0].numel())
        return seen

    monkeypatch.setattr(type(pattern), "visible", counting)
    documents = torch.arange(2048)[None] // 512  # 4 documents of 4 blocks each
    layout = build_layout(pattern, Axis.tokens(2048, documents))
    assert sum(evaluated) == tiles * 128**2  # the diagonal, and the window's other edge
    assert int(layout.pairs) == int(brute_force_mask(pattern, Axis.tokens(2048, documents)).sum())


def test_a_class_with_another_rule_inherits_no_plain_window():
    class Even(Window):
        def visible(self, query, key_start, key_end):
            return (query - key_start < self.width) & (key_start % 2 == 0)

    class Renamed(Window):
        pass

    assert Even(300).plain_window(1000) is None and Renamed(300).plain_window(1000) == 300
    axis = Axis.tokens(700)
    assert_exact(build_layout(Even(300), axis), brute_force_mask(Even(300), axis))


def test_flat_tensors_and_back():
    layout = build_layout(Window(9), Axis.tokens(50), block=16)
    again = BlockLayout.from_tensors(layout.tensors(), layout.queries, layout.keys, layout.block)
    assert all(a is b for a, b in zip(layout.tensors(), again.tensors(), strict=True))
    assert torch.equal(layout.dense_mask(), again.dense_mask())


def test_a_pattern_of_ones_own_needs_only_a_class():
    assert issubclass(Chosen, Pattern)
    layout = build_layout(Chosen(7), Axis.tokens(30), block=16)
    rows_that_see = layout.dense_mask()[0, 0].any(-1).nonzero().flatten().tolist()
    assert rows_that_see == [7, 14, 21, 28]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pattern": Dense(), "block": 48}, "block=48: must be one of 16, 32, 64, 128"),
        ({"pattern": []}, "must be a pattern, or one pattern per KV head"),
        ({"pattern": Dense(), "queries": (2, 20), "keys": (3, 20)}, "batch 2, keys of batch 3: must agree, or be 1"),
        ({"pattern": Dense(), "device": "meta"}, "queries on cpu, keys on meta: must be on one device"),
    ],
)
def test_an_impossible_layout_is_refused(arguments, message):
    queries = Axis.tokens(20, torch.zeros(arguments.pop("queries", (1, 20))))
    keys = Axis.tokens(20, torch.zeros(arguments.pop("keys", (1, 20)), device=arguments.pop("device", "cpu")))
    with pytest.raises(ValueError, match=message):
        build_layout(arguments.pop("pattern"), queries, keys, **arguments)


def test_more_tiles_than_int32_counts_are_refused():
    one = torch.zeros(1, 1, 1, dtype=torch.int32)
    entries = one.view(1).expand(1 << 31)  # takes no memory
    with pytest.raises(ValueError, match="a layout of 2,147,483,648 tiles: must have fewer than 2,147,483,648"):
        TileList(one, one, one, entries, entries)
    TileList(one, one, one, entries[1:], entries[1:])
