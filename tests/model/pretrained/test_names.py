"""Names of parameters are translated both ways, one to one."""

import pytest

from kernels.patterns import Hierarchical
from model import Transformer
from model.pretrained.names import from_hugging_face, to_hugging_face
from tests.model.small import config, plan


def names_of(model: Transformer) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_every_parameter_of_a_masked_model_has_a_name_of_its_own_and_comes_back():
    own = names_of(Transformer(config(tie_embeddings=False, layers=11), plan()))
    theirs = [to_hugging_face(name) for name in own]
    assert "model.layers.10.self_attn.q_norm.weight" in theirs and "lm_head.weight" in theirs
    assert len(set(theirs)) == len(own) == 3 + 11 * 11
    assert [from_hugging_face(name) for name in theirs] == own


def test_biases_of_queries_keys_and_values_have_names():
    own = names_of(Transformer(config(qkv_bias=True), plan()))
    theirs = [to_hugging_face(name) for name in own]
    assert "model.layers.0.self_attn.q_proj.bias" in theirs and [from_hugging_face(name) for name in theirs] == own


def test_parameters_that_only_we_have_are_not_translated():
    pattern = Hierarchical(window=8, spans=(4, 16), reaches=(32,), pooling="learned")
    model = Transformer(config(sink_logits=True), plan(pattern))
    without = [name for name in names_of(model) if to_hugging_face(name) is None]
    assert without and all("sink_logits" in name or ".self_attn.attend." in name for name in without)
    assert any("sink_logits" in name for name in without) and any(".attend." in name for name in without)


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "model.lm_head.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.model.norm.weight",
    ],
)
def test_names_that_our_model_does_not_have_are_not_translated(name):
    assert from_hugging_face(name) is None
