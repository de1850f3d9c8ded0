"""scripts/evaluate.py as a whole: its numbers against a naive loop, comparisons, and going on after a kill."""

import csv
import json
import logging
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.build import build_data
from configs.errors import ConfigError
from configs.evaluation import evaluate_trained
from configs.runs import open_run, precision_of
from model import Transformer
from model.training.run_folder import RunFolder, RunFolderError
from scripts import evaluate as command
from scripts.console import progress_bar
from tests.commands import compose, started
from tests.scripts.runs import SMALL, make_run


@pytest.fixture(scope="module")
def window(outputs, books) -> Path:
    return make_run(outputs, books, "attention.patterns.local.width=24", name="window")


@pytest.fixture(scope="module")
def dense(outputs, books) -> Path:
    return make_run(outputs, books, "attention=dense", name="dense", seed=1)


def evaluate(*overrides: str) -> dict:
    return command.evaluate(compose(*overrides, "accelerator=cpu", config_name="evaluate"))


@torch.no_grad()
def naive(run_folder: Path, books: Path, window: int, stride: int) -> tuple[float, int, int]:
    """(nats, tokens, words) of the test documents: one token at a time, from its own window, in float64."""
    run = open_run(run_folder, "cpu", "64-true")
    tokenizer, nats, count, words = run.data.tokenizer, 0.0, 0, 0
    for file in sorted((books / "test").iterdir()):
        text = file.read_text()
        tokens = [tokenizer.bos, *map(int, tokenizer.encode(text))]
        words += len(text.split())
        for index in range(1, len(tokens)):
            start = max(0, math.ceil((index - window) / stride)) * stride
            read = torch.tensor([tokens[start:index]])
            hidden = run.model(read, torch.arange(read.shape[1])[None], run.model.build_layouts(None, read.shape[1]))
            nats -= float(run.model.logits(hidden)[0, -1].log_softmax(-1)[tokens[index]])
            count += 1
    return nats, count, words


def test_perplexity_equals_a_naive_loop(window, books):
    row = evaluate(f"checkpoint={window}", "evaluation.protocol.window=48", "evaluation.protocol.stride=20")
    nats, tokens, words = naive(window, books, 48, 20)
    assert row["tokens_scored"] == tokens and row["words"] == words
    assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)  # an exponent of some 20
    size = sum(file.stat().st_size for file in (books / "test").iterdir())
    assert row["bytes"] == size
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_row_names_what_it_was_measured_on(window):
    row = evaluate(f"checkpoint={window}", "evaluation=chunked")
    assert row["protocol"] == {"name": "chunked", "window": 64, "stride": None, "min_context": 0, "bos": True}
    assert row["tokenizer"]["tokenizer"] == "saved" and len(row["tokenizer"]["content"]) == 64
    assert row["documents_from"] == "test" and row["documents"] == 4 and row["bytes"] > row["tokens_scored"] > 0
    kept = json.loads((window / "evaluation.json").read_text())["rows"]
    assert row in kept and row["checkpoint"] == "checkpoints/last.ckpt"


def test_a_row_of_another_precision_is_another_row(dense, tmp_path):
    output = tmp_path / "rows.json"
    for precision in ("32-true", "64-true", "32-true"):
        row = evaluate(f"checkpoint={dense}", f"output={output}", f"precision={precision}")
        assert row["precision"] == precision
    rows = json.loads(output.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["64-true", "32-true"]  # measured again, the first one is replaced


@pytest.mark.parametrize(
    ("trained", "accelerator", "on_gpu", "expected"),
    [
        (("cuda", "bf16-mixed"), "auto", True, "bf16-mixed"),
        (("cuda", "bf16-mixed"), "cpu", True, "32-true"),
        (("cuda", "16-mixed"), "auto", False, "32-true"),
        (("cuda", "64-true"), "cpu", False, "64-true"),
        (("cpu", "bf16-true"), "auto", False, "bf16-true"),
        (("cpu", "32-true"), "auto", True, "32-true"),
        (None, "auto", True, "32-true"),  # a pretrained model
    ],
)
def test_the_default_precision_is_that_of_the_training(monkeypatch, trained, accelerator, on_gpu, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    config = {"trainer": dict(zip(("accelerator", "precision"), trained, strict=True))} if trained else {}
    assert precision_of(config, accelerator) == expected


def test_an_evaluation_has_the_precision_of_that_after_training_unless_another_is_asked_for(
    outputs, books, capsys, caplog
):
    overrides = ("attention=dense", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed")
    run = make_run(outputs, books, *overrides, name="in bf16")
    config = RunFolder(run).read_config()
    model = open_run(run, "cpu", "32-true").model  # as after training: weights in float32
    data = build_data(config["data"])
    data.setup()
    trained = evaluate_trained(model, data, run, config, progress_bar)
    with caplog.at_level(logging.INFO):
        row = evaluate(f"checkpoint={run}")
    assert row == trained and row["precision"] == "bf16-mixed"
    assert json.loads((run / "evaluation.json").read_text())["rows"] == [row]
    assert f"in bf16/{run.name} is evaluated on: CPU, bf16-mixed" in caplog.messages
    assert "protocol sliding, bf16-mixed" in " ".join(capsys.readouterr().out.split())
    asked = evaluate(f"checkpoint={run}", "precision=32-true")
    assert asked["precision"] == "32-true" and asked["loss"] != row["loss"]
    assert asked["loss"] == pytest.approx(row["loss"], rel=1e-2)


def test_runs_that_are_compared_have_the_precision_of_the_first(dense, outputs, books, tmp_path):
    overrides = ("trainer.accelerator=cpu", "trainer.precision=64-true")
    double = make_run(outputs, books, *overrides, name="double")
    for runs, expected in (((double, dense), "64-true"), ((dense, double), "32-true")):
        rows = evaluate(f"checkpoint=[{runs[0]},{runs[1]}]", f"output={tmp_path / expected}")["rows"]
        assert [row["precision"] for row in rows] == [expected] * 2


def test_the_parts_that_are_asked_for_are_in_the_row(window, dense):
    row = evaluate(
        f"checkpoint={window}",
        "evaluation.by_context.contexts=[16,32,whole]",
        "evaluation.by_context.targets=8",
        f"evaluation.key_tokens.evaluator={dense}",
        "evaluation.key_tokens.short_context=16",
        "evaluation.key_tokens.gain=0.1",
        "evaluation.key_tokens.confidence=-20",
    )
    assert [found["context"] for found in row["by_context"]] == [16, 32, "whole"]
    assert row["key_tokens"]["evaluator"] == str(dense) and row["key_tokens"]["tokens"] > 10
    assert row["key_tokens"]["perplexity"] == pytest.approx(math.exp(row["key_tokens"]["loss"]))
    assert "by_context" not in evaluate(f"checkpoint={window}")


def test_runs_are_compared_on_the_same_tokens(window, dense, tmp_path):
    result = evaluate(f"checkpoint=[{window},{dense}]", f"output={tmp_path / 'comparison.1'}")
    alone = [evaluate(f"checkpoint={run}") for run in (window, dense)]
    for row, single in zip(result["rows"], alone, strict=True):
        assert row["nll_nats"] == pytest.approx(single["nll_nats"], rel=1e-9)
    assert [row["run"] for row in result["rows"]] == ["window/first", "dense/first"]
    (difference,) = result["differences"]
    assert difference["loss"] == pytest.approx(alone[1]["loss"] - alone[0]["loss"], abs=1e-9)
    assert difference["loss_low"] <= difference["loss"] <= difference["loss_high"]

    folder = tmp_path / "comparison.1"
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(result))
    with open(folder / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in result["rows"]]
    assert {row["protocol"] for row in rows} == {"sliding"} and rows[0]["tokenizer"].startswith("saved ")
    text = (folder / "comparison.md").read_text()
    assert f"{result['rows'][1]['bits_per_byte']:.4f}" in text and "loss_by_position.png" in text
    assert (folder / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_every_result_of_a_lossy_tokenizer_is_marked(window, outputs, books, tmp_path, capsys):
    settings = json.loads((window / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    settings["pre_tokenizer"]["pretokenizers"].insert(0, split)
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    lossy = ("data/tokenizer=saved", f"data.tokenizer.path={tmp_path}", "data.tokenizer.lossy=allow")
    small = [each for each in SMALL if "tokenizer" not in each]
    other = make_run(outputs, books, *lossy, name="lossy", small=small)
    result = evaluate(f"checkpoint=[{window},{other}]", f"output={tmp_path / 'compared'}", "evaluation.baselines=false")
    first, second = result["rows"]
    assert "lossy" not in first["tokenizer"] and second["tokenizer"]["lossy"] == "allow"
    assert first["bytes"] == second["bytes"] == sum(file.stat().st_size for file in (books / "test").iterdir())
    bits = second["nll_nats"] / math.log(2) / second["bytes"]
    assert second["bits_per_byte"] == pytest.approx(bits)
    text = (tmp_path / "compared" / "comparison.md").read_text()
    assert text.count("lossy\n") == 1 and "lossy" in (tmp_path / "compared" / "comparison.csv").read_text()
    capsys.readouterr()
    evaluate(f"checkpoint={other}", "evaluation.baselines=false")
    assert "lossy tokenizer" in capsys.readouterr().out


def test_a_sparse_run_is_evaluated_sparse_and_dense(window, outputs, books, tmp_path):
    """The rows are those of the run, and of a run with its weights and dense attention."""
    twin, settings = make_run(outputs, books, "attention=dense", name="twin"), ["evaluation.baselines=false"]
    settings += ["evaluation.by_context.contexts=[16,whole]", "evaluation.by_context.targets=8"]
    result = evaluate(f"checkpoint={window}", "attention=dense", f"output={tmp_path}", *settings)
    sparse, dense = result["rows"]
    assert (sparse["run"], dense["run"]) == ("window/first", "window/first attention=dense")
    assert "attention" not in sparse and dense["attention"]["name"] == "dense"
    for row, run in zip(result["rows"], (window, twin), strict=True):
        alone = evaluate(f"checkpoint={run}", *settings)
        assert row["nll_nats"] == pytest.approx(alone["nll_nats"], rel=1e-6)
        for found, expected in zip(row["by_context"], alone["by_context"], strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert abs(dense["loss"] - sparse["loss"]) > 1e-3
    assert abs(dense["by_context"][1]["loss"] - sparse["by_context"][1]["loss"]) > 1e-3
    (difference,) = result["differences"]
    assert (difference["run"], difference["against"]) == (dense["run"], sparse["run"])
    assert difference["loss"] == pytest.approx(dense["loss"] - sparse["loss"], abs=1e-9)
    assert difference["loss_low"] < difference["loss"] < difference["loss_high"]
    assert "attention=dense" in (tmp_path / "comparison.md").read_text()


def test_each_run_under_another_attention_is_compared_with_itself(window, dense, tmp_path):
    arguments = f"checkpoint=[{dense},{window}]", "attention=dense", f"output={tmp_path}", "evaluation.baselines=false"
    result = evaluate(*arguments)
    names = ["dense/first", "dense/first attention=dense", "window/first", "window/first attention=dense"]
    assert [row["run"] for row in result["rows"]] == names
    pairs = [(each["run"], each["against"]) for each in result["differences"]]
    assert pairs == [(names[1], names[0]), (names[2], names[0]), (names[3], names[2])]
    changes = [abs(each["loss"]) for each in result["differences"]]
    assert changes[0] < 1e-6 and changes[2] > 1e-3


def test_documents_that_are_not_utf8_are_compared_under_their_own_tokenizer_alone(window, outputs, tmp_path):
    """Another one would read U+FFFD in place of their bytes."""
    for name, own in zip(("train", "val"), np.random.default_rng(0).integers(128, 256, (2, 3000)), strict=True):
        np.insert(own, 0, 256).astype("<u2").tofile(tmp_path / f"{name}.bin")
    shards = ("data=tokens", f"data.path={tmp_path}", "data/tokenizer=bytes", "data.source.dtype=uint16")
    small = [each for each in SMALL if "vocabulary" not in each]
    run = make_run(outputs, tmp_path, *shards, name="tokens", small=small)
    same = ("evaluation.baselines=false", f"output={tmp_path / 'compared'}")
    assert len(evaluate(f"checkpoint=[{run},{run}]", *same)["rows"]) == 2
    with pytest.raises(
        ConfigError, match=r"must have the tokenizer of tokens/first, whose document val\.bin:0 is not U"
    ):
        evaluate(f"checkpoint=[{run},{window}]", *same)


def test_a_run_with_another_tokenizer_is_compared_by_bytes(window, outputs, books, tmp_path):
    other = make_run(outputs, books, "data.tokenizer.vocabulary=280", name="other")
    result = evaluate(f"checkpoint=[{window},{other}]", f"output={tmp_path}", "evaluation.baselines=false")
    first, second = result["rows"]
    assert first["bytes"] == second["bytes"] and first["tokens_scored"] < second["tokens_scored"]
    (difference,) = result["differences"]
    assert difference["loss"] is None
    assert difference["bits_per_byte"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"], abs=1e-9)
    assert "other tokens" in (tmp_path / "comparison.md").read_text()


def test_a_limit_leaves_the_beginnings_of_documents_and_is_told(
    window, dense, outputs, books, tmp_path, caplog, capsys
):
    sizes = {file.name: file.stat().st_size for file in sorted((books / "test").iterdir())}
    own = tmp_path / "own"
    own.mkdir()
    for file in (books / "test").iterdir():
        (own / file.name).write_bytes(file.read_bytes()[:500])
    where = {"documents": len(sizes), "bytes": sum(sizes.values())}
    with caplog.at_level("INFO"):
        row = evaluate(f"checkpoint={window}", "evaluation.limit=2000", f"output={tmp_path / 'limited.json'}")
    assert row["excerpt_of"] == {"limit": 2000} | where and row["bytes"] == sum(row["by_document"]["bytes"]) == 2000
    assert sum(line.startswith("evaluation.limit=2000: 4 of 4 documents are scored") for line in caplog.messages) == 1
    told = "the beginnings of 4 of 4 documents, 2,000 bytes (evaluation.limit=2000)"
    assert told in " ".join(capsys.readouterr().out.split())
    alone = evaluate(f"checkpoint={window}", "data=files", f"data.path={own}", f"output={tmp_path / 'alone.json'}")
    kept = ("nll_nats", "bytes", "words", "tokens_scored", "documents_digest", "baselines")
    assert {key: row[key] for key in kept} == {key: alone[key] for key in kept} and alone["excerpt_of"] is None

    other = make_run(outputs, books, "data.tokenizer.vocabulary=257", name="of bytes")
    result = evaluate(
        f"checkpoint=[{window},{dense},{other}]", "evaluation.limit=2000", f"output={tmp_path / 'compared'}"
    )
    assert {row["documents_digest"] for row in result["rows"]} == {row["documents_digest"]}
    assert result["rows"][2]["tokens_scored"] > result["rows"][0]["tokens_scored"]
    bits = [row["bits_per_byte"] for row in result["rows"]]
    assert [each["bits_per_byte"] for each in result["differences"]] == pytest.approx([b - bits[0] for b in bits[1:]])
    assert told in (tmp_path / "compared" / "comparison.md").read_text()


def test_every_run_is_scored_on_the_same_part_of_each_source_of_a_mixture(window, outputs, books, tmp_path):
    entries = ",".join(f"{{data:files,name:{name},path:{books},weight:1}}" for name in ("old", "new"))
    mixture = ("data=mixture", f"data.source.sources=[{entries}]")
    mixed = make_run(outputs, None, *mixture, name="mixed")
    other = make_run(outputs, None, *mixture, "data.tokenizer.vocabulary=280", name="mixed with other tokens")
    runs, whole = f"checkpoint=[{mixed},{other},{window}]", ("evaluation.baselines=false", f"output={tmp_path}")
    rows = evaluate(runs, "evaluation.limit=1000", *whole)["rows"]
    assert len({row["documents_digest"] for row in rows}) == 1
    for row in rows:
        assert row["bytes"] == 2000 and {name: each["bytes"] for name, each in row["by_source"].items()} == {
            "old": 1000,
            "new": 1000,
        }


def test_the_default_limit_leaves_everything_of_a_small_split_and_null_of_every_split(window, monkeypatch):
    whole = evaluate(f"checkpoint={window}")
    assert whole["excerpt_of"] is None
    monkeypatch.setattr("data.excerpts.SMALLEST", 3000)
    monkeypatch.setattr("data.excerpts.PER_TOKEN", 1)
    assert evaluate(f"checkpoint={window}")["excerpt_of"]["limit"] == 3000
    assert evaluate(f"checkpoint={window}", "evaluation.limit=null")["documents_digest"] == whole["documents_digest"]


def test_an_evaluator_with_another_tokenizer_is_refused_before_anything_is_scored(window, outputs, books, monkeypatch):
    other = make_run(outputs, books, "data.tokenizer.vocabulary=270", name="evaluator")
    monkeypatch.setattr("model.evaluation.scorer.token_losses", lambda *_, **__: pytest.fail("documents were scored"))
    with pytest.raises(ConfigError, match=rf"evaluation\.key_tokens\.evaluator={other}: .*tokenizer"):
        evaluate(f"checkpoint={window}", f"evaluation.key_tokens.evaluator={other}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation=whole", "checkpoint={short}"], "protocol.name=whole needs sequences of"),
        (["checkpoint=[]"], r"checkpoint=\[\]: must be a text .* or a list of at least one"),
        (["checkpoint=[{short}]", "output={short}/config.yaml"], r"output=.*config\.yaml: must be a folder"),
        (
            ["checkpoint={short}", "evaluation.by_context.contexts=[half]"],
            "contexts=.half.: must be a list, each an integer",
        ),
        (["checkpoint={short}", "evaluation.key_tokens.gain=0"], r"key_tokens.gain=0: must be a number > 0"),
        (["checkpoint={short}", "evaluation.key_tokens.confidence=1"], r"key_tokens.confidence=1: must be"),
        (["checkpoint={short}", "precision=8-bit"], "precision=8-bit: must be auto"),
        (
            ["checkpoint={short}", "attention=routed", "attention.patterns.routed.router=indexer"],
            "attention=routed: must be a pattern without parameters of its own, .*indexer",
        ),
        (
            ["checkpoint={short}", "attention=dense", "+attention.patterns.full.rope=none"],
            "attention=dense: must not have rope=none",
        ),
        (["checkpoint={short}", "attention=dense", "suite=recall"], "attention=dense: must be null with suite=recall"),
        (
            ["checkpoint={short}", "attention=dense", "attention.backend=triton"],
            "attention.backend=triton: must be auto",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides, message, outputs, books):
    folder = outputs / "short/first"
    short = folder if folder.exists() else make_run(outputs, books, "model.max_length=64", name="short")
    with pytest.raises(ConfigError, match=message) as error:
        evaluate(*(override.format(short=short) for override in overrides))
    assert "\n" not in str(error.value)


def _contents(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.rglob("*"))}


def test_a_run_that_cannot_be_written_is_evaluated_elsewhere(window, dense, tmp_path, monkeypatch):
    """No file of the run's folder appears, goes or changes. Without output= it is one line before any scoring."""
    access, before = os.access, _contents(window)
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(window) and access(path, mode))
    made, mkdir = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: made.append(path) or mkdir(path, *a, **k))
    elsewhere = tmp_path / "new" / "evaluation.json"
    evaluate(f"checkpoint={window}", f"output={elsewhere}", "evaluation.baselines=false")
    evaluate(f"checkpoint=[{window},{dense}]", f"output={tmp_path / 'compared'}", "evaluation.baselines=false")
    assert json.loads(elsewhere.read_text())["rows"] and (tmp_path / "compared" / "comparison.json").is_file()
    assert not any(path.is_relative_to(window) for path in made) and _contents(window) == before
    with pytest.raises(RunFolderError, match="output=null: must be a path that can be written") as error:
        evaluate(f"checkpoint={window}")
    assert str(window) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"output=.*file/x.json: must be a path"):
        evaluate(f"checkpoint={window}", f"output={tmp_path / 'file' / 'x.json'}")


def test_after_a_kill_finished_documents_are_not_scored_again(window, tmp_path, monkeypatch):
    output = tmp_path / "evaluation.json"
    arguments = [f"checkpoint={window}", f"output={output}", "evaluation.protocol.stride=1"]
    arguments.append("evaluation.baselines=false")
    command = ["scripts/evaluate.py", *arguments, "accelerator=cpu", "evaluation.tokens_at_once=64"]
    partial = tmp_path / "evaluation.partial"
    with started(*command) as process:
        deadline = time.monotonic() + 120
        while not list(partial.glob("*/*.npy")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finished = sorted(file.stem for file in partial.glob("*/*.npy"))
    assert finished and finished[0] == "000000" and len(finished) < 4 and not output.exists()

    run = open_run(window, "cpu", "32-true")
    documents = run.data.corpus.splits["test"]
    left = [len(documents.tokens(d)) - 1 for d in range(4) if f"{d:06d}" not in finished]
    read = 0
    loss = Transformer.loss

    def counted(self, tokens, *rest):
        nonlocal read
        read += tokens.numel()
        return loss(self, tokens, *rest)

    monkeypatch.setattr(Transformer, "loss", counted)
    row = evaluate(*arguments)
    assert read == sum(min(length, 64) + 64 * max(length - 64, 0) for length in left)
    assert not partial.exists(), "what was kept is forgotten once the row is written"
    fresh = evaluate(*arguments)
    assert row["nll_nats"] == pytest.approx(fresh["nll_nats"], rel=1e-6)
    assert np.isfinite(row["loss"])
