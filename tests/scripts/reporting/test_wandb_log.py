"""wandb gets the table, the figures and an artifact, without a network; and only where it was asked for."""

import json
import time

import pytest
import yaml

from scripts.reporting.content import gather
from scripts.reporting.wandb_log import log_to_wandb
from scripts.reporting.write import write_report
from tests.scripts.reporting.sweeps import make_sweep


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No network and no home of wandb's: whatever it needs, it has here."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


def choose_wandb(folder, mode):
    for file in folder.glob("*/config.yaml"):
        config = yaml.safe_load(file.read_text())
        config["logger"] = {"name": "wandb", "mode": mode, "project": "reports", "group": None, "tags": []}
        file.write_text(yaml.safe_dump(config))


def test_an_offline_run_holds_table_figures_and_files(alone, tmp_path):
    folder = make_sweep(tmp_path / "patterns", ["dense", "window"], [1], pictures=True)
    choose_wandb(folder, "offline")
    report = write_report([folder]).parent
    (run,) = (report / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    parts = (b"patterns/report", b"reports", b"pareto_table", b"report.html", b"pareto.svg", b"loss_by_position.png")
    give_up = time.monotonic() + 20
    while (missing := [part for part in parts if part not in log.read_bytes()]) and time.monotonic() < give_up:
        time.sleep(0.1)  # wandb's own process writes the file
    assert not missing
    media = {file.suffix for file in (run / "files" / "media").rglob("*") if file.is_file()}
    assert media == {".json", ".png"}
    (table,) = (run / "files" / "media").rglob("*.json")
    found = json.loads(table.read_text())
    assert "bits_per_byte" in found["columns"] and [row[1] for row in found["data"]] == ["dense", "window"]


def test_it_is_used_where_the_jobs_chose_it_and_all_have_ended(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("scripts.reporting.wandb_log.log_to_wandb", lambda content, folder: logged.append(folder))
    monkeypatch.setattr("scripts.reporting.write.to_files", lambda *_: {})
    monkeypatch.setattr("scripts.reporting.write.write_page", lambda *_: "")
    plain = make_sweep(tmp_path / "csv", ["window"], [1], pictures=True)
    half_way = make_sweep(tmp_path / "half", ["window"], [1, 2], {("window", 2): "running"}, pictures=True)
    done = make_sweep(tmp_path / "done", ["window"], [1], pictures=True)
    for folder in (half_way, done):
        choose_wandb(folder, "offline")
    for folder in (plain, half_way, done):
        write_report([folder])
    assert logged == [done / "report"]
    write_report([done], wandb=False)
    write_report([half_way], wandb=True)
    assert logged == [done / "report", half_way / "report"]


def test_a_disabled_wandb_leaves_nothing(alone, tmp_path):
    folder = make_sweep(tmp_path / "s", ["window"], [1], pictures=True)
    output = tmp_path / "report"
    output.mkdir()
    (output / "pareto.csv").write_text("label\nwindow\n")
    assert log_to_wandb(gather([folder]), output, mode="disabled") is None
    assert [file.name for file in output.iterdir()] == ["pareto.csv"]
