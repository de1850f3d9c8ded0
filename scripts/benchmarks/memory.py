"""Peak memory of training, forecast (model/forecasting) and measured. Each run has a process of its own.

On a GPU the peak is the most bytes that PyTorch's allocator held for tensors. On a CPU, whose allocator keeps no
statistics, it is the most resident bytes of the process (VmHWM), libraries included (`before_mb` in the forecast).
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 6
"""Training steps of a run. The optimizer's state exists from the second step on, and a heap grows for a few more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["nano"], help="choices of configs/model")
    parser.add_argument("--attention", nargs="+", default=["dense", "window"], help="choices of configs/attention")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="tokens a sequence")
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings, as train.py takes them")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/memory.json"))
    parser.add_argument("--append", action="store_true", help="keep the rows that the output has already")
    parser.add_argument("--one", action="store_true", help="measure in this process the run that --overrides describe")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    if arguments.one:
        print(json.dumps(measure(arguments.overrides)))
        return
    from scripts.benchmarks.results import earlier_rows, markdown, write

    rows = earlier_rows(arguments)
    grid = itertools.product(arguments.models, arguments.attention, arguments.lengths, arguments.checkpointing)
    for model, attention, length, checkpointing in grid:
        settings = [f"model={model}", f"attention={attention}", f"data.sequence_length={length}"]
        settings += [f"model.activation_checkpointing={'true' if checkpointing == 'on' else 'false'}"]
        row = {"model": model, "attention": attention, "length": length, "checkpointing": checkpointing}
        command = [sys.executable, "scripts/benchmark.py", "memory", "--one", "--overrides"]
        command += [*settings, *arguments.overrides]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            raise SystemExit(f"memory of {' '.join(settings)}: the measuring process failed, see above")
        rows.append(row | json.loads(child.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def measure(overrides: list[str]) -> dict[str, Any]:
    """Returns the forecast and the measured bytes of a few steps of the run that `overrides` describe, in this
    process."""
    from configs.build import build_data
    from configs.forecasting import forecast_run
    from scripts.benchmarks.models import composed

    config = composed(*overrides, "trainer.validate_every=null")  # as `train_steps` trains
    data = build_data(config["data"])
    data.setup()
    expected = forecast_run(config, data).memory
    summary, seconds = train_steps(config)
    peak = summary["peak_memory_bytes"]
    return {
        "forecast_mb": round(expected.peak_bytes / 1e6),
        "measured_mb": round(peak / 1e6),
        "ratio": round(expected.peak_bytes / peak, 3),
        "peak_in": expected.phase,
        "before_mb": round(expected.before / 1e6),
        "seconds": round(seconds, 1),
    }


def train_steps(config: dict[str, Any], steps: int = STEPS, log_every: int = 1) -> tuple[dict[str, Any], float]:
    """Trains `steps` steps as train.py does, in a temporary folder. Returns (summary.json, seconds); the summary holds
    `profile`, the content of profile.json, if the config asks for one."""
    import tempfile
    import time

    import torch

    from configs.build import build_data, build_model
    from configs.graphed_step import resolve_cuda_graph
    from model.precision import OF_THE_MODEL
    from model.training.fit import fit
    from model.training.module import LanguageModel
    from model.training.run_folder import RunFolder

    data = build_data(config["data"])
    data.setup()
    trainer = {key: value for key, value in config["trainer"].items() if key not in OF_THE_MODEL}
    trainer |= {"max_steps": steps, "validate_every": None, "save_every": None, "log_every": log_every}
    trainer["cuda_graph"] = resolve_cuda_graph(config)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(config["seed"])
        model = build_model(config, data.vocabulary)
        model.train_in_fp8(config["trainer"]["fp8"])
        if config["trainer"]["compile"]:
            model.compile_layers()
        module = LanguageModel(model, config["optimizer"], data.token_bytes, config)
        result = fit(module, data, RunFolder.create(Path(folder) / "run", config), **trainer)
        profile = Path(folder) / "run" / "profile.json"
        profile = {"profile": json.loads(profile.read_text())} if profile.exists() else {}
    return result.summary | profile, time.perf_counter() - started
