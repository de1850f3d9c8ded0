"""Every shipped YAML: it says what it is for, how to run it, and it composes, passes the checks and builds."""

import re
import shlex

import pytest
import torch
import yaml

from configs import schema
from configs.build import build_data, build_model, build_plan
from configs.checks import check
from configs.errors import ConfigError
from configs.validation import validated
from kernels import Axis
from model.attention import build_attention_layout
from scripts.sweeping.composer import Composer
from scripts.sweeping.plan import Plan
from tests.commands import ROOT, compose

FOLLOWS = "hf"
"""The choice of `model` and `attention` that follows a config.json: see test_pretrained.py."""

FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "configs" / group).glob("*.yaml") if file.stem != "base")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_yaml_opens_with_what_it_is_for_and_a_command(file):
    text = file.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    head = re.match(r"(#.*\n)+", text).group()
    assert re.search(r"Try: python (train|scripts/\w+)\.py", head), head


def test_the_commands_at_the_heads_of_the_yamls_compose():
    for file in FILES:
        command = re.search(r"Try: python train\.py ?(.*)", file.read_text())
        if not command:
            continue
        overrides = shlex.split(command.group(1).split("  ")[0])
        if any(override.startswith("sweep=") for override in overrides):
            with Composer(overrides) as composer:
                assert Plan(composer).settings.name, file
        else:
            assert compose(*(override for override in overrides if override != "-m"))["name"], file


@pytest.mark.parametrize("attention", [each for each in options("attention") if each != FOLLOWS])
def test_every_attention_passes_the_checks_and_builds_layouts(attention):
    config = compose(f"attention={attention}")
    check(config)
    plan = build_plan(config["attention"])
    assert config["attention"]["name"] == attention
    for layer in range(config["model"]["layers"]):
        layout = build_attention_layout(plan.pattern(layer, config["model"]["kv_heads"]), Axis.tokens(300), plan.block)
        assert layout.cost(batch=1, heads=1, head_dim=1).visible_pairs > 0


@pytest.mark.parametrize("model", [each for each in options("model") if each != FOLLOWS])
def test_every_model_builds(model):
    with torch.device("meta"):
        built = build_model(compose(f"model={model}"), tokenizer_vocabulary=1000)
    assert built.config.vocabulary in (1024, 50304)


@pytest.mark.parametrize("group", ["optimizer", "logger", "evaluation"])
def test_every_choice_of_the_small_groups_passes_the_checks(group):
    assert options(group)
    for option in options(group):
        config = compose(f"{group}={option}")
        check(config)
        assert config[group]


def test_every_trainer_has_all_keys_with_values_of_their_types():
    assert len(options("trainer")) > 1
    for option in options("trainer"):
        settings = compose(f"trainer={option}")["trainer"]
        assert validated(schema.Trainer, settings, "trainer").max_steps == settings["max_steps"]


def test_every_data_group_builds(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.fa").write_text("ACGT")
    (tmp_path / "a.csv").write_text("date,value")
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    (tmp_path / "val.bin").write_bytes(b"\0\0")
    (tmp_path / "tokenizer.json").write_text('{"tokenizer": "bytes"}')
    for option in options("data"):
        path = ["data.path=" + str(tmp_path)] if option not in ("stdlib", "mixture") else []
        tokenizer = [f"data.tokenizer.path={tmp_path}"] if option == "tokens" else []
        data = build_data(compose(f"data={option}", *path, *tokenizer)["data"])
        assert data.sequence_length == 4096


NEEDED = {name: ["init_from=null"] for name in ("extend_context", "sparsify_routed")}  # by default, the name of no run


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_composes_with_other_groups_in_every_order(experiment):
    others = ["data=files", f"data.path={ROOT / 'kernels'}", "data/tokenizer=bytes", "attention=dense", "trainer=cpu"]
    needed = NEEDED.get(experiment, [])
    config = compose(f"experiment={experiment}", *others, *needed)
    check(config)
    assert config == compose(*others, f"experiment={experiment}", *needed)
    assert config["data"]["source"]["_target_"] == "data.sources.Files"
    assert config["data"]["tokenizer"] == {"_target_": "data.tokenizers.Bytes"}


def test_every_experiment_passes_the_checks():
    for experiment in options("experiment"):
        overrides = [f"experiment={experiment}", *NEEDED.get(experiment, [])]
        if experiment not in ("smoke", "recall_64k"):  # the sources of a mixture have paths of their own
            overrides.append(f"data.path={ROOT / 'kernels'}")
        if not torch.cuda.is_available():
            overrides.append("trainer.accelerator=cpu")
        if "genome" in experiment:
            overrides.append("data.source.extensions=[.py]")
        check(compose(*overrides))


def test_extending_the_context_needs_a_model():
    with pytest.raises(ConfigError, match="init_from=RUN_DIR: no checkpoint"):
        check(compose("experiment=extend_context", f"data.path={ROOT / 'kernels'}", "trainer=cpu"))
