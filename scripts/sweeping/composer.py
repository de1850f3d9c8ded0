"""From a sweep's command line to composed configs and a launcher: everything that is Hydra's.

The command line has three parts: the sweep's (`sweep=`, `sweep.`), Hydra's (`hydra/launcher=`), and that of the jobs.
"""

import copy
import functools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from configs.build import ConfigError
from scripts.sweeping.jobs import ROOT, Worker
from scripts.sweeping.points import Overrides

FLAGS = ("-m", "--multirun")

OF_THE_EXTRA = tuple(f"hydra/launcher/{name}" for name in ("joblib", "submitit_local", "submitit_slurm"))
"""Launchers that Hydra knows once `farsight[sweep]` is installed."""


class Composer:
    """Composes configs for a command line, and makes its launcher. A context: Hydra's state is global."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments = [argument for argument in arguments if argument not in FLAGS]
        for argument in self.arguments:
            if argument.startswith("-"):
                raise ConfigError(f"{argument}: with sweep= accepted are -m and overrides alone")
        self.command = f"python train.py -m {shlex.join(self.arguments)}"

    def __enter__(self) -> "Composer":
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        self._initialized = initialize_config_dir(
            version_base="1.3", config_dir=str(ROOT / "configs"), job_name="train"
        )
        self._initialized.__enter__()
        self.loader = GlobalHydra.instance().config_loader()
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self.hydra, self.sweep, self.own = [], [], []
        try:
            self._sort()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _sort(self) -> None:
        for override in self.parse(self.arguments):
            root = re.split(r"[./@]", override.key_or_group)[0]
            {"hydra": self.hydra, "sweep": self.sweep}.get(root, self.own).append(override)
            if root in ("hydra", "sweep") and override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: accepted is one value")
            if override.key_or_group == "resume" and override.value() is not None:
                raise ConfigError(f"{override.input_line}: a sweep goes on by itself when it is launched again")
            if override.is_delete() and self.loader.get_group_options(override.key_or_group):
                key = override.key_or_group
                raise ConfigError(f"{override.input_line}: a run needs it; accepted is {key}=...")

    def __exit__(self, *details: Any) -> None:
        self._initialized.__exit__(*details)

    def parse(self, lines: Sequence[str]) -> list[Override]:
        return OverridesParser.create(self.loader).parse_overrides(list(lines))

    @functools.cached_property
    def master(self) -> DictConfig:
        """The sweep's own config: its settings, its place, and what Hydra's launcher is told."""
        place = [override for override in self.own if override.key_or_group == "outputs"]
        lines = [override.input_line for override in (*self.hydra, *self.sweep, *place)]
        try:
            return self._load(lines, RunMode.MULTIRUN)
        except MissingConfigException as error:
            name = str(error.missing_cfg_file)
            if name not in OF_THE_EXTRA:
                raise
            accepted = ", ".join(self.loader.get_group_options("hydra/launcher"))
            group, _, choice = name.rpartition("/")
            extra = "pip install 'farsight[sweep]' for it"
            raise ConfigError(f"{group}={choice}: is not installed: {extra}; accepted here: {accepted}") from None

    def job(self, overrides: Overrides) -> DictConfig:
        """The config that `python train.py <overrides>` composes, interpolations unresolved. Not to be changed."""
        lines = tuple(as_lines(overrides))
        if lines not in self._composed:
            config = self._load(lines, RunMode.RUN)
            with open_dict(config):
                del config["hydra"]
            self._composed[lines] = config
        return self._composed[lines]

    def _load(self, lines: Sequence[str], mode: RunMode) -> DictConfig:
        for override in self.parse(lines):  # of these Hydra says neither which, nor what would do
            if override.is_delete() or isinstance(override.value(), str | QuotedString | list):
                continue
            choices = self.loader.get_group_options(override.key_or_group)
            if choices:
                accepted = ", ".join(choice for choice in choices if choice != "base")
                raise ConfigError(f"{override.input_line}: no such choice; accepted are {accepted}")
        return self.loader.load_configuration("train", overrides=list(lines), run_mode=mode)

    def launcher(self, folder: Path, worker: Worker) -> Any:
        """Hydra's launcher of this command line (hydra/launcher=...), at work in `folder`."""
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        # Processes elsewhere find our packages, whatever they are started as.
        paths = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        config = copy.deepcopy(self.master)
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={as_quoted(str(folder))}")
        context = HydraContext(config_loader=self.loader, callbacks=Callbacks())
        return Plugins.instance().instantiate_launcher(context, worker, config)


def as_lines(overrides: Overrides) -> list[str]:
    """{"a": "1"} -> ["a=1"]; a deletion has no value."""
    return [key if key.startswith("~") and not value else f"{key}={value}" for key, value in overrides.items()]


def as_overrides(lines: Sequence[str]) -> Overrides:
    """And back."""
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def as_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
