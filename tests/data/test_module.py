"""A stopped and resumed run reads what an uninterrupted one reads: mid-epoch, with workers, under accumulation."""

import logging
import warnings
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data import BPE, CorpusError, Files
from data.collation import NO_TARGET
from data.tokenizers.base import Tokenizer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Reader(LightningModule):
    """Trains one number, and remembers every batch that it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[list[list[int]]] = []

    def training_step(self, batch, _):
        self.read.append(batch["tokens"].tolist())
        self.trainer.datamodule.advance(len(batch["tokens"]))
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(datamodule, folder, max_steps, resume=None, **trainer_settings):
    """Batches read and the weight at the end; leaves step_8.ckpt, step_16.ckpt, ... in the folder."""
    reader = Reader()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    saver.CHECKPOINT_EQUALS_CHAR = "_"
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(reader, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == max_steps
    assert (
        trainer.num_training_batches == max_steps * trainer.accumulate_grad_batches
    )  # the whole run's, resumed or not
    return reader.read, reader.weight.item()


STEPS = 40  # more than one pass over the data


@pytest.mark.parametrize(  # every pair of two settings
    ("workers", "accumulation", "stopped"),
    [(0, 1, "crashed"), (0, 3, "finished"), (2, 1, "finished"), (2, 3, "crashed")],
)
def test_resume_reads_on_exactly(make, tmp_path, workers, accumulation, stopped):
    """Resumed twice: from checkpoints in the middle of a run, or from the ends of runs of fewer steps."""
    settings = dict(
        accumulate_grad_batches=accumulation, val_check_interval=accumulation * 10, check_val_every_n_epoch=None
    )
    whole, weight = train(make(workers=workers), tmp_path / "whole", STEPS, **settings)
    assert len(whole) == STEPS * accumulation

    read, done, checkpoint = [], 0, None
    for stop in (8, 24, STEPS):
        folder = tmp_path / f"to_{stop}"
        steps = STEPS if stopped == "crashed" else stop
        more, resumed_weight = train(make(workers=workers), folder, steps, resume=checkpoint, **settings)
        read += more[: (stop - done) * accumulation]
        done, checkpoint = stop, folder / f"step_{stop}.ckpt"
    assert read == whole
    assert resumed_weight == weight


def test_the_state_is_plain_values(make, tmp_path):
    train(make(), tmp_path, 8)
    state = torch.load(tmp_path / "step_8.ckpt", weights_only=True)["DataModule"]
    assert state["cursor"] == 16
    assert type(state["cursor"]) is type(state["stream"]) is int
    assert set(state["contents"]) == {"train", "validation", "test"}
    assert all(type(digest) is str and len(digest) == 64 for digest in state["contents"].values())


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_workers_and_batch_size_do_not_change_the_order(make, packing):
    orders = []
    for settings in (dict(workers=0), dict(workers=2), dict(batch_size=3), dict(batch_size=1)):
        datamodule = make(packing=packing, **settings)
        datamodule.train_batches = 12 // datamodule.batch_size
        datamodule.setup()
        loader = datamodule.train_dataloader()
        assert len(loader) == datamodule.train_batches
        rows = [row for batch, _ in zip(loader, range(len(loader)), strict=False) for row in batch["tokens"].tolist()]
        orders.append(rows[:12])
        assert datamodule.cursor == 0  # handing out, or prefetching, is not consuming
    assert orders[0] == orders[1] == orders[2] == orders[3]


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_a_pass_holds_every_sequence_once(make, packing):
    datamodule = make(packing=packing, batch_size=1)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    scored = 0
    for batch, _ in zip(loader, range(len(loader)), strict=False):
        scored += int((batch["targets"] != NO_TARGET).sum())
    split = datamodule.corpus.splits["train"]
    assert scored == split.total_tokens - len(split)  # every token but bos


def test_best_fit_resumes_and_spreads_over_ranks(make):
    whole = [batch["tokens"] for batch in islice(_set_up(make(packing="best_fit")).train_dataloader(), 30)]
    resumed = _set_up(make(packing="best_fit", workers=1, batch_size=1))
    resumed.load_state_dict(_after(make(packing="best_fit"), 14))
    more = torch.cat([batch["tokens"] for batch in islice(resumed.train_dataloader(), 32)])
    assert torch.equal(more, torch.cat(whole[7:23]))
    ranks = []
    for rank in range(2):
        datamodule = _set_up(make(packing="best_fit", batch_size=1))
        datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=1, max_steps=60)
        ranks.append([batch["tokens"] for batch in islice(datamodule.train_dataloader(), 20)])
    both = torch.cat([tokens for pair in zip(*ranks, strict=True) for tokens in pair])
    assert torch.equal(both, torch.cat(whole[:20]))


def _set_up(datamodule):
    datamodule.setup()
    return datamodule


def _after(datamodule, samples: int) -> dict:
    """Returns the state after so many samples."""
    _set_up(datamodule).advance(samples)
    return datamodule.state_dict()


def test_epochs_go_on_through_the_stream(make, tmp_path):
    """Under max_epochs an epoch is about a pass; the next goes on where it ended."""
    datamodule, reader = make(batch_size=3), Reader()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(reader, datamodule=datamodule)
    assert len(reader.read) == 4 * trainer.global_step
    other = make(batch_size=3)
    other.setup()
    stream = [batch["tokens"].tolist() for batch, _ in zip(other.train_dataloader(), reader.read, strict=False)]
    assert reader.read == stream


def test_resuming_in_another_stream_is_refused(make, tmp_path):
    train(make(), tmp_path, 8)
    for change in (
        dict(sequence_length=32),
        dict(seed=8),
        dict(packing="whole"),
        dict(tokenizer=BPE(300)),
        dict(document_mask=False),
    ):
        keys = ("packing", "document_mask", "length_weights", "sequence_length", "seed")
        with pytest.raises(CorpusError, match="^" + ", ".join(rf"data\.{key}=.+" for key in keys) + ": must be "):
            train(make(**change), tmp_path / "other", 16, resume=tmp_path / "step_8.ckpt")


def test_resuming_a_large_run_of_an_earlier_version_is_refused(make, monkeypatch):
    """A pass of many samples is read in another order than it was."""
    before, now = make(), make()
    before.setup()
    now.setup()
    now.load_state_dict(before.state_dict())
    now.train_dataloader()
    monkeypatch.setattr("data.ordering.sample_order.EXPLICIT", 10)
    with pytest.raises(CorpusError, match=r"^data\.packing=.* earlier versions read passes of more than 10 samples"):
        now.train_dataloader()


def test_loaders_do_not_touch_the_models_random_numbers(make):
    datamodule = make()
    datamodule.setup()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(datamodule.train_dataloader()))
    next(iter(datamodule.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packing", ["contiguous", "whole", "best_fit"])
def test_validation_and_test_score_every_token_in_order(make, packing):
    datamodule = make(packing=packing, workers=2)
    datamodule.setup()
    split = datamodule.corpus.splits["validation"]
    expected = [int(token) for document in range(len(split)) for token in split.tokens(document)[1:]]
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        scored = torch.cat([batch["targets"].flatten() for batch in loader])
        scored = scored[scored != NO_TARGET]
        if packing == "best_fit":  # its order is another one
            scored, expected = scored.sort().values, sorted(expected)
        assert scored.tolist() == expected
        assert datamodule.token_bytes[scored].sum() == split.total_bytes
    assert datamodule.token_bytes.dtype == torch.int64 and len(datamodule.token_bytes) == datamodule.vocabulary


@pytest.mark.parametrize("lengths", [[], [(0, 16), (1, 64)]])
def test_without_a_document_mask_training_and_validation_cross_documents(make, lengths):
    masked, crossing = make(batch_size=16), make(batch_size=16, document_mask=False)
    for datamodule in (masked, crossing):
        datamodule.lengths = lengths
        datamodule.setup()
    for loader in ("train_dataloader", "val_dataloader"):
        one, other = (next(iter(getattr(datamodule, loader)())) for datamodule in (masked, crossing))
        assert torch.equal(one["tokens"], other["tokens"]) and torch.equal(one["targets"], other["targets"])
        scored = one["targets"] != NO_TARGET
        assert one["document"][scored].any() and not other["document"][scored].any()
        place = torch.arange(scored.shape[1]).expand_as(scored)
        assert torch.equal(other["position"][scored].long(), place[scored])


def test_length_weights_count_in_a_pass_of_training_alone(make):
    plain, twice = _set_up(make()), _set_up(make(length_weights={300: 2}))
    train = plain.corpus.splits["train"]
    expected = train.total_tokens + train.lengths[train.lengths >= 300].sum()
    assert (plain.tokens_per_pass, twice.tokens_per_pass) == (train.total_tokens, expected)
    assert len(twice.train_dataloader()) == (expected - 1) // 64 // 2 + 1 > len(plain.train_dataloader())
    assert len(twice.val_dataloader()) == len(plain.val_dataloader())
    names = twice.document_names(0, 2)
    held = [train.tokens(train.names.index(name)).tobytes() for name in names]
    batch = next(iter(twice.train_dataloader()))
    for tokens, document in zip(batch["tokens"].numpy().astype(train.dtype), batch["document"], strict=True):
        assert any(tokens[document == 0].tobytes() in text for text in held)


def test_the_bytes_of_a_lossy_tokenizer_are_those_of_the_original_text(make, monkeypatch):
    monkeypatch.setattr("data.tokenizers.Bytes.lossy", True)
    monkeypatch.setattr("data.tokenizers.Bytes.encode", lambda self, text: np.zeros(len(text) // 2, dtype=np.uint8))
    monkeypatch.setattr("data.tokenizers.Bytes.encode_all", Tokenizer.encode_all)  # calls `encode`
    datamodule = make()
    datamodule.setup()
    split = datamodule.corpus.splits["train"]
    tokens = torch.from_numpy(split.flat.astype(np.int64))
    assert datamodule.token_bytes.dtype == torch.float64
    assert datamodule.token_bytes[tokens].sum().item() == pytest.approx(split.total_bytes)
    assert split.total_bytes / len(tokens) > 1.9 and datamodule.token_bytes[datamodule.tokenizer.bos] == 0


def test_validation_sequences_spread_over_the_split(make):
    everything, some = make(batch_size=1), make(batch_size=1, validation_sequences=2)
    everything.setup()
    some.setup()
    batches = [batch["tokens"].tolist() for batch in everything.val_dataloader()]
    assert [batch["tokens"].tolist() for batch in some.val_dataloader()] == [batches[0], batches[len(batches) // 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(path="/nowhere"), r"^data\.path=/nowhere: must be "),
        (dict(source=Files("text"), path=None), r"^data\.path=null: must be "),
    ],
)
def test_a_path_without_documents_is_refused_at_once(make, change, message):
    with pytest.raises(CorpusError, match=message) as error:
        make(**change)
    assert "\n" not in str(error.value)


def test_a_corpus_shorter_than_a_sequence(make):
    datamodule = make(sequence_length=10_000)
    with pytest.raises(CorpusError, match=r"^data\.sequence_length=10000: must be at most 4481\b"):
        datamodule.setup()
    make(sequence_length=4481).setup()


GROWING = [(0, 16), (5, 32), (9, 64)]
"""Of batches of 2 x 64 tokens; a pass over `books` has 35 sequences, so it ends in the last phase."""


def test_growing_sequences_read_every_token_once_in_a_pass(make):
    datamodule = make()
    datamodule.lengths = GROWING
    datamodule.setup()
    split = datamodule.corpus.splits["train"]
    sequences = -(-(split.total_tokens - 1) // 64)
    shapes, targets = [], []
    for batch, _ in zip(datamodule.train_dataloader(), range(-(-sequences // 2)), strict=False):
        shapes.append(tuple(batch["tokens"].shape))
        targets.append(batch["targets"][batch["targets"] != NO_TARGET])
    assert shapes[:10] == 5 * [(8, 16)] + 4 * [(4, 32)] + [(2, 64)]
    expected = [torch.from_numpy(split.tokens(document)[1:].astype("int64")) for document in range(len(split))]
    extra = 64 * 2 * len(shapes) - 64 * sequences  # of the next pass, in the last batch
    assert extra < 128 and len(shapes) > 10
    found = torch.cat(targets).bincount(minlength=256) - torch.cat(expected).bincount(minlength=256)
    assert found.min() >= 0 and found.sum() <= extra


def test_growing_sequences_resume_exactly(make, tmp_path):
    def growing():
        datamodule = make()
        datamodule.lengths = GROWING
        return datamodule

    whole, weight = train(growing(), tmp_path / "whole", 16)
    read, resumed_weight = train(growing(), tmp_path / "more", 16, resume=tmp_path / "whole" / "step_8.ckpt")
    assert read == whole[8:] and resumed_weight == weight
    with pytest.raises(CorpusError, match=r"data\.sequence_length=64"):
        train(make(), tmp_path / "other", 16, resume=tmp_path / "whole" / "step_8.ckpt")


def test_the_documents_of_a_sample_in_every_phase(make):
    datamodule = make(minimum_tokens=100)
    datamodule.lengths = GROWING
    datamodule.setup()
    names = datamodule.corpus.splits["train"].names
    sample = 0
    for batch, _ in zip(datamodule.train_dataloader(), range(12), strict=False):
        documents = datamodule.document_names(sample, sample + len(batch["tokens"]))
        assert set(documents) <= set(names)
        texts = {name: datamodule.corpus.splits["train"].tokens(names.index(name)).tolist() for name in documents}
        for row, document in zip(batch["tokens"].tolist(), batch["document"].tolist(), strict=True):
            piece = [token for token, number in zip(row, document, strict=True) if number == 0]
            held = (text[at : at + len(piece)] == piece for text in texts.values() for at in range(len(text)))
            assert any(held)
        sample += len(batch["tokens"])
