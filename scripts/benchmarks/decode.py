"""Time to read a prompt, and to grow it token by token, by pattern and context; and what the cache holds and reads.

Each row is a cache of its own, filled by chunks; a few tokens are decoded first that don't count. `stored` and `read`
are what the model's patterns ask for (kernels/cost.py); `read_measured` is what the last token really read.
"""

import argparse
import statistics
import time
from pathlib import Path

WARM_UP = 3
"""Tokens that are decoded before the clock starts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention", nargs="+", default=["dense", "window"], help="choices of configs/attention")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192], help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1, help="sequences that grow at once")
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--tokens", type=int, default=32, help="measured tokens; the median counts")
    parser.add_argument("--prefill-chunk", type=int, default=4096, help="tokens of a prompt that are read at once")
    parser.add_argument("--bfloat16", action="store_true", help="weights and cache in bfloat16 instead of float32")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/decode.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    rows = [measure(name, context, arguments) for name in arguments.attention for context in arguments.contexts]
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def measure(attention: str, context: int, arguments: argparse.Namespace) -> dict[str, object]:
    """One row: a model with random weights, a random prompt of `context` tokens."""
    import torch

    from model import Cache
    from model.decoding import expected_bytes
    from model.inference import evaluating
    from scripts.benchmarks.models import untrained

    model, _ = untrained(attention, arguments.model)
    model = model.to(torch.bfloat16) if arguments.bfloat16 else model
    device, batch = model.embed_tokens.weight.device, arguments.batch
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocabulary, (batch, context), generator=generator).to(device)
    cache, seconds = Cache(model, batch), []
    with evaluating(model):
        started = _now(device)
        for chunk in prompt.split(arguments.prefill_chunk, 1):
            hidden = cache.extend(chunk)
        prefill = _now(device) - started
        for _ in range(WARM_UP + arguments.tokens):
            started = _now(device)
            token = model.logits(hidden[:, -1]).argmax(-1, keepdim=True)
            hidden = cache.extend(token)
            seconds.append(_now(device) - started)
    median = statistics.median(seconds[WARM_UP:])
    last = max(cache.lengths) - 1
    (stored, _), (_, read) = expected_bytes(model, last + 1, batch), expected_bytes(model, last, batch)
    assert stored == cache.bytes_stored, "the cache holds what its patterns ask for"
    return {
        "attention": attention,
        "context": context,
        "batch": batch,
        "prefill_ms": round(1e3 * prefill, 1),
        "ms_per_token": round(1e3 * median, 3),
        "tokens_per_second": round(batch / median),
        "cache_gib": round(stored / 2**30, 6),
        "allocated_gib": round(cache.bytes_allocated / 2**30, 6),
        "read_gib_per_token": round(read / 2**30, 6),
        "read_measured_gib": round(cache.bytes_read / 2**30, 6),
    }


def _now(device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
