"""scripts/preflight.py, and the check that train.py makes."""

import dataclasses
import json
import time

import pytest

from configs.build import ConfigError
from model.training.run_folder import RunFolder
from scripts.benchmarks.calibrate import fit_rates
from scripts.console import report_rows
from scripts.forecasting import forecast, memory, speed
from scripts.forecasting.advice import advise
from scripts.forecasting.rehearsal import rehearse
from scripts.forecasting.sampling import Sample
from scripts.forecasting.table import UNCALIBRATED, check_forecast, expect, forecast_rows
from tests.commands import run
from tests.scripts.forecasting.conftest import books, composed  # noqa: F401  (fixtures)


def settings(books):  # noqa: F811
    from tests.scripts.runs import SMALL

    return [*SMALL, "data=files", f"data.path={books}", f"data.cache={books.parent / 'cache'}"]


def test_the_command_prints_a_table_and_writes_a_file(books, tmp_path):  # noqa: F811
    result = run("scripts/preflight.py", *settings(books), "attention=window", f"output={tmp_path}/said.json")
    for words in ("parameters", "tokens a step", "layers 0-1: local", "FLOPs", "peak memory", "activations of local"):
        assert words in result.stdout, words
    assert "known once python scripts/benchmark.py calibrate has measured this device" in result.stdout
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["tokens"] == 64 * said["steps"] and said["flops"] == said["flops_per_step"] * said["steps"]
    assert said["step_seconds"] is None and len(said["layers"]) == 2
    assert said["memory"]["peak_bytes"] == sum(said["memory"]["parts"].values()) + said["memory"]["before"]


def test_train_writes_the_forecast_beside_the_measured(books, tmp_path):  # noqa: F811
    result = run("train.py", *settings(books), "trainer.max_steps=2", f"outputs={tmp_path}", "name=said",
                 "evaluation.baselines=false", "trainer.validate_every=null")  # fmt: skip
    (folder,) = (tmp_path / "said").iterdir()
    summary = RunFolder.open(folder).read_summary()
    assert summary["forecast"]["peak_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=0.1)
    assert summary["forecast"]["flops_per_step"] == pytest.approx(summary["flops_per_token"] * 64, rel=0.1)
    assert f"(forecast {summary['forecast']['peak_memory_bytes'] / 1e9:.2f})" in result.stdout


def test_a_forecast_takes_no_time(composed):  # noqa: F811
    config, data = composed("attention=window")
    started = time.process_time()
    forecast(config, data, data.vocabulary)
    assert time.process_time() - started < 2


def test_a_heap_that_keeps_holes_is_in_the_forecast(composed, monkeypatch):  # noqa: F811
    config, data = composed("attention=window")
    held = {}
    for glibc in (True, False):
        monkeypatch.setattr(memory, "give_back_free_memory", lambda glibc=glibc: glibc)
        said = forecast(config, data, data.vocabulary).memory
        assert (memory.HEAP in said.parts) == glibc
        held[glibc] = said
    assert held[True].step_bytes - held[False].step_bytes == held[True].parts[memory.HEAP]
    sample = Sample.draw(config, data, data.vocabulary, sequences=1)
    layer = rehearse(sample.model, sample.views, 1, 64, config, sample.document.device).layer
    assert held[True].parts[memory.HEAP] == int(memory.HELD_BY_GLIBC * layer) > 0


def test_what_exceeds_the_device_warns_or_refuses(composed, monkeypatch):  # noqa: F811
    config, data = composed("attention=window", "data.batch_size=4")
    said = forecast(config, data, data.vocabulary)
    assert check_forecast(said, config, data, data.vocabulary) is None
    small = dataclasses.replace(said, device_bytes=said.memory.peak_bytes - 1)
    line = check_forecast(small, config, data, data.vocabulary)
    assert "\n" not in line and "exceeds the" in line and line.count(" less)") == 3
    with pytest.raises(ConfigError, match=r"preflight=refuse: the forecast of .* exceeds"):
        check_forecast(small, config | {"preflight": "refuse"}, data, data.vocabulary)
    assert expect(config | {"preflight": "off"}, data) == (None, None)


def test_advice_says_what_the_changed_config_is_forecast_at(composed):  # noqa: F811
    changes = ("data.batch_size=4", "data.tokenizer.vocabulary=300")
    config, data = composed("attention=window", *changes)
    now = forecast(config, data, data.vocabulary).memory.step_bytes
    found = advise(config, data, data.vocabulary, most=9)
    assert [each.saves for each in found] == sorted((each.saves for each in found), reverse=True)
    for each in found:
        other, other_data = composed("attention=window", *changes, *each.settings.split())
        then = forecast(other, other_data, other_data.vocabulary).memory.step_bytes
        assert now - then == pytest.approx(each.saves, rel=0.05, abs=4096), each


def test_a_calibrated_device_has_a_time(composed, tmp_path, monkeypatch):  # noqa: F811
    config, data = composed("attention=window", "trainer.accumulate=3")
    monkeypatch.setattr(speed, "TABLE", tmp_path / "absent.json")  # the repository's may know this machine
    said = forecast(config, data, data.vocabulary)
    assert said.step_seconds is None
    assert ("time a step", UNCALIBRATED) in forecast_rows(said)
    from scripts.loading import device_of

    rates = {"linear": 1e9, "attention": 1e9, "fixed": 0.25}
    table = tmp_path / "calibration.json"
    table.write_text(json.dumps({"rates": {speed.setting(config, device_of("cpu")): rates}}))
    monkeypatch.setattr(speed, "TABLE", table)
    known = forecast(config, data, data.vocabulary).step_seconds
    assert 0.75 + said.flops_per_step / 1e9 <= known <= 0.75 + 3 * said.flops_per_step / 1e9


def test_rates_are_found_again():
    true = {"linear": 2e12, "attention": 5e11, "fixed": 0.01}
    rows = []
    for linear, attention in ((1e12, 1e11), (4e12, 1e11), (1e12, 3e12), (2e12, 2e12)):
        seconds = linear / true["linear"] + attention / true["attention"] + true["fixed"]
        rows.append({"linear_flops": linear, "attention_flops": attention, "seconds": seconds})
    assert fit_rates(rows) == pytest.approx(true)


def test_the_report_has_measured_and_forecast_in_one_row():
    row = dict(loss=1.0, bits_per_byte=1.0, perplexity=1.0, word_perplexity=None, loss_first_512=None,
               loss_last_quarter=None, trailing=None)  # fmt: skip
    summary = {"peak_memory_bytes": 1_900_000_000, "forecast": {"peak_memory_bytes": 1_800_000_000}}
    assert ("peak memory", "1.90 GB (forecast 1.80)") in report_rows(row, summary)
    assert ("peak memory", "1.90 GB") in report_rows(row, {"peak_memory_bytes": 1_900_000_000})


def test_a_backend_that_cannot_be_rehearsed_is_named_and_stops_no_run(composed):  # noqa: F811
    config, data = composed("attention.backend=reference")
    expected, line = expect(config, data)
    assert expected is None and "attention.backend=reference" in line
    result = run("scripts/preflight.py", "attention.backend=reference", check=False)
    assert result.returncode == 2 and "attention.backend=reference is differentiated" in result.stderr


def test_preflight_is_checked():
    result = run("train.py", "preflight=maybe", check=False)
    assert result.returncode == 2 and "preflight=maybe: must be one of warn, refuse, off" in result.stderr


def test_layers_that_are_alike_are_one_row(composed):  # noqa: F811
    patterns = ("attention.patterns.local.width=16", "attention.schedule=[local,local,full]")
    config, data = composed("attention=window_dense", *patterns, "model.layers=7")
    said = forecast(config, data, data.vocabulary)
    rows = dict(forecast_rows(said))
    local, full = said.layers[0], said.layers[2]
    assert (
        rows["attention, each of layers 0-1, 3-4, 6: local"]
        == f"{local.pairs:.3e} pairs ({local.density_pairs:.1%} of dense)"
    )
    assert rows["attention, each of layers 2, 5: full"].startswith(f"{full.pairs:.3e} pairs (")
    taken = said.memory.peak_bytes / said.device_bytes
    assert rows["memory of the device"].endswith(f" GB, {taken:.0%} of it taken")
    assert "memory of the device" not in dict(forecast_rows(dataclasses.replace(said, device_bytes=None)))
