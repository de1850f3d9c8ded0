"""Attention to chosen blocks on a GPU, forward and backward: our kernels, fla's NSA, FlexAttention, dense SDPA.

All implementations (`--sides`) attend by the same selection (selections.py); dense attends to everything. TFLOP/s count
the selected pairs alone (4 D FLOP per pair and head forward, 10 D backward), whatever else an implementation computes.
`share_of_floor` is the least time of the by-block algorithm over the measured one. That least time is the larger of
bytes / 4.3 TB/s and FLOP / 700 TFLOP/s, with these bytes for each (query, head, slot): forward, q is read and a partial
output written and read; backward, q and dO are read and a partial dQ written and read.

Before an implementation is timed, its results are compared with float64 arithmetic on sampled queries and blocks. The
implementations take turns, and the median time counts. The table is printed and written whenever one more
implementation is ready: fla tries 40 shapes of its kernels at its first call, which takes minutes.

Scoring with top-k (`select`) and the transpose of the choice have rows of their own.

    python scripts/benchmark.py routed --output outputs/benchmarks/routed.json
    python scripts/benchmark.py routed --sweep     times tile shapes of each kernel (tile_shapes.py) instead
"""

import argparse
from pathlib import Path
from typing import Any

SIDES = ("by_block", "fla", "flex", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["4x32768", "1x131072"], help="sequences x tokens")
    parser.add_argument("--heads", nargs="+", type=int, default=[64, 16])
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", default=["random", "clustered"], choices=["random", "clustered", "file"])
    parser.add_argument("--selection", help="a saved selection, for --kinds file")
    parser.add_argument("--sides", nargs="+", default=["by_block", "fla"], choices=SIDES)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each side; the median counts")
    parser.add_argument("--sweep", action="store_true", help="time tile shapes of our kernels instead")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/routed.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the tables, writes JSON."""
    import torch

    from scripts.benchmarks.results import markdown, write
    from scripts.benchmarks.routed_measurement import Measurement
    from scripts.benchmarks.tile_shapes import sweep

    if not torch.cuda.is_available():
        raise SystemExit("error: the benchmark of routed attention needs a CUDA device")
    if "file" in arguments.kinds and arguments.selection is None:
        raise SystemExit("error: --kinds file needs --selection FILE.pt")
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        batch, length = (int(n) for n in shape.split("x"))
        for heads in arguments.heads:
            for kind in arguments.kinds:
                measurement = Measurement(kind, batch, length, heads, arguments)

                def report(found: list[dict[str, Any]]) -> None:  # so that a run that is interrupted leaves its results
                    print(markdown(found), flush=True)
                    write(arguments, rows + found)  # noqa: B023

                found = sweep(measurement) if arguments.sweep else measurement.rows(report)
                report(found)
                rows += found
                torch.cuda.empty_cache()
    print(markdown(rows))
