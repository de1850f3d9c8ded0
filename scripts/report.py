"""Writes the report of sweeps and runs: quality against cost as a page, a Markdown file, a table and figures.

    python scripts/report.py outputs/patterns                              a sweep, also while it runs
    python scripts/report.py outputs/patterns outputs/window_width         several, in one report
    python scripts/report.py outputs/window/2026-01-31_12-00-00_000000 outputs/dense --output comparison
    python scripts/report.py outputs/patterns --wandb                      also as wandb artifacts

It writes report.html (one file for offline use), report.md, pareto.csv, and every figure as PNG and SVG into
SWEEP_DIR/report, or into --output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse


def main() -> None:
    from scripts.console import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="SWEEP_DIR", help="a sweep, a run, or a folder of runs"
    )
    parser.add_argument("--output", type=Path, help="folder to write to (default: SWEEP_DIR/report)")
    parser.add_argument(
        "--wandb",
        action=argparse.BooleanOptionalAction,
        help="log the report to wandb (default: if the jobs use the wandb logger)",
    )
    parser.add_argument("--trust", action="append", help="a third-party pattern of a run, whose code may run")
    arguments = parser.parse_args()
    with user_errors():
        from configs.trust import trust
        from scripts.reporting.write import write_report

        trust(arguments.trust)
        page = write_report(arguments.folders, arguments.output, arguments.wandb)
        print(f"written: {page} ({page.with_name('report.md').name}, {page.with_name('pareto.csv').name} beside it)")


if __name__ == "__main__":
    from scripts.standard_output import output_may_close

    with output_may_close():
        main()
