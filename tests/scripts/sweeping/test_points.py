"""What a sweep's command line becomes: which jobs, with which settings, under which labels."""

import pytest

from configs.checks import check
from configs.errors import ConfigError, as_override
from configs.evaluation import limit_of
from data.excerpts import default_limit
from scripts.sweeping.composer import as_overrides
from scripts.sweeping.points import dimensions_of, labels
from tests.commands import ROOT
from tests.scripts.sweeping.conftest import jobs_of

GRIDS = sorted(file.stem for file in (ROOT / "configs/sweep").glob("*.yaml") if file.stem not in ("base", "search"))


def settings(*arguments: str, keys: tuple[str, ...]) -> list[tuple]:
    return [tuple(job.overrides.get(key) for key in keys) for job in jobs_of(*arguments)]


def told(*arguments: str) -> list[str]:
    return labels([job.overrides for job in jobs_of(*arguments)])


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_begins_with_full_attention_and_all_its_jobs_pass_the_checks(name):
    jobs = jobs_of(f"sweep={name}")
    assert jobs[0].config["attention"]["name"] == "dense"
    assert len({job.hash for job in jobs}) == len(jobs) > 3
    names = labels([job.overrides for job in jobs])
    assert len(set(names)) == len(jobs)
    for job in jobs:
        assert "sweep" not in job.config
        data = job.config["data"]
        if job.first_stage:  # it is not trained yet, and has no tokenizer to inherit
            data = data | {"tokenizer": jobs[0].config["data"]["tokenizer"]}
        check(job.config | {"init_from": None, "data": data})


def test_seeds_and_other_lists_multiply_the_jobs():
    found = settings(
        "sweep=patterns",
        "attention=window",
        "seed=1,2,3",
        "optimizer=adamw,muon",
        keys=("attention", "seed", "optimizer"),
    )
    assert len(found) == len(set(found)) == 2 * 3 * 2
    assert found[:2] == [("dense", "1", "adamw"), ("dense", "1", "muon")]


def test_the_command_line_replaces_what_varies_and_full_attention_stays_first():
    assert told("sweep=patterns", "attention=window,strided") == ["dense", "window", "strided"]
    assert told("sweep=patterns", "attention=window,dense") == ["dense", "window"]
    assert told("sweep=patterns", "attention=window,strided", "sweep.baseline=null") == ["window", "strided"]


def test_single_values_are_set_in_every_job():
    for job in jobs_of("sweep=patterns", "attention=window", "model=tiny", "trainer.max_steps=50"):
        assert (job.config["model"]["name"], job.config["trainer"]["max_steps"]) == ("tiny", 50)


def test_a_setting_that_a_choice_does_not_have_is_left_out_there():
    keys = ("attention", "attention.patterns.local.width", "attention.block")
    found = settings("sweep=window_width", "attention.patterns.local.width=64,128", "attention.block=64", keys=keys)
    assert found == [("dense", None, "64"), ("window", "64", "64"), ("window", "128", "64")]
    assert told("sweep=window_width", "attention.patterns.local.width=64,128") == ["dense", "window width=64",
                                                                                  "window width=128"]  # fmt: skip
    arguments = ["sweep=patterns", "attention=window,strided", "attention.patterns.local.width=64"]
    assert settings(*arguments, keys=keys[:2]) == [("dense", None), ("window", "64"), ("strided", None)]


def test_a_setting_that_no_choice_has_is_refused():
    with pytest.raises(
        ConfigError, match=r"attention\.patterns\.locl\.width=64: no such key in attention=dense, window"
    ):
        jobs_of("sweep=patterns", "attention=window", "attention.patterns.locl.width=64")


def test_settings_that_change_together_are_narrowed_together():
    keys = ("attention", "data.sequence_length", "data.batch_size")
    found = settings("sweep=lengths", "data.sequence_length=1024,4096", keys=keys)
    assert found == [("dense", "1024", "8"), ("dense", "4096", "2"), ("window", "1024", "8"), ("window", "4096", "2")]
    assert told("sweep=lengths", "data.sequence_length=1024,4096")[:2] == ["dense sequence_length=1024",
                                                                           "dense sequence_length=4096"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.sequence_length=3000: must be one of 1024, 2048"):
        jobs_of("sweep=lengths", "data.sequence_length=3000")
    assert told("sweep=schedules", "attention=growing_window") == ["dense", "growing_window"]


def test_lengths_have_as_many_tokens_a_step():
    for job in jobs_of("sweep=lengths"):
        data, trainer = job.config["data"], job.config["trainer"]
        assert data["sequence_length"] * data["batch_size"] * trainer["accumulate"] == 8192
        assert trainer["max_steps"] == 420


ON_LONGER = ("data.batch_size=1", "sweep.tokens=262144")


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [
        (("sweep=patterns", "data.sequence_length=1024,65536", "attention=dense"), {1024, 65536}),
        (
            ("sweep=patterns", "data.sequence_length=1024,65536", "attention=dense", "sweep.control=512"),
            {1024, 65536, 512},
        ),
        (("sweep=extend", "data.sequence_length=32768,65536", "attention=dense"), {1024, 32768, 65536}),
        # Launched again with the other length, the sweep goes on.
        (("sweep=patterns", "+sweep.vary={data.sequence_length:[1024,65536]}", "data.sequence_length=1024"), {1024}),
    ],
)
def test_jobs_of_every_length_are_scored_on_the_same_text(arguments, lengths):
    jobs = [job.config for job in jobs_of(*arguments, *ON_LONGER)]
    assert {job["data"]["sequence_length"] for job in jobs} == lengths
    limits = {limit_of(job["evaluation"], job["data"]["sequence_length"]) for job in jobs}
    assert limits == {default_limit(65536)}


def test_jobs_that_are_scored_alike_by_default_keep_it():
    """Their hashes, and so the jobs of sweeps of earlier versions, stay the same."""
    for arguments in (("sweep=lengths",), ("sweep=patterns", "data.sequence_length=65536", *ON_LONGER)):
        assert {job.config["evaluation"]["limit"] for job in jobs_of(*arguments)} == {"auto"}
    jobs = jobs_of("sweep=patterns", "data.sequence_length=1024,65536", "evaluation.limit=5000", *ON_LONGER)
    assert {job.config["evaluation"]["limit"] for job in jobs} == {5000}


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([{"attention": "window", "seed": "1"}, {"attention": "window", "seed": "2"}], ["window", "window"]),
        ([{"seed": "1"}, {"seed": "2"}], ["", ""]),
        ([{"a.b.width": "1", "c": "2"}, {"a.b.width": "3", "c": "2"}], ["width=1", "width=3"]),
        # what only one of them sets tells it from the other
        ([{"attention": "window"}, {"attention": "window", "optimizer.rate": "3"}], ["window", "window rate=3"]),
        # attention comes first, and what it tells need not be told again
        ([{"b": "1", "attention": "x"}, {"b": "2", "attention": "y"}], ["x", "y"]),
    ],
)
def test_a_label_is_what_tells_a_job_from_the_others(jobs, expected):
    assert labels(jobs) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (64, "64"), (0.001, "0.001"), ("dense", "dense"), (["a", ["b", 1]], "[a,[b,1]]"),
     ({"width": 2}, "{width:2}"), ("a b", "'a b'"), ("it's", r"'it\'s'")],
)  # fmt: skip
def test_values_of_a_yaml_are_written_as_on_the_command_line(value, text):
    assert as_override(value) == text


def test_overrides_survive_a_line():
    assert as_overrides(["a=b=c", "~d"]) == {"a": "b=c", "~d": ""}


@pytest.mark.parametrize("vary", [{"a": 3}, {"a": []}, {"a, b": [1, 2]}, {"a, b": [[1]]}])
def test_a_dimension_that_is_no_list_is_refused(vary):
    with pytest.raises(ConfigError, match=r"sweep\.vary\.a.*: must be a list"):
        dimensions_of(vary)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep.match=memory"], r"sweep\.match=memory: must be tokens, time, flops or null"),
        (["sweep.tokens=0"], r"sweep\.tokens=0: must be a number > 0 or null"),
        (["sweep.seconds=60"], r"sweep\.seconds=60: must be null with sweep\.match=tokens"),
        (["sweep.match=tokens,time"], r"sweep\.match=tokens,time: must be one value"),
        (["sweep.name=a/b"], r"sweep\.name=a/b: must be a folder"),
        (["sweep.retry_failed=2"], r"sweep\.retry_failed=2: must be true or false"),
        (["+sweep.mach=time"], r"sweep\.mach=time: must be left out; .*match"),
        (["sweep.match=time"], r"sweep\.seconds=null: must be .*sweep\.match=time"),
        (["trainer.max_steps=10,20"], r"trainer\.max_steps=10,20: must be one value with sweep\.match=tokens"),
        (["sweep.tokens=100"], r"sweep\.tokens=100: must be at least one step .* 4096 with attention=dense"),
        (["seed=interval(1,3)"], r"seed=interval\(1,3\): must be values"),
        (["sweep.tokens=nan"], r"sweep\.tokens=nan: must be a finite number > 0"),
        (["sweep.match=time", "sweep.seconds=inf"], r"sweep\.seconds=inf: must be a finite number > 0"),
        (["sweep.vary=null"], r"sweep\.vary=null: must be a mapping"),
        (["seed=a"], r"seed=a: must be an integer >= 0 and < 4294967296"),
        (["seed=1,-1"], r"seed=-1: must be an integer >= 0"),
        (["seed=range(3,1)"], r"seed=range\(3,1\): must have at least one value"),
        (["resume=outputs/x"], r"resume=outputs/x: must be null"),
        (["data.sequence_length=0"], r"data\.sequence_length=0: must be an integer >= 1"),
        (["trainer.devices=x"], r"trainer\.devices=x: must be auto; -1; an integer >= 1; or a list"),
        (["trainer.max_steps=a"], r"trainer\.max_steps=a: must be an integer >= 1 or null"),
        (["model=nan"], r"model=nan: must be one of .*nano"),
        (["~logger"], r"~logger: must be logger="),
        (["sweep.baseline=3"], r"sweep\.baseline=3: must be a text"),
        (["--config-dir=x"], r"--config-dir=x: must be -m or an override"),
    ],
    ids=lambda value: str(value),
)
def test_a_sweep_that_cannot_be_is_one_line(arguments, named):
    with pytest.raises(ConfigError, match=named) as error:
        jobs_of("sweep=patterns", *arguments)
    assert "\n" not in str(error.value)
