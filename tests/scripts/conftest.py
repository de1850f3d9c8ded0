from pathlib import Path

import pytest

from tests.scripts.runs import write_books


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    return write_books(tmp_path_factory.mktemp("corpus") / "books")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")
