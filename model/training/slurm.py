"""Runs inside a SLURM job: the folder that a requeued job finds again, and the number of tasks.

A requeued job runs its batch script once more, with the same SLURM_JOB_ID and a higher SLURM_RESTART_COUNT. So the
folder's name holds the job's number and the config's hash: `slurm_4711_0f3a9c2b7d1e_<step or date>`. A restarted job
goes on in the folder of the same job and config. A command that runs again in a job that was not restarted (in an
interactive allocation, say) is a new run.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from model.training.run_folder import config_hash, new_run_path


class SlurmError(ValueError):
    """The tasks of a SLURM job do not fit the run."""


def slurm_run_path(config: dict[str, Any]) -> Path | None:
    """The run folder of this config in this SLURM job, new or from before a requeue. None outside SLURM.

    All tasks that srun starts get the same path.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    fresh = new_run_path(config["outputs"], config["name"])
    prefix = f"slurm_{job}_{config_hash(config)}_"
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        earlier = [path for path in fresh.parent.glob(f"{prefix}*") if path.is_dir()]
        if earlier:
            return max(earlier, key=lambda path: path.stat().st_mtime)
    # A date would differ between the tasks of a step.
    return fresh.parent / (prefix + (os.environ["SLURM_STEP_ID"] if _tasks() > 1 else fresh.name))


def check_tasks(devices: Any, nodes: int) -> None:
    """Raises SlurmError unless every task of a job with several tasks trains on one of `devices` of one of `nodes`
    (trainer.devices, trainer.nodes), or the job has one task and one node.

    Nothing is checked where Lightning ignores SLURM: under torchrun, and in a job named "bash" or "interactive" whose
    shell starts the command.
    """
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)
    name = os.environ.get("SLURM_JOB_NAME")
    if TorchElasticEnvironment.detect():
        return
    if max(tasks, _tasks()) == 1 or (name in ("bash", "interactive") and _tasks() == 1):
        if nodes > 1:
            raise SlurmError(
                f"trainer.nodes={nodes}: must be 1 for a command that srun does not start on {nodes} nodes"
            )
        return
    if name in ("bash", "interactive"):
        raise SlurmError(f"SLURM_JOB_NAME={name}: must be another name for several tasks; give srun --job-name")
    given = int(os.environ.get("SLURM_NNODES") or 1)
    each = tasks // given
    command = f"srun --ntasks-per-node={each} python train.py trainer.devices={each}"
    command += f" trainer.nodes={given} ..." if given > 1 else " ..."
    if _tasks() != tasks:
        raise SlurmError(
            f"SLURM_NTASKS={tasks}: must be 1 for a command that srun does not start; for {tasks} processes give "
            f"{command}, for one process sbatch --ntasks=1 (or unset SLURM_NTASKS)"
        )
    if given != nodes:
        raise SlurmError(f"trainer.nodes={nodes}: must be {given}, the number of the job's nodes (SLURM_NNODES)")
    if os.environ.get("SLURM_NTASKS_PER_NODE") != str(each):
        per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "")
        raise SlurmError(
            f"SLURM_NTASKS_PER_NODE={per_node}: must be {each}, SLURM_NTASKS / SLURM_NNODES; give {command}"
        )
    if devices != each:
        raise SlurmError(f"trainer.devices={devices}: must be {each}, the number of a node's tasks (SLURM_NTASKS)")


class StepEnvironment(SLURMEnvironment):
    """Gives each SLURM job step its own rendezvous port: MASTER_PORT if it is set, otherwise a hash of the ids of the
    job and the step.

    Lightning computes the port from the last four digits of the job id. Two steps of one job on one node, or two jobs
    with equal last digits, would get the same port: their ranks would wait for one another until they time out.
    """

    FIRST_PORT, PORTS = 15000, 15000  # below those that Linux gives to outgoing connections

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in os.environ:
            return int(os.environ["MASTER_PORT"])
        step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
        number = int.from_bytes(hashlib.sha256(step.encode()).digest())
        return self.FIRST_PORT + number % self.PORTS


def cluster_environment() -> list[ClusterEnvironment]:
    """The plugin by which Lightning's Trainer finds a run's processes in a SLURM job; none outside SLURM.

    With several tasks srun has started the processes. With one task Lightning starts them, one for each device; by
    default it would wait for tasks that never come. Lightning never requeues a job or saves a file for it by itself.
    """
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [LightningEnvironment() if _tasks() == 1 else StepEnvironment(auto_requeue=False)]


def _tasks() -> int:
    """Processes that srun started for this step; 1 in the batch script itself."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
