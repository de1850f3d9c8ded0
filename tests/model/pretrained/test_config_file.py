"""config.json gives the sizes of a model and the windows of its layers; what our model cannot compute is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.pretrained.config_file import read_architecture
from model.pretrained.errors import PretrainedError
from tests.model.small import SIZES

SMALL = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)


def architecture(folder: Path, **changes: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    return read_architecture(folder)


def test_missing_keys_have_the_defaults_of_transformers(tmp_path):
    found = architecture(tmp_path)
    assert found.windows == (None,) * 3
    fields = found.settings
    assert {name: fields[name] for name in ("kv_heads", "head_dim", "max_length", "rope_theta", "norm_epsilon")} == {
        "kv_heads": 4,
        "head_dim": 8,
        "max_length": 2048,
        "rope_theta": 10000.0,
        "norm_epsilon": 1e-6,
    }
    assert not fields["qk_norm"] and not fields["tie_embeddings"] and fields["rope_original_length"] == 2048
    assert fields.keys() == SIZES.keys() - {"sink_logits", "activation_checkpointing", "z_loss"}
    mistral = architecture(tmp_path, model_type="mistral", architectures=None)
    assert mistral.windows == (4096,) * 3 and mistral.settings["kv_heads"] == 8
    smol = architecture(tmp_path, model_type="smollm3", architectures=None, num_hidden_layers=5)
    assert smol.unrotated == {3} and smol.windows == (None,) * 5 and not found.unrotated
    assert (smol.settings["rope_theta"], smol.settings["tie_embeddings"], smol.settings["kv_heads"]) == (2e6, True, 4)
    qwen = architecture(tmp_path, model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_key_value_heads=2)
    assert qwen.settings["head_dim"] == 128 and qwen.settings["qk_norm"] and qwen.windows == (None,) * 3
    assert not qwen.settings["qkv_bias"] and not smol.settings["qkv_bias"]
    qwen2 = architecture(tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"], num_key_value_heads=2)
    assert qwen2.settings["head_dim"] == 8 and qwen2.settings["qkv_bias"] and not qwen2.settings["qk_norm"]
    assert qwen2.windows == (None,) * 3


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (dict(use_sliding_window=True, sliding_window=10, max_window_layers=1), (None, 10, 10)),
        (dict(use_sliding_window=True, sliding_window=10), (None,) * 3),
        (dict(use_sliding_window=True, sliding_window=10, max_window_layers=0), (10,) * 3),
        (dict(use_sliding_window=False, sliding_window=10, max_window_layers=0), (None,) * 3),
        (dict(use_sliding_window=True, sliding_window=None, max_window_layers=0), (None,) * 3),
        (
            dict(
                use_sliding_window=True,
                sliding_window=10,
                max_window_layers=0,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
            ),
            (None, 10, None),
        ),
    ],
    ids=str,
)
def test_qwen3_has_windows_in_its_last_layers_or_by_layer_types(tmp_path, changes, windows):
    qwen = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_key_value_heads=2)
    assert architecture(tmp_path, **qwen | changes).windows == windows


OLD = dict(
    rope_theta=1e6, rope_scaling=dict(type="yarn", factor=4.0, beta_fast=16, original_max_position_embeddings=512)
)
NEW = dict(
    rope_parameters=dict(
        rope_type="yarn", factor=4.0, beta_fast=16, original_max_position_embeddings=512, rope_theta=1e6
    )
)
BY_LAYER = dict(layer_types=["full_attention"] * 3, rope_parameters=dict(full_attention=NEW["rope_parameters"]))


@pytest.mark.parametrize("keys", [OLD, NEW, BY_LAYER], ids=["transformers 4", "transformers 5", "by type of layer"])
def test_rotary_embeddings_are_read_as_every_version_writes_them(tmp_path, keys):
    found = architecture(tmp_path, **keys).settings
    assert {name: value for name, value in found.items() if name.startswith("rope")} == {
        "rope_theta": 1e6,
        "rope_scaling": "yarn_hf",
        "rope_factor": 4.0,
        "rope_original_length": 512,
        "rope_beta_fast": 16.0,
        "rope_beta_slow": 1.0,
        "rope_attention_factor": None,
        "rope_truncate": True,
    }


def yarn(**changes: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type="yarn", factor=4.0) | changes)


REFUSED = [
    (dict(model_type="gemma3_text"), ['model_type="gemma3_text"', "one of qwen3, qwen2, llama, mistral"]),
    (dict(model_type="qwen2_moe"), ['model_type="qwen2_moe"', "qwen3", "qwen2"]),
    (dict(model_type=None), ["model_type=null", "qwen3"]),
    (dict(model_type=["llama"]), ['model_type=["llama"]', "qwen3"]),
    (dict(architectures=7), ["architectures=7", "ForCausalLM"]),
    (dict(layer_types=7), ["layer_types=7", "full_attention"]),
    (dict(layer_types=[{}, {}]), ["layer_types=[{}, {}]", "full_attention"]),
    (dict(rope_parameters=dict(rope_type=["yarn"])), ['rope_parameters.rope_type=["yarn"]', "default"]),
    (dict(layer_types=["full_attention"] * 2, rope_parameters=dict(full_attention=3)), ["rope_parameters=", "layer"]),
    (dict(architectures=["LlamaForSequenceClassification"]), ["architectures=", "ForCausalLM"]),
    (dict(attention_bias=True), ["attention_bias=true", "false"]),
    (dict(mlp_bias=True), ["mlp_bias=true", "false"]),
    (dict(hidden_act="gelu"), ['hidden_act="gelu"', '"silu"']),
    (dict(hidden_size=None), ["hidden_size=null", "an integer >= 1"]),
    (dict(num_hidden_layers="3"), ['num_hidden_layers="3"', "an integer >= 1"]),
    (dict(rms_norm_eps=0), ["rms_norm_eps=0", "> 0"]),
    (dict(tie_word_embeddings="yes"), ['tie_word_embeddings="yes"', "true or false"]),
    (dict(quantization_config=dict(quant_method="gptq")), ["quantization_config", "gptq", "bfloat16"]),
    (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5", "1"]),
    (dict(rope_scaling=dict(type="longrope")), ["rope_scaling.rope_type", "one of default, linear, dynamic"]),
    (dict(rope_scaling=dict(type="linear")), ["rope_scaling.factor=null", "> 0"]),
    (dict(rope_scaling=dict(type="linear", factor=0.5)), ["rope_scaling.factor=0.5", "at least 1"]),
    (dict(rope_scaling=4.0), ["rope_scaling=4.0", "rope_type"]),
    (dict(rope_scaling=dict(type="llama3", factor=8.0)), ["rope_scaling.high_freq_factor=null", "> 0"]),
    (yarn(original_max_position_embeddings=1.5), ["original_max_position_embeddings=1.5", "an integer >= 1"]),
    (
        dict(
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(full_attention=dict(rope_theta=1e6), sliding_attention=dict(rope_theta=1e4)),
        ),
        ["rope_parameters=", "the same for every type of layer"],
    ),
    (dict(layer_types=["full_attention"]), ["layer_types=", "a list of 3"]),
    (dict(layer_types=["chunked_attention"] * 3), ["layer_types=", "full_attention or sliding_attention"]),
    (dict(layer_types=["sliding_attention"] * 3), ["layer_types=", "without a sliding_window"]),
    (
        dict(model_type="mistral", sliding_window=10, layer_types=["full_attention"] * 3),
        ["layer_types=", "sliding_attention in every layer", "ministral"],
    ),
    (dict(model_type="smollm3", no_rope_layers=[1, 0]), ["no_rope_layers=[1, 0]", "a list of 3"]),
    (dict(model_type="smollm3", no_rope_layers=[1, 0, 2]), ["no_rope_layers=", "each 1, or 0"]),
    (dict(model_type="mistral", sliding_window=0), ["sliding_window=0", "an integer >= 1"]),
    (
        dict(model_type="qwen3", num_key_value_heads=4, use_sliding_window=True, max_window_layers=-1),
        ["max_window_layers=-1", ">= 0"],
    ),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[str(changes)[:50] for changes, _ in REFUSED])
def test_a_key_that_our_model_does_not_have_is_one_line(tmp_path, changes, named):
    with pytest.raises(PretrainedError) as error:
        architecture(tmp_path, **changes)
    assert "\n" not in str(error.value)
    for words in [*named, str(tmp_path / "config.json")]:
        assert words in str(error.value)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(PretrainedError, match=r"must hold a config\.json"):
        read_architecture(tmp_path)
    for text in ("{", "[]", '{"model_type": NULL}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PretrainedError, match=r"^\S+config\.json: must be (a )?JSON"):
            read_architecture(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PretrainedError, match=r"adapter_config\.json: must be merged into its base model"):
        read_architecture(tmp_path)


def test_the_attention_factor_of_yarn_follows_from_its_two_scales(tmp_path):
    found = architecture(tmp_path, **yarn(mscale=0.7, mscale_all_dim=0.3))
    expected = (0.07 * 1.3862943611198906 + 1) / (0.03 * 1.3862943611198906 + 1)
    assert found.settings["rope_attention_factor"] == pytest.approx(expected)
    assert architecture(tmp_path, **yarn(factor=None)).settings["rope_factor"] == 1.0
