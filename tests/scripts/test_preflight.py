"""scripts/preflight.py, and the check that train.py makes."""

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import pytest

from configs.errors import ConfigError
from configs.forecasting import check_memory, draw_sample, forecast_before_training, forecast_run
from configs.graphed_step import resolve_cuda_graph
from model.forecasting import peak_memory
from model.forecasting.memory_estimate import estimate_step
from model.training.run_folder import RunFolder
from scripts.preflight import forecast_rows
from scripts.reporting.run_table import report_rows
from tests.commands import run, run_forked
from tests.model.forecasting.conftest import books, composed  # noqa: F401  (fixtures)


def settings(books):  # noqa: F811
    from tests.scripts.runs import SMALL

    return [*SMALL, "data=files", f"data.path={books}", f"data.cache={books.parent / 'cache'}"]


def test_the_command_prints_a_table_and_writes_a_file(books, tmp_path):  # noqa: F811
    result = run_forked("scripts/preflight.py", *settings(books), "attention=window", f"output={tmp_path}/said.json")
    for words in ("parameters", "tokens a step", "layers 0-1: local", "FLOPs", "peak memory", "activations of local"):
        assert words in result.stdout, words
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["tokens"] == 64 * said["steps"] and said["flops"] == said["flops_per_step"] * said["steps"]
    assert len(said["layers"]) == 2
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
    forecast_run(config, data)
    assert time.process_time() - started < 2


def test_a_forecast_that_takes_long_says_so(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("configs.forecasting.flops_of_phases", lambda *_: time.sleep(0.2))
    sample = SimpleNamespace(config={"trainer": {"cuda_graph": False}})
    monkeypatch.setattr("configs.forecasting.draw_sample", lambda *_: sample)
    monkeypatch.setattr("configs.forecasting.forecast", lambda *_: "forecast")
    assert forecast_run({}, None) == "forecast" and not caplog.records
    monkeypatch.setattr("configs.forecasting.SLOW", 0.05)
    assert forecast_run({}, None) == "forecast"
    (record,) = caplog.records
    assert "preflight=off" in record.getMessage()


def test_a_heap_that_keeps_holes_is_in_the_forecast(composed, monkeypatch):  # noqa: F811
    config, data = composed("attention=window")
    held = {}
    for glibc in (True, False):
        monkeypatch.setattr(peak_memory, "give_back_free_memory", lambda glibc=glibc: glibc)
        said = forecast_run(config, data).memory
        assert (peak_memory.HEAP in said.parts) == glibc
        held[glibc] = said
    assert held[True].step_bytes - held[False].step_bytes == held[True].parts[peak_memory.HEAP]
    sample = draw_sample(config, data, sequences=1)
    layer = estimate_step(sample.model, sample.layouts, 1, 64, config, sample.document.device).layer_heap_bytes
    assert held[True].parts[peak_memory.HEAP] == int(peak_memory.HEAP_FACTOR * layer) > 0


def test_what_exceeds_the_device_warns_or_refuses(composed, monkeypatch):  # noqa: F811
    config, data = composed("attention=window", "data.batch_size=4")
    said = forecast_run(config, data)
    assert check_memory(said, "warn") is None
    small = dataclasses.replace(said, device_bytes=said.memory.peak_bytes - 1)
    line = check_memory(small, "warn")
    assert "\n" not in line and "exceeds the" in line and "data.sequence_length" in line
    with pytest.raises(ConfigError, match=r"preflight=refuse: must be .* the forecast of .* exceeds"):
        check_memory(small, "refuse")
    assert forecast_before_training(config | {"preflight": "off"}, data) == (None, None)


def test_a_run_that_fits_without_a_cuda_graph_alone_has_none_under_auto(composed, monkeypatch, caplog):  # noqa: F811
    # This machine has no GPU: the step is forecast in main memory, and only asked for as on a GPU.
    monkeypatch.setattr("configs.forecasting.resolve_cuda_graph", lambda config: config["trainer"]["cuda_graph"])
    monkeypatch.setattr("configs.graphed_step.refusal", lambda config: None)
    monkeypatch.setattr("model.precision.device_of", lambda accelerator: SimpleNamespace(type="cuda"))
    peak = {}
    for graph in ("false", "true"):
        config, data = composed("attention=window", f"trainer.cuda_graph={graph}")
        peak[graph] = forecast_run(config, data).memory.step_bytes
    assert peak["true"] > peak["false"]
    caplog.set_level("INFO")
    config, data = composed("attention=window", "trainer.cuda_graph=auto")
    for room, graph in ((peak["true"], "auto"), (peak["true"] - 1, False), (peak["false"] - 1, False)):
        monkeypatch.setattr(sys.modules["model.forecasting.forecast"], "device_bytes", lambda device, room=room: room)
        monkeypatch.setattr(peak_memory, "resident_bytes", lambda: -peak_memory.LIBRARY_BYTES)
        expected, line = forecast_before_training(config | {"preflight": "warn"}, data)
        assert expected["cuda_graph"] == bool(graph) and (line is None) == (room >= peak["false"])
        assert resolve_cuda_graph(config, expected, log_reason=True) == graph
    reason = "where a step in a graph is forecast to exceed the memory of the device"
    assert [record.message for record in caplog.records] == [f"trainer.cuda_graph=auto: false, as always {reason}"] * 2


def test_the_report_has_measured_and_forecast_in_one_row():
    row = dict(loss=1.0, bits_per_byte=1.0, perplexity=1.0, word_perplexity=None, loss_first_512=None,
               loss_last_quarter=None, trailing=None)  # fmt: skip
    summary = {"peak_memory_bytes": 1_900_000_000, "forecast": {"peak_memory_bytes": 1_800_000_000}}
    assert ("peak memory", "1.90 GB (forecast 1.80)") in report_rows(row, summary)
    assert ("peak memory", "1.90 GB") in report_rows(row, {"peak_memory_bytes": 1_900_000_000})


def test_a_backend_that_cannot_be_rehearsed_is_named_and_stops_no_run(composed):  # noqa: F811
    config, data = composed("attention.backend=reference")
    expected, line = forecast_before_training(config, data)
    assert expected is None and "attention.backend=reference" in line


def test_layers_that_are_alike_are_one_row(composed):  # noqa: F811
    patterns = ("attention.patterns.local.width=16", "attention.schedule=[local,local,full]")
    config, data = composed("attention=window_dense", *patterns, "model.layers=7")
    said = forecast_run(config, data)
    rows = dict(forecast_rows(said))
    local, full = said.layers[0], said.layers[2]
    assert (
        rows["attention, each of layers 0-1, 3-4, 6: local"]
        == f"{local.pairs:.3e} pairs ({local.density_pairs:.1%} of dense)"
    )
    assert rows["attention, each of layers 2, 5: full"].startswith(f"{full.pairs:.3e} pairs (")
    taken = said.memory.peak_bytes / said.device_bytes
    assert rows["memory of the device"].endswith(f" GB, {taken:.0%} of it used")
    assert "memory of the device" not in dict(forecast_rows(dataclasses.replace(said, device_bytes=None)))


def test_a_device_that_shares_sequences_is_forecast_with_its_part(composed):  # noqa: F811
    activations = {}
    for ranks in (1, 2):
        trainer = ("trainer.devices=2", f"trainer.context_parallel={ranks}")
        config, data = composed("attention=window", "attention.patterns.local.width=16", *trainer)
        expected, line = forecast_before_training(config, data)
        assert expected is not None and line is None
        activations[ranks] = expected["memory_parts"]["activations of local"]
    assert activations[1] / 2 < activations[2] < activations[1], "half of the tokens, and the keys of a window more"


def test_phases_have_a_row_each_and_the_last_one_is_the_forecast(composed):  # noqa: F811
    growing = "phases=[{step: 0, data.sequence_length: 16}, {step: 30, data.sequence_length: 64}]"
    window = "attention.patterns.local.width=8", "trainer.max_steps=40"
    plain, phased = (forecast_run(*composed("attention=window", *window, *each)) for each in ([], [growing]))
    assert phased.memory.parts == plain.memory.parts and phased.tokens_per_step == plain.tokens_per_step
    (first, short), (second, whole) = phased.phases
    assert (first, second) == (0, 30) and short < whole == plain.flops_per_step
    assert phased.flops == pytest.approx(30 * short + 10 * whole, rel=1e-12)
    rows = dict(forecast_rows(phased))
    assert rows["training FLOPs a step, from step 30"] == f"{whole:.3e}"
