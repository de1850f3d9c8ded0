"""What every command shares."""

from scripts.console import with_later_keys


def test_a_run_from_before_a_key_of_the_evaluation_can_go_on():
    """It keeps its own settings, and gets the default of what it does not know."""
    saved = {
        "evaluation": {"split": "validation", "protocol": {"name": "whole"}},
        "seed": 3,
        "trainer": {"max_steps": 7},
    }
    composed = {
        "evaluation": {"split": "test", "protocol": {"name": "sliding", "window": None}, "by_context": []},
        "seed": 1,
        "new": 5,
        "preflight": "warn",
        "trainer": {"max_steps": 420, "max_seconds": None, "on_nan": "stop", "max_skipped_steps": 10, "later": 2},
    }
    assert with_later_keys(saved, composed) == {
        "evaluation": {"split": "validation", "protocol": {"name": "whole", "window": None}, "by_context": []},
        "seed": 3,
        "preflight": "warn",
        "trainer": {"max_steps": 7, "max_seconds": None, "on_nan": "stop", "max_skipped_steps": 10},
    }
