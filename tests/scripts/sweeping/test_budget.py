"""Equal budgets: the steps, seconds and FLOPs that each job of a sweep gets."""

import numpy as np
import pytest

from configs.build import ConfigError, build_data
from configs.forecasting import flops_of_phases
from model.forecasting import total_cost
from scripts.sweeping.composer import Composer
from scripts.sweeping.plan import Plan
from tests.scripts.sweeping.conftest import jobs_of


def steps(*arguments: str) -> dict[str, int]:
    return {job.overrides["attention"]: job.config["trainer"]["max_steps"] for job in jobs_of(*arguments)}


def budget(*arguments: str) -> dict | None:
    with Composer(["-m", *arguments]) as composer:
        plan = Plan(composer)
        plan.drafts()
        return plan.compute.budget


def test_equal_tokens_are_those_of_the_first_job():
    assert budget("sweep=patterns", "attention=window") == {"tokens": 300_000}  # the YAML's
    assert budget("sweep=patterns", "attention=window", "sweep.tokens=null") == {"tokens": 420 * 4096}
    assert budget("sweep=patterns", "trainer.accumulate=3", "trainer.max_steps=10") == {"tokens": 10 * 3 * 4096}


def test_equal_tokens_are_fewer_steps_where_a_step_has_more():
    arguments = ["sweep=patterns", "attention=window", "data.batch_size=1,2,3", "sweep.tokens=81920"]
    found = [(job.overrides["data.batch_size"], job.overrides["trainer.max_steps"]) for job in jobs_of(*arguments)]
    assert found == [("1", "20"), ("2", "10"), ("3", "7")] * 2


def test_no_match_leaves_each_job_to_its_config():
    arguments = ["sweep=patterns", "attention=window", "sweep.match=null", "trainer.max_steps=10,20"]
    assert [job.config["trainer"]["max_steps"] for job in jobs_of(*arguments)] == [10, 20] * 2
    assert budget(*arguments) is None


def test_equal_time_ends_every_job_by_the_clock():
    arguments = ["sweep=patterns", "attention=window", "sweep.match=time"]
    for job in jobs_of(*arguments, "sweep.seconds=120"):
        assert (job.config["trainer"]["max_steps"], job.config["trainer"]["max_seconds"]) == (None, 120)
    assert budget(*arguments, "trainer.max_seconds=7.5") == {"seconds": 7.5}


def spent_by(config, data):
    return total_cost(flops_of_phases(config, data), config["trainer"]["max_steps"])


def test_equal_flops_are_more_steps_where_a_step_is_cheaper_in_each_phase(small):
    arguments = ["sweep=patterns", "attention=window", *small, "data.sequence_length=256", "sweep.match=flops"]
    arguments += ["trainer.max_steps=200", "attention.patterns.local.width=16"]
    arguments += ["phases=[{step: 0, data.sequence_length: 32}, {step: 150, data.sequence_length: 256}]"]
    dense, window = jobs_of(*arguments)
    data = build_data(dense.config["data"])
    data.setup()
    (_, short), (_, whole) = flops_of_phases(dense.config, data)
    assert short < 0.9 * whole and spent_by(dense.config, data) == pytest.approx(150 * short + 50 * whole, rel=1e-12)
    spent = [spent_by(job.config, data) for job in (dense, window)]
    assert dense.config["trainer"]["max_steps"] == 200 < window.config["trainer"]["max_steps"]
    assert spent[1] == pytest.approx(spent[0], rel=0.005)
    assert budget(*arguments) == {"flops": spent[0]}
    assert budget(*arguments, "sweep.flops=1e9") == {"flops": 1e9}


def test_a_budget_of_null_needs_steps():
    with pytest.raises(ConfigError, match=r"sweep\.tokens=null: must be .*trainer\.max_steps=null"):
        jobs_of("sweep=patterns", "trainer.max_steps=null", "trainer.max_seconds=3")


def test_a_sweep_of_tokens_without_text(tmp_path):
    for split in ("train", "val"):
        np.zeros(4, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    ids = ("data/tokenizer=token_ids", "data.tokenizer.vocabulary=300", "data.tokenizer.bos=0")
    assert jobs_of("sweep=patterns", "attention=dense,window", "data=tokens", f"data.path={tmp_path}", *ids)
