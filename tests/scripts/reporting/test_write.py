"""The files of a report: the same numbers in each, nothing from a file taken as markup, and the same bytes again."""

import csv
import io
import json
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from scripts.report import main
from scripts.reporting.content import gather
from scripts.reporting.markdown import write_markdown
from scripts.reporting.markdown_table import escape
from scripts.reporting.page import write_page
from scripts.reporting.table import CSV_COLUMNS, MINUS, significant, write_csv
from scripts.reporting.write import write_report
from tests.commands import run_forked
from tests.scripts.reporting.sweeps import make_sweep

FILES = {"pareto.csv", "report.md", "report.html", "pareto.png", "pareto.svg", "loss_curves.png", "loss_curves.svg",
         "loss_by_position.png", "loss_by_position.svg", "summary.png", "summary.svg", "summary.pdf"}  # fmt: skip
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'| `x` $y$ --> "


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Every state there is, and three seeds."""
    states = {("fixed", 1): "failed", ("fixed", 2): "interrupted", ("routed", 1): "out of memory",
              ("routed", 2): "running", ("routed", 3): "waiting"}  # fmt: skip
    labels = ("dense", "window", "fixed", "routed")
    return make_sweep(tmp_path_factory.mktemp("outputs") / "patterns", labels, (1, 2, 3), states)


@pytest.fixture(scope="module")
def content(sweep):
    return gather([sweep])


@pytest.fixture(scope="module")
def page(content):
    return write_page(content, {})


class Elements(HTMLParser):
    """Every element's name, and all text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.names, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data):
        if self.names and self.names[-1] not in ("script", "style"):
            self.text += data


def test_the_csv_has_a_row_a_pattern_in_full_precision(content):
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO(write_csv(content.rows)))}
    assert list(rows) == ["dense", "window", "fixed", "routed"] and tuple(rows["dense"]) == CSV_COLUMNS
    window = next(row for row in content.rows if row.label == "window")
    assert float(rows["window"]["bits_per_byte"]) == window.values["bits_per_byte"].mean
    assert float(rows["window"]["difference_low"]) == window.difference.low
    assert rows["window"]["seeds"] == "1 2 3" and rows["window"]["commands"].count("\n") == 2
    assert rows["fixed"]["seeds"] == "3" and rows["fixed"]["bits_per_byte_low"] == ""
    assert [rows["fixed"][f"jobs_{state}"] for state in ("failed", "interrupted", "done")] == ["1", "1", "1"]
    assert rows["routed"]["bits_per_byte"] == "" and rows["routed"]["jobs_out_of_memory"] == "1"


def test_the_markdown_table_has_the_numbers_of_the_csv(content):
    lines = [line.strip("|").split(" | ") for line in write_markdown(content).splitlines() if line.startswith("|")]
    header = next(line for line in lines if "bits/byte" in line)
    table = {
        line[0].strip(): {title.strip(): cell.strip() for title, cell in zip(header, line, strict=True)}
        for line in lines
        if len(line) == len(header)
    }
    scales = {
        "bits/byte": ("bits_per_byte", 1),
        "vs dense": ("difference_from_baseline", 1),
        "step time (ms)": ("step_seconds", 1e3),
        "time/dense": ("step_seconds_over_baseline", 1),
        "attention per token (MFLOP)": ("attention_flops_per_token", 1e-6),
        "memory (GB)": ("peak_memory_bytes", 1e-9),
        "tokens/s": ("tokens_per_second", 1),
    }
    compared = 0
    for row in csv.DictReader(io.StringIO(write_csv(content.rows))):
        for title, (name, scale) in scales.items():
            shown = table[row["label"]][title].split(" ± ")
            if not row[name]:
                assert shown[0] in ("", "baseline", "1.00"), title
                continue
            mean = float(shown[0].replace(",", "").replace(MINUS, "-"))
            places = len(shown[0].partition(".")[2])
            digits = {"abs": 0.5001 * 10**-places, "rel": 0 if places else 0.005}  # shown to three, or to its places
            assert mean == pytest.approx(float(row[name]) * scale, **digits)
            if len(shown) > 1:
                ends = ("difference_low", "difference_high") if title == "vs dense" else (f"{name}_low", f"{name}_high")
                low, high = (float(row[end]) for end in ends)
                assert float(shown[1]) == pytest.approx((high - low) / 2, abs=0.5001e-4)
            compared += 1
    assert compared > 15


def test_every_state_is_in_both_pages(content, page):
    parts = (
        *("7 of 12 jobs done", "1 failed", "1 interrupted", "1 out of memory", "1 running", "1 waiting"),
        *(
            "Failed and interrupted jobs",
            "loss became NaN at step 213",
            "RunOutOfMemoryError: out of memory: 71.2 GiB forecast",
        ),
        *("Unfinished jobs", "step 210 of 420", "2.13.0+cpu", "the same tokens (1.72 million tokens)"),
        "python train.py attention=window seed=2 trainer.max_steps=420",
    )
    for text in (write_markdown(content), Elements(page).text):
        for part in parts:
            assert part in text, part


def test_the_page_is_one_file_that_asks_for_nothing(page):
    elements = Elements(page)
    assert elements.names.count("script") == 1 and "src" not in elements.attributes
    outside = page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("http://www.w3.org/1999/xlink", "")
    assert "http:" not in outside and "https:" not in outside and "default-src 'none'" in page


def test_nothing_from_a_file_becomes_markup(tmp_path):
    hostile = {
        "command": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "device": HOSTILE,
        "match": HOSTILE,
        "sweep": HOSTILE,
    }
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1], {("window", 1): "out of memory"})
    manifest = json.loads((folder / "manifest.json").read_text()) | hostile
    for job in manifest["jobs"]:
        job |= dict.fromkeys(("label", "command", "exit_reason", "traceback"), HOSTILE + job["label"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for file in folder.glob("*/summary.json"):
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    found = gather([folder])
    page = write_page(found, {row.label: b"png" for row in found.rows})
    elements = Elements(page)
    assert elements.names.count("script") == 1 and elements.names.count("img") == 2
    assert not [name for name in elements.attributes if name.startswith("on")]
    assert elements.text.count("<script>alert(1)</script>") > 10, "it is shown as what it is"
    text = write_markdown(found)
    code = [line for line in text.splitlines() if line.startswith("    ")]
    assert code and not [line for line in text.splitlines() if "<script" in line and line not in code]


def test_markdown_is_literal():
    assert escape("a|b\n*c* `d` <e> & [f](g) block_sparse _h_") == (
        r"a\|b \*c\* \`d\` &lt;e> &amp; \[f\](g) block_sparse \_h\_"
    )


def test_the_same_inputs_give_the_same_bytes_also_in_another_process(tmp_path):
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1, 2])
    page = write_report([folder], tmp_path / "one")
    assert page == tmp_path / "one" / "report.html"
    result = run_forked("scripts/report.py", str(folder), "--output", str(tmp_path / "other"))
    assert result.stdout.startswith(f"written: {tmp_path / 'other' / 'report.html'}")
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir() if file.is_file()}
    assert set(files) == FILES, "and nothing half-written is left"
    for name, content in files.items():
        assert content == (tmp_path / "other" / name).read_bytes(), name


def test_a_report_of_nothing_finished_is_written(tmp_path):
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1], {("dense", 1): "running", ("window", 1): "waiting"})
    shutil.rmtree(folder / json.loads((folder / "manifest.json").read_text())["jobs"][0]["folder"])
    page = write_report([folder])
    assert page == folder / "report" / "report.html"
    assert "No job has been evaluated yet" in page.read_text()
    assert len(list(csv.reader((page.parent / "pareto.csv").read_text().splitlines()))) == 3


def test_an_empty_sweep_is_a_report_too(tmp_path):
    page = write_report([make_sweep(tmp_path / "s", [], [])])
    assert "0 of 0 jobs done" in page.read_text()


def test_a_pattern_that_no_run_drew_is_drawn_from_its_config(tmp_path):
    folder = make_sweep(tmp_path / "s", ["window"], [1], {("window", 1): "failed"})
    page = write_report([folder])
    (picture,) = (page.parent / "patterns").iterdir()
    assert picture.read_bytes()[:4] == b"\x89PNG" and "data:image/png;base64" in page.read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.5, "1.50"),
        (0.9996, "1.00"),
        (123.4, "123"),
        (12345, "12,300"),
        (-2.0, "-2.00"),
    ],
)
def test_numbers_are_told_to_three_digits(value, text):
    assert significant(value) == text


def test_runs_are_joined_without_a_manifest(tmp_path):
    sweep = make_sweep(tmp_path / "s", ["dense", "window"], [1])
    text = write_markdown(gather([file.parent for file in sweep.glob("*/config.yaml")]))
    assert text.startswith("# Runs\n") and "window takes 0." in text and "--config-name config" in text


def test_a_wrong_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    monkeypatch.setattr("scripts.console.start_logging", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and "must be a sweep, a run" in said
    assert not list(tmp_path.iterdir())


def test_the_command_of_a_run_without_a_manifest_composes_the_runs_own_config(tmp_path):
    make_sweep(tmp_path / "s", ["strided"], [7])
    (file,) = (tmp_path / "s").glob("*/config.yaml")
    (job,) = gather([file.parent]).jobs
    composed = run_forked(*job.command.split()[1:], "--cfg", "job").stdout
    assert yaml.safe_load(composed) == yaml.safe_load(file.read_text())
