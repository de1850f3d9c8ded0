"""The tables of what patterns reach: docs/quality.md, docs/pretrained.md and docs/sweeps.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data.units import BITS, OF_TEXT
from docs.result_files import read, report_rows, where
from scripts.benchmarks.results import markdown


def extension_table(sweep: str, timed: bool = False, unit: str = OF_TEXT[BITS]) -> str:
    """Returns quality and cost of every pattern in a sweep with a first stage and a control, best first.

    timed: whether the jobs had the GPU for themselves, so that their step times compare.
    unit: that of `bits_per_byte`, for records of versions that did not write it.
    """
    rows = {label: row for label, row in report_rows(sweep).items() if row["bits_per_byte"]}  # those that are done
    attention = float(rows["dense"]["attention_flops_per_token"])
    number = lambda row, key: float(row[key] or "nan")  # noqa: E731
    tokens = [number(row, "train_tokens") for row in rows.values()]
    unequal = max(tokens) > 1.1 * min(tokens)
    cells = []
    for row in sorted(rows.values(), key=lambda row: number(row, "bits_per_byte")):
        quality, high = number(row, "bits_per_byte"), number(row, "bits_per_byte_high")
        spread = f" ± {high - quality:.4f}" if len(row["seeds"].split()) > 1 else ""
        keys = {
            "the control": ("difference_from_control", "control_low", "control_high"),
            "dense": ("difference_from_baseline", "difference_low_over_documents", "difference_high_over_documents"),
        }
        beside = {name: [number(row, key) for key in own] for name, own in keys.items()}
        cells.append(
            {"pattern": row["label"], unit: f"{quality:.4f}{spread}"}
            | {
                f"beside {name}": "-"
                if mean != mean
                else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"  # no difference: NaN
                for name, (mean, low, high) in beside.items()
            }
            | {
                "attention FLOPs / dense": f"{number(row, 'attention_flops_per_token') / attention:.2f}",
            }
            | ({"step time (ms)": f"{1e3 * number(row, 'step_seconds'):.0f}"} if timed else {})
            | ({"tokens (millions)": f"{number(row, 'train_tokens') / 1e6:.0f}"} if unequal else {})
        )
    return markdown(cells)


def by_seed(sweep: str) -> str:
    """Returns the bits per byte of the patterns that have several seeds in a sweep, one column a seed."""
    found: dict[str, dict[int, float]] = {}
    for job, row in _evaluated(sweep):
        found.setdefault(job["label"], {})[job["seed"]] = row["bits_per_byte"]
    several = {label: bits for label, bits in found.items() if len(bits) > 1}
    seeds = sorted({seed for bits in several.values() for seed in bits})
    return markdown(
        [
            {"pattern": label} | {f"seed {seed}": f"{bits[seed]:.4f}" if seed in bits else "-" for seed in seeds}
            for label, bits in several.items()
        ]
    )


def by_position(sweep: str, positions: Sequence[int]) -> str:
    """Returns the loss (nats per token) of each pattern of a sweep in seed 1 by the position of a token in its
    document; each column begins at one of `positions`."""
    return _losses(sweep, "by_position", "start", positions, lambda cell: f"{cell['start']:,} to {cell['stop']:,}")


def by_context(sweep: str, contexts: Sequence[int]) -> str:
    """Returns the loss (nats per token) of the same tokens under each of `contexts`, of each pattern of a sweep in seed
    1 that was scored with all of them."""
    return _losses(sweep, "by_context", "context", contexts, lambda cell: f"{cell['context']:,}", places=4)


def _losses(
    sweep: str, part: str, key: str, values: Sequence[int], title: Callable[[Mapping[str, Any]], str], places: int = 3
) -> str:
    """Returns a table of the losses in the list `part` of a row of evaluation.json, of the entries whose `key` is one
    of `values`."""
    rows = []
    for job, row in _evaluated(sweep):
        cells = {cell[key]: cell for cell in row[part]}
        if job["seed"] == 1 and cells.keys() >= set(values):
            losses = {title(cells[value]): f"{cells[value]['loss']:.{places}f}" for value in values}
            rows.append({"pattern": job["label"]} | losses)
    return markdown(rows)


def _evaluated(sweep: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns the jobs of a sweep that are done, without first stages, and the row of each in evaluation.json."""
    for job in read(f"{sweep}/manifest.json")["jobs"]:
        if job["role"] != "first stage" and job["state"] == "done":
            (row,) = read(f"{sweep}/{job['folder']}/evaluation.json")["rows"]
            yield job, row


def sweep_table(sweep: str) -> str:
    """Returns quality and cost of every pattern in a sweep's report, best first."""
    rows = sorted(report_rows(sweep).values(), key=lambda row: float(row["bits_per_byte"]))
    dense = float(report_rows(sweep)["dense"]["step_seconds"])
    return markdown(
        [
            {
                "pattern": row["label"],
                "bits per byte": f"{float(row['bits_per_byte']):.3f}",
                "step time / dense": f"{float(row['step_seconds']) / dense:.2f}",
                "tokens (millions)": f"{float(row['train_tokens']) / 1e6:.1f}",
            }
            for row in rows
        ]
    )


def extended() -> str:
    """Returns what each pattern makes of a model of 4,096 tokens in as many further tokens at 32,768."""
    names = {
        "dense": "dense, 32,768",
        "control": "dense, 4,096: the control",
        "window": "windows of 1,024",
        "hybrid": "3 layers of windows to one dense",
        "hybrid_probed": "the same, dense where the probe says",
        "routed": "routed: window 512 and 16 blocks of 64",
    }
    rows = []
    for row in read("pretrained_h200/extension.json")["rows"]:
        losses = {n: f"{loss:.4f}" for n, loss in row["by_context"].items()}
        contexts = {f"given {int(n):,}": losses.get(n, "-") for n in ("512", "2048", "4096", "16384")}
        mean, low, high = row["over_control"] or (None,) * 3
        difference = {"beside the control": "-" if mean is None else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"}
        flops = {"attention FLOPs": f"{row['attention_flops']:.0%}"}
        rows.append(
            {
                "pattern": names[row["pattern"]],
                "bits/byte": f"{row['bits_per_byte']:.4f}",
                **difference,
                **flops,
                **contexts,
            }
        )
    return markdown(rows)


def probed() -> str:
    """Returns what the probe measures of each layer of the same model."""
    return markdown(
        [
            {
                "layer": unit["layer"],
                "loss change": f"{unit['change']:+.4f} [{unit['low']:+.4f}, {unit['high']:+.4f}]",
                "attention beyond 1,024": f"{unit['mass_beyond']:.0%}",
            }
            for unit in read("pretrained_h200/probe.json")["units"]
        ]
    )


def sparsified() -> str:
    """Returns what becomes of a dense model under dense and under routed attention."""
    content = read("pretrained_h200/sparsify.json")
    names = {
        "base": "the dense model itself",
        "dense": "300 steps of dense attention",
        "mean_key": "300 steps, routed by mean keys",
        "indexer": "200 steps of the indexers alone, then 300 routed by them",
    }
    dense = where(content["rows"], run="dense")["attention_flops_per_token"]
    rows = [
        {
            "then": names[row["run"]],
            "bits/byte": f"{row['bits_per_byte']:.4f}",
            "attention FLOPs": f"{row['attention_flops_per_token'] / dense:.0%}",
        }
        for row in content["rows"]
    ]
    again = content["indexer_under_dense_attention"]
    mean, low, high = again["over_routed"]
    difference = f"{again['bits_per_byte']:.4f}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    last = {"then": "the last model, under dense attention", "bits/byte": difference, "attention FLOPs": "100%"}
    return markdown([*rows, last])
