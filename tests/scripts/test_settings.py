"""What commands make of their settings before any work starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.checks import check_evaluate, check_generate
from configs.errors import ConfigError
from configs.evaluation import shared_settings
from configs.runs import open_documents
from model import Sampling
from model.training.run_folder import folder_of
from scripts.evaluate import evaluate
from scripts.generate import _stop
from tests.commands import compose


def test_runs_that_are_compared_share_the_first_ones_window_and_limit():
    first = SimpleNamespace(label="a", sequence_length=65536)
    settings = {"protocol": {"name": "sliding", "window": None, "stride": None}, "split": "test", "limit": "auto"}
    shared = shared_settings(settings, first)
    assert shared["protocol"]["window"] == 65536 and shared["limit"] == 128 * 65536
    assert settings["protocol"]["window"] is None, "the config itself stays as it is"
    for protocol in ({"name": "whole", "window": None}, {"name": "chunked", "window": 64}):
        assert shared_settings({"protocol": protocol, "limit": None}, first) == {"protocol": protocol, "limit": None}


def test_a_checkpoint_without_a_run_around_it_lies_in_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    assert folder_of(Path("my.ckpt")) == folder_of(Path("./my.ckpt")) == tmp_path / "x"
    (tmp_path / "config.yaml").touch()
    assert folder_of(Path("my.ckpt")) == tmp_path


def test_a_split_that_a_run_does_not_have_is_named():
    run = SimpleNamespace(data=SimpleNamespace(corpus=SimpleNamespace(splits={"train": 1, "test": 2})))
    assert open_documents(run, "test", None) == (2, "test")
    with pytest.raises(ConfigError, match=r"evaluation\.split=valid: must be one of train, test"):
        open_documents(run, "valid", None)


@pytest.mark.parametrize(("stop", "stops"), [("END", ["END"]), ([], []), (None, []), (["a", "b"], ["a", "b"])])
def test_a_stop_is_a_text_or_a_list_of_texts(stop, stops):
    assert _stop({"stop": stop}) == stops


@pytest.mark.parametrize("stop", [[""], "", [3], ["a", None]])
def test_a_stop_that_ends_everything_or_nothing_is_refused(stop):
    with pytest.raises(ConfigError, match=r"stop=.* a text that is not empty"):
        check_generate(compose("checkpoint=x", config_name="generate") | {"stop": stop})


@pytest.mark.parametrize("name", ["temperature", "top_p", "seed"])
def test_sampling_names_what_is_no_number(name):
    settings = dict(temperature=1.0, top_k=None, top_p=1.0, seed=1) | {name: None}
    with pytest.raises(ValueError, match=f"{name}=None: must be"):
        Sampling(**settings)


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.equal(
        Sampling(temperature=1e-40, top_k=None, top_p=1.0, seed=1).distribution(logits), torch.tensor([[0.0, 1.0, 0.0]])
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.by_context.contexts=512", "must be a list"),
        ("evaluation.key_tokens.gain=null", "must be a number"),
        ("+evaluation.by_contxt=1", "must be left out"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        check_evaluate(compose(override, "checkpoint=x", config_name="evaluate"))


@pytest.mark.parametrize("override", ["recall.lengths=1024", "recall.depths=0.5", "recall.distances=7"])
def test_a_recall_setting_that_is_no_list_is_refused(override):
    with pytest.raises(ConfigError, match=r"recall\..* a list of at least one"):
        check_evaluate(compose(override, "checkpoint=x", config_name="evaluate"))


def test_recall_of_no_run_is_refused():
    config = compose("suite=recall", "checkpoint=[]", "accelerator=cpu", config_name="evaluate")
    with pytest.raises(ConfigError, match=r"checkpoint=\[\]: must be .* a list of at least one"):
        evaluate(config)
