"""What every room's tests share."""

from hypothesis import HealthCheck, settings

# The same examples on every machine and in every run: a failure is repeatable, and a slow machine is no failure.
settings.register_profile(
    "farsight",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("farsight")
