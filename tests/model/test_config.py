"""What cannot be is refused, with the field, its value and what would be accepted."""

import pytest

from kernels.patterns import Dense, Window
from model import AttentionPlan, Transformer
from tests.model.small import config, plan


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, r"kv_heads=3: must be a divisor of heads \(4\)"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"head_dim": 2, "rope_scaling": "ntk"}, "head_dim=2: must be at least 4 for rope_scaling=ntk"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


PATTERNS = {"local": Window(8), "full": Dense()}


def test_a_schedule_is_repeated_over_the_depth():
    chosen = plan(PATTERNS, ["local", "local", "full"])
    assert [chosen.pattern(layer, 2) for layer in range(7)] == [Window(8), Window(8), Dense()] * 2 + [Window(8)]


def test_a_list_in_the_schedule_gives_one_pattern_a_kv_head():
    chosen = plan(PATTERNS, ["full", ["local", "full"]])
    assert chosen.pattern(1, 2) == (Window(8), Dense())
    model = Transformer(config(layers=3), chosen)
    layouts = model.build_layouts(None, 40)
    assert [layout.heads for layout in layouts] == [1, 2, 1]
    assert layouts[0] is layouts[2]


@pytest.mark.parametrize(
    "schedule, message",
    [
        ([], r"schedule=\[\]: must name at least one of local, full"),
        (["locale"], "schedule names 'locale': must be one of the patterns local, full"),
        (["full", ["local", "x"]], "schedule names 'x': must be one of the patterns local, full"),
    ],
)
def test_a_schedule_names_defined_patterns(schedule, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan(patterns=PATTERNS, schedule=schedule, block=16, backend="auto")


def test_a_layer_has_the_rotary_embeddings_of_its_pattern():
    chosen = plan(PATTERNS, ["local", "full", ["local", "local"]], rope={"full": "none"})
    assert [chosen.rope_of(layer) for layer in range(4)] == ["model", "none", "model", "model"]
    with pytest.raises(
        ValueError, match=r"\['local', 'full'\] has rope=model of local, rope=none of full: must be the"
    ):
        plan(PATTERNS, [["local", "full"]], rope={"full": "none"})


def test_a_list_has_as_many_patterns_as_kv_heads():
    with pytest.raises(ValueError, match=r"\['local', 'full', 'full'\] has 3 patterns: must have one a KV head \(2\)"):
        Transformer(config(), plan(PATTERNS, [["local", "full", "full"]]))
