"""Batches of streamed sequences: their order, exact resume, and numbers of streams, workers and ranks."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from data import CorpusError, Hub
from data.streaming import streamed_loader
from data.streaming.streamed import Position
from tests.data.streaming.material import FILES, STREAMS, read, rows_of
from tests.data.test_module import train


def test_the_order_depends_on_no_worker_batch_or_rank(stream):
    whole = rows_of(read(stream(batch_size=1), 60))
    assert rows_of(read(stream(batch_size=3, workers=2), 20)) == whole
    assert rows_of(read(stream(batch_size=5, workers=3), 12)) == whole  # of which two read, two streams each
    ranks = []
    for rank in range(2):
        datamodule = stream(batch_size=2, workers=2)
        datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=1, max_steps=60)
        ranks.append(rows_of(read(datamodule, 15)))
    assert [row for pair in zip(*ranks, strict=True) for row in pair] == whole
    assert rows_of(read(stream(batch_size=1, seed=8), 60)) != whole


def test_a_run_goes_on_after_every_batch(stream):
    """A run that resumes after any batch reads the same rows, also with other workers, ranks or batch sizes."""
    datamodule, states = stream(batch_size=3), []
    whole = []
    for batch in islice(datamodule.train_dataloader(), 60):
        states.append(json.loads(json.dumps(datamodule.state_dict())))
        whole.append(datamodule.on_before_batch_transfer(batch, 0))
        datamodule.advance(3)
    whole = rows_of(whole)
    assert any(Position(*position).of_pass > 1 for position in states[-1]["positions"])
    for number, state in enumerate(states[:50]):
        settings = [dict(batch_size=3), dict(batch_size=4), dict(batch_size=2)][number % 3]
        resumed = stream(**settings, workers=2 if number in (10, 20) else 0)
        resumed.load_state_dict(state)
        assert rows_of(read(resumed, 3)) == whole[3 * number :][: 3 * settings["batch_size"]]
        assert resumed.cursor == 3 * (number + settings["batch_size"])


def test_a_lightning_run_goes_on_exactly(stream, tmp_path):
    settings = dict(accumulate_grad_batches=2, val_check_interval=20, check_val_every_n_epoch=None)
    whole, weight = train(stream(workers=2), tmp_path / "whole", 24, **settings)
    more, resumed_weight = train(
        stream(workers=1), tmp_path / "more", 24, resume=tmp_path / "whole" / "step_8.ckpt", **settings
    )
    assert more == whole[16:] and resumed_weight == weight
    state = torch.load(tmp_path / "whole" / "step_8.ckpt", weights_only=True)["DataModule"]
    assert state["cursor"] == 32 and [len(position) for position in state["positions"]] == [7] * STREAMS


def test_the_positions_of_all_ranks_are_saved(stream, monkeypatch):
    alone, states = stream(), []
    read(alone, 18)
    for rank in range(2):
        datamodule = stream()
        datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=1, max_steps=9)
        read(datamodule, 9)
        states.append(datamodule.streams.positions)

    def gather(gathered, _):
        gathered[:] = states

    monkeypatch.setattr(streamed_loader.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(streamed_loader.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(streamed_loader.dist, "all_gather_object", gather)
    assert datamodule.state_dict()["positions"] == alone.state_dict()["positions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(packing="whole"), r"data\.packing=whole: must be contiguous with data\.source\.streaming=true"),
        (dict(length_weights={8: 2}), r"data\.length_weights=\{8: 2\}: must be null with "),
        (dict(streams=6), r"data\.source\.streams=6: must be at most 5, "),
        (dict(split="valid"), r"data\.path=.*: must be a dataset with the split valid, and has train$"),
        (dict(on_bad_document="replace"), r"data\.on_bad_document=replace: must be error or skip, since "),
    ],
)
def test_settings_that_do_not_fit(stream, change, message):
    with pytest.raises(CorpusError, match=f"^{message}") as error:
        stream(**change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "ranks", "streams"),
    [(20, 1, 8), (20, 2, 8), (20, 3, 9), (20, 7, 14), (20, 16, 16), (20, 20, 20), (8, 3, 6), (5, 1, 5), (5, 3, 3)],
)
def test_the_default_number_of_streams_is_a_multiple_of_the_ranks(stream, monkeypatch, files, ranks, streams):
    source = Hub(None, None, None, "text", streaming=True)
    monkeypatch.setattr(source, "shards", lambda path: {"train": [None] * files})
    assert source.number_of_streams("path", ranks) == streams
    with pytest.raises(CorpusError, match=rf"^data\.path=path: must hold at least {files + 1} files .* has {files}$"):
        source.number_of_streams("path", files + 1)


def test_a_resumed_run_keeps_its_default_number_of_streams(stream):
    """A run on two ranks reads five files in four streams. Resumed on one rank, it still has four streams."""
    whole = rows_of(read(stream(batch_size=1), 30))
    before = stream(streams=None, ranks=2, batch_size=1)
    assert rows_of(read(before, 10)) == whole[:10]
    resumed = stream(streams=None, batch_size=1)
    assert len(resumed.streams.positions) == FILES != STREAMS
    resumed.load_state_dict(before.state_dict())
    assert rows_of(read(resumed, 20)) == whole[10:]
    assert len(resumed.state_dict()["positions"]) == STREAMS
    resumed.trainer = SimpleNamespace(global_rank=0, world_size=3, accumulate_grad_batches=1, max_steps=9)
    with pytest.raises(CorpusError, match=r"streams=4: must be a multiple of 3, .* goes on with one of 1, 2, 4 ranks$"):
        resumed.train_dataloader()


def test_numbers_that_do_not_fit(stream):
    datamodule = stream()
    datamodule.trainer = SimpleNamespace(global_rank=0, world_size=3, accumulate_grad_batches=1, max_steps=9)
    with pytest.raises(CorpusError, match=r"^data\.source\.streams=4: must be a multiple of 3, the number of ranks$"):
        datamodule.train_dataloader()
    datamodule.trainer.max_steps = -1
    with pytest.raises(CorpusError, match=r"^max_epochs: must be left out with data\.source\.streaming=true"):
        datamodule.train_dataloader()
    with pytest.raises(CorpusError, match=r"data\.source\.streams: must be those of the checkpoint"):
        other = stream(streams=2)
        other.load_state_dict(stream().state_dict())
        other.train_dataloader()
    with pytest.raises(CorpusError, match=r"data\.source\.streams: must be those of the checkpoint"):
        other = stream()
        other.load_state_dict({"cursor": 4, "stream": 0})  # of a run that did not stream
        other.train_dataloader()
