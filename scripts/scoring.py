"""Scoring with a progress bar; what a killed command has finished is not scored again."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from configs.build import ConfigError
from model import Transformer
from model.evaluation import (
    ContextLoss,
    Documents,
    LossStore,
    Protocol,
    losses_by_context,
    token_losses,
)
from model.evaluation.context import context_work
from model.precision import autocast
from scripts.console import progress_bar

FOLDER = "evaluation.partial"
"""In the folder that the result goes to: the losses of finished documents, until the command has ended."""


class Scoring:
    """Scores models with the settings of one command. `finish` deletes what a restart would need.

    place: the folder that the result goes to. Losses of finished documents are kept there meanwhile; the run's folder
        may be read-only.
    """

    def __init__(self, tokens_at_once: int, precision: str, place: Path) -> None:
        self.tokens_at_once, self.precision, self.place = tokens_at_once, precision, place
        self._stores: list[LossStore] = []

    def token_losses(
        self, model: Transformer, documents: Documents, protocol: Protocol, checkpoint: Path | None, label: str
    ) -> list[np.ndarray]:
        """model.evaluation.token_losses; `checkpoint` is where the weights are from, null if they are nowhere yet."""
        total = sum(max(len(documents.tokens(document)) - 1, 0) for document in range(len(documents)))
        with _errors(), progress_bar(f"{label}, {protocol.name}", total) as progress, autocast(model, self.precision):
            return token_losses(
                model,
                documents,
                protocol,
                tokens_at_once=self.tokens_at_once,
                store=self._store(documents, protocol.describe(), checkpoint),
                progress=progress,
            )

    def by_context(
        self,
        model: Transformer,
        documents: Documents,
        settings: Mapping[str, Any],
        checkpoint: Path | None,
        label: str,
    ) -> list[ContextLoss]:
        """model.evaluation.losses_by_context of a config's `evaluation.by_context`."""
        contexts, targets = settings["contexts"], settings["targets"]
        total = len(context_work(documents, contexts, targets)) * targets
        with _errors(), progress_bar(f"{label}, by context", total) as progress, autocast(model, self.precision):
            return losses_by_context(
                model,
                documents,
                contexts,
                targets,
                tokens_at_once=self.tokens_at_once,
                store=self._store(documents, {"name": "by_context"}, checkpoint),
                progress=progress,
            )

    def finish(self) -> None:
        for store in self._stores:
            shutil.rmtree(store.folder, ignore_errors=True)
            if store.folder.parent.is_dir() and not any(store.folder.parent.iterdir()):
                store.folder.parent.rmdir()

    def _store(self, documents: Documents, protocol: Mapping[str, object], checkpoint: Path | None) -> LossStore | None:
        """Where the losses of these weights on these tokens under this protocol are kept: of no others."""
        if checkpoint is None:
            return None
        status = checkpoint.stat()
        digest = hashlib.sha256()
        weights = [str(checkpoint.absolute()), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps([weights, protocol, self.precision], sort_keys=True).encode())
        for document in range(len(documents)):
            tokens = documents.tokens(document).astype(np.int64)
            digest.update(len(tokens).to_bytes(8) + tokens.tobytes())
        self._stores.append(LossStore(self.place / FOLDER / digest.hexdigest()[:16]))
        return self._stores[-1]


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # names the key within the group
        raise ConfigError(f"evaluation: {error}") from None
