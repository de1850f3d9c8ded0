"""The report of a scaling sweep: its fits, the held-out budget, and what it lacks."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from scripts.reporting.content import gather
from scripts.reporting.markdown import write_markdown
from scripts.reporting.page import write_page
from scripts.reporting.read_jobs import read_sweeps
from scripts.reporting.scaling import Scaling, fit_sweep
from scripts.reporting.scaling_law import fit_power_law
from scripts.reporting.scaling_text import header, limits, sentences, write_scaling_csv
from tests.scripts.reporting.sweeps import make_job, make_sweep, write_manifest

BUDGETS = (1e12, 2e12, 4e12, 8e12)
EXPONENTS = {"dense": 0.10, "window": 0.12}
SIZES = {"64": 0.01, "128": 0.0, "256": 0.02}  # how much worse than the best
DOCUMENTS, BYTES = 12, 1000


def loss_of(pattern: str, flops: float) -> float:
    return 2.0 * (flops / BUDGETS[0]) ** -EXPONENTS[pattern]


def make_scaling(
    folder: Path,
    states: dict[tuple[str, str, float], str] | None = None,
    held_out: float = 0.0,
    noise: Sequence[float] = (0.0,),
) -> Path:
    """A sweep of laws without E. `held_out` is added to the loss at the largest budget, and `noise` to that of each
    seed, in another order at each budget."""
    folder.mkdir()
    entries = []
    for pattern in EXPONENTS:
        for size, worse in SIZES.items():
            for (place, flops), seed in product(enumerate(BUDGETS), range(len(noise))):
                state = (states or {}).get((pattern, size, flops), "done")
                entry = make_job(folder, f"{pattern} width={size} flops={flops:.6g}", seed + 1, state)
                entry |= {"flops": flops, "pattern": pattern}
                entry["overrides"].append(f"model.width={size}")
                entries.append(entry)
                if state != "done":
                    continue
                chance = np.random.default_rng(hash_of(pattern, size, flops))
                bits = loss_of(pattern, flops) + worse + (held_out if flops == BUDGETS[-1] else 0.0)
                own = bits + np.linspace(-0.3, 0.3, DOCUMENTS) + chance.normal(0, 0.002, DOCUMENTS)
                own += bits - own.mean() + noise[(seed + place) % len(noise)]
                edit(folder / entry["folder"] / "evaluation.json", own)
                summary = folder / entry["folder"] / "summary.json"
                summary.write_text(json.dumps(json.loads(summary.read_text()) | {"parameters": int(size) ** 2}))
    write_manifest(folder, entries, match="flops", budget={"flops": list(BUDGETS)})
    return folder


def hash_of(pattern: str, size: str, flops: float) -> int:
    return int(flops / 1e12) + 100 * int(size) + 100_000 * len(pattern)


def edit(file: Path, bits: np.ndarray) -> None:
    content = json.loads(file.read_text())
    by_document = {"nats": (bits * BYTES * math.log(2)).tolist(), "bytes": [BYTES] * DOCUMENTS}
    content["rows"][0] |= {"bits_per_byte": bits.mean(), "by_document": by_document, "documents_digest": "d"}
    file.write_text(json.dumps(content))


def fitted(folder: Path) -> Scaling:
    return fit_sweep(*read_sweeps([folder]))


def test_each_pattern_has_the_law_of_its_best_sizes(tmp_path):
    scaling = fitted(make_scaling(tmp_path / "scaling"))
    assert [fit.pattern for fit in scaling.fits] == ["dense", "window"] and not scaling.missing
    for fit in scaling.fits:
        assert [point.flops for point in fit.points] == list(BUDGETS[:-1])
        assert [point.loss for point in fit.points] == pytest.approx([loss_of(fit.pattern, c) for c in BUDGETS[:-1]])
        assert {point.parameters for point in fit.points} == {128**2}
        assert fit.exponent.value == pytest.approx(EXPONENTS[fit.pattern], rel=1e-6)
        assert fit.exponent.low < fit.exponent.value < fit.exponent.high
        assert fit.predicted.value == pytest.approx(loss_of(fit.pattern, BUDGETS[-1]), rel=1e-6)
        assert fit.inside
    dense, window = scaling.fits
    factor = (BUDGETS[2] / BUDGETS[0]) ** (EXPONENTS["window"] / EXPONENTS["dense"] - 1)
    assert dense.multiplier is None and window.multiplier.value == pytest.approx(factor, rel=1e-5)
    assert 1.0 < window.multiplier.low < factor < window.multiplier.high


def test_the_largest_budget_changes_the_verdict_and_no_fit(tmp_path):
    one, other = (fitted(make_scaling(tmp_path / name, held_out=more)) for name, more in (("one", 0.0), ("two", 0.1)))
    for before, after in zip(one.fits, other.fits, strict=True):
        same = ("points", "exponent", "predicted", "multiplier", "curve")
        assert all(getattr(before, name) == getattr(after, name) for name in same)
        assert before.inside and not after.inside
        assert after.held_out.loss == pytest.approx(before.held_out.loss + 0.1)
    assert "outside the interval" in sentences(other)[0] and "inside the interval" in sentences(one)[0]
    assert "misses the largest budget" in sentences(other)[-1] and "misses" not in sentences(one)[-1]


def test_fits_use_the_jobs_that_are_done_and_name_the_others(tmp_path):
    states = {("window", "128", 1e12): "failed", ("dense", "128", 8e12): "running"}
    scaling = fitted(make_scaling(tmp_path / "scaling", states))
    told = " ".join(limits(scaling))
    assert "window width=128 flops=1e+12, seed 1 (failed)" in told and "(running)" in told
    window = scaling.fits[1]
    assert window.points[0].loss == pytest.approx(loss_of("window", 1e12) + SIZES["64"])  # the next best size


def test_a_pattern_with_one_budget_has_no_law(tmp_path):
    states = {("window", size, flops): "failed" for size in SIZES for flops in BUDGETS[1:]}
    scaling = fitted(make_scaling(tmp_path / "scaling", states))
    assert [fit.pattern for fit in scaling.fits] == ["dense"]
    assert any("No scaling law: window has results at 1 of the budgets" in line for line in limits(scaling))


def test_jobs_evaluated_on_other_text_have_no_law(tmp_path):
    folder = make_scaling(tmp_path / "scaling")
    file = next(folder.glob("*/evaluation.json"))
    file.write_text(file.read_text().replace('"documents_digest": "d"', '"documents_digest": "e"'))
    scaling = fitted(folder)
    assert not scaling.fits and any("different text" in line for line in limits(scaling))


def per_value(folder: Path, units: dict[str, str] | None) -> Path:
    """Makes the runs of a sweep those of series, with a value in each byte. Returns the sweep's folder.

    units: of their files; None makes the files those of an early version.
    """
    for file in folder.glob("*/evaluation.json"):
        (row,) = json.loads(file.read_text())["rows"]
        row |= {"loss": row["bits_per_byte"] * math.log(2), "tokenizer": {"tokenizer": "bins"}}
        if units:
            row |= {"bits_per_byte": None, "units": units}
            row["by_document"]["tokens"] = row["by_document"]["bytes"]
        file.write_text(json.dumps({"rows": [row]}))
    return folder


def test_series_have_a_law_in_nats_per_value(tmp_path):
    of_bytes = fitted(make_scaling(tmp_path / "bytes"))
    folder = per_value(make_scaling(tmp_path / "scaling"), {"loss": "nats per value"})
    scaling = fitted(folder)
    assert (scaling.quality, scaling.unit) == ("loss", "nats per value")
    for fit, other in zip(scaling.fits, of_bytes.fits, strict=True):
        assert fit.exponent.value == pytest.approx(other.exponent.value)
        assert fit.predicted.low == pytest.approx(other.predicted.low * math.log(2), rel=1e-6)
    assert " nats per value at " in sentences(scaling)[0] and "E (nats/value)" in header(scaling)
    assert write_scaling_csv([scaling]).startswith("sweep,pattern,flops,parameters,loss,held_out\n")
    assert "bits" not in write_markdown(gather([folder]))


def test_series_of_an_early_version_have_a_law_without_intervals(tmp_path):
    scaling = fitted(per_value(make_scaling(tmp_path / "scaling"), None))
    assert scaling.unit == "nats per value" and scaling.fits[0].predicted.low is None


def test_jobs_with_different_units_have_no_law(tmp_path):
    folder = make_scaling(tmp_path / "scaling")
    file = next(folder.glob("*/evaluation.json"))
    (row,) = json.loads(file.read_text())["rows"]
    file.write_text(json.dumps({"rows": [row | {"bits_per_byte": None}]}))
    scaling = fitted(folder)
    assert not scaling.fits and any("different units" in line for line in limits(scaling))


def test_the_report_has_the_numbers_of_the_fit_and_compares_the_largest_budget(tmp_path):
    folder = make_scaling(tmp_path / "scaling")
    content = gather([folder])
    content = replace(content, figures={name: content.figures[name] for name in ("pareto", "scaling")})  # to draw few
    page, report = write_page(content, {}), write_markdown(content)
    for fit in fitted(folder).fits:
        for number in (fit.exponent.value, fit.exponent.low, fit.predicted.value, fit.held_out.loss):
            assert f"{number:.4f}" in report and f"{number:.4f}" in page
    assert [row.jobs[0].flops for row in content.rows] == [BUDGETS[-1]] * len(EXPONENTS) * len(SIZES)
    window, dense = content.rows[len(SIZES)], content.rows[0]
    assert window.against is dense  # of the same size
    assert "one seed" in report and page.count("<svg") > 1
    assert len(write_scaling_csv(content.scaling).splitlines()) == 1 + len(EXPONENTS) * len(BUDGETS)


def test_a_report_before_the_largest_budget_is_run_has_the_laws_alone(tmp_path):
    states = {(pattern, size, BUDGETS[-1]): "waiting" for pattern in EXPONENTS for size in SIZES}
    content = gather([make_scaling(tmp_path / "scaling", states)])
    assert content.comparisons == tuple(sentences(*content.scaling))
    assert "that budget is not measured yet" in content.comparisons[0]


def test_a_report_of_another_sweep_has_no_scaling_law(tmp_path):
    content = gather([make_sweep(tmp_path / "patterns", ["dense", "window"], [1])])
    assert not content.scaling and "scaling" not in content.figures
    assert "scaling" not in write_markdown(content).lower()


def test_a_best_size_at_the_edge_of_the_sizes_is_a_caution(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "256", -0.02)
    told = limits(fitted(make_scaling(tmp_path / "scaling")))
    assert any("smallest or the largest one for dense at 1e+12" in line for line in told)


def test_with_less_than_three_sizes_the_best_one_is_a_caution(tmp_path, monkeypatch):
    monkeypatch.delitem(SIZES, "64")
    told = limits(fitted(make_scaling(tmp_path / "scaling")))
    assert any("another size may be better" in line for line in told)


def test_runs_of_few_steps_are_a_caution(tmp_path):
    scaling = fitted(make_scaling(tmp_path / "scaling"))
    assert not any("Steps are whole" in line for line in limits(scaling))
    told = " ".join(limits(replace(scaling, steps=20)))
    assert "has 20 steps. Steps are whole, so its FLOPs differ from its budget by up to 2%" in told


def test_intervals_of_a_law_on_these_documents_contain_the_noise_of_seeds(tmp_path):
    """The mean of twelve runs varies by 0.02 / sqrt(12) = 0.0058; the middle of a law is about such a mean."""
    noise = [-0.02, 0.02, -0.02, 0.02]
    fit = fitted(make_scaling(tmp_path / "scaling", noise=noise)).fits[0]
    _, middle = min(fit.curve, key=lambda each: abs(each[0] - BUDGETS[1]))
    assert 0.015 < middle.high - middle.low < 0.03  # 4 x 0.0058, less what choosing the best size takes away


def test_four_fitted_budgets_have_an_offset():
    flops = np.array([*BUDGETS, 16e12])
    law = fit_power_law(flops, (1.0 + 0.5 * (flops / flops[0]) ** -0.5)[None])
    assert law.offset[0] == pytest.approx(1.0, abs=0.01)
