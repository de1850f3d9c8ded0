"""From a sweep's command line to its settings and jobs, before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.pretrained import with_pretrained
from configs.schema import Seed
from configs.tokenizer import inherit_tokenizer
from configs.trust import trust_named
from configs.validation import validated
from model.training.run_folder import config_hash
from scripts.sweeping.budget import ComputeMatch
from scripts.sweeping.composer import Composer, as_lines
from scripts.sweeping.points import Overrides, dimensions_of, fitting, product, with_baseline, with_command_line
from scripts.sweeping.settings import Settings


@dataclass
class Draft:
    """A job that may not be in the manifest yet."""

    overrides: Overrides
    config: dict[str, Any]

    @property
    def hash(self) -> str:
        return config_hash(self.config)


class Plan:
    """The settings of a sweep's command line, and its jobs. Raises ConfigError for wrong settings, one line."""

    def __init__(self, composer: Composer):
        self.composer = composer
        master = composer.master
        settings = OmegaConf.to_container(master["sweep"], resolve=True, throw_on_missing=True)
        self.settings = Settings.of(settings, given=[each.key_or_group for each in (*composer.sweep, *composer.own)])
        self.compute = ComputeMatch(self.settings)
        self.folder = (Path(master["outputs"]) / self.settings.name).absolute()

    def drafts(self) -> list[Draft]:
        """Returns all jobs of the grid, each with its budget."""
        before = dimensions_of(self.settings.vary)
        dimensions, fixed = with_command_line(before, self.composer.own)
        dimensions = with_baseline(before, dimensions, self.settings.baseline)
        jobs = fitting(product(dimensions, fixed), self.has_key)
        self.compute.check(jobs)
        return [self.draft(job) for job in jobs]

    def draft(self, job: Overrides) -> Draft:
        """Returns the job of these overrides with its budget."""
        logger = self._plain(job)["logger"]
        if logger["name"] == "wandb" and logger["group"] is None:
            job = job | {"logger.group": self.settings.name}
        validated(Seed, self._plain(job)["seed"], "seed")  # the manifest holds it
        job = self.compute.overrides(job, self._plain(job))
        return Draft(job, self._plain(job))

    def _plain(self, job: Overrides) -> dict[str, Any]:
        plain = OmegaConf.to_container(self.composer.job(job), resolve=True, throw_on_missing=True)
        return inherit_tokenizer(with_pretrained(trust_named(plain)), as_lines(job))

    def has_key(self, job: Overrides, key: str) -> bool:
        """Whether the config that `job` composes has this key."""
        node: Any = self.composer.job(job)
        for name in key.lstrip("~").split("."):
            if not OmegaConf.is_dict(node) or name not in list(node.keys()):  # `in node` is False for a missing value
                return False
            node = node._get_node(name)
        return True
