"""Every scaling of rotary embeddings that transformers has for Llama, Mistral and Qwen3 gives its angles."""

import math

import pytest
import torch

from model.rope import RotaryEmbedding, document_lengths
from tests.model.small import config

transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
CASES = {
    "none": (dict(rope_type="default"), {}),
    "linear": (dict(rope_type="linear", factor=2.5), dict(rope_factor=2.5)),
    "dynamic": (dict(rope_type="dynamic", factor=3.0), dict(rope_factor=3.0)),
    "llama3": (
        LLAMA3 | dict(low_freq_factor=1.0, high_freq_factor=4.0),
        dict(rope_factor=8.0, rope_beta_fast=4.0, rope_beta_slow=1.0),
    ),
    "yarn": (YARN, dict(rope_factor=4.0)),
    "yarn, not truncated, other ends": (
        YARN | dict(truncate=False, beta_fast=16.0, beta_slow=2.0),
        dict(rope_factor=4.0, rope_truncate=False, rope_beta_fast=16.0, rope_beta_slow=2.0),
    ),
    "yarn, attention factor": (
        YARN | dict(attention_factor=0.7),
        dict(rope_factor=4.0, rope_attention_factor=0.7),
    ),
    "yarn, ends beyond the first dimension": (
        YARN | dict(original_max_position_embeddings=4),
        dict(rope_factor=4.0, rope_original_length=4),
    ),
}
"""Name -> (transformers' rope_parameters, our settings)."""


def angles_of_transformers(parameters: dict, position: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, ...]:
    theirs = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=64,
        rope_parameters=parameters | {"rope_theta": 500.0},
    )
    return LlamaRotaryEmbedding(theirs)(torch.zeros(1), position)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [16, 64, 65, 200])
def test_angles_are_those_of_transformers(name, length):
    parameters, changes = CASES[name]
    scaling = {"yarn": "yarn_hf"}.get(name.partition(",")[0], name)
    own = RotaryEmbedding(config(head_dim=32, rope_theta=500.0, rope_scaling=scaling, **changes))
    position = torch.arange(length)[None]
    expected = angles_of_transformers(parameters, position, head_dim=32)
    for found, wanted in zip(own(position), expected, strict=True):
        torch.testing.assert_close(found[:, :, 0], wanted[..., :16], rtol=0, atol=5e-5)  # theirs are in float32


def test_the_papers_yarn_is_another_one():
    ramp = dict(rope_factor=4.0, rope_original_length=1024, head_dim=64)
    paper, theirs = (RotaryEmbedding(config(rope_scaling=name, **ramp)).frequencies for name in ("yarn", "yarn_hf"))
    assert (paper / theirs - 1).abs().max() > 0.1
    torch.testing.assert_close(paper[[0, -1]], theirs[[0, -1]])


def test_documents_in_a_row_are_scaled_by_their_own_lengths():
    dynamic = RotaryEmbedding(config(rope_scaling="dynamic", rope_factor=2.0, rope_original_length=16))
    lengths = (40, 9, 23)
    packed = dynamic(torch.cat([torch.arange(length) for length in lengths])[None])
    alone = [dynamic(torch.arange(length)[None]) for length in lengths]
    for found, *expected in zip(packed, *alone, strict=True):
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=0, atol=1e-6)
    plain = RotaryEmbedding(config())
    torch.testing.assert_close(alone[1], plain(torch.arange(9)[None]), rtol=0, atol=1e-6)
    assert (alone[2][0] - plain(torch.arange(23)[None])[0]).abs().max() > 0.05


def test_the_length_of_a_document_is_one_more_than_its_last_position():
    position = torch.tensor([[5, 6, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    assert document_lengths(position).tolist() == [[7, 7, 3, 3, 3, 1], [6] * 6]


def test_an_attention_factor_belongs_to_yarn_alone():
    assert RotaryEmbedding(config(rope_scaling="yarn", rope_factor=2.0)).magnitude == 0.1 * math.log(2.0) + 1
    with pytest.raises(ValueError, match=r"rope_attention_factor=0\.5: must be null with rope_scaling=linear"):
        config(rope_scaling="linear", rope_attention_factor=0.5)
    with pytest.raises(ValueError, match=r"rope_beta_fast=1\.0: must be above rope_beta_slow=2\.0"):
        config(rope_beta_fast=1.0, rope_beta_slow=2.0)
