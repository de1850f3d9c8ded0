"""The tables and numbers in README.md and docs/, computed from the files in docs/results.

A page holds a block such as

    <!-- [[[cog print(table("memory_cpu.json")) ]]] -->
    <!-- [[[end]]] -->

and `make docs` writes the output between the two lines (https://cog.readthedocs.io). A test fails where a page is not
up to date.
"""

from docs.kernel_tables import hierarchical_time, kernel_speeds, layout_time, order_of_sums, routed_speeds
from docs.quality_tables import (
    by_context,
    by_position,
    by_seed,
    extended,
    extension_table,
    probed,
    sparsified,
    sweep_table,
)
from docs.recall_tables import found_facts, pass_keys, recall_answers, recall_beyond, recall_learning
from docs.result_files import read, report_rows, table
from docs.training_tables import (
    context_parallel,
    data_parallel,
    data_parallel_machines,
    gpu_run,
    gpu_runs,
    gpu_steps,
    graphed_steps,
    graphed_steps_on_an_idle_host,
    loaders,
)
from scripts.benchmarks.results import markdown

__all__ = [
    "by_context",
    "by_position",
    "by_seed",
    "context_parallel",
    "data_parallel",
    "data_parallel_machines",
    "extended",
    "extension_table",
    "gpu_run",
    "gpu_runs",
    "gpu_steps",
    "graphed_steps",
    "graphed_steps_on_an_idle_host",
    "hierarchical_time",
    "kernel_speeds",
    "layout_time",
    "loaders",
    "measured",
    "order_of_sums",
    "pass_keys",
    "probed",
    "recall_answers",
    "recall_beyond",
    "recall_learning",
    "routed_speeds",
    "sparsified",
    "sweep_table",
    "table",
]


def measured() -> str:
    """Returns the README's table of measurements."""
    summary, evaluation = read("default_cpu/summary.json"), read("default_cpu/evaluation.json")["rows"][0]
    baselines = evaluation["baselines"]
    step = lambda name: read(f"training_h200/{name}.json")["rows"][-1]  # noqa: E731
    window = step("window")
    over_dense = step("window_131k")["tokens_per_second"] / step("dense_131k")["tokens_per_second"]
    over_flex = [row["speedup_over_flex"] for row in read("kernels_h200.json")["rows"] if row["backend"] == "hopper"]
    code = report_rows("code_extend")
    quality = {label: float(row["bits_per_byte"]) for label, row in code.items()}
    over_dense_seeds = float(code["window_dense"]["difference_from_baseline"])  # over the seeds that both have
    share = float(code["window_dense"]["attention_flops_per_token"]) / float(code["dense"]["attention_flops_per_token"])
    rows = [
        (
            f"`make train`: windows of 256 in 4,096 tokens, two cores, {summary['train_seconds']:.0f} s of training",
            f"{evaluation['bits_per_byte']:.3f} bits per byte on held-out files (gzip -9: "
            f"{baselines['gzip_bits_per_byte']:.3f}, bigram model: {baselines['bigram_bits_per_byte']:.3f}), "
            f"{summary['density_pairs']:.0%} of dense attention's pairs",
            "[default_cpu](docs/results/default_cpu)",
        ),
        (
            "bits per byte on Python code, 65,536 tokens, after training at 4,096 (`model=tiny`, three seeds)",
            f"windows with one dense layer of eight {quality['window_dense']:.3f}, at {share:.0%} of dense's attention "
            f"FLOPs ({over_dense_seeds:+.3f} beside dense, two seeds); more training at 4,096 instead "
            f"{quality['control 4096']:.3f}",
            "[quality.md](docs/quality.md)",
        ),
        (
            "answers of one number (pass keys, pairs, one of several keys) in 1,048,576 tokens of novels, after "
            "training at 65,536 (`model=tiny`, windows of 64 and one full layer without rotary embeddings, two seeds)",
            f"{found_facts('hybrid, NoPE', 1048576)} right; in 65,536 tokens {found_facts('hybrid, NoPE', 65536)}, and "
            f"in one seed dense attention {found_facts('dense', 65536)}, windows alone {found_facts('window', 65536)}; "
            "no model gives four numbers of one key",
            "[quality.md](docs/quality.md#recall-to-a-million-tokens)",
        ),
        (
            "training steps of `model=small` (124 million parameters, windows of 1,024, packed documents, bf16), H200",
            f"{window['tokens_per_second']:,} tokens/s at 65,536 tokens, {window['mfu']:.0%} of the card's matrix "
            f"products; at 131,072 tokens {over_dense:.1f} times dense attention",
            "[performance.md](docs/performance.md)",
        ),
        (
            "attention kernels, forward and backward, against compiled FlexAttention (H200, 32k and 131k tokens)",
            f"{min(over_flex):.2f} to {max(over_flex):.2f} times as fast",
            "[kernels.md](docs/kernels.md)",
        ),
    ]
    return markdown([{"what": what, "result": result, "record": record} for what, result, record in rows])
