"""Checks the config of every command before any work starts.

The type and the range of each key come first (schema.py), and then the runs that the config names (paths.py). What
remains imports PyTorch: the conditions on several keys and on this machine (group_checks.py). The first setting that
fails is a ConfigError: one line with the key, the value, and the accepted values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import schema
from configs.errors import ConfigError, refused
from configs.paths import check_documents, check_runs, check_trained
from configs.validation import validated
from model.training.run_folder import check_writable

if TYPE_CHECKING:
    from configs.group_checks import Checked


def check_types(config: Mapping[str, Any]) -> schema.Train:
    """Returns a composed training config (or scripts/preflight.py's) with the types of schema.py, or raises
    ConfigError."""
    if "sweep" in config:
        name = config["sweep"]["name"]
        raise ConfigError(f"sweep={name}: must be null without -m; to start the sweep: python train.py -m sweep={name}")
    return validated(schema.Preflight if "output" in config else schema.Train, config)


def check(config: Mapping[str, Any]) -> "Checked":
    """Returns the built objects of a composed training config.

    Raises:
        ConfigError, data.CorpusError: the first setting that is refused.
    """
    settings = check_types(config)
    check_runs(config)
    from configs.group_checks import check_groups

    return check_groups(config, settings)


def check_evaluate(config: Mapping[str, Any]) -> None:
    """As `check`, for scripts/evaluate.py; the window of the protocol depends on the run and is checked with it."""
    settings = validated(schema.Evaluate, config)
    _check_opened(config)
    from configs.build import build_plan
    from configs.group_checks import check_backend, check_device, check_recall

    check_device(settings.accelerator, settings.precision)
    check_recall(config["recall"])
    if settings.attention is not None:
        name = settings.attention.name
        if settings.suite == "recall":
            raise refused("attention", name, "null with suite=recall, which has the run's own attention")
        group = {"attention": config["attention"], "model": {"sink_logits": False}}
        check_backend(group | {"trainer": {"accelerator": settings.accelerator}}, build_plan(config["attention"]))


def _check_opened(config: Mapping[str, Any]) -> None:
    """Checks that the runs in `checkpoint` and one's own documents in `data` can be read, and `output` be written."""
    check_trained(config["checkpoint"])
    if config.get("data"):
        check_documents(config["data"])
    if config["output"]:
        check_writable(Path(config["output"]).parent, config["output"])


def check_probe(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """As `check`, for scripts/probe.py. What depends on the run is checked with it (configs/probing.py).

    overrides: those of the command line.
    """
    settings = validated(schema.Probe, config)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "attention.schedule":
            raise ConfigError(f"{key}={value}: must be left out, since the probe changes one layer at a time")
    _check_opened(config)
    from configs.group_checks import check_device

    check_device(settings.accelerator, settings.precision)


def check_generate(config: Mapping[str, Any]) -> None:
    """As `check`, for scripts/generate.py."""
    settings = validated(schema.Generate, config)
    check_trained(config["checkpoint"])
    from configs.group_checks import check_device

    check_device(settings.accelerator, settings.precision)


def check_export(config: Mapping[str, Any]) -> None:
    """As `check`, for scripts/export.py."""
    validated(schema.Export, config)
    check_trained(config["checkpoint"])
    output = Path(config["output"]).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise refused("output", config["output"], "a folder that does not exist yet, or an empty one")
    check_writable(output.parent, config["output"])


def check_show_pattern(config: Mapping[str, Any]) -> None:
    """As `check`, for scripts/show_pattern.py."""
    validated(schema.ShowPattern, config)
