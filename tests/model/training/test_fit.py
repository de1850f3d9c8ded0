import io
import logging

from rich.console import Console
from stand_ins import train

from model.training.metrics import read_rows
from model.training.progress import Progress


def test_validation_keeps_its_beat_and_always_ends_a_run(tmp_path):
    train(tmp_path, max_steps=10, validate_every=4, log_every=5, accumulate=2)
    rows = read_rows(tmp_path / "metrics.csv")[1]
    assert [row["step"] for row in rows if row["validation/loss"]] == ["4", "8", "10"]
    assert [row["step"] for row in rows if row["train/loss"]] == ["5", "10"]


def test_last_step_is_logged_and_saved_without_validation(tmp_path):
    result = train(tmp_path, max_steps=7, validate_every=None, log_every=5)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")[1]] == ["5", "7"]
    assert result.best is None and result.last.name == "last.ckpt"
    assert "loss" not in result.summary


def test_lines_where_there_is_no_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tmp_path, max_steps=6, validate_every=3, log_every=2)
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6", "3/6", "4/6", "6/6", "6/6"]
    assert all("loss" in line and "bits/byte" in line and "ETA" in line for line in lines)
    assert "tokens/s" in lines[2]


def test_bar_in_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("model.training.fit.Progress", lambda *inputs: Progress(*inputs, console))
    train(tmp_path, max_steps=6, validate_every=3)
    assert "6/6" in screen.getvalue() and "bits/byte" in screen.getvalue() and "ETA" in screen.getvalue()
