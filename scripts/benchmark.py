"""Measures speed and memory. Prints a Markdown table, and writes a JSON file with device, versions and shapes.

python scripts/benchmark.py training --attention dense window --lengths 1024 2048 4096 8192 16384
python scripts/benchmark.py decode --attention dense window --contexts 8192 131072 --batch 16
python scripts/benchmark.py kernels --patterns window_1024 bigbird --lengths 32768 131072
python scripts/benchmark.py memory --models nano tiny --attention dense window --lengths 1024 4096
python scripts/benchmark.py scaling --kinds ddp context --devices 1 2 --overrides trainer=gpu model=small
python scripts/benchmark.py data --overrides data=code data.sequence_length=32768
python scripts/benchmark.py routed --heads 64 16 --kinds random clustered
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib

BENCHMARKS = {
    "training": "training steps of a model by length and pattern: time per token, tokens per second",
    "kernels": "attention on a GPU, forward and backward: all backends, and other implementations",
    "routed": "attention to chosen blocks on a GPU: our kernels, fla's NSA, FlexAttention and dense SDPA",
    "decode": "reading a prompt and decoding: time per token, bytes that the cache stores and a token reads",
    "scaling": "training steps on several devices and on one: tokens per second, time of communication",
    "data": "loading training batches, for every packing and for a plain memory map: tokens per second",
    "memory": "peak memory of training steps, forecast and measured, each run in a process of its own",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        importlib.import_module(f"scripts.benchmarks.{name}").add_arguments(command)
    arguments = parser.parse_args()
    importlib.import_module(f"scripts.benchmarks.{arguments.command}").run(arguments)


if __name__ == "__main__":
    from scripts.standard_output import output_may_close

    with output_may_close():
        main()
