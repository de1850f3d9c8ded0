"""A report has the units of its runs' result files, and those of early versions."""

import json

import pytest
import yaml
from matplotlib.figure import Figure

from scripts.reporting.content import gather, standing
from scripts.reporting.markdown import write_markdown
from tests.scripts.reporting.sweeps import make_sweep

GENOME = {"loss": "nats per token", "bits_per_byte": "bits per base"}
SERIES = {"loss": "nats per value"}
BINS = {"tokenizer": {"tokenizer": "bins"}}


def change(folder, row, without_bits=False):
    """Adds entries to the rows of evaluation.json of a sweep's runs, and its units to their summaries."""
    for file in folder.glob("*/evaluation.json"):
        rows = json.loads(file.read_text())["rows"]
        row = row | ({"bits_per_byte": None} if without_bits else {})
        file.write_text(json.dumps({"rows": [each | row for each in rows]}))
    for file in folder.glob("*/summary.json"):
        summary = json.loads(file.read_text())
        if without_bits and "bits_per_byte" in summary:
            summary["bits_per_byte"] = None
        file.write_text(json.dumps(summary | {key: row[key] for key in ("units",) if key in row}))
    if without_bits:
        for file in folder.glob("*/metrics.csv"):
            file.write_text(file.read_text().replace("/bits_per_byte", "/other"))
    return folder


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path / "patterns", ["dense", "window"], [1, 2], {("window", 2): "running"})


def labels_of(content) -> list[str]:
    """The labels of the vertical axes of all figures."""
    found = []
    for panels in content.figures.values():
        for _, draw in panels:
            axes = Figure().subplots()
            draw(axes)
            found.append(axes.get_ylabel())
    return found


@pytest.mark.parametrize("early", [False, True], ids=["this version", "an early version"])
def test_genome(sweep, early):
    if early:  # its files do not name the units
        for file in sweep.glob("*/config.yaml"):
            config = yaml.safe_load(file.read_text())
            config["data"]["source"] = {"_target_": "data.sources.Genome"}
            file.write_text(yaml.safe_dump(config))
    content = gather([sweep if early else change(sweep, {"units": GENOME})])
    text = write_markdown(content)
    assert "bits per base" in text and "bits/base" in text and "byte" not in text and "455,672 bases" in text
    assert "training bits per base" in standing(content.pending[0])
    assert {"held-out bits per base", "bits per base, smoothed", "loss (nats/token)"} <= set(labels_of(content))


@pytest.mark.parametrize("early", [False, True], ids=["this version", "an early version"])
def test_series(sweep, early):
    content = gather([change(sweep, BINS) if early else change(sweep, BINS | {"units": SERIES}, without_bits=True)])
    assert [row.quality for row in content.rows] == ["loss"] * 2 and not content.ended
    text = write_markdown(content)
    assert "nats per value" in text and "nats/value" in text and "122,119 values" in text
    told = [*content.comparisons, *content.cautions, *labels_of(content), *(column.hint for column in content.columns)]
    assert not [line for line in told if "bits" in line or "/token" in line or "per token" in line or "no text" in line]
    assert early or "training nats per value" in standing(content.pending[0])
    assert {"held-out nats per value", "nats per value, smoothed", "loss (nats/value)"} <= set(labels_of(content))


def test_series_of_both_versions_have_one_unit(sweep, tmp_path):
    other = change(
        make_sweep(tmp_path / "later", ["dense", "window"], [1]), BINS | {"units": SERIES}, without_bits=True
    )
    content = gather([change(sweep, BINS), other])
    assert [row.unit for row in content.rows] == ["nats per value"] * 4
    assert not any("bits" in column.title for column in content.columns)


def test_losses_per_value_of_other_bins_are_a_caution(sweep):
    change(sweep, BINS | {"units": SERIES}, without_bits=True)
    assert not any("tokenizers" in line for line in gather([sweep]).cautions)
    file = next(sweep.glob("*/evaluation.json"))
    file.write_text(file.read_text().replace('"bins"', '"bins", "bins": 32'))
    cautions = gather([sweep]).cautions
    assert "The jobs have different tokenizers: do not compare their nats per value." in cautions
    assert not any("different held-out text" in line for line in cautions)


@pytest.mark.parametrize("quality", ["bits_per_byte", "loss"])
def test_a_run_is_compared_with_a_bigram_model_in_its_unit(sweep, quality):
    units = GENOME if quality == "bits_per_byte" else SERIES
    change(sweep, {"units": units, "baselines": {f"bigram_{quality}": 0.5}}, without_bits=quality == "loss")
    told = f"No pattern is better than a bigram model of the same tokens (0.5000 {units[quality]})"
    assert any(line.startswith(told) for line in gather([sweep]).cautions)


def test_series_are_compared_document_by_document(sweep):
    """Half a nat less on 30 values, and one nat less on 10."""
    change(sweep, BINS | {"units": SERIES, "documents_digest": "d"}, without_bits=True)
    for file in sweep.glob("*/evaluation.json"):
        (row,) = json.loads(file.read_text())["rows"]
        dense = "name: dense" in (file.parent / "config.yaml").read_text()
        nats = [60.0, 20.0] if dense else [45.0, 10.0]
        row["by_document"] = {"nats": nats, "bytes": [90, 30], "tokens": [30, 10]}
        file.write_text(json.dumps({"rows": [row]}))
    paired = gather([sweep]).rows[1].difference_paired
    assert (paired.mean, paired.documents, paired.better) == (pytest.approx(-25 / 40), 2, 2)
