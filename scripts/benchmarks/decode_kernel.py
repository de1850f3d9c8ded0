"""The kernel of decoding steps alone (kernels.decode_attention, Triton), by its choice of steps, warps and programs:
what kernels/backends/triton/decode.py's table was chosen by. Times are of replayed CUDA graphs.

    python scripts/benchmark.py decode_kernel --choices 64,4,3,4 64,4,2,8 128,8,2,2
"""

import argparse
from pathlib import Path
from typing import Any

CASES = {
    # name: (sequences, keys, keys of a list in whose slots they lie, or None: all keys in a row)
    "all_131072_batch_1": (1, 131072, None),
    "all_131072_batch_16": (16, 131072, None),
    "list_16896_batch_16": (16, 131072, 16896),
    "list_1024_batch_16": (16, 131072, 1024),
    "ring_255_batch_16": (16, 255, None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--choices",
        nargs="+",
        default=["64,4,3,4"],
        help="entries a step, warps, stages, programs a multiprocessor, separated by commas",
    )
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/decode_kernel.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    rows = [row for case in arguments.cases for row in measure(case, arguments)]
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def measure(case: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every choice that compiles."""
    import torch
    from triton.testing import do_bench_cudagraph

    from kernels.backends.triton import decode
    from kernels.part import Part

    batch, keys, listed = CASES[case]
    draw = lambda heads, n: torch.randn(  # noqa: E731
        batch, heads, n, arguments.head_dim, device="cuda", dtype=torch.bfloat16
    )
    q, k, v = draw(arguments.heads, 1), draw(arguments.kv_heads, keys), draw(arguments.kv_heads, keys)
    entries, slots = listed or keys, None
    if listed:  # in blocks of 128, in order, as patterns name them
        blocks = torch.stack([torch.randperm(keys // 128, device="cuda")[: listed // 128] for _ in range(batch)])
        slots = (blocks.sort().values[..., None] * 128 + torch.arange(128, device="cuda")).flatten(1)[:, None]
    mask = torch.ones(batch, 1, 1, entries, dtype=torch.bool, device="cuda")
    part = Part(k, v, mask, slots, torch.full((batch,), entries, device="cuda"))
    bytes_read = 2 * batch * arguments.kv_heads * entries * arguments.head_dim * 2
    rows = []
    for choice in arguments.choices:
        config = decode.DecodeConfig(*map(int, choice.split(",")))
        call = lambda: decode.forward(q, [part], arguments.head_dim**-0.5, None, config)  # noqa: B023, E731
        row = {"case": case, "choice": choice, "microseconds": None, "terabytes_per_second": None}
        try:
            milliseconds = do_bench_cudagraph(call, rep=20)
            row |= {
                "microseconds": round(1e3 * milliseconds, 2),
                "terabytes_per_second": round(bytes_read / milliseconds / 1e9, 3),
            }
        except Exception as error:  # such as too little shared memory
            row["refused"] = type(error).__name__
        rows.append({"refused": None, **row})
    return rows
