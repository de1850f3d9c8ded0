"""The forecast of the run that a composed training config describes."""

import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from configs.build import ConfigError, build_model
from configs.graphed_step import resolve_cuda_graph
from configs.phases import phase_configs
from data import DataModule
from kernels.attention import AUTOGRAD_BACKENDS
from model import AttentionPlan
from model.forecasting import Forecast, PhaseCosts, Sample, forecast, sequences_to_sample
from model.precision import device_of
from model.training.failures import MEMORY_ADVICE, size
from model.training.freezing import freeze_parameters

log = logging.getLogger(__name__)

SLOW = 10
"""Seconds after which a forecast logs that it runs."""


def why_no_forecast(config: Mapping[str, Any]) -> str | None:
    """Returns why the memory of a run cannot be forecast, with what is accepted, or None."""
    backend = config["attention"]["backend"]
    if backend in AUTOGRAD_BACKENDS:
        return (
            f"attention.backend={backend}: must be auto, blocked, triton or flash: it runs under PyTorch's autograd as "
            "a whole, and its memory cannot be forecast"
        )
    return None


def draw_sample(
    config: Mapping[str, Any], data: DataModule, plan: AttentionPlan | None = None, sequences: int | None = None
) -> Sample:
    """Returns a sample of `data`, which is set up, with the config's model on the meta device.

    Args:
        plan: that of the config's `attention`, if it is built.
        sequences: number of sequences; by default as many as the device counts quickly.
    """
    with torch.device("meta"):
        model = build_model(config, data.vocabulary, plan)
    freeze_parameters(model, config["optimizer"]["freeze"])
    model.set_step(model.indexers_alone)  # the stage in which all parameters train
    device = device_of(config["trainer"]["accelerator"])
    config = {**config, "trainer": {**config["trainer"], "cuda_graph": resolve_cuda_graph(config)}}
    length = config["data"]["sequence_length"]
    sequences = sequences or sequences_to_sample(device, length)
    return Sample(model, data.sample(sequences, length)["document"].to(device), config)


def flops_of_phases(config: Mapping[str, Any], data: DataModule, last: Sample | None = None) -> PhaseCosts:
    """Returns the training FLOPs of an optimizer step in each phase, on all devices (model.forecasting.Sample).
    `last`: the sample of the last phase, if it is drawn."""
    *earlier, end = phase_configs(config)
    samples = [*(draw_sample(each, data) for each in earlier), last or draw_sample(end, data)]
    steps = [phase["step"] for phase in config["phases"] or [{"step": 0}]]
    return [(step, sample.flops_per_step) for step, sample in zip(steps, samples, strict=True)]


def forecast_run(config: Mapping[str, Any], data: DataModule, plan: AttentionPlan | None = None) -> Forecast:
    """Returns the forecast of a run. On a CPU, call it before the model is built (model.forecasting.forecast).

    With `trainer.cuda_graph=auto`, a run in a graph that exceeds the device's memory is forecast without one.
    """
    with _telling_if_slow():
        sample = draw_sample(config, data, plan)
        result = forecast(sample, flops_of_phases(config, data, sample))
        trainer = sample.config["trainer"]
        if trainer["cuda_graph"] == "auto" and result.exceeds:
            sample = dataclasses.replace(sample, config={**sample.config, "trainer": {**trainer, "cuda_graph": False}})
            result = forecast(sample, result.phases)
        return result


@contextmanager
def _telling_if_slow() -> Iterator[None]:
    """Logs a line where the forecast takes long, as for dense attention in very long sequences on a CPU."""
    timer = threading.Timer(SLOW, log.info, ("forecasting memory and FLOPs; train.py preflight=off leaves it out",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def forecast_before_training(
    config: Mapping[str, Any], data: DataModule, plan: AttentionPlan | None = None
) -> tuple[dict[str, Any] | None, str | None]:
    """Returns (the forecast for summary.json, a warning where it exceeds the device); None for each that does not
    apply.

    Raises ConfigError where the forecast exceeds the device under preflight=refuse.
    """
    if config["preflight"] == "off":
        return None, None
    reason = why_no_forecast(config)
    if reason:
        return None, f"no forecast: {reason}"
    result = forecast_run(config, data, plan)
    return result.summary(), check_memory(result, config["preflight"])


def check_memory(result: Forecast, preflight: str) -> str | None:
    """Returns a one-line warning where the forecast peak exceeds the device's memory, else None.

    Raises ConfigError instead where `preflight` is "refuse".
    """
    if not result.exceeds:
        return None
    warning = (
        f"the forecast of {size(result.memory.peak_bytes)} exceeds the memory of the {result.device}, "
        f"{size(result.device_bytes or 0)}; {MEMORY_ADVICE}"
    )
    if preflight == "refuse":
        raise ConfigError(f"preflight=refuse: must be warn, or the run must take less memory: {warning}")
    return warning
