"""Benchmarks run, and what they report of memory is what was there. (Times are the machine's.)"""

import json

from tests.commands import run


def test_decode_reports_times_and_memory(tmp_path):
    output = tmp_path / "decode.json"
    arguments = ["--attention", "window", "dense", "--contexts", "100", "400", "--tokens", "2", "--batch", "2"]
    result = run("scripts/benchmark.py", "decode", *arguments, "--prefill-chunk", "64", "--output", str(output))
    rows = {(row["attention"], row["context"]): row for row in json.loads(output.read_text())["rows"]}
    assert len(rows) == 4 and "| window | 400 |" in result.stdout
    token = 2 * 4 * 4 * 32 * 4 * 2 / 2**30  # k and v, layers, KV heads, head_dim, bytes, sequences
    assert abs(rows["dense", 400]["cache_gib"] - 405 * token) < 1e-6
    assert abs(rows["window", 400]["cache_gib"] - 255 * token) < 1e-6
    assert all(row["ms_per_token"] > 0 and row["prefill_ms"] > 0 for row in rows.values())
