"""Checks that the runs and the documents that a config names exist. Imports no PyTorch, so that a wrong path is refused
at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.mixture import build_source
from configs.pretrained import is_pretrained
from model.training.run_folder import RunFolder, RunFolderError, find_checkpoint, folder_of, new_run_path


def check_runs(config: Mapping[str, Any]) -> None:
    """Checks the runs that `resume` and `init_from` name, and the name of the new run."""
    if config["resume"] and config["init_from"]:
        raise ConfigError(f"init_from={config['init_from']}: must be null with resume, which has weights already")
    if config["resume"]:
        RunFolder.open(folder_of(checkpoint_of("resume", config["resume"], prefer="last")))
    if config["init_from"] and not is_pretrained(config["init_from"]):
        checkpoint_of("init_from", config["init_from"])
    new_run_path(config["outputs"], config["name"])


def check_trained(checkpoints: str | list[str]) -> None:
    """Raises ConfigError if a run that the key `checkpoint` names does not exist. Models in Hugging Face's format are
    checked later, when they are opened."""
    for checkpoint in [checkpoints] if isinstance(checkpoints, str) else checkpoints:
        if not is_pretrained(checkpoint):
            checkpoint_of("checkpoint", checkpoint, prefer="last")


def check_documents(data: Mapping[str, Any]) -> None:
    """Checks that a composed `data` group names documents that its source can read, without reading them.

    Raises:
        ConfigError, data.CorpusError: a setting of the source, or the path, is refused.
    """
    build_source(data).check_settings(data["path"], data["on_bad_document"])


def checkpoint_of(key: str, run: str, prefer: str = "best") -> Path:
    """Returns the checkpoint that a setting names, or raises ConfigError with its key."""
    try:
        return find_checkpoint(run, prefer)
    except RunFolderError as error:
        raise ConfigError(f"{key}={run}: {error}") from None
