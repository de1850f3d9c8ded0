"""The forecast of a run's peak memory, on each device."""

from dataclasses import dataclass

from kernels import Axis
from model.attention import View, build_view
from scripts.forecasting.rehearsal import rehearse
from scripts.forecasting.sampling import Sample


@dataclass(frozen=True)
class MemoryForecast:
    """`parts`: bytes by part at the peak of a training step. `phase`: when it is, "forward", "backward" or "update"."""

    parts: dict[str, int]
    phase: str

    @property
    def step_bytes(self) -> int:
        return sum(self.parts.values())


def forecast_memory(sample: Sample) -> MemoryForecast:
    """Of one device's step on batches like those of the sample."""
    config, device = sample.config, sample.document.device
    batch, length = config["data"]["batch_size"], config["data"]["sequence_length"]
    step = rehearse(sample.model, _views(sample, batch), batch, length, config, device)
    return MemoryForecast(step.parts, step.phase)


def _views(sample: Sample, batch: int) -> list[View]:
    """Of a batch as large as in training, in the sizes that they have in training; the sample over again if need be."""
    document = sample.document.repeat(-(-batch // len(sample.document)), 1)[:batch]
    tokens = Axis.tokens(document.shape[1], document)
    block, fixed = sample.model.plan.block, document.is_cuda
    views = {pattern: build_view(pattern, tokens, block, fixed) for pattern in dict.fromkeys(sample.model.patterns)}
    return [views[pattern] for pattern in sample.model.patterns]
