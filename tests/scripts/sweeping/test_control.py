"""The control of a sweep: the baseline at short context, with the budget of every job and an evaluation of its own."""

import pytest

from configs.errors import ConfigError
from scripts.reporting.aggregate import make_rows
from scripts.reporting.manifest import CONTROL, read_manifest
from scripts.reporting.read_jobs import read_sweeps
from scripts.sweeping.composer import as_lines
from scripts.sweeping.short_context import shortened
from tests.commands import resolved
from tests.scripts.sweeping.conftest import jobs_of, run_sweep, states

PAIR = ("sweep=patterns", "attention=window")


def test_the_control_is_the_baseline_in_shorter_sequences():
    jobs = jobs_of(*PAIR, "seed=1,2", "sweep.control=512", "data.batch_size=2", "sweep.tokens=81920")
    names = [(job.role, job.config["attention"]["name"], job.config["seed"]) for job in jobs]
    roles = (("pattern", "dense"), ("control", "dense"), ("pattern", "window"))
    assert names == [(*role, seed) for role in roles for seed in (1, 2)]
    dense, control = jobs[0].config, jobs[2].config
    assert control["data"] == dense["data"] | {"sequence_length": 512, "batch_size": 16, "validation_sequences": 128}
    assert {key for key in control if control[key] != dense[key]} == {"data", "evaluation"}
    assert control["trainer"]["max_steps"] == 10


def test_the_jobs_of_a_mixture_have_the_config_that_train_resolves():
    """A worker finds its job by the hash of this config."""
    for job in jobs_of(*PAIR, "data=mixture", "sweep.tokens=81920"):
        assert job.config == resolved(*as_lines(job.overrides))
        assert job.config["data"]["source"]["sources"][0]["source"]["_target_"] == "data.sources.StandardLibrary"


def shortened_evaluation(
    length: int, protocol: tuple, contexts: list | None, limit: int | str | None = None
) -> dict[str, str]:
    """The overrides of the evaluation of a run of 4,096 tokens that is shortened to `length`."""
    data = {"sequence_length": 4096, "batch_size": 1, "validation_sequences": None}
    by_context = {"contexts": contexts, "targets": 256, "least_tokens": None}
    protocol = dict(zip(("name", "window", "stride"), protocol, strict=True))
    evaluation = {"protocol": protocol, "by_context": by_context, "limit": limit}
    config = {"data": data, "phases": None, "evaluation": evaluation}
    short = shortened(config, length, "control")
    return {key.removeprefix("evaluation."): value for key, value in short.items() if key.startswith("evaluation.")}


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (("whole", None, None), {"protocol.name": "sliding"}),
        (("sliding", 2048, 2000), {"protocol.window": "null", "protocol.stride": "null"}),
        (("sliding", 512, 100), {}),
        (("chunked", None, None), {}),
    ],
)
def test_a_control_reads_no_more_than_it_was_trained_for(protocol, expected):
    assert shortened_evaluation(1024, protocol, []) == expected


@pytest.mark.parametrize(("limit", "expected"), [("auto", {"limit": str(1 << 20)}), (5000, {}), (None, {})])
def test_a_control_is_scored_on_as_much_text_as_the_others(limit, expected):
    assert shortened_evaluation(1024, ("chunked", None, None), [], limit) == expected


@pytest.mark.parametrize(
    ("contexts", "own", "least"), [([512, 1024, 3000, "whole"], "[512]", "3256"), (None, "[512,768]", "4096")]
)
def test_a_control_is_scored_by_context_on_the_tokens_of_the_others(contexts, own, least):
    """A context of 1,024 tokens and 256 targets do not fit into 1,024 tokens. The documents are as long as for all.
    By default the control has the longest context that fits, too: it would seem worse without."""
    found = shortened_evaluation(1024, ("chunked", None, None), contexts)
    assert found == {"by_context.contexts": own, "by_context.least_tokens": least}


def test_controls_of_different_data_have_different_labels(tmp_path, small, quick, reports):
    """Runs of one label are seeds of one row, so a label that two controls share would average over corpora."""
    own = [*small[:-1], "sweep.control=32", "data.packing=contiguous,whole", "seed=1,2"]
    assert run_sweep(tmp_path, "sweep=patterns", "attention=dense", *own) == 0
    controls = [job.label for job in read_manifest(tmp_path / "patterns").jobs if job.role == CONTROL]
    assert sorted(controls) == [f"control 32 packing={each}" for each in ("contiguous", "contiguous", "whole", "whole")]


def test_a_control_of_an_extended_model_continues_at_short_context(small):
    longer = ("model.rope_scaling=yarn_hf", "model.rope_factor=4", "model.rope_original_length=16")
    arguments = ("sweep=extend", "attention=window", "sweep.first_stage.sequence_length=16", *longer, *small[:-1])
    first, dense, control, _ = jobs_of(*arguments, "sweep.control=32", "sweep.first_stage.tokens=128")
    assert control.first_stage == dense.first_stage == first.hash
    assert control.config["init_from"] == dense.config["init_from"]
    assert control.config["optimizer"] == dense.config["optimizer"]
    assert control.config["model"] == first.config["model"] and control.config["data"]["sequence_length"] == 32


@pytest.mark.parametrize(("control", "scaling"), [(512, "none"), (1024, "yarn_hf")])
def test_a_control_has_no_rope_scaling_up_to_the_original_length(control, scaling):
    """`init_from` may name a model of that length, as in experiment=extend_context."""
    longer = ("model.rope_scaling=yarn_hf", "model.rope_factor=8", "model.rope_original_length=512")
    jobs = jobs_of(*PAIR, *longer, f"sweep.control={control}", "sweep.tokens=40960")
    assert [job.config["model"]["rope_scaling"] for job in jobs] == ["yarn_hf", scaling, "yarn_hf"]


@pytest.mark.parametrize("length", [512, 1000])
def test_sequences_that_the_default_control_does_not_fit_have_none(length):
    """1,024 tokens are no fewer than 512, and a step of 8 x 1,000 tokens has no whole number of them."""
    jobs = jobs_of(*PAIR, f"data.sequence_length={length}", "data.batch_size=8", "sweep.tokens=80000")
    assert [job.role for job in jobs] == ["pattern", "pattern"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep.control=4096"], r"sweep\.control=4096: must be less than data\.sequence_length=4096"),
        (["sweep.control=1000"], r"sweep\.control=1000: must be a divisor of the 4096 tokens"),
        (["sweep.control=512", "sweep.baseline=null"], r"sweep\.control=512: must be null with sweep\.baseline=null"),
    ],
)
def test_a_control_that_cannot_be_is_one_line(arguments, named):
    with pytest.raises(ConfigError, match=named):
        jobs_of(*PAIR, *arguments)


def test_a_report_compares_every_pattern_with_the_control(tmp_path, small, reports):
    own = [*small[:-1], "sweep.control=32", "evaluation=sliding"]
    assert run_sweep(tmp_path, "sweep=patterns", "attention=dense", *own) == 0
    assert list(states(tmp_path / "patterns")) == ["dense seed=1", "control 32 seed=1"]
    dense, control = make_rows(read_sweeps([tmp_path / "patterns"]))
    assert control.is_control and control.control is None
    assert (control.against.label, dense.control.label) == ("dense", "control 32")
    rows = [row.counted[0].evaluation for row in (dense, control)]
    assert rows[0]["tokens_scored"] == rows[1]["tokens_scored"]
    assert [row["protocol"]["window"] for row in rows] == [64, 32]
    paired = dense.over_control_paired
    assert paired.mean == pytest.approx(dense.over_control.mean, abs=1e-9)
    assert paired.low <= paired.mean <= paired.high and paired.documents == 4
