"""Weights are read from one file or several, each parameter once; a folder that cannot be read is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.patterns import Hierarchical
from model import ModelConfig, Transformer
from model.pretrained.errors import PretrainedError
from model.pretrained.names import to_hugging_face
from model.pretrained.weights import Weights
from tests.model.small import config, plan

OWN = config(tie_embeddings=False)
NAMES = [name for name, _ in Transformer(OWN, plan()).named_parameters()]


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the model OWN, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    own = dict(Transformer(OWN, plan()).named_parameters())
    return {to_hugging_face(name): torch.randn(own[name].shape, generator=generator) for name in NAMES}


def shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes two files and their index."""
    names = sorted(tensors)
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def loaded(folder: Path, changed: ModelConfig = OWN, **arguments: Any) -> Transformer:
    model = Transformer(changed, plan(**arguments))
    Weights(folder).load(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_parameter_is_read_bit_for_bit(tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in values().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = {to_hugging_face(name): value for name, value in loaded(tmp_path).named_parameters()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].to(dtype), tensors[name]) for name in tensors)
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)


def test_shards_are_read_as_one_file_is(tmp_path):
    shards(tmp_path, values())
    found = {to_hugging_face(name): value for name, value in loaded(tmp_path).named_parameters()}
    assert all(torch.equal(found[name], value) for name, value in values().items())


def test_a_tied_head_may_be_stored_as_well_if_it_is_equal(tmp_path):
    tensors = values()
    tied = config(tie_embeddings=True)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedError, match=r"lm_head\.weight: must equal the embedding"):
        loaded(tmp_path, tied)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert torch.equal(loaded(tmp_path, tied).lm_head.weight, embedding)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(loaded(tmp_path, tied).lm_head.weight, embedding)


def test_parameters_of_a_pattern_keep_their_initial_values_and_the_log_names_them(tmp_path, caplog):
    save_file(values(), tmp_path / "model.safetensors")
    caplog.set_level("INFO")
    pattern = Hierarchical(window=8, spans=(4, 16), reaches=(32,), pooling="learned")
    model = loaded(tmp_path, patterns=pattern)
    own = [name for name, _ in model.named_parameters() if ".self_attn.attend." in name]
    assert own and all(any(name in message for message in caplog.messages) for name in own)
    assert torch.equal(model.embed_tokens.weight, values()["model.embed_tokens.weight"])


def test_a_buffer_of_early_llama_checkpoints_is_left_out(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(values() | buffer, tmp_path / "model.safetensors")
    assert torch.equal(loaded(tmp_path).norm.weight, values()["model.norm.weight"])


# Folders that cannot be read


def without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


UP = "model.layers.1.mlp.up_proj.weight"
SHARD = "model-00002-of-00002.safetensors"
BROKEN = {
    "no weights": (lambda folder: None, ["model.safetensors", "model.safetensors.index.json"]),
    "a pickle": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        ["pytorch_model.bin", "must be converted", "save_pretrained"],
    ),
    "a pickle in shards": (
        lambda folder: (folder / "pytorch_model.bin.index.json").write_bytes(b"{}"),
        ["pytorch_model.bin.index.json", "must be converted"],
    ),
    "a truncated file": (
        lambda folder: (save_file(values(), folder / "model.safetensors"), truncate(folder / "model.safetensors")),
        ["model.safetensors: must be a whole safetensors file"],
    ),
    "a missing shard": (
        lambda folder: (shards(folder, values()), (folder / SHARD).unlink()),
        [SHARD, "must exist", "model.safetensors.index.json"],
    ),
    "a truncated shard": (lambda folder: (shards(folder, values()), truncate(folder / SHARD)), [SHARD, "whole"]),
    "a shard of another model": (
        lambda folder: (shards(folder, values()), save_file({"other": torch.ones(1)}, folder / SHARD)),
        [SHARD, "model.", "as model.safetensors.index.json lists it"],
    ),
    "an index that is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json: must be JSON with weight_map"],
    ),
    "a name in two shards": (
        lambda folder: (
            shards(folder, values()),
            save_file(load_file(folder / SHARD) | {name: value for name, value in values().items()}, folder / SHARD),
        ),
        [SHARD, "must be in one file", "model-00001-of-00002.safetensors"],
    ),
    "a missing parameter": (
        lambda folder: save_file(without(values(), UP), folder / "model.safetensors"),
        [f"must hold {UP}"],
    ),
    "an unknown parameter": (
        lambda folder: save_file(
            values() | {"model.layers.0.mlp.router.weight": torch.ones(1)}, folder / "model.safetensors"
        ),
        ["model.layers.0.mlp.router.weight: must be a parameter of Qwen3, Qwen2, Llama or Mistral"],
    ),
    "a bias": (
        lambda folder: save_file(
            values() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(1)}, folder / "model.safetensors"
        ),
        ["q_proj.bias: must be a parameter of the model, by its config.json"],
    ),
    "one layer too many": (
        lambda folder: save_file(
            values() | {"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, folder / "model.safetensors"
        ),
        ["model.layers.2.mlp.up_proj.weight: must be a parameter of the model, by its config.json"],
    ),
    "a shape that differs": (
        lambda folder: save_file(values() | {UP: torch.ones(16, 32)}, folder / "model.safetensors"),
        [f"{UP} has the shape [16, 32]: must be [32, 16]"],
    ),
    "integers": (
        lambda folder: save_file(values() | {UP: torch.ones(32, 16).char()}, folder / "model.safetensors"),
        [f"{UP} has the dtype I8: must be one of BF16, F16, F32"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, case):
    write, named = BROKEN[case]
    write(tmp_path)
    with torch.device("meta"):
        model = Transformer(OWN, plan())
    with pytest.raises(PretrainedError) as error:
        Weights(tmp_path).check(model)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    for words in named:
        assert words in str(error.value)
