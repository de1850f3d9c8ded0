"""Training on documents that are read in their files: their order, exact resume, and what no stream reads."""

import gzip
import json
import random
import tracemalloc
from dataclasses import replace
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from data import BPE, CorpusError, Hub, InMemoryDocuments
from data.collation import NO_TARGET
from data.ordering.permutation import permutation
from data.sources import MixedSource, Mixture
from data.streaming import streamed_loader
from data.streaming.streamed import Position
from data.tokenizers import Bytes
from tests.data.conftest import random_text
from tests.data.test_module import train

LENGTH, SEED, FILES, STREAMS, HELD_OUT = 64, 7, 5, 4, 3


def texts_of_file(number: int) -> list[str]:
    """Short and long documents, an empty one, and one of several sequences."""
    sizes = random.Random(number)
    texts = [random_text(sizes.randint(1, 150), seed=100 * number + each) for each in range(14)]
    return [*texts[:9], "", random_text(400, seed=100 * number + 50), *texts[9:]]


TEXTS = [texts_of_file(number) for number in range(FILES)]
HELD_OUT_TEXTS = [TEXTS[number][0] for number in range(FILES)] + [TEXTS[0][1]]  # a document of each file in turn
TEXTS[2][5] = HELD_OUT_TEXTS[1]  # a copy of a held-out document, in another file
TEXTS[4][3] = "münchen 日本"


def write_files(folder, kind=".jsonl", texts=TEXTS):
    folder.mkdir()
    for number, rows in enumerate(texts):
        name = folder / f"part-{number}{kind}"
        if kind == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), name, row_group_size=4)
        else:
            lines = "\n".join(json.dumps({"text": text}) for text in rows).replace("\n", "\n\n", 1).encode()
            name.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return folder


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


def read(datamodule, batches: int) -> list[dict]:
    """Trains on so many batches. Returns them."""
    taken = []
    for batch in islice(datamodule.train_dataloader(), batches):
        taken.append(datamodule.on_before_batch_transfer(batch, 0))
        datamodule.advance(len(batch["tokens"]))
    return taken


def rows_of(batches, key="tokens") -> list[list[int]]:
    return [row for batch in batches for row in batch[key].tolist()]


def expected_documents(stream: int, texts=TEXTS, held_out=HELD_OUT_TEXTS, shortest=2):
    """The documents of a stream, without end, read in the plainest way. shortest: tokens, bos included."""
    for of_pass in count():
        for number in permutation(len(texts), SEED, of_pass)[stream::STREAMS]:
            yield from (text for text in texts[number] if len(text.encode()) >= shortest - 1 and text not in held_out)


def expected_tokens(sequences: int, *arguments, **changes) -> list[list[int]]:
    """The first sequences of a stream of `expected_documents`."""
    tokens = []
    for text in expected_documents(*arguments, **changes):
        tokens += [Bytes.bos, *text.encode()]
        if len(tokens) >= sequences * LENGTH:
            return [tokens[number * LENGTH :][:LENGTH] for number in range(sequences)]


@pytest.mark.parametrize("kind", [".jsonl", ".json.gz", ".parquet"])
def test_the_sequences_of_a_run(stream, tmp_path, kind):
    """Each stream's documents end to end, cut; the streams in turn; more than one pass."""
    folder = write_files(tmp_path / "other", kind)
    batch = torch.utils.data.default_collate(read(stream(path=str(folder), batch_size=1), 300))
    for number in range(STREAMS):
        names, tokens, places = [], [], []
        for document, text in enumerate(expected_documents(number)):
            names += [document] * (len(text.encode()) + 1)
            tokens += [Bytes.bos, *text.encode()]
            places += range(len(text.encode()) + 1)
            if len(tokens) > LENGTH * 75:
                break
        for index in range(75):
            part = slice(index * LENGTH, (index + 1) * LENGTH)
            keys = "tokens", "targets", "document", "position"
            row = {key: batch[key][index * STREAMS + number, 0] for key in keys}
            assert row["tokens"].tolist() == tokens[part]
            assert row["document"].tolist() == [each - names[part][0] for each in names[part]]
            first = places[part][0]
            assert row["position"].tolist() == [
                place - first if name == names[part][0] else place
                for place, name in zip(places[part], names[part], strict=True)
            ]
            following = tokens[part.start + 1 : part.stop + 1]
            targets = [NO_TARGET if token == Bytes.bos else token for token in following]
            assert row["targets"].tolist() == targets


def test_short_documents_and_files_without_any(stream, tmp_path):
    """Short documents are left out. A stream whose files hold no other documents continues with the next pass."""
    texts = [TEXTS[0], ["", "short"], TEXTS[2], []]
    folder = write_files(tmp_path / "other", ".parquet", texts)
    datamodule = stream(path=str(folder), batch_size=1, minimum_tokens=50, document_mask=False)
    splits = datamodule.corpus.splits
    held_out = {text for split in ("validation", "test") for text in splits[split].documents["text"]}
    batches = read(datamodule, 40 * STREAMS)
    for number in range(STREAMS):
        expected = expected_tokens(40, number, texts, held_out, shortest=50)
        assert rows_of(batches)[number::STREAMS] == expected
    assert all(not batch["document"].any() for batch in batches)


def test_tokens_of_a_large_vocabulary(stream):
    class Large(Bytes):
        vocabulary = 1 << 17

        def encode_all(self, names, texts):
            tokens, counts = super().encode_all(names, texts)
            return tokens.astype(np.int64) + (1 << 16), counts

    streams = replace(stream().streams.streams, tokenizer=Large())
    tokens = next(streams.sequences(0, Position())).packed.tokens
    expected = np.array(expected_tokens(1, 0)[0])
    assert tokens[:LENGTH].tolist() == np.where(expected == Bytes.bos, Bytes.bos, expected + (1 << 16)).tolist()


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


def test_no_stream_reads_a_held_out_document(stream, files):
    datamodule = stream(batch_size=1)
    splits = datamodule.corpus.splits
    held_out = {split: [splits[split].text(each) for each in range(HELD_OUT)] for split in ("validation", "test")}
    assert held_out["validation"] + held_out["test"] == HELD_OUT_TEXTS
    assert datamodule.tokens_per_pass is None
    assert datamodule.sample(3)["tokens"].shape == (3, LENGTH)  # for the forecast of a run
    sample = {splits["train"].text(each) for each in range(len(splits["train"]))}
    assert sample == {text for texts in TEXTS for text in texts if text} - set(HELD_OUT_TEXTS)
    read(datamodule, 300)
    documents = b"".join(bytes(min(token, 255) for token in row) for row in rows_of(read(datamodule, 300)))
    for text in HELD_OUT_TEXTS:
        assert text.encode() not in documents or len(text) < 10
    *_, short, copies, unreadable = map(sum, zip(*datamodule.streams.positions, strict=True))
    assert copies > 3 * (len(HELD_OUT_TEXTS) + 1) > 0 and short > FILES and not unreadable
    (first, *_, last) = datamodule.document_names(datamodule.cursor - 20, datamodule.cursor)
    assert first.startswith("part-") and ".jsonl:" in last


def test_a_document_that_cannot_be_read(stream, files, caplog):
    """is an error of one line, in a worker too, or is skipped and counted, once."""
    file = files / "part-3.jsonl"
    lines = file.read_text().splitlines()
    lines[8:8] = ["{", json.dumps({"text": None})]
    file.write_text("\n".join(lines))
    with pytest.raises(CorpusError, match=r"must hold a string in the field text, in part-3\.jsonl, line 9, and"):
        stream()  # the sample has it
    line = rf"^data\.path={files}: must hold a string in .* part-3\.jsonl, line 9, and holds no whole JSON object"
    for workers in (0, 2):
        datamodule = stream(on_bad_document="skip", workers=workers)
        datamodule.streams.streams.on_bad_document = "error"
        with pytest.raises(CorpusError, match=line) as error:
            read(datamodule, 99)
        assert "\n" not in str(error.value)
    whole, resumed = stream(on_bad_document="skip"), stream(on_bad_document="skip", workers=2)
    tokens = rows_of(read(whole, 40))
    state = whole.state_dict()
    read(whole, 40)
    resumed.load_state_dict(state)
    read(resumed, 40)
    assert resumed.state_dict()["positions"] == whole.state_dict()["positions"]
    unreadable = sum(position.unreadable for position in whole.streams.positions)
    assert unreadable >= 2 and unreadable % 2 == 0 and "is skipped: part-3.jsonl, line 9: no whole JSON" in caplog.text
    with caplog.at_level("INFO"):
        resumed.teardown("fit")
    assert "documents left out of training: " in caplog.text and len(tokens) == 80


def test_a_file_that_is_cut_off_is_an_error_under_every_policy(stream, tmp_path):
    folder = write_files(tmp_path / "zipped", ".jsonl.gz")
    datamodule = stream(path=str(folder), on_bad_document="skip")
    file = folder / "part-1.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(CorpusError, match=r"must hold a whole \.jsonl file in part-1\.jsonl\.gz") as error:
        read(datamodule, 99)
    assert "\n" not in str(error.value)


def test_files_that_changed_are_refused(stream, files):
    before = stream()
    read(before, 7)
    state = before.state_dict()
    stream().check_unchanged(state, "run")
    file = files / "part-2.jsonl"
    content = file.read_text()
    file.write_text(content + "\n" + json.dumps({"text": "one more"}))
    with pytest.raises(
        CorpusError, match=r"files that run was trained with; 1 changed, part-2\.jsonl .* \([\d,]+ bytes then, "
    ):
        stream().check_unchanged(state, "run")
    file.write_text(content)
    changed = {**state, "shards": [[*state["shards"][0][:2], "0123456789abcdef"], *state["shards"][1:]]}
    with pytest.raises(CorpusError, match=r"1 changed, .* \([\d,]+ bytes, 0123456789ab then, [\d,]+ bytes now\)$"):
        stream().check_unchanged(changed, "run")
    # The same size: the row of the checkpoint is another document.
    for file in files.iterdir():
        file.write_text('{"text": "a"}\n'.ljust(file.stat().st_size))
    with pytest.raises(CorpusError, match=r"must hold the files of the checkpoint: row \d+ of part-\d\.jsonl is "):
        for number in range(STREAMS):
            next(before.streams.streams.sequences(number, before.streams.positions[number]))
    with pytest.raises(CorpusError, match=r"row 5 of part-\d\.jsonl is another document$"):
        next(before.streams.streams.sequences(0, Position(row=5)))  # the start of a document


def test_documents_that_are_too_short_are_no_endless_loop(stream, files):
    datamodule = stream()
    datamodule.streams.streams.shortest = 1000
    with pytest.raises(
        CorpusError, match=r"^data\.path=.*: must hold documents to train on, and part-\d\.jsonl and all "
    ):
        read(datamodule, 1)


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


def test_where_documents_are_not_streamed(stream, files):
    source = stream().source
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: hub: streaming=true: must be false in a mixture$"):
        Mixture([MixedSource("hub", source, str(files), 1)])
    with pytest.raises(CorpusError, match=r"^data\.source\.streaming=true: must be false for documents that are eval"):
        InMemoryDocuments.load(source, str(files), Bytes(), "error", "test")


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


def test_a_large_file_is_not_held_in_memory(stream, tmp_path):
    text = random_text(20_000, seed=0)
    folder = write_files(tmp_path / "large", texts=[[text + str(number) for number in range(900)]])
    datamodule = stream(path=str(folder), streams=1, sequence_length=8192)
    batches = iter(datamodule.train_dataloader())
    tracemalloc.start()
    for _ in range(400):
        next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (folder / "part-0.jsonl").stat().st_size / 4


def test_a_learned_tokenizer_encodes_as_on_disk(stream):
    datamodule = stream(tokenizer=BPE(300), batch_size=1)
    tokens = np.concatenate([row for row in rows_of(read(datamodule, 80))[::STREAMS]])
    expected = []
    for text in islice(expected_documents(0), 30):
        expected += [datamodule.tokenizer.bos, *datamodule.tokenizer.encode(text)]
    assert len(expected) > 600
    assert tokens[: len(expected)].tolist() == expected[: len(tokens)]
