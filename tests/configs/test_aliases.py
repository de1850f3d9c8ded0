"""Configs of earlier versions open under the current names."""

from pathlib import Path

import pytest
import torch
import yaml

from configs import aliases
from configs.aliases import upgrade
from configs.build import build_model_config, build_plan
from configs.resolve import with_later_keys
from configs.runs import open_run
from kernels.patterns import Routed
from scripts.reporting.read_jobs import read_sweeps
from tests.commands import compose, resolved
from tests.scripts.runs import make_run, write_books

SAVED_BY_0_1 = sorted((Path(__file__).parent / "saved_by_0_1").glob("*.yaml"))


def as_saved_by_0_1(config):
    """The config as a run of 0.1.0 saved it: with `model.hidden`, and with `strategy` in its routed patterns."""
    config["model"]["hidden"] = config["model"].pop("mlp_width")
    for pattern in config["attention"]["patterns"].values():
        pattern["strategy"] = "shared_tiles"
    return config


@pytest.mark.parametrize("file", SAVED_BY_0_1, ids=lambda file: file.stem)
def test_runs_of_0_1_build(file):
    saved = yaml.safe_load(file.read_text())
    plan = build_plan(upgrade(saved)["attention"])
    assert set(plan.patterns) == set(saved["attention"]["patterns"])
    assert upgrade(saved)["trainer"]["strategy"] == saved["trainer"]["strategy"], "only routed patterns lose theirs"
    assert build_model_config(upgrade(saved)["model"], 1).mlp_width == saved["model"]["hidden"]


def test_keys_are_removed_and_renamed_and_the_saved_config_is_left_alone():
    config = as_saved_by_0_1(compose("attention=routed"))
    assert upgrade(config) == compose("attention=routed")
    assert all("strategy" in pattern for pattern in config["attention"]["patterns"].values())
    assert "hidden" in config["model"]


def test_a_renamed_key_moves_within_its_group(monkeypatch):
    monkeypatch.setattr(aliases, "ALIASES", {"model.depth": "layers", "a.*.b": "c"})
    monkeypatch.setattr(aliases, "ADDED", {})
    assert upgrade({"model": {"depth": 8, "width": 2}}) == {"model": {"layers": 8, "width": 2}}
    assert upgrade({"model": {"depth": 8, "layers": 9}}) == {"model": {"layers": 9}}
    assert upgrade({"a": {"x": {"b": 1}, "y": None}, "model": None}) == {"a": {"x": {"c": 1}, "y": None}, "model": None}


def test_an_added_key_has_the_value_of_earlier_versions_where_a_run_has_none(monkeypatch):
    monkeypatch.setattr(aliases, "ADDED", {"model.z_loss": 0.0})
    assert upgrade({"model": {"layers": 2}, "seed": 1}) == {"model": {"layers": 2, "z_loss": 0.0}, "seed": 1}
    assert upgrade({"model": {"z_loss": 0.5}}) == {"model": {"z_loss": 0.5}}
    assert upgrade({"seed": 1}) == {"seed": 1}
    monkeypatch.setattr(aliases, "ADDED", {"a.b.c": 1})
    assert upgrade({"a": {"b": {}, "d": 2}}) == {"a": {"b": {"c": 1}, "d": 2}}
    assert upgrade({"a": {"d": 2}}) == {"a": {"d": 2}}


def test_a_run_of_a_version_without_cuda_graphs_resumes_without_one():
    saved = compose("trainer=gpu")
    assert saved["trainer"].pop("cuda_graph") == "auto"
    assert upgrade(saved)["trainer"]["cuda_graph"] is False


def test_a_run_of_a_version_without_a_limit_is_evaluated_whole_as_the_runs_beside_it_were():
    saved = compose()
    assert saved["evaluation"].pop("limit") == "auto"
    assert with_later_keys(upgrade(saved), compose()).evaluation.limit is None


def test_an_old_run_is_opened_resumed_and_reported(tmp_path):
    run = make_run(tmp_path, write_books(tmp_path / "books"), "attention=routed")
    file = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": as_saved_by_0_1(checkpoint["hyper_parameters"])}, file)
    saved = as_saved_by_0_1(yaml.safe_load((run / "config.yaml").read_text()))
    (run / "config.yaml").write_text(yaml.safe_dump(saved))

    patterns = open_run(run, "cpu", "32-true").model.plan.patterns
    assert all(isinstance(pattern, Routed) for pattern in patterns.values())
    (job,) = read_sweeps([run])[0].jobs
    for config in (resolved(f"resume={run}"), job.config):
        assert config["attention"] == upgrade(saved)["attention"] != saved["attention"]
        assert config["model"] == upgrade(saved)["model"] and config["model"]["mlp_width"] == saved["model"]["hidden"]
