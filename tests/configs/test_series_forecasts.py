"""Series forecasts have the windows and errors of plain loops; the baseline has its published errors on ETTh1."""

import json
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from configs import series_forecasts
from configs.errors import ConfigError
from configs.runs import open_run, retokenize
from data.sources import BadDocuments, TimeSeries
from scripts import evaluate as command
from scripts.generate import write
from scripts.reporting.run_table import report_rows
from tests.commands import ROOT, compose
from tests.scripts.runs import SMALL, make_run

ETT = ROOT.parent / "shared" / "data" / "ett.tar.xz"
ROWS = 700
OWN = ("data=timeseries", "data/tokenizer=bins", "data.tokenizer.bins=32", "data.tokenizer.limit=4")
SIZES = [each for each in SMALL if "vocabulary" not in each]


@pytest.fixture(scope="module")
def waves(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "waves"
    folder.mkdir()
    hours = np.arange(ROWS)
    noise = np.random.default_rng(1).normal(size=(2, ROWS))
    slow, fast = 5 + np.sin(hours / 24 * 2 * np.pi) + 0.1 * noise[0], np.cos(hours / 5) + 0.3 * noise[1]
    rows = [f"{hour},{a:.4f},{b:.4f}\n" for hour, a, b in zip(hours, slow, fast, strict=True)]
    (folder / "waves.csv").write_text("date,slow,fast\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def run_folder(waves, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("outputs"), waves, *OWN, name="waves", small=SIZES)


@pytest.fixture(scope="module")
def run(run_folder):
    return open_run(run_folder, "cpu", "64-true")


def settings(**changes) -> dict:
    series = {"horizons": [4, 10], "context": 30, "stride": 7, "samples": 3, "period": 24, "sequences_at_once": 8}
    return {"series": series | changes, "seed": 3, "precision": "64-true"}


def measure(run, series, settings) -> dict:
    plan = series_forecasts.plan_forecasts(run, series, "test", settings["series"])
    return series_forecasts.measure_forecasts(run, series, plan, settings, no_bar)


def no_bar(label: str, total: int):
    return nullcontext(lambda more: None)


def test_errors_equal_plain_loops(run, monkeypatch):
    series = series_forecasts.open_series(run, None)
    read = []

    def continuations(model, contexts, new_tokens, *, samples, vocabulary, **others):
        """Three samples of each context: its last 30 bins again, moved by -1, 0 and 10 bins."""
        assert (samples, vocabulary) == (3, 32)
        read.extend(contexts)
        ahead = np.array([np.resize(context[-30:], new_tokens) for context in contexts])
        return np.clip(ahead[:, None] + np.array([-1, 0, 10])[:, None], 0, 31)

    monkeypatch.setattr(series_forecasts, "sample_continuations", continuations)
    row = measure(run, series, settings())

    centers = np.linspace(-4, 4, 32)
    squared = {4: [], 10: []}
    naive, count = {4: [], 10: []}, {4: 0, 10: 0}
    for each in series:
        train = each.values[:490]
        mean, deviation, scale = train.mean(), train.std(), abs(train).mean()
        for start in range(560, ROWS, 7):
            bins = [int(abs(centers - value / scale).argmin()) for value in each.values[start - 30 : start]]
            for horizon in (4, 10):
                if start + horizon <= ROWS:
                    count[horizon] += 1
                    for step in range(horizon):
                        right = (each.values[start + step] - mean) / deviation
                        forecast = (centers[bins[step]] * scale - mean) / deviation
                        repeated = (each.values[start + step % 24 - 24] - mean) / deviation
                        squared[horizon].append((forecast - right) ** 2)
                        naive[horizon].append(abs(repeated - right))
    assert all(len(context) == 30 for context in read) and len(read) == count[4]
    assert [found["horizon"] for found in row["horizons"]] == [4, 10]
    assert (row["series"], row["context"], row["stride"], row["point"]) == (2, 30, 7, "median")
    for found in row["horizons"]:
        horizon = found["horizon"]
        assert found["forecasts"] == count[horizon]
        assert found["mse"] == pytest.approx(np.mean(squared[horizon]), rel=1e-9)
        assert found["seasonal_naive_mae"] == pytest.approx(np.mean(naive[horizon]), rel=1e-9)
        assert 0 < found["quantized_mse"] < found["mse"] and found["quantized_mae"] > 0
    assert count[10] < count[4]


def test_continuations_do_not_depend_on_how_many_are_decoded_together(run):
    series = series_forecasts.open_series(run, None)
    one, other = (measure(run, series, settings(stride=130, sequences_at_once=count)) for count in (4, 100))
    assert one["horizons"] == [pytest.approx(found, rel=1e-9) for found in other["horizons"]]


def test_evaluate_prints_and_stores_the_errors(run_folder, waves):
    overrides = [f"checkpoint={run_folder}", "series.horizons=[6]", "series.stride=50", "series.samples=2"]
    overrides += ["evaluation.baselines=false", "evaluation.by_context.contexts=[]"]
    row = command.evaluate(compose(*overrides, "accelerator=cpu", config_name="evaluate"))
    (found,) = row["series_forecasts"]["horizons"]
    assert row["series_forecasts"]["context"] == 58 and found["forecasts"] == 2 * 3
    printed = dict(report_rows(row, {}))
    assert printed["  6 values ahead, 6 forecasts"] == f"MSE {found['mse']:.4f}, MAE {found['mae']:.4f}"
    naive = f"MSE {found['seasonal_naive_mse']:.4f}, MAE {found['seasonal_naive_mae']:.4f}"
    assert printed["    seasonal naive, period 24"] == naive
    assert "perplexity per word" not in printed  # a series is one word
    (stored,) = json.loads((run_folder / "evaluation.json").read_text())["rows"]
    assert stored["series_forecasts"] == row["series_forecasts"]


def test_own_series_are_those_of_the_data_group(run, waves):
    data = compose("data=timeseries", f"data.path={waves}", "data.source.parts=[300,100,100]")["data"]
    assert [each.ends["test"] for each in series_forecasts.open_series(run, data)] == [500, 500]
    assert series_forecasts.open_series(run, compose("data=code")["data"]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": None, "horizons": [50]}, r"^series\.context=null: must be at least series\.period=24 .*14"),
        ({"context": 10}, r"^series\.context=10: must be at least series\.period=24"),
        ({"context": 10_000_000}, r"^series\.context=10000000: must be at most .* model\.max_length"),
        ({"horizons": [4, 150]}, r"^series\.horizons=\[4, 150\]: must be at most 140, the rows of the test split"),
        ({"context": 695}, r"^series\.horizons=\[4, 10\]: must be at most 5, .* after 695 others"),
    ],
)
def test_what_does_not_fit_is_named(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        series = series_forecasts.open_series(run, None)
        measure(run, series, settings(**changes))


def test_what_does_not_fit_is_refused_before_anything_is_scored(run_folder, monkeypatch):
    monkeypatch.setattr("model.evaluation.Scorer.token_losses", None)
    with pytest.raises(ConfigError, match=r"^series\.horizons=\[150\]: must be at most 140"):
        command.evaluate(
            compose(
                f"checkpoint={run_folder}",
                "series.horizons=[150]",
                "series.context=30",
                "accelerator=cpu",
                config_name="evaluate",
            )
        )


def test_default_horizons_fit_the_sequences_and_the_split(run, monkeypatch, caplog):
    series = series_forecasts.open_series(run, None)  # 700 rows, the last 140 of them for test
    for horizons, fitting in (((8, 16, 32), [8, 16, 32]), ((8, 33), [8]), ((33, 40), None)):
        monkeypatch.setattr(series_forecasts, "HORIZONS", horizons)
        plan = series_forecasts.plan_forecasts(run, series, "test", settings(context=None, horizons=None)["series"])
        assert (plan and plan.horizons) == fitting, "training sequences have 64 values"
    assert "no forecasts: none of 33, 40 values ahead" in caplog.text and "(64 values)" in caplog.text
    monkeypatch.setattr(series_forecasts, "HORIZONS", (8, 16, 32))
    late = settings(context=676, horizons=None)["series"]  # 24 rows are left
    assert series_forecasts.plan_forecasts(run, series, "test", late).horizons == [8, 16]


def test_a_series_run_with_short_sequences_is_evaluated_without_forecasts(run_folder):
    overrides = [f"checkpoint={run_folder}", "evaluation.baselines=false", "accelerator=cpu"]
    row = command.evaluate(compose(*overrides, config_name="evaluate"))
    assert "series_forecasts" not in row and row["loss"] > 0


def test_no_text_is_generated_from_a_run_on_series(run_folder):
    with pytest.raises(ConfigError, match=r"^checkpoint=\S+: must be a run on text.*scripts/evaluate\.py forecasts"):
        write(compose(f"checkpoint={run_folder}", "accelerator=cpu", config_name="generate"))


def test_bins_of_other_numbers_are_not_compared(run, waves, tmp_path):
    other = make_run(tmp_path, waves, *OWN, "data.tokenizer.limit=5", name="other", small=SIZES)
    other = open_run(other, "cpu", "32-true")
    with pytest.raises(ConfigError, match=r"^checkpoint=.*: must have the tokenizer of waves/first"):
        retokenize(run.data.corpus.splits["test"], "test", run, other)


@pytest.mark.skipif(not ETT.exists(), reason=f"{ETT} is not here")
def test_repeating_the_last_value_of_etth1_has_the_published_errors(run, tmp_path, monkeypatch):
    """`Repeat` in table 2 of Zeng et al. 2023: MSE 1.295 and MAE 0.713 at 96."""
    with tarfile.open(ETT) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setattr(
        series_forecasts,
        "sample_continuations",
        lambda model, contexts, new, **_: np.zeros((len(contexts), 1, new), int),
    )
    source = TimeSeries((".csv",), "date", (8640, 2880, 2880))
    series = list(source.read(str(tmp_path / "ETTh1.csv"), BadDocuments("error", None)))
    every = settings(horizons=[96], stride=1, period=1)
    row = measure(run, series, every)
    (found,) = row["horizons"]
    assert found["forecasts"] == 7 * 2785
    assert (found["seasonal_naive_mse"], found["seasonal_naive_mae"]) == pytest.approx((1.295, 0.713), abs=1e-3)
