"""Seeds, differences and fronts, against hand arithmetic and brute force."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.reporting.aggregate import (
    COSTS,
    Row,
    difference,
    estimate,
    make_rows,
    paired_difference,
    pareto_front,
    student_quantile,
)
from scripts.reporting.jobs import Job, Sweep

T = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 10: 2.22814, 30: 2.04227, 120: 1.97993}
"""t(0.975, degrees of freedom), from printed tables."""

points = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12)


def job(label: str, seed: int, bits: float, seconds: float = 1.0, **others: Any) -> Job:
    usual = {
        "sweep": "s",
        "folder": Path("s") / f"{label}{seed}",
        "hash": f"{label}{seed}",
        "label": label,
        "state": "done",
        "seed": seed,
        "baseline": label.startswith("dense"),
        "summary": {"step_seconds": seconds, "attention_flops_per_token": 10 * seconds, "peak_memory_bytes": 100},
        "evaluation": {"bits_per_byte": bits},
    }
    return Job(**(usual | others))


def rows_of(*jobs: Job) -> dict[str, Row]:
    return {row.label: row for row in make_rows([Sweep("s", Path("s"), jobs)])}


def test_the_row_of_a_lossy_tokenizer_is_marked():
    lossy = {"bits_per_byte": 2.0, "tokenizer": {"tokenizer": "saved", "lossy": "allow"}}
    rows = rows_of(job("window", 1, 2.5), job("other", 1, 2.0, evaluation=lossy))
    assert list(rows) == ["window", "other (lossy tokenizer)"]


@pytest.mark.parametrize("freedom", T)
def test_students_quantile_is_the_printed_one(freedom):
    assert student_quantile(freedom) == pytest.approx(T[freedom], rel=1e-5)


def test_seeds_become_a_mean_and_an_interval():
    found = estimate([1.0, 1.2, 1.7])  # mean 1.3, squares 0.09 + 0.01 + 0.16, so s = sqrt(0.13)
    half = 4.30265 * 0.13**0.5 / 3**0.5
    assert (found.mean, found.count) == (pytest.approx(1.3), 3)
    assert (found.low, found.high) == (pytest.approx(1.3 - half, rel=1e-5), pytest.approx(1.3 + half, rel=1e-5))


def test_one_seed_has_no_interval():
    found = estimate([1.5])
    assert (found.mean, found.low, found.high, found.half_width, found.count) == (1.5, None, None, None, 1)


def test_the_same_seeds_are_compared_pair_by_pair():
    """Seeds that shift both rows alike tell nothing of their difference."""
    ours, theirs = [(1, 1.1), (2, 2.2), (3, 3.0)], [(3, 2.9), (1, 1.0), (2, 2.0)]
    found = difference(ours, theirs)  # 0.1, 0.2, 0.1: mean 0.4 / 3, s = sqrt(0.02 / 3 / 2)
    half = 4.30265 * (0.02 / 3 / 2) ** 0.5 / 3**0.5
    assert found.mean == pytest.approx(0.4 / 3) and found.half_width == pytest.approx(half, rel=1e-4)


def test_seeds_that_one_row_lacks_do_not_count():
    found = difference([(1, 1.0), (2, 2.0)], [(1, 1.5), (2, 2.7), (3, 9.0)])
    assert found.mean == pytest.approx(-0.6) and found.count == 2 and found.half_width is not None
    found = difference([(1, 1.0)], [(1, 1.5), (2, 1.7)])
    assert found.mean == pytest.approx(-0.5) and found.low is None and found.count == 1


def test_runs_that_repeat_a_seed_count_as_one_seed():
    found = difference([(1, 1.0), (2, 5.0), (1, 2.0)], [(1, 1.0), (2, 4.0)])
    assert (found.mean, found.count) == (pytest.approx(0.75), 2)
    jobs = [job("window", 1, 1.0), job("window", 1, 2.0), job("window", 2, 5.0)]
    (row,) = make_rows([Sweep("s", Path("s"), tuple(jobs))])
    assert (row.values["bits_per_byte"].mean, row.values["bits_per_byte"].count) == (3.25, 2)
    unknown = difference([(None, 1.0), (None, 2.0)], [(1, 0.0), (2, 0.0)])
    assert (unknown.mean, unknown.count) == (1.5, 2)


def test_the_documents_of_the_seeds_of_both_are_compared():
    def judged(seed, *nats):
        row = {"bits_per_byte": 1.0, "documents_digest": "d", "by_document": {"nats": nats, "bytes": [100, 100]}}
        return job("window", seed, 1.0, evaluation=row)

    ours, theirs = [judged(1, 70.0, 70.0)], [judged(1, 69.0, 68.0), judged(2, 90.0, 90.0)]
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(1.5 / 100 / math.log(2)) and found.better == 0
    assert paired_difference([judged(3, 70.0, 70.0)], theirs).better == 2, "no seed in common: means of all"


def test_other_seeds_are_compared_by_welch():
    found = difference([(4, 1.0), (5, 3.0)], [(1, 5.0), (2, 6.0), (3, 7.0)])
    # Variances 2 and 1 over 2 and 3: 1 + 1/3; freedom (4/3)^2 / (1 + 1/18) = 1.684, rounded down to 1.
    assert found.mean == pytest.approx(-4.0) and found.half_width == pytest.approx(12.7062 * (4 / 3) ** 0.5, rel=1e-5)


def test_a_difference_with_a_single_seed_has_no_interval():
    found = difference([(3, 1.0)], [(1, 1.5), (2, 1.7)])
    assert found.mean == pytest.approx(-0.6) and found.low is None and found.count == 1
    assert difference([], [(1, 1.0)]) is None


@given(points)
def test_the_front_is_that_of_brute_force(points):
    def beaten(index: int) -> bool:
        x, y = points[index]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)

    assert pareto_front(points) == [index for index in range(len(points)) if not beaten(index)]


def test_rows_hold_their_seeds_and_stand_against_dense():
    rows = rows_of(
        job("dense", 1, 1.0, 2.0), job("window", 1, 1.2, 1.0), job("dense", 2, 1.1, 2.0), job("window", 2, 1.5)
    )
    window = rows["window"]
    assert [found.seed for found in window.counted] == [1, 2] and window.against.label == "dense"
    assert window.values["bits_per_byte"].mean == pytest.approx(1.35)
    assert window.difference.mean == pytest.approx(0.3) and window.ratios["step_seconds"] == pytest.approx(0.5)
    assert rows["dense"].against is None and rows["dense"].difference is None


def test_only_done_and_judged_jobs_count():
    rows = rows_of(
        job("window", 1, 1.0),
        job("window", 2, 9.0, state="failed"),
        job("window", 3, 9.0, evaluation=None),
        job("window", 4, 9.0, state="running"),
    )
    assert rows["window"].values["bits_per_byte"].mean == 1.0 and len(rows["window"].jobs) == 4


def test_each_cost_has_its_own_front():
    cheap = {"step_seconds": 1.0, "attention_flops_per_token": 9.0, "peak_memory_bytes": 100}
    rows = rows_of(job("dense", 1, 1.0, 5.0), job("window", 1, 1.2, summary=cheap), job("fixed", 1, 1.1, 0.5))
    assert rows["dense"].fronts == set(COSTS)
    assert rows["fixed"].fronts == {"step_seconds", "attention_flops_per_token"}
    assert rows["window"].fronts == set()


def test_a_length_is_held_against_the_dense_of_its_length():
    jobs = [
        job(f"{name} length={length}", 1, bits, context=f"data.sequence_length={length}")
        for name, length, bits in (("dense", 1, 1.0), ("dense", 2, 2.0), ("window", 1, 1.1), ("window", 2, 2.5))
    ]
    rows = rows_of(*jobs)
    assert rows["window length=1"].difference.mean == pytest.approx(0.1)
    assert rows["window length=2"].difference.mean == pytest.approx(0.5)


def test_the_only_dense_of_another_length_is_no_baseline():
    of = lambda length: {"context": str(length), "config": {"data": {"sequence_length": length}}}  # noqa: E731
    rows = rows_of(
        job("dense", 1, 1.0, **of(1024)), job("window", 1, 1.1, **of(2048)), job("fixed", 1, 1.1, **of(1024))
    )
    assert rows["window"].against is None and rows["fixed"].against.label == "dense"


def test_sweeps_that_are_joined_keep_their_own_rows_and_baselines():
    sweeps = [
        Sweep(name, Path(name), tuple(job(*each, sweep=name, folder=Path(name) / each[0]) for each in jobs))
        for name, jobs in (
            ("tokens", [("dense", 1, 1.0), ("window", 1, 2.0)]),
            ("time", [("dense", 1, 1.5), ("window", 1, 2.0)]),
        )
    ]
    rows = {row.label: row for row in make_rows(sweeps)}
    assert list(rows) == ["tokens: dense", "tokens: window", "time: dense", "time: window"]
    assert rows["tokens: window"].difference.mean == 1.0 and rows["time: window"].difference.mean == 0.5
