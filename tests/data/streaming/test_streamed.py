"""Training on documents that are read in their files: the sequences, and the documents that no stream reads."""

import json
import tracemalloc
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from data import BPE, CorpusError, InMemoryDocuments
from data.collation import NO_TARGET
from data.sources import MixedSource, Mixture
from data.streaming.streamed import Position
from data.tokenizers import Bytes
from tests.data.conftest import random_text
from tests.data.streaming.material import (
    FILES,
    HELD_OUT,
    HELD_OUT_TEXTS,
    LENGTH,
    STREAMS,
    TEXTS,
    expected_documents,
    expected_tokens,
    read,
    rows_of,
    write_files,
)


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


def test_where_documents_are_not_streamed(stream, files):
    source = stream().source
    with pytest.raises(CorpusError, match=r"^data\.source\.sources: hub: streaming=true: must be false in a mixture$"):
        Mixture([MixedSource("hub", source, str(files), 1)])
    with pytest.raises(CorpusError, match=r"^data\.source\.streaming=true: must be false for documents that are eval"):
        InMemoryDocuments.load(source, str(files), Bytes(), "error", "test")


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
