from model.training.metrics import MetricsCSV, read_rows


def test_new_columns_lose_no_rows(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 3.5}, step=1)
    log.log_metrics({"train/loss": 3.25, "speed": 10.0}, step=2)
    log.log_metrics({"validation/loss": 3.0}, step=2)
    log.log_metrics({"train/loss": 2.0}, step=3)
    columns, rows = read_rows(log.path)
    assert columns == ["step", "train/loss", "speed", "validation/loss"]
    assert [(row["step"], row["train/loss"], row["validation/loss"]) for row in rows] == [
        ("1", "3.5", ""),
        ("2", "3.25", ""),
        ("2", "", "3.0"),
        ("3", "2.0", ""),
    ]
    assert log.rows == 4


def test_numbers_come_back_exactly(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 0.1 + 0.2}, step=1)
    assert float(read_rows(log.path)[1][0]["loss"]) == 0.1 + 0.2


def test_going_on_in_the_same_file(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 6):
        log.log_metrics({"loss": float(step)}, step=step)
    again = MetricsCSV(tmp_path / "metrics.csv")
    again.keep(3)
    again.log_metrics({"loss": 40.0}, step=4)
    assert [row["loss"] for row in read_rows(log.path)[1]] == ["1.0", "2.0", "3.0", "40.0"]


def test_a_torn_last_line_is_after_the_checkpoint_and_goes(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 4):
        log.log_metrics({"loss": float(step), "speed": 1.0}, step=step)
    log.path.write_text(log.path.read_text()[:-5])
    again = MetricsCSV(tmp_path / "metrics.csv")
    again.keep(2)
    assert [row["step"] for row in read_rows(log.path)[1]] == ["1", "2"]
    assert log.path.read_text().endswith("\n")
