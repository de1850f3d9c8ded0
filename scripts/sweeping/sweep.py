"""Enters a sweep's jobs into the manifest, hands those that are not done to a launcher, and writes the report."""

import contextlib
import importlib.metadata
import logging
import platform
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.utils import JobStatus

from configs.errors import ConfigError, as_override
from model.training.storage import make_folder
from scripts.console import one_line
from scripts.reporting.manifest import (
    DONE,
    FAILED,
    FIRST_STAGE,
    INTERRUPTED,
    OUT_OF_MEMORY,
    PATTERN,
    RUNNING,
    WAITING,
    JobEntry,
    Manifest,
    read_manifest,
)
from scripts.sweeping.budget import MATCHED_KEYS, Budget
from scripts.sweeping.composer import as_lines, as_overrides
from scripts.sweeping.locks import changing, is_running, lock
from scripts.sweeping.plan import Draft, Plan
from scripts.sweeping.points import Overrides, labels
from scripts.sweeping.worker import Train, Worker, reason_of, report

log = logging.getLogger(__name__)

NOT_IN_LABELS = ("seed", "outputs", "name")
"""Settings that no label contains, although jobs may differ in them."""


class Sweep:
    """A planned sweep and its manifest. run() runs a grid; search.py calls the same methods for a search."""

    def __init__(self, plan: Plan, train: Train):
        self.plan, self.train = plan, train
        self.folder, self.settings = plan.folder, plan.settings
        self.numbers: dict[str, str] = {}  # {config hash: "3/7"}, for log lines

    def run(self) -> int:
        """Runs the jobs of a grid that are not done. Returns the exit status."""
        drafts = self.plan.drafts()
        self.numbers = {draft.hash: f"{number}/{len(drafts)}" for number, draft in enumerate(drafts, 1)}
        unfinished = self.enter(drafts)
        try:
            self._launch_in_stages(unfinished)
            self.wait_for_others(unfinished)
        finally:  # a sweep that the user stops has a report, too
            self._end_killed(unfinished, "its process was killed")
            status = self.conclude([draft.hash for draft in drafts])
        return status

    def enter(self, drafts: Sequence[Draft]) -> list[JobEntry]:
        """Adds new jobs to the manifest. Returns the jobs that are to run."""
        make_folder(self.folder)
        match, budget, command = self.settings.match, self.plan.compute.budget, self.plan.composer.command
        first = self.settings.first_stage.model_dump() if self.settings.first_stage else None
        with changing(self.folder, Manifest(self.settings.name, match, budget, command, versions())) as manifest:
            before = describe_budget(manifest.match, manifest.budget, manifest.first_stage)
            now = describe_budget(match, budget, first)
            if manifest.jobs and before != now:  # one report compares all jobs of a folder
                raise ConfigError(
                    f"sweep.name={self.settings.name}: {self.folder} holds jobs with {before}, and this sweep has "
                    f"{now}: set another sweep.name, or that budget"
                )
            self._check_weights(drafts, manifest)
            manifest.match, manifest.budget, manifest.first_stage = match, budget, first
            manifest.command, manifest.versions = command, versions()
            manifest.jobs += [self._entry(draft) for draft in drafts if manifest.job(draft.hash) is None]
            overrides = [settings_for_label(job) for job in manifest.jobs]
            without = (*NOT_IN_LABELS, *MATCHED_KEYS.get(match, ()))
            patterns = labels([_of_attention(job) for job in overrides], without)
            for job, label, pattern in zip(manifest.jobs, labels(overrides, without), patterns, strict=True):
                job.label = label or job.label
                job.pattern = None if job.flops is None else pattern or job.label
                if job.state == RUNNING and not is_running(self.folder, job):
                    job.end(INTERRUPTED, 0.0, "killed")
            jobs = [manifest.job(draft.hash) for draft in drafts]
            for job, draft in zip(jobs, drafts, strict=True):
                # Run this command line's overrides: those of a manifest from elsewhere could name any code.
                job.overrides, job.command, job.folder = self._overrides(draft)
        return [job for job in jobs if self._is_to_run(job)]

    def _check_weights(self, drafts: Sequence[Draft], manifest: Manifest) -> None:
        """Raises ConfigError if a finished first stage has lost the weights from which a job is to start."""
        for draft in drafts:
            stage, job = manifest.job(draft.first_stage or ""), manifest.job(draft.hash)
            if stage is None or stage.state != DONE or (job is not None and job.state == DONE):
                continue
            weights, own = (self.folder / hash / "checkpoints" / "last.ckpt" for hash in (stage.hash, draft.hash))
            if not weights.is_file() and not own.is_file():  # a job that has begun continues from its own
                raise ConfigError(
                    f"sweep.name={self.settings.name}: must have {weights}, the weights of the finished first stage "
                    f"from which {draft.config['attention']['name']} seed={draft.config['seed']} starts: restore them, "
                    "or set another sweep.name"
                )

    def _entry(self, draft: Draft) -> JobEntry:
        overrides, command, folder = self._overrides(draft)
        return JobEntry(
            hash=draft.hash,
            label=draft.config["name"],
            overrides=overrides,
            seed=draft.config["seed"],
            baseline=draft.role == PATTERN and draft.config["attention"]["name"] == self.settings.baseline,
            folder=folder,
            command=command,
            role=draft.role,
            first_stage=draft.first_stage,
            flops=draft.flops,
        )

    @staticmethod
    def _overrides(draft: Draft) -> tuple[list[str], str, str]:
        """Returns a job's overrides, the command that runs it alone, and its folder relative to the sweep's."""
        lines = as_lines(draft.overrides)
        return lines, f"python train.py {shlex.join(lines)}".strip(), draft.hash

    def _is_to_run(self, job: JobEntry) -> bool:
        """Whether the job is to run; logs the reason if not."""
        if job.state == DONE:
            log.info("job %s %s: already done", self.numbers[job.hash], job.name)
            return False
        if job.state in (FAILED, OUT_OF_MEMORY) and not self.settings.retry_failed:
            reason = f"{job.state}, and sweep.retry_failed=false"
            log.info("job %s %s: %s", self.numbers[job.hash], job.name, reason)
            return False
        return True

    def _launch_in_stages(self, jobs: Sequence[JobEntry]) -> None:
        """Launches the first stages, and then every other job once its first stage is done, in whichever process."""
        self.launch([job for job in jobs if job.role == FIRST_STAGE])
        left = [job for job in jobs if job.role != FIRST_STAGE]
        while left:
            manifest = read_manifest(self.folder)
            ready = [job for job in left if job.first_stage is None or manifest.job(job.first_stage).state == DONE]
            if ready:
                self.launch(ready)
                left = [job for job in left if job not in ready]
            elif not self._finish_first_stage(left[0].first_stage):
                left = [job for job in left if job.first_stage != left[0].first_stage]

    def _finish_first_stage(self, hash: str) -> bool:
        """Waits for the process that trains a first stage, and trains it here if that process does not finish it.
        Returns whether the stage is done."""
        if is_running(self.folder, read_manifest(self.folder).job(hash)):
            log.info("job %s first stage: trains in another process; its jobs wait", self.numbers[hash])
        state = self._finish(hash)
        if state != DONE:
            log.info("job %s first stage: %s, so its jobs cannot start", self.numbers[hash], state)
        return state == DONE

    def wait_for_others(self, jobs: Sequence[JobEntry]) -> None:
        """Waits for those of the jobs that other processes run, and runs here what these processes do not finish."""
        while running := [job for job in read_manifest(self.folder).of(jobs) if self._runs_elsewhere(job)]:
            for job in running:
                log.info("waits for job %s %s, which runs in another process", self.numbers[job.hash], job.name)
            for job in running:
                self._finish(job.hash)

    def _runs_elsewhere(self, job: JobEntry) -> bool:
        return job.state != DONE and is_running(self.folder, job)

    def _finish(self, hash: str) -> str:
        """Waits for the process that runs a job, and runs it here if that process does not finish it. Returns the
        job's state."""
        with lock(self.folder, hash):  # released when that process is done with the job, or gone
            job = read_manifest(self.folder).job(hash)
        if job.state not in (DONE, FAILED, OUT_OF_MEMORY):
            self.launch([job])
        return read_manifest(self.folder).job(hash).state

    def launch(self, jobs: Sequence[JobEntry]) -> None:
        """Hands jobs to the launcher and waits for them.

        When the launcher itself fails (joblib ends all workers when one is killed), the jobs that had started are
        interrupted, and the others are launched again.
        """
        worker = Worker(self.train, self.folder, self.numbers, self.settings.isolate)
        while jobs:
            launcher = self.plan.composer.launcher(self.folder, worker)
            try:
                with letting_workers_save(launcher):
                    returns = launcher.launch([job.overrides for job in jobs], 0)
            except Exception as error:
                log.warning("the launcher failed: %s: %s", type(error).__name__, one_line(error))
                left = self._end_killed(jobs, f"its process ended: {type(error).__name__}")
                if len(left) == len(jobs):
                    raise
                jobs = left
                continue
            for job, result in zip(jobs, returns, strict=True):
                if result.status is JobStatus.FAILED:  # an error outside of worker.run_job
                    self._end_unstarted(job, reason_of(result._return_value))
            return

    def _end_killed(self, jobs: Sequence[JobEntry], reason: str) -> list[JobEntry]:
        """Ends running jobs that have no process any more. Returns the jobs that never started."""
        with changing(self.folder) as manifest:
            entries = manifest.of(jobs)
            for job in entries:
                if job.state == RUNNING and not is_running(self.folder, job):
                    job.end(INTERRUPTED, 0.0, reason)
            return [job for job in entries if job.state == WAITING]

    def _end_unstarted(self, job: JobEntry, reason: str) -> None:
        """Writes to the manifest why a job could not start."""
        with changing(self.folder) as manifest:
            entry = manifest.job(job.hash)
            if entry.state in (WAITING, RUNNING, INTERRUPTED) and not is_running(self.folder, entry):
                entry.end(FAILED, 0.0, reason)
                log.info("job %s %s: failed: %s", self.numbers[job.hash], job.name, reason)

    def conclude(self, hashes: Sequence[str]) -> int:
        """Writes the report and logs the state of the sweep. Returns the exit status."""
        report(self.folder)
        manifest = read_manifest(self.folder)
        jobs = [manifest.job(hash) for hash in hashes]
        done = sum(job.state == DONE for job in jobs)
        log.info("%d of %d jobs done: %s", done, len(jobs), self.folder)
        for job in jobs:
            if job.state != DONE:
                log.info("  %s: %s%s", job.name, job.state, f": {job.exit_reason}" if job.exit_reason else "")
        if (page := self.folder / "report" / "report.html").is_file():
            log.info("report: %s", page)
        return 0 if done == len(jobs) else 1


@contextlib.contextmanager
def letting_workers_save(launcher: Any) -> Iterator[None]:
    """While joblib's workers run, delays a first Ctrl-C until they have saved and ended; a second one counts at once.

    The terminal sends Ctrl-C to the workers as well. An exception here would make joblib kill them.
    """
    if "joblib" not in type(launcher).__module__:
        yield
        return
    interrupts: list[int] = []

    def delay(number: int, _: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if interrupts:
            raise KeyboardInterrupt


def settings_for_label(job: JobEntry) -> Overrides:
    """Returns the overrides that a job's label may contain: without what follows from its role."""
    overrides = as_overrides(job.overrides)
    if job.flops is not None:
        overrides["sweep.flops"] = f"{job.flops:.6g}"
    if job.role == PATTERN:
        return {key: value for key, value in overrides.items() if job.first_stage is None or key != "init_from"}
    length = overrides["data.sequence_length"]
    own = ("data.sequence_length", "data.seed", "evaluation.by_context.", "evaluation.limit", "init_from")
    shared = {key: value for key, value in overrides.items() if not key.startswith(own)}
    return shared | {"attention": f"{job.role} {length}"}


def _of_attention(overrides: Overrides) -> Overrides:
    return {key: value for key, value in overrides.items() if key.lstrip("+~").startswith("attention")}


def describe_budget(match: str | None, budget: Budget, first_stage: Mapping[str, Any] | None) -> str:
    """Returns a match, its budget and the first stage as overrides."""
    stage = [
        f"sweep.first_stage.{key}={as_override(value)}"
        for key, value in (first_stage or {}).items()
        if value is not None
    ]
    if match is None or budget is None:
        return " ".join(["sweep.match=null", *stage])
    ((key, value),) = budget.items()
    if isinstance(value, list):  # a sweep may go on with more budgets
        return " ".join([f"sweep.match={match} sweep.{key}=[...]", *stage])
    return " ".join([f"sweep.match={match} sweep.{key}={value:.12g}", *stage])


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that results depend on."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: of(name) for name in ("torch", "lightning", "farsight")}}
