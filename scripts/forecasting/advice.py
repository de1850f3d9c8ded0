"""Which settings lower a run's memory most, and by how much: each is put into the config, and forecast again."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.build import build_data
from data import DataModule
from scripts.forecasting.memory import forecast_memory
from scripts.forecasting.sampling import Sample

QUOTE = '"'


@dataclass(frozen=True)
class Advice:
    """`settings`: as one writes them on the command line. `saves`: bytes of the peak, on each device."""

    settings: str
    saves: int


def advise(config: Mapping[str, Any], data: DataModule, vocabulary: int, most: int = 3) -> list[Advice]:
    """The `most` settings that lower the peak most, the best first; each alone, and none that would not."""
    now = forecast_memory(Sample.draw(config, data, vocabulary, sequences=1)).step_bytes
    found = []
    for changes in _changes(config):
        changed = copy.deepcopy(dict(config))
        for key, value in changes.items():
            group, _, name = key.partition(".")
            changed[group] = changed[group] | {name: value}
        other = build_data(changed["data"])
        other.corpus = data.corpus
        other.setup()
        then = forecast_memory(Sample.draw(changed, other, vocabulary, sequences=1)).step_bytes
        settings = " ".join(f"{key}={json.dumps(value).strip(QUOTE)}" for key, value in changes.items())
        found.append(Advice(settings, now - then))
    return sorted((each for each in found if each.saves > 0), key=lambda each: -each.saves)[:most]


def _changes(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What could be set otherwise, without another model or another pattern."""
    data, model, trainer = (config[group] for group in ("data", "model", "trainer"))
    changes: list[dict[str, Any]] = [{"data.sequence_length": data["sequence_length"] // 2}]
    if data["batch_size"] > 1:
        changes.append({"data.batch_size": data["batch_size"] // 2, "trainer.accumulate": trainer["accumulate"] * 2})
    if not model["activation_checkpointing"]:
        changes.append({"model.activation_checkpointing": True})
    if trainer["precision"] == "32-true":
        changes.append({"trainer.precision": "bf16-mixed"})
    if model["layers"] > 1:
        changes.append({"model.layers": model["layers"] // 2})
    if model["hidden"] > model["width"]:
        changes.append({"model.hidden": model["hidden"] // 2})
    return [each for each in changes if each.get("data.sequence_length") != 0]
