"""Speed of train.py on several devices of one machine, and on one device.

Every case is a fresh process that trains on the data of the config, profiles a few steps, and reports the median step.
Data parallelism (`ddp`, `fsdp2`) gives each device its own sequences; context parallelism (`context`) shares each
sequence, so that a step has the same tokens on any number of devices. One device also trains without a CUDA graph,
which several devices cannot use, so that equal steps are compared.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROFILED = 3
"""Profiled steps of a case."""

KINDS = {
    "ddp": ["trainer.strategy=ddp"],
    "fsdp2": ["trainer.strategy=fsdp2"],
    "context": ["trainer.strategy=ddp", "trainer.context_parallel={devices}"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2], help="1 is measured once, for all kinds")
    parser.add_argument("--steps", type=int, default=44, help="training steps of a case")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the training config, as for train.py")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/scaling.json"))
    parser.add_argument("--append", action="store_true", help="keep the rows that the output has")
    parser.add_argument("--one", action="store_true", help="measure in this process the run that --overrides describe")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    if arguments.one:
        from lightning.pytorch.utilities import rank_zero_only

        row = measure(arguments.overrides, arguments.steps)
        if rank_zero_only.rank == 0:  # each rank is a process that runs this command
            print(json.dumps(row), flush=True)
        return
    from scripts.benchmarks.results import earlier_rows, markdown, write

    rows = earlier_rows(arguments)
    cases = [("one", 1)] if 1 in arguments.devices else []
    cases += [(kind, devices) for kind in arguments.kinds for devices in arguments.devices if devices > 1]
    for kind, devices in cases:
        settings = [setting.format(devices=devices) for setting in KINDS.get(kind, [])]
        command = [sys.executable, "scripts/benchmark.py", "scaling", "--one", "--steps", str(arguments.steps)]
        command += ["--overrides", *arguments.overrides, f"trainer.devices={devices}", *settings]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            raise SystemExit(f"{kind} on {devices} devices: the measuring process failed, see above")
        found = next(line for line in child.stdout.splitlines() if line.startswith("{"))
        rows.append({"kind": kind, "devices": devices} | json.loads(found))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def measure(overrides: list[str], steps: int) -> dict[str, Any]:
    """Returns the row of the run that `overrides` describe, in this process and those that its strategy starts. Times
    are in milliseconds a step."""
    from scripts.benchmarks.memory import train_steps
    from scripts.benchmarks.models import composed

    config = composed(f"trainer.profile={PROFILED}", *overrides, "trainer.cuda_graph=false")
    summary, seconds = train_steps(config, steps, log_every=max(1, steps // 4))  # medians of four windows
    profile = summary.get("profile", {})  # the first rank alone has one
    tokens = summary["train_tokens"] / summary["step"]
    return {
        "tokens_per_second": round(tokens / summary["step_seconds"]),
        "step_ms": round(1e3 * summary["step_seconds"], 1),
        "mfu_exact": summary["mfu_exact"] and round(summary["mfu_exact"], 3),
        "memory_gb": round(summary["peak_memory_bytes"] / 1e9, 2),
        "context_bytes_sent": summary.get("context_bytes_sent"),
        "busy": round(profile["busy"] / profile["step"], 3) if profile else None,
        "communication_ms": round(profile["communication"], 1) if profile else None,
        "exposed_ms": round(profile["exposed"], 1) if profile else None,
        "seconds": round(seconds, 1),
    }
