"""Sweeps in two stages: full attention at short context once, and every pattern from its weights."""

import pytest

from configs.errors import ConfigError
from scripts.reporting.aggregate import make_rows
from scripts.reporting.findings import budgets
from scripts.reporting.manifest import FIRST_STAGE, read_manifest
from scripts.reporting.read_jobs import read_sweeps
from tests.scripts.sweeping.conftest import at_message, jobs_of, run_by_another, run_sweep, states
from tests.scripts.sweeping.test_launch import fails

STAGES = ("sweep.first_stage.sequence_length=16", "sweep.first_stage.tokens=128", "sweep.tokens=192")
PAIR = ("sweep=extend", "attention=window", *STAGES)


def test_every_pattern_starts_from_one_first_stage_for_each_seed(small):
    first, second, *jobs = jobs_of(*PAIR, "seed=1,2", *small)
    for stage, seed in ((first, 1), (second, 2)):
        config = stage.config
        assert (stage.role, stage.first_stage, config["seed"]) == (FIRST_STAGE, None, seed)
        assert (config["attention"]["name"], config["init_from"]) == ("dense", None)
        assert (config["data"]["sequence_length"], config["data"]["batch_size"]) == (16, 4)
        assert config["data"]["validation_sequences"] == 16 * 64 // 16
        assert config["trainer"]["max_steps"] == 128 // 64
        assert config["optimizer"]["learning_rate"] == 3e-3
        assert config["data"]["seed"] == 2**31 + seed  # in another order than the jobs read
    assert [job.config["attention"]["name"] for job in jobs] == ["dense", "dense", "window", "window"]
    assert [job.first_stage for job in jobs] == [first.hash, second.hash] * 2
    assert [job.config["data"]["seed"] for job in jobs] == [1, 2] * 2
    for job in jobs:
        start = f"outputs/extend/{job.first_stage}"
        assert job.config["init_from"] == f"{start}/last"
        assert job.config["data"]["tokenizer"]["path"] == f"{start}/tokenizer.json"
        assert job.config["trainer"]["max_steps"] == 192 // 64
        assert job.config["optimizer"]["learning_rate"] == 5e-4


def test_both_stages_share_settings_but_not_those_of_longer_context(small):
    longer = ("model.rope_scaling=yarn_hf", "model.rope_factor=4", "model.rope_original_length=16")
    own = (
        "sweep.first_stage.learning_rate=0.01",
        "sweep.first_stage.init_from=outputs/a/last",
        "attention.patterns.local.width=32",
        "trainer.accumulate=2",
    )
    first, dense, window = jobs_of(*PAIR, *small, *longer, *own, "evaluation=whole", "sweep.first_stage.tokens=256")
    assert first.config["model"] == dense.config["model"] | {"rope_scaling": "none", "rope_factor": 1}
    assert window.config["model"]["rope_scaling"] == "yarn_hf"
    assert (first.config["optimizer"]["learning_rate"], first.config["init_from"]) == (0.01, "outputs/a/last")
    assert first.config["attention"]["block"] == 16
    assert (first.config["trainer"]["accumulate"], first.config["trainer"]["max_steps"]) == (2, 2)
    assert first.config["evaluation"]["protocol"] == {"name": "sliding", "window": None, "stride": None}
    assert dense.config["evaluation"]["protocol"]["name"] == "whole"


def test_the_budget_is_of_the_second_stage(small):
    """Equal FLOPs need the layouts of the documents, and so a tokenizer, before the first stage has saved one."""
    first, dense, window = jobs_of(*PAIR, *small, "sweep.match=flops", "sweep.tokens=null", "trainer.max_steps=3")
    assert [job.config["trainer"]["max_steps"] for job in (first, dense)] == [2, 3]
    assert window.config["trainer"]["max_steps"] >= 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep.first_stage.sequence_length=64"], r"sequence_length=64: must be less than data\.sequence_length=64"),
        (["sweep.first_stage.sequence_length=24"], r"sequence_length=24: must be a divisor of the 64 tokens"),
        (["sweep.first_stage.tokens=8"], r"sweep\.first_stage\.tokens=8: must be at least one step"),
        (["init_from=outputs/a"], r"init_from=outputs/a: must be left out with sweep\.first_stage"),
    ],
)
def test_a_first_stage_that_cannot_be_is_one_line(small, arguments, named):
    with pytest.raises(ConfigError, match=named) as error:
        jobs_of(*PAIR, *small, *arguments)
    assert "\n" not in str(error.value)


def test_a_sweep_in_two_stages_trains_the_first_one_once(tmp_path, small, reports, capsys):
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    folder = tmp_path / "extend"
    assert states(folder) == dict.fromkeys(["first stage 16 seed=1", "dense seed=1", "window seed=1"], "done")
    (sweep,) = read_sweeps([folder])
    first, *jobs = sweep.jobs
    assert [row.label for row in make_rows([sweep])] == ["dense", "window"]
    for row, job in zip(make_rows([sweep]), jobs, strict=True):
        assert job.first_stage is first
        assert row.values["train_tokens"].mean == 192 and row.values["total_tokens"].mean == 192 + 128
        flops = [each.summary["train_tokens"] * each.summary["flops_per_token"] for each in (first, job)]
        assert row.values["total_flops"].mean == pytest.approx(sum(flops))
    assert "after a first stage of 128 tokens of full attention in sequences of 16" in budgets([sweep])[0]
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    assert capsys.readouterr().err.count("already done") == 3
    with pytest.raises(SystemExit):
        run_sweep(tmp_path, *PAIR, *small, "sweep.first_stage.tokens=192")
    assert "sweep.first_stage.tokens=128" in capsys.readouterr().err


def test_a_finished_sweep_goes_on_with_another_pattern_and_another_seed(tmp_path, small, reports, capsys):
    """The first stage of a seed is trained once. Without its weights nothing is trained in its place: those of another
    machine or version would differ."""
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    capsys.readouterr()
    more = ("sweep=extend", *STAGES, *small)
    assert run_sweep(tmp_path, *more, "attention=window,strided") == 0
    assert capsys.readouterr().err.count("already done") == 3
    assert list(states(tmp_path / "extend")) == [
        f"{name} seed=1" for name in ("first stage 16", "dense", "window", "strided")
    ]
    first = read_manifest(tmp_path / "extend").jobs[0]
    (tmp_path / "extend" / first.hash / "checkpoints" / "last.ckpt").unlink()
    assert run_sweep(tmp_path, *more, "attention=window,strided") == 0, "no job needs the weights"
    with pytest.raises(SystemExit):
        run_sweep(tmp_path, *more, "attention=window,block_sparse", "seed=1,2")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{first.hash}/checkpoints/last.ckpt" in error and "from which block_sparse seed=1 starts" in error
    assert set(states(tmp_path / "extend").values()) == {"done"}, "nothing was entered"
    assert run_sweep(tmp_path, *more, "attention=dense", "seed=2") == 0, "a seed of its own first stage"


def test_jobs_wait_for_a_first_stage_that_another_process_trains(tmp_path, small, quick, reports, monkeypatch, capsys):
    """This process takes the place of one that does not finish the stage. No job starts before that."""
    trained = []
    quick["first stage 16"] = fails(RuntimeError("boom"))
    assert run_sweep(tmp_path, *PAIR, *small) == 1
    folder = tmp_path / "extend"
    assert list(states(folder).values()) == ["failed", "waiting", "waiting"]
    assert "first stage: failed, so its jobs cannot start" in capsys.readouterr().err
    stage = read_manifest(folder).jobs[0]
    quick |= {label: lambda label=label: trained.append(label) for label in ("first stage 16", "dense", "window")}

    def release() -> None:
        assert trained == []
        may_end.set()

    with run_by_another(folder, stage.hash, "interrupted") as may_end:
        monkeypatch.setattr("scripts.sweeping.sweep.log.info", at_message("its jobs wait", release))
        assert run_sweep(tmp_path, *PAIR, *small) == 0
    assert trained == ["first stage 16", "dense", "window"]
