"""The jobs of sweeps as reports see them: their settings, states and numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.units import BITS, LOSS, Units, quality_in, units_in
from scripts.reporting.manifest import DONE, FAILED, INTERRUPTED, OUT_OF_MEMORY, PATTERN, RUNNING, WAITING

STATES = (DONE, RUNNING, WAITING, INTERRUPTED, OUT_OF_MEMORY, FAILED)
"""States of a job, in the order of the report."""

TOTALS = {
    "total_tokens": ("train_tokens",),
    "total_seconds": ("train_seconds",),
    "total_flops": ("train_tokens", "flops_per_token"),
}
"""{cost of both stages together: numbers of summary.json whose product is the cost of one stage}."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep, done or not."""

    sweep: str  # the name of its sweep; "" for a run without one
    folder: Path
    hash: str
    label: str  # the settings that differ between jobs, without the seed
    state: str  # one of STATES
    seed: int | None = None
    baseline: bool = False  # whether other jobs are compared with it: dense attention
    role: str = PATTERN  # one of those of manifest.py
    first_stage: "Job | None" = field(default=None, repr=False)  # the job from whose weights it started
    flops: float | None = None  # its budget, in a sweep of several
    pattern: str = ""  # there, the part of the label that describes the attention
    context: str = ""  # equal for jobs that differ only in attention and seed
    shared: str = ""  # as `context`, without what a control has of its own: its length, its evaluation, its RoPE
    overrides: tuple[str, ...] = ()
    command: str = ""  # reproduces this job alone
    exit_reason: str | None = None
    traceback: str | None = None
    started: str | None = None
    ended: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None  # the row of evaluation.json with the summary's results
    metrics: Sequence[Mapping[str, float]] = ()  # rows of metrics.csv, only finite numbers
    recall: Mapping[str, Mapping[int, tuple[int, int]]] = field(default_factory=dict)  # {task: {length: exact, asked}}
    problems: tuple[str, ...] = ()  # files that cannot be read, and why the job is not counted

    @property
    def counted(self) -> bool:
        """Whether the job is done and evaluated. Only such jobs contribute to the table's numbers."""
        return self.state == "done" and self.evaluation is not None

    @property
    def lossy(self) -> bool:
        """Whether its tokenizer loses text: its bits per byte count the original text."""
        return "lossy" in ((self.evaluation or {}).get("tokenizer") or {})

    @property
    def units(self) -> Units:
        """The units of the job's losses."""
        return units_in(self.evaluation or self.summary)

    @property
    def quality(self) -> str:
        """The number by which the job is compared: BITS, or LOSS where there are no bits per byte."""
        return quality_in(self.units)

    def sizes_of_documents(self) -> list[int] | None:
        """Returns what `quality` counts in each document of the evaluation: its bytes or its tokens. None if missing,
        as in early versions and for an evaluation without losses by document."""
        by_document = (self.evaluation or {}).get("by_document") or {}
        return by_document.get("bytes" if self.quality == BITS else "tokens")

    def number(self, name: str) -> float | None:
        """Returns a finite number of the held-out evaluation (BITS, LOSS) or summary; None if missing."""
        if name in TOTALS:
            return self._total(name)
        if name == BITS and BITS not in self.units:  # an early version wrote it for every run
            return None
        source = self.evaluation if name in (BITS, LOSS) else self.summary
        return finite((source or {}).get(name))

    def _total(self, name: str) -> float | None:
        """Returns the sum of a cost over both stages; None without a first stage, or where a number is missing."""
        if self.first_stage is None:
            return None
        costs = [[finite(job.summary.get(key)) for key in TOTALS[name]] for job in (self.first_stage, self)]
        return None if any(None in factors for factors in costs) else sum(map(math.prod, costs))

    def setting(self, group: str, key: str) -> Any:
        """Returns a setting of the job's config; None if missing."""
        return setting_in(self.config, group, key)


@dataclass(frozen=True)
class Sweep:
    """Jobs that were launched together, or runs without a manifest that are shown together."""

    name: str  # "" without a manifest
    folder: Path
    jobs: tuple[Job, ...]
    match: str | None = None  # tokens | time | flops
    budget: Mapping[str, Any] | None = None
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    replaced: tuple[str, ...] = ()  # the hashes of jobs that are left out: a later one has the same overrides and seed
    timed: bool = True  # whether the jobs' times compare: none of them shared its device


def finite(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def setting_in(config: Mapping[str, Any], group: str, key: str) -> Any:
    """Returns a setting of a config; None if missing."""
    settings = config.get(group)
    return settings.get(key) if isinstance(settings, Mapping) else None


def same_text(jobs: Iterable[Job]) -> bool:
    """Whether the jobs were evaluated on the same held-out text, or on the same tokens where losses are per token. The
    quality of other jobs does not compare."""
    found: dict[str, set[str]] = {key: set() for key in ("documents_digest", "documents", "bytes", "tokenizer")}
    for job in jobs:
        row = dict(job.evaluation or {})
        if job.quality == BITS:
            row["tokenizer"] = None
        for key, values in found.items():
            values.add(str(row.get(key)))
    found["documents_digest"].discard("None")  # early versions wrote none
    return all(len(each) <= 1 for each in found.values())
