"""What a run will cost, said before it starts.

sampling.py    a few seeded sequences of the run's own data, and every layer's layout of them
"""

from scripts.forecasting.forecast import forecast
from scripts.forecasting.sampling import Sample, flops_per_step

__all__ = ["Sample", "flops_per_step", "forecast"]
