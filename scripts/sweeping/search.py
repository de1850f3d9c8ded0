"""sweep=search: Optuna proposes what to try, by what the jobs before have found.

Jobs are those of any sweep: full attention first, one manifest, one footing, resumable. Optuna itself keeps nothing.
What it proposes depends on its seed and on what it is told, so a search that is launched again proposes the same from
the beginning: jobs that are done are told and not run, and where they end it goes on.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from configs.errors import ConfigError, as_override
from configs.schema import Search
from configs.validation import validated
from model.training.run_folder import RunFolder
from scripts.sweeping import manifest as records
from scripts.sweeping.launch import Sweep
from scripts.sweeping.manifest import DONE, Job
from scripts.sweeping.points import Overrides

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interval:
    """A number from `low` to `high`, both included; whole where both are."""

    low: float
    high: float
    log: bool = False


Space = dict[str, list[str] | Interval]
"""What each setting may be: one of some values, or a number in an interval."""


def search(sweep: Sweep) -> int:
    """Runs what is missing of a search. Returns the exit status."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep=search needs Optuna: pip install 'farsight[sweep]'") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = validated(Search, sweep.settings.search, "sweep.search")
    space, fixed = space_of(sweep.settings.vary, sweep.composer.own, sweep.composer.parse)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed, constant_liar=True))
    hashes: list[str] = []

    def run(jobs: list[Overrides]) -> list[Job]:
        """In the manifest from here on, run where they are missing, and as they ended."""
        drafts = [sweep.draft(job) for job in jobs]
        hashes.extend(draft.hash for draft in drafts if draft.hash not in hashes)
        total = max(len(hashes), settings.trials + bool(sweep.settings.baseline))
        sweep.numbers |= {hash: f"{number}/{total}" for number, hash in enumerate(hashes, 1)}
        missing = sweep.enter(drafts)
        if missing:
            sweep.launch(missing)
        manifest = records.read_manifest(sweep.folder)
        return [manifest.job(draft.hash) for draft in drafts]

    try:
        if sweep.settings.baseline:
            run([fitting_baseline(sweep, space, fixed)])
        while (left := settings.trials - len(study.trials)) > 0:
            trials = [study.ask() for _ in range(min(left, settings.at_once))]
            jobs = run(
                [{key: suggest(trial, key, values) for key, values in space.items()} | fixed for trial in trials]
            )
            for trial, job in zip(trials, jobs, strict=True):
                value = quality(sweep, job, settings.minimize)
                study.tell(trial, value, None if value is not None else optuna.trial.TrialState.FAIL)
    finally:
        status = sweep.conclude(hashes)
    if status == 0:
        log.info("best: %s with %s", f"{settings.minimize}={study.best_value:.4f}", study.best_params)
    return status


def quality(sweep: Sweep, job: Job, key: str) -> float | None:
    """What the search minimizes; None of a job that is not done. Raises ConfigError where the summary has none."""
    if job.state != DONE:
        return None
    summary = RunFolder(sweep.folder / job.folder).read_summary()
    if not isinstance(summary.get(key), int | float):
        numbers = ", ".join(name for name, value in summary.items() if isinstance(value, int | float))
        raise ConfigError(f"sweep.search.minimize={key}: must be a number of summary.json: {numbers}")
    return float(summary[key])


def fitting_baseline(sweep: Sweep, space: Space, fixed: Overrides) -> Overrides:
    """Full attention, with what is set in every job, as far as it has such keys."""
    job = fixed | {"attention": sweep.settings.baseline}
    doubtful = [key for key in job if key.startswith("attention.")]
    certain = {key: value for key, value in job.items() if key not in doubtful}
    return certain | {key: job[key] for key in doubtful if sweep.has_key(certain, key)}


def space_of(vary: Mapping[str, Any], command_line: Sequence[Override], parse: Any) -> tuple[Space, Overrides]:
    """What is searched, and what is set in every job. Values of `vary` are lists, or intervals as Hydra writes them:
    interval(0.1, 1), or tag(log, interval(0.001, 0.1))."""
    space: Space = {}
    for key, values in vary.items():
        if isinstance(values, list) and values:
            space[key] = [as_override(value) for value in values]
        elif isinstance(values, str):
            (override,) = parse([f"{key}={values}"])
            space[key] = choices(override)
        elif values is not None:
            raise ConfigError(f"sweep.vary.{key}={values}: must be a list of values, or interval(low, high)")
    fixed: Overrides = {}
    for override in command_line:
        key = override.get_key_element()
        if not override.is_sweep_override():
            space.pop(key, None)
            fixed[key] = override.get_value_element_as_str()
        elif key == "seed":
            raise ConfigError(f"{override.input_line}: a search takes one seed")
        else:
            space[key] = choices(override)
    if not space:
        raise ConfigError("sweep.vary={}: a search needs something that varies")
    return space, fixed


def choices(override: Override) -> list[str] | Interval:
    """Of `key=1,2`, `key=range(1,5)` or `key=interval(1,5)`."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return Interval(interval.start, interval.end, "log" in interval.tags)


def suggest(trial: Any, key: str, values: list[str] | Interval) -> str:
    """Optuna's next value of a setting, as on the command line."""
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return str(trial.suggest_int(key, values.low, values.high, log=values.log))
    return f"{trial.suggest_float(key, values.low, values.high, log=values.log):.4g}"
