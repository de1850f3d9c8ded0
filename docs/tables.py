"""The tables and numbers in README.md and docs/, computed from the files in docs/results.

A page holds a block such as

    <!-- [[[cog print(table("memory_cpu.json")) ]]] -->
    <!-- [[[end]]] -->

and `make docs` writes the output between the two lines (https://cog.readthedocs.io). A test fails where a page is not
up to date.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.results import markdown

RESULTS = Path(__file__).parent / "results"


def read(file: str) -> Any:
    """Returns the contents of a JSON file in docs/results."""
    return json.loads((RESULTS / file).read_text())


def report_rows(sweep: str) -> dict[str, dict[str, str]]:
    """Returns the rows of a sweep's report, by pattern."""
    with (RESULTS / sweep / "report/pareto.csv").open() as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def table(file: str, columns: Iterable[str] | None = None, **equal: Any) -> str:
    """Returns the rows of a result file as a Markdown table: the given columns of those rows whose values equal
    `equal`. Default: all columns but those of `equal`."""
    rows = [row for row in read(file)["rows"] if all(row[key] == value for key, value in equal.items())]
    return markdown([{key: row[key] for key in columns or row if columns or key not in equal} for row in rows])


def where(rows: Iterable[Mapping[str, Any]], **equal: Any) -> Mapping[str, Any]:
    """Returns the only row whose values equal `equal`."""
    (row,) = (row for row in rows if all(row[key] == value for key, value in equal.items()))
    return row


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


def extension_table(sweep: str, timed: bool = False) -> str:
    """Returns quality and cost of every pattern in a sweep with a first stage and a control, best first.

    timed: whether the jobs had the GPU for themselves, so that their step times compare.
    """
    rows = report_rows(sweep)
    attention = float(rows["dense"]["attention_flops_per_token"])
    number = lambda row, key: float(row[key] or "nan")  # noqa: E731
    cells = []
    for row in sorted(rows.values(), key=lambda row: number(row, "bits_per_byte")):
        quality, high = number(row, "bits_per_byte"), number(row, "bits_per_byte_high")
        spread = f" ± {high - quality:.4f}" if len(row["seeds"].split()) > 1 else ""
        keys = {
            "the control": ("difference_from_control", "control_low", "control_high"),
            "dense": ("difference_from_baseline", "difference_low_over_documents", "difference_high_over_documents"),
        }
        beside = {name: [number(row, key) for key in own] for name, own in keys.items()}
        cells.append(
            {"pattern": row["label"], "bits per byte": f"{quality:.4f}{spread}"}
            | {
                f"beside {name}": "-"
                if mean != mean
                else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"  # no difference: NaN
                for name, (mean, low, high) in beside.items()
            }
            | {
                "attention FLOPs / dense": f"{number(row, 'attention_flops_per_token') / attention:.2f}",
            }
            | ({"step time (ms)": f"{1e3 * number(row, 'step_seconds'):.0f}"} if timed else {})
        )
    return markdown(cells)


def by_position(sweep: str, positions: Sequence[int]) -> str:
    """Returns the loss (nats per token) of each pattern of a sweep by the position of a token in its document; each
    column begins at one of `positions`."""
    rows = []
    for job in read(f"{sweep}/manifest.json")["jobs"]:
        if job["role"] == "first stage":
            continue
        (row,) = read(f"{sweep}/{job['folder']}/evaluation.json")["rows"]
        cells = {each["start"]: each for each in row["by_position"]}
        columns = {f"{n:,} to {cells[n]['stop']:,}": f"{cells[n]['loss']:.3f}" for n in positions}
        rows.append({"pattern": job["label"]} | columns)
    return markdown(rows)


def recall_losses() -> str:
    """Returns the last validation losses of the runs that learned recall tasks, in the order of their stages."""
    rows = [
        {
            "run": row["run"],
            "length": f"{row['length']:,}",
            "tokens (millions)": f"{row['tokens'] / 1e6:.0f}",
            "answers (nats per token)": f"{row['answers']:.3f}",
            "novels (bits per byte)": f"{row['novels']:.3f}",
        }
        for row in read("recall_h200.json")["rows"]
    ]
    return markdown(rows)


def sweep_table(sweep: str) -> str:
    """Returns quality and cost of every pattern in a sweep's report, best first."""
    rows = sorted(report_rows(sweep).values(), key=lambda row: float(row["bits_per_byte"]))
    dense = float(report_rows(sweep)["dense"]["step_seconds"])
    return markdown(
        [
            {
                "pattern": row["label"],
                "bits per byte": f"{float(row['bits_per_byte']):.3f}",
                "step time / dense": f"{float(row['step_seconds']) / dense:.2f}",
                "tokens (millions)": f"{float(row['train_tokens']) / 1e6:.1f}",
            }
            for row in rows
        ]
    )


def loaders() -> str:
    """Returns the speed of each packing's loader and of a memory map, and the load of the machine."""
    measured = read("data_cpu.json")
    rows = []
    for row in measured["rows"]:
        cells = {"loader": row["loader"], "workers": row["workers"]}
        cells |= {"median": _millions(row["tokens_per_second"])}
        cells |= {"range": f"{_millions(row['lowest'])} to {_millions(row['highest'])}"}
        rows.append(cells | {"per CPU second of the reading process": _millions(row["tokens_per_cpu_second"])})
    load = f"{measured['device']}, under a load average of {measured['rows'][0]['load_average']:.1f}"
    return f"Millions of tokens per second, in sequences of 32,768 tokens ({load}):\n\n{markdown(rows)}"


def _millions(number: float) -> str:
    return f"{number / 1e6:.0f}" if number >= 1e7 else f"{number / 1e6:.2g}"


def gpu_run() -> str:
    """Returns one sentence with the results of the run gpu_32k."""
    summary, row = read("gpu_32k/summary.json"), read("gpu_32k/evaluation.json")["rows"][0]
    baselines = row["baselines"]
    return (
        f"[The run](results/gpu_32k) took {summary['train_seconds']:.0f} s of training at "
        f"{summary['tokens_per_second']:,.0f} tokens/s and {summary['peak_memory_bytes'] / 1e9:.1f} GB, and reached "
        f"{row['bits_per_byte']:.3f} bits per byte on the held-out novels (gzip -9: "
        f"{baselines['gzip_bits_per_byte']:.3f}; a bigram model on the same tokens: "
        f"{baselines['bigram_bits_per_byte']:.3f})."
    )


def gpu_steps() -> str:
    """Returns speed and memory of compiled training steps on a GPU, a row for each measurement."""
    rows = []
    for file in sorted((RESULTS / "training_h200").glob("*.json")):
        content = read(f"training_h200/{file.name}")
        settings = content["settings"]
        checkpointing = [s for s in settings["overrides"] if s.startswith("model.activation_checkpointing=")]
        rows += [
            {
                "model": settings["model"],
                "attention": row["attention"],
                "kernels": {"auto": "hopper"}.get(row.get("backend"), "triton"),
                "length": f"{row['length']:,}",
                "documents": f"{settings['documents']:,}" if settings["documents"] else "one",
                "recomputed": {"true": "all", "selective": "all but attention"}[checkpointing[0].partition("=")[2]]
                if checkpointing
                else "nothing",
                "pairs": f"{row['density_pairs']:.1%}",
                "tokens/s": f"{row['tokens_per_second']:,}",
                "MFU": f"{row['mfu']:.1%}",
                "memory": f"{row['peak_memory_gb']:.1f} GB",
                "first step": f"{row['first_step_seconds']:.0f} s",
                "record": f"[{file.stem}](results/training_h200/{file.name})",
            }
            for row in content["rows"]
        ]
    return markdown(rows)


def data_parallel() -> str:
    """Returns the speed of data parallelism, its share of as many times one device's, and where the time goes."""
    rows = read("scaling_h200.json")["rows"]
    steps = [{"step": f"{row['step_ms']:.0f} ms", **_communication(row)} for row in rows]
    return markdown([share | step for share, step in zip(_shares_of_linear(rows), steps, strict=True)])


def data_parallel_machines() -> str:
    """Returns the shares of linear speed that several machines reached."""
    share = lambda row, kind: f"{row[kind] / row['one'] / 2:.1%}" if row[kind] else "not measured"  # noqa: E731
    rows = read("scaling_machines_h200.json")["rows"]
    return markdown([{"step": row["step"], "DDP": share(row, "ddp"), "FSDP2": share(row, "fsdp2")} for row in rows])


def _shares_of_linear(rows: list[dict]) -> list[dict]:
    one = where(rows, devices=1)["tokens_per_second"]
    return [
        {
            "GPUs": row["devices"],
            "trainer": {"one": "gpu", "ddp": "ddp", "fsdp2": "fsdp"}[row["kind"]],
            "tokens/s": f"{row['tokens_per_second']:,}",
            "of linear": f"{row['tokens_per_second'] / one / row['devices']:.1%}",
        }
        for row in rows
    ]


def _communication(row: dict) -> dict:
    return {
        "GPU busy": f"{row['busy']:.0%}",
        "in collectives": f"{row['communication_ms']:.1f} ms",
        "of these alone": f"{row['exposed_ms']:.1f} ms",
    }


def context_parallel() -> str:
    """Returns speed, memory and communication of context parallelism."""
    rows = read("scaling_context_h200.json")["rows"]
    one = where(rows, devices=1)["tokens_per_second"]
    return markdown(
        [
            {
                "GPUs": row["devices"],
                "tokens/s": f"{row['tokens_per_second']:,}",
                "of one GPU": f"{row['tokens_per_second'] / one:.2f}x",
                "memory a GPU": f"{row['memory_gb']:.1f} GB",
                "a GPU's layers send": f"{row['context_bytes_sent'] / 1e6:.1f} MB"
                if row["context_bytes_sent"]
                else "-",
                **_communication(row),
            }
            for row in rows
        ]
    )


def gpu_runs() -> str:
    """Returns speed and memory of the training runs at 32,768 tokens."""
    names = {
        "gpu_32k": "window 1,024",
        "gpu_32k_routed": "routed (window 1,024 and 16 blocks of 64)",
        "gpu_32k_dense": "dense",
    }
    rows = []
    for run, name in names.items():
        summary = read(f"{run}/summary.json")
        rows.append(
            {
                "attention": name,
                "tokens/s": f"{summary['tokens_per_second']:,.0f}",
                "seconds per step": f"{summary['step_seconds']:.3f}",
                "memory": f"{summary['peak_memory_bytes'] / 1e9:.1f} GB",
                "pairs": f"{summary['density_pairs']:.1%}",
                "record": f"[{run}](results/{run})",
            }
        )
    return markdown(rows)


def extended() -> str:
    """Returns what each pattern makes of a model of 4,096 tokens in as many further tokens at 32,768."""
    names = {
        "dense": "dense, 32,768",
        "control": "dense, 4,096: the control",
        "window": "windows of 1,024",
        "hybrid": "3 layers of windows to one dense",
        "hybrid_probed": "the same, dense where the probe says",
        "routed": "routed: window 512 and 16 blocks of 64",
    }
    rows = []
    for row in read("pretrained_h200/extension.json")["rows"]:
        losses = {n: f"{loss:.4f}" for n, loss in row["by_context"].items()}
        contexts = {f"given {int(n):,}": losses.get(n, "-") for n in ("512", "2048", "4096", "16384")}
        mean, low, high = row["over_control"] or (None,) * 3
        difference = {"beside the control": "-" if mean is None else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"}
        flops = {"attention FLOPs": f"{row['attention_flops']:.0%}"}
        rows.append(
            {
                "pattern": names[row["pattern"]],
                "bits/byte": f"{row['bits_per_byte']:.4f}",
                **difference,
                **flops,
                **contexts,
            }
        )
    return markdown(rows)


def probed() -> str:
    """Returns what the probe measures of each layer of the same model."""
    return markdown(
        [
            {
                "layer": unit["layer"],
                "loss change": f"{unit['change']:+.4f} [{unit['low']:+.4f}, {unit['high']:+.4f}]",
                "attention beyond 1,024": f"{unit['mass_beyond']:.0%}",
            }
            for unit in read("pretrained_h200/probe.json")["units"]
        ]
    )


def sparsified() -> str:
    """Returns what becomes of a dense model under dense and under routed attention."""
    content = read("pretrained_h200/sparsify.json")
    names = {
        "base": "the dense model itself",
        "dense": "300 steps of dense attention",
        "mean_key": "300 steps, routed by mean keys",
        "indexer": "200 steps of the indexers alone, then 300 routed by them",
    }
    dense = where(content["rows"], run="dense")["attention_flops_per_token"]
    rows = [
        {
            "then": names[row["run"]],
            "bits/byte": f"{row['bits_per_byte']:.4f}",
            "attention FLOPs": f"{row['attention_flops_per_token'] / dense:.0%}",
        }
        for row in content["rows"]
    ]
    again = content["indexer_under_dense_attention"]
    mean, low, high = again["over_routed"]
    difference = f"{again['bits_per_byte']:.4f}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    last = {"then": "the last model, under dense attention", "bits/byte": difference, "attention FLOPs": "100%"}
    return markdown([*rows, last])


def measured() -> str:
    """Returns the README's table of measurements."""
    summary, evaluation = read("default_cpu/summary.json"), read("default_cpu/evaluation.json")["rows"][0]
    baselines = evaluation["baselines"]
    step = lambda name: read(f"training_h200/{name}.json")["rows"][-1]  # noqa: E731
    window = step("window")
    over_dense = step("window_131k")["tokens_per_second"] / step("dense_131k")["tokens_per_second"]
    over_flex = [row["speedup_over_flex"] for row in read("kernels_h200.json")["rows"] if row["backend"] == "hopper"]
    sides = {
        side: where(read("routed_h200.json")["rows"], selection="random", shape="4x32768", heads="64/4", side=side)
        for side in ("by_block", "fla")
    }
    seconds = {side: row["forward_ms"] + row["backward_ms"] for side, row in sides.items()}
    code = report_rows("code_extend")
    quality = {label: float(row["bits_per_byte"]) for label, row in code.items()}
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
            "bits per byte on Python code, 65,536 tokens, after training at 4,096 (`model=tiny`, one seed)",
            f"windows with one dense layer of eight {quality['window_dense']:.3f}, at {share:.0%} of dense's attention "
            f"FLOPs, dense {quality['dense']:.3f}; more training at 4,096 instead {quality['control 4096']:.3f}",
            "[quality.md](docs/quality.md)",
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
        (
            "routed attention, 16 blocks of 64 per query, against fla's NSA kernels (H200, 64/4 heads, 32k tokens)",
            f"{seconds['fla'] / seconds['by_block']:.2f} times as fast",
            "[kernels.md](docs/kernels.md)",
        ),
    ]
    return markdown([{"what": what, "result": result, "record": record} for what, result, record in rows])
