from dataclasses import dataclass

from scripts.forecasting.memory import MemoryForecast, forecast_memory
from scripts.forecasting.sampling import Sample


@dataclass(frozen=True)
class Forecast:
    memory: MemoryForecast


def forecast(config, data, vocabulary):
    return Forecast(forecast_memory(Sample.draw(config, data, vocabulary)))
