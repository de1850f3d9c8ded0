from pathlib import Path

import pytest

from configs.build import build_data
from data import DataModule
from tests.commands import compose
from tests.scripts.runs import SMALL, write_books


@pytest.fixture(scope="session")
def books(tmp_path_factory) -> Path:
    return write_books(tmp_path_factory.mktemp("forecasting") / "books")


@pytest.fixture(scope="session")
def composed(books):
    """A composed training config over the books, and its data module, set up."""

    def make(*overrides: str) -> tuple[dict, DataModule]:
        files = ("data=files", f"data.path={books}", f"data.cache={books.parent / 'cache'}")
        config = compose(*SMALL, *files, *overrides)
        data = build_data(config["data"])
        data.setup()
        return config, data

    return make
