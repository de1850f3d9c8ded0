"""train.py on a corpus that is streamed: stopped, resumed, refused where it changed, and evaluated."""

import csv
import json
import random

import pytest

from data import CorpusError
from model.training.run_folder import RunFolder
from tests.commands import resolved
from tests.scripts.runs import SMALL, WORDS
from train import train

STEPS = 15


@pytest.fixture
def settings(tmp_path):
    generator = random.Random(0)
    (tmp_path / "files").mkdir()
    for number in range(3):
        rows = [{"text": " ".join(generator.choices(WORDS, k=generator.randint(5, 90)))} for _ in range(40)]
        (tmp_path / "files" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = ("data=hub", f"data.path={tmp_path / 'files'}", f"data.cache={tmp_path / 'cache'}", f"outputs={tmp_path}")
    streamed = ("data.source.streaming=true", "data.source.held_out_documents=2", "evaluation=chunked")
    ends = (f"trainer.max_steps={STEPS}", "trainer.validate_every=8", "trainer.save_every=3", "trainer.log_every=1")
    return (*SMALL, *place, *streamed, *ends, "evaluation.baselines=false", "model.layers=1", "preflight=off")


def losses(folder) -> list[tuple[str, ...]]:
    with open(folder.metrics_file, newline="") as file:
        return [
            tuple(row.get(key, "") for key in ("step", "train/loss", "validation/loss")) for row in csv.DictReader(file)
        ]


def test_a_run_that_a_document_stopped_goes_on_without_it(settings, tmp_path, monkeypatch, caplog):
    """Exactly, with another number of workers, and on the same files alone."""
    monkeypatch.setattr("data.sources.hub.SAMPLE", 100)  # the document is behind it
    monkeypatch.setattr("data.streaming.streamed.GROUP", 100)
    for file in (tmp_path / "files").iterdir():
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[:9], '{"text": 1}', *lines[9:]]))
    size = sum(file.stat().st_size for file in (tmp_path / "files").iterdir())
    with (
        caplog.at_level("INFO"),
        pytest.raises(
            CorpusError, match=r"must hold a string in the field text, in \d\.jsonl, line 10, and holds the number 1; "
        ) as error,
    ):
        train(resolved(*settings, "name=run", "data.workers=2"))
    assert "\n" not in str(error.value)
    assert (
        f"3 files of {size:,} bytes to train on" in caplog.text and "3 files are read at the same time" in caplog.text
    )
    folder = RunFolder.open(next((tmp_path / "run").iterdir()))
    assert 3 < len(losses(folder)) < STEPS
    resumed = train(resolved(f"resume={folder.path}", "data.on_bad_document=skip", "data.workers=1"))
    whole = train(resolved(*settings, "name=whole", "data.on_bad_document=skip"))
    assert losses(folder) == losses(RunFolder.open(next((tmp_path / "whole").iterdir())))
    assert resumed["state"] == "finished" and resumed["bits_per_byte"] == whole["bits_per_byte"] > 0

    file = tmp_path / "files" / "1.jsonl"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(CorpusError, match=r"must hold the files that .* was trained with; 1 changed, 1\.jsonl "):
        train(resolved(f"resume={folder.path}", f"trainer.max_steps={STEPS + 1}"))
