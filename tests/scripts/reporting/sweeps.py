"""Sweeps as the launcher leaves them, with invented but likely numbers around those of sample_run."""

import copy
import csv
import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.commands import compose

SAMPLE = Path(__file__).parent / "sample_run"
PATTERNS = {
    # name: step time, attention FLOPs and memory over the sample run's, and bits per byte more than it
    "dense": (1.47, 8.1, 1.9, -0.021),
    "window": (1.0, 1.0, 1.0, 0.0),
    "strided": (1.13, 1.7, 1.12, -0.013),
    "fixed": (1.09, 1.45, 1.10, 0.004),
    "block_sparse": (1.24, 2.3, 1.21, -0.009),
    "hierarchical": (1.31, 1.9, 1.27, -0.027),
    "routed": (1.58, 2.6, 1.45, -0.018),
}
TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 58, in train
    result = fit(module, data, folder, **trainer, loggers=loggers, resume=checkpoint)
model.training.failures.RunOutOfMemoryError: out of memory: 71.2 GiB forecast, 68.0 GiB there"""


def make_sweep(
    folder: Path,
    labels: Sequence[str] = tuple(PATTERNS),
    seeds: Sequence[int] = (1, 2, 3),
    states: Mapping[tuple[str, int], str] | None = None,
    pictures: bool = False,
    **manifest: Any,
) -> Path:
    """Writes manifest.json and the run folders of every (label, seed).

    Args:
        labels: an attention choice, and behind it anything that sets it apart ("window width=256").
        states: of jobs that are not done.
        pictures: whether done jobs have their report/pattern.png.
        manifest: entries of the manifest that are to be others.
    """
    jobs = [make_job(folder, label, seed, (states or {}).get((label, seed), "done"), pictures=pictures)
            for label in labels for seed in seeds]  # fmt: skip
    command = f"python train.py -m sweep={folder.name} seed={','.join(map(str, seeds))}"
    write_manifest(folder, jobs, **{"command": command} | manifest)
    return folder


def write_manifest(folder: Path, jobs: Sequence[Mapping[str, Any]], **entries: Any) -> None:
    """Writes manifest.json of these jobs; `entries` replace the others."""
    content = {
        "sweep": folder.name,
        "match": "tokens",
        "budget": {"tokens": 1720320},
        "command": f"python train.py -m sweep={folder.name}",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "lightning": "2.6.6", "farsight": "0.1.0"},
        "device": "cpu",
        "jobs": jobs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(content | entries, indent=1))


def make_job(folder: Path, label: str, seed: int, state: str = "done", pictures: bool = False) -> dict[str, Any]:
    """Writes one job's run folder, as far as its state has come, and returns its entry of the manifest."""
    name = label.split()[0]
    chance = random.Random(f"{label}{seed}")
    hash_ = f"{chance.getrandbits(48):012x}"
    time, flops, memory, more = PATTERNS.get(name, PATTERNS["window"])
    if " " in label:  # another setting of the pattern
        twist = random.Random(label)
        time, flops, memory = (factor * twist.uniform(0.6, 1.6) for factor in (time, flops, memory))
        more += twist.uniform(-0.02, 0.05)
    entry = {
        "hash": hash_,
        "label": label,
        "overrides": [f"attention={name}", *label.split(" ", 1)[1:], f"seed={seed}"],
        "seed": seed,
        "baseline": name == "dense",
        "folder": hash_,
        "command": f"python train.py attention={name} seed={seed} trainer.max_steps=420",
        "state": state,
        "started": None if state == "waiting" else "2026-11-24T08:00:00+00:00",
        "ended": None if state in ("waiting", "running") else "2026-11-24T08:05:00+00:00",
        "seconds": None if state in ("waiting", "running") else 300.0,
        "ran_on": f"machine, CUDA_VISIBLE_DEVICES={hash_}",  # each job on a device of its own
        "exit_reason": None,
        "traceback": None,
    }
    if state == "waiting":
        return entry
    if state == "failed":
        entry |= {"exit_reason": "loss became NaN at step 213, documents: <b>tricky & long</b>.txt"}
    if state == "out of memory":
        entry |= {"exit_reason": TRACEBACK.splitlines()[-1], "traceback": TRACEBACK}
    run = folder / hash_
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(make_config(name, seed), sort_keys=False))
    share = {"done": 1.0, "out of memory": 0.0}.get(state, 0.5)
    gain = more + chance.gauss(0, 0.004)
    rows = write_metrics(run / "metrics.csv", share, time, memory, gain, chance, routed=name == "routed")
    summary = json.loads((SAMPLE / "summary.json").read_text())
    summary |= {"state": {"done": "finished"}.get(state, state), "seed": seed, "config_hash": hash_}
    if state != "done":
        kept = ("state", "seed", "config_hash", "parameters", "device", "devices", "versions")
        (run / "summary.json").write_text(json.dumps({key: summary[key] for key in kept} | {"step": 10 * rows}))
        return entry
    speed = time * chance.uniform(0.985, 1.015)
    summary["step_seconds"] *= speed
    summary["tokens_per_second"] /= speed
    summary["train_seconds"] *= speed
    summary["peak_memory_bytes"] = round(summary["peak_memory_bytes"] * memory * chance.uniform(0.995, 1.005))
    for key in ("attention_flops_per_token", "density_pairs", "density_tiles"):
        summary[key] = summary[key] * flops if "density" not in key else min(1.0, summary[key] * flops)
    summary["bits_per_byte"] += gain
    (run / "summary.json").write_text(json.dumps(summary, indent=1))
    row = copy.deepcopy(json.loads((SAMPLE / "evaluation.json").read_text())["rows"][0])
    row["bits_per_byte"] = summary["bits_per_byte"]
    for bucket in row["by_position"]:
        shift = 2.6 * gain * (1 + bucket["start"] / 40000) + chance.gauss(0, 0.01)
        bucket |= {key: bucket[key] + shift for key in ("loss", "low", "high")}
    (run / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    if pictures:
        (run / "report").mkdir()
        (run / "report" / "pattern.png").write_bytes(picture(name, folder))
    return entry


def write_metrics(
    file: Path, share: float, time: float, memory: float, gain: float, chance: random.Random, routed: bool
) -> int:
    """The first `share` of the sample run's rows, changed; returns how many."""
    with open(SAMPLE / "metrics.csv") as sample:
        reader = csv.DictReader(sample)
        rows = list(reader)
    rows = rows[: int(share * len(rows))]
    for row in rows:
        for key, factor in (("step_seconds", time), ("peak_memory_bytes", memory)):
            row[key] = str(float(row[key]) * factor * chance.uniform(0.97, 1.03)) if row[key] else ""
        for key in ("train/bits_per_byte", "validation/bits_per_byte"):
            row[key] = str(float(row[key]) + gain + chance.gauss(0, 0.01)) if row[key] else ""
        if routed and row["train/loss"]:
            row |= {
                "train/routing_entropy": "0.89",
                "train/routing_never_chosen": "0.013",
                "train/routing_age": "812.5",
            }
    columns = list(dict.fromkeys([*(reader.fieldnames or []), *(key for row in rows for key in row)]))
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


@functools.cache
def _composed(attention: str) -> dict[str, Any]:
    return compose(f"attention={attention}")


def make_config(attention: str, seed: int) -> dict[str, Any]:
    config = copy.deepcopy(_composed(attention))
    config["seed"] = config["data"]["seed"] = seed
    return config


_pictures: dict[str, bytes] = {}


def picture(attention: str, scratch: Path) -> bytes:
    """The PNG of a choice's patterns; drawn once."""
    if attention not in _pictures:
        from configs.build import build_plan
        from scripts.reporting.pictures import draw_patterns

        file = scratch / "picture.png"
        draw_patterns(build_plan(make_config(attention, 1)["attention"]).patterns, 2048, file)
        _pictures[attention] = file.read_bytes()
        file.unlink()
    return _pictures[attention]
