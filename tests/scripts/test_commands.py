"""The commands of the README, run as a user runs them: train, resume, start from a run, sweep, evaluate."""

import csv
import json
import resource
import shutil
import signal
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml

from data.sources.splits import SPLITS, split_of
from tests.commands import read_log, run, run_forked, started

SMALL = ["experiment=smoke", "logger=csv", "data.workers=0", "trainer.max_steps=4", "trainer.validate_every=2"]


def child_seconds() -> float:
    """The CPU seconds of the processes that this one has started and that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> list[str]:
    """The settings of a library of a few modules of this Python: all of them take a minute to tokenize and to score."""
    library = tmp_path_factory.mktemp("library")
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    modules = [file for file in modules if 4_000 < file.stat().st_size < 12_000]
    for split, count in zip(SPLITS, (12, 3, 2), strict=True):
        for file in [file for file in modules if split_of(file.stem) == split][:count]:
            shutil.copy(file, library)
    (library / "abc.py").touch()
    return [f"data.path={library}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="session")
def smoke(outputs, corpus) -> tuple[Path, str, float]:
    """Runs `python train.py experiment=smoke`; returns its run folder, its printed output and its CPU seconds."""
    before = child_seconds()
    result = run("train.py", "experiment=smoke", f"outputs={outputs}", *corpus)
    folders = list((outputs / "smoke").iterdir())
    assert len(folders) == 1
    return folders[0], result.stdout + result.stderr, child_seconds() - before


def test_the_smoke_run_leaves_a_whole_run_folder(smoke):
    folder, screen, _ = smoke
    for name in ("config.yaml", "summary.json", "metrics.csv", "train.log", "evaluation.json", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("last", "best"):
        assert torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    assert "=" not in "".join(str(file.relative_to(folder)) for file in folder.rglob("*") if "wandb" not in str(file))
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["sequence_length"] == 256
    assert list((folder / "wandb").glob("offline-run-*")), "the wandb logger writes offline"
    assert str(folder) in screen


def test_the_smoke_run_prints_the_table(smoke):
    _, screen, _ = smoke
    for row in ("bits per byte", "gzip -9", "bigram", "perplexity", "tokens/s", "attention density", "peak memory"):
        assert row in screen


def test_the_summary_holds_quality_and_cost(smoke):
    summary = json.loads((smoke[0] / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["step"] == 12
    assert 0 < summary["density_pairs"] < summary["density_tiles"]
    for key in (
        "loss",
        "bits_per_byte",
        "perplexity",
        "peak_memory_bytes",
        "parameters",
        "train_tokens",
        "flops_per_token",
    ):
        assert summary[key] > 0, key


def test_the_loss_falls_in_the_smoke_run(smoke):
    with open(smoke[0] / "metrics.csv") as file:
        losses = [float(row["validation/loss"]) for row in csv.DictReader(file) if row["validation/loss"]]
    assert losses[-1] < losses[0]


def test_the_smoke_run_takes_less_than_a_minute(smoke):
    assert smoke[2] < 60


def test_evaluate_reproduces_the_runs_own_evaluation(smoke, tmp_path):
    folder = smoke[0]
    own = json.loads((folder / "evaluation.json").read_text())["rows"][0]
    output = tmp_path / "evaluation.json"
    result = run_forked("scripts/evaluate.py", f"checkpoint={folder}", "evaluation=chunked", f"output={output}",
                        "evaluation.long_document=1024", "accelerator=cpu")  # fmt: skip
    row = json.loads(output.read_text())["rows"][0]
    assert row["nll_nats"] == pytest.approx(own["nll_nats"], rel=1e-6)
    assert row["tokens_scored"] == own["tokens_scored"] == sum(b["tokens"] for b in row["by_position"])
    assert row["protocol"] == {"name": "chunked", "window": 256, "stride": None, "min_context": 0, "bos": True}
    assert "bits per byte" in result.stdout


def test_evaluate_takes_ones_own_documents(smoke, tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/one.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    (tmp_path / "documents/two.md").write_text("short")
    output = tmp_path / "evaluation.json"
    run_forked("scripts/evaluate.py", f"checkpoint={smoke[0]}/best", "data=files", f"output={output}",
               f"data.path={tmp_path / 'documents'}", "accelerator=cpu")  # fmt: skip
    row = json.loads(output.read_text())["rows"][0]
    assert row["documents"] == 2
    assert row["bytes"] == sum(file.stat().st_size for file in (tmp_path / "documents").iterdir())


def test_a_resumed_run_ends_with_the_same_bits(outputs, corpus):
    constant = ["optimizer=adamw", "optimizer.schedule.name=constant", "~optimizer.schedule.final_fraction"]
    small = [*SMALL, *corpus, *constant, f"outputs={outputs}", "trainer.accumulate=3"]
    run_forked("train.py", *small, "name=straight", "trainer.max_steps=6")
    run_forked("train.py", *small, "name=resumed", "trainer.max_steps=4")
    (straight,), (resumed,) = (outputs / "straight").iterdir(), (outputs / "resumed").iterdir()
    run_forked("train.py", f"resume={resumed}", "trainer.max_steps=6")
    assert json.loads((resumed / "summary.json").read_text())["step"] == 6
    weights = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (straight, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = []
    for folder in (straight, resumed):
        with open(folder / "metrics.csv") as file:
            losses.append([(row["step"], row["train/loss"], row["validation/loss"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1] and len(losses[0]) > 3


def test_resume_refuses_to_become_another_run(smoke):
    refused = run_forked("train.py", f"resume={smoke[0]}", "attention=dense", check=False)
    assert refused.returncode == 2 and "init_from" in refused.stderr


def test_a_run_starts_from_anothers_weights_under_another_pattern(smoke, outputs, corpus):
    settings = (*SMALL, *corpus, f"outputs={outputs}", f"init_from={smoke[0]}")
    result = run_forked("train.py", *settings, "name=again", "attention.schedule=[full]")
    assert "data.seed=2 reads the text in another order" in result.stdout + result.stderr
    (folder,) = (outputs / "again").iterdir()
    with open(folder / "metrics.csv") as file:
        first = next(float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"])
    with open(smoke[0] / "metrics.csv") as file:
        untrained = next(float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"])
    assert first < untrained
    refused = run_forked("train.py", *settings, "model.layers=2", check=False)
    assert refused.returncode == 2 and "model.layers=2, there 4" in refused.stderr


def test_a_sweep_goes_on_after_a_job_that_cannot_run(outputs, corpus):
    result = run_forked("train.py", "-m", *SMALL, *corpus, f"outputs={outputs}", "name=sweep", "trainer.max_steps=2",
                        "data.sequence_length=0,128,256", check=False)  # fmt: skip
    assert result.returncode != 0
    assert "data.sequence_length=0" in result.stderr
    lengths = [yaml.safe_load((folder / "config.yaml").read_text())["data"]["sequence_length"]
               for folder in sorted((outputs / "sweep").iterdir())]  # fmt: skip
    assert lengths == [128, 256]


def test_help_is_quick_and_lists_the_groups():
    before = child_seconds()
    result = run("train.py", "--help")
    assert child_seconds() - before < 3
    assert "attention: " in result.stdout and "block_sparse" in result.stdout


def test_wandb_is_imported_only_where_it_is_chosen():
    result = run(
        "-c", "import train, configs.checks, model.training.fit, data.module, sys; print('wandb' in sys.modules)"
    )
    assert result.stdout.strip() == "False"


def test_ctrl_c_saves_the_run_and_stops_a_sweep(outputs, corpus):
    settings = (*SMALL, *corpus, "trainer.max_steps=100000", "trainer.log_every=1", "name=stopped", "seed=1,2")
    with started("train.py", "-m", *settings, f"outputs={outputs}") as process:
        read_log(process, "step 2/")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    (folder,) = (outputs / "stopped").iterdir()
    assert f"python train.py resume={folder}" in rest
    assert json.loads((folder / "summary.json").read_text())["state"] == "interrupted"
    assert (folder / "checkpoints/last.ckpt").is_file()
