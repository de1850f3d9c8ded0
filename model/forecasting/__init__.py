"""What a run will cost, computed before it starts.

sample.py            layouts of a few real sequences: visible pairs, tiles, FLOPs
memory_tracker.py    bytes that tensors hold, tracked operator by operator without allocating them
memory_estimate.py   the peak of one training step, from a run of the real model, loss and optimizer on fake tensors;
                     compiled.py: what torch.compile saves; workspace.py: what attention operators and exchanges
                     allocate inside; muon_workspace.py: Muon's stacks
step_flops.py        FLOPs of all steps, where phases differ in them
peak_memory.py       the peak of the whole process        memory_limit.py   the limit that it must stay below
forecast.py          all of these for one run
"""

from .forecast import Forecast, LayerForecast, forecast
from .sample import Sample, sequences_to_sample
from .step_flops import PhaseCosts, steps_of_cost, total_cost

__all__ = [
    "Forecast",
    "LayerForecast",
    "PhaseCosts",
    "Sample",
    "forecast",
    "sequences_to_sample",
    "steps_of_cost",
    "total_cost",
]
