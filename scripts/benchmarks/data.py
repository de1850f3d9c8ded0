"""Speed of loading a run's training batches, and of a plain memory map of the same tokens, in tokens per second.

The memory map returns only tokens and targets: a slice of tokens.bin, and the slice one token later, as int64 tensors.
Small trainers load their data in this way. A DataModule also reads documents in the run's order, and makes document ids
and positions. The loaders are measured in turns, so that other load on the machine slows all of them alike. Tokens per
CPU second of the process that reads the batches (the training process in a run) depend much less on such load.

A streamed loader reads the texts of the same documents in files, and tokenizes them while it reads: to bytes, or
with the run's own tokenizer.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from data import DataModule

FILES = 8
"""Files that a streamed loader reads."""

WARM_UP = 8
"""Batches before the first measurement, in which workers start and the tokens are read into memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packings", nargs="+", default=["contiguous", "best_fit", "whole"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="processes that load batches")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each loader; the table has medians")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of a measurement")
    default = ["data.sequence_length=32768", "model.max_length=32768"]
    parser.add_argument("--overrides", nargs="*", default=default, help="settings, as train.py takes them")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/data.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from configs.build import build_data
    from scripts.benchmarks.models import composed
    from scripts.benchmarks.results import markdown, write

    loaders = {}
    for packing in arguments.packings:
        for workers in arguments.workers:
            changes = [f"data.packing={packing}", f"data.workers={workers}"]
            data = build_data(composed(*arguments.overrides, *changes)["data"])
            data.setup()
            loaders[packing, workers] = iter(data.train_dataloader())
    loaders = {("memory map", 0): memory_map(data), **loaders}
    with tempfile.TemporaryDirectory() as folder:
        settings = streamed_settings(data, composed(*arguments.overrides)["data"], Path(folder))
        for name, group in settings.items():
            for workers in arguments.workers:
                streamed = build_data(group | {"workers": workers})
                streamed.setup()
                loaders[f"streamed, {name}", workers] = iter(streamed.train_dataloader())
        measured = measure(list(loaders.values()), arguments.rounds, arguments.seconds)
    rows = []
    for (loader, workers), (speeds, per_cpu_second) in zip(loaders, measured, strict=True):
        speed = statistics.median(speeds)
        row = {"loader": loader, "workers": workers, "sequences": f"{data.batch_size} x {data.sequence_length:,}"}
        row |= {"tokens_per_second": round(speed), "lowest": round(min(speeds)), "highest": round(max(speeds))}
        row |= {"relative": round(speed / statistics.median(measured[0][0]), 3)}
        row |= {"tokens_per_cpu_second": round(statistics.median(per_cpu_second))}
        rows.append(row | {"load_average": round(os.getloadavg()[0], 1)})
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def streamed_settings(data: "DataModule", config: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the training documents of `data` to files in `folder`. Returns the `data` groups of a config that stream
    them, by the name of the tokenizer."""
    documents = data.corpus.splits["train"].documents
    (folder / "files").mkdir()
    for number in range(FILES):
        with open(folder / "files" / f"{number}.jsonl", "w") as file:
            for row in documents.shard(FILES, number):
                file.write(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n")
    source = dict.fromkeys(("config", "split", "revision")) | {"_target_": "data.sources.Hub", "text_column": "text"}
    source |= {"streaming": True, "held_out_documents": 1}
    streamed = {**config, "source": source, "path": str(folder / "files"), "cache": str(folder / "cache")}
    saved = {"_target_": "data.tokenizers.Saved", "path": str(data.corpus.folder)}
    return {
        "bytes": {**streamed, "tokenizer": {"_target_": "data.tokenizers.Bytes"}},
        f"{data.vocabulary:,} tokens": {**streamed, "tokenizer": saved},
    }


def measure(
    loaders: "list[Iterator[dict[str, torch.Tensor]]]", rounds: int, seconds: float
) -> list[tuple[list[float], list[float]]]:
    """Returns for each loader its tokens per second in each round, and those per CPU second of this process."""
    for loader in loaders:
        for _ in range(WARM_UP):
            next(loader)
    measured: list[tuple[list[float], list[float]]] = [([], []) for _ in loaders]
    for _ in range(rounds):
        for loader, (speeds, per_cpu_second) in zip(loaders, measured, strict=True):
            tokens, started, cpu_started = 0, time.perf_counter(), time.process_time()
            while (elapsed := time.perf_counter() - started) < seconds:
                tokens += next(loader)["tokens"].numel()
            speeds.append(tokens / elapsed)
            per_cpu_second.append(tokens / (time.process_time() - cpu_started))
    return measured


def memory_map(data: "DataModule") -> "Iterator[dict[str, Any]]":
    """Yields batches of the sequences at random places of the training split, without regard to documents."""
    import numpy as np
    import torch

    split, length = data.corpus.splits["train"], data.sequence_length
    tokens = np.memmap(split.folder / "tokens.bin", dtype=split.dtype, mode="r")
    generator = np.random.default_rng(0)

    def stacked(starts: np.ndarray) -> torch.Tensor:
        return torch.stack([torch.from_numpy(tokens[start : start + length].astype(np.int64)) for start in starts])

    while True:
        starts = generator.integers(len(tokens) - length, size=data.batch_size)
        yield {"tokens": stacked(starts), "targets": stacked(starts + 1)}
