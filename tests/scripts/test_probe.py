"""scripts/probe.py as a whole: its files, its schedule line in train.py, and its errors."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest

from configs.build import ConfigError, build_model
from configs.checks import check
from configs.runs import open_run
from model.evaluation import Protocol, token_losses
from model.training.checkpoints import CheckpointFile, load_weights
from model.training.run_folder import find_checkpoint
from scripts import probe as command
from scripts.export import export_run
from tests.commands import compose, resolved
from tests.scripts.runs import SMALL, make_run


@pytest.fixture(scope="module")
def dense(outputs, books) -> Path:
    """A run whose best checkpoint has other weights than its last one, which is the probed one."""
    run, other = (
        make_run(outputs, books, "attention=dense", name=name, seed=len(name)) for name in ("dense", "other run")
    )
    shutil.copyfile(other / "checkpoints/last.ckpt", run / "checkpoints/best.ckpt")
    return run


def probe(*overrides: str) -> dict:
    """What the command line `overrides` gives."""
    composed = compose(*overrides, "accelerator=cpu", "attention.block=16", config_name="probe")
    return command.probe(composed, [*overrides, "attention.block=16"])


def loss_of(config: dict, run_folder: Path) -> float:
    """Mean loss of the model with which train.py would begin, on the test split of a run in chunks of 64 tokens."""
    run = open_run(run_folder, "cpu", "64-true")
    model = build_model(config, run.tokenizer.vocabulary).double()
    load_weights(model, CheckpointFile(find_checkpoint(config["init_from"])))
    documents = run.data.corpus.splits["test"]
    losses = token_losses(model.eval(), documents, Protocol("chunked", 64, None), tokens_at_once=4096)
    return sum(float(each.sum()) for each in losses) / sum(map(len, losses))


UNROTATED = "+attention.patterns.full.rope=none"
"""Of the probed run: its layers have no rotary embeddings."""


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention.patterns.local.width=8"],
        ["attention.patterns.local.width=8", "per_head=true"],
        ["attention.patterns.local.width=8", UNROTATED],
        ["attention=hierarchical", "attention.patterns.hierarchy.window=8", "attention.patterns.hierarchy.spans=[4]",
         "attention.patterns.hierarchy.reaches=[]", "attention.patterns.hierarchy.pooling=mean"],
    ],
    ids=["window", "per_head", "without_rope", "hierarchical"],
)  # fmt: skip
def test_the_printed_line_gives_train_the_schedule_that_was_measured(
    overrides, dense, books, outputs, tmp_path, capsys
):
    output = tmp_path / "probe.json"
    if UNROTATED in overrides:
        dense = make_run(outputs, books, "attention=dense", UNROTATED, name="unrotated")
        overrides = [each for each in overrides if each != UNROTATED]
    result = probe(f"checkpoint={dense}", "precision=64-true", "measure=all", "tolerance=0.0", f"output={output}",
                   "split=test", *overrides)  # fmt: skip
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert printed.endswith(result["overrides"])
    chosen = result["schedules"][result["recommended"]]
    own = [*SMALL, "data=files", f"data.path={books}", f"data.cache={outputs / 'cache'}"]
    config = resolved(*own, "trainer.accelerator=cpu", *shlex.split(printed))
    check(config)
    assert [entry if isinstance(entry, str) else list(entry) for entry in config["attention"]["schedule"]] == (
        chosen["schedule"]
    )
    # The last chunk of a document is scored by the probe only if the pattern hides something from it.
    assert result["chunks"] == sum(1 for _ in _chunks(dense)), "every chunk is long enough here"
    expected = loss_of(config, dense)
    assert result["dense_loss"] + chosen["measured"]["change"] == pytest.approx(expected, abs=1e-10)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))


def _chunks(run_folder: Path):
    documents = open_run(run_folder, "cpu", "64-true").data.corpus.splits["test"]
    for document in range(len(documents)):
        yield from Protocol("chunked", 64, None).segments(len(documents.tokens(document)))


def test_the_printed_line_starts_from_a_pretrained_model(dense, books, outputs, tmp_path, capsys):
    folder = tmp_path / "exported"
    export_run(compose(f"checkpoint={dense}", f"output={folder}", config_name="export"))
    data = ["data=files", f"data.path={books}", f"data.cache={outputs / 'cache'}"]
    probe(f"checkpoint=hf:{folder}", *data, "length=64", "attention.patterns.local.width=8", "tokens=700")
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    config = resolved(*data, "data.sequence_length=64", "trainer.accelerator=cpu", *shlex.split(printed))
    check(config)
    assert config["init_from"] == f"hf:{folder}" and config["attention"]["patterns"]["local"]["width"] == 8


def test_the_files_hold_a_row_per_layer(dense):
    result = probe(f"checkpoint={dense}", "attention.patterns.local.width=8", "tokens=700", "queries=5")
    assert result["checkpoint"] == "checkpoints/last.ckpt" and result["documents_from"] == "test"
    assert result["tokens"] <= 700 and result["documents"] == 4 and result["longest"] == 64
    assert json.loads((dense / "probe.json").read_text()) == json.loads(json.dumps(result))
    with open(dense / "probe.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["change"]) for row in rows] == [row["change"] for row in result["units"]]
    assert [row["layer"] for row in rows] == ["0", "1"] and "change_32_64" in rows[0] and "mass_8_16" in rows[0]
    for row in result["units"]:
        assert row["low"] <= row["change"] <= row["high"] and sum(row["mass"]) == pytest.approx(1, abs=1e-4)
    assert (dense / "report" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert not (dense / "probe.partial").exists()
    assert [row["kept"] for row in result["schedules"] if row["measured"]] == [0, 1, 2]
    assert result["schedules"][-1]["cache_bytes"] == 2 * 2 * 2 * 8 * 64 * 4, "layers, k and v, KV heads, ..., float32"


def test_what_cannot_be_probed_is_one_line(dense, outputs, books, tmp_path):
    def refused(words: str, *overrides: str) -> None:
        with pytest.raises(ConfigError) as error:
            probe(*overrides)
        line = str(error.value)
        assert "\n" not in line and all(each in line for each in words.split("... ")), line

    window = make_run(outputs, books, "attention=window_dense", name="window")
    refused(
        "checkpoint=... last.ckpt: must be a run whose layers are all dense; layer 0 has attention.patterns.local",
        f"checkpoint={window}",
    )
    mixed = [
        "+attention.patterns.bare={_target_: kernels.patterns.Dense, rope: none}",
        "attention.schedule=[full,bare]",
    ]
    mixed_run = make_run(outputs, books, "attention=dense", *mixed, name="mixed")
    refused("checkpoint=... must be a run whose layers have the same ... rope=model, none", f"checkpoint={mixed_run}")
    refused("length=9999999: must be at most ... max_length=", f"checkpoint={dense}", "length=9999999")
    short = tmp_path / "short.txt"
    short.write_text("a short text")
    refused("data.path=... short.txt: must ... attention.patterns.local={_target_:kernels.patterns.Window,width:256",
            f"checkpoint={dense}", "data=files", f"data.path={short}")  # fmt: skip
    refused(
        "length=64: must ... attention.patterns.local={_target_:kernels.patterns.Window,width:256",
        f"checkpoint={dense}",
    )
    refused("attention.patterns.hierarchy={... pooling:learned... must be a pattern without parameters",
            f"checkpoint={dense}", "attention=hierarchical")  # fmt: skip
    refused("attention.patterns.routed={... router:indexer... must be a pattern without parameters",
            f"checkpoint={dense}", "attention=routed", "attention.patterns.routed.router=indexer")  # fmt: skip
    refused(
        "per_head=true: must be false ... a KV head 'routed', which serves whole layers",
        f"checkpoint={dense}",
        "attention=routed",
        "per_head=true",
    )
    assert not (dense / "probe.partial").exists()
