"""What it costs to rebuild the layout of packed documents that change at every step, beside the attention on it.

Each step gets other documents, of random lengths. `rebuild_ms` is the device's time for the layout of fixed size and
the kernels' plan of work, `host_ms` the host's for asking; no value comes back from the device (waiting for it is an
error here). `attention_ms` is forward and backward of all layers that share the layout.
"""

import argparse
import statistics
import time
from pathlib import Path

from scripts.benchmarks.kernels import PATTERNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--length", type=int, default=131072, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--document", type=int, default=20000, help="mean tokens a document")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/layouts.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes JSON."""
    import torch

    from scripts.benchmarks.results import markdown, write

    if not torch.cuda.is_available():
        raise SystemExit("error: the layout benchmark needs a CUDA device")
    rows = [_measure(name, arguments) for name in arguments.patterns]
    write(arguments, rows)
    print(markdown(rows))


def _measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from kernels import Axis, attention, build_layout, patterns
    from kernels.backends.triton.plan import plan_of
    from kernels.cost import layout_bytes

    class_name, settings = PATTERNS[name]
    pattern = getattr(patterns, class_name)(**settings)
    length, batch, generator = arguments.length, arguments.batch, torch.Generator().manual_seed(0)
    shapes = [(batch, h, length, arguments.head_dim) for h in (arguments.heads, arguments.kv_heads, arguments.kv_heads)]
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    grad = torch.randn_like(q)
    packings = [
        (torch.rand(batch, length, generator=generator) < 1 / arguments.document).cumsum(-1).cuda()
        for _ in range(arguments.rounds + 2)
    ]

    def rebuild(documents):
        layout = build_layout(pattern, Axis.tokens(length, documents), fixed=True)
        plan = plan_of(layout)
        plan.rows(batch, arguments.kv_heads), plan.columns(batch, arguments.kv_heads), plan.transposed_masks
        return layout

    def timed(function, *inputs):
        """(result, the device's milliseconds); it is kept busy until the host has asked for everything."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        begin.record()
        result = function(*inputs)
        end.record()
        torch.cuda.synchronize()
        return result, begin.elapsed_time(end)

    def train(layout):
        return torch.autograd.grad(attention(q, k, v, layout), (q, k, v), grad)

    for documents in packings[:2]:
        train(rebuild(documents))
    rebuilds, hosts, attentions, layout = [], [], [], None
    for documents in packings[2:]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            begin = time.perf_counter()
            rebuild(documents)
            hosts.append(1000 * (time.perf_counter() - begin))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        layout, device_ms = timed(rebuild, documents)
        rebuilds.append(device_ms)
        attentions.append(timed(train, layout)[1])
    assert not layout.overflow
    rebuild_ms, attention_ms = statistics.median(rebuilds), arguments.layers * statistics.median(attentions)
    exact = build_layout(pattern, Axis.tokens(length, packings[-1]))
    assert torch.equal(exact.pairs, layout.pairs)
    return {
        "pattern": name,
        "length": length,
        "batch": batch,
        "documents": int(packings[-1][:, -1].sum()) + batch,
        "rebuild_ms": round(rebuild_ms, 2),
        "host_ms": round(statistics.median(hosts), 2),
        "layers": arguments.layers,
        "attention_ms": round(attention_ms, 1),
        "share": round(rebuild_ms / attention_ms, 4),
        "layout_mib": round(layout_bytes(layout) / 2**20, 1),
    }
