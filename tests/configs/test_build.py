"""From an `attention` group to the plan: patterns, and the training settings that stand beside them in a config."""

import copy

import pytest

from configs.build import build_plan
from configs.errors import ConfigError
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
