import pytest

from data import Hub
from tests.data.streaming.material import HELD_OUT, LENGTH, STREAMS, write_files


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "files")


@pytest.fixture
def stream(make, files):
    """Returns a function that sets up a DataModule which streams `files`: stream(batch_size=1, streams=2, ...)."""

    def build(**changes):
        source = dict(config=None, split=None, revision=None, text_column="text", streaming=True)
        source |= dict(streams=STREAMS, held_out_documents=HELD_OUT)
        source |= {key: changes.pop(key) for key in ("streams", "split") if key in changes}
        ranks = changes.pop("ranks", 1)
        datamodule = make(**dict(source=Hub(**source), path=str(files), sequence_length=LENGTH) | changes)
        datamodule.ranks = ranks
        datamodule.setup()
        return datamodule

    return build
