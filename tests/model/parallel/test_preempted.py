"""A job that submitit starts, on a machine without SLURM: a preemption saves it, and it is requeued."""

import pytest
import torch

from model.training.checkpoints import read_checkpoint
from model.training.run_folder import RunFolder
from tests.model.parallel import training

SETTINGS = dict(max_steps=6, validate_every=None)


@pytest.mark.slow  # two processes of submitit, one after the other
def test_a_preempted_job_ends_with_the_bits_of_one_that_never_stopped(tmp_path):
    submitit = pytest.importorskip("submitit")
    from tests.model.parallel.preempted import Job

    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(Job(tmp_path / "run", **SETTINGS))
    assert job.result() == 2, "the session that ended the run"
    assert RunFolder(tmp_path / "run").read_summary()["step"] == 6
    log = job.stderr()
    assert "SIGUSR2: finishing this step" in log

    training.train(tmp_path / "straight", **SETTINGS)
    found, expected = (read_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("run", "straight"))
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
