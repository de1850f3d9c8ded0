"""From prompts to continuations: prompts are read in chunks, then each sequence is extended token by token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.decoding.cache import Cache
from model.decoding.cuda_graph import TokenStep, require_gpu
from model.decoding.sampling import Sampling
from model.inference import evaluating
from model.transformer import Transformer

OnToken = Callable[[int, int], bool]
"""Called with (sequence, token) for every new token. A result of True ends the sequence."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: Sampling,
    prefill_chunk: int,
    on_token: OnToken = lambda sequence, token: False,
    cache: Cache | None = None,
    vocabulary: int | None = None,
    cuda_graph: bool = False,
) -> list[list[int]]:
    """Returns at most `new_tokens` tokens that follow each of `prompts`, which may differ in length.

    `prefill_chunk`: number of prompt tokens that are read at once; memory depends on it, results do not. `cache`: an
    empty cache for as many sequences, which the caller can inspect afterwards. `vocabulary`: only tokens below it are
    chosen (a model's vocabulary is often rounded up beyond its tokenizer's). `cuda_graph`: replay a recorded step for
    each token (TokenStep); needs a GPU. Raises ValueError for an empty prompt, for a number below 1, and if prompt and
    continuation exceed model.max_length.
    """
    for name, value in (("new_tokens", new_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("an empty prompt: it must have a token at least, such as bos")
    longest = max(len(prompt) for prompt in prompts) + new_tokens - 1  # the last new token is not read
    if longest > model.config.max_length:
        raise ValueError(
            f"new_tokens={new_tokens}: prompt and continuation would be {longest} tokens, and the model takes "
            f"{model.config.max_length}"
        )
    with evaluating(model):
        cache = cache or Cache(model, len(prompts))
        if cuda_graph:
            require_gpu(model.embed_tokens.weight.device)
            cache.reserve(longest)
        hidden = _prefill(model, cache, prompts, prefill_chunk)
        extend = TokenStep(cache, longest, cuda_graph=True) if cuda_graph else cache.extend
        return _decode(model, extend, hidden, new_tokens, sampling, on_token, vocabulary)


def _prefill(model: Transformer, cache: Cache, prompts: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Reads the prompts. Returns the hidden states `[batch, width]` of the last token of each."""
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.as_tensor(prompt)
    last = torch.empty(len(prompts), model.config.width, dtype=model.embed_tokens.weight.dtype, device=device)
    for start in range(0, padded.shape[1], chunk):
        tokens = padded[:, start : start + chunk].to(device)
        new = (lengths - start).clamp(0, tokens.shape[1])
        hidden = cache.extend(tokens, new.tolist())
        ends = ((lengths > start) & (lengths <= start + tokens.shape[1])).nonzero()[:, 0]
        last = last.to(hidden.dtype)
        last[ends] = hidden[ends, new[ends] - 1]
    return last


def _decode(
    model: Transformer,
    extend: Callable[[Tensor, Sequence[int]], Tensor],
    hidden: Tensor,
    new_tokens: int,
    sampling: Sampling,
    on_token: OnToken,
    vocabulary: int | None,
) -> list[list[int]]:
    batch = len(hidden)
    found: list[list[int]] = [[] for _ in range(batch)]
    growing = [True] * batch
    generators = sampling.generators(batch)
    for count in range(1, new_tokens + 1):
        picked = sampling.pick(model.logits(hidden)[:, :vocabulary], generators)
        for sequence, token in enumerate(picked.tolist()):
            if growing[sequence]:
                found[sequence].append(token)
                growing[sequence] = not on_token(sequence, token)
        if count == new_tokens or not any(growing):
            return found
        hidden = extend(picked[:, None], [int(each) for each in growing])[:, -1]
    return found
