"""A scaling sweep's jobs: every pattern and size once with each of several budgets of FLOPs."""

from contextlib import contextmanager
from itertools import pairwise

import pytest

from configs.build import ConfigError, build_data
from configs.forecasting import flops_of_phases
from model.forecasting import total_cost
from scripts.reporting.manifest import read_manifest
from scripts.reporting.read_jobs import read_sweeps
from scripts.sweeping.composer import Composer
from scripts.sweeping.plan import Plan
from tests.scripts.sweeping.conftest import jobs_of, run_sweep

BUDGETS = [1e9, 2e9, 4e9]
LIST = "sweep.flops=[1.0e9,4.0e9,2.0e9]"


@pytest.fixture
def tiny(small) -> list[str]:
    """The overrides of `small` without what a scaling sweep sets itself: the steps and the size."""
    own = ("trainer.max_steps", "model.width")
    sweep = ["sweep=patterns", "sweep.match=flops", "attention=window", "model.width=32,64"]
    return [*sweep, *[each for each in small if not each.startswith(own)]]


def test_every_pattern_and_size_has_each_budget_in_flops(tiny, monkeypatch):
    planned = []

    @contextmanager
    def progress_bar(label, total):
        assert label == "patterns, planning 4 jobs" and total == 4
        yield planned.append

    monkeypatch.setattr("scripts.sweeping.plan.progress_bar", progress_bar)
    jobs = jobs_of(*tiny, LIST)
    assert planned == [1] * 4, "a step of the progress bar for each job without its budgets"
    found = [(job.config["attention"]["name"], job.config["model"]["width"], job.flops) for job in jobs]
    assert found == [(name, width, flops) for name in ("dense", "window") for width in (32, 64) for flops in BUDGETS]
    data = build_data(jobs[0].config["data"])
    data.setup()
    for job in jobs:
        phases = flops_of_phases(job.config, data)
        step = phases[0][1]
        assert abs(total_cost(phases, job.config["trainer"]["max_steps"]) - job.flops) <= 0.5 * step


@pytest.mark.parametrize("name", ["scaling", "scaling_32k"])
def test_the_budgets_of_the_yamls_double(name):
    with Composer(["-m", f"sweep={name}"]) as composer:
        budgets = Plan(composer).settings.budgets
    assert len(budgets) >= 4 and all(more == 2 * less for less, more in pairwise(budgets))


def test_labels_name_pattern_size_and_budget_and_more_budgets_continue_the_sweep(tmp_path, tiny, quick, reports):
    tiny = [*tiny, "attention=dense"]
    assert run_sweep(tmp_path, *tiny, LIST) == 0
    manifest = read_manifest(tmp_path / "patterns")
    assert manifest.budget == {"flops": [1e9, 4e9, 2e9]}
    assert [(job.pattern, job.label) for job in manifest.jobs[:4]] == [
        ("dense", "dense width=32 flops=1e+09"),
        ("dense", "dense width=32 flops=2e+09"),
        ("dense", "dense width=32 flops=4e+09"),
        ("dense", "dense width=64 flops=1e+09"),
    ]
    (sweep,) = read_sweeps([tmp_path / "patterns"])
    assert len({job.context for job in sweep.jobs}) == 6  # compared only at the same size and budget
    assert run_sweep(tmp_path, *tiny, "sweep.flops=[1.0e9,2.0e9,4.0e9,8.0e9]") == 0
    assert len(read_manifest(tmp_path / "patterns").jobs) == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep.flops=[1.0e9,2.0e9]"], r"^sweep\.flops=\[.*\]: must be .* a list of at least 3"),
        (["sweep.flops=[1.0e9,2.0e9,2.0e9]"], r"^sweep\.flops=\[.*: must be different budgets"),
        (
            ["sweep.flops=[1.0,2.0,4.0]"],
            r"^sweep\.flops=1: must be at least one step .*, \d+ with attention=dense model\.width=32 ",
        ),
        ([LIST, "trainer.max_steps=9"], r"^trainer\.max_steps: must be left out with sweep\.flops=\["),
        ([LIST, "sweep.match=tokens"], r"^sweep\.flops=\[.*must be null with sweep\.match=tokens"),
        (
            [LIST, "data.packing=whole,contiguous"],
            r"^data\.packing=whole,contiguous: must be one value with",
        ),
        (
            [LIST, "sweep.first_stage={sequence_length:32,tokens:999,learning_rate:null,init_from:null}"],
            r"^sweep\.flops=\[.*: must be one budget with sweep\.first_stage",
        ),
    ],
)
def test_wrong_budgets_are_one_line(tiny, arguments, named):
    with pytest.raises(ConfigError, match=named) as error:
        jobs_of(*tiny, *arguments)
    assert "\n" not in str(error.value)
