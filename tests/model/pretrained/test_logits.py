"""Models of transformers give the same logits here: whole sequences, packed documents, and token by token."""

from typing import Any

import pytest
import torch

from model import Cache, Transformer
from tests.model.pretrained.reference import our_logits, our_model, saved, their_logits, their_model
from tests.model.small import positions_of

LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3, tied": ("qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3, windows in the last layers": (
        "qwen3",
        dict(head_dim=8, use_sliding_window=True, sliding_window=10, max_window_layers=1),
    ),
    "qwen3, layer_types": (
        "qwen3",
        dict(
            head_dim=8,
            use_sliding_window=True,
            sliding_window=10,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in the last layers, tied": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=10, max_window_layers=1, tie_word_embeddings=True),
    ),
    "llama": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama, head_dim": ("llama", dict(head_dim=12, num_key_value_heads=4)),
    "llama, linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0))),
    "llama, dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=500.0))),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3 | dict(factor=8.0, rope_theta=500.0))),
    "llama, yarn": (
        "llama",
        dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=500.0)),
    ),
    "mistral": ("mistral", dict(sliding_window=10)),
    "mistral, full": ("mistral", dict(sliding_window=None)),
    "smollm3": (
        "smollm3",
        dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9, rope_parameters=None),
    ),
    "ministral": (
        "ministral",
        dict(
            head_dim=8,
            sliding_window=7,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
}
LENGTH = 80  # beyond max_position_embeddings=64


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory) -> tuple[Any, Transformer]:
    """(the model of transformers, ours)."""
    kind, changes = CASES[request.param]
    theirs = their_model(kind, **changes)
    return theirs, our_model(saved(theirs, tmp_path_factory.mktemp(kind)), max_length=1000)


def tokens_of(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(length))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.3, "logits that hardly differ from token to token prove nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_logits_of_whole_sequences_are_those_of_transformers(models):
    theirs, ours = models
    tokens = tokens_of(LENGTH, batch=2)
    assert_close(our_logits(ours, tokens), their_logits(theirs, tokens))


def test_logits_of_packed_documents_are_those_of_each_document_alone(models):
    theirs, ours = models
    lengths = (3, 70, 7)
    document = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    tokens = tokens_of(sum(lengths))
    found = our_logits(ours, tokens, document, positions_of(document))
    alone = [their_logits(theirs, each) for each in tokens.split(lengths, 1)]
    assert_close(found, torch.cat(alone, 1))


@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_transformers(models):
    """Those of the whole sequence; with `dynamic`, whose keys stay as they were rotated, those of its own cache."""
    theirs, ours = models
    length, prompt = 70, 62
    tokens = tokens_of(length)
    if ours.config.rope_scaling == "dynamic":
        steps = [theirs(tokens[:, :prompt], use_cache=True)]
        for token in tokens[:, prompt:].split(1, 1):
            steps.append(theirs(token, past_key_values=steps[-1].past_key_values, use_cache=True))
        expected = torch.cat([step.logits for step in steps], 1)
    else:
        expected = their_logits(theirs, tokens)
    cache = Cache(ours, 1)
    hidden = [cache.extend(chunk) for chunk in (tokens[:, :prompt], *tokens[:, prompt:].split(1, 1))]
    assert_close(ours.logits(torch.cat(hidden, 1)), expected)
