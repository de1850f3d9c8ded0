"""The benchmarks of scripts/benchmark.py, one a module: `add_arguments(parser)` and `run(arguments)`."""
