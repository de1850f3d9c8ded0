"""What the three kernels share: descriptors, layouts of accumulators, masks of bits, pairs of 16-bit numbers."""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.backends.triton.common import tma_strides
from kernels.backends.triton.dense.work import ITEM_FIELDS

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

ROW_STATS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)

CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x `[batch, heads, length, head_dim]` with blocks of `rows` rows; TMA reads 0 beyond the end, and
    writes nothing there. x must be `addressable` (kernels/backends/triton/common.py)."""
    block = 1, 1, rows, x.shape[-1]
    return TensorDescriptor(x, list(x.shape), tma_strides(x), list(block), _shared_layout(block, x.dtype))


@functools.cache  # a layer has 16 descriptors of a few kinds, and computing a layout took most of their time
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])


def describe_row_stats(row_stats: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of `row_stats` (compute_row_stats) with blocks of both statistics of `rows` queries."""
    flat = row_stats.view(-1, row_stats.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [2, rows], ROW_STATS_LAYOUT)


def processors(device: torch.device) -> int:
    """The number of programs of a launch: each multiprocessor has one, which takes items of work in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.constexpr_function
def accumulator(columns):
    """The layout of a warpgroup's accumulator `[64, columns]`."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def bits_layout(words):
    """The accumulator's layout `[64, 32 * words]`, seen as `[64, words, 32]`: row, word of the mask, bit."""
    word_bases = [[0, 1 << i, 0] for i in range(words.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], *word_bases],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, words, 32],
    )


synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 and 3.6
"""Waits until all threads of this warpgroup are here."""


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory, each of which completes a phase after ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def rounds_of_program(count):
    """How many of `count` items this program takes: one of each round of as many items as there are programs."""
    whole = count // gl.num_programs(0)
    return whole + gl.where(_place(whole) < count % gl.num_programs(0), 1, 0)


@gluon.jit
def item_of_round(index, count):
    """The item that this program takes in round `index`, at most the last one.

    Items are sorted longest first. Every other round is dealt in reverse, so that no program gets the longest item of
    each.
    """
    return gl.minimum(index * gl.num_programs(0) + _place(index), count - 1)


@gluon.jit
def _place(index):
    return gl.where((index & 1) == 1, gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(0))


@gluon.jit
def load_item(items, index):
    """(batch, KV head, row or column, first entry, entries, partial entries, buffer) of an item of work
    (kernels/backends/triton/dense/work.py)."""
    item = items + index * ITEM_FIELDS
    return (
        gl.load(item),
        gl.load(item + 1),
        gl.load(item + 2),
        gl.load(item + 3),
        gl.load(item + 4),
        gl.load(item + 5),
        gl.load(item + 6),
    )


@gluon.jit
def load_words(masks, tile, first_row, first_word, WORDS: gl.constexpr):
    """The mask of 64 rows of a tile of 128 x 128 pairs, from `first_row` and `first_word` on: int32 `[64, WORDS]`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, bits_layout(WORDS))
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))
    at = masks + (tile.to(gl.int64) * 512 + (first_row * 4 + first_word))
    return gl.load(at + ((row * 4)[:, None] + word[None, :]))


@gluon.jit
def masked(scores, words, WORDS: gl.constexpr):
    """`scores` `[64, 32 * WORDS]` with -inf for the pairs that the words hide."""
    LAYOUT: gl.constexpr = bits_layout(WORDS)
    by_word = gl.convert_layout(gl.reshape(scores, [64, WORDS, 32]), LAYOUT, assert_trivial=True)
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    # The shift is divided: bits 1 and 2 of the column differ between threads, the others are compile-time constants.
    bit = (gl.expand_dims(words, 2) >> (column & 6)) & (1 << (column & 25))
    shown = gl.where(bit != 0, by_word, float("-inf"))
    return gl.convert_layout(gl.reshape(shown, [64, 32 * WORDS]), accumulator(32 * WORDS), assert_trivial=True)


@gluon.jit
def pack_pairs(x, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):
    """Float32 `[64, COLUMNS]` rounded to DTYPE, two neighbours in one int32 `[64, COLUMNS / 2]`.

    Loops carry weights in this form: 16-bit numbers that a loop carries cost an instruction each per step.
    """
    low, high = gl.split(gl.reshape(x, [64, COLUMNS // 2, 2]))
    if DTYPE == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    return packed


@gluon.jit
def unpack_pairs(packed, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """The inverse of `pack_pairs`, as a left operand of a product."""
    if DTYPE == gl.bfloat16:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
        )
    else:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
    return gl.convert_layout(gl.reshape(gl.join(low, high), [64, COLUMNS]), LAYOUT, assert_trivial=True)
