"""The predicted cost of the runs that quality.md lists as not measured, from the speed of those that were.

Seconds per token are a line in the attention FLOPs per token, through full attention at 4,096 and at 32,768 tokens:
those jobs had an H200 for themselves. Routed attention, which has work besides its FLOPs, takes as many times
the seconds of the line as it did at 32,768 tokens, where it shared the GPU: an upper bound.
"""

import statistics
from typing import Any

from docs.result_files import read
from scripts.benchmarks.results import markdown

ALONE, SHARED, CODE = "novels_extend_more", "novels_extend", "code_extend"
"""Sweeps in docs/results: of novels at 32,768 tokens, and of code at 65,536."""

ON_CODE = ("dense", "control 4096", "window_dense", "routed")
"""The jobs of a seed in the sweep of code."""


def not_measured() -> str:
    """Returns the table of the runs: their tokens and minutes."""
    runs = {
        "code": (3, CODE, [("first stage 4096", 60), *((pattern, 24) for pattern in ON_CODE)]),
        "recall": (1, CODE, [("window_dense", 100 + 33 + 33 + 33 + 33), ("routed", 100 + 66 + 66 + 33)]),
    }
    rows = []
    for name, (seeds, sweep, jobs) in runs.items():
        seconds = sum(1e6 * tokens * _seconds(sweep, label) + _evaluation(sweep) for label, tokens in jobs)
        tokens = sum(tokens for _, tokens in jobs)
        rows.append({"run": name, "seeds": seeds, "tokens (millions)": seeds * tokens} | _minutes(seeds * seconds))
    seconds = 1e6 * 60 * _seconds(CODE, "first stage 4096") + 5 * 60 + 6 * _evaluation(CODE)
    rows.append({"run": "equal time, each length", "seeds": 1, "tokens (millions)": "by time"} | _minutes(seconds))
    dense = _summary(ALONE, "dense")
    flops = 2 * 3 * (2.5e15 + 5e15 + 1e16 + 2e16)
    seconds = flops / (dense["flops_per_token"] * dense["tokens_per_second"]) + 24 * _evaluation(ALONE)
    rows.append({"run": "scaling", "seeds": 1, "tokens (millions)": "by FLOPs"} | _minutes(seconds))
    return markdown(rows)


def _minutes(seconds: float) -> dict[str, str]:
    return {"minutes on one H200": f"{seconds / 60:.0f}"}


def _seconds(sweep: str, label: str) -> float:
    """Returns the seconds of training per token of a pattern at the length of `sweep`."""
    flops = _summary(sweep, label)["attention_flops_per_token"]
    return _line(flops) * _beyond_flops(label)


def _line(flops: float) -> float:
    """Returns the seconds per token of a pattern whose attention takes so many FLOPs per token."""
    short, long = (_summary(ALONE, label) for label in ("control 4096", "dense"))
    slope = (1 / long["tokens_per_second"] - 1 / short["tokens_per_second"]) / (
        long["attention_flops_per_token"] - short["attention_flops_per_token"]
    )
    return 1 / short["tokens_per_second"] + slope * (flops - short["attention_flops_per_token"])


def _beyond_flops(label: str) -> float:
    """Returns how many times the seconds of the line a pattern took at 32,768 tokens."""
    if label != "routed":
        return 1.0
    summary = _summary(SHARED, label)
    return 1 / summary["tokens_per_second"] / _line(summary["attention_flops_per_token"])


def _evaluation(sweep: str) -> float:
    """Returns the seconds of a job besides its training: those of the jobs that ran alone, for as many tokens as jobs
    of `sweep` scored."""
    besides = [job["seconds"] - _summary(ALONE, job["label"])["train_seconds"] for job in _jobs(ALONE)]
    scored = [read(f"{each}/{_jobs(each)[0]['folder']}/evaluation.json")["rows"][0] for each in (sweep, ALONE)]
    return statistics.fmean(besides) * scored[0]["tokens_scored"] / scored[1]["tokens_scored"]


def _jobs(sweep: str) -> list[dict[str, Any]]:
    return read(f"{sweep}/manifest.json")["jobs"]


def _is_done(job: dict[str, Any], label: str) -> bool:
    return job["label"] == label and job["state"] == "done"


def _summary(sweep: str, label: str) -> dict[str, Any]:
    """Returns the summary of the fastest seed of a pattern."""
    found = [read(f"{sweep}/{job['folder']}/summary.json") for job in _jobs(sweep) if _is_done(job, label)]
    return max(found, key=lambda summary: summary["tokens_per_second"])
