"""Configs of earlier versions open under the current names."""

import pytest
import torch
import yaml

from configs import aliases
from configs.aliases import upgrade
from configs.build import build_plan
from configs.runs import open_run
from kernels.patterns import Routed
from scripts.reporting.jobs import read_sweeps
from tests.commands import ROOT, compose, resolved
from tests.scripts.runs import make_run, write_books

COMMITTED = sorted((ROOT / "docs/results/novels_32k").glob("*/config.yaml"))


def with_strategy(config):
    """The config as a run of 0.1.0 saved it: its routed patterns hold `strategy`."""
    for pattern in config["attention"]["patterns"].values():
        pattern["strategy"] = "shared_tiles"
    return config


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_runs_build(file):
    saved = yaml.safe_load(file.read_text())
    plan = build_plan(upgrade(saved)["attention"])
    assert set(plan.patterns) == set(saved["attention"]["patterns"])
    assert upgrade(saved)["trainer"]["strategy"] == saved["trainer"]["strategy"], "only routed patterns lose theirs"


def test_a_removed_key_is_dropped_and_the_saved_config_is_left_alone():
    config = with_strategy(compose("attention=routed"))
    assert upgrade(config) == compose("attention=routed")
    assert all("strategy" in pattern for pattern in config["attention"]["patterns"].values())


def test_a_renamed_key_moves_within_its_group(monkeypatch):
    monkeypatch.setattr(aliases, "ALIASES", {"model.hidden": "mlp_width", "a.*.b": "c"})
    monkeypatch.setattr(aliases, "ADDED", {})
    assert upgrade({"model": {"hidden": 8, "layers": 2}}) == {"model": {"mlp_width": 8, "layers": 2}}
    assert upgrade({"model": {"hidden": 8, "mlp_width": 9}}) == {"model": {"mlp_width": 9}}
    assert upgrade({"a": {"x": {"b": 1}, "y": None}, "model": None}) == {"a": {"x": {"c": 1}, "y": None}, "model": None}


def test_an_added_key_has_the_value_of_earlier_versions_where_a_run_has_none(monkeypatch):
    monkeypatch.setattr(aliases, "ADDED", {"model.z_loss": 0.0})
    assert upgrade({"model": {"layers": 2}, "seed": 1}) == {"model": {"layers": 2, "z_loss": 0.0}, "seed": 1}
    assert upgrade({"model": {"z_loss": 0.5}}) == {"model": {"z_loss": 0.5}}
    assert upgrade({"seed": 1}) == {"seed": 1}


def test_an_old_run_is_opened_resumed_and_reported(tmp_path):
    run = make_run(tmp_path, write_books(tmp_path / "books"), "attention=routed")
    file = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": with_strategy(checkpoint["hyper_parameters"])}, file)
    saved = with_strategy(yaml.safe_load((run / "config.yaml").read_text()))
    (run / "config.yaml").write_text(yaml.safe_dump(saved))

    patterns = open_run(run, "cpu", "32-true").model.plan.patterns
    assert all(isinstance(pattern, Routed) for pattern in patterns.values())
    (job,) = read_sweeps([run])[0].jobs
    for config in (resolved(f"resume={run}"), job.config):
        assert config["attention"] == upgrade(saved)["attention"] != saved["attention"]
