"""The tables of docs/kernels.md and its log."""

from collections.abc import Sequence
from typing import Any

from docs.result_files import read
from scripts.benchmarks.results import markdown

SIDES = ("hopper", "triton", "flex", "flex_flash", "flash_attn")


def kernel_speeds(file: str = "kernels_h200.json", sides: Sequence[str] = SIDES) -> str:
    """Returns forward and backward TFLOP/s of some backends in the kernel benchmark, one row per pattern and length."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read(file)["rows"]:
        cells = rows.setdefault((row["pattern"], row["length"]), {"pattern": row["pattern"], "length": row["length"]})
        cells[row["backend"]] = f"{row['forward_tflops']} / {row['backward_tflops']}"
    heads = ("pattern", "length", *sides)
    return markdown([{head: cells.get(head, "") for head in heads} for cells in rows.values()])


def order_of_sums() -> str:
    """Returns sentences on backward passes that add the terms of dQ in any order: FlashAttention-4's, and ours."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in read("kernels_h200.json")["rows"]:
        times.setdefault((row["pattern"], row["length"]), {})[row["backend"]] = row["backward_ms"]
    saved = [
        1 - each["flash_attn"] / min(each["hopper"], each["flash"])
        for (pattern, _), each in times.items()
        if pattern in ("causal", "window_4096")
    ]
    packed = times["causal_documents", 32768]
    fused = [row for row in read("hopper_variants_h200.json")["rows"] if row["part"] == "fused"]
    slower = [row["plain stores (ms)"] / row["two passes (ms)"] - 1 for row in fused]
    return (
        "There is no setting `deterministic: false`, because none of our kernels would be faster: a fused backward "
        f"pass took {min(slower):.0%} to {max(slower):.0%} more time than two passes, with plain stores in place of "
        "its additions of dQ. FlashAttention-4 gains: on causal attention and windows of 4,096 its backward pass takes "
        f"{min(saved):.0%} to {max(saved):.0%} less time than the fastest one in a fixed order, but its call accepts "
        f"no packed documents (FlexAttention on it does, and takes {1 - packed['flex_flash'] / packed['hopper']:.0%} "
        "less than `hopper` at 32,768 tokens)."
    )


def routed_speeds() -> str:
    """Returns times of routed attention and of fla's NSA on the same independent choices."""
    rows = [row for row in read("routed_h200.json")["rows"] if row["backward_ms"]]
    columns = ("side", "heads", "forward_ms", "backward_ms", "forward_tflops", "backward_tflops")
    return markdown([{column: row[column] for column in columns} for row in rows])


def layout_time() -> str:
    """Returns one sentence with the time in which layouts are built, relative to attention's."""
    shares = [row["share"] for row in read("layouts_h200.json")["rows"]]
    return (
        f"Building a layout takes {min(shares):.1%} to {max(shares):.1%} of the time of 12 layers' attention on the "
        "Triton kernels, at 131,072 tokens ([notes](log/kernels.md#rebuilding-layouts-for-packed-documents))."
    )


def hierarchical_time() -> str:
    """Returns one sentence with the time of hierarchical attention relative to a window's."""
    rows = read("hierarchy_h200.json")["rows"]
    times = [row["times_the_window"] for row in rows if row["call"] == "hierarchical, whole"]
    return (
        f"On the Triton kernels, hierarchical attention with its pooling takes {min(times):.2f} to {max(times):.2f} "
        "times as long as a window with equally many tiles ([notes](log/kernels.md#hierarchical-attention))."
    )
