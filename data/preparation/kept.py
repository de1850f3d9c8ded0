"""What a preparation has finished, so that the next one of the same corpus does not repeat it if this one is killed."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..digests import digests_of


class Kept:
    """Finished files in a folder, each set with a record of what it was made from and of its digests.

    basis: changes with everything that later sets are made from; `add` extends it.
    """

    def __init__(self, folder: Path, basis: str):
        self.folder = folder
        self.basis = basis
        folder.mkdir(exist_ok=True)

    def add(self, content: bytes) -> None:
        """Makes the sets that are read or written from now on depend on `content`."""
        self.basis = hashlib.sha256(self.basis.encode() + content).hexdigest()

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str, made_from: object = None) -> dict[str, Any] | None:
        """Returns what the record of a set holds, or None if the set is not whole or was made from something else."""
        try:
            record = json.loads(self.path(f"{name}.json").read_text())
            files = [self.folder / file for file in record["digests"]]
            whole = digests_of(files, None) == list(record["digests"].values())
            return record if whole and record["made_from"] == self._made_from(made_from) else None
        except (OSError, ValueError, KeyError):
            return None

    def write(self, name: str, files: Sequence[Path], made_from: object = None, **more: object) -> None:
        """Writes the record of a set that is whole. `more`: plain values that `read` returns, too."""
        names = [file.relative_to(self.folder).as_posix() for file in files]
        digests = dict(zip(names, digests_of(files, None), strict=True))
        record = {"made_from": self._made_from(made_from), "digests": digests, **more}
        partial = self.path(f"{name}.json.partial")
        partial.write_text(json.dumps(record))
        os.replace(partial, self.path(f"{name}.json"))

    def _made_from(self, made_from: object) -> list:
        return json.loads(json.dumps([self.basis, made_from]))
