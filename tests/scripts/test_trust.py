"""A stranger's checkpoint runs no code, whichever command opens it. See tests/configs/attacks.py."""

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs.errors import ConfigError
from configs.trust import trust_named
from scripts import generate, lm_harness
from scripts.evaluate import evaluate
from scripts.reporting.write import write_report
from tests.commands import compose, run_forked
from tests.configs.attacks import ATTACKS, MODULE, PATTERN, Traps, trusting_itself
from tests.scripts.runs import SMALL, make_run, write_books
from tests.scripts.test_console import resolved
from train import train

ISSUES = (
    *("data: torch.load", "data.source: os.system", "data.source: torch.load", "data.source: shutil.copyfile"),
    *("data.source: shutil.rmtree", "data.source: runpy.run_path", "data.source: a nested target"),
    *("data.source: a function of ours", "data.tokenizer: torch.load", "data.tokenizer: an import"),
    *("data.tokenizer: _args_", f"{PATTERN}: an import", f"{PATTERN}: torch.load"),
)

KINDS = ("data: torch.load", "data.source: os.system", "data.tokenizer: torch.load", f"{PATTERN}: torch.load")
"""An attack on each place of a config. All attacks meet the same check, which `evaluate` shows."""


@pytest.fixture
def traps(tmp_path, monkeypatch) -> Traps:
    return Traps(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    return make_run(folder / "outputs", write_books(folder / "books"), "attention.patterns.local.width=24")


def attacked(honest: Path, folder: Path, change: Callable[[dict], dict]) -> Path:
    """A copy of a run with another config, in its checkpoint and beside it. It has no tokenizer.json, so that commands
    that need a tokenizer alone turn to the config, too."""
    moved = shutil.copytree(honest, folder / "run")
    (moved / "tokenizer.json").unlink()
    checkpoint = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = change(checkpoint["hyper_parameters"])
    torch.save(checkpoint, moved / "checkpoints/last.ckpt")
    (moved / "config.yaml").write_text(yaml.safe_dump(checkpoint["hyper_parameters"]))
    return moved


def command(function: Callable[[dict], Any], name: str, *overrides: str) -> Callable[[str], Any]:
    def call(checkpoint: str) -> Any:
        return function(
            trust_named(compose(f"checkpoint={checkpoint}", "accelerator=cpu", *overrides, config_name=name))
        )

    return call


def harness(checkpoint: str) -> None:
    """What the harness does to load the model; lm-eval itself is a stand-in."""
    api = types.ModuleType("lm_eval.api")
    model, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
    model.LM, registry.MODEL_REGISTRY, registry.register_model = object, {}, lambda name: lambda each: each
    modules = {"lm_eval": types.ModuleType("lm_eval"), "lm_eval.api": api, model.__name__: model}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (modules | {registry.__name__: registry}).items():
            patch.setitem(sys.modules, name, module)
        lm_harness.register()(checkpoint, accelerator="cpu")


COMMANDS: dict[str, Callable[[str], Any]] = {
    "evaluate": command(evaluate, "evaluate"),
    "comparison": lambda checkpoint: command(evaluate, "evaluate")(f"[{checkpoint}]"),
    "recall": command(evaluate, "evaluate", "suite=recall"),
    "generate": command(generate.write, "generate"),
    "lm_harness": harness,
    "resume": lambda checkpoint: train(resolved(f"resume={checkpoint}")),
}


@pytest.mark.parametrize(
    ("name", "attack"), [(name, attack) for name in COMMANDS for attack in (ISSUES if name == "evaluate" else KINDS)]
)
def test_no_command_runs_what_a_checkpoint_names(name, attack, honest, traps, tmp_path):
    checkpoint = attacked(honest, tmp_path, lambda config: ATTACKS[attack](config, traps))
    with pytest.raises(ConfigError, match=attack.partition(":")[0]):
        COMMANDS[name](str(checkpoint))
    traps.check()


@pytest.mark.parametrize("name", COMMANDS)
def test_no_checkpoint_trusts_itself(name, honest, traps, tmp_path):
    checkpoint = attacked(honest, tmp_path, lambda config: trusting_itself(config, traps))
    with pytest.raises(ConfigError, match=f"{PATTERN}.*trust={MODULE}.MyPattern"):
        COMMANDS[name](str(checkpoint))
    traps.check()


@pytest.mark.parametrize("attack", KINDS)
def test_weights_of_a_stranger_run_nothing(attack, honest, traps, tmp_path):
    """`init_from` takes weights; the config beside them is not called."""
    checkpoint = attacked(honest, tmp_path, lambda config: ATTACKS[attack](config, traps))
    path = torch.load(honest / "checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["data"]["path"]
    corpus = ["data=files", f"data.path={path}", f"data.cache={honest.parents[1] / 'cache'}"]
    settings = compose(*SMALL, *corpus, f"init_from={checkpoint}", f"outputs={tmp_path}", "trainer.max_steps=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.training.fit.fit", _no_training)
        with pytest.raises(_NoTraining):
            train(trust_named(settings))
    traps.check()


class _NoTraining(Exception):
    pass


def _no_training(*_: object, **__: object) -> None:
    raise _NoTraining


def test_a_report_draws_no_strangers_pattern(honest, traps, tmp_path, caplog):
    folder = attacked(honest, tmp_path, lambda config: trusting_itself(config, traps))
    write_report([folder], tmp_path / "report", wandb=False)
    traps.check()
    assert f"trust={MODULE}.MyPattern" in caplog.text


def test_a_run_with_a_pattern_of_the_users_own_opens_once_it_is_trusted(honest, traps, tmp_path):
    change = ATTACKS[f"{PATTERN}: an import"]
    checkpoint = attacked(honest, tmp_path, lambda config: change(config, traps))
    settings = ["new_tokens=2", f"trust={MODULE}.MyPattern"]
    (text,) = command(generate.write, "generate", *settings)(str(checkpoint))
    assert isinstance(text, str) and traps.ran.is_dir()


def test_the_refusal_and_the_trust_on_a_command_line(honest, traps, tmp_path):
    change = ATTACKS[f"{PATTERN}: an import"]
    checkpoint = attacked(honest, tmp_path, lambda config: change(config, traps))
    arguments = ("scripts/generate.py", f"checkpoint={checkpoint}", "accelerator=cpu", "new_tokens=2")
    refused = run_forked(*arguments, check=False, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert f"trust={MODULE}.MyPattern" in refused.stderr and not traps.ran.exists()
    run_forked(*arguments, f"trust={MODULE}.MyPattern", PYTHONPATH=str(tmp_path))
    assert traps.ran.is_dir()
