"""The tables of training steps, runs and loaders: docs/performance.md, docs/scaling.md and docs/data.md."""

from docs.result_files import RESULTS, read, where
from scripts.benchmarks.results import markdown


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


GRAPHED = ("graph_16k", "graph_131k", "graph_small")
"""Records in training_h200 that compare steps with a CUDA graph and without."""


def graphed_steps(docs: str = "") -> str:
    """Returns speed and memory of training steps on a GPU without a CUDA graph and with one. docs: path from the page's
    folder to docs/."""
    rows = []
    for name in GRAPHED:
        content = read(f"training_h200/{name}.json")
        settings, sides = content["settings"], content["rows"]
        plain, graph = (where(sides, cuda_graph=value) for value in ("false", "true"))
        rows.append(
            {
                "model": settings["model"],
                "tokens a step": f"{settings['tokens']:,}",
                "tokens/s without": f"{plain['tokens_per_second']:,}",
                "with a graph": f"{graph['tokens_per_second']:,}",
                "ratio": f"{graph['tokens_per_second'] / plain['tokens_per_second']:.3f}",
                "memory without": f"{plain['peak_memory_gb']:.2f} GB",
                "with": f"{graph['peak_memory_gb']:.2f} GB",
                "loss without, with": f"{plain['loss']}, {graph['loss']}",
                "record": f"[{name}]({docs}results/training_h200/{name}.json)",
            }
        )
    return markdown(rows)


def graphed_steps_on_an_idle_host() -> str:
    """Returns a sentence that compares the first of GRAPHED with an earlier record of its step without a graph."""
    graph = where(read(f"training_h200/{GRAPHED[0]}.json")["rows"], cuda_graph="true")["tokens_per_second"]
    plain = read("training_h200_tiny.json")["rows"][0]["tokens_per_second"]
    return (
        f"An [earlier record](results/training_h200_tiny.json) of that step has {plain:,} tokens/s without a graph. "
        f"The speed with a graph is {graph / plain:.1f} times that."
    )


def gpu_steps() -> str:
    """Returns speed and memory of compiled training steps on a GPU, a row for each measurement."""
    rows = []
    for file in sorted((RESULTS / "training_h200").glob("*.json")):
        if file.stem in GRAPHED:
            continue
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
