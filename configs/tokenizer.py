"""Which tokenizer a run gets: a run that exists keeps its own, and a run that starts from it takes it over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def with_own_tokenizer(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The `data` group of the run in `folder`, with the tokenizer.json there in the place of the settings that made it.
    Older folders hold none: their settings stay."""
    file = folder / "tokenizer.json"
    return {**data, **({"tokenizer": saved(file)} if file.is_file() else {})}


def saved(file: str | Path) -> dict[str, str]:
    """The `data.tokenizer` settings of a tokenizer.json, as in configs/data/tokenizer/saved.yaml."""
    return {"_target_": "data.tokenizers.Saved", "path": str(file)}
