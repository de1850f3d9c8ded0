"""sweep=search: Optuna proposes settings from the results of earlier jobs.

As in every sweep, full attention is the first job, all jobs have equal budgets, and the manifest makes them resumable.
Optuna stores nothing. Its proposals depend on its seed and on the results alone, so a search that is launched again
proposes the same settings from the beginning: finished jobs are reported to Optuna without running again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from configs.errors import ConfigError, as_override
from configs.schema import Search
from configs.validation import validated
from data.units import quality_in, units_in
from model.training.run_folder import RunFolder
from scripts.reporting.manifest import DONE, JobEntry, read_manifest
from scripts.sweeping.plan import LENGTH, Plan
from scripts.sweeping.points import Overrides
from scripts.sweeping.sweep import Sweep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included; integers if both bounds are."""

    low: float
    high: float
    log: bool = False


Space = dict[str, list[str] | Interval]
"""{setting: its values, or an interval of numbers}."""


def search(sweep: Sweep) -> int:
    """Runs the trials of a search that are not done. Returns the exit status."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep=search: needs Optuna: pip install 'farsight[sweep]'") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan = sweep.plan
    settings = validated(Search, plan.settings.search, "sweep.search")
    space, fixed = space_of(plan.settings.vary, plan.composer.own, plan.composer.parse)
    longest = plan.longest(*of_lengths(space, fixed))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed, constant_liar=True))
    hashes: list[str] = []

    def run(jobs: list[Overrides]) -> list[JobEntry]:
        """Enters jobs into the manifest, runs those that are not done, and returns their entries."""
        drafts = [plan.draft(plan.on_the_text_of(longest, job)) for job in jobs]
        hashes.extend(draft.hash for draft in drafts if draft.hash not in hashes)
        total = max(len(hashes), settings.trials + bool(plan.settings.baseline))
        sweep.numbers |= {hash: f"{number}/{total}" for number, hash in enumerate(hashes, 1)}
        unfinished = sweep.enter(drafts)
        if unfinished:
            sweep.launch(unfinished)
            sweep.wait_for_others(unfinished)
        manifest = read_manifest(plan.folder)
        return [manifest.job(draft.hash) for draft in drafts]

    try:
        if plan.settings.baseline:
            run([baseline_overrides(plan, fixed)])
        while (left := settings.trials - len(study.trials)) > 0:
            trials = [study.ask() for _ in range(min(left, settings.at_once))]
            jobs = run(
                [{key: suggest(trial, key, values) for key, values in space.items()} | fixed for trial in trials]
            )
            for trial, job in zip(trials, jobs, strict=True):
                found = quality(plan.folder, job, settings.minimize)
                if found is None:
                    study.tell(trial, None, optuna.trial.TrialState.FAIL)
                else:
                    minimized, value = found
                    study.tell(trial, value)
    finally:
        status = sweep.conclude(hashes)
    if status == 0:
        log.info("best: %s with %s", f"{minimized}={study.best_value:.4f}", study.best_params)
    return status


def quality(folder: Path, job: JobEntry, key: str | None) -> tuple[str, float] | None:
    """Returns (name, value) of the number of summary.json that the search minimizes; None if the job is not done.

    key: the name; None is that of the run's quality (data/units.py).

    Raises:
        ConfigError: summary.json has no such number.
    """
    if job.state != DONE:
        return None
    summary = RunFolder(folder / job.folder).read_summary()
    key = key or quality_in(units_in(summary))
    if not isinstance(summary.get(key), int | float):
        numbers = ", ".join(name for name, value in summary.items() if isinstance(value, int | float))
        raise ConfigError(f"sweep.search.minimize={key}: must be a number of summary.json, one of {numbers}")
    return key, float(summary[key])


def baseline_overrides(plan: Plan, fixed: Overrides) -> Overrides:
    """Returns the overrides of full attention: those of every job, without keys that full attention lacks."""
    job = fixed | {"attention": plan.settings.baseline}
    doubtful = [key for key in job if key.startswith("attention.")]
    certain = {key: value for key, value in job.items() if key not in doubtful}
    return certain | {key: job[key] for key in doubtful if plan.has_key(certain, key)}


def of_lengths(space: Space, fixed: Overrides) -> tuple[list[Overrides], list[str]]:
    """Returns jobs of which one has the longest sequences that a trial can have, and the values of LENGTH in the space.
    The jobs have each value of each group, such as `experiment`, which may set that length."""
    certain = {key: value for key, value in fixed.items() if not key.startswith("attention.")}
    groups = {key: values for key, values in space.items() if "." not in key and isinstance(values, list)}
    jobs = [certain | {key: value} for key, values in groups.items() for value in values]
    lengths = space.get(LENGTH, [])
    return [certain, *jobs], lengths if isinstance(lengths, list) else [str(lengths.high)]


def space_of(vary: Mapping[str, Any], command_line: Sequence[Override], parse: Any) -> tuple[Space, Overrides]:
    """Returns the search space, and the overrides that every job has.

    Args:
        vary: {setting: a list of values, or an interval in Hydra's grammar: interval(0.1, 1), or
            tag(log, interval(0.001, 0.1))}.
        parse: parses lines of overrides.
    """
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
            raise ConfigError(f"{override.input_line}: must be one seed in a search")
        else:
            space[key] = choices(override)
    if not space:
        raise ConfigError("sweep.vary={}: must have at least one setting in a search")
    return space, fixed


def choices(override: Override) -> list[str] | Interval:
    """Returns the values of `key=1,2`, `key=range(1,5)` or `key=interval(1,5)`."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return Interval(interval.start, interval.end, "log" in interval.tags)


def suggest(trial: Any, key: str, values: list[str] | Interval) -> str:
    """Returns Optuna's next value of a setting, as on the command line."""
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return str(trial.suggest_int(key, values.low, values.high, log=values.log))
    return f"{trial.suggest_float(key, values.low, values.high, log=values.log):.4g}"
