"""Time of hierarchical attention beside a window whose layout has as many tiles: what summaries cost besides attention.

Four calls, forward and backward, timed in turn: all that a layer does from its projections to its attention's output
(pooling, turning and joining summaries, attention), the attention within it alone, and attention under the two windows
of whole blocks that have the next fewer and the next more tiles. The window of exactly as many tiles is between them:
its times are interpolated, in a row that says so. With `--compile` what lies around attention is compiled, as in
training with trainer.compile.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072], help="tokens a sequence")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens a batch")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--spans", nargs="+", type=int, default=[16, 128, 1024])
    parser.add_argument("--reaches", nargs="*", type=int, default=[4096, 65536])
    parser.add_argument("--pooling", default="learned", choices=["mean", "learned"])
    parser.add_argument("--documents", type=int, default=1, help="packed documents a sequence, of equal length")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/hierarchy.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    rows = [row for length in arguments.lengths for row in _measure(length, arguments)]
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def _measure(length: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from kernels import Axis, attention, build_layout
    from kernels.patterns import Hierarchical, Window
    from model.attention import Inputs, attend_class, build_view
    from model.rope import RotaryEmbedding, rotate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pattern = Hierarchical(arguments.window, arguments.spans, arguments.reaches, arguments.pooling)
    batch, sizes = max(1, arguments.tokens // length), _sizes(length, arguments)
    each = -(-length // arguments.documents)
    document = torch.arange(length, device=device) // each
    position = (torch.arange(length, device=device) - document * each).expand(batch, -1)
    packed = document.expand(batch, -1) if arguments.documents > 1 else None
    tokens = Axis.tokens(length, packed, device=device)
    view = build_view(pattern, tokens, arguments.block)
    attend = attend_class(pattern)(pattern, sizes, "auto").to(device)
    if arguments.compile:
        attend.compile_around_attention()

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = lambda heads, n=length: torch.randn(  # noqa: E731
        batch, n, heads, sizes.head_dim, device=device, dtype=dtype, requires_grad=True
    )
    q, unrotated, v = draw(sizes.heads), draw(sizes.kv_heads), draw(sizes.kv_heads)
    rotation = RotaryEmbedding(sizes).to(device)(position)
    k = rotate(unrotated, *rotation).detach().requires_grad_()
    heads_first = lambda t: t.transpose(1, 2)  # noqa: E731
    inputs = Inputs(q, heads_first(q), heads_first(k), heads_first(v), unrotated, rotation)
    joined = [draw(sizes.kv_heads, view.layout.keys) for _ in range(2)]
    kept = view.layout
    windows = _windows_around(kept, lambda width: build_layout(Window(width), tokens, block=kept.block))
    calls = {
        "hierarchical, whole": (lambda: attend(inputs, view)[0], [q, k, v, unrotated, *attend.parameters()], kept),
        "hierarchical, attention alone": (
            lambda: attention(heads_first(q), *map(heads_first, joined), kept),
            [q, *joined],
            kept,
        ),
        **{
            f"window of {width}": (
                lambda layout=layout: attention(*map(heads_first, (q, k, v)), layout),
                [q, k, v],
                layout,
            )
            for width, layout in windows.items()
        },
    }
    grad = torch.randn_like(heads_first(q))
    forward, backward = {name: [] for name in calls}, {name: [] for name in calls}
    for turn in range(arguments.rounds + 2):  # two to warm up
        for name, (call, leaves, _) in calls.items():
            out, seconds = _timed(call, device)
            _, back = _timed(lambda out=out, leaves=leaves: torch.autograd.grad(out, leaves, grad), device)
            if turn >= 2:
                forward[name].append(seconds)
                backward[name].append(back)
    found = {
        name: {
            "tiles": int(layout.rows.count.sum()),
            "visible_pairs": int(layout.pairs.sum()),
            "forward_ms": 1e3 * statistics.median(forward[name]),
            "backward_ms": 1e3 * statistics.median(backward[name]),
        }
        for name, (_, _, layout) in calls.items()
    }
    as_many = _between(int(kept.rows.count.sum()), *(found[f"window of {width}"] for width in windows))
    found["window of as many tiles, interpolated"] = as_many
    rows = []
    for name, row in found.items():
        both = row["forward_ms"] + row["backward_ms"]
        facts = {"length": length, "batch": batch, "call": name}
        facts |= {key: round(value, 3) for key, value in row.items()}
        facts["us_a_tile"] = round(1e3 * both / (batch * row["tiles"]), 3)
        rows.append(facts | {"times_the_window": round(both / (as_many["forward_ms"] + as_many["backward_ms"]), 3)})
    return rows


def _sizes(length: int, arguments: argparse.Namespace) -> Any:
    from model import ModelConfig

    return ModelConfig(
        width=arguments.heads * arguments.head_dim, layers=1, heads=arguments.heads, kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim, hidden=1, vocabulary=1, max_length=length, rope_theta=10000.0, rope_scaling="none",
        rope_factor=1.0, rope_original_length=length, tie_embeddings=True, sink_logits=False, norm_epsilon=1e-6,
        activation_checkpointing=False,
    )  # fmt: skip


def _windows_around(layout: Any, build: Callable[[int], Any]) -> dict[int, Any]:
    """Width -> layout of the widest window with no more tiles than `layout`, and of the next one: windows of whole
    blocks, by bisection. One alone, if it has exactly as many, or there is no wider one."""
    wanted, low, high = int(layout.rows.count.sum()), 1, -(-layout.queries // layout.block)
    last = high
    while low < high:
        middle = (low + high + 1) // 2
        if int(build(middle * layout.block).rows.count.sum()) <= wanted:
            low = middle
        else:
            high = middle - 1
    found = {low * layout.block: build(low * layout.block)}
    if low < last and int(found[low * layout.block].rows.count.sum()) < wanted:
        found[(low + 1) * layout.block] = build((low + 1) * layout.block)
    return found


def _between(tiles: int, fewer: dict[str, float], more: dict[str, float] | None = None) -> dict[str, float]:
    """The row of a window of `tiles` tiles: on the line through those of the next fewer and the next more."""
    if more is None:
        return dict(fewer)
    part = (tiles - fewer["tiles"]) / (more["tiles"] - fewer["tiles"])
    row = {key: value + part * (more[key] - value) for key, value in fewer.items()}
    return row | {"tiles": tiles, "visible_pairs": round(row["visible_pairs"])}


def _timed(call: Callable[[], Any], device: Any) -> tuple[Any, float]:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - started
