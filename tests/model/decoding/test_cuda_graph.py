"""Steps of fixed shapes: they give the logits of one pass, and ask the device for nothing. On a CPU they are not
recorded; tests/model/decoding/test_gpu.py replays them as CUDA graphs."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels.layout.cost import decode_cost
from kernels.patterns import Routed
from model import Cache, Sampling, Transformer, generate
from model.decoding import TokenStep, expected_bytes, fill_with_random_keys
from model.kv_cache.cache_layout import CacheLayout
from tests.kernels.oracle import PATTERNS
from tests.model.decoding.test_parity import LENGTH, PLANS, build, every_plan, full_logits, random_tokens
from tests.model.small import config, lively


@torch.no_grad()
def prefilled(model: Transformer, texts: torch.Tensor, lengths: list[int]) -> Cache:
    cache = Cache(model, len(texts))
    cache.extend(texts[:, : max(lengths)], lengths)
    return cache


@every_plan
def test_tokens_one_by_one_give_the_logits_of_one_pass(name):
    """Ragged prompts of 3 to 40 tokens, then 30 steps, in which one sequence or the other waits; past the window, the
    ring's end, spans and columns. What comes behind the capacity's end is refused."""
    model, texts, lengths = build(name), random_tokens(3, LENGTH, seed=1), [5, 40, 28]
    cache = prefilled(model, texts, lengths)
    step, seen, read = TokenStep(cache, 70, cuda_graph=False), [[], [], []], list(lengths)
    for new in [[1, 1, 1], [1, 0, 1], [1, 1, 1]] * 10:
        tokens = torch.stack([texts[i, read[i] : read[i] + 1] for i in range(3)])
        with torch.no_grad():
            logits = model.logits(step(tokens, new))
        for i, count in enumerate(new):
            seen[i].append(logits[i, :count])
            read[i] += count
    assert cache.lengths == read == [35, 60, 58]
    for i in range(3):
        alone = full_logits(model, texts[i : i + 1, : read[i]])[0, lengths[i] :]
        assert (torch.cat(seen[i]) - alone).abs().max() <= 1e-12
    for _ in range(10):
        step(tokens)
    with pytest.raises(ValueError, match="a sequence of 71 tokens: the step has room for capacity=70"):
        step(tokens)


@pytest.mark.parametrize("name", ["strided", "blocks_below_the_tile", "hierarchical", "mixed_by_head_and_depth"])
def test_chunks_before_between_and_behind_change_nothing(name):
    """Cache.extend and TokenStep in turns, on one cache; a step without new tokens leaves it as it is."""
    model, tokens = build(name), random_tokens(2, LENGTH)
    cache, found, place = prefilled(model, tokens, [9, 9]), [], 9
    step = TokenStep(cache, LENGTH, cuda_graph=False)
    with torch.no_grad():
        for size in [1, 1, 20, 1, 3, 1, 1, 17, *[1] * 24]:
            part = tokens[:, place : place + size]
            if size == 1:
                step(63 - part, [0, 0])
            found.append(model.logits(step(part) if size == 1 else cache.extend(part)))
            place += size
    assert (torch.cat(found, 1) - full_logits(model, tokens)[:, 9:]).abs().max() <= 1e-12


@every_plan
def test_a_step_asks_the_device_for_nothing_and_its_shapes_do_not_change(name):
    """Fake tensors have no values: whoever asks for one fails. Chunks of Cache.extend ask."""
    model, texts = build(name), random_tokens(2, LENGTH)
    cache = prefilled(model, texts, [40, 33])
    step = TokenStep(cache, LENGTH, cuda_graph=False)
    step(texts[:, :1])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = mode.from_tensor(texts[:, :1])
        for name in ("_lengths", "_new"):
            setattr(step, name, mode.from_tensor(getattr(step, name)))
        assert step(tokens).shape == (2, 1, model.config.width)


@pytest.mark.parametrize("name", ["strided", "blocks_below_the_tile", "hierarchical"])
def test_what_a_recording_would_read_and_write_stays_in_its_place(name):
    """A graph knows addresses: every tensor that outlives a step keeps its own."""
    model, texts = build(name), random_tokens(2, LENGTH)
    cache = prefilled(model, texts, [40, 33])
    step, places = TokenStep(cache, LENGTH, cuda_graph=False), set()
    for index in range(25):
        step(texts[:, index : index + 1], [1, index % 2])
        kept = [step._lengths, step._new, step._tokens]
        kept += [store.layout.count for layer in cache._layers for store in layer.stores]
        kept += [tensor for layer in cache._layers for tensor in layer.tensors()]
        places.add(tuple(tensor.data_ptr() for tensor in kept))
    assert len(places) == 1 and len(next(iter(places))) > 8


def test_reading_less_than_all_asks_the_device_without_a_fixed_step():
    """What the proof above can see: the same proof fails for a read whose size follows from values."""
    layout = CacheLayout(PATTERNS["blocks_below_the_tile"], 1, torch.device("cpu"))
    layout.write(60, [0], [60])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(DataDependentOutputException):
        layout.read(mode.from_tensor(torch.tensor([[60]])))


@pytest.mark.parametrize("context", [1, 170])
@every_plan
def test_bytes_stored_and_read_are_those_of_any_step(name, context):
    """A fixed step reads what is seen, and the room for what is to come is not counted as stored."""
    model = lively(Transformer(config(layers=3, max_length=4096), PLANS[name])).eval()
    tokens = random_tokens(2, context + 1)
    cache = prefilled(model, tokens[:, :-1], [context] * 2)
    step = TokenStep(cache, 300, cuda_graph=False)
    stored, read = expected_bytes(model, context, 2)
    assert cache.bytes_stored == stored <= cache.bytes_allocated
    step(tokens[:, -1:])
    # A router's scores are one product of a fixed size, with the keys of all blocks that there is room for.
    idle = 0
    for layer, pattern in zip(cache._layers, model.patterns, strict=True):
        if isinstance(pattern, Routed):
            room = max(0, 300 - pattern.window) // pattern.block
            idle += (room - decode_cost(pattern, context).router_read) * layer.router_keys.bytes_a_slot
    assert cache.bytes_read == read + idle
    assert cache.bytes_stored == expected_bytes(model, context + 1, 2)[0]


def test_a_graph_needs_a_gpu():
    model = build("window")
    if not torch.cuda.is_available():
        greedy = Sampling(temperature=0, top_k=None, top_p=1, seed=0)
        with pytest.raises(ValueError, match="cuda_graph=true: the model is on cpu, and must be on cuda"):
            generate(model, [[1, 2]], new_tokens=2, sampling=greedy, prefill_chunk=4, cuda_graph=True)


def test_benchmark_filled_with_random_keys_stores_what_the_patterns_need():
    model = build("hierarchical")
    cache, token = Cache(model, 2), random_tokens(2, 1)
    cache.reserve(200)
    cache.extend(token)
    fill_with_random_keys(cache, 150)
    assert TokenStep(cache, 200, cuda_graph=False)(token).isfinite().all()
    assert cache.lengths == [151, 151] and cache.bytes_stored == expected_bytes(model, 151, 2)[0]
