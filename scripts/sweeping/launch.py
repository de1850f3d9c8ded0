"""python train.py -m sweep=...: the jobs of a sweep, and those that are missing to a launcher."""

import contextlib
import errno
import importlib.metadata
import logging
import platform
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from configs.build import ConfigError
from configs.schema import Seed
from configs.tokenizer import inherit_tokenizer
from configs.trust import trust_named
from configs.validation import validated
from model.training.run_folder import config_hash
from model.training.storage import make_folder
from scripts.console import one_line, user_errors
from scripts.sweeping import manifest as records
from scripts.sweeping.budget import SETS, Budget, Footing
from scripts.sweeping.composer import Composer, as_lines, as_overrides
from scripts.sweeping.jobs import Train, Worker, reason_of, report
from scripts.sweeping.manifest import (
    DONE,
    FAILED,
    INTERRUPTED,
    OUT_OF_MEMORY,
    RUNNING,
    WAITING,
    Job,
    Manifest,
    changing,
)
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

UNTOLD = ("seed", "outputs", "name")
"""Settings in which jobs may differ without a label that says so."""


def launch(arguments: Sequence[str], train: Train) -> int:
    """Runs what is missing of a sweep. Returns the exit status: 0 all jobs are done, 1 not all; raises SystemExit(2)
    for a sweep that cannot be, after one line, and KeyboardInterrupt where somebody stopped it.

    arguments: of the command line, `-m` among them. train: trains a job; picklable by cloudpickle.
    """
    with user_errors(), Composer(arguments) as composer:
        sweep = Sweep(composer, train)
        with told_of(sweep.folder):
            if sweep.settings.search is None:
                return sweep.run()
            from scripts.sweeping.search import search

            return search(sweep)


@contextlib.contextmanager
def told_of(folder: Path) -> Iterator[None]:
    """What the system refuses (no space left, read-only, no such place) is one line for the user. The manifest is
    written whole or not at all, so that nothing is lost."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not full and not str(error.filename or "").startswith(str(folder.parent)):
            raise
        where = f" ({error.filename})" if error.filename else ""
        hint = "the same command goes on when it can write there, or give another outputs="
        raise ConfigError(f"{folder}: {error.strerror}{where}; {hint}") from error


@dataclass
class Draft:
    """A job before it has a place in the manifest."""

    overrides: Overrides
    config: dict[str, Any]

    @property
    def hash(self) -> str:
        return config_hash(self.config)


class Sweep:
    """The sweep of a command line. Its methods are the parts of run(), and of search.py."""

    def __init__(self, composer: Composer, train: Train):
        self.composer, self.train = composer, train
        master = composer.master
        settings = OmegaConf.to_container(master["sweep"], resolve=True, throw_on_missing=True)
        self.settings = Settings.of(settings, given=[each.key_or_group for each in (*composer.sweep, *composer.own)])
        self.footing = Footing(self.settings)
        self.folder = (Path(master["outputs"]) / self.settings.name).absolute()
        self.numbers: dict[str, str] = {}  # by hash: "3/7"

    def run(self) -> int:
        """Runs what is missing of a grid; returns the exit status."""
        drafts = self.drafts()
        self.numbers = {draft.hash: f"{number}/{len(drafts)}" for number, draft in enumerate(drafts, 1)}
        missing = self.enter(drafts)
        try:
            if missing:
                self.launch(missing)
        finally:  # a sweep that is stopped has a report, too
            self._left_behind(missing, "its process was killed")
            status = self.conclude([draft.hash for draft in drafts])
        return status

    # What there is to do

    def drafts(self) -> list[Draft]:
        """All jobs of this command line, each with its budget."""
        before = dimensions_of(self.settings.vary)
        dimensions, fixed = with_command_line(before, self.composer.own)
        dimensions = with_baseline(before, dimensions, self.settings.baseline)
        jobs = fitting(product(dimensions, fixed), self.has_key)
        self.footing.check(jobs)
        return [self.draft(job) for job in jobs]

    def draft(self, job: Overrides) -> Draft:
        logger = self._plain(job)["logger"]
        if logger["name"] == "wandb" and logger["group"] is None:
            job = job | {"logger.group": self.settings.name}
        validated(Seed, self._plain(job)["seed"], "seed")  # the manifest tells it
        job = self.footing.overrides(job, self._plain(job))
        return Draft(job, self._plain(job))

    def _plain(self, job: Overrides) -> dict[str, Any]:
        plain = OmegaConf.to_container(self.composer.job(job), resolve=True, throw_on_missing=True)
        return inherit_tokenizer(trust_named(plain), as_lines(job))

    def has_key(self, job: Overrides, key: str) -> bool:
        """Whether the config that `job` composes has this key."""
        node: Any = self.composer.job(job)
        for name in key.lstrip("~").split("."):
            if not OmegaConf.is_dict(node) or name not in list(node.keys()):  # `in node` is False of a missing value
                return False
            node = node._get_node(name)
        return True

    def enter(self, drafts: Sequence[Draft]) -> list[Job]:
        """Puts the jobs into the manifest, where they are not there yet, and returns those that are to run."""
        make_folder(self.folder)
        match, budget, command = self.settings.match, self.footing.budget, self.composer.command
        with changing(self.folder, Manifest(self.settings.name, match, budget, command, versions())) as manifest:
            if manifest.jobs and (manifest.match, manifest.budget) != (match, budget):
                raise ConfigError(  # what lies in one folder is compared in one report
                    f"sweep.name={self.settings.name}: {self.folder} holds jobs at "
                    f"{in_words(manifest.match, manifest.budget)}, and this is {in_words(match, budget)}: "
                    "give it another sweep.name, or that budget"
                )
            manifest.match, manifest.budget = match, budget
            manifest.command, manifest.versions = command, versions()
            manifest.jobs += [self._job(draft) for draft in drafts if manifest.job(draft.hash) is None]
            everyone = [as_overrides(job.overrides) for job in manifest.jobs]
            for job, label in zip(manifest.jobs, labels(everyone, (*UNTOLD, *SETS.get(match, ()))), strict=True):
                job.label = label or job.label
                if job.state == RUNNING and not records.is_running(self.folder, job):
                    job.end(INTERRUPTED, 0.0, "killed")
            jobs = [manifest.job(draft.hash) for draft in drafts]
            for job, draft in zip(jobs, drafts, strict=True):
                # What runs is this command line's own: overrides that a stranger's manifest holds could name any code.
                job.overrides, job.command, job.folder = self._overrides(draft)
        return [job for job in jobs if self._is_missing(job)]

    def _job(self, draft: Draft) -> Job:
        overrides, command, folder = self._overrides(draft)
        return Job(
            hash=draft.hash,
            label=draft.config["name"],
            overrides=overrides,
            seed=draft.config["seed"],
            baseline=draft.config["attention"]["name"] == self.settings.baseline,
            folder=folder,
            command=command,
        )

    @staticmethod
    def _overrides(draft: Draft) -> tuple[list[str], str, str]:
        """The overrides of a job, the command that runs it alone, and its folder in the sweep's."""
        lines = as_lines(draft.overrides)
        return lines, f"python train.py {shlex.join(lines)}".strip(), draft.hash

    def _is_missing(self, job: Job) -> bool:
        """Whether the job is to run; if not, says why."""
        if job.state == DONE:
            log.info("job %s %s: done already", self.numbers[job.hash], job.name)
            return False
        if job.state in (FAILED, OUT_OF_MEMORY) and not self.settings.retry_failed:
            reason = f"{job.state}, and sweep.retry_failed=false"
            log.info("job %s %s: %s", self.numbers[job.hash], job.name, reason)
            return False
        return True

    # Doing it

    def launch(self, jobs: Sequence[Job]) -> None:
        """Hands jobs to the launcher, and waits for them. Where the launcher itself fails (a worker of joblib's was
        killed, which ends the others), the jobs that it had begun are interrupted, and the others launched again."""
        worker = Worker(self.train, self.folder, self.numbers, self.settings.isolate)
        while jobs:
            launcher = self.composer.launcher(self.folder, worker)
            try:
                with letting_workers_save(launcher):
                    returns = launcher.launch([job.overrides for job in jobs], 0)
            except Exception as error:
                log.warning("the launcher failed: %s: %s", type(error).__name__, one_line(error))
                left = self._left_behind(jobs, f"its process ended: {type(error).__name__}")
                if len(left) == len(jobs):
                    raise
                jobs = left
                continue
            for job, result in zip(jobs, returns, strict=True):
                if result.status is JobStatus.FAILED:  # outside of what jobs.py watches over
                    self._never_began(job, reason_of(result._return_value))
            return

    def _left_behind(self, jobs: Sequence[Job], reason: str) -> list[Job]:
        """Writes down what happened to jobs that run no more; returns those that have not begun."""
        with changing(self.folder) as manifest:
            noted = [manifest.job(job.hash) for job in jobs]
            for job in noted:
                if job.state == RUNNING and not records.is_running(self.folder, job):
                    job.end(INTERRUPTED, 0.0, reason)
            return [job for job in noted if job.state == WAITING]

    def _never_began(self, job: Job, reason: str) -> None:
        """Writes down what kept a job from its beginning."""
        with changing(self.folder) as manifest:
            noted = manifest.job(job.hash)
            if noted.state in (WAITING, RUNNING, INTERRUPTED) and not records.is_running(self.folder, noted):
                noted.end(FAILED, 0.0, reason)
                log.info("job %s %s: failed: %s", self.numbers[job.hash], job.name, reason)

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


@contextlib.contextmanager
def letting_workers_save(launcher: Any) -> Iterator[None]:
    """While joblib's workers are at it, a first Ctrl-C, which has reached them as well, is theirs alone: joblib would
    answer it by killing them. When they have saved and ended it counts here. A second one means now."""
    if "joblib" not in type(launcher).__module__:
        yield
        return
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if asked:
            raise KeyboardInterrupt


def in_words(match: str | None, budget: Budget) -> str:
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
