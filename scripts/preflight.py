"""Forecasts the cost of a run: parameters, tokens, attention by layer, FLOPs, memory by part, cache.

    python scripts/preflight.py model=tiny attention=dense data.sequence_length=8192      the same settings as train.py
    python scripts/preflight.py experiment=gpu_32k data.path=books/ output=forecast.json

Attention is counted on a seeded sample of the run's own documents. Memory is counted in a training step on fake tensors
(model/forecasting).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

if TYPE_CHECKING:
    from model.forecasting import Forecast, LayerForecast

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="preflight")
def main(config: DictConfig) -> None:
    from scripts.console import user_errors

    with user_errors():
        from configs.resolve import resolve

        preflight(resolve(config, new=True) | {"output": config["output"]})


def preflight(config: dict[str, Any]) -> None:
    """Prints the forecast, warns where it exceeds the device, and writes the file `output`."""
    from configs.checks import check, check_types

    check_types(config)
    from configs.errors import ConfigError
    from configs.forecasting import check_memory, forecast_run, why_no_forecast
    from configs.tokenizer import as_resumed
    from model.training.run_folder import find_checkpoint, folder_of
    from model.training.storage import write_json

    output = config.pop("output")
    if config["resume"]:
        config = as_resumed(config, folder_of(find_checkpoint(config["resume"], prefer="last")))
    checked = check(config)
    reason = why_no_forecast(config)
    if reason:
        raise ConfigError(reason)
    checked.data.setup()
    result = forecast_run(config, checked.data, checked.plan)
    print_forecast(result)
    if output:
        write_json(Path(output), result.to_dict())
        log.info("written to %s", output)
    warning = check_memory(result, config["preflight"])
    if warning:
        log.warning(warning)


def print_forecast(result: "Forecast") -> None:
    """Prints the table of a forecast."""
    from rich.console import Console
    from rich.table import Table

    steps = "as many steps as fit" if result.steps is None else f"{result.steps:,} steps"
    table = Table(title=f"{steps} on {result.devices} x {result.device}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in forecast_rows(result):
        table.add_row(name, value)
    Console().print(table)


def forecast_rows(result: "Forecast") -> list[tuple[str, str]]:
    """Returns the table's rows (name, value). Layers of equal cost share a row."""
    from model.training.failures import size

    memory, steps, total = result.memory, result.steps, result.device_bytes
    rows = [
        ("parameters", f"{result.parameters:,}"),
        ("tokens a step", f"{result.tokens_per_step:,}"),
        ("tokens in all", f"{result.tokens_per_step * steps:,}" if steps else ""),
        *_layer_rows(result.layers),
        *_flops_rows(result),
        ("training FLOPs in all", f"{result.flops:.3e}" if result.flops else ""),
        ("cache when generating", f"{size(result.cache_bytes)} a sequence"),
        ("peak memory", size(memory.peak_bytes)),
        *((f"  {part}", size(held)) for part, held in sorted(memory.parts.items(), key=lambda item: -item[1])),
        ("  Python and its libraries", size(memory.before) if memory.before else ""),
        ("  reached in the", "update" if memory.phase == "update" else f"{memory.phase} pass"),
        ("memory of the device", f"{size(total)}, {memory.peak_bytes / total:.0%} of it used" if total else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _flops_rows(result: "Forecast") -> list[tuple[str, str]]:
    name = "training FLOPs a step"
    if len(result.phases) == 1:
        return [(name, f"{result.flops_per_step:.3e}")]
    return [(f"{name}, from step {first:,}", f"{flops:.3e}") for first, flops in result.phases]


def _layer_rows(layers: "Sequence[LayerForecast]") -> list[tuple[str, str]]:
    groups: dict[tuple, list[int]] = {}
    for layer in layers:
        groups.setdefault((layer.pattern, layer.pairs, layer.tile_pairs), []).append(layer.layer)
    rows = []
    for (pattern, pairs, tiles), numbers in groups.items():
        layer = layers[numbers[0]]
        which = f"layer {numbers[0]}" if len(numbers) == 1 else f"each of layers {_ranges(numbers)}"
        rows.append((f"attention, {which}: {pattern}", f"{pairs:.3e} pairs ({layer.density_pairs:.1%} of dense)"))
        rows.append(("  in computed tiles", f"{tiles:.3e} pairs ({layer.density_tiles:.1%} of dense)"))
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """Formats ascending numbers as ranges: 0, 1, 2, 3, 5 as 0-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


if __name__ == "__main__":
    from scripts.console import run

    run(main)
