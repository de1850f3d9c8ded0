"""Keeps token losses of finished documents on disk, so that a killed evaluation does not score them again."""

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model.evaluation.documents import Documents
from model.training.storage import make_folder, write_atomically


class LossStore:
    """Token losses by name, one .npy file each, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> np.ndarray | None:
        """Returns the losses saved under `name`, or None."""
        file = self.folder / f"{name}.npy"
        return np.load(file, allow_pickle=False) if file.exists() else None

    def save(self, name: str, losses: np.ndarray) -> None:
        """Writes a file whole or not at all."""
        make_folder(self.folder)
        content = io.BytesIO()  # NumPy's own error about a full disk carries no error number
        np.save(content, losses)
        write_atomically(self.folder / f"{name}.npy", content.getvalue())

    def delete(self) -> None:
        """Deletes the folder, and the folder above it if that is empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def fingerprint(checkpoint: Path, documents: Documents, settings: Mapping[str, object]) -> str:
    """Returns 16 hex digits that change with the weights, the documents' tokens, and `settings`."""
    status = checkpoint.stat()
    weights = [str(checkpoint.absolute()), status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps([weights, dict(settings)], sort_keys=True).encode())
    for document in range(len(documents)):
        tokens = documents.tokens(document).astype(np.int64)
        digest.update(len(tokens).to_bytes(8) + tokens.tobytes())
    return digest.hexdigest()[:16]
