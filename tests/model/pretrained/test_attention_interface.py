"""Exported models with patterns that no class of transformers has, computed in transformers by our kernels."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, Strided, Window
from model import AttentionPlan, Transformer
from model.pretrained.plan_settings import plan_settings, read_plan
from tests.model.pretrained.exports import LENGTH, build, close, exported, our_logits, tokens_of
from tests.model.small import plan, positions_of

transformers = pytest.importorskip("transformers")

from model.pretrained import attention_interface  # noqa: E402  (it needs transformers)

MASKS: dict[str, AttentionPlan] = {
    "strided": plan(Strided(window=16, stride=32, columns=2)),
    "fixed": plan(Fixed(segment=32, summary=4)),
    "block_sparse": plan(BlockSparse(block_size=8, window_blocks=2, global_blocks=1, random_blocks=1)),
    "dilated": plan(Dilated(width=8, dilation=3)),
    "sinks": plan({"local": Window(16, sink_tokens=4), "full": Dense()}),
    "growing": plan({"near": Window(8), "far": Window(24)}),
    "per_head": plan({"local": Window(16), "strided": Strided(window=8, stride=16)}, [["local", "strided"]]),
}


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="farsight").eval()


@torch.no_grad()
def logits_of_documents(model: Transformer, tokens: Tensor, document: Tensor) -> Tensor:
    return model.logits(model(tokens, positions_of(document), model.build_layouts(document, tokens.shape[1])))


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_the_logits_are_ours(tmp_path, name):
    model, tokens = build(MASKS[name]), tokens_of()
    loaded = load(exported(tmp_path, model))
    assert isinstance(loaded, attention_interface.FarsightForCausalLM)
    close(loaded(tokens).logits, our_logits(model, tokens))


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_the_logits_of_cached_decoding_are_ours(tmp_path, name):
    model, tokens = build(MASKS[name]), tokens_of()
    loaded = load(exported(tmp_path, model))
    cache = transformers.DynamicCache(config=loaded.config)
    parts = tokens.split([40, 1, 1, 17, *[1] * (LENGTH - 59)], 1)
    logits = [loaded(part, past_key_values=cache, use_cache=True).logits for part in parts]
    close(torch.cat(logits, 1), our_logits(model, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_padding_changes_nothing(tmp_path, name, side):
    model, tokens = build(MASKS[name]), tokens_of()
    loaded, pad = load(exported(tmp_path, model)), 11
    padding = torch.full((2, pad), 7)
    parts, ones = ([padding, tokens], [padding * 0, tokens * 0 + 1])
    order = slice(None) if side == "left" else slice(None, None, -1)
    mask = torch.cat(ones[order], 1)
    mask[1] = 1  # the second sequence has none: its padding is text
    found = loaded(torch.cat(parts[order], 1), attention_mask=mask).logits[:1]
    close(found[:, pad:] if side == "left" else found[:, :-pad], our_logits(model, tokens[:1]))


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_packed_documents_do_not_see_one_another(tmp_path, name):
    model, tokens = build(MASKS[name]), tokens_of()
    document = torch.tensor([[0] * 37 + [1] * 50 + [2] * 13, [0] * 10 + [1] * 90])
    position = positions_of(document)
    found = load(exported(tmp_path, model))(tokens, position_ids=position, use_cache=False).logits
    close(found, logits_of_documents(model, tokens, document))


def test_generate_continues_padded_prompts_as_each_alone(tmp_path):
    model, tokens = build(MASKS["strided"]), tokens_of(48)
    loaded = load(exported(tmp_path, model))
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    both = loaded.generate(tokens, attention_mask=mask, **settings)
    alone = loaded.generate(tokens[:1, 9:], attention_mask=mask[:1, 9:], **settings)
    assert len(both.logits) >= len(alone.logits) > 0
    close(both.logits[0][:1], alone.logits[0])
    close(both.logits[0][:1], our_logits(model, tokens[:1, 9:])[:, -1])


def test_a_gradient_reaches_every_parameter(tmp_path):
    model, tokens = build(MASKS["strided"]), tokens_of()
    loaded = load(exported(tmp_path, model)).train()
    loaded(tokens, labels=tokens).loss.backward()
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    position = torch.arange(LENGTH).expand(tokens.shape)
    loss = model.loss(tokens, targets, position, model.build_layouts(None, LENGTH))
    (loss.total / loss.count).backward()
    for name, parameter in model.named_parameters():
        theirs = loaded.get_parameter(f"model.{name}").grad
        torch.testing.assert_close(theirs, parameter.grad, atol=1e-5, rtol=1e-4)


def test_transformers_alone_does_not_know_the_model(tmp_path):
    """So a folder that is loaded without the interface is an error, and no full attention."""
    settings = json.loads((exported(tmp_path, build(MASKS["strided"])) / "config.json").read_text())
    names = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    assert settings["model_type"] not in names and "qwen3" in names


@torch.no_grad()
def test_another_attention_function_is_refused(tmp_path):
    folder = exported(tmp_path, build(MASKS["strided"]))
    with pytest.raises(ValueError, match=r"^attn_implementation=eager: must be farsight"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    close(loaded(tokens_of()).logits, load(folder)(tokens_of()).logits)
    loaded.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"^attn_implementation=sdpa: must be farsight"):
        loaded(tokens_of())


@torch.no_grad()
def test_what_the_interface_cannot_compute_is_an_error(tmp_path):
    loaded, tokens = load(exported(tmp_path, build(MASKS["strided"]))), tokens_of()
    mask = torch.ones_like(tokens)
    mask[0, 20:30] = 0
    with pytest.raises(ValueError, match=r"^attention_mask: must have padding"):
        loaded(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="must be a DynamicCache"):
        loaded(tokens, past_key_values=transformers.StaticCache(config=loaded.config, max_cache_len=LENGTH + 20))


@pytest.mark.parametrize("name", MASKS)
def test_a_plan_read_back_is_the_same(name):
    settings = json.loads(json.dumps(plan_settings(MASKS[name])))
    assert plan_settings(read_plan(settings)) == settings
    used = [MASKS[name].pattern(layer, 2) for layer in range(4)]
    assert [read_plan(settings).pattern(layer, 2) for layer in range(4)] == used


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"class": "os.system"}, "patterns.a.class=os.system: must be a class of kernels.patterns"),
        ({"class": "Pattern"}, "patterns.a.class=Pattern: must be"),
        ({"class": "Window", "width": 8, "more": 1}, "patterns.a: must have the settings of Window"),
        ({"class": "Window", "width": 0}, "width=0: must be"),
    ],
)
def test_a_wrong_plan_is_one_line(values, words):
    with pytest.raises(ValueError, match="must") as error:
        read_plan({"patterns": {"a": values}, "schedule": ["a"], "block": 128})
    assert words in str(error.value) and "\n" not in str(error.value)
