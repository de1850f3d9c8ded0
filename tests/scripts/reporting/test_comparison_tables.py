"""Names of runs in the tables of a comparison."""

from scripts.reporting.comparison_tables import brief_names


def test_names_are_brief_where_they_stay_different():
    assert brief_names(["window/2026-01-31_12", "dense/2026-01-31_12/best", "dense/2026-01-31_12"]) == [
        "window",
        "dense/best",
        "dense",
    ]
    assert brief_names(["window/a", "window/a attention=dense"]) == ["window", "window attention=dense"]


def test_runs_of_one_name_are_numbered():
    assert brief_names(["window/a", "window/b", "dense/a"]) == ["1 window", "2 window", "3 dense"]
