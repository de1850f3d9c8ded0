"""README.md and docs/: commands compose, code runs, links lead to files, numbers are those of the result files."""

import re
import shlex
import subprocess
import sys

import pytest

from docs import prediction
from docs.result_files import read
from kernels.patterns import Dense, Window
from model import Transformer
from model.parallel.context import StandInGroup
from tests.commands import ROOT, compose
from tests.model.small import config, plan

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "results" not in page.parts]
COMMANDS = [
    line.split("  #")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for line in block.splitlines()
    if line.startswith("python ")
]
PYTHON = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
CONFIGS = {
    "train.py": "train",
    "scripts/evaluate.py": "evaluate",
    "scripts/export.py": "export",
    "scripts/generate.py": "generate",
    "scripts/preflight.py": "preflight",
    "scripts/probe.py": "probe",
    "scripts/show_pattern.py": "show_pattern",
}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.split()[1] in CONFIGS])
def test_a_command_composes(command):
    _, script, *overrides = shlex.split(command)
    overrides = [re.sub(r"=([\w,]+),\w+$", lambda m: "=" + m.group(1).split(",")[0], o) for o in overrides if o != "-m"]
    assert compose(*overrides, config_name=CONFIGS[script])


def test_there_is_a_command_for_each_use():
    for words in ("train.py -m", "resume=", "init_from=", "scripts/evaluate.py checkpoint="):
        assert any(words in line for line in COMMANDS), words


@pytest.mark.parametrize("code", PYTHON)
def test_the_code_runs(code):
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == names["q"].shape


def test_make_has_the_targets():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)`", page.read_text())) <= set(targets), page
    assert set(re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M)) <= set(targets)


@pytest.mark.parametrize(("name", "pattern"), [("window", Window(1024)), ("dense", Dense())])
def test_the_bytes_of_a_prediction_are_those_of_the_model(name, pattern):
    small, length, ranks = compose("model=small")["model"], 16384, 4
    sizes = {key: small[key] for key in ("kv_heads", "head_dim")} | dict(heads=2, max_length=length)
    model = Transformer(config(**sizes), plan(pattern, block=128))
    context = model.share_sequences(StandInGroup(ranks, ranks // 2), length)
    sent = model.bytes_sent(model.build_layouts(None, length, context), 1, 2)
    assert sent[0] == prediction.exchanged(name, length, ranks)
    assert small["layers"] == prediction.LAYERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page):
    for path in re.findall(r"\]\(((?!https?:)[^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_tables_and_numbers_are_those_of_the_result_files():
    """`make docs` would change nothing."""
    pages = [str(page) for page in PAGES if "[[[cog" in page.read_text()]
    assert len(pages) >= 5
    command = [sys.executable, "-m", "cogapp", "-P", "--check", "-p", "from docs.tables import *", *pages]
    check = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize("name", ["memory_cpu", "memory_h200"])
def test_the_committed_forecasts_are_within_a_tenth_of_what_was_measured(name):
    rows = read(f"{name}.json")["rows"]
    assert len(rows) >= 12
    for row in rows:
        assert abs(row["forecast_mb"] / row["measured_mb"] - 1) <= 0.1, row
        if "before_mb" in row:  # as docs/preflight.md says of the step alone
            step, measured = (row[key] - row["before_mb"] for key in ("forecast_mb", "measured_mb"))
            assert abs(step / measured - 1) <= 0.16, row
