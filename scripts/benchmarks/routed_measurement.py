"""The measurement of attention to chosen blocks on one shape and selection (routed.py describes its columns)."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

BANDWIDTH, PEAK = 4.3e12, 700e12
"""Bytes per second and FLOP/s of the device, by which the least time of the by-block algorithm is computed."""
SAMPLES = 32
"""Number of queries that are compared with float64 arithmetic."""


class Measurement:
    """The inputs of one shape and selection, and the checks and times of the implementations."""

    def __init__(self, kind: str, batch: int, length: int, heads: int, arguments: argparse.Namespace) -> None:
        from kernels.selection.routing_health import union_of_neighbours
        from scripts.benchmarks import selections

        self.kind, self.batch, self.length, self.heads, self.arguments = kind, batch, length, heads, arguments
        self.kv_heads, self.head_dim, self.block = arguments.kv_heads, arguments.head_dim, arguments.block
        self.group = heads // self.kv_heads
        self.scale = self.head_dim**-0.5
        torch.manual_seed(0)
        # As the model has them: [batch, tokens, heads, head_dim] seen as [batch, heads, tokens, head_dim].
        draw = lambda h: torch.randn(batch, length, h, self.head_dim, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.q, self.k, self.v = (draw(h).transpose(1, 2).requires_grad_() for h in (heads, *[self.kv_heads] * 2))
        self.grad = draw(heads).transpose(1, 2)
        self.selection = selections.make(
            kind, batch, self.kv_heads, length, self.block, arguments.top_k, arguments.selection
        )
        self.union = float(union_of_neighbours(self.selection.chosen))

    def rows(self, report: Callable[[list[dict[str, Any]]], None] = lambda found: None) -> list[dict[str, Any]]:
        """Returns the rows of all implementations. `report` is called with the rows so far when one more is ready."""
        from scripts.benchmarks import peers

        calls: dict[str, Callable] = {}
        times: dict[str, tuple[list[float], list[float]]] = {}
        found: list[dict[str, Any]] = []
        for side in self.arguments.sides:
            try:
                call = self._ours if side == "by_block" else getattr(peers, side)(self.selection, self.heads)
                error = None if side == "dense" else self._check(call, side)
                calls[side], times[side] = call, ([], [])
                found.append(self.facts(side) | {"relative_error": error and float(f"{error:.1e}")})
            except (ImportError, peers.Unavailable, torch.OutOfMemoryError) as reason:
                found.append(self.facts(side) | {"note": f"{type(reason).__name__}: {str(reason)[:80]}"})
            self._take_turns(calls, times)
            self._fill(found, times)
            report(found)
        for _ in range(self.arguments.rounds - 1):
            self._take_turns(calls, times)
        self._fill(found, times)
        return [*found, *self._selecting()]

    def _take_turns(self, calls: dict[str, Callable], times: dict[str, tuple[list[float], list[float]]]) -> None:
        """Measures one more forward and backward time of each implementation."""
        for side, call in calls.items():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            out = call(self.q, self.k, self.v)
            marks[1].record()
            torch.autograd.grad(out, (self.q, self.k, self.v), self.grad)
            marks[2].record()
            torch.cuda.synchronize()
            times[side][0].append(marks[0].elapsed_time(marks[1]))
            times[side][1].append(marks[1].elapsed_time(marks[2]))

    def _fill(self, found: list[dict[str, Any]], times: dict[str, tuple[list[float], list[float]]]) -> None:
        """Sets the columns of the implementations' rows that follow from the times so far."""
        pairs = int(self.selection.pairs().sum()) * self.group * self.head_dim
        floors = self._floors()
        for row in found:
            if row["side"] in times:
                ms = [statistics.median(each) for each in times[row["side"]]]
                row |= {"forward_ms": round(ms[0], 2), "backward_ms": round(ms[1], 2)}
                row |= {"forward_tflops": round(4 * pairs / ms[0] / 1e9)}
                row |= {"backward_tflops": round(10 * pairs / ms[1] / 1e9)}
                if row["side"] != "dense":
                    row |= {"share_of_floor": round(sum(floors) / sum(ms), 2)}

    def facts(self, side: str) -> dict[str, Any]:
        """Returns a row of `side` without measured values."""
        names = ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops", "share_of_floor", "relative_error")
        return {
            "selection": self.kind,
            "shape": f"{self.batch}x{self.length}",
            "heads": f"{self.heads}/{self.kv_heads}",
            "union": f"{self.union:.2f}",
            "side": side,
            **dict.fromkeys(names),
            "note": "",
        }

    def _floors(self) -> tuple[float, float]:
        """Milliseconds (forward, backward) that the by-block algorithm needs at least."""
        rows = int((self.selection.chosen >= 0).sum()) * self.group
        pairs = int(self.selection.pairs().sum()) * self.group
        row_bytes = 2 * self.head_dim
        return tuple(
            1e3 * max(rows * n * row_bytes / BANDWIDTH, pairs * flops * self.head_dim / PEAK)
            for n, flops in ((3, 4), (4, 10))
        )

    def _selecting(self) -> list[dict[str, Any]]:
        """Times of scoring with top-k, and of the transpose."""
        from kernels import block_means
        from kernels.backends.triton.selection.top_k import choose
        from kernels.layout.selection import transpose
        from scripts.benchmarks.timing import median_ms

        chosen, first = self.selection.chosen, self.selection.document_start
        router = self.q.detach().unflatten(1, (self.kv_heads, self.group)).mean(2)
        summaries = block_means(self.k.detach(), first, self.block)
        steps = {
            "select: scores and top-k": lambda: choose(
                router, summaries, first, self.arguments.top_k, self.block, self.block, False
            ),
            "select: transpose": lambda: transpose(chosen, self.length // self.block),
        }
        return [self.facts(name) | {"forward_ms": round(median_ms(step, 5), 3)} for name, step in steps.items()]

    def _ours(self, q: Any, k: Any, v: Any) -> Any:
        from kernels import attention

        return attention(q, k, v, self.selection, backend="triton")

    def _check(self, call: Callable, side: str) -> float:
        """Largest relative error of out and dq (sampled queries), dk and dv (sampled blocks) against float64."""
        out = call(self.q, self.k, self.v)
        grads = torch.autograd.grad(out, (self.q, self.k, self.v), self.grad)
        generator = torch.Generator().manual_seed(1)
        last = self.kv_heads - 1  # of the last sequence, the last KV head
        heads = slice(last * self.group, None)
        q, k, v, grad = (t[-1].detach() for t in (self.q, self.k, self.v, self.grad))
        k, v = k[last], v[last]
        token = torch.arange(self.block, device="cuda")

        def exact(queries: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """(weights, keys, out, delta) in float64 of the queries, all heads of the group."""
            chosen = self.selection.chosen[-1, last, queries].long()
            keys = (chosen[..., None] * self.block + token).flatten(1)
            seen = (chosen >= 0).repeat_interleave(self.block, 1)
            seen &= keys >= self.selection.document_start[-1, queries, None]
            keys = keys.clamp(min=0)
            scores = torch.einsum("hqd,qkd->hqk", q[heads, queries].double(), k[keys].double()) * self.scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            weights = weights.nan_to_num(0.0)  # a query early in its document has no block to choose
            truth = torch.einsum("hqk,qkd->hqd", weights, v[keys].double())
            return weights, keys, truth, (grad[heads, queries].double() * truth).sum(-1, keepdim=True)

        def close(ours: torch.Tensor, truth: torch.Tensor) -> float:
            return float((ours.detach().double() - truth).norm() / truth.norm())

        picked = torch.randint(4 * self.block, self.length, (SAMPLES,), generator=generator).sort().values.cuda()
        weights, keys, truth, delta = exact(picked)
        ds = weights * (torch.einsum("hqd,qkd->hqk", grad[heads, picked].double(), v[keys].double()) - delta)
        dq = torch.einsum("hqk,qkd->hqd", ds, k[keys].double()) * self.scale
        errors = [close(out[-1, heads, picked], truth), close(grads[0][-1, heads, picked], dq)]
        offsets = self.selection.offsets[-1, last]
        used = offsets.diff().nonzero().flatten()
        for block in used[[len(used) // 4, len(used) // 2]].tolist():
            listed = self.selection.entries[-1, last, int(offsets[block]) : int(offsets[block + 1])].long()
            rows = block * self.block + token
            dk, dv = torch.zeros_like(k[rows], dtype=torch.float64), torch.zeros_like(k[rows], dtype=torch.float64)
            for piece in (listed // self.selection.slots).split(128):
                weights, keys, _, delta = exact(piece)
                of_block = keys == rows[0]
                first = of_block.int().argmax(1)  # where the block begins among the query's keys
                part = (first[:, None] + token).expand(self.group, -1, -1)
                p = weights.gather(2, part)
                g = grad[heads, piece].double()
                dv += torch.einsum("hqk,hqd->kd", p, g)
                dk += torch.einsum("hqk,hqd->kd", p * (g @ v[rows].double().T - delta), q[heads, piece].double()) * (
                    self.scale
                )
            errors += [close(grads[1][-1, last, rows], dk), close(grads[2][-1, last, rows], dv)]
        worst = max(errors)
        if not worst < 2e-2:
            raise AssertionError(f"{side}, {self.kind}, {self.length}: relative errors {errors}")
        return worst
