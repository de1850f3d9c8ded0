"""A name is in one split, on every machine."""

from data.sources.splits import HELD_OUT_PERCENT, split_of


def test_the_split_of_a_name_never_changes():
    names = [f"name{number}" for number in range(10_000)]
    sides = [split_of(name) for name in names]
    for side in ("validation", "test"):
        assert abs(sides.count(side) / 100 - HELD_OUT_PERCENT) < 1
    assert [split_of(name) for name in ("json", "email", "idlelib")] == ["train", "test", "train"]
    assert split_of("odd\udcff") in ("train", "validation", "test")  # a file name that is not UTF-8
