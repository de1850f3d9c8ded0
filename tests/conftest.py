"""What every room's tests share."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It wants to be asked for before anything imports triton,
# and many things do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

# The same examples on every machine and in every run: a failure is repeatable, and a slow machine is no failure.
settings.register_profile(
    "farsight",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("farsight")
