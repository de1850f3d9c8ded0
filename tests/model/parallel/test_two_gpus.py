"""DDP and FSDP2 on two GPUs of one machine, through the command that a user runs."""

import csv
import os
from pathlib import Path

import pytest
import torch

from tests.commands import run
from tests.scripts.runs import write_books

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

CARDS = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}  # `run` hides them otherwise
ONE_GPU = ("trainer=gpu", "trainer.cuda_graph=false")  # several GPUs train without a graph


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains 8 steps on 16,384 tokens each, all devices together; returns the run's folder."""
    root = tmp_path_factory.mktemp("gpus")
    files = ("data=files", f"data.path={write_books(root / 'books', words=4000)}", f"data.cache={root / 'cache'}")
    sizes = ("data.tokenizer.vocabulary=300", "data.sequence_length=2048", "model=tiny", "optimizer=muon")
    steps = ("trainer.max_steps=8", "trainer.validate_every=8", "trainer.log_every=1", "evaluation=chunked")
    plateau = ("optimizer.schedule.warmup_fraction=0", "optimizer.schedule.decay_fraction=0")

    def once(name: str, devices: int, *overrides: str) -> Path:
        batch = f"data.batch_size={8 // devices}"
        run("train.py", *files, *sizes, *steps, *plateau, batch, f"outputs={root}", f"name={name}", *overrides, **CARDS)
        return next((root / name).iterdir())

    return once


def losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def alone(train) -> list[float]:
    return losses(train("alone", 1, *ONE_GPU))


@pytest.mark.parametrize("attention", ["window", "routed"])
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_losses_are_those_of_one_gpu(train, alone, trainer, attention):
    expected = alone if attention == "window" else losses(train("routed_alone", 1, *ONE_GPU, "attention=routed"))
    devices = (f"trainer={trainer}", "trainer.devices=2", f"attention={attention}")
    found = losses(train(f"{trainer}_{attention}", 2, *devices))
    assert len(found) == len(expected) == 8
    assert found == pytest.approx(expected, rel=0.01), "rounding in bf16"


def test_a_sharded_run_resumes_on_one_gpu(train, alone):
    """4 steps on two GPUs, then 4 on one, with the losses of 8 steps on one: on the schedule's plateau, the rate does
    not depend on the end of the run."""
    folder = train("resumed", 2, "trainer=fsdp", "trainer.devices=2", "trainer.max_steps=4")
    change = ("trainer.devices=1", "trainer.strategy=auto", "data.batch_size=8", "trainer.max_steps=8")
    run("train.py", f"resume={folder}", *change, **CARDS)
    assert losses(folder) == pytest.approx(alone, rel=0.01), "rounding in bf16"
