"""Time of a training step, forward, backward and update, by pattern and length: what sparsity saves where it counts.

Patterns and lengths are measured in turn, round after round, so that a machine whose speed drifts is as unfair to one
as to the other; the median of the rounds is reported.
"""

import argparse
import statistics
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention", nargs="+", default=["dense", "window"], help="choices of configs/attention")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384], help="tokens a sequence"
    )
    parser.add_argument("--model", default="nano", help="a choice of configs/model")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step: shorter sequences are batched")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each kind; the median counts")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    steps = {(a, n): _Step(a, n, arguments) for a in arguments.attention for n in arguments.lengths}
    for step in steps.values():
        step()  # the first one builds layouts and touches memory
    seconds = {key: [] for key in steps}
    for _ in range(arguments.rounds):
        for key, step in steps.items():
            seconds[key].append(step())
    rows = []
    for (attention, length), times in seconds.items():
        median, tokens = statistics.median(times), steps[attention, length].tokens
        rows.append(
            {
                "attention": attention,
                "length": length,
                "density_pairs": round(steps[attention, length].density, 4),
                "tokens_per_second": round(tokens / median),
                "microseconds_per_token": round(1e6 * median / tokens, 1),
            }
        )
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


class _Step:
    """One training step on random tokens; calling it returns its seconds."""

    def __init__(self, attention: str, length: int, arguments: argparse.Namespace) -> None:
        import torch

        from model.training.optimizer import build_optimizer
        from scripts.benchmarks.models import untrained

        self.model, config = untrained(attention, arguments.model)
        self.device = self.model.embed_tokens.weight.device
        settings = {key: value for key, value in config["optimizer"].items() if key != "schedule"}
        self.optimizer = build_optimizer(self.model, **settings)
        batch = max(1, arguments.tokens // length)
        self.tokens = batch * length
        vocabulary = self.model.config.vocabulary
        self.batch = torch.randint(vocabulary, (batch, length + 1), device=self.device)
        self.position = torch.arange(length, device=self.device).expand(batch, length)
        self.layouts = self.model.build_layouts(None, length)
        self.density = self.model.cost(self.layouts, batch).attention.density_pairs

    def __call__(self) -> float:
        started = self._now()
        out = self.model.loss(self.batch[:, :-1], self.batch[:, 1:], self.position, self.layouts)
        (out.total / out.count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - started

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
