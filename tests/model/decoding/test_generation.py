"""Generation: seeds, stopping, batches, and distributions against their definitions."""

import pytest
import torch

from kernels.patterns import Window
from model import Cache, Sampling, Transformer, generate
from tests.model.small import config, lively, plan

PROMPTS = [[1, 2, 3], [4], list(range(10, 40))]


def build(**changes) -> Transformer:
    return lively(Transformer(config(**changes), plan(Window(9, 2)))).eval()


def sampling(**changes) -> Sampling:
    return Sampling(**(dict(temperature=1.0, top_k=None, top_p=1.0, seed=0) | changes))


def run(model, prompts=PROMPTS, **changes) -> list[list[int]]:
    arguments = dict(new_tokens=12, sampling=sampling(), prefill_chunk=16)
    return generate(model, prompts, **(arguments | changes))


def test_a_seed_gives_one_text():
    model = build()
    assert run(model) == run(model)
    assert run(model) != run(model, sampling=sampling(seed=1))


def test_neighbouring_seeds_share_no_sequence():
    model, prompts = build(), [[1, 2, 3]] * 4
    found = [tuple(tokens) for seed in (0, 1, 2) for tokens in run(model, prompts, sampling=sampling(seed=seed))]
    assert len(set(found)) == len(found)


def test_what_a_sequence_draws_does_not_depend_on_the_batch_or_on_the_chunk():
    model = build()
    together = run(model)
    assert run(model, prefill_chunk=7) == together
    assert run(model, PROMPTS[:1]) == together[:1]


def test_a_sequence_stops_alone():
    model = build()
    straight = run(model)
    told = [[], [], []]

    def on_token(sequence: int, token: int) -> bool:
        told[sequence].append(token)
        return sequence == 1 and len(told[1]) == 4

    cache = Cache(model, 3)
    found = run(model, on_token=on_token, cache=cache)
    assert found == told == [straight[0], straight[1][:4], straight[2]]
    assert cache.lengths == [3 + 11, 1 + 3, 30 + 11]  # the last token is not read


def test_generation_ends_where_all_have_stopped():
    model, passes = build(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert [len(found) for found in run(model, on_token=lambda *_: True, prefill_chunk=64)] == [1, 1, 1]
    assert len(passes) == 1


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_chosen():
    found = run(build(), sampling=sampling(temperature=5.0), new_tokens=40, vocabulary=10)
    assert {token for tokens in found for token in tokens} == set(range(10))


def test_generation_leaves_the_model_as_it_was():
    model = build().train()
    run(model)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_nucleus_and_top_k_are_their_definitions():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 2
    found = sampling(temperature=0.7, top_k=12, top_p=0.8).distribution(logits)
    for row, got in zip(logits, found, strict=True):
        weights = [float(x) for x in (row / 0.7).exp()]
        order = sorted(range(30), key=lambda i: -weights[i])[:12]
        total, kept, mass = sum(weights[i] for i in order), [], 0.0
        for token in order:
            if mass >= 0.8:
                break
            kept.append(token)
            mass += weights[token] / total
        share = sum(weights[i] for i in kept)
        expected = torch.tensor([weights[i] / share if i in kept else 0.0 for i in range(30)])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sampling(top_k=99).distribution(logits), logits.softmax(-1), rtol=1e-5, atol=1e-7)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -30.0]])
    drawing, generators = sampling(), sampling().generators(1)
    drawn = torch.cat([drawing.pick(logits, generators) for _ in range(4000)])
    share = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.03)


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 5.0, 5.0], [9.0, 1.0, 2.0]])
    assert sampling(temperature=0).pick(logits, []).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=-1), "temperature=-1: must be 0"),
        (dict(top_k=0), "top_k=0: must be an integer >= 1"),
        (dict(top_p=0), "top_p=0: must be above 0"),
        (dict(seed=-1), "seed=-1: must be an integer >= 0"),
    ],
)
def test_impossible_sampling_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sampling(**changes)


def test_impossible_generation_is_refused():
    model = build(max_length=40)
    with pytest.raises(ValueError, match="new_tokens=12: prompt and continuation would be 41 tokens, and the model"):
        run(model)
    assert len(run(model, new_tokens=11)[2]) == 11
    with pytest.raises(ValueError, match="an empty prompt"):
        run(model, [[1], []])
    with pytest.raises(ValueError, match="prefill_chunk=0"):
        run(model, prefill_chunk=0)
