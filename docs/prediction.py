"""The predicted time of a training step on many GPUs, for docs/scaling.md.

Measured: the time of a step on one GPU (docs/results/training_h200), and how much longer it takes on two GPUs
(docs/results/scaling_h200.json). Computed: the bytes of a step (model/parallel). Assumed: the bandwidth within a host
and between hosts, and that transfers do not overlap with computation.

    step         computation / (share of linear speed on two GPUs) + exchange + all-reduce
    computation  T (t + p L d / 2) on a GPU that holds T tokens, in sequences of L tokens. A query sees the share d of
                 the tokens before it. t, the time of a token without its visible pairs, and p, the time of a pair,
                 follow from the runs with windows and with dense attention at 131,072 tokens
    exchange     keys and values of each layer, and their gradients. Of a window, a GPU at the edge of its host sends
                 them through one network card. Of dense attention, a host receives them once, through all of its
                 network cards, and its GPUs pass them on
    all-reduce   2 (n - 1) / n x bytes of the gradients / bandwidth, among the n GPUs of a host, then among n hosts
    efficiency   computation / step

With more than 131,072 tokens a GPU, computation takes as much longer as the run with selective activation checkpointing
did at 1,048,576 tokens, and the exchange of the forward pass runs twice.
"""

from dataclasses import dataclass
from typing import Any

from docs.result_files import read, where
from model.parallel.context import Context, StandInGroup
from scripts.benchmarks.results import markdown

HOST = 8
"""GPUs of a host."""

WITHIN_HOST, BETWEEN_HOSTS = 350e9, 50e9
"""Bytes per second and GPU, both assumed: NCCL's all-reduce among 8 H100 GPUs with NVLink, and 400 Gb/s a GPU."""

TOKENS_PER_GPU, MOST_TOKENS_PER_GPU = 1 << 17, 1 << 20
"""Tokens that a GPU holds if there are enough GPUs, and those of the longest step that was measured on one GPU."""

LAYERS, WINDOW, KV_NUMBERS, PARAMETERS = 12, 1024, 2 * 2 * 128, 124_000_000
"""Of configs/model/small.yaml with windows of 1,024. KV_NUMBERS: numbers in a token's key and value in one layer."""


@dataclass(frozen=True)
class Step:
    """The predicted seconds of a step, by cause.

    sharing: GPUs that share a sequence. tokens: of one GPU. slower: factor on `computation` on several GPUs, as
    measured on two. sent: bytes that a GPU sends in all exchanges of keys and values.
    """

    sharing: int
    tokens: int
    computation: float
    exchange: float
    all_reduce: float
    slower: float
    sent: int

    @property
    def seconds(self) -> float:
        return self.computation * self.slower + self.exchange + self.all_reduce

    @property
    def efficiency(self) -> float:
        return self.computation / self.seconds


def predict(pattern: str, length: int, gpus: int) -> Step | None:
    """Returns the predicted step of model=small under `pattern` (window or dense). Each group of GPUs shares a sequence
    of `length` tokens. None if a GPU would hold more tokens than were measured."""
    sharing = min(gpus, max(1, length // TOKENS_PER_GPU))
    tokens = length // sharing
    if tokens > MOST_TOKENS_PER_GPU:
        return None
    checkpoints = tokens > TOKENS_PER_GPU
    forward, backward = exchanged(pattern, length, sharing)
    sent = LAYERS * (forward * (1 + checkpoints) + backward)
    rows = read("scaling_h200.json")["rows"]
    one, two = (where(rows, devices=n, kind=kind)["tokens_per_second"] for n, kind in ((1, "one"), (2, "ddp")))
    return Step(
        sharing,
        tokens,
        tokens * seconds_per_token(pattern, length, checkpoints),
        transfer_seconds(pattern, sent, sharing),
        all_reduce_seconds(4 * PARAMETERS, gpus),
        2 * one / two,
        sent,
    )


def seconds_per_token(pattern: str, length: int, checkpoints: bool) -> float:
    """Returns the time of one token of a step on one GPU."""
    runs = {name: read(f"training_h200/{name}.json")["rows"][0] for name in ("window_131k", "dense_131k")}
    window, dense = (1 / runs[name]["tokens_per_second"] for name in ("window_131k", "dense_131k"))
    measured, density = runs["window_131k"]["length"], runs["window_131k"]["density_pairs"]
    pair = (dense - window) / (1 - density) / (measured / 2)
    token = window - pair * density * measured / 2
    if checkpoints:
        selective = read("training_h200/window_1m_selective.json")["rows"][0]
        token += 1 / selective["tokens_per_second"] - window
    pairs = length / 2 if pattern == "dense" else density * measured / 2
    return token + pair * pairs


def exchanged(pattern: str, length: int, sharing: int) -> tuple[int, int]:
    """Returns the bytes that the GPU that sends most sends in one layer, forward and backward."""
    if sharing == 1:
        return 0, 0
    context = Context.of(StandInGroup(sharing, sharing // 2), length, interleave=pattern == "dense")
    exchange = context.gather() if pattern == "dense" else context.halo(before=WINDOW)
    forward, backward = exchange.sent()
    return forward * KV_NUMBERS * 2, backward * KV_NUMBERS * 2  # in bf16


def transfer_seconds(pattern: str, sent: int, sharing: int) -> float:
    """Returns the time of all exchanges of a step."""
    if sharing <= HOST:
        return sent / WITHIN_HOST
    if pattern == "window":
        return sent / BETWEEN_HOSTS
    return sent / WITHIN_HOST + sent * (1 - HOST / sharing) / (HOST * BETWEEN_HOSTS)


def all_reduce_seconds(size: int, gpus: int) -> float:
    within, hosts = min(gpus, HOST), -(-gpus // HOST)
    return 2 * size * ((within - 1) / within / WITHIN_HOST + (hosts - 1) / hosts / (HOST * BETWEEN_HOSTS))


def predictions() -> str:
    """Returns a table of `predict`, for windows and for dense attention."""
    rows: list[dict[str, Any]] = []
    for pattern in ("window", "dense"):
        for length in (1 << 20, 1 << 22, 1 << 24):
            for gpus in (8, 64, 512):
                step = predict(pattern, length, gpus)
                row = {"pattern": pattern, "sequence": f"{length:,}", "GPUs": gpus}
                if step is None:
                    rows.append(row | dict.fromkeys(("sharing one", "a GPU's tokens"), "") | {"step": "does not fit"})
                    continue
                rows.append(
                    row
                    | {
                        "sharing one": step.sharing,
                        "a GPU's tokens": f"{step.tokens:,}",
                        "step": f"{step.seconds:.2f} s",
                        "a GPU sends": f"{step.sent / 1e9:.2f} GB",
                        "efficiency": f"{step.efficiency:.0%}",
                    }
                )
    heads = list(rows[0])
    return markdown([{head: row.get(head, "") for head in heads} for row in rows])
