"""Commands use this repository's packages, even beside installed ones of the same names."""

from pathlib import Path

import pytest

from tests.commands import run, run_forked

NAMES = ("configs", "data", "evaluate", "kernels", "model", "report", "scripts", "train")
"""Of packages that a machine may have: some are on PyPI, some are files of scripts/."""

COMMANDS = {
    "train.py": (["attention.block=7"], "attention.block=7"),
    "scripts/benchmark.py": (["training", "--lengths", "-1"], "--lengths -1: must be"),
    "scripts/evaluate.py": (["checkpoint=missing"], "missing"),
    "scripts/export.py": (["checkpoint=missing", "output=exported"], "missing"),
    "scripts/generate.py": (["checkpoint=missing"], "missing"),
    "scripts/lm_harness.py": (["--model", "farsight", "--model_args", "checkpoint=missing"], "lm-eval"),
    "scripts/preflight.py": (["attention.block=7"], "attention.block=7"),
    "scripts/probe.py": (["checkpoint=missing"], "missing"),
    "scripts/report.py": (["missing"], "missing"),
    "scripts/save_selection.py": (["missing"], "missing"),
    "scripts/show_pattern.py": (["attention.block=7"], "attention.block=7"),
}
"""Arguments that each command refuses with a line of its own, which it can only write with its own imports."""


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A folder of packages that raise an error when they are imported."""
    for name in NAMES:
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise RuntimeError('an installed package called {name} was imported')")
    return tmp_path / "site"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ignores_installed_packages_of_our_names(command, decoys):
    arguments, words = COMMANDS[command]
    # scripts/evaluate.py runs in a new interpreter: there the libraries, too, are imported with the decoys on the path.
    start = run if command == "scripts/evaluate.py" else run_forked
    result = start(command, *arguments, check=False, PYTHONPATH=str(decoys))
    output = result.stdout + result.stderr
    assert "was imported" not in output, output
    assert words in output, output
