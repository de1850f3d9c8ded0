"""Gives every job of a sweep the same budget, as overrides of its trainer.

    tokens   the same training tokens
    time     the same seconds of training, without compilation, validation and evaluation
    flops    the same training FLOPs, counted on the layouts of the run's own sequences

A budget of null is the tokens or FLOPs that the first job (full attention, if the sweep has it) needs for its
trainer.max_steps. Run time is unknown in advance, so sweep.match=time needs seconds.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs import schema
from configs.errors import ConfigError
from configs.paths import check_documents
from configs.validation import validated
from model.training.run_folder import config_hash
from scripts.sweeping.points import Overrides
from scripts.sweeping.settings import MATCHES

if TYPE_CHECKING:
    from model.forecasting import PhaseCosts

MATCHED_KEYS = {
    "tokens": ("trainer.max_steps",),
    "flops": ("trainer.max_steps",),
    "time": ("trainer.max_steps", "trainer.max_seconds"),
}
"""The settings that each match determines, and that a sweep may therefore not vary."""

Budget = dict[str, Any] | None


class ComputeMatch:
    """Gives every job the same budget.

    Args:
        match: one of MATCHES, or None for no common budget.
        budget: None: that of the first job.
        group: where the budget stands in the config, for messages.
    """

    def __init__(self, match: str | None, budget: Budget, group: str = "sweep"):
        self.match, self.budget, self.group = match, budget, group
        self._data: dict[str, Any] = {}
        self._costs: dict[str, PhaseCosts] = {}  # of configs; several budgets of one job need the same

    def of(self, flops: float) -> "ComputeMatch":
        """Returns a match of one of several budgets. Both count FLOPs on the same data."""
        one = copy.copy(self)
        one.budget = {"flops": flops}
        return one

    def check(self, jobs: Sequence[Overrides]) -> None:
        """Raises ConfigError if the jobs differ in a setting that the match determines."""
        for key in MATCHED_KEYS.get(self.match, ()):
            values = dict.fromkeys(job.get(key) for job in jobs)
            if len(values) > 1:
                raise ConfigError(
                    f"{key}={','.join(map(str, values))}: must be one value with sweep.match={self.match}, which "
                    "determines it, or sweep.match must be null"
                )

    def overrides(self, job: Overrides, config: Mapping[str, Any]) -> Overrides:
        """Returns the job's overrides with its budget. `config` is the job's composed config without it."""
        if self.match is None:
            return job
        if self.match == "time":
            return self._same_time(job, config["trainer"])
        _check_step(config)
        from model.forecasting import steps_of_cost, total_cost

        phases = [(0, self._tokens(config))] if self.match == "tokens" else self._flops(config)
        key, steps = MATCHES[self.match], config["trainer"]["max_steps"]
        if self.budget is None:
            if steps is None:
                raise ConfigError(f"{self.group}.{key}=null: must be set where trainer.max_steps=null")
            self.budget = {key: total_cost(phases, steps)}
        fitting = round(steps_of_cost(phases, self.budget[key]))
        if fitting < 1:
            attention = f"attention={config['attention']['name']}"
            sizes = [f"{name}={value}" for name, value in job.items() if name.startswith("model.")]
            raise ConfigError(
                f"{self.group}.{key}={self.budget[key]:.12g}: must be at least one step of every job, "
                f"{phases[0][1]:.12g} with {' '.join([attention, *sizes])}"
            )
        return job if fitting == steps else job | {"trainer.max_steps": str(fitting)}

    def _same_time(self, job: Overrides, trainer: Mapping[str, Any]) -> Overrides:
        if self.budget is None:
            if trainer["max_seconds"] is None:
                raise ConfigError(
                    "sweep.seconds=null: must be the seconds of training of each job with sweep.match=time"
                )
            self.budget = {"seconds": trainer["max_seconds"]}
        return job | {"trainer.max_steps": "null", "trainer.max_seconds": str(self.budget["seconds"])}

    def _tokens(self, config: Mapping[str, Any]) -> int:
        from model.precision import devices_of

        data, trainer = config["data"], config["trainer"]
        batches = trainer["accumulate"] * devices_of(trainer) // trainer["context_parallel"]
        return data["sequence_length"] * data["batch_size"] * batches

    def _flops(self, config: Mapping[str, Any]) -> "PhaseCosts":
        from configs.build import build_data
        from configs.forecasting import flops_of_phases

        job = config_hash(config)
        if job in self._costs:
            return self._costs[job]
        key = str(sorted(config["data"].items()))
        if key not in self._data:
            self._data[key] = build_data(config["data"])
            self._data[key].setup()
        self._costs[job] = flops_of_phases(config, self._data[key])
        return self._costs[job]


def _check_step(config: Mapping[str, Any]) -> None:
    """Raises ConfigError where the tokens of a step cannot be counted, because no budget can be computed then."""
    from configs.group_checks import check_data, check_devices

    trainer = check_step_types(config)
    if config["init_from"]:  # its tokenizer may be gone, and the tokens of a step don't depend on it
        config = {**config, "data": {**config["data"], "tokenizer": {"_target_": "data.tokenizers.Bytes"}}}
    check_data(config)
    check_devices(trainer)


def check_step_types(config: Mapping[str, Any]) -> schema.Trainer:
    """As `_check_step`, of the types and the documents alone, without PyTorch. Returns the typed `trainer` group."""
    validated(schema.Data, config["data"], "data")
    validated(schema.Count, config["model"]["max_length"], "model.max_length")
    validated(schema.Phases, config["phases"], "phases")
    trainer = validated(schema.Trainer, config["trainer"], "trainer")
    check_documents(config["data"])
    return trainer
