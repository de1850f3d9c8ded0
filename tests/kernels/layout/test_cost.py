"""Counts of pairs, tiles, FLOPs and bytes: against brute force and against PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import Axis, attention, build_layout
from kernels.layout.cost import AttentionCost, DecodeCost, causal_pairs, decode_cost
from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, NativeSparse, Routed, Strided, Window
from tests.kernels.oracle import PATTERNS, brute_force_mask, packing

every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@every_pattern
@pytest.mark.parametrize("packed", [None, packing([60, 40], [10, 90])], ids=["one_document", "packed"])
def test_pairs_and_tiles_are_those_of_brute_force(pattern, packed):
    axis = Axis.tokens(100, packed)
    mask = brute_force_mask(pattern, axis)
    batch, heads, head_dim = 2, 6, 8
    cost = build_layout(pattern, axis, block=16).cost(batch, heads, head_dim)
    shared = batch // len(mask)
    assert cost.visible_pairs == int(mask.sum()) * heads * shared
    padded = torch.nn.functional.pad(mask, (0, 12, 0, 12)).unflatten(3, (7, 16)).unflatten(2, (7, 16))
    assert cost.tile_pairs == int(padded.any(5).any(3).sum()) * 16 * 16 * heads * shared
    assert cost.causal_pairs == batch * heads * 100 * 101 // 2
    assert cost.flops == 12 * head_dim * cost.visible_pairs  # 2 products forward, 4 backward, 2 FLOPs each
    assert cost.density_pairs == cost.visible_pairs / cost.causal_pairs <= cost.density_tiles


def test_per_head_layouts_count_each_head_once():
    axis = Axis.tokens(64)
    patterns = [Window(5), Dense()]
    cost = build_layout(patterns, axis, block=16).cost(batch=3, heads=8, head_dim=4)
    assert cost.visible_pairs == int(brute_force_mask(patterns, axis).sum()) * 3 * 4


def test_costs_add_up():
    total = AttentionCost(1, 2, 3, 4) + AttentionCost(10, 20, 30, 40)
    assert total == AttentionCost(11, 22, 33, 44)
    assert (total.density_pairs, total.density_tiles) == (11 / 33, 22 / 33)


@pytest.mark.parametrize("queries, keys", [(1, 1), (7, 7), (3, 9), (1, 9), (9, 3), (9, 9)])
def test_causal_pairs_are_those_of_a_triangle_that_ends_at_the_corner(queries, keys):
    query, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    assert causal_pairs(queries, keys) == int((key <= query).sum())


def test_layout_bytes_are_what_its_tensors_hold():
    layout = build_layout(Window(20), Axis.tokens(100), block=32)
    rows = columns = 4
    entries = 4 + 3  # each row's own tile and the one before it
    assert layout.bytes == 4 * (3 * rows + 2 * entries + 3 * columns + 2 * entries) + 4 * 32 * len(layout.masks) + 8


@every_pattern
def test_pytorchs_counter_counts_visible_pairs(pattern):
    batch, heads, kv_heads, head_dim = 2, 4, 2, 8
    axis = Axis.tokens(70, packing([70], [30, 40]))
    layout = build_layout(pattern, axis, block=16)
    q = torch.randn(batch, heads, 70, head_dim, requires_grad=True)
    k = torch.randn(batch, kv_heads, 70, head_dim, requires_grad=True)
    pairs = int(brute_force_mask(pattern, axis).sum()) * heads
    with FlopCounterMode(display=False) as forward:
        out = attention(q, k, k, layout)
    assert forward.get_total_flops() == 4 * head_dim * pairs
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 10 * head_dim * pairs


def test_pytorchs_counter_knows_layouts_of_one_head_and_one_batch():
    layout = build_layout(Window(3), Axis.tokens(20), block=16)
    q = torch.randn(5, 6, 20, 8)
    with FlopCounterMode(display=False) as counter:
        attention(q, q[:, :3], q[:, :3], layout)
    assert counter.get_total_flops() == 4 * 8 * 5 * 6 * (1 + 2 + 3 * 18)


@pytest.mark.parametrize(
    ("pattern", "stored", "read"),
    [
        (Dense(), 1000, 1000),
        (Window(50), 49, 49),
        (Window(50, 7), 49 + 7, 49 + 7),
        (Dilated(10, 5), 45, 9),
        (Strided(50, 100, 4), 49 + 40, 49 + 40 - 4),  # the last column lies within the window, too
        (Fixed(64, 4), 63 + 15 * 4, 1000 - 960 + 15 * 4),
        (BlockSparse(64, 2, 1, 0), 127 + 64, 1000 - 14 * 64 + 64),
        (BlockSparse(64, 1, 0, 1), 1000, 1000 - 960 + 64),
        ((Window(50), Window(20, 7)), 49 + 7, 49 + 7),
    ],
    ids=repr,
)
def test_what_a_cache_holds_and_a_token_reads(pattern, stored, read):
    assert decode_cost(pattern, 1000) == DecodeCost(stored, read)


ROUTED = dict(
    **dict(window=40, block=16, top_k=3, router="mean_key", share="group", first_block=True),
    indexer_dim=8,
)


def test_a_routed_token_reads_its_window_its_blocks_and_the_routers_keys():
    """At position 1000: a window from 960 on, 60 blocks before it, of which 4 are read."""
    assert decode_cost(Routed(**ROUTED), 1000) == DecodeCost(1000, 40 + 4 * 16, 62, 60)
    assert decode_cost(Routed(**ROUTED | {"share": "head"}), 1000, group=3) == DecodeCost(1000, 40 + 3 * 64, 62, 60)
    assert decode_cost(Routed(**ROUTED), 39) == DecodeCost(39, 39, 2, 0)
    branches = NativeSparse(**ROUTED, summary_span=30, pooling="mean", combine="lse")
    assert decode_cost(branches, 1000) == DecodeCost(1000 + 33, 40 + 64 + 33, 62, 60)


def test_what_a_windows_cache_holds_does_not_grow():
    assert decode_cost(Window(50, 7), 100_000) == decode_cost(Window(50, 7), 1000)
