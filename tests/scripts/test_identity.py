"""A run keeps its own tokenizer, data and names, whatever becomes of the corpus that it was trained on."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from configs.build import ConfigError
from configs.runs import open_run
from data import CorpusError
from model.evaluation import add_row
from scripts import evaluate as command
from scripts.generate import write
from tests.commands import compose, resolved
from tests.scripts.runs import SHORT, SMALL, add_file, make_run, write_books
from train import train

FAST = ("accelerator=cpu", "evaluation=chunked", "evaluation.baselines=false")


@pytest.fixture
def books(tmp_path) -> Path:
    return write_books(tmp_path / "books")


@pytest.fixture
def run(tmp_path, books) -> Path:
    return make_run(tmp_path / "outputs", books, "attention.patterns.local.width=24")


@pytest.fixture
def own(tmp_path, books) -> Path:
    """A copy of the test documents, with more in it."""
    folder = shutil.copytree(books / "test", tmp_path / "own")
    (folder / "more.txt").write_text("seven stones under the river\n" * 20)
    return folder


def evaluate(run: Path, *overrides: str) -> dict:
    return command.evaluate(compose(f"checkpoint={run}", *FAST, *overrides, config_name="evaluate"))


def edit_checkpoint(run: Path, **values: object) -> None:
    """Changes what last.ckpt holds; None takes the key away."""
    file = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True) | values
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, file)


def test_own_documents_are_scored_alike_whatever_becomes_of_the_corpus(run, own, books, tmp_path):
    documents = ("data=files", f"data.path={own}")
    before = evaluate(run, *documents)
    add_file(books)
    changed = evaluate(run, *documents)
    shutil.rmtree(books)
    shutil.rmtree(tmp_path / "outputs" / "cache")
    gone = evaluate(run, *documents)
    for row in (changed, gone):
        assert (row["nll_nats"], row["tokens_scored"]) == (before["nll_nats"], before["tokens_scored"])
        assert row["tokenizer"] == before["tokenizer"]


def test_documents_that_are_left_out_are_in_the_row(run, own):
    (own / "bad.jsonl").write_text('{"text": "a text"}\n{"text": null}\n')
    documents = ("data=files", f"data.path={own}")
    with pytest.raises(CorpusError, match=r"bad\.jsonl, line 2.*data\.on_bad_document=skip"):
        evaluate(run, *documents)
    row = evaluate(run, *documents, "data.on_bad_document=skip")
    assert row["documents_left_out"] == {"unreadable": 1, "empty": 0}
    assert "documents_left_out" not in evaluate(run)


def test_own_documents_that_the_run_was_trained_on_are_counted(run, own, books, caplog):
    documents = ("data=files", f"data.path={own}", "evaluation.baselines=true")
    evaluate(run, *documents)
    assert "training split" not in caplog.text
    shutil.copy(next((books / "train").iterdir()), own / "known.txt")
    evaluate(run, *documents)
    number = len(list(own.iterdir()))
    assert f"1 of {number} documents are in the training split of " in caplog.text


def test_a_bigram_model_that_cannot_be_counted_is_left_out(run, own, books, caplog):
    documents = ("data=files", f"data.path={own}", "evaluation.baselines=true")
    assert evaluate(run, *documents)["baselines"]["bigram_bits_per_byte"] > 0
    shutil.rmtree(books)
    baselines = evaluate(run, *documents)["baselines"]
    assert baselines["gzip_bits_per_byte"] > 0 and baselines["bigram_bits_per_byte"] is None
    assert str(books) in caplog.text


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corpus_that_changed_is_refused_by_name(run, books, split):
    add_file(books, split)
    with pytest.raises(ConfigError, match=rf"checkpoint=.*data\.path={books}: .*its {split} split changed") as error:
        evaluate(run)
    assert "\n" not in str(error.value) and "data=files data.path=" in str(error.value)


def test_a_corpus_that_is_gone_is_refused_by_name(run, books):
    shutil.rmtree(books)
    with pytest.raises(ConfigError, match=rf"checkpoint=.*data\.path={books}: must be .*data=files data\.path="):
        evaluate(run)


def test_the_same_documents_under_new_dates_are_the_same_corpus(run, books):
    before = evaluate(run)
    for file in books.rglob("*.txt"):
        os.utime(file, (1, 1))
    assert evaluate(run)["nll_nats"] == before["nll_nats"]


def test_a_run_that_is_opened_tokenizes_nothing_anew(run, tmp_path):
    prepared = sorted((tmp_path / "outputs" / "cache").iterdir())
    opened = open_run(run, "cpu", "32-true")
    assert opened.data.corpus.folder in prepared
    assert sorted((tmp_path / "outputs" / "cache").iterdir()) == prepared


def test_recall_and_comparisons_need_no_corpus_for_own_documents(run, own, books, tmp_path):
    documents = ("data=files", f"data.path={own}")
    recall = ("suite=recall", "recall.samples=1", "recall.lengths=[64]", "recall.tasks.passkey=null")
    tasks = [f"recall.tasks.{name}=null" for name in ("needle_multikey", "needle_multivalue", "needle_multiquery")]
    recall += (*tasks, "recall.tasks.associative_recall=null", "recall.tasks.common_words=null")
    settings = compose(f"checkpoint={run}", *FAST, *recall, "recall.tasks.variable_tracking=null",
                       *documents, config_name="evaluate")  # fmt: skip
    (before,) = command.evaluate(settings)
    other = make_run(tmp_path / "outputs", books, "attention=dense", name="dense", seed=1)
    add_file(books)
    assert command.evaluate(settings)[0]["rows"] == before["rows"]
    shutil.rmtree(books)
    assert command.evaluate(settings)[0]["rows"] == before["rows"]
    compared = compose(f"checkpoint=[{run},{other}]", *FAST, *documents, f"output={tmp_path / 'compared'}",
                       config_name="evaluate")  # fmt: skip
    alone = [evaluate(each, *documents) for each in (run, other)]
    rows = command.evaluate(compared)["rows"]
    assert [row["tokens_scored"] for row in rows] == [row["tokens_scored"] for row in alone]
    assert [row["nll_nats"] for row in rows] == pytest.approx([row["nll_nats"] for row in alone], rel=1e-9)


def test_recall_in_own_documents_keeps_the_runs_own_result(run, own):
    tasks = [f"recall.tasks.{name}=null" for name in compose("checkpoint=x", config_name="evaluate")["recall"]["tasks"]]
    tasks.remove("recall.tasks.copy=null")
    settings = (f"checkpoint={run}", *FAST, "suite=recall", "recall.samples=1", "recall.lengths=[64]", *tasks)
    command.evaluate(compose(*settings, config_name="evaluate"))
    kept = (run / "recall.json").read_text()
    command.evaluate(compose(*settings, "data=files", f"data.path={own}", config_name="evaluate"))
    assert (run / "recall.json").read_text() == kept
    assert len(list(run.glob("recall*.json"))) == 2


# What a row is


def test_documents_of_ones_own_called_test_are_another_row(run, own, monkeypatch):
    first = evaluate(run)
    monkeypatch.chdir(own.rename(own.with_name("test")).parent)
    second = evaluate(run, "data=files", "data.path=test")
    assert first["documents_from"] == second["documents_from"] == "test"
    assert first["documents_digest"] != second["documents_digest"]
    assert json.loads((run / "evaluation.json").read_text())["rows"] == [first, second]


def test_the_same_documents_under_another_name_are_the_same_row(run, own):
    evaluate(run, "data=files", f"data.path={own}")
    moved = shutil.copytree(own, own.with_name("moved"))
    row = evaluate(run, "data=files", f"data.path={moved}")
    assert json.loads((run / "evaluation.json").read_text())["rows"] == [row]


def test_rows_from_before_digests_stay(run):
    row = evaluate(run)
    older = {key: value for key, value in row.items() if key not in ("documents_digest", "split")}
    (run / "evaluation.json").unlink()
    add_row(run / "evaluation.json", older)
    for _ in range(2):
        add_row(run / "evaluation.json", row)
    assert json.loads((run / "evaluation.json").read_text())["rows"] == [older, row]


# Runs from before


def test_a_run_without_a_fingerprint_opens_with_a_warning(run, books, caplog):
    before = evaluate(run)
    edit_checkpoint(run, DataModule=None)
    assert evaluate(run)["nll_nats"] == before["nll_nats"]
    assert "stores no fingerprint" in caplog.text


def test_of_an_older_run_the_training_split_is_checked(run, books, caplog):
    stream = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["DataModule"]["stream"]
    edit_checkpoint(run, DataModule={"cursor": 0, "stream": stream})
    evaluate(run)
    assert "stores no fingerprint of its validation and test split" in caplog.text
    add_file(books)
    with pytest.raises(ConfigError, match=rf"data\.path={books}: .*train split"):
        evaluate(run)


def test_a_run_without_a_tokenizer_takes_that_of_its_corpus_unless_it_changed(run, own, books):
    before = evaluate(run)
    (run / "tokenizer.json").unlink()
    assert evaluate(run)["nll_nats"] == before["nll_nats"]
    add_file(books)
    settings = compose(f"checkpoint={run}", "new_tokens=5", "accelerator=cpu", config_name="generate")
    for call in (lambda: evaluate(run, "data=files", f"data.path={own}"), lambda: write(settings)):
        with pytest.raises(ConfigError, match=rf"data\.path={books}: .*train"):
            call()


# Another machine


@pytest.fixture
def trained(tmp_path, books) -> Path:
    """A run of two steps."""
    place = (f"outputs={tmp_path / 'outputs'}", f"data.path={books}", f"data.cache={tmp_path / 'cache'}")
    train(compose(*SMALL, "data=files", *place, *SHORT, "name=trained"))
    (folder,) = (tmp_path / "outputs/trained").iterdir()
    return folder


@pytest.fixture
def moved(tmp_path, books, trained) -> Path:
    """The corpus at another place, under other dates; neither the old one nor what was prepared of it is there."""
    folder = books.rename(tmp_path / "elsewhere")
    for file in folder.rglob("*.txt"):
        os.utime(file, (1, 1))
    shutil.rmtree(tmp_path / "cache")
    return folder


def test_a_run_goes_on_where_the_same_corpus_lies_elsewhere(trained, moved, tmp_path):
    kept = (trained / "tokenizer.json").read_bytes()
    places = (f"data.path={moved}", f"data.cache={tmp_path / 'new'}", "data.workers=1")
    summary = train(resolved(f"resume={trained}", *places, "trainer.max_steps=3"))
    assert (summary["state"], summary["step"]) == ("finished", 3)
    assert (trained / "tokenizer.json").read_bytes() == kept
    opened = open_run(trained, "cpu", "32-true")
    assert opened.data.path == str(moved) and opened.data.workers == 1
    assert list((tmp_path / "new").iterdir()) and not (tmp_path / "cache").exists()


def test_a_run_goes_on_with_no_other_corpus(trained, moved):
    add_file(moved)
    log = (trained / "train.log").read_text()
    with pytest.raises(CorpusError, match=rf"data\.path={moved}: .*{trained}.* train split changed") as error:
        train(resolved(f"resume={trained}", f"data.path={moved}", "trainer.max_steps=3"))
    assert "\n" not in str(error.value) and (trained / "train.log").read_text() == log


@pytest.mark.parametrize(
    "setting", ["data=stdlib", "data.sequence_length=32", "data.tokenizer.vocabulary=280", "phases=null"]
)
def test_what_a_resumed_run_trains_on_is_its_own(run, setting):
    with pytest.raises(ConfigError, match=f"{setting}: must not be set with resume"):
        resolved(f"resume={run}", setting)
