"""What a run will cost, before it starts: parameters, tokens, attention by layer, FLOPs, memory by part, time, cache.

    python scripts/preflight.py model=tiny attention=dense data.sequence_length=8192      the same settings as train.py
    python scripts/preflight.py experiment=gpu_32k data.path=books/ output=forecast.json

Attention is counted on a seeded sample of the run's own documents; memory is rehearsed on tensors without contents
(scripts/forecasting). The time of a step is known of devices that were calibrated (scripts/benchmark.py calibrate).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging

import hydra
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="preflight")
def main(config: DictConfig) -> None:
    from scripts.console import user_errors

    with user_errors():
        preflight(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def preflight(config: dict) -> None:
    """Prints the table, warns where the forecast exceeds the device, and writes `output`."""
    from rich.console import Console

    from configs.build import ConfigError, build_data
    from configs.checks import check
    from kernels.attention import WHOLE
    from model.training.run_folder import write_json
    from scripts.forecasting import forecast
    from scripts.forecasting.table import UNFORESEEN, check_forecast, print_forecast

    output = config.pop("output")
    check(config)
    backend = config["attention"]["backend"]
    if backend in WHOLE:
        raise ConfigError(f"{UNFORESEEN.format(backend)}: accepted are auto, blocked, triton and flash")
    data = build_data(config["data"])
    data.setup()
    said = forecast(config, data, data.vocabulary)
    print_forecast(Console(), said)
    if output:
        write_json(Path(output), said.to_dict())
        log.info("written to %s", output)
    line = check_forecast(said, config, data, data.vocabulary)
    if line:
        log.warning(line)


if __name__ == "__main__":
    from scripts.console import run

    run(main)
