"""Losses have the unit of the data: on the console, in result files and in reports of runs on text, genomes, series and
numbers of tokens."""

import json
import logging
import math
import random
import re

import numpy as np
import pytest

from configs.runs import open_run
from data.baselines import bigram_bits_per_byte, gzip_bits_per_byte
from model.training.metrics import read_rows
from scripts import evaluate as command
from scripts.reporting.content import gather
from scripts.reporting.markdown import write_markdown
from tests.commands import compose, resolved
from tests.scripts.runs import SMALL, make_run, write_books
from train import train

NANO = [each for each in SMALL if "vocabulary" not in each]
SHORT = ("trainer.max_steps=4", "trainer.validate_every=2", "trainer.log_every=2", "evaluation=chunked")

UNITS = {
    "text": {"loss": "nats per token", "bits_per_byte": "bits per byte"},
    "genome": {"loss": "nats per token", "bits_per_byte": "bits per base"},
    "series": {"loss": "nats per value"},
    "token_ids": {"loss": "nats per token"},
}
SIZES = {"text": "{bytes:,} bytes", "genome": "800 bases", "series": "120 values", "token_ids": "399 tokens"}


def write_documents(folder) -> dict[str, list[str]]:
    """Writes a few documents of each kind. Returns the settings that read them."""
    generator = np.random.default_rng(0)
    books = write_books(folder / "books")
    genomes = folder / "genomes"
    for split, letters in (("train", 4000), ("valid", 400), ("test", 800)):
        (genomes / split).mkdir(parents=True)
        letters = "".join(generator.choice(list("ACGT"), letters))
        (genomes / split / "one.fa").write_text(f">{split}\n{letters}\n")
    hours = range(600)
    lines = [f"{hour},{5 + math.sin(hour / 4):.3f},{random.Random(hour).gauss():.3f}\n" for hour in hours]
    (folder / "series.csv").write_text("hour,wave,noise\n" + "".join(lines))
    (folder / "shards").mkdir()
    for split, count in (("train", 2000), ("val", 300), ("test", 400)):
        tokens = generator.integers(1, 50, count).astype("<u2")
        tokens[0] = 0
        tokens.tofile(folder / "shards" / f"{split}.bin")
    return {
        "text": ["data=files", f"data.path={books}", "data.tokenizer.vocabulary=300"],
        "genome": ["data=genome", f"data.path={genomes}"],
        "series": [
            *("data=timeseries", f"data.path={folder / 'series.csv'}", "data.source.time_column=hour"),
            *("data.tokenizer.bins=32", "data.tokenizer.limit=4", "data.source.parts=[0.8,0.1,0.1]"),
        ],
        "token_ids": [
            *("data=tokens", f"data.path={folder / 'shards'}", "data/tokenizer=token_ids", "data.source.dtype=uint16"),
            *("data.tokenizer.vocabulary=50", "data.tokenizer.bos=0"),
        ],
    }


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("kind", UNITS)
def test_run(kind, documents, tmp_path, capsys, caplog):
    units = UNITS[kind]
    with caplog.at_level(logging.INFO):
        train(resolved(*NANO, *documents[kind], *SHORT, f"outputs={tmp_path}", f"data.cache={tmp_path / 'cache'}"))
    (folder,) = (tmp_path / "window").iterdir()
    row = json.loads((folder / "evaluation.json").read_text())["rows"][0]
    summary = json.loads((folder / "summary.json").read_text())
    quality = "bits_per_byte" if "bits_per_byte" in units else "loss"
    shown = {name: unit.replace(" per ", "/") for name, unit in units.items()}

    steps = [line for line in caplog.messages if line.startswith("step ")]
    assert len(steps) == 4
    for line in steps:
        found = re.findall(r"(?:bits|nats)/\w+", line)
        assert found == list(shown.values()), line

    columns, rows = read_rows(folder / "metrics.csv")
    assert ("train/bits_per_byte" in columns, "validation/bits_per_byte" in columns) == (quality != "loss",) * 2
    if kind == "genome":  # a token is a base
        assert float(rows[-1]["validation/bits_per_byte"]) == pytest.approx(
            float(rows[-1]["validation/loss"]) / math.log(2)
        )

    assert row["units"] == summary["units"] == units
    assert (row["bits_per_byte"] is None) == (summary["bits_per_byte"] is None) == (quality == "loss")
    printed = capsys.readouterr().out
    assert SIZES[kind].format(**row) in printed
    assert f"{row['loss']:.4f} {shown['loss']}" in printed
    assert re.findall(r"bits per \w+", printed) == [units[quality]] * (quality != "loss")
    baselines = row.get("baselines", {})
    assert set(baselines) >= ({f"gzip_{quality}", f"bigram_{quality}"} if kind != "token_ids" else set())
    for name, value in baselines.items():
        assert name == "markov_order" or f"{value:.4f}" in printed

    report = write_markdown(gather([folder]))
    assert set(re.findall(r"(?:bits|nats)/\w+", report)) == {shown[quality]}
    assert SIZES[kind].format(**row) in report


FEW = ("series.horizons=[2]", "series.context=30", "series.period=8", "series.samples=1", "series.stride=50")


def series_run(documents, outputs, name="run", seed=0):
    path = documents["series"][1].removeprefix("data.path=")
    return make_run(outputs, path, *documents["series"], name=name, seed=seed, small=NANO)


def evaluate(*overrides: str) -> dict:
    return command.evaluate(compose(*overrides, "accelerator=cpu", config_name="evaluate"))


def test_own_documents_have_the_unit_of_their_source(documents, tmp_path, capsys):
    run = make_run(tmp_path, write_books(tmp_path / "books"))
    genome = documents["genome"]
    of_text, of_genome = evaluate(f"checkpoint={run}"), evaluate(f"checkpoint={run}", *genome)
    assert (of_text["units"], of_genome["units"]) == (UNITS["text"], UNITS["genome"])
    assert "bits per byte" in (printed := capsys.readouterr().out) and "bits per base" in printed
    compared = evaluate(f"checkpoint=[{run},{run}]", *genome, f"output={tmp_path / 'comparison'}")
    assert [row["units"] for row in compared["rows"]] == [UNITS["genome"]] * 2
    text = (tmp_path / "comparison/comparison.md").read_text()
    assert "bits per base" in text and "bits per byte" not in text and "5,200 bases" in text


def test_a_mixture_of_a_genome_and_text_shows_bits_per_base_of_the_genome(documents, tmp_path, capsys):
    genomes, books = (documents[kind][1].removeprefix("data.path=") for kind in ("genome", "text"))
    entries = f"{{data:genome,path:{genomes},weight:1}},{{data:files,path:{books},weight:1}}"
    mixture = ("data=mixture", f"data.source.sources=[{entries}]", "data/tokenizer=bytes")
    train(resolved(*NANO, *mixture, *SHORT, f"outputs={tmp_path}", f"data.cache={tmp_path / 'cache'}"))
    (folder,) = (tmp_path / "window").iterdir()
    trained = json.loads((folder / "evaluation.json").read_text())["rows"][0], capsys.readouterr().out
    again = evaluate(f"checkpoint={folder}", "evaluation=chunked"), capsys.readouterr().out
    for row, printed in (trained, again):
        assert row["units"] == UNITS["text"]
        units = {name: found["units"] for name, found in row["by_source"].items()}
        assert units == {"genome": UNITS["genome"], "files": UNITS["text"]}
        genome, text = (row["by_source"][name]["bits_per_byte"] for name in ("genome", "files"))
        assert re.search(rf"of genome, bits per base +│ +{genome:.4f} ", printed)
        assert re.search(rf"of files +│ +{text:.4f} ", printed)


def test_comparison_of_runs_on_series(documents, tmp_path):
    runs = [series_run(documents, tmp_path, name, n) for n, name in enumerate("ab")]
    compared = evaluate(f"checkpoint=[{runs[0]},{runs[1]}]", f"output={tmp_path / 'comparison'}")
    (difference,) = compared["differences"]
    one, other = compared["rows"]
    assert difference["loss"] == pytest.approx(other["loss"] - one["loss"]) and difference["bits_per_byte"] is None
    text = (tmp_path / "comparison/comparison.md").read_text()
    assert "loss (nats/value)" in text and "bits" not in text and "## Loss by position (nats/value)" in text


def test_baselines_of_series_are_per_value(documents, tmp_path):
    """A value is three bytes of text."""
    run = open_run(series_run(documents, tmp_path), "cpu", "32-true")
    baselines = evaluate(f"checkpoint={run.folder}", *FEW)["baselines"]
    test = run.data.corpus.splits["test"]
    assert baselines["bigram_loss"] == pytest.approx(3 * math.log(2) * bigram_bits_per_byte(run.data.corpus, test))
    assert baselines["gzip_loss"] == pytest.approx(3 * math.log(2) * gzip_bits_per_byte(test))
