import pytest

from data import BPE
from data.tokenizers import Saved
from tests.data.corpus.material import TEXTS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    trained, file = BPE(300), tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.fit(TEXTS)
    trained.save(file)
    return Saved(str(file))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder
