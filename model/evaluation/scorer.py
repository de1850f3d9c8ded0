"""Scores documents with the settings of one command: batch size, precision, progress bar, and a folder for losses."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from model.evaluation.context import ContextLoss, context_work, losses_by_context
from model.evaluation.documents import Documents
from model.evaluation.loss_store import LossStore, fingerprint
from model.evaluation.protocol import Protocol
from model.evaluation.scoring import Progress, token_losses
from model.precision import autocast
from model.transformer import Transformer

FOLDER = "evaluation.partial"
"""Subfolder of `Scorer.folder` that holds losses of finished documents until the command has ended."""

ProgressBar = Callable[[str, int], AbstractContextManager[Progress]]
"""Opens a progress bar from its label and the total number of tokens."""


class Scorer:
    """Scores models, and keeps the losses of finished documents until `finish`.

    Args:
        tokens_at_once: largest number of tokens of one forward pass.
        precision: as Lightning's Trainer takes it.
        folder: where the result will be written, and meanwhile the losses. The run's own folder may be read-only.
        progress_bar: opens the bar that each call shows.
    """

    def __init__(self, tokens_at_once: int, precision: str, folder: Path, progress_bar: ProgressBar) -> None:
        self.tokens_at_once, self.precision, self.folder = tokens_at_once, precision, folder
        self.progress_bar = progress_bar
        self._stores: list[LossStore] = []

    def token_losses(
        self, model: Transformer, documents: Documents, protocol: Protocol, checkpoint: Path | None, label: str
    ) -> list[np.ndarray]:
        """Returns scoring.token_losses. `checkpoint`: the file of the weights; None keeps no losses on disk."""
        total = sum(max(len(documents.tokens(document)) - 1, 0) for document in range(len(documents)))
        with self.progress_bar(f"{label}, {protocol.name}", total) as progress, autocast(model, self.precision):
            return token_losses(
                model,
                documents,
                protocol,
                tokens_at_once=self.tokens_at_once,
                store=self._store(model, documents, protocol.describe(), checkpoint),
                progress=progress,
            )

    def losses_by_context(
        self,
        model: Transformer,
        documents: Documents,
        contexts: Sequence[int | str],
        targets: int,
        checkpoint: Path | None,
        label: str,
        places: int = 1,
        least: int | None = None,
    ) -> list[ContextLoss]:
        """Returns context.losses_by_context. `checkpoint` as for `token_losses`."""
        total = len(context_work(documents, contexts, targets, places, least)) * targets
        with self.progress_bar(f"{label}, by context", total) as progress, autocast(model, self.precision):
            return losses_by_context(
                model,
                documents,
                contexts,
                targets,
                tokens_at_once=self.tokens_at_once,
                places=places,
                least=least,
                store=self._store(model, documents, {"name": "by_context"}, checkpoint),
                progress=progress,
            )

    def finish(self) -> None:
        """Deletes the losses that were kept for a restart."""
        for store in self._stores:
            store.delete()

    def _store(
        self, model: Transformer, documents: Documents, protocol: Mapping[str, object], checkpoint: Path | None
    ) -> LossStore | None:
        if checkpoint is None:
            return None
        # The weights of one checkpoint may be scored under several plans.
        settings = {"protocol": protocol, "precision": self.precision, "plan": repr(model.plan)}
        self._stores.append(LossStore(self.folder / FOLDER / fingerprint(checkpoint, documents, settings)))
        return self._stores[-1]
