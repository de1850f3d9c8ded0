"""Times tile shapes of the kernels of routed attention, one kernel at a time: `benchmark.py routed --sweep`."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from scripts.benchmarks.routed_measurement import Measurement
from scripts.benchmarks.timing import median_ms

SWEPT = {
    "forward": [
        (64, 4, 2, 168),
        (64, 4, 1, 168),
        (64, 4, 1, 128),
        (64, 4, 1, 168, True),
        (32, 4, 2, 128),
    ],
    "backward": [
        (32, 4, 3, None, True, True),
        (32, 4, 3, None, False, True),
        (32, 4, 4, None, True, True),
        (32, 8, 3, 128, True, True),
        (16, 4, 3, None, True, True),
    ],
    "slots": [(16, 4), (8, 2), (8, 4)],
}
"""Kernel -> its configs: the fields of a SelectionConfig (of a SumConfig for "slots")."""


def sweep(measured: Measurement) -> list[dict[str, Any]]:
    """Returns a row for each kernel and config of SWEPT, with the time of the kernel over all chunks of queries."""
    from kernels.backends.triton.dense.backward import compute_row_stats
    from kernels.backends.triton.selection import gradients, partial_outputs, work_items
    from kernels.backends.triton.selection.launch_settings import SelectionConfig, SumConfig
    from kernels.backends.triton.selection.sum_partials import combine_slots

    q, k, v = (t.detach() for t in (measured.q, measured.k, measured.v))
    selection, scale, group = measured.selection, measured.scale, measured.group
    make_plan = functools.partial(work_items.make_plan, selection, group, group * measured.head_dim * 2, step=128)
    plan, backward_plan = make_plan(), make_plan(rows_per_item=gradients.ROWS_PER_ITEM)
    out, lse = partial_outputs.forward(q, k, v, selection, scale)
    prepared = compute_row_stats(measured.grad, None, out, lse, 64)
    row_stats = gradients.by_query(prepared, measured.length)
    truth = out, *gradients.backward(measured.grad, q, k, v, row_stats, selection, scale)
    partial = torch.empty(max(plan.rows, backward_plan.rows), measured.head_dim, dtype=q.dtype, device="cuda")
    partial_lse = torch.empty(plan.rows, dtype=torch.float32, device="cuda")
    lines = measured.batch * measured.kv_heads
    first_rows = torch.full((lines, plan.queries_per_chunk, selection.slots), -1, dtype=torch.int32, device="cuda")
    found = []

    def forward(config: Any) -> None:
        for chunk in range(plan.chunks):
            partial_outputs.partials_of_chunk(
                q, k, v, selection, plan, chunk, scale, config, partial, partial_lse, first_rows
            )

    grads = torch.zeros(2, lines, measured.length, measured.head_dim, dtype=torch.float32, device="cuda")
    chunks = torch.empty(
        max(backward_plan.buffers, 1), 2, measured.block, measured.head_dim, dtype=torch.float32, device="cuda"
    )

    def backward(config: Any) -> None:
        given = measured.grad, q, k, v, row_stats, selection, backward_plan
        for chunk in range(backward_plan.chunks):
            gradients.partials_of_chunk(*given, chunk, scale, config, partial, first_rows, grads, chunks)

    summed = torch.empty_like(out)

    def slots(config: Any, softmax: bool) -> None:
        lses = (partial_lse, lse.clone()) if softmax else (None, None)
        for chunk in range(plan.chunks):
            combine_slots(
                partial, lses[0], first_rows, summed, lses[1], chunk * plan.queries_per_chunk, group, scale, config
            )

    def measure(kernel: str, config: Any, step: Callable, whole: Callable | None = None) -> None:
        fields = " ".join(f"{name} {value}" for name, value in vars(config).items())
        row = measured.facts(kernel) | {"note": fields}
        try:
            if whole is not None:
                ours = whole(config)
                row["relative_error"] = max(
                    float((a - b).float().norm() / b.float().norm())
                    for a, b in zip(ours, truth if len(ours) > 1 else truth[:1], strict=True)
                )
                del ours
            row["backward_ms" if kernel.startswith("backward") else "forward_ms"] = round(median_ms(step, 3), 2)
        except Exception as reason:  # a shape that does not fit the device is a result, too
            row["note"] += f": {type(reason).__name__}"
        found.append(row)
        torch.cuda.empty_cache()

    for fields in SWEPT["forward"]:
        config = SelectionConfig(*fields)
        whole = lambda c: partial_outputs.forward(q, k, v, selection, scale, c)[:1]  # noqa: E731
        measure("forward", config, functools.partial(forward, config), whole)
    forward(SelectionConfig(*SWEPT["forward"][0]))  # what the slots' sums are timed on
    for fields in SWEPT["slots"]:
        for softmax in (True, False):
            config = SumConfig(*fields)
            measure("slots" if softmax else "backward: slots", config, functools.partial(slots, config, softmax))
    whole = lambda c: (  # noqa: E731
        truth[0],
        *gradients.backward(measured.grad, q, k, v, row_stats, selection, scale, c),
    )
    for fields in SWEPT["backward"]:
        config = SelectionConfig(*fields)
        measure("backward", config, functools.partial(backward, config), whole)
    for name, step in {
        "plan": lambda: work_items.make_plan(selection, group, group * measured.head_dim * 2),
        "backward: compute_row_stats": lambda: compute_row_stats(measured.grad, None, out, lse, 64),
        "backward: by query": lambda: gradients.by_query(prepared, measured.length),
    }.items():
        found.append(measured.facts(name) | {"forward_ms": round(median_ms(step, 3), 2)})
    return found
