"""The benchmarks of scripts/benchmark.py.

data.py decode.py kernels.py memory.py routed.py scaling.py training.py     `add_arguments(parser)`, `run(arguments)`
routed_measurement.py, tile_shapes.py    the measurements of routed.py: implementations, and configs of our kernels
models.py, selections.py, peers.py       what is measured: models, selections, other implementations
results.py, timing.py                    the files and tables of results; the time of work on a GPU
"""
