"""Composes configs from a sweep's command line, and creates its launcher, with Hydra.

The command line has overrides of the sweep (`sweep=`, `sweep.`), of Hydra (`hydra/launcher=`), and of the jobs.
"""

import copy
import functools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from configs.errors import ConfigError
from scripts.console import CONFIGS, ROOT
from scripts.sweeping.points import Overrides

if TYPE_CHECKING:
    from scripts.sweeping.worker import Worker

FLAGS = ("-m", "--multirun")

EXTRA_LAUNCHERS = tuple(f"hydra/launcher/{name}" for name in ("joblib", "submitit_local", "submitit_slurm"))
"""Launchers that `farsight[sweep]` installs."""


class Composer:
    """Composes configs for a command line, and creates its launcher. A context manager: Hydra's state is global."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments = [argument for argument in arguments if argument not in FLAGS]
        for argument in self.arguments:
            if argument.startswith("-"):
                raise ConfigError(f"{argument}: must be -m or an override, with sweep=")
        self.command = f"python train.py -m {shlex.join(self.arguments)}"

    def __enter__(self) -> "Composer":
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        self._initialized = initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS), job_name="train")
        self._initialized.__enter__()
        self.loader = GlobalHydra.instance().config_loader()
        self.choices = functools.cache(self.loader.get_group_options)  # each of Hydra's calls copies all its sources
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
                raise ConfigError(f"{override.input_line}: must be one value")
            if override.key_or_group == "resume" and override.value() is not None:
                raise ConfigError(
                    f"{override.input_line}: must be null; a sweep that is launched again resumes its jobs"
                )
            if override.is_delete() and self.choices(override.key_or_group):
                key = override.key_or_group
                raise ConfigError(f"{override.input_line}: must be {key}=..., since a run needs it")

    def __exit__(self, *details: Any) -> None:
        self._initialized.__exit__(*details)

    def parse(self, lines: Sequence[str]) -> list[Override]:
        return OverridesParser.create(self.loader).parse_overrides(list(lines))

    @functools.cached_property
    def master(self) -> DictConfig:
        """The config of the sweep itself: its settings, its outputs folder, and Hydra's launcher."""
        place = [override for override in self.own if override.key_or_group == "outputs"]
        lines = [override.input_line for override in (*self.hydra, *self.sweep, *place)]
        try:
            return self._load(lines, RunMode.MULTIRUN)
        except MissingConfigException as error:
            name = str(error.missing_cfg_file)
            if name not in EXTRA_LAUNCHERS:
                raise
            accepted = ", ".join(self.choices("hydra/launcher"))
            group, _, choice = name.rpartition("/")
            raise ConfigError(
                f"{group}={choice}: must be one of {accepted}; {choice} needs pip install 'farsight[sweep]'"
            ) from None

    def job(self, overrides: Overrides) -> DictConfig:
        """Returns the config that `python train.py <overrides>` composes, unresolved. Callers must not change it."""
        lines = tuple(as_lines(overrides))
        if lines not in self._composed:
            config = self._load(lines, RunMode.RUN)
            with open_dict(config):
                del config["hydra"]
            self._composed[lines] = config
        return self._composed[lines]

    def _load(self, lines: Sequence[str], mode: RunMode) -> DictConfig:
        for override in self.parse(lines):  # Hydra's own error has neither the override nor the choices
            if override.is_delete() or isinstance(override.value(), str | QuotedString | list):
                continue
            if choices := self.choices(override.key_or_group):
                names = ", ".join(choice for choice in choices if choice != "base")
                raise ConfigError(f"{override.input_line}: must be one of {names}")
        return self.loader.load_configuration("train", overrides=list(lines), run_mode=mode)

    def launcher(self, folder: Path, worker: "Worker") -> Any:
        """Creates Hydra's launcher of this command line (hydra/launcher=...), which works in `folder`."""
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        # Lets processes that the launcher starts import this repository's packages.
        paths = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        config = copy.deepcopy(self.master)
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={as_quoted(str(folder))}")
        context = HydraContext(config_loader=self.loader, callbacks=Callbacks())
        return Plugins.instance().instantiate_launcher(context, worker, config)


def as_lines(overrides: Overrides) -> list[str]:
    """Returns {"a": "1"} as ["a=1"]. A deletion has no value."""
    return [key if key.startswith("~") and not value else f"{key}={value}" for key, value in overrides.items()]


def as_overrides(lines: Sequence[str]) -> Overrides:
    """Returns ["a=1"] as {"a": "1"}."""
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def as_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
