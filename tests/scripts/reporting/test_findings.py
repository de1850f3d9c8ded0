"""The sentences at the top of a report: their numbers and their uncertainty."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from scripts.reporting.aggregate import make_rows
from scripts.reporting.cautions import cautions
from scripts.reporting.content import gather
from scripts.reporting.curves import position_differences_of
from scripts.reporting.findings import UNEQUAL_TIME, UNTIMED, budgets, comparisons, progress
from scripts.reporting.jobs import Job, Sweep
from scripts.reporting.manifest import CONTROL, FIRST_STAGE
from scripts.reporting.read_jobs import read_sweeps
from scripts.reporting.subject import subject
from scripts.reporting.table import make_columns
from tests.scripts.reporting.sweeps import make_config, make_sweep
from tests.scripts.reporting.test_aggregate import job


def read(*jobs, **sweep):
    sweeps = [Sweep("s", Path("s"), jobs, **sweep)]
    rows = make_rows(sweeps)
    return comparisons(rows), cautions(sweeps, rows)


def test_a_loss_that_all_seeds_show_is_told_with_its_interval():
    jobs = [job("dense", seed, 1.0 + seed / 10, 2.0) for seed in (1, 2, 3)]
    jobs += [job("window", seed, 1.0 + seed / 10 + more, 1.0) for seed, more in ((1, 0.02), (2, 0.03), (3, 0.025))]
    told, _ = read(*jobs)
    # Differences 0.02, 0.03, 0.025: mean 0.025, s = 0.005, half-width 4.30265 * 0.005 / sqrt(3) = 0.01242.
    assert told[0] == (
        "window takes 0.50 of dense's step time and 0.50 of its attention FLOPs and is worse by 0.0250 bits per byte "
        "(95 % interval of the difference +0.0126 to +0.0374 over 3 seeds)."
    )


def test_a_difference_within_the_noise_is_called_so():
    jobs = [job("dense", seed, 1.0) for seed in (1, 2)] + [job("window", 1, 0.97), job("window", 2, 1.01)]
    told, warned = read(*jobs)
    assert "is better by 0.0100 bits per byte, which may be chance (95 % interval" in told[0]
    assert any("where intervals overlap" in line for line in warned)


def test_one_seed_has_no_interval_and_says_so():
    told, warned = read(job("dense", 1, 1.0), job("window", 1, 1.1))
    assert told[0].endswith("is worse by 0.1000 bits per byte (no interval, one seed).")
    assert any("one seed" in line for line in warned)


@pytest.mark.parametrize(("nats", "chance"), [([80.0, 95.0, 130.0], False), ([60.0, 90.0, 129.0], True)])
def test_one_seed_is_compared_with_dense_document_by_document(nats, chance):
    theirs = [70.0, 80.0, 120.0]
    bits = [sum(each) / math.log(2) / 300 for each in (nats, theirs)]
    dense, window = judged_by_document("dense", bits[1], theirs), judged_by_document("window", bits[0], nats)
    told, _ = read(dense, window)
    less = [(own - other) / math.log(2) / 100 for own, other in zip(nats, theirs, strict=True)]
    low, high = bounds_of(less)
    change = f"is worse by {bits[0] - bits[1]:.4f} bits per byte{', which may be chance' * chance}"
    better = sum(each < 0 for each in less)
    certainty = f"95 % interval of the difference {low} to {high} over 3 documents, better on {better}, one seed"
    assert told[0].endswith(f"{change} ({certainty}).")
    (cell,) = [column.cells[1].text for column in make_columns(make_rows([Sweep("s", Path("s"), (dense, window))]))
               if column.title == "vs dense"]  # fmt: skip
    assert cell.endswith(f"({low} to {high})")


def bounds_of(less: list[float]) -> list[str]:
    """Student's interval of three documents of equal size."""
    mean, half = statistics.fmean(less), 4.30265 * statistics.stdev(less) / math.sqrt(3)
    return [f"{bound:+.4f}".replace("-", "\N{MINUS SIGN}") for bound in (mean - half, mean + half)]


def judged_by_document(label: str, bits: float, nats: list[float], **others) -> Job:
    """A job of three documents of 100 bytes each."""
    row = {"bits_per_byte": bits, "documents_digest": "d", "by_document": {"nats": nats, "bytes": [100] * 3}}
    return job(label, 1, bits, evaluation=row, **others)


@pytest.mark.parametrize(
    ("nats", "verdict"),
    [
        ([58.0, 70.0, 86.0], "window beats control 32 by "),
        ([60.0, 60.0, 120.0], "window is not shown to beat control 32: it is better by "),
        ([60.0, 90.0, 120.0], "window is not shown to beat control 32: it is worse by "),
        ([90.0, 100.0, 110.0], "window does not beat control 32: it is worse by "),
    ],
)
def test_every_pattern_is_compared_with_the_control_document_by_document(nats, verdict):
    theirs = [70.0, 80.0, 100.0]
    bits = [sum(each) / math.log(2) / 300 for each in (nats, theirs)]
    control = judged_by_document("control 32", bits[1], theirs, role=CONTROL)
    told, _ = read(control, judged_by_document("window", bits[0], nats))
    less = [(own - other) / math.log(2) / 100 for own, other in zip(nats, theirs, strict=True)]
    assert told[0].startswith(f"{verdict}{abs(bits[0] - bits[1]):.4f} bits per byte")
    low, high = bounds_of(less)
    assert f"({low} to {high}".replace("(", "difference ") in told[0]
    assert f"over 3 documents, better on {sum(each < 0 for each in less)}, one seed)" in told[0]


def test_runs_on_other_text_are_not_compared():
    """Neither with the control, nor with dense, by position, on a front or for the best."""
    control = judged_by_document("control 32", 1.0, [1.0] * 3, role=CONTROL)
    dense, window = (judged_by_document(label, 0.9, [0.9] * 3) for label in ("dense", "window"))
    told, _ = read(control, dense, window)
    assert any("control 32" in line for line in told) and any("Best" in line for line in told)
    window.evaluation["documents_digest"] = "e"  # of as many documents and bytes
    told, warned = read(control, dense, window)
    assert not any("window" in line or "Best" in line or "Pareto" in line for line in told)
    assert told[0].startswith("dense is not shown to beat control 32") or told[0].startswith("dense beats control 32")
    assert any("evaluated on different held-out text (see evaluation.limit)" in line for line in warned)
    rows = make_rows([Sweep("s", Path("s"), (control, dense, window))])
    assert not any(row.fronts for row in rows)
    of_window = next(row for row in rows if row.label == "window")
    assert of_window.against is not None and position_differences_of(of_window) == []
    del window.evaluation["documents_digest"]  # of an early version: its documents and bytes are compared
    assert len(read(control, dense, window)[0]) > 2


def test_a_row_of_fewer_seeds_is_compared_over_the_seeds_of_both():
    """Window is worse than dense and the control in its seed, but has a lower mean: its seed is an easy one."""
    jobs = [job("dense", seed, 1.0 + seed / 10) for seed in (1, 2, 3)]
    jobs += [job("control 32", seed, 1.0 + seed / 10, role=CONTROL) for seed in (1, 2, 3)]
    told, warned = read(*jobs, job("window", 1, 1.12))
    assert "window does not beat control 32: it is worse by 0.0200 bits per byte (no interval, one seed)." in told
    assert any("is worse by 0.0200 bits per byte" in line and line.startswith("window takes") for line in told)
    assert any(line.startswith("window lacks seeds that others have") for line in warned)
    assert not any("seeds that others have" in line for line in read(*jobs)[1])


def test_a_report_at_long_context_without_a_control_has_a_caution():
    def long(label, **others):
        return job(label, 1, 1.0, config={"data": {"sequence_length": 32768}}, **others)

    jobs = [long("dense"), long("window")]
    assert any("No control at short context" in line and "32,768 tokens" in line for line in read(*jobs)[1])
    assert not any("No control" in line for line in read(*jobs, long("control 4096", role=CONTROL))[1])


def judged_by_context(label: str, changes: dict[int, tuple[float, float, float] | None], length: int = 4096) -> Job:
    """A job with these changes of the loss, and their bounds, from each context to the next."""
    names = ("change", "change_low", "change_high")
    contexts = [
        {"context": context, "documents": 3, "loss": 2.0, **dict(zip(names, change or [None] * 3, strict=True))}
        for context, change in changes.items()
    ]
    row = {"bits_per_byte": 1.0, "by_context": contexts}
    return job(label, 1, 1.0, evaluation=row, config={"data": {"sequence_length": length}})


def test_context_that_lowers_no_loss_is_told_first():
    """A change counts only beyond its interval. Contexts beyond the training length do not count."""
    sure, unsure = (-0.1, -0.2, -0.05), (-0.1, -0.3, 0.01)
    dense = judged_by_context("dense", {512: None, 1024: sure, 2048: unsure, 3840: unsure})
    window = judged_by_context("window", {512: None, 1024: sure, 2048: sure, 3840: sure, 8192: unsure})
    fixed = judged_by_context("fixed", {512: None, 1024: unsure})
    told, _ = read(dense, window, fixed)
    first = (
        "Trained on sequences of 4,096 tokens, dense: no context of more than 1,024 tokens is shown to lower the loss"
    )
    assert told[0].startswith(first) and "tokens of 3 documents (measured up to 3,840)" in told[0]
    assert "fixed: no context of more than 512 tokens" in told[1]
    assert not any("window: no context" in line for line in told)


def test_context_that_raises_the_loss_is_told():
    sure, unsure, worse = (-0.1, -0.2, -0.05), (0.1, -0.1, 0.3), (0.1, 0.01, 0.2)
    dense = judged_by_context("dense", {512: None, 1024: sure, 2048: worse, 3840: worse})
    window = judged_by_context("window", {512: None, 1024: sure, 2048: unsure, 8192: worse})
    told, _ = read(dense, window)
    expected = "beyond its interval: dense with 2,048, dense with 3,840 tokens."
    assert next(line for line in told if line.startswith("More context raises")).endswith(expected)


def test_without_a_measured_change_no_context_is_called_useless():
    assert not any("no context" in line for line in read(judged_by_context("dense", {512: None, 1024: None}))[0])


def test_without_dense_nothing_is_held_against_it():
    told, _ = read(job("window", 1, 1.0), job("fixed", 1, 1.1))
    assert "no dense baseline among these jobs" in told[0] and "dense's" not in " ".join(told)
    told, _ = read(job("window", 1, 1.0), job("dense", 1, 1.0, state="running"))
    assert told[0].startswith("Dense has not finished")


def test_nothing_finished_is_said():
    told, warned = read(job("window", 1, 1.0, state="failed"))
    assert told == ["No job has been evaluated yet, so there is nothing to compare."] and not warned


def test_the_best_and_the_fronts_are_named():
    told, _ = read(job("dense", 1, 1.0, 3.0), job("window", 1, 1.1, 1.0), job("fixed", 1, 1.2, 2.0))
    assert "Best in quality: dense, 1.0000 bits per byte." in told
    assert "On the Pareto front of step time and attention FLOPs, from cheapest to best: window, dense." in told


def test_many_patterns_are_told_by_the_front_alone():
    many = [job(f"window {n}", 1, 1.1 + n / 100, 1.0 + n / 10) for n in range(9)]
    told, _ = read(job("dense", 1, 1.0, 3.0), *many)
    assert told[0].startswith("9 patterns were compared with dense") and told[1].startswith("window 0 takes")
    assert not any(line.startswith("window 1 ") for line in told)


def test_what_does_not_compare_is_warned_of():
    here, there = ({"bits_per_byte": 1.0, "documents_from": "test", "documents": n} for n in (7, 8))
    gpu = {"device": "NVIDIA H200", "train_tokens": 5_000_000}
    jobs = [job("dense", 1, 1.0, evaluation=here, summary=gpu),
            job("window", 1, 1.0, evaluation=there | {"protocol": {"name": "whole"}},
                summary={"device": "cpu", "train_tokens": 2_000_000})]  # fmt: skip
    _, warned = read(*jobs)
    text = " ".join(warned)
    for part in ("different held-out", "different protocols", "different devices (NVIDIA H200, cpu)", "whole process",
                 "tokens trained on from 2.00 million to 5.00 million"):  # fmt: skip
        assert part in text, part
    _, warned = read(*(dataclasses.replace(each, evaluation=here, summary=gpu) for each in jobs), match="tokens")
    assert [line for line in warned if "seed" not in line] == []


def test_the_head_says_what_was_equal_and_how_far_it_is():
    jobs = (job("dense", 1, 1.0), job("window", 1, 1.0, state="out of memory"), job("fixed", 1, 1.0, state="waiting"))
    sweep = Sweep("s", Path("s"), jobs, match="time", budget={"seconds": 120})
    assert progress([sweep]) == "1 of 3 jobs done, 1 waiting, 1 out of memory"
    assert budgets([sweep]) == ["every job had the same training time (120 s)"]
    assert budgets([Sweep("", Path("s"), jobs)]) == ["the jobs have no common budget"]


def test_a_first_stage_that_began_from_a_run_is_told():
    config, summary = {"data": {"sequence_length": 512}}, {"train_tokens": 4000}
    told = [
        budgets(
            [Sweep("s", Path("s"), (job("first stage 512", 1, 1.0, role=FIRST_STAGE, config=each, summary=summary),))]
        )
        for each in (config, config | {"init_from": "outputs/a/last"})
    ]
    assert told[0][0].endswith("full attention in sequences of 512 that they share")
    assert "512, from the weights of another run, whose cost is not counted," in told[1][0]


def test_a_pattern_that_leaves_nothing_out_is_no_sparse_one():
    jobs = [
        job(name, 1, 1.0, summary={"device": "NVIDIA H200", "density_pairs": density})
        for name, density in (("dense", 1.0), ("window", 1.0), ("strided", 1.0), ("dilated", 0.26))
    ]
    said = "window and strided compute all pairs at this length, as dense does: there is no sparsity."
    assert said in read(*jobs)[1]
    assert not any("no sparsity" in line for line in read(jobs[0], jobs[3])[1])


def test_runs_that_counting_beats_are_too_short():
    def judged(label, quality):
        row = {"bits_per_byte": quality, "baselines": {"bigram_bits_per_byte": 1.9}}
        return job(label, 1, quality, evaluation=row)

    said = "No pattern is better than a bigram model of the same tokens (1.9000 bits per byte)"
    assert any(line.startswith(said) for line in read(judged("dense", 2.0), judged("window", 1.95))[1])
    (line,) = [line for line in read(judged("dense", 1.8), judged("window", 1.95))[1] if "bigram" in line]
    assert line.startswith("window, seed 1, is not better than a bigram") and line.endswith("or diverged.")
    assert not any("bigram" in line for line in read(job("dense", 1, 5.0), judged("window", 1.95))[1])


def test_the_head_says_what_was_trained_and_judged_and_when(tmp_path):
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1], {("window", 1): "running"})
    (sweep,) = read_sweeps([folder])
    model, data, parameters = (*map(make_config("dense", 1).get, ("model", "data")), sweep.jobs[0].number("parameters"))
    assert subject(sweep.jobs) == [
        f"Model: {model['name']}, {model['layers']} layers, width {model['width']}, {parameters:,} parameters",
        f"Trained on: data=stdlib, sequences of {data['sequence_length']:,} tokens",
        "Evaluated on: test, 7 documents, 455,672 bytes, protocol sliding",
        "Ran: 2026-11-24",
    ]
    assert subject([job("dense", 1, 1.0)]) == []
    configs = [
        {"model": {"name": "tiny"}, "data": {"sequence_length": n, "path": "/home/me/books"}} for n in (64, 1024)
    ]
    several = subject([job("dense", 1, 1.0, config=config) for config in configs])
    assert several[:2] == ["Model: tiny", "Trained on: books, sequences of 64 / 1,024 tokens"]


@pytest.mark.parametrize(
    ("states", "title"),
    [
        (("interrupted",), "Interrupted jobs"),
        (("failed", "interrupted"), "Failed and interrupted jobs"),
        (("failed", "out of memory"), "Failed jobs"),
    ],
)
def test_what_goes_on_has_not_failed(tmp_path, states, title):
    seeds = range(len(states))
    folder = make_sweep(tmp_path / "s", ["window"], seeds, {("window", seed): states[seed] for seed in seeds})
    assert gather([folder]).ended_title == title


def check_times(content, compare: bool) -> None:
    assert (content.comparisons[0] == UNTIMED) is not compare
    assert any("step time" in line for line in content.comparisons[1:]) is compare
    heads = {column.title for column in content.columns}
    assert ({"tokens/s", "train time (s)"} <= heads) is compare and "FLOPs/dense" in heads
    assert content.figures["summary"][0][0] == ("step time" if compare else "attention FLOPs")
    assert any("by training time" in title for title, _ in content.figures["loss_curves"]) is compare


@pytest.mark.parametrize(
    ("ran_on", "ends", "compare"),
    [
        (("one", "one"), ("05:00", "05:00"), False),
        ((None, "one"), ("05:00", "07:00"), False),  # earlier versions did not record the devices
        (("one", "other"), ("05:00", "05:00"), True),
        (("one", "one"), ("05:00", "10:01"), True),  # one after the other: each took 300 s
    ],
)
def test_times_of_jobs_that_shared_a_device_are_left_out(tmp_path, ran_on, ends, compare):
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1])
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry, where, end in zip(manifest["jobs"], ran_on, ends, strict=True):
        entry |= {"ran_on": where, "ended": f"2026-11-24T08:{end}+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    content = gather([folder])
    check_times(content, compare)
    assert UNEQUAL_TIME not in content.comparisons, "tokens were equal, whatever the time"
    (folder / "manifest.json").write_text(json.dumps(manifest | {"match": "time", "budget": {"seconds": 60.0}}))
    assert (UNEQUAL_TIME in gather([folder]).comparisons) is not compare


@pytest.mark.parametrize(("others", "compare"), [(9 << 30, False), (600 << 20, True), (None, True)])
@pytest.mark.parametrize("launched", ["together", "alone"])
def test_times_of_jobs_that_shared_a_gpu_with_another_process_are_left_out(tmp_path, others, compare, launched):
    """As jobs of another sweep do, which no manifest of this one has."""
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1])
    runs = sorted(file.parent for file in folder.glob("*/summary.json"))
    summary = json.loads((runs[1] / "summary.json").read_text())
    (runs[1] / "summary.json").write_text(json.dumps(summary | {"memory_bytes_of_others": others}))
    check_times(gather([folder] if launched == "together" else runs), compare)


@pytest.mark.parametrize(("match", "tokens", "told"), [
    ("time", {"dense": 6600, "window": 60_060}, "9% of the tokens of dense and 0% of the tokens of window were"),
    ("time", {"dense": 6060, "window": 60_060}, None),
    ("tokens", {"dense": 6600, "window": 60_060}, None),
])  # fmt: skip
def test_tokens_that_were_trained_before_the_clock_started_are_told(match, tokens, told):
    rates, jobs = {"dense": 100.0, "window": 1000.0}, []
    for label, trained in tokens.items():
        summary = {"measured_seconds": 60.0, "tokens_per_second": rates[label], "train_tokens": trained}
        made = job(label, 1, 1.0)
        jobs.append(dataclasses.replace(made, summary=made.summary | summary))
    sweeps = [Sweep("s", Path("s"), tuple(jobs), match=match)]
    lines = [line for line in cautions(sweeps, make_rows(sweeps)) if "clock stands" in line]
    assert len(lines) == (told is not None) and all(told in line for line in lines)


def test_text_that_was_read_often_is_told_with_its_number():
    def reading(label, tokens, **summary):
        made = job(label, 1, 1.0)
        return dataclasses.replace(made, summary=made.summary | {"train_tokens": tokens} | summary)

    jobs = [reading("dense", 400, tokens_per_pass=100), reading("window", 410, tokens_per_pass=100)]
    (line,) = [line for line in read(*jobs)[1] if "read its text" in line]
    assert line.startswith("Training read its text window 4.1 times: ")
    stage = reading("first stage", 50)
    extended = [dataclasses.replace(each, first_stage=stage) for each in jobs]
    (line,) = [line for line in read(*extended)[1] if "read its text" in line]
    assert line.startswith("Training read its text dense 4.5 times and window 4.6 times: ")
    assert not any("read its text" in line for line in read(reading("dense", 10**9), jobs[0])[1])


@pytest.fixture
def without_text(tmp_path):
    """A sweep whose tokens have no text: no bits per byte anywhere."""
    folder = make_sweep(tmp_path / "patterns", ["dense", "window"], [1, 2])
    for run in folder.iterdir():
        if run.is_dir():
            summary = json.loads((run / "summary.json").read_text())
            rows = json.loads((run / "evaluation.json").read_text())["rows"]
            changes = {"loss": 2 * rows[0]["bits_per_byte"], "bits_per_byte": None}
            (run / "summary.json").write_text(json.dumps(summary | changes))
            rows = [row | changes | {"bytes": 0, "baselines": {}, "by_document": None} for row in rows]
            (run / "evaluation.json").write_text(json.dumps({"rows": rows}))
            (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace("bits_per_byte", "other"))
    return folder


def test_tokens_without_text_are_compared_by_their_loss(without_text):
    content = gather([without_text])
    assert not content.ended and content.progress == "4 of 4 jobs done"
    dense, window = (row.values["loss"] for row in content.rows)
    columns = {column.title: column for column in content.columns}
    assert [cell.order for cell in columns["nats/token"].cells] == [dense.mean, window.mean]
    assert "bits/byte" not in columns and "nats per token" in columns["vs dense"].hint
    assert content.rows[1].difference.mean == pytest.approx(window.mean - dense.mean)
    size, better = f"{abs(window.mean - dense.mean):.4f}", min(dense.mean, window.mean)
    assert f"by {size} nats per token" in content.comparisons[0]
    assert any(f"{better:.4f} nats per token" in line for line in content.comparisons)
    assert any(line.startswith("The tokens of dense and window have no text") for line in content.cautions)
    assert not any("bits" in line for line in (*content.comparisons, *content.cautions))
    assert "front" in columns and set(content.figures) >= {"pareto", "loss_curves"}
    axes = Figure().subplots()
    content.figures["pareto"][0][1](axes)
    assert axes.get_ylabel() == "held-out nats per token" and len(axes.lines) > 2
    content.figures["loss_curves"][0][1](axes)
    assert axes.get_ylabel() == "nats per token, smoothed"


def test_losses_of_tokens_are_not_compared_with_bits_per_byte(without_text, tmp_path):
    content = gather([make_sweep(tmp_path / "text", ["dense", "window"], [1]), without_text])
    assert [row.quality for row in content.rows] == ["bits_per_byte"] * 2 + ["loss"] * 2
    assert content.rows[2].fronts == set() != content.rows[0].fronts | content.rows[1].fronts
    assert {"bits/byte", "nats/token"} < {column.title for column in content.columns}
