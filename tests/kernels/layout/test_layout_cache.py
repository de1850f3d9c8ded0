"""Which layouts are built once and kept: those without documents, the most recently used ones."""

import torch

from kernels import Axis, attention, build_layout
from kernels.layout.lru_cache import LRUCache
from kernels.patterns import Dense, Window
from tests.kernels.oracle import packing


def test_layouts_without_documents_are_built_once(monkeypatch):
    monkeypatch.setattr("kernels.layout.builder._cache", LRUCache(size=2))
    first = build_layout(Window(30), Axis.tokens(100), block=32)
    assert build_layout(Window(30), Axis.tokens(100), block=32) is first
    others = [
        build_layout(Window(31), Axis.tokens(100), block=32),
        build_layout(Window(30), Axis.tokens(101), block=32),
        build_layout(Window(30), Axis.tokens(100), block=16),
        build_layout(Window(30), Axis.tokens(100, offset=3), Axis.tokens(103), block=32),
        build_layout([Window(30), Dense()], Axis.tokens(100), block=32),
    ]
    assert len({id(layout) for layout in [first, *others]}) == 6


def test_a_layout_that_was_built_for_inference_serves_training():
    with torch.inference_mode():
        layout = build_layout(Window(31), Axis.tokens(97), block=16)
    assert build_layout(Window(31), Axis.tokens(97), block=16) is layout
    q = torch.randn(1, 1, 97, 8, requires_grad=True)
    attention(q, q, q, layout).sum().backward()
    assert q.grad.isfinite().all()


def test_the_least_recently_used_layout_is_forgotten_first(monkeypatch):
    cache = LRUCache(size=2)
    monkeypatch.setattr("kernels.layout.builder._cache", cache)
    axis = Axis.tokens(20)
    kept, forgotten = build_layout(Window(1), axis, block=16), build_layout(Window(2), axis, block=16)
    assert build_layout(Window(1), axis, block=16) is kept
    build_layout(Window(3), axis, block=16)
    assert build_layout(Window(1), axis, block=16) is kept
    assert build_layout(Window(2), axis, block=16) is not forgotten
    assert len(cache.values) == 2


def test_layouts_of_packed_documents_are_not_cached(monkeypatch):
    cache = LRUCache(size=8)
    monkeypatch.setattr("kernels.layout.builder._cache", cache)
    axis = Axis.tokens(40, packing([10, 30]))
    assert build_layout(Window(5), axis, block=16) is not build_layout(Window(5), axis, block=16)
    build_layout(Window(5), Axis.tokens(40), axis, block=16)
    assert not cache.values
