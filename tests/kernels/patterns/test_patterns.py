"""Patterns against their definitions, written once more in plain Python."""

import pytest
import torch

from kernels import Axis
from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, Hierarchical, Pattern, Strided, Window
from tests.kernels.oracle import PATTERNS, packing

DEFINITIONS = {
    "dense": (Dense(), lambda q, k: True),
    "window": (Window(5), lambda q, k: k in range(q - 4, q + 1)),
    "window_with_sinks": (Window(5, 3), lambda q, k: k in range(q - 4, q + 1) or k in (0, 1, 2)),
    "dilated": (Dilated(4, 3), lambda q, k: k in (q, q - 3, q - 6, q - 9)),
    "strided": (Strided(4, 10, 2), lambda q, k: k in range(q - 3, q + 1) or k % 10 in (8, 9)),
    "fixed": (Fixed(10, 2), lambda q, k: k // 10 == q // 10 or k % 10 in (8, 9)),
    "block_sparse": (BlockSparse(4, 2, 1, 0), lambda q, k: q // 4 - k // 4 in (0, 1) or k // 4 == 0),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_visible_tokens_are_those_of_the_definition(name):
    pattern, definition = DEFINITIONS[name]
    for query in range(45):
        keys = torch.arange(query + 1)
        seen = torch.as_tensor(pattern.visible(torch.tensor(query), keys, keys + 1)).expand(query + 1)
        assert seen.tolist() == [definition(query, key) for key in range(query + 1)]


def test_random_blocks_lie_in_the_past_differ_by_seed_and_repeat_in_every_dtype():
    blocks = torch.arange(1000)
    drawn = torch.stack([BlockSparse(4, 1, 0, 3, seed=7)._random_block(blocks, draw) for draw in range(3)])
    assert (drawn[:, 1:] < blocks[1:]).all() and (drawn >= 0).all()
    assert torch.equal(drawn[1], BlockSparse(4, 1, 0, 3, seed=7)._random_block(blocks.int(), 1))
    other = BlockSparse(4, 1, 0, 3, seed=8)._random_block(blocks, 0)
    assert (drawn[0] != other).float().mean() > 0.9 and (drawn[0] != drawn[1]).float().mean() > 0.9
    relative = drawn[0, 100:] / blocks[100:]  # uniform over the past
    assert abs(relative.mean() - 0.5) < 0.04 and abs((relative < 0.25).float().mean() - 0.25) < 0.06


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_visible_runs_under_vmap_and_on_int32(pattern):
    """As FlexAttention's mask_mod it is called with scalars."""
    index = torch.arange(60, dtype=torch.int32)
    grid = pattern.visible(index[:, None], index[None], index[None] + 1)
    mapped = torch.vmap(torch.vmap(lambda q, k: pattern.visible(q, k, k + 1), (None, 0)), (0, None))(index, index)
    assert torch.equal(mapped, grid.expand(60, 60))


def test_align_is_a_setting_of_position_anchored_patterns_alone():
    assert [p.anchor for p in (Dense(), Window(3), Strided(1, 2, align="sequence"), Fixed(2, 1))] == [
        "document",
        "document",
        "sequence",
        "document",
    ]
    with pytest.raises(TypeError):
        Window(3, align="sequence")


IMPOSSIBLE = [
    (lambda: Window(0), "width=0: must be an integer >= 1"),
    (lambda: Window(4.0), r"width=4\.0"),
    (lambda: Window(True), "width=True"),
    (lambda: Window(4, -1), "sink_tokens=-1: must be an integer >= 0"),
    (lambda: Dilated(4, 0), "dilation=0"),
    (lambda: Dilated(0, 4), "width=0"),
    (lambda: Strided(0, 8), "window=0"),
    (lambda: Strided(1, 0), "stride=0"),
    (lambda: Strided(1, 8, 9), r"columns=9: must be at most the stride \(8\)"),
    (lambda: Strided(1, 8, 0), "columns=0"),
    (lambda: Strided(1, 8, align="row"), "align='row': must be 'document' or 'sequence'"),
    (lambda: Fixed(0, 1), "segment=0"),
    (lambda: Fixed(8, 9), r"summary=9: must be at most the segment \(8\)"),
    (lambda: Fixed(8, 1, align=""), "align=''"),
    (lambda: BlockSparse(0, 1, 1, 1), "block_size=0"),
    (lambda: BlockSparse(8, 0, 1, 1), "window_blocks=0"),
    (lambda: BlockSparse(8, 1, -1, 1), "global_blocks=-1"),
    (lambda: BlockSparse(8, 1, 1, -1), "random_blocks=-1"),
    (lambda: BlockSparse(8, 1, 1, 1, seed=-1), "seed=-1"),
    (lambda: BlockSparse(8, 1, 1, 1, align="x"), "align='x'"),
]


@pytest.mark.parametrize("make, message", IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_an_impossible_setting_is_named_with_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_base_pattern_has_neither_visible_nor_candidates():
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(NotImplementedError):
        Pattern().visible(zero, zero, zero)
    with pytest.raises(NotImplementedError):
        Pattern().candidates(zero, zero, 1, 16)


def test_token_positions_start_again_with_every_document():
    axis = Axis.tokens(7, packing([3, 4], [1, 6]))
    assert axis.start.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]]
    assert torch.equal(axis.end, axis.start + 1)
    assert axis.document.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]
    assert axis.origin.tolist() == [[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert axis.key is None


def test_a_document_is_a_run_of_equal_numbers_whatever_the_numbers():
    axis = Axis.tokens(6, torch.tensor([[9, 9, -4, -4, 9, 9]]))
    assert axis.document.tolist() == [[0, 0, 1, 1, 2, 2]] and axis.start.tolist() == [[0, 1, 0, 1, 0, 1]]


def test_an_axis_without_documents_is_one_document_from_its_offset_on():
    axis = Axis.tokens(3, offset=5)
    assert axis.start.tolist() == [[5, 6, 7]] and axis.end.tolist() == [[6, 7, 8]]
    assert not axis.document.any() and not axis.origin.any()
    assert axis.key == Axis.tokens(3, offset=5).key != Axis.tokens(3).key


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 0}, "length=0: must be at least 1"),
        ({"length": 4, "documents": torch.zeros(1, 5)}, r"must be \[batch, 4\]"),
        ({"length": 4, "documents": torch.zeros(4)}, r"must be \[batch, 4\]"),
        ({"length": 4, "documents": torch.zeros(1, 4), "offset": 2}, "offset=2: must be 0 for packed documents"),
    ],
)
def test_an_impossible_axis_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Axis.tokens(**arguments)


@pytest.mark.parametrize(
    ("pattern", "edges"),
    [
        (Dense(), ()),
        (Window(48, 4), (48,)),
        (Strided(100, 256, 32), (100, 256)),
        (Hierarchical(window=8, spans=(4, 16), reaches=(32,), pooling="mean"), (8, 4, 16, 32)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_edges_are_the_distances_at_which_keys_come_into_view(pattern, edges):
    assert pattern.edges == edges
