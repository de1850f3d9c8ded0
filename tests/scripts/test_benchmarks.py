"""Benchmarks run, and what they report of memory is what was there. (Times are the machine's.)"""

import argparse
import json
import resource

import pytest
import torch

from model.training.storage import StorageError
from scripts.benchmarks.data import add_arguments
from scripts.benchmarks.data import run as measure_loaders
from scripts.benchmarks.results import earlier_rows, write
from scripts.benchmarks.training import Kind, TrainingStep
from tests.commands import run, run_forked
from tests.scripts.runs import write_books


def test_decode_reports_times_and_memory(tmp_path):
    output = tmp_path / "decode.json"
    arguments = ["--attention", "window", "dense", "--contexts", "100", "400", "--tokens", "2", "--batch", "2"]
    result = run_forked("scripts/benchmark.py", "decode", *arguments, "--prefill-chunk", "64", "--output", str(output))
    rows = {(row["attention"], row["context"]): row for row in json.loads(output.read_text())["rows"]}
    assert len(rows) == 4 and "| window | 400 |" in result.stdout
    token = 2 * 4 * 4 * 32 * 4 * 2 / 2**30  # k and v, layers, KV heads, head_dim, bytes, sequences
    assert abs(rows["dense", 400]["cache_gib"] - 405 * token) < 1e-6
    assert abs(rows["window", 400]["cache_gib"] - 255 * token) < 1e-6
    assert all(row["ms_per_token"] > 0 and row["prefill_ms"] > 0 for row in rows.values())


def test_data_measures_each_loader_beside_a_memory_map(tmp_path, capsys):
    output = tmp_path / "data.json"
    data = ["data=files", f"data.path={write_books(tmp_path / 'books')}", f"data.cache={tmp_path / 'cache'}"]
    data += ["data/tokenizer=bytes", "data.sequence_length=128", "data.batch_size=2"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    short = ["--packings", "contiguous", "best_fit", "--workers", "0", "--rounds", "3", "--seconds", "0.02"]
    measure_loaders(parser.parse_args([*short, "--output", str(output), "--overrides", *data]))
    rows = json.loads(output.read_text())["rows"]
    streamed = ["streamed, bytes", "streamed, 257 tokens"]
    assert [row["loader"] for row in rows] == ["memory map", "contiguous", "best_fit", *streamed]
    assert all(0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"] for row in rows)
    assert rows[0]["relative"] == 1 and "| best_fit | 0 | 2 x 128 |" in capsys.readouterr().out


def test_training_counts_the_pairs_of_every_batch_that_it_measures():
    overrides = ["trainer=cpu", "model.layers=1", "attention.block=32"]
    arguments = argparse.Namespace(model="nano", tokens=128, documents=50, steps=3, overrides=overrides)
    step = TrainingStep(Kind("dense", 128), arguments)
    causal = torch.ones(128, 128, dtype=torch.bool).tril()
    densities = [
        float(((document[:, :, None] == document[:, None]) & causal).sum() / causal.sum())
        for document in (batch["document"] for batch in step.batches)
    ]
    assert len(densities) == 3 and max(densities) - min(densities) > 0.1
    assert step.density_and_flops()[0] == pytest.approx(sum(densities) / 3, rel=1e-5)
    with pytest.raises(SystemExit, match=r"^error: trainer\.fp8=mlp: must be false on a CPU$"):
        TrainingStep(Kind("dense", 128, fp8="mlp"), arguments)
    with pytest.raises(SystemExit, match=r"^error: trainer\.cuda_graph=true: must be false or auto on a CPU$"):
        TrainingStep(Kind("dense", 128, cuda_graph="true"), arguments)


@pytest.mark.slow
def test_memory_of_a_users_run_is_forecast_within_a_tenth(tmp_path):
    """The default run's process on a CPU, with shorter sequences."""
    output = tmp_path / "memory.json"
    settings = ("--attention", "window", "--lengths", "1024", "--checkpointing", "off")
    result = run_forked("scripts/benchmark.py", "memory", *settings, "--output", str(output))
    (row,) = json.loads(output.read_text())["rows"]
    assert row["forecast_mb"] == pytest.approx(row["measured_mb"], rel=0.1), row
    assert row["ratio"] == pytest.approx(row["forecast_mb"] / row["measured_mb"], abs=2e-3)
    assert f"| nano | window | 1024 | off | {row['forecast_mb']} | {row['measured_mb']} |" in result.stdout


def test_results_that_cannot_be_written_leave_the_earlier_ones(tmp_path):
    arguments = argparse.Namespace(output=tmp_path / "results.json", tokens=5)
    write(arguments, [{"ms": 1.5}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(StorageError, match=str(arguments.output)):
            write(arguments, [{"ms": 2.5}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(arguments.output.read_text())["rows"] == [{"ms": 1.5}]
    assert list(tmp_path.iterdir()) == [arguments.output]


def test_scaling_measures_a_run_on_two_ranks_once(tmp_path):
    output = tmp_path / "scaling.json"
    data = ("data=files", f"data.path={write_books(tmp_path / 'books')}", f"data.cache={tmp_path / 'cache'}")
    sizes = ("data.sequence_length=128", "data.batch_size=1", "data.tokenizer.vocabulary=300", "model.layers=1")
    arguments = ["--kinds", "context", "--devices", "2", "--steps", "13", "--output", str(output)]
    arguments += [
        "--overrides",
        *data,
        *sizes,
        "trainer=cpu",
        "attention.block=32",
        "attention.patterns.local.width=32",
    ]
    run("scripts/benchmark.py", "scaling", *arguments)
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["kind"], row["devices"]) == ("context", 2)
    assert row["tokens_per_second"] == pytest.approx(128e3 / row["step_ms"], rel=0.02)
    assert row["context_bytes_sent"] > 0 and row["busy"] > 0


def test_rows_are_appended_to_a_file_that_may_not_exist_yet(tmp_path):
    output = tmp_path / "rows.json"
    arguments = argparse.Namespace(output=output, append=True)
    assert earlier_rows(arguments) == []
    write(arguments, [{"length": 1}])
    assert earlier_rows(arguments) == [{"length": 1}]
    assert earlier_rows(argparse.Namespace(output=output, append=False)) == []
