"""Long context in a report: loss by context, recall, and the price of decoding, beside the quality of every pattern."""

import dataclasses
import itertools
import json

import pytest
from matplotlib.figure import Figure

from scripts.reporting.aggregate import make_rows
from scripts.reporting.content import gather
from scripts.reporting.contexts import by_context_of, longest_useful
from scripts.reporting.figures import cost_panels, to_files
from scripts.reporting.jobs import Job, Sweep
from scripts.reporting.markdown import write_markdown
from scripts.reporting.style import make_styles
from scripts.reporting.table import Cell, make_columns
from tests.scripts.reporting.sweeps import make_sweep
from tests.scripts.reporting.test_aggregate import job, rows_of


def judged(seed: int, *losses: float, **others) -> Job:
    contexts = [
        {"context": 512 << n, "documents": 3, "loss": loss, "low": loss - 0.1, "high": loss + 0.1}
        for n, loss in enumerate(losses)
    ]
    for before, entry in itertools.pairwise(contexts):
        change = entry["loss"] - before["loss"]
        entry |= {"change": change, "change_low": change - 0.05, "change_high": change + 0.05}
        gain = contexts[0]["loss"] - entry["loss"]
        entry |= {"gain": gain, "gain_low": gain - 0.05, "gain_high": gain + 0.05}
    row = {"bits_per_byte": 1.0, "by_context": [*contexts, {"context": "whole", "loss": 0.0}]}
    return job("dense", seed, 1.0, evaluation=row, config={"data": {"sequence_length": 2048}}, **others)


def test_the_loss_by_context_is_a_mean_over_seeds_of_the_contexts_that_all_have():
    (row,) = rows_of(judged(1, 3.0, 2.0, 1.0), judged(2, 4.0, 2.5)).values()
    short, longer = by_context_of(row)
    assert (short["context"], short["loss"], longer["context"], longer["loss"]) == (512, 3.5, 1024, 2.25)
    assert "change" not in short
    assert longer["change_high"] == pytest.approx(-1.25 + 0.05)


def test_a_context_is_useful_if_its_change_is_beyond_the_interval():
    assert longest_useful(by_context_of(rows_of(judged(1, 3.0, 2.9, 2.88))["dense"])) == 1024
    assert longest_useful(by_context_of(rows_of(judged(1, 3.0, 2.98, 2.96))["dense"])) == 512
    assert longest_useful(by_context_of(rows_of(judged(1, 3.0))["dense"])) is None


def test_recall_and_the_price_of_decoding_stand_in_the_table():
    recall = {"passkey": {1024: (40, 40), 2048: (20, 40), 4096: (0, 40)}, "copy": {1024: (10, 40)}}
    costs = {"summary": {"cache_bytes": 2_000_000, "decode_ms_per_token": 1.25}}
    columns = {each.title: each for each in make_columns([*rows_of(judged(1, 3.0, recall=recall, **costs)).values()])}
    assert columns["passkey"].cells[0].text == "50% (35% to 65%)", "at the length of the training, 2,048 tokens"
    assert "copy" not in columns, "not asked at that length"
    assert columns["cache (MB)"].cells[0].text == "2.00" and columns["ms/token"].cells[0].text == "1.25"


def test_recall_of_one_seed_has_wilsons_bounds_and_of_several_students():
    def cell(*exact: int) -> Cell:
        jobs = [judged(seed, 3.0, recall={"copy": {2048: (each, 40)}}) for seed, each in enumerate(exact)]
        (column,) = (each for each in make_columns([*rows_of(*jobs).values()]) if each.title == "copy")
        return column.cells[0]

    assert cell(40) == Cell("100% (91% to 100%)", 1.0)  # Wilson: 1 / (1 + 1.96² / 40)
    assert cell(10, 12).text == "28% ± 32%"  # 12.706 · 0.05 / √2 / √2
    assert cell(10, 10, 10).text == "25% ± 0%"


def test_a_page_holds_quality_context_recall_and_price(tmp_path):
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1])
    manifest = json.loads((folder / "manifest.json").read_text())
    contexts = judged(1, 3.0, 2.0).evaluation["by_context"]
    for entry in manifest["jobs"]:
        run = folder / entry["folder"]
        for name, change in (("evaluation.json", {"by_context": contexts}), ("summary.json", {"cache_bytes": 1000})):
            content = json.loads((run / name).read_text())
            (content["rows"][0] if name == "evaluation.json" else content).update(change)
            (run / name).write_text(json.dumps(content))
        answers = [{"task": "passkey", "length": 4096, "exact_match": share, "answers": 40} for share in (0.8, 1.0)]
        (run / "recall.json").write_text(json.dumps({"rows": answers}))  # at two depths
    content = gather([folder])
    text = write_markdown(content)
    recall, context = "| 90% (81% to 95%) |", "2.0000 [1.9000, 2.1000]"
    for part in (recall, "| cache (kB) |", "## Loss by context", context, "summary.pdf"):
        assert part in text, part
    assert [title for title, _ in content.figures["summary"]] == ["step time", "loss of the same tokens"]
    figure = Figure().add_subplot()
    dict(content.figures["loss_by_context"])["what context saves"](figure)
    assert figure.lines[0].get_ydata().tolist() == pytest.approx([0.0, 1.0])
    (band, *_) = figure.collections
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(1.05)


def test_the_summary_is_a_vector_file_for_print_and_shows_the_control():
    jobs = [job(label, 1, bits, seconds) for label, bits, seconds in (("dense", 1.0, 3.0), ("window", 1.1, 1.0))]
    jobs.append(dataclasses.replace(job("control 512", 1, 0.9, 0.5), role="control"))
    rows = make_rows([Sweep("s", jobs[0].folder.parent, tuple(jobs))])
    styles = make_styles(rows)
    files = to_files([cost_panels(rows, styles)["step_seconds"]], "summary", rows, styles, pdf=True)
    assert files["summary.pdf"][:5] == b"%PDF-" and b"control 512" in files["summary.svg"]
    assert files == to_files([cost_panels(rows, styles)["step_seconds"]], "summary", rows, styles, pdf=True)
