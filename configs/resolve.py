"""From the config that a command line composes to the config of the run: as composed, or as the resumed run's own."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from configs import on_any_machine
from configs.aliases import upgrade
from configs.checks import check_types
from configs.errors import ConfigError
from configs.mixture import build_source, with_whole_sources
from configs.paths import check_documents, check_runs
from configs.pretrained import with_pretrained
from configs.tokenizer import complete, inherit_tokenizer
from configs.trust import trust, trust_named
from model.training.run_folder import RunFolder, find_checkpoint, folder_of

MOVABLE = ("data.path", "data.cache", "data.workers", "data.on_bad_document")
"""Data settings that a resumed run may change: the location of the same documents, the number of workers, and what is
done with documents that cannot be read, which may stop a run that streams them."""

KEPT = ("attention", "model", "data", "optimizer", "experiment", "phases", "seed")
"""Groups and keys that a resumed run keeps, `MOVABLE` and the batch size excepted."""


def resolve(config: DictConfig, new: bool = False) -> dict[str, Any]:
    """Returns the composed config as plain dicts, with all interpolations resolved. A wrong type is refused before
    PyTorch is imported.

    With `init_from=hf:...`, the sizes and the attention of model=hf and attention=hf are those of its config.json.
    With `resume`, this is the run's own config with the command line's overrides. Third-party classes in it are called
    only if `trust` names them (configs/trust.py). Overrides of its attention, model or data are a ConfigError; use
    `init_from` for those. The corpus may have moved (`MOVABLE`); train.py checks its fingerprint. Another number of
    devices may take another `data.batch_size`, so that a step trains on as many sequences as before.

    new: the run has no checkpoint of its own, unless `resume` names one. A run in `init_from`, and documents, that do
        not exist are then refused as early. Other runs may go on without them.
    """
    overrides = HydraConfig.get().overrides.task
    if config.get("resume"):
        check_kept(overrides)
    with on_any_machine():
        _check_before_pytorch(_as_plain(config, overrides), new)
    plain = _as_plain(config, overrides)
    if not plain["resume"]:
        return inherit_tokenizer(trust_named(plain), overrides)
    trust(plain.pop("trust", None))  # the run's own config trusts nothing
    run = RunFolder.open(folder_of(find_checkpoint(plain["resume"], prefer="last")))
    saved = with_later_keys(upgrade(run.read_config()), plain)
    batch_size, sequences = saved.data.batch_size, sequences_of(saved)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "init_from" and plain["init_from"]:
            raise ConfigError(f"{key}={value}: must be null with resume, which has weights already")
        if key == "trainer.accumulate" and OmegaConf.select(config, key) != saved.trainer.accumulate:
            raise ConfigError(
                f"{key}={value}: must be {saved.trainer.accumulate} as at the run's start, because its checkpoint "
                "counts micro-batches; to change it, start a new run with init_from"
            )
        OmegaConf.update(saved, key, OmegaConf.select(config, key))
    if saved.data.batch_size != batch_size and sequences_of(saved) != sequences:
        raise ConfigError(
            f"data.batch_size={saved.data.batch_size}: must make {sequences} sequences on all devices, as before; "
            f"it makes {sequences_of(saved)}"
        )
    resumed = OmegaConf.to_container(saved, resolve=True)
    resumed.pop("trust", None)
    return resumed


def resolve_evaluated(config: DictConfig) -> dict[str, Any]:
    """Returns the composed config of a command that evaluates a trained run, as plain values. Its group `data` names
    documents, which are read with the run's tokenizer.

    A source that cannot be evaluated, as files of tokens, is refused even where one of its keys, such as its tokenizer,
    is missing. A tokenizer on the command line is refused.
    """
    data = trust_named(OmegaConf.to_container(config, resolve=True)).get("data")
    if data:
        build_source(data).check_evaluated()
        for override in HydraConfig.get().overrides.task:
            key, _, value = override.lstrip("+~").partition("=")
            if key.replace("/", ".").startswith("data.tokenizer"):
                raise ConfigError(f"{key}={value}: must be left out: documents are read with the run's tokenizer")
    return trust_named(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def _as_plain(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    plain = complete(config, overrides)
    if plain["resume"]:
        return plain
    plain = with_pretrained(plain)
    data = plain["data"]
    return {**plain, "data": with_whole_sources(data) if isinstance(data, Mapping) else data}


def _check_before_pytorch(plain: Mapping[str, Any], new: bool) -> None:
    check_types(plain)
    if plain["resume"] or new:
        check_runs(plain)
    if new and not plain["resume"]:
        check_documents(trust_named(plain)["data"])


def check_kept(overrides: Iterable[str]) -> None:
    """Raises ConfigError for the first override of a resumed run that changes what it keeps."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group = re.split("[./@]", key)[0]
        changeable = (*MOVABLE, "data.batch_size")
        if group in KEPT and key not in changeable:
            others = f", which may change only {', '.join(changeable)} of data" if group == "data" else ""
            raise ConfigError(
                f"{key}={value}: must not be set with resume{others}; to start a new run from its weights, set"
                " init_from"
            )


def sequences_of(config: DictConfig) -> int:
    """Sequences of a micro-batch on all devices together."""
    from model.precision import devices_of  # imports PyTorch, which a wrong setting should not wait for

    devices = devices_of(OmegaConf.to_container(config.trainer, resolve=True))
    return config.data.batch_size * devices // config.trainer.context_parallel


def with_later_keys(saved: Mapping[str, Any], composed: Mapping[str, Any]) -> DictConfig:
    """Returns a run's config with the keys that later versions added to evaluation, preflight and the run's end."""
    endings = {key: composed["trainer"][key] for key in ("max_seconds", "on_nan", "max_skipped_steps")}
    later = {"evaluation": composed["evaluation"], "preflight": composed["preflight"], "trainer": endings}
    return OmegaConf.merge(later, saved)
