import pytest

from model.training.run_folder import RunFolderError, config_hash
from model.training.slurm import SlurmError, check_tasks, cluster_environment, slurm_run_path


@pytest.fixture(autouse=True)
def slurm(monkeypatch):
    """Sets SLURM's variables of this process: none but those that are given."""
    import os

    def set_to(**variables: object) -> None:
        for key in [key for key in os.environ if key.startswith("SLURM_")]:
            monkeypatch.delenv(key)
        for key, value in variables.items():
            monkeypatch.setenv(f"SLURM_{key}", str(value))

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    set_to()
    return set_to


def config(tmp_path, **changes):
    return {"outputs": str(tmp_path), "name": "window", "seed": 1} | changes


def test_outside_slurm_there_is_no_folder_of_a_job(tmp_path):
    assert slurm_run_path(config(tmp_path)) is None


def test_a_requeued_job_finds_the_newest_folder_of_its_job_and_config(tmp_path, slurm):
    slurm(JOB_ID=4711)
    first = slurm_run_path(config(tmp_path))
    first.mkdir(parents=True)
    assert first.parent == tmp_path / "window"
    assert first.name.startswith(f"slurm_4711_{config_hash(config(tmp_path))}_")
    again = slurm_run_path(config(tmp_path))
    assert again != first, "a job that was not restarted may run one command twice"

    slurm(JOB_ID=4711, RESTART_COUNT=1)
    assert slurm_run_path(config(tmp_path)) == first
    assert not slurm_run_path(config(tmp_path, seed=2)).exists(), "another command of the same job"
    slurm(JOB_ID=471, RESTART_COUNT=1)
    assert not slurm_run_path(config(tmp_path)).exists(), "another job"


def test_all_tasks_of_a_step_share_a_folder(tmp_path, slurm):
    paths = set()
    for rank in range(3):
        slurm(JOB_ID=4711, NTASKS=3, STEP_NUM_TASKS=3, STEP_ID=0, PROCID=rank)
        paths.add(slurm_run_path(config(tmp_path)))
    assert len(paths) == 1
    slurm(JOB_ID=4711, NTASKS=3, STEP_NUM_TASKS=3, STEP_ID=1, PROCID=0)
    assert slurm_run_path(config(tmp_path)) not in paths, "the next step is another run"


def test_the_name_is_checked(tmp_path, slurm):
    slurm(JOB_ID=4711)
    with pytest.raises(RunFolderError, match=r"name='\.\./up'"):
        slurm_run_path(config(tmp_path, name="../up"))


STARTED = dict(NTASKS=4, STEP_NUM_TASKS=4, NTASKS_PER_NODE=4)


@pytest.mark.parametrize(
    ("variables", "devices", "line"),
    [
        (dict(NTASKS=4), 1, r"SLURM_NTASKS=4: must be 1 .*srun --ntasks-per-node=4 python train.py trainer.devices=4"),
        (STARTED | dict(JOB_NAME="interactive"), 4, "SLURM_JOB_NAME=interactive: must be another name"),
        (STARTED | dict(NNODES=2, NTASKS_PER_NODE=2), 2, r"trainer\.nodes=1: must be 2"),
        (STARTED | dict(NTASKS_PER_NODE=""), 4, "SLURM_NTASKS_PER_NODE=: must be 4"),
        (STARTED, 1, "trainer.devices=1: must be 4"),
        (STARTED, "auto", "trainer.devices=auto: must be 4"),
    ],
)
def test_tasks_that_do_not_fit_are_one_line(slurm, variables, devices, line):
    slurm(**variables)
    with pytest.raises(SlurmError, match=line) as error:
        check_tasks(devices, nodes=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, 2),
        (dict(NTASKS=1), 1),
        (dict(NTASKS=4, JOB_NAME="bash"), 1),  # the shell of an allocation: Lightning ignores SLURM
        (STARTED | dict(NNODES=1), 4),
    ],
)
def test_tasks_that_fit(slurm, variables, devices):
    slurm(**variables)
    check_tasks(devices, nodes=1)


def test_tasks_on_several_nodes(slurm):
    of_two = STARTED | dict(NNODES=2, NTASKS_PER_NODE=2)
    slurm(**of_two)
    check_tasks(2, nodes=2)
    with pytest.raises(SlurmError, match=r"trainer\.devices=4: must be 2"):
        check_tasks(4, nodes=2)
    slurm()
    with pytest.raises(SlurmError, match=r"trainer\.nodes=2: must be 1"):
        check_tasks(2, nodes=2)


def test_who_starts_the_processes(slurm):
    assert cluster_environment() == []
    slurm(NTASKS=1)
    (alone,) = cluster_environment()
    assert not alone.creates_processes_externally
    slurm(**STARTED)
    (started,) = cluster_environment()
    assert started.creates_processes_externally and not started.auto_requeue
    slurm(**STARTED | dict(JOB_NAME="bash"))
    assert cluster_environment() == []


def test_steps_and_jobs_find_their_tasks_at_ports_of_their_own(slurm, monkeypatch):
    """Lightning's port is the same for all steps of a job, and for jobs whose numbers have the same last digits."""

    monkeypatch.delenv("MASTER_PORT", raising=False)

    def port(job, step):
        slurm(**STARTED | dict(JOB_ID=job, STEP_ID=step))
        (environment,) = cluster_environment()
        return environment.main_port

    ports = [port(job, step) for job in (4711, 14711, 24711) for step in range(3)]
    assert len(set(ports)) == 9 and all(15000 <= each < 30000 for each in ports)
    assert port(4711, 0) == ports[0], "each task of a step finds the same port"
    monkeypatch.setenv("MASTER_PORT", "2345")
    assert port(4711, 0) == 2345, "the user's own"


def test_torchrun_counts_its_own_processes(slurm, monkeypatch):
    slurm(NTASKS=4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    check_tasks(2, nodes=1)
    assert cluster_environment() == []
