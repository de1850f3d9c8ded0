"""Forward and backward time, and memory, of every attention backend on a GPU beside its peers, by pattern and length.

`auto`, `triton`, `hopper` and `flash` are backends of `attention()`. The peers are called directly: `flex` is compiled
FlexAttention, `flex_flash` FlexAttention on FlashAttention-4, and `flash_attn` FlashAttention-4 itself (causal
attention and windows, with its default gradients, which are not deterministic). A peer that is not installed is left
out with a message.

Each (pattern, length) has a process of its own. The processes compile at the same time, and are timed one after
another; in each round the backends take turns. TFLOP/s count visible pairs alone (4 D FLOP per pair and head forward,
10 D backward), and not the masked pairs of partial tiles. Before a backend is timed, its results are compared with
float64 arithmetic on sampled queries and keys.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

PATTERNS = {
    "causal": ("Dense", {}),
    "causal_documents": ("Dense", {}),
    "window_1024": ("Window", {"width": 1024}),
    "window_4096": ("Window", {"width": 4096}),
    "strided": ("Strided", {"window": 1024, "stride": 2048, "columns": 128}),
    "bigbird": ("BlockSparse", {"block_size": 128, "window_blocks": 3, "global_blocks": 1, "random_blocks": 3}),
}
PACKED = ("causal_documents",)
"""Patterns that are measured on packed documents of 20,000 to 200,000 tokens; sequences cut documents."""
OURS = ("auto", "triton", "hopper", "flash")
PEERS = ("flex", "flex_flash", "flash_attn")
AHEAD = 4_000_000
"""Cycles for which the GPU is kept busy before each measurement, so that the host launches the measured kernels in
advance, as in training."""
SAMPLES = 32
"""Number of queries, and of keys, of one KV head that are compared with float64 arithmetic."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072], help="tokens a sequence")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens a batch")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each backend; the median counts")
    parser.add_argument("--backends", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS, "blocked"])
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/kernels.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes JSON and a plot."""
    import multiprocessing

    import torch

    from scripts.benchmarks.results import markdown, write

    if not torch.cuda.is_available():
        raise SystemExit("error: the kernel benchmark needs a CUDA device")
    context = multiprocessing.get_context("spawn")
    tasks = [(pattern, length) for length in arguments.lengths for pattern in arguments.patterns]
    ready, turn, results = context.Barrier(len(tasks)), context.Lock(), context.Queue()
    workers = [context.Process(target=_work, args=(task, arguments, ready, turn, results)) for task in tasks]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in tasks]
    for worker in workers:
        worker.join()
    failures = [result for result in found if isinstance(result, str)]
    rows = sorted(
        (row for result in found if not isinstance(result, str) for row in result),
        key=lambda r: tasks.index((r["pattern"], r["length"])),
    )
    if rows:
        write(arguments, rows)
        print(markdown(rows))
        _plot(rows, arguments.output.with_suffix(".png"))
    for failure in failures:
        print(failure)
    if failures:
        raise SystemExit(f"error: {len(failures)} of {len(tasks)} measurements failed")


def _work(task: tuple[str, int], arguments: argparse.Namespace, ready: Any, turn: Any, results: Any) -> None:
    import traceback

    try:
        measurement = _Measurement(*task, arguments)
    except Exception:
        ready.abort()
        results.put(f"{task}: {traceback.format_exc()[-1500:]}")
        return
    try:
        ready.wait(timeout=400)
        for backend, reason in measurement.left_out.items():
            print(f"{task}: without {backend}: {reason}", flush=True)
        with turn:
            results.put(measurement.rows())
    except Exception:
        results.put(f"{task}: {traceback.format_exc()[-1500:]}")


class _Measurement:
    """All backends on one pattern and length. The constructor compiles and checks them."""

    def __init__(self, name: str, length: int, arguments: argparse.Namespace) -> None:
        import torch

        from kernels import Axis, attention, build_layout, patterns
        from kernels.attention import choose_backends

        self.name, self.length, self.arguments = name, length, arguments
        class_name, settings = PATTERNS[name]
        self.pattern = getattr(patterns, class_name)(**settings)
        self.batch = max(1, arguments.tokens // length)
        torch.manual_seed(0)
        shape = (self.batch, length, arguments.head_dim)
        self.q, self.k, self.v = (
            torch.randn(shape[0], heads, *shape[1:], device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads)
        )
        self.grad = torch.randn_like(self.q)
        self.documents = _documents(self.batch, length) if name in PACKED else None
        self.layout = build_layout(self.pattern, Axis.tokens(length, self.documents, device="cuda"))
        self.calls, self.chosen, self.left_out = {}, {}, {}
        for backend in arguments.backends:
            try:
                if backend in PEERS:
                    self.calls[backend] = _peer(backend, self.q, self.k, self.v, self.layout)
                    self.chosen[backend] = backend
                else:
                    self.chosen[backend] = "+".join(
                        dict.fromkeys(choose_backends(self.q, self.k, self.v, self.layout, backend))
                    )
                    self.calls[backend] = lambda q, k, v, b=backend: attention(q, k, v, self.layout, backend=b)
            except ValueError as reason:
                self.left_out[backend] = str(reason)
        self.errors = {}
        for backend in list(self.calls):
            try:
                self.errors[backend] = self._check(self.calls[backend])
            except Exception as error:  # the others are measured if a peer fails
                if backend not in PEERS:
                    raise
                del self.calls[backend]
                self.left_out[backend] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"

    def rows(self) -> list[dict[str, Any]]:
        import torch

        inputs = (self.q, self.k, self.v)
        forward, backward, memory = ({b: [] for b in self.calls} for _ in range(3))
        for _ in range(self.arguments.rounds):
            for backend, call in self.calls.items():
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.cuda._sleep(AHEAD)
                marks[0].record()
                out = call(*inputs)
                marks[1].record()
                torch.autograd.grad(out, inputs, self.grad)
                marks[2].record()
                torch.cuda.synchronize()
                forward[backend].append(marks[0].elapsed_time(marks[1]))
                backward[backend].append(marks[1].elapsed_time(marks[2]))
                memory[backend].append(torch.cuda.max_memory_allocated() - before)
                del out
        sequences = self.batch // self.layout.batch
        flops = int(self.layout.pairs.sum()) * sequences * self.arguments.heads * self.arguments.head_dim
        medians = {b: (statistics.median(forward[b]), statistics.median(backward[b])) for b in self.calls}
        total = {b: sum(ms) for b, ms in medians.items()}
        fastest = min((total[b] for b in PEERS if b in total), default=None)
        return [
            {
                "pattern": self.name,
                "length": self.length,
                "batch": self.batch,
                "backend": backend,
                "kernels": self.chosen[backend],
                "forward_ms": round(ms[0], 3),
                "backward_ms": round(ms[1], 3),
                "forward_tflops": round(4 * flops / ms[0] / 1e9),
                "backward_tflops": round(10 * flops / ms[1] / 1e9),
                "memory_gib": round(statistics.median(memory[backend]) / 2**30, 2),
                "speedup_over_flex": round(total["flex"] / total[backend], 3) if "flex" in total else None,
                "speedup_over_fastest_peer": round(fastest / total[backend], 3) if fastest else None,
                "relative_error": float(f"{self.errors[backend]:.1e}"),
            }
            for backend, ms in medians.items()
        ]

    def _check(self, call: Any) -> float:
        """Largest relative error of out, dq (sampled queries), dk and dv (sampled keys) against float64 arithmetic."""
        import torch

        out = call(self.q, self.k, self.v)
        grads = torch.autograd.grad(out, (self.q, self.k, self.v), self.grad)
        generator = torch.Generator().manual_seed(1)
        picked = torch.randint(self.length, (SAMPLES,), generator=generator).sort().values.cuda()
        group = self.arguments.heads // self.arguments.kv_heads
        everything = torch.arange(self.length, device="cuda")
        q, grad = (t[0, :group].detach().double() for t in (self.q, self.grad))  # [group, length, head_dim]
        k, v = (t[0, 0].detach().double() for t in (self.k, self.v))
        scale = self.arguments.head_dim**-0.5

        def visible(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = (key <= query) & self.pattern.visible(query, key, key + 1)
            return seen if self.documents is None else seen & (self.documents[0, query] == self.documents[0, key])

        def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            raw = q[:, queries] @ k[keys].T * scale
            return raw.masked_fill(~visible(queries[:, None], keys[None]), -torch.inf)

        def close(ours: torch.Tensor, truth: torch.Tensor) -> float:
            return float((ours.detach().double() - truth).norm() / truth.norm())

        weights = scores(picked, everything).softmax(-1)
        truth = weights @ v
        delta = (grad[:, picked] * truth).sum(-1, keepdim=True)
        dq = (weights * (grad[:, picked] @ v.T - delta)) @ k * scale
        errors = [close(out[0, :group, picked], truth), close(grads[0][0, :group, picked], dq)]
        # A key's gradient sums over all queries, whose softmax is normalized over all their keys: in pieces of queries.
        dk, dv = torch.zeros_like(k[picked]), torch.zeros_like(v[picked])
        for piece in everything.split(512):
            if not visible(piece[:, None], picked[None]).any():
                continue
            full = scores(piece, everything)
            weights = (scores(piece, picked) - full.logsumexp(-1, keepdim=True)).exp()
            delta = (grad[:, piece] * (full.softmax(-1) @ v)).sum(-1, keepdim=True)
            dv += torch.einsum("gqk,gqd->kd", weights, grad[:, piece])
            ds = weights * (grad[:, piece] @ v[picked].T - delta)
            dk += torch.einsum("gqk,gqd->kd", ds, q[:, piece]) * scale
        errors += [close(grads[1][0, 0, picked], dk), close(grads[2][0, 0, picked], dv)]
        worst = max(errors)
        if not worst < 2e-2:
            raise AssertionError(f"{self.name}, {self.length}: relative error {worst:.1e}")
        return worst


def _documents(batch: int, length: int) -> Any:
    """The documents of a batch, int32 `[batch, length]` on the GPU: of log-uniform lengths, end to end."""
    import torch

    generator, limits = torch.Generator().manual_seed(0), torch.tensor([20_000.0, 200_000.0]).log()
    drawn = torch.rand(batch * length // 20_000 + 1, generator=generator)
    lengths = (limits[0] + drawn * (limits[1] - limits[0])).exp().long()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[: batch * length]
    return ids.int().view(batch, length).cuda()


def _peer(name: str, q: Any, k: Any, v: Any, layout: Any) -> Any:
    """A peer's own call on the same tiles; ValueError, with the reason, where it cannot serve."""
    import torch

    from kernels.backends import flash, flex
    from kernels.patterns import BlockSparse

    reason = (flash if name == "flash_attn" else flex).unsupported(q, k, v, layout)
    if name == "flex_flash":
        reason = flash.missing(q) or reason
        if any(isinstance(pattern, BlockSparse) and pattern.random_blocks for pattern in layout.source.patterns):
            reason = reason or "BlockSparse with random_blocks, whose hash its compiler cannot translate"
    if reason:
        raise ValueError(reason)
    if name == "flash_attn":
        from flash_attn.cute import flash_attn_func

        window = (None, None) if layout.window >= layout.keys else (layout.window - 1, 0)

        def call(q: Any, k: Any, v: Any) -> Any:
            inputs = (t.transpose(1, 2) for t in (q, k, v))
            out = flash_attn_func(*inputs, causal=window[0] is None, window_size=window)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    config.donated_buffer = False  # its backward is timed apart from its forward
    mask = flex.block_mask(layout, q.shape[1] // k.shape[1])
    compiled = torch.compile(flex_attention, dynamic=False)
    kernels = {"BACKEND": "FLASH" if name == "flex_flash" else "TRITON"}
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=kernels)


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Time, forward + backward, and memory against length: a column a pattern, a line a backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, backends = (list(dict.fromkeys(row[key] for row in rows)) for key in ("pattern", "backend"))
    figure, panels = plt.subplots(2, len(names), figsize=(2.6 * len(names), 5), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        for backend in backends:
            chosen = [row for row in rows if (row["pattern"], row["backend"]) == (name, backend)]
            lengths = [row["length"] for row in chosen]
            style = dict(marker="o", markersize=3, linewidth=1.2, linestyle="--" if backend in PEERS else "-")
            panels[0][column].plot(
                lengths, [row["forward_ms"] + row["backward_ms"] for row in chosen], label=backend, **style
            )
            panels[1][column].plot(lengths, [row["memory_gib"] for row in chosen], label=backend, **style)
        panels[0][column].set_title(name, fontsize=9)
        for panel in panels[:, column]:
            panel.set_ylim(bottom=0)
        panels[1][column].set_xscale("log", base=2)
        panels[1][column].set_xlabel("tokens a sequence", fontsize=8)
    panels[0][0].set_ylabel("forward + backward (ms)", fontsize=8)
    panels[1][0].set_ylabel("memory beyond the inputs (GiB)", fontsize=8)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=8)
    for panel in panels.flat:
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(file, dpi=110)
