"""Time to read a prompt and to decode a token, and bytes of the cache, by pattern, context and batch.

Each row has a cache of its own, and a few tokens are decoded before the clock starts. `stored` and `read` are the bytes
that follow from the model's patterns (kernels/layout/cost.py); `read_measured` are those that the last token read.
`floor_ms` is the time in which the GPU could read the weights and these keys and values once, at the speed of a large
copy.

With --pretend no prompt is read: caches are filled with random keys and values, after which a token costs as much. The
time to read a prompt is then measured on one sequence.

    python scripts/benchmark.py decode --model small --bfloat16 --pretend --step graph --batch 1 16 \\
        --attention dense window strided block_sparse hierarchical routed --contexts 8192 32768 131072
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model import Cache, Transformer

WARM_UP = 3
"""Tokens that are decoded before the clock starts."""

STEPS = {
    "extend": "Cache.extend",
    "fixed": "TokenStep as it is",
    "graph": "replayed as a CUDA graph",
}

SHOWN = ("attention", "context", "batch", "prefill_ms", "ms_per_token", "floor_ms")
"""Columns of a row that are printed when it is measured."""

COPIED = 1 << 30
"""Bytes of the copy by which a GPU's bandwidth is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention", nargs="+", default=["dense", "window"], help="choices of configs/attention")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192], help="tokens of the prompt")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="sequences that grow at once")
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--tokens", type=int, default=32, help="measured tokens; the median counts")
    parser.add_argument("--prefill-chunk", type=int, default=4096, help="tokens of a prompt that are read at once")
    parser.add_argument("--prefill-up-to", type=int, help="with --pretend, longer prompts are not read (default: all)")
    parser.add_argument("--bfloat16", action="store_true", help="weights and cache in bfloat16 instead of float32")
    parser.add_argument("--step", default="extend", choices=list(STEPS), help=f"{STEPS}"[1:-1])
    parser.add_argument("--pretend", action="store_true", help="random keys and values in place of a prompt")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/decode.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    rows: list[dict[str, Any]] = []
    for attention in arguments.attention:
        for row in measure(attention, arguments):
            rows.append(row)
            compare(rows, min(arguments.contexts))
            write(arguments, rows)  # after each row, so that an interrupted benchmark keeps its rows
            print(", ".join(f"{name} {row[name]}" for name in SHOWN), flush=True)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def measure(attention: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the rows of a model with random weights."""
    import torch

    from model.inference import evaluating
    from scripts.benchmarks.models import untrained

    model, _ = untrained(attention, arguments.model)
    model = model.to(torch.bfloat16) if arguments.bfloat16 else model
    bandwidth = _bandwidth(model.embed_tokens.weight.device)
    with evaluating(model), torch.no_grad():
        for context in arguments.contexts:
            wanted = arguments.pretend and context <= (arguments.prefill_up_to or context)
            prefill = _prefill(model, context, arguments) if wanted else None
            for batch in arguments.batch:
                row = _row(model, context, batch, prefill if batch == 1 else None, bandwidth, arguments)
                yield {"attention": attention, **row}


def compare(rows: list[dict[str, Any]], shortest: int) -> None:
    """Adds to each row the ratio of its time per token to that at the `shortest` context, and to that of dense
    attention at the same context, if these are measured."""
    times = {(row["attention"], row["context"], row["batch"]): row["ms_per_token"] for row in rows}
    for row in rows:
        attention, context, batch = row["attention"], row["context"], row["batch"]
        short = times.get((attention, shortest, batch))
        row[f"times_{shortest}"] = short and round(row["ms_per_token"] / short, 3)
        dense = times.get(("dense", context, batch))
        row["times_dense"] = dense and round(row["ms_per_token"] / dense, 3)


def _row(
    model: "Transformer", context: int, batch: int, prefill: float | None, bandwidth: float | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from model import Cache
    from model.decoding import TokenStep, expected_bytes, fill_with_random_keys

    device, cache, capacity = (
        model.embed_tokens.weight.device,
        Cache(model, batch),
        context + WARM_UP + arguments.tokens,
    )
    if arguments.pretend or arguments.step != "extend":
        cache.reserve(capacity)
    if arguments.pretend:
        hidden = cache.extend(torch.zeros(batch, 1, dtype=torch.int64, device=device))
        fill_with_random_keys(cache, context)
    else:
        hidden, prefill = _read(model, cache, context, arguments.prefill_chunk)
    extend: Callable = cache.extend
    if arguments.step != "extend":
        extend = TokenStep(cache, capacity, cuda_graph=arguments.step == "graph")
    seconds = []
    for _ in range(WARM_UP + arguments.tokens):
        started = _now(device)
        token = model.logits(hidden[:, -1]).argmax(-1, keepdim=True)
        hidden = extend(token)
        seconds.append(_now(device) - started)
    median = statistics.median(seconds[WARM_UP:])
    (stored, _), (_, read) = expected_bytes(model, capacity, batch), expected_bytes(model, capacity - 1, batch)
    assert stored == cache.bytes_stored, "the cache holds what its patterns ask for"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    floor = None if bandwidth is None else round(1e3 * (weights + read) / bandwidth, 3)
    return {
        "context": context,
        "batch": batch,
        "prefill_ms": prefill and round(1e3 * prefill, 1),
        "ms_per_token": round(1e3 * median, 3),
        "floor_ms": floor,
        "tokens_per_second": round(batch / median),
        "cache_gib": round(stored / 2**30, 6),
        "allocated_gib": round(cache.bytes_allocated / 2**30, 6),
        "read_gib_per_token": round(read / 2**30, 6),
        "read_measured_gib": round(cache.bytes_read / 2**30, 6),
    }


def _prefill(model: "Transformer", context: int, arguments: argparse.Namespace) -> float:
    """Returns the seconds to read one prompt; a short prompt before it compiles the kernels."""
    from model import Cache

    _read(model, Cache(model, 1), min(context, 2 * arguments.prefill_chunk), arguments.prefill_chunk)
    return _read(model, Cache(model, 1), context, arguments.prefill_chunk)[1]


def _read(model: "Transformer", cache: "Cache", context: int, chunk: int) -> "tuple[torch.Tensor, float]":
    """Reads a random prompt. Returns (hidden states of the last chunk, seconds)."""
    import torch

    device, generator = model.embed_tokens.weight.device, torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocabulary, (cache.batch, context), generator=generator).to(device)
    started = _now(device)
    for part in prompt.split(chunk, 1):
        hidden = cache.extend(part)
    return hidden, _now(device) - started


def _bandwidth(device: "torch.device") -> float | None:
    """Returns the bytes per second that a GPU reads and writes in a large copy; None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).random_()
    target, seconds = torch.empty_like(source), []
    for _ in range(8):
        started = _now(device)
        target.copy_(source)
        seconds.append(_now(device) - started)
    return 2 * COPIED / min(seconds)


def _now(device: "torch.device") -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
