"""evaluation.json: one row for each evaluation of a run's checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.training.storage import make_folder, write_json


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to the file `path`; it replaces the row of the same checkpoint, precision, protocol, split and content
    of the documents. Rows without a digest of their documents, which early versions wrote, stay."""

    def identity(r: Mapping[str, Any]) -> tuple:
        protocol = json.dumps(r["protocol"], sort_keys=True)
        return r["checkpoint"], r.get("precision"), protocol, r.get("split"), r.get("documents_digest")

    make_folder(path.parent)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    write_json(path, {"rows": [r for r in rows if identity(r) != identity(row)] + [dict(row)]})
