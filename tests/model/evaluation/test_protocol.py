"""Protocols: every token is scored exactly once, with the context that was promised."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.evaluation import Protocol


@st.composite
def protocols(draw) -> Protocol:
    name = draw(st.sampled_from(["whole", "sliding", "chunked"]))
    window = draw(st.integers(1, 40))
    stride = draw(st.none() | st.integers(1, window)) if name == "sliding" else None
    return Protocol(name, window, stride)


def scored(protocol: Protocol, tokens: int) -> list[tuple[int, int]]:
    """(token, how many tokens it was predicted from), in the order of scoring."""
    found = []
    for segment in protocol.segments(tokens):
        assert 0 <= segment.start < segment.stop < tokens, (
            "inputs are never empty, and the last token never one of them"
        )
        assert segment.start < segment.scored <= segment.stop
        found += [(token, token - segment.start) for token in range(segment.scored, segment.stop + 1)]
    return found


@settings(max_examples=500)
@given(protocol=protocols(), tokens=st.integers(0, 200))
@example(protocol=Protocol("sliding", 1, 1), tokens=2)
@example(protocol=Protocol("sliding", 40, 40), tokens=81)
@example(protocol=Protocol("sliding", 40, 1), tokens=199)
@example(protocol=Protocol("chunked", 1, None), tokens=5)
def test_every_token_is_scored_exactly_once_in_order(protocol, tokens):
    assert [token for token, _ in scored(protocol, tokens)] == list(range(1, tokens))


WINDOW = 16


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 15, 16, 17, 18, 31, 32, 33, 97, 101])
@pytest.mark.parametrize("name", ["whole", "sliding", "chunked"])
def test_lengths_around_the_window(name, tokens, stride):
    found = scored(Protocol(name, WINDOW, stride), tokens)
    assert [token for token, _ in found] == list(range(1, tokens))
    if name == "whole":
        assert all(context == token for token, context in found)
    else:
        assert all(context <= WINDOW for _, context in found)


@settings(max_examples=300)
@given(protocol=protocols(), tokens=st.integers(0, 200))
def test_context_is_at_least_what_was_promised(protocol, tokens):
    for token, context in scored(protocol, tokens):
        if protocol.name == "whole":
            assert context == token
        elif token <= protocol.window:
            assert context == token, "the first window's tokens see all that precede them"
        else:
            assert context >= max(protocol.min_context, 1)


def test_chunks_are_disjoint_and_start_from_nothing():
    segments = list(Protocol("chunked", 10, None).segments(26))
    assert [(s.start, s.stop, s.scored) for s in segments] == [(0, 10, 1), (10, 20, 11), (20, 25, 21)]


def test_sliding_windows_overlap_and_score_what_is_new():
    segments = list(Protocol("sliding", 10, 4).segments(20))
    assert [(s.start, s.stop, s.scored) for s in segments] == [(0, 10, 1), (4, 14, 11), (8, 18, 15), (12, 19, 19)]


def test_a_document_that_fits_the_window_is_read_in_one_go():
    for name in ("whole", "sliding", "chunked"):
        assert len(list(Protocol(name, WINDOW, 4).segments(WINDOW + 1))) == 1
    assert len(list(Protocol("sliding", WINDOW, 4).segments(WINDOW + 2))) == 2


def test_the_stride_is_half_a_window_where_not_given():
    assert Protocol("sliding", 10, None).stride == 5 and Protocol("sliding", 11, None).stride == 6
    assert Protocol("sliding", 1, None).stride == 1
    assert Protocol("sliding", 10, None).min_context == 5


def test_a_row_of_the_report_says_what_the_protocol_was():
    assert Protocol("sliding", 10, 4).describe() == {
        "name": "sliding",
        "window": 10,
        "stride": 4,
        "min_context": 6,
        "bos": True,
    }
    assert Protocol("whole", None, None).describe()["min_context"] is None
    assert Protocol("chunked", 10, None).describe()["min_context"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("all", 4, 2), "protocol.name='all': must be one of whole, sliding, chunked"),
        (("sliding", None, 2), "protocol.window=None: must be an integer >= 1 for protocol.name=sliding"),
        (("chunked", 0, None), "protocol.window=0: must be an integer >= 1 for protocol.name=chunked"),
        (("sliding", 4, 0), "protocol.stride=0: must lie between 1 and protocol.window=4"),
        (("sliding", 4, 5), "protocol.stride=5: must lie between 1 and protocol.window=4"),
    ],
)
def test_an_impossible_protocol_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Protocol(*arguments)
