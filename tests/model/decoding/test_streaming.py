"""Text as it comes: whole characters, and nothing of a stop string, however tokens cut it."""

import random

import pytest

from model.decoding.streaming import TextStream


def decode(tokens) -> str:
    return bytes(tokens).decode(errors="replace")


def stream(data: bytes, *stop: str) -> tuple[list[str], TextStream]:
    """The pieces that are given out for one byte after the other."""
    text = TextStream(decode, stop)
    given = [text.add(byte) for byte in data]
    return [*given, text.flush()], text


def test_characters_come_whole():
    given, text = stream("aé€😀".encode())
    assert given == ["a", "", "é", "", "", "€", "", "", "", "😀", ""] and text.text == "aé€😀"


def test_a_broken_character_comes_as_what_it_is():
    assert "".join(stream(b"a\xe2\x82")[0]) == "a\ufffd"
    assert "".join(stream(b"\xf0\x9f\x98b")[0]) == "\ufffdb"


def test_tokens_that_cut_every_character_are_held_until_each_is_whole():
    """However many tokens that takes: here each but the last ends within a character."""
    whole = "😀" * 6
    tokens = [whole.encode()[:3], *(whole.encode()[i : i + 4] for i in range(3, 23, 4)), whole.encode()[23:]]
    text = TextStream(lambda numbers: b"".join(tokens[i] for i in numbers).decode(errors="replace"), ())
    assert [text.add(i) for i in range(7)] == ["", *["😀"] * 6] and text.flush() == "" and text.text == whole


def test_broken_bytes_hold_nothing_back_but_the_last():
    given, text = stream(b"a" + b"\xff" * 9)
    assert given == ["a", "", *["\ufffd"] * 9] and text.text == "a" + "\ufffd" * 9


def test_a_stop_string_ends_the_text_before_it():
    given, text = stream(b"one END two", "END")
    assert "".join(given) == text.text == "one " and text.ended


def test_what_only_begins_like_a_stop_string_is_given_out():
    given, text = stream(b"one EN", "END")
    assert given[-1] == "EN" and text.text == "one EN" and not text.ended
    assert stream(b"EEND x", "END")[1].text == "E"


def test_the_first_of_several_stop_strings_counts():
    assert stream(b"a;b\n\nc", "\n\n", ";")[1].text == "a"


@pytest.mark.parametrize("seed", range(20))
def test_any_text_is_given_up_to_its_first_stop_string(seed):
    generator = random.Random(seed)
    whole = "".join(generator.choices("abé ", k=60))
    stops = ["".join(generator.choices("abé ", k=3)) for _ in range(3)]
    given, text = stream(whole.encode(), *stops)
    ends = [whole.find(stop) for stop in stops if stop in whole]  # all of one length
    first = min(ends) if ends else None
    assert "".join(given) == text.text == whole[:first]
