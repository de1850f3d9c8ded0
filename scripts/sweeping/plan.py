"""From a sweep's command line to its settings and jobs, before anything is written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs import on_any_machine
from configs.errors import ConfigError, as_override
from configs.mixture import with_whole_sources
from configs.pretrained import with_pretrained
from configs.schema import Seed
from configs.tokenizer import complete, inherit_tokenizer
from configs.trust import trust_named
from configs.validation import validated
from model.training.run_folder import config_hash
from scripts.console import counted, progress_bar
from scripts.reporting.manifest import CONTROL, FIRST_STAGE, PATTERN
from scripts.sweeping.budget import ComputeMatch, check_step_types
from scripts.sweeping.composer import Composer, as_lines
from scripts.sweeping.points import Overrides, dimensions_of, fitting, product, with_baseline, with_command_line
from scripts.sweeping.settings import Settings
from scripts.sweeping.short_context import control_of, first_stage_of

log = logging.getLogger(__name__)

LENGTH = "data.sequence_length"


@dataclass
class Draft:
    """A job that may not be in the manifest yet."""

    overrides: Overrides
    config: dict[str, Any]
    role: str = PATTERN  # one of those of manifest.py
    first_stage: str | None = None  # the hash of the job from whose weights it starts
    flops: float | None = None  # its budget, in a sweep of several

    @property
    def hash(self) -> str:
        return config_hash(self.config)


class Plan:
    """The settings of a sweep's command line, and its jobs. Raises ConfigError for wrong settings, one line."""

    def __init__(self, composer: Composer):
        self.composer = composer
        master = composer.master
        settings = OmegaConf.to_container(master["sweep"], resolve=True, throw_on_missing=True)
        self.given = [each.key_or_group for each in (*composer.sweep, *composer.own)]
        self.settings = Settings.of(settings, self.given)
        self.compute = ComputeMatch(self.settings.match, self.settings.budget)
        self.place = Path(master["outputs"]) / self.settings.name
        self.folder = self.place.absolute()

    def drafts(self) -> list[Draft]:
        """Returns all jobs, each with its budget: the first stages, and then those of the grid."""
        before = dimensions_of(self.settings.vary)
        dimensions, fixed = with_command_line(before, self.composer.own)
        dimensions = with_baseline(before, dimensions, self.settings.baseline)
        given = {override.get_key_element() for override in self.composer.own}
        varied = {key for dimension in before for key in dimension.keys}
        # A command line that chooses fewer patterns leaves out the settings that the YAML file has for the others.
        optional = varied - given if "attention" in given else set()
        jobs = fitting(product(dimensions, fixed), self.has_key, optional)
        self.compute.check(jobs)
        if self.settings.match in ("tokens", "flops"):  # such a budget is counted in steps of each job
            with on_any_machine():
                for job in jobs:
                    check_step_types(self._plain(job))
        # Those of the YAML file count, too, so that a sweep of some of its lengths can go on with the others.
        of_file = [point[each.keys.index(LENGTH)] for each in before if LENGTH in each.keys for point in each.points]
        longest = self.longest(jobs, of_file)
        jobs = [self.on_the_text_of(longest, job) for job in jobs]
        stages: dict[str, Draft] = {}
        drafts = []
        with progress_bar(f"{self.settings.name}, planning {counted(len(jobs), 'job')}", len(jobs)) as progress:
            for job in jobs:
                drafts += self._drafts_of(job, stages)
                progress(1)
        if self.settings.budgets:
            _check_same_data(drafts)
        if self.settings.control and all(d.config["attention"]["name"] != self.settings.baseline for d in drafts):
            log.info("no control, a shorter run of the baseline: no job has attention=%s", self.settings.baseline)
        order = [lambda d: d.config["attention"]["name"] != self.settings.baseline, lambda d: d.role == CONTROL]
        drafts.sort(key=lambda draft: [each(draft) for each in order])
        return [*stages.values(), *{draft.hash: draft for draft in drafts}.values()]

    def _drafts_of(self, job: Overrides, stages: dict[str, Draft]) -> list[Draft]:
        """Returns a job and its control with their budgets. Adds its first stage to `stages`, by its hash."""
        stage = None
        if self.settings.first_stage is not None:
            job = self._without_start(job)
            stage = self._first_stage(job)
            stage = stages.setdefault(stage.hash, stage)
        drafts = self._with_budgets(job, PATTERN, stage)
        if self.settings.control and drafts[-1].config["attention"]["name"] == self.settings.baseline:
            shorter = self._control(job)
            drafts += [] if shorter is None else self._with_budgets(shorter, CONTROL, stage)
        return drafts

    def _with_budgets(self, job: Overrides, role: str, stage: Draft | None) -> list[Draft]:
        """Returns the job with the budget of all jobs, or once with each of several."""
        return [self.draft(job, role, stage, flops) for flops in self.settings.budgets or [None]]

    def draft(
        self, job: Overrides, role: str = PATTERN, first_stage: Draft | None = None, flops: float | None = None
    ) -> Draft:
        """Returns the job of these overrides with its budget.

        Args:
            first_stage: the job from whose weights it starts.
            flops: its budget, in a sweep of several.
        """
        logger = self._plain(job)["logger"]
        if logger["name"] == "wandb" and logger["group"] is None:
            job = job | {"logger.group": self.settings.name}
        validated(Seed, self._plain(job)["seed"], "seed")  # the manifest holds it
        compute = self.first_compute if role == FIRST_STAGE else self.compute
        compute = compute if flops is None else compute.of(flops)
        job = compute.overrides(job, self._plain(job))
        if first_stage is None:
            return Draft(job, self._plain(job), role, flops=flops)
        # The path as it was given: a sweep whose outputs are a relative path continues on another machine.
        job = job | {"init_from": as_override(str(self.place / first_stage.hash / "last"))}
        return Draft(job, self._plain(job), role, first_stage.hash)

    def longest(self, jobs: Sequence[Overrides], values: Sequence[str]) -> int:
        """Returns the length of the longest training sequences, in tokens: of the jobs, and of `values` of LENGTH.
        Values that are no numbers are refused when their job is drafted."""
        lengths = [self._plain(job)["data"]["sequence_length"] for job in jobs]
        lengths += [int(value) for value in values if value.isdecimal()]
        return max((length for length in lengths if isinstance(length, int)), default=0)

    def on_the_text_of(self, longest: int, job: Overrides) -> Overrides:
        """Returns the overrides of a job that is scored on the same text as one with sequences of `longest` tokens:
        evaluation.limit=auto is more text for longer sequences."""
        config = self._plain(job)
        length, limit = config["data"]["sequence_length"], config["evaluation"]["limit"]
        if limit != "auto" or not isinstance(length, int) or length >= longest:
            return job
        from data.excerpts import default_limit

        limit = default_limit(longest)
        return job if default_limit(length) == limit else job | {"evaluation.limit": str(limit)}

    def _without_start(self, job: Overrides) -> Overrides:
        """Returns the overrides of a job without weights to start from, which its first stage gives it."""
        if job.get("init_from", "null") != "null":
            raise ConfigError(
                f"init_from={job['init_from']}: must be left out with sweep.first_stage, whose weights the jobs start "
                "from; sweep.first_stage.init_from starts it from a run, and sweep.first_stage=null the jobs"
            )
        return job if self._plain(job)["init_from"] is None else job | {"init_from": "null"}  # an experiment's

    def _control(self, job: Overrides) -> Overrides | None:
        """Returns the overrides of the control of a job of the baseline; None if the length that the YAML file has for
        it does not fit the job's sequences."""
        try:
            return control_of(job, self._plain(job), self.settings.control, self.settings.first_stage is not None)
        except ConfigError as error:
            if "sweep.control" in self.given:
                raise
            log.info("no control, a shorter run of the baseline: %s", error)
            return None

    def _first_stage(self, job: Overrides) -> Draft:
        settings = self.settings.first_stage
        assert settings is not None
        shorter = first_stage_of(job, self._plain(job), settings)
        return self.draft(shorter, FIRST_STAGE)

    @cached_property
    def first_compute(self) -> ComputeMatch:
        """Gives every first stage its tokens."""
        return ComputeMatch("tokens", {"tokens": self.settings.first_stage.tokens}, "sweep.first_stage")

    def _plain(self, job: Overrides) -> dict[str, Any]:
        plain = complete(self.composer.job(job), as_lines(job))
        own = trust_named({**plain, "data": with_whole_sources(plain["data"])})
        return inherit_tokenizer(with_pretrained(own), as_lines(job))

    def has_key(self, job: Overrides, key: str) -> bool:
        """Whether the config that `job` composes has this key."""
        node: Any = self.composer.job(job)
        for name in key.lstrip("~").split("."):
            if not OmegaConf.is_dict(node) or name not in list(node.keys()):  # `in node` is False for a missing value
                return False
            node = node._get_node(name)
        return True


def _check_same_data(drafts: Sequence[Draft]) -> None:
    """Raises ConfigError if jobs of several budgets differ in their data: one law describes one corpus."""
    found: dict[str, dict[str, None]] = {}
    for draft in drafts:
        if draft.role == PATTERN:
            for key, value in draft.config["data"].items():
                if key not in ("seed", "batch_size"):
                    found.setdefault(key, {})[as_override(value)] = None
    for key, values in found.items():
        if len(values) > 1:
            raise ConfigError(
                f"data.{key}={','.join(values)}: must be one value with several budgets in sweep.flops, whose fit "
                "compares losses on the same data"
            )
