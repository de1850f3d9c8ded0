"""What a run will cost, said before it starts.

sampling.py    a few seeded sequences of the run's own data, and every layer's layout of them: pairs, tiles, FLOPs
rehearsal.py   a training step on tensors without contents; ledger.py books who holds how much, workspace.py what
               attention operators hold besides, fused.py what torch.compile saves
memory.py      the peak, by part          limits.py   what the process may take (containers)
speed.py       seconds a step, from a calibrated table
advice.py      which settings lower it    forecast.py, table.py   all together, and on the screen
"""

from scripts.forecasting.forecast import Forecast, forecast
from scripts.forecasting.sampling import flops_per_step

__all__ = ["Forecast", "flops_per_step", "forecast"]
