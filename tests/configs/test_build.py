"""From an `attention` group to the plan: patterns, and the training settings that stand beside them in a config."""

import copy

import pytest

from configs.build import build_plan
from configs.errors import ConfigError
from kernels.patterns import Dense, Window
from model import AttentionPlan
from model.attention.routed.indexer import IndexerTraining
from tests.commands import compose


def plan_with(choice: str, **changes) -> AttentionPlan:
    """The plan of configs/attention/<choice>.yaml with changed settings of its pattern; ... removes a setting."""
    attention = copy.deepcopy(compose(f"attention={choice}")["attention"])
    entry = attention["patterns"][choice]
    entry |= changes
    attention["patterns"][choice] = {key: value for key, value in entry.items() if value is not ...}
    return build_plan(attention)


@pytest.mark.parametrize("choice", ["routed", "native_sparse"])
def test_training_settings_of_an_indexer_are_taken_from_its_patterns_entry(choice):
    plan = plan_with(choice, indexer_loss=0.5, indexer_warmup=7, indexer_gradient=True)
    assert plan.training[choice] == IndexerTraining(indexer_loss=0.5, indexer_warmup=7, indexer_gradient=True)
    assert plan.patterns == plan_with(choice, indexer_loss=2.0).patterns, "a pattern does not depend on training"
    assert [plan.training_settings(layer) for layer in range(2)] == [plan.training.get(plan.entry(i)) for i in range(2)]


def test_a_pattern_without_parameters_has_no_training_settings():
    assert build_plan(compose("attention=window_dense")["attention"]).training == {}
    assert build_plan(compose("attention=hierarchical")["attention"]).training == {}


def test_rotary_embeddings_are_set_by_pattern():
    plan = build_plan(compose("attention=window_dense", "attention.patterns.full.rope=none")["attention"])
    assert [plan.rope_of(layer) for layer in range(6)] == ["model"] * 5 + ["none"]
    assert plan.patterns == {"local": Window(256), "full": Dense()}, "a pattern does not depend on them"


def plan_with_rope(rope: object) -> AttentionPlan:
    full = {"_target_": "kernels.patterns.Dense", "rope": rope}
    return build_plan({"patterns": {"full": full}, "schedule": ["full"], "block": 128, "backend": "auto"})


@pytest.mark.parametrize("rope", ["model", 500.0, 10000])
def test_rotary_embeddings_may_have_a_base_of_their_own(rope):
    assert plan_with_rope(rope).rope_of(0) == rope


@pytest.mark.parametrize("rope", ["nope", 0, -1.0, True, None, "500", float("inf")])
def test_other_rotary_embeddings_are_refused(rope):
    with pytest.raises(ConfigError, match=r"^attention\.patterns\.full\.rope=.*: must be model, none or a number > 0$"):
        plan_with_rope(rope)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(indexer_los=1.0),
            ["routed.indexer_los=1.0: must be", "top_k", "indexer_loss", "indexer_warmup"],
        ),
        (dict(indexer_warmup=...), ["routed.indexer_warmup: missing", "an integer"]),
        (dict(top_k=...), ["routed.top_k: missing", "an integer"]),
        (dict(indexer_warmup=-1), ["attention.patterns.routed.indexer_warmup=-1", "an integer >= 0"]),
        (dict(indexer_gradient=1), ["routed.indexer_gradient=1", "true or false"]),
    ],
)
def test_one_error_names_wrong_settings_of_both(changes, words):
    with pytest.raises(ConfigError) as error:
        plan_with("routed", **changes)
    assert all(word in str(error.value) for word in words), error.value
