"""Rates of this device, by which scripts/forecasting tells the time of a step: a few runs of several shapes, and a fit.

seconds of a micro-batch = linear FLOPs / linear rate + attention FLOPs in tiles / attention rate + fixed
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["nano", "tiny"], help="choices of configs/model")
    parser.add_argument("--attention", nargs="+", default=["dense", "window"], help="choices of configs/attention")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="tokens a sequence")
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings of train.py")
    parser.add_argument("--output", type=Path, default=Path("docs/results/calibration.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, fits, and puts this device's rates into the JSON beside those of others."""
    from scripts.benchmarks.results import markdown, surroundings

    grid = itertools.product(arguments.models, arguments.attention, arguments.lengths)
    measured = [_measure(*each, arguments.overrides) for each in grid]
    (setting,) = {row.pop("setting") for row in measured}
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rates": {}, "measured": {}}
    found["rates"][setting] = rates = fit_rates(measured)
    for row in measured:
        said = row["linear_flops"] / rates["linear"] + row["attention_flops"] / rates["attention"] + rates["fixed"]
        row["forecast_over_measured"] = round(said / row["seconds"], 3)
    found["measured"][setting] = surroundings() | {"rows": measured}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(measured))
    print(f"\n{setting}: {rates}\nwritten to {arguments.output}")


def fit_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares of relative errors with no negative number: a term that would be negative is left out (a rate of
    infinity, written as 1e30)."""
    import numpy as np

    seconds = np.array([row["seconds"] for row in rows])
    terms = np.array([[row["linear_flops"], row["attention_flops"], 1.0] for row in rows]) / seconds[:, None]
    best, least = np.zeros(3), np.inf
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        part = list(kept)
        solution = np.linalg.lstsq(terms[:, part], np.ones(len(rows)), rcond=None)[0]
        error = ((terms[:, part] @ solution - 1) ** 2).sum()
        if (solution >= 0).all() and error < least:
            best, least = np.zeros(3), error
            best[part] = solution
    linear, attention, fixed = best.tolist()
    return {"linear": 1 / max(linear, 1e-30), "attention": 1 / max(attention, 1e-30), "fixed": fixed}


def _measure(model: str, attention: str, length: int, overrides: list[str]) -> dict[str, Any]:
    """Some steps of one shape, in this process; their median."""
    from configs.build import build_data
    from scripts.benchmarks.memory import train_steps
    from scripts.benchmarks.models import composed
    from scripts.forecasting.sampling import Sample
    from scripts.forecasting.speed import setting, work

    shape = [f"model={model}", f"attention={attention}", f"data.sequence_length={length}"]
    config = composed(*shape, *overrides)
    data = build_data(config["data"])
    data.setup()
    sample = Sample.draw(config, data, data.vocabulary)
    linear, attention_flops = work(sample)
    summary, _ = train_steps(config, steps=7)
    return {
        "setting": setting(config, sample.document.device),
        **{"model": model, "attention": attention, "length": length},
        **{"linear_flops": linear, "attention_flops": attention_flops},
        "seconds": summary["step_seconds"] / config["trainer"]["accumulate"],
    }
