"""The tables of recall in docs/quality.md: what patterns find far back, and how they learn it."""

from collections.abc import Sequence
from typing import Any

from docs.result_files import read, where
from scripts.benchmarks.results import markdown

STAGES = "recall_stages_h200.json"
"""Models that were trained as their pattern from the first stage on: their losses by stage, and what they find."""

FROM_DENSE = "recall_h200.json"
"""Models that were trained with full attention, and got their pattern in the last stage."""

TRAINED = 65536
"""Tokens of the sequences in the last stage."""


def recall_answers() -> str:
    """Returns the right answers of each pattern after the last stage: pass keys in texts of three lengths, the other
    tasks in texts of the length of that stage."""
    dense = _last_stage("dense", 1)["attention_flops_per_token"]
    rows = []
    for pattern, seed in _models(trained=TRAINED, length=TRAINED):
        stages = [row for row in read(STAGES)["stages"] if (row["pattern"], row["seed"]) == (pattern, seed)]
        found = _answers(pattern=pattern, seed=seed, trained=TRAINED, length=TRAINED)
        tasks = {
            f"pass key, {length:,}": _pass_keys(pattern, seed, TRAINED, length) for length in (4096, 16384, TRAINED)
        } | {
            "8 pairs": [row for row in found if row["task"] == "associative_recall"],
            "one of 4 keys": [row for row in found if row["task"] in ("needle_multikey", "needle_multiquery")],
            "4 numbers of a key": [row for row in found if row["task"] == "needle_multivalue"],
        }
        flops = _last_stage(pattern, seed)["attention_flops_per_token"] / dense
        rows.append(
            {
                "pattern": pattern,
                "seed": seed,
                "attention FLOPs / dense": f"{flops:.2f}" if flops >= 0.01 else f"{flops:.3f}",
                "tokens (millions)": f"{sum(row['tokens'] for row in stages) / 1e6:.0f}",
            }
            | {task: _counts(cells) for task, cells in tasks.items()}
        )
    return markdown(rows)


def recall_beyond(lengths: Sequence[int]) -> str:
    """Returns the answers of each model in text longer than its longest training sequences: pass keys, and 8 pairs."""
    models = {(row["pattern"], row["seed"], row["trained"]) for row in _answers() if row["length"] > row["trained"]}
    rows = []
    for pattern, seed, trained in sorted(models, key=lambda model: (model[2], *model[:2])):
        row: dict[str, Any] = {"pattern": pattern, "seed": seed, "trained at": f"{trained:,}"}
        for length in lengths:
            found = _answers(pattern=pattern, seed=seed, trained=trained, length=length) if length > trained else []
            keys = _pass_keys(pattern, seed, trained, length)
            pairs = [each for each in found if each["task"] == "associative_recall"]
            row[f"{length:,}"] = f"{_counts(keys)}, {_counts(pairs)}" if found else "-"
        rows.append(row)
    return markdown(rows)


def recall_learning(millions: Sequence[int]) -> str:
    """Returns the loss of answers (nats per token) in the first stage, of 512 tokens, after so many million tokens, and
    the bits per byte of novels after its first round."""
    curves: dict[tuple[str, int], dict[int, float]] = {}
    novels = {}
    for row in read(STAGES)["stages"]:
        if row["length"] == 512:
            curve = curves.setdefault((row["pattern"], row["seed"]), {})
            if row["round"] == 1:
                novels[row["pattern"], row["seed"]] = f"{row['novels']:.3f}"
            (steps, _), before = row["answers"][-1], (row["round"] - 1) * row["tokens"]
            for step, loss in row["answers"]:
                curve.setdefault(round((before + row["tokens"] * step / steps) / 1e6), loss)
    return markdown(
        [
            {"pattern": pattern, "seed": seed}
            | {f"{n}M": f"{curve[n]:.3f}" if n in curve else "" for n in millions}
            | {"novels": novels[pattern, seed]}
            for (pattern, seed), curve in curves.items()
        ]
    )


def found_facts(pattern: str, length: int) -> str:
    """Returns the right answers of a pattern's models after the last stage, over the tasks whose answer is one number.
    No model can do the other one, `needle_multivalue`."""
    rows = _answers(pattern=pattern, trained=TRAINED, length=length)
    return _counts([row for row in rows if row.get("depth") != 1 and row["task"] != "needle_multivalue"])


def pass_keys() -> str:
    """Returns how many pass keys the patterns found that replaced full attention, by the length of the text, without
    those at its end."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in read(FROM_DENSE)["recall"]:
        if row["task"] == "passkey" and row["depth"] < 1:
            found.setdefault(row["run"], {}).setdefault(row["length"], []).append(row)
    lengths = sorted({length for rows in found.values() for length in rows})
    return markdown(
        [
            {"pattern": run} | {f"{n:,} tokens": _counts(rows[n]) if n in rows else "-" for n in lengths}
            for run, rows in found.items()
        ]
    )


def _answers(**values: Any) -> list[dict[str, Any]]:
    return [row for row in read(STAGES)["answers"] if all(row[key] == value for key, value in values.items())]


def _pass_keys(pattern: str, seed: int, trained: int, length: int) -> list[dict[str, Any]]:
    """Returns the answers at the depths that no window reaches."""
    rows = _answers(pattern=pattern, seed=seed, trained=trained, length=length, task="passkey")
    return [row for row in rows if row["depth"] < 1]


def _models(**values: Any) -> list[tuple[str, int]]:
    """Returns pattern and seed of the models that have such answers, in the order of the record."""
    return list(dict.fromkeys((row["pattern"], row["seed"]) for row in _answers(**values)))


def _last_stage(pattern: str, seed: int) -> dict[str, Any]:
    return where(read(STAGES)["stages"], pattern=pattern, seed=seed, length=TRAINED, round=1)


def _counts(rows: Sequence[dict[str, Any]]) -> str:
    return f"{sum(row['right'] for row in rows)} of {sum(row['answers'] for row in rows)}"
