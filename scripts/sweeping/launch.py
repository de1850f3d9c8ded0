"""python train.py -m sweep=...: composes the sweep and its jobs, and hands a launcher those that are missing."""

import importlib.metadata
import logging
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from configs.build import ConfigError
from model.training.run_folder import config_hash
from scripts.console import one_line, user_errors
from scripts.sweeping import manifest as records
from scripts.sweeping.budget import SETS, Budget, Footing
from scripts.sweeping.jobs import ROOT, Worker, report
from scripts.sweeping.manifest import DONE, FAILED, INTERRUPTED, OUT_OF_MEMORY, RUNNING, Job, Manifest, changing
from scripts.sweeping.points import (
    Overrides,
    dimensions_of,
    fitting,
    labels,
    product,
    with_baseline,
    with_command_line,
)
from scripts.sweeping.settings import Settings

log = logging.getLogger(__name__)

FLAGS = ("-m", "--multirun")


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether this command line asks for a sweep of ours."""
    return any(flag in arguments for flag in FLAGS) and any(a.startswith("sweep=") for a in arguments)


def launch(arguments: Sequence[str]) -> int:
    """Runs what is missing of a sweep. Returns the exit status: 0 all jobs are done, 1 not all; raises SystemExit(2)
    for a sweep that cannot be, after one line, and KeyboardInterrupt where somebody stopped it.

    arguments: of the command line, `-m` among them.
    """
    with user_errors(), Composer(arguments) as composer:
        return Sweep(composer).run()


class Composer:
    """Composes configs for a command line, and makes its launcher. A context: Hydra's state is global."""

    def __init__(self, arguments: Sequence[str]):
        overrides = [argument for argument in arguments if argument not in FLAGS]
        for argument in overrides:
            if argument.startswith("-"):
                raise ConfigError(f"{argument}: with sweep= accepted are -m and overrides alone")
        self.command = f"python train.py -m {shlex.join(overrides)}"
        self.arguments = overrides

    def __enter__(self) -> "Composer":
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        self._initialized = initialize_config_dir(
            version_base="1.3", config_dir=str(ROOT / "configs"), job_name="train"
        )
        self._initialized.__enter__()
        self.loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(self.loader).parse_overrides(self.arguments)
        self.hydra = [o for o in parsed if o.key_or_group.partition(".")[0].partition("/")[0] == "hydra"]
        self.sweep = [o for o in parsed if o.key_or_group.partition(".")[0] == "sweep"]
        self.own = [o for o in parsed if o not in self.hydra and o not in self.sweep]
        for override in (*self.hydra, *self.sweep):
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: accepted is one value")
        return self

    def __exit__(self, *details: Any) -> None:
        self._initialized.__exit__(*details)

    def master(self, fixed: Overrides) -> DictConfig:
        """The sweep's own config: what is set in every job, and what Hydra's launcher is told."""
        from hydra.types import RunMode

        lines = [o.input_line for o in (*self.hydra, *self.sweep)] + as_lines(fixed)
        return self.loader.load_configuration("train", overrides=lines, run_mode=RunMode.MULTIRUN)

    def settings(self) -> Settings:
        single = {o.get_key_element(): o.get_value_element_as_str() for o in self.own if not o.is_sweep_override()}
        return Settings.of(OmegaConf.to_container(OmegaConf.select(self.master(single), "sweep"), resolve=True))

    def job(self, overrides: Overrides) -> DictConfig:
        """The config that `python train.py <overrides>` composes, interpolations unresolved."""
        from hydra.types import RunMode

        config = self.loader.load_configuration("train", overrides=as_lines(overrides), run_mode=RunMode.RUN)
        with open_dict(config):
            del config["hydra"]
        return config

    def launcher(self, fixed: Overrides, folder: Path, worker: Worker) -> Any:
        """Hydra's launcher of this command line (hydra/launcher=...), at work in `folder`."""
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        # Processes elsewhere find our packages, whatever they are started as.
        paths = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        place = f"hydra.sweep.dir={as_quoted(str(folder))}"
        config = self.master(fixed)
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra.append(place)
        context = HydraContext(config_loader=self.loader, callbacks=Callbacks())
        return Plugins.instance().instantiate_launcher(context, worker, config)


@dataclass
class Draft:
    """A job before it has a place in the manifest."""

    overrides: Overrides
    config: dict[str, Any]

    @property
    def hash(self) -> str:
        return config_hash(self.config)


class Sweep:
    """A sweep of the command line in `composer`."""

    def __init__(self, composer: Composer):
        self.composer = composer
        self.settings = composer.settings()
        before = dimensions_of(self.settings.vary)
        dimensions, self.fixed = with_command_line(before, composer.own)
        self.dimensions = with_baseline(before, dimensions, self.settings.baseline)
        self.footing = Footing(self.settings)
        self.folder = (Path(self._outputs()) / self.settings.name).absolute()

    def _outputs(self) -> str:
        return self.composer.job(self.fixed if "outputs" in self.fixed else {})["outputs"]

    # What there is to do

    def drafts(self) -> list[Draft]:
        """All jobs of this command line, each with its budget."""
        jobs = fitting(product(self.dimensions, self.fixed), self._has_key)
        self.footing.check(jobs)
        return [self.draft(job) for job in jobs]

    def draft(self, job: Overrides) -> Draft:
        job = self.footing.overrides(job, self._plain(job))
        return Draft(job, self._plain(job))

    def _plain(self, job: Overrides) -> dict[str, Any]:
        return OmegaConf.to_container(self.composer.job(job), resolve=True, throw_on_missing=True)

    def _has_key(self, certain: Overrides, key: str) -> bool:
        node: Any = self.composer.job(certain)
        for name in key.lstrip("~").split("."):
            if not OmegaConf.is_dict(node) or name not in node.keys():  # noqa: SIM118 (`in node` is False for ???)
                return False
            node = node._get_node(name)
        return True

    def enter(self, drafts: Sequence[Draft]) -> list[Job]:
        """Puts the jobs into the manifest, where they are not there yet, and returns those that are to run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = Manifest(
            self.settings.name, self.settings.match, self.footing.budget, self.composer.command, versions(), None
        )
        with changing(self.folder, fresh) as manifest:
            self._check_footing(manifest)
            manifest.command, manifest.versions = self.composer.command, versions()
            for draft in drafts:
                if manifest.job(draft.hash) is None:
                    manifest.jobs.append(self._job(draft))
            told = labels(
                [parsed(job.overrides) for job in manifest.jobs],
                ("seed", "outputs", *SETS.get(self.settings.match, ())),
            )
            for job, label in zip(manifest.jobs, told, strict=True):
                job.label = label or job.label
                if job.state == RUNNING and not records.is_running(self.folder, job):
                    job.end(INTERRUPTED, 0.0, "killed")
            jobs = [manifest.job(draft.hash) for draft in drafts]
        self.numbers = {job.hash: f"{number}/{len(jobs)}" for number, job in enumerate(jobs, 1)}
        missing = []
        for job in jobs:
            if job.state == DONE:
                log.info("job %s %s: done already", self.numbers[job.hash], job.name)
            elif job.state in (FAILED, OUT_OF_MEMORY) and not self.settings.retry_failed:
                log.info(
                    "job %s %s: %s, and left so by sweep.retry_failed=false",
                    self.numbers[job.hash],
                    job.name,
                    job.state,
                )
            else:
                missing.append(job)
        return missing

    def _job(self, draft: Draft) -> Job:
        lines = as_lines(draft.overrides)
        return Job(
            hash=draft.hash,
            label=draft.config["name"],
            overrides=lines,
            seed=draft.config["seed"],
            baseline=draft.config["attention"]["name"] == self.settings.baseline,
            folder=draft.hash,
            command=f"python train.py {shlex.join(lines)}".strip(),
        )

    def _check_footing(self, manifest: Manifest) -> None:
        """What lies in one folder is compared in one report."""
        if (manifest.match, manifest.budget) == (self.settings.match, self.footing.budget) or not manifest.jobs:
            manifest.match, manifest.budget = self.settings.match, self.footing.budget
            return
        ours, theirs = (
            footing(m, b) for m, b in ((self.settings.match, self.footing.budget), (manifest.match, manifest.budget))
        )
        raise ConfigError(
            f"sweep.name={self.settings.name}: {self.folder} holds jobs on another footing ({theirs}) than this "
            f"({ours}); give this sweep another name, or that footing"
        )

    # Doing it

    def run(self) -> int:
        """Runs what is missing; returns the exit status."""
        drafts = self.drafts()
        missing = self.enter(drafts)
        try:
            if missing:
                self.launch(missing)
        finally:  # a sweep that is stopped has a report, too
            status = self.conclude([draft.hash for draft in drafts])
        return status

    def launch(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """Hands jobs to the launcher, and waits for them. Returns its returns."""
        worker = Worker(self.folder, self.numbers, self.settings.isolate)
        launcher = self.composer.launcher(self.fixed, self.folder, worker)
        returns = launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
        for job, result in zip(jobs, returns, strict=True):
            self._note_failure(job, result)
        return returns

    def _note_failure(self, job: Job, result: Any) -> None:
        """A job that failed outside of what jobs.py watches over, in a process elsewhere."""
        from hydra.core.utils import JobStatus

        if result.status is not JobStatus.FAILED:
            return
        with records.changing_job(self.folder, job.hash) as noted:
            if noted.state not in (DONE, FAILED, OUT_OF_MEMORY):
                noted.end(FAILED, 0.0, f"{type(result._return_value).__name__}: {one_line(result._return_value)}")
                log.warning("job %s %s: failed: %s", self.numbers[job.hash], job.name, noted.exit_reason)

    def conclude(self, hashes: Sequence[str]) -> int:
        """Writes the report and says how the sweep stands."""
        report(self.folder)
        manifest = records.read_manifest(self.folder)
        jobs = [manifest.job(hash) for hash in hashes]
        done = sum(job.state == DONE for job in jobs)
        log.info("%d of %d jobs done: %s", done, len(jobs), self.folder)
        for job in jobs:
            if job.state != DONE:
                log.info("  %s: %s%s", job.name, job.state, f": {job.exit_reason}" if job.exit_reason else "")
        return 0 if done == len(jobs) else 1


def as_lines(overrides: Overrides) -> list[str]:
    """{"a": "1"} -> ["a=1"]; a deletion has no value."""
    return [key if key.startswith("~") and not value else f"{key}={value}" for key, value in overrides.items()]


def parsed(lines: Sequence[str]) -> Overrides:
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def as_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def footing(match: str | None, budget: Budget) -> str:
    """A match and its budget in words."""
    if match is None or budget is None:
        return "sweep.match=null"
    ((key, value),) = budget.items()
    return f"sweep.match={match} sweep.{key}={value:.12g}"


def versions() -> dict[str, str | None]:
    """Of what the results depend on."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: of(name) for name in ("torch", "lightning", "farsight")}}
