"""A forecast on the screen, and the check that train.py makes of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs.build import ConfigError
from kernels.attention import WHOLE
from model.training.endings import Expectation
from scripts.forecasting.advice import Advice, advise
from scripts.forecasting.forecast import Forecast, LayerForecast, forecast
from scripts.forecasting.speed import COMMAND

UNCALIBRATED = "not known of this device"
UNFORESEEN = "attention.backend={} is differentiated as a whole, and what it keeps is not known before it runs"

if TYPE_CHECKING:
    from rich.console import Console

    from data import DataModule


def print_forecast(console: "Console", said: Forecast) -> None:
    """A table of everything."""
    from rich.table import Table

    steps = "as many steps as fit" if said.steps is None else f"{said.steps:,} steps"
    table = Table(title=f"{steps} on {said.devices} x {said.device}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in forecast_rows(said):
        table.add_row(name, value)
    console.print(table)
    if said.step_seconds is None:
        console.print(f"The time of a step is known once {COMMAND} has measured this device.", soft_wrap=True)


def forecast_rows(said: Forecast) -> list[tuple[str, str]]:
    """(name, value) of everything that the table says; layers that are alike are one row."""
    memory, seconds, steps = said.memory, said.step_seconds, said.steps
    rows = [
        ("parameters", f"{said.parameters:,}"),
        ("tokens a step", f"{said.tokens_per_step:,}"),
        ("tokens in all", f"{said.tokens_per_step * steps:,}" if steps else ""),
        *_layer_rows(said.layers),
        ("training FLOPs a step", f"{said.flops_per_step:.3e}"),
        ("training FLOPs in all", f"{said.flops_per_step * steps:.3e}" if steps else ""),
        ("time a step", UNCALIBRATED if seconds is None else f"{seconds:.3g} s"),
        ("time in all", f"{seconds * steps:,.0f} s" if seconds and steps else ""),
        ("cache when generating", f"{size(said.cache_bytes)} a sequence"),
        ("peak memory", size(memory.peak_bytes)),
        *((f"  {part}", size(held)) for part, held in sorted(memory.parts.items(), key=lambda item: -item[1])),
        ("  Python and its libraries", size(memory.before) if memory.before else ""),
        ("  reached in the", "update" if memory.phase == "update" else f"{memory.phase} pass"),
        ("memory of the device", _device(said)),
    ]
    return [(name, value) for name, value in rows if value]


def _device(said: Forecast) -> str:
    total = said.device_bytes
    return f"{size(total)}, {said.memory.peak_bytes / total:.0%} of it taken" if total else ""


def _layer_rows(layers: Sequence[LayerForecast]) -> list[tuple[str, str]]:
    alike: dict[tuple, list[int]] = {}
    for layer in layers:
        alike.setdefault((layer.pattern, layer.pairs, layer.tile_pairs), []).append(layer.layer)
    rows = []
    for (pattern, pairs, tiles), numbers in alike.items():
        layer = layers[numbers[0]]
        which = f"layer {numbers[0]}" if len(numbers) == 1 else f"each of layers {_ranges(numbers)}"
        rows.append((f"attention, {which}: {pattern}", f"{pairs:.3e} pairs ({layer.density_pairs:.1%} of dense)"))
        rows.append(("  with all that its tiles compute", f"{tiles:.3e} pairs ({layer.density_tiles:.1%} of dense)"))
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 3, 5 as 0-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def warning(said: Forecast, advice: Sequence[Advice]) -> str:
    """One line: a forecast that exceeds its device, and what lowers it most."""
    settings = ", ".join(f"{each.settings} (about {size(each.saves)} less)" for each in advice)
    return (
        f"the forecast of {size(said.memory.peak_bytes)} exceeds the {size(said.device_bytes or 0)} of {said.device}; "
        f"what lowers it most: {settings or 'a smaller model'}"
    )


def check_forecast(said: Forecast, config: Mapping[str, Any], data: "DataModule", vocabulary: int) -> str | None:
    """A warning where the forecast exceeds the device, else None; ConfigError under preflight=refuse."""
    if not said.exceeds:
        return None
    line = warning(said, advise(config, data, vocabulary))
    if config["preflight"] == "refuse":
        raise ConfigError(f"preflight=refuse: {line}; accepted are less memory, or preflight=warn")
    return line


def expect(config: Mapping[str, Any], data: "DataModule") -> tuple[Expectation | None, str | None]:
    """What train.py forecasts of its run, and a warning where that exceeds the device; nothing under preflight=off.

    ConfigError under preflight=refuse. Call it before the model is built.
    """
    if config["preflight"] == "off":
        return None, None
    backend = config["attention"]["backend"]
    if backend in WHOLE:
        return None, f"no forecast: {UNFORESEEN.format(backend)}"
    vocabulary = data.vocabulary
    said = forecast(config, data, vocabulary)
    lower = lambda: [(each.settings, each.saves) for each in advise(config, data, vocabulary)]  # noqa: E731
    return Expectation(said.summary(), lower), check_forecast(said, config, data, vocabulary)


def size(count: int) -> str:
    """Bytes as one reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
