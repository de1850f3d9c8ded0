"""Exported models, read back through transformers: the same logits, the same weights, and refusals of what it lacks."""

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kernels.patterns import Dense, Hierarchical, NativeSparse, Routed, Strided
from model import Transformer
from model.pretrained.config_file import read_architecture
from model.pretrained.errors import ExportError
from model.pretrained.export import (
    SHARD_BYTES,
    hugging_face_config,
    hugging_face_rope,
    layer_windows,
)
from model.pretrained.weights import Weights
from model.rope import RotaryEmbedding
from model.training.storage import StorageError
from tests.model.pretrained.exports import (
    BOS,
    HYBRID,
    LENGTH,
    PLANS,
    VOCABULARY,
    WIDTH,
    build,
    close,
    exported,
    our_logits,
    their_logits,
    tokens_of,
)
from tests.model.small import config, plan

transformers = pytest.importorskip("transformers")


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_computes_our_logits(tmp_path, name, attention):
    model = build(PLANS[name])
    close(
        their_logits(exported(tmp_path, model), tokens_of(), attn_implementation=attention),
        our_logits(model, tokens_of()),
    )


@pytest.mark.parametrize("name", ["window", "window_dense"])
@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_a_window_off_by_one_would_give_other_logits(tmp_path, name, width):
    model = build(PLANS[name])
    folder = exported(tmp_path, model)
    rewrite(folder, sliding_window=width)
    difference = (their_logits(folder, tokens_of()) - our_logits(model, tokens_of())).abs().amax((0, 2))
    same = min(width, WIDTH)  # the first queries see all earlier tokens under both widths
    assert difference[:same].max() < 1e-5 and difference[same:].min() > 1e-3


def test_full_and_window_layers_are_not_exchanged(tmp_path):
    model = build(HYBRID)
    folder = exported(tmp_path, model)
    written = json.loads((folder / "config.json").read_text())["layer_types"]
    assert written == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_cached_decoding_through_transformers_gives_our_logits(tmp_path, name):
    model, tokens = build(PLANS[name]), tokens_of()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path, model)).eval()
    cache = transformers.DynamicCache(config=theirs.config)
    start = LENGTH - 8
    parts = [tokens[:, :start], *tokens[:, start:].split(1, 1)]
    logits = [theirs(part, past_key_values=cache, use_cache=True).logits for part in parts]
    close(torch.cat(logits, 1), our_logits(model, tokens))


SCALINGS: dict[str, dict[str, Any]] = {
    "base": {"rope_theta": 5e5},
    "linear": {},
    "ntk": {},
    "dynamic": {},
    "llama3": {"rope_beta_fast": 4.0},
    "yarn": {"rope_attention_factor": 1.2},
    "yarn_hf": {"rope_truncate": False, "rope_beta_fast": 16.0},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_is_ours_beyond_the_original_length(tmp_path, name):
    scaling = {} if name == "base" else {"rope_scaling": name, "rope_factor": 4.0, "rope_original_length": 32}
    model = build(PLANS["dense"], head_dim=16, **scaling | SCALINGS[name])
    folder = exported(tmp_path, model)
    close(their_logits(folder, tokens_of()), our_logits(model, tokens_of()))
    rewrite(folder, rope_theta=10000.0, rope_scaling=None, rope_parameters=None)
    assert (their_logits(folder, tokens_of()) - our_logits(model, tokens_of())).abs().max() > 1e-3


WITHOUT_NORMS = [("dense", "Llama"), ("window", "Mistral"), ("window_dense", "Ministral")]


@pytest.mark.parametrize(("name", "family"), WITHOUT_NORMS)
def test_a_model_without_norms_of_queries_and_keys_has_another_class(tmp_path, name, family):
    model = build(PLANS[name], qk_norm=False)
    folder = exported(tmp_path, model)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [f"{family}ForCausalLM"]
    close(their_logits(folder, tokens_of()), our_logits(model, tokens_of()))


@pytest.mark.parametrize("name", PLANS)
def test_a_model_with_biases_of_queries_keys_and_values_is_qwen2(tmp_path, name):
    model = build(PLANS[name], qk_norm=False, qkv_bias=True)
    for layer in model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)
    folder = exported(tmp_path, model)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    close(their_logits(folder, tokens_of()), our_logits(model, tokens_of()))


@pytest.mark.parametrize("unrotated", ["full", "local"])
def test_layers_without_rotary_embeddings_are_those_of_smollm3(tmp_path, unrotated):
    model = build(dataclasses.replace(HYBRID, rope={unrotated: "none"}), qk_norm=False)
    folder = exported(tmp_path, model)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["SmolLM3ForCausalLM"]
    close(their_logits(folder, tokens_of()), our_logits(model, tokens_of()))
    again = read_architecture(folder)
    assert again.unrotated == {layer for layer in range(3) if HYBRID.entry(layer) == unrotated}
    assert list(again.windows) == layer_windows(model.config, model.plan)
    assert again.settings["tie_embeddings"] and not again.settings["qk_norm"]
    rewrite(folder, no_rope_layers=[1, 1, 1])
    assert (their_logits(folder, tokens_of()) - our_logits(model, tokens_of())).abs().max() > 1e-3


def test_yarn_of_transformers_is_another_one():
    """So its name in config.json would be wrong."""
    ours = RotaryEmbedding(config(rope_scaling="yarn", rope_factor=4.0, head_dim=64, rope_original_length=4096))
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
    theirs = transformers.Qwen3Config(head_dim=64, max_position_embeddings=16384, rope_parameters=rope)
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert (frequencies / ours.frequencies - 1).abs().max() > 0.1
    written = hugging_face_rope(ours.config)
    frequencies, magnitude = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"](
        transformers.Qwen3Config(head_dim=64, max_position_embeddings=16384, rope_parameters=written), "cpu"
    )
    torch.testing.assert_close(frequencies.double(), ours.frequencies, atol=0, rtol=1e-6)
    assert magnitude == pytest.approx(ours.magnitude)


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_every_weight_once_bit_for_bit(tmp_path, tied):
    model = build(PLANS["dense"], tie_embeddings=tied)
    with safe_open(exported(tmp_path, model) / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parameters = dict(model.named_parameters())  # a tied matrix once
    assert ("lm_head.weight" in stored) is not tied
    assert len(stored) == len(parameters)
    for name, value in parameters.items():
        assert torch.equal(stored[name if name == "lm_head.weight" else f"model.{name}"], value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"qk_norm": False}, {"qk_norm": False, "qkv_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 8000])
def test_the_folder_read_back_is_the_same_model_bit_for_bit(tmp_path, name, changes, shard_bytes):
    model = build(PLANS[name], **changes)
    folder = exported(tmp_path, model, shard_bytes=shard_bytes)
    architecture = read_architecture(folder)
    assert list(architecture.windows) == layer_windows(model.config, model.plan)
    again = Transformer(dataclasses.replace(model.config, **architecture.settings), model.plan)
    Weights(folder).load(again)
    weights = again.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in SCALINGS if name not in ("ntk", "yarn")])
def test_rope_read_back_has_the_same_settings(tmp_path, name):
    scaling = {} if name == "base" else {"rope_scaling": name, "rope_factor": 8.0, "rope_original_length": 32}
    sizes = config(head_dim=16, **scaling | SCALINGS[name])  # max_length is 8 times the original length
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(sizes, PLANS["dense"], BOS, torch.float32)))
    settings = read_architecture(tmp_path).settings
    if name in ("base", "linear"):  # they do not depend on the original length
        del settings["rope_original_length"]
    assert settings == {key: getattr(sizes, key) for key in settings}


def test_bfloat16_rounds_the_weights(tmp_path):
    model = build(PLANS["dense"])
    folder = exported(tmp_path, model, torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.embed_tokens.weight, model.embed_tokens.weight.bfloat16())


def test_a_large_model_is_several_files_and_an_index(tmp_path):
    model = build(PLANS["dense"])
    folder = exported(tmp_path, model, shard_bytes=8000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 1 and all((folder / file).stat().st_size < 12000 for file in files)
    assert set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(files)
    close(their_logits(folder, tokens_of()), our_logits(model, tokens_of()))


def test_rows_that_are_no_tokens_are_never_generated(tmp_path):
    model = build(PLANS["window"], tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 50 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path, model))
    tokens = tokens_of(5)
    assert (our_logits(model, tokens)[:, -1].argmax(-1) >= VOCABULARY).any()
    generated = loaded.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20)
    assert generated.max() < VOCABULARY and generated.shape[1] > 5
    assert loaded.generation_config.bos_token_id == loaded.generation_config.eos_token_id == BOS


def test_a_window_as_long_as_the_model_is_full_attention():
    sizes = config(layers=2, max_length=WIDTH)
    assert layer_windows(sizes, PLANS["window"]) == [None, None]
    assert hugging_face_config(sizes, PLANS["window"], BOS, torch.float32)["use_sliding_window"] is False


ROUTER: dict[str, Any] = dict(
    window=16, block=16, top_k=2, router="mean_key", share="group", first_block=False, indexer_dim=8
)
OTHERS = {
    "hierarchy": Hierarchical(window=32, spans=(4,), reaches=(), pooling="mean"),
    "routed": Routed(**ROUTER),
    "native_sparse": NativeSparse(**ROUTER, summary_span=8, pooling="mean", combine="lse"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_pattern_that_is_no_mask_is_refused_by_name(tmp_path, name):
    model = build(plan({"full": Dense(), name: OTHERS[name]}))
    with pytest.raises(ExportError) as error:
        exported(tmp_path, model)
    line = str(error.value)
    assert line.startswith(f"attention.patterns.{name}: ") and "\n" not in line
    assert "must be" in line and all(each in line for each in ("attention=dense", "window", "strided"))
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Own(Dense):
    """A class that is not of this repository's patterns."""

    def plain_window(self, keys: int) -> None:
        return None


@pytest.mark.parametrize(
    ("attention", "changes", "words"),
    [
        (plan(Dense()), {"sink_logits": True}, ("model.sink_logits=true: must be false",)),
        (plan(Strided(window=16, stride=32)), {"qk_norm": False}, ("model.qk_norm=false: must be true",)),
        (plan(Dense()), {"qkv_bias": True}, ("model.qkv_bias=true: must be false", "model.qk_norm=true")),
        (
            dataclasses.replace(HYBRID, rope={"full": "none"}),
            {"qk_norm": False, "qkv_bias": True},
            ("attention.patterns.full.rope=none: must be model", "model.qkv_bias=false"),
        ),
        (
            plan({"own": Own()}),
            {},
            (
                "attention.patterns.own._target_=",
                ".Own: must be a class of kernels.patterns",
            ),
        ),
        (
            dataclasses.replace(HYBRID, rope={"full": "none"}),
            {},
            ("attention.patterns.full.rope=none: must be model", "model.qk_norm=false"),
        ),
        (
            dataclasses.replace(HYBRID, rope={"local": 500.0}),
            {"qk_norm": False},
            ("attention.patterns.local.rope=500.0: must be model",),
        ),
        (
            plan({"far": Strided(window=16, stride=32)}, rope={"far": "none"}),
            {"qk_norm": False},
            ("attention.patterns.far.rope=none: must be model",),
        ),
    ],
)
def test_other_models_that_cannot_be_exported_are_one_line(tmp_path, attention, changes, words):
    with pytest.raises(ExportError) as error:
        exported(tmp_path, build(attention, **changes))
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path):
    model = build(PLANS["dense"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(StorageError) as error:
            exported(tmp_path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).startswith(str(tmp_path / "exported")) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
