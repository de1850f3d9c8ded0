"""A first stage in which only indexers train, then one in which all parameters do: what moves, and exact resumes."""

import copy
import functools
import logging
from dataclasses import replace

import pytest
import stand_ins
import torch
from stand_ins import OPTIMIZER, VOCABULARY, new_module
from test_exact_resume import StopAfter, assert_same_end, train_in_sessions

from configs.checks import check
from configs.errors import ConfigError
from kernels.patterns import Routed
from model import Transformer
from tests.commands import compose
from tests.model.small import INDEXER, config, plan

STEPS, FIRST = 6, 3
ROUTED = Routed(window=8, block=16, top_k=1, router="indexer", share="group", first_block=False, indexer_dim=4)
OPTIMIZERS = {"adamw": OPTIMIZER, "muon": OPTIMIZER | dict(name="muon", momentum=0.9, indexer_learning_rate=0.02)}


@pytest.fixture(autouse=True)
def routed_runs(monkeypatch):
    """The stand-ins' runs train a routed transformer, on sequences with blocks to choose from."""
    settings = replace(INDEXER, indexer_warmup=FIRST, indexer_warmup_alone=True)

    def module(optimizer=None, seed=0):
        torch.manual_seed(seed)
        model = Transformer(config(layers=1, vocabulary=VOCABULARY), plan(ROUTED, indexer=settings))
        return new_module(optimizer, model, seed)

    monkeypatch.setattr(stand_ins, "LENGTH", 64)
    monkeypatch.setattr(stand_ins, "new_module", module)  # `train` calls it


def checkpoint(path):
    saved = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    return saved["state_dict"], saved["optimizer_states"][0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_waits_keeps_its_bits_and_has_no_state(tmp_path, optimizer, caplog):
    caplog.set_level(logging.INFO, "model.training.freezing")
    settings = dict(max_steps=STEPS, validate_every=None, optimizer=optimizer)
    before = stand_ins.new_module().state_dict()
    stand_ins.train(tmp_path, callbacks=[StopAfter(FIRST)], **settings)
    weights, state = checkpoint(tmp_path)
    for name, value in weights.items():
        assert torch.equal(value, before[name]) is (".indexer." not in name), name
    assert len(state["state"]) == 2 and sum(len(group["params"]) for group in state["param_groups"]) > 10
    stand_ins.train(tmp_path, resume=True, **settings)
    after, state = checkpoint(tmp_path)
    assert all((after[name] - weights[name]).abs().max() > 1e-4 for name in after if name.endswith("proj.weight"))
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])
    begin, change = (record.message for record in caplog.records if record.name == "model.training.freezing")
    assert begin.startswith("only the indexers train (192 parameters)") and begin.endswith(f"up to step {FIRST}")
    assert change.startswith(f"step {FIRST}: from now on all parameters train")


def test_stopped_and_resumed_in_either_stage_and_between_them(tmp_path):
    settings = dict(max_steps=STEPS, validate_every=2, accumulate=2, optimizer=OPTIMIZERS["muon"])
    stand_ins.train(tmp_path / "straight", **settings)
    train_in_sessions(tmp_path / "stopped", [2, FIRST, 5], **settings)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


@functools.cache
def composed(choice: str) -> dict:
    return compose(f"attention={choice}", "trainer.accelerator=cpu")


def refusal(choice: str, optimizer: dict | None = None, **settings) -> str:
    """The line with which a run with these settings of its pattern is refused."""
    changed = copy.deepcopy(composed(choice))
    changed["attention"]["patterns"].get(choice, {}).update(settings)
    changed["optimizer"].update(optimizer or {})
    with pytest.raises(ConfigError) as error:
        check(changed)
    assert "\n" not in str(error.value)
    return str(error.value)


ALONE = dict(router="indexer", indexer_warmup=5, indexer_warmup_alone=True)


@pytest.mark.parametrize(
    ("choice", "settings", "words"),
    [
        (
            "routed",
            ALONE | dict(router="mean_key"),
            ("routed.indexer_warmup_alone=true: must be false", "router=indexer"),
        ),
        ("routed", ALONE | dict(indexer_warmup=0), ("routed.indexer_warmup_alone=True: must be false",)),
        (
            "routed",
            ALONE | dict(indexer_warmup=300000),
            ("routed.indexer_warmup=300000: must be below trainer.max_steps",),
        ),
        ("native_sparse", ALONE, ("native_sparse.indexer_warmup_alone=true: must be false", "attention=routed")),
        (
            "routed",
            ALONE | dict(optimizer=dict(freeze=["*.indexer.*"])),
            ("optimizer.freeze=[", "names of no indexers"),
        ),
    ],
)
def test_stages_that_cannot_be_are_one_line(choice, settings, words):
    line = refusal(choice, **settings)
    assert all(word in line for word in words), line
