"""A SLURM job that is signalled, requeued, and runs the same command again."""

import csv
import json
import signal

import torch

from tests.commands import read_log, run_forked, started
from tests.scripts.runs import SMALL, write_books

SHORT = ("trainer.validate_every=null", "trainer.log_every=1", "evaluation=chunked", "evaluation.baselines=false")


def test_sigusr1_saves_and_the_requeued_job_goes_on(tmp_path, monkeypatch):
    books = write_books(tmp_path / "books")
    settings = (*SMALL, *SHORT, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}")
    command = [*settings, f"outputs={tmp_path}", "name=run", "trainer.max_steps=200"]
    variables = dict(JOB_ID=4711, JOB_NAME="train", NTASKS=1, PROCID=0, LOCALID=0, NODEID=0)
    for key, value in variables.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))

    with started("train.py", *command) as first:
        read_log(first, "step 2/")
        first.send_signal(signal.SIGUSR1)
        rest = first.stderr.read()
    assert first.returncode == 130, rest
    (folder,) = (tmp_path / "run").iterdir()
    stopped = json.loads((folder / "summary.json").read_text())
    assert stopped["state"] == "interrupted" and 2 <= stopped["step"] < 200
    assert not list(folder.rglob("hpc_ckpt*"))
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == stopped["step"]

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_forked("train.py", *command)
    assert list((tmp_path / "run").iterdir()) == [folder]
    finished = json.loads((folder / "summary.json").read_text())
    assert (finished["state"], finished["step"]) == ("finished", 200)
    with open(folder / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(1, 201))
