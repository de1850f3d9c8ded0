"""Frozen parameters keep their bits and take no memory of the optimizer, and the others train as they would."""

import pytest
import torch
from stand_ins import OPTIMIZER, TinyModel, train

from configs.checks import check
from configs.errors import ConfigError
from kernels.patterns import Routed
from model import Transformer
from model.training.freezing import freeze_parameters
from tests.commands import compose
from tests.model.small import config, lively, plan

CASES = {
    "adamw": (OPTIMIZER | dict(freeze=["embed.*", "hidden.*", "!hidden.bias"]), ("embed.weight", "hidden.weight")),
    "muon": (OPTIMIZER | dict(name="muon", momentum=0.9, freeze=["norm.*", "lm_*"]), ("norm.weight", "lm_head.weight")),
}


def weights(path):
    return torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(("optimizer", "frozen"), CASES.values(), ids=CASES)
def test_frozen_parameters_keep_their_bits_and_the_others_change(tmp_path, optimizer, frozen):
    torch.manual_seed(0)
    before = TinyModel().state_dict()
    train(tmp_path, optimizer=optimizer, max_steps=4)
    for name, value in weights(tmp_path).items():
        own = name.removeprefix("model.")
        change = (value - before[own]).abs().max()
        assert torch.equal(value, before[own]) if own in frozen else change > 1e-3, name
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert len(state["state"]) == len(before) - len(frozen) == sum(len(g["params"]) for g in state["param_groups"])


def test_frozen_parameters_have_no_gradient_and_pass_gradients_on():
    model = Transformer(config(layers=3), plan())
    frozen = freeze_parameters(model, ["layers.1.*", "layers.*.mlp.*", "!layers.0.mlp.gate_proj.weight"])
    tokens = torch.arange(24)[None]
    model.loss(tokens, tokens, tokens, model.build_layouts(None, 24)).total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert sum(model.get_parameter(name).numel() for name in without) == frozen
    assert "layers.0.mlp.gate_proj.weight" not in without and "layers.0.mlp.up_proj.weight" in without
    assert {name for name in without if name.startswith("layers.1.")} and model.embed_tokens.weight.grad.abs().max() > 0


def test_a_router_trains_alone():
    """Its own loss moves it, while no other parameter has a gradient."""
    routed = Routed(8, 16, 2, "indexer", "group", False, 8)
    model = lively(Transformer(config(), plan(routed)))
    freeze_parameters(model, ["*", "!*.indexer.*"])
    tokens = torch.arange(1, 64)[None]
    out = model.loss(tokens, tokens, tokens, model.build_layouts(None, 63))
    (out.total + out.auxiliary).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if ".indexer." in name} and moved
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in moved)


def test_without_frozen_parameters_all_are_trained():
    model = Transformer(config(), plan())
    assert freeze_parameters(model, []) == 0 and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["embed_token.*"], ["'embed_token.*' matches no parameter", "layers.*.mlp.gate_proj.weight"]),
        (["embed_tokens.*", "!layers.9.*"], ["'!layers.9.*' matches no parameter"]),
        (["*"], ["no parameter is left to train"]),
        (["layers.*", "!layers.*norm.weight"], ["optimizer=muon"]),
    ],
)
def test_a_name_that_cannot_be_frozen_is_one_line(patterns, words):
    composed = compose("optimizer=muon", "trainer.accelerator=cpu")
    composed["optimizer"]["freeze"] = patterns
    with pytest.raises(ConfigError) as error:
        check(composed)
    line = str(error.value)
    assert line.startswith("optimizer.freeze=[") and "\n" not in line and all(each in line for each in words), line


def test_names_are_given_on_the_command_line_or_in_a_file():
    given = """optimizer.freeze=[embed_tokens.*,"layers.*.mlp.*","!layers.0.*"]"""
    composed = compose(given, "trainer.accelerator=cpu")
    assert composed["optimizer"]["freeze"] == ["embed_tokens.*", "layers.*.mlp.*", "!layers.0.*"]
    check(composed)
