"""The README holds: its commands compose, its code runs, its links and pictures lead somewhere."""

import csv
import json
import re
import shlex

import pytest

from tests.commands import ROOT, compose

TEXT = (ROOT / "README.md").read_text()
BASH = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
CONFIGS = {
    "train.py": "train",
    "scripts/evaluate.py": "evaluate",
    "scripts/generate.py": "generate",
    "scripts/preflight.py": "preflight",
    "scripts/show_pattern.py": "show_pattern",
}


@pytest.mark.parametrize("command", [line for line in BASH if line.split()[1] in CONFIGS])
def test_a_command_composes(command):
    _, script, *overrides = shlex.split(command)
    overrides = [re.sub(r"=([\w,]+),\w+$", lambda m: "=" + m.group(1).split(",")[0], o) for o in overrides if o != "-m"]
    assert compose(*overrides, config_name=CONFIGS[script])


def test_there_is_a_command_for_each_use():
    for words in ("train.py -m", "resume=", "init_from=", "scripts/evaluate.py checkpoint="):
        assert any(words in line for line in BASH), words


@pytest.mark.parametrize("code", PYTHON)
def test_the_code_runs(code):
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == names["q"].shape


def test_make_has_the_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make ([a-z]+)", TEXT)) <= set(targets)


def test_links_and_pictures_lead_somewhere():
    for path in re.findall(r"\]\(((?!https?:)[^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page):
    from scripts.benchmarks.results import markdown

    text = page.read_text()
    for file in re.findall(r"<!-- table: (\S+) -->", text):
        rows = json.loads((ROOT / "docs" / file).read_text())["rows"]
        assert f"<!-- table: {file} -->\n{markdown(rows)}\n" in text


def test_the_numbers_are_those_of_the_result_files():
    def result(name):
        return json.loads((ROOT / "docs/results" / name).read_text())

    cpu, row = result("default_cpu/summary.json"), result("default_cpu/evaluation.json")["rows"][0]
    speed = {(r["attention"], r["length"]): f"{r['tokens_per_second']:,}" for r in result("training_cpu.json")["rows"]}
    ratios = [r["speedup_over_flex"] for r in result("kernels_h200.json")["rows"] if r["backend"] == "triton"]
    gpu, dense = result("gpu_32k/summary.json"), result("gpu_32k_dense/summary.json")
    times = {
        (r["selection"], r["shape"], r["heads"], r["side"]): r["forward_ms"] + r["backward_ms"]
        for r in result("routed_h200.json")["rows"]
        if r["backward_ms"]
    }
    chosen = "random", "4x32768", "64/4"
    share = next(r["share"] for r in result("layouts_h200.json")["rows"] if r["pattern"] == "window_1024")
    baselines = row["baselines"]
    novels, at_equal_tokens = (
        {r["label"]: r for r in csv.DictReader((ROOT / "docs/results" / name / "report/pareto.csv").open())}
        for name in ("novels_32k", "novels_32k_tokens")
    )
    quality = {name: float(r["bits_per_byte"]) for name, r in novels.items()}
    names = {"hierarchical": "hierarchical", "window": "windows", "dense": "dense"}
    same_tokens = ", ".join(f"{names[n]} {float(at_equal_tokens[n]['bits_per_byte']):.3f}" for n in names)
    slower = float(novels["dense"]["step_seconds"]) / float(novels["window"]["step_seconds"])
    decode = {(r["attention"], r["context"], r["batch"]): r["ms_per_token"] for r in result("decode_h200.json")["rows"]}
    names = ("windows", "window"), ("routed", "routed"), ("dense", "dense")
    grows = {name: decode[name, 131072, 16] / decode[name, 8192, 16] for name in ("window", "routed", "dense")}
    for number in (
        f"windows {quality['window']:.3f}, dense {quality['dense']:.3f} bits per byte held out",
        f"dense takes {slower:.1f} times as long a step",
        f"{same_tokens} bits per byte held out",
        ", ".join(f"{short} {grows[name]:.2f}" for short, name in names) + " times the time a token",
        f"{cpu['train_seconds']:.0f} s of training",
        f"{row['bits_per_byte']:.3f} bits per byte held out",
        f"gzip -9: {baselines['gzip_bits_per_byte']:.3f}, bigram model: {baselines['bigram_bits_per_byte']:.3f}",
        f"attending to {cpu['density_pairs']:.0%} of the pairs",
        f"windows {speed['window', 2048]} and {speed['window', 16384]}",
        f"dense {speed['dense', 2048]} and {speed['dense', 16384]}",
        f"{min(ratios):.2f} to {max(ratios):.2f} times as fast",
        f"{times[(*chosen, 'fla')] / times[(*chosen, 'by_block')]:.2f} times as fast",
        f"{share:.1%} of 12 layers' attention",
        f"{gpu['tokens_per_second']:,.0f} tokens/s, {gpu['bits_per_byte']:.3f} bits per byte",
        f"(dense: {dense['tokens_per_second']:,.0f} tokens/s)",
    ):
        assert number in TEXT, number


@pytest.mark.parametrize("run", ["gpu_32k", "gpu_32k_routed", "gpu_32k_dense"])
def test_the_table_of_gpu_runs_is_that_of_their_files(run):
    summary = json.loads((ROOT / "docs/results" / run / "summary.json").read_text())
    cells = (
        f"{summary['tokens_per_second']:,.0f}",
        f"{summary['step_seconds']:.3f}",
        f"{summary['peak_memory_bytes'] / 1e9:.1f} GB",
        f"{summary['density_pairs']:.1%}",
        f"[{run}](results/{run})",
    )
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs/performance.md").read_text()


def test_the_numbers_of_the_gpu_run_are_those_of_its_files():
    folder, text = ROOT / "docs/results/gpu_32k", (ROOT / "docs/performance.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    row = json.loads((folder / "evaluation.json").read_text())["rows"][0]
    for number in (
        f"{summary['train_seconds']:.0f} s of training",
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['peak_memory_bytes'] / 1e9:.1f} GB",
        f"{row['bits_per_byte']:.3f} bits per byte held out (gzip -9: {row['baselines']['gzip_bits_per_byte']:.3f}",
        f"{row['baselines']['bigram_bits_per_byte']:.3f})",
    ):
        assert number in text, number


def test_the_numbers_of_the_sweep_at_equal_tokens_are_those_of_its_report():
    with open(ROOT / "docs/results/novels_32k_tokens/report/pareto.csv") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["bits_per_byte"]))
    names = [{"window": "windows"}.get(row["label"], row["label"]) for row in rows]
    said = ", ".join(f"{name} {float(row['bits_per_byte']):.3f}" for name, row in zip(names, rows, strict=True))
    seconds = {row["label"]: float(row["step_seconds"]) for row in rows}
    ratios = sorted((seconds[name] / seconds["dense"], name) for name in seconds if name != "dense")
    (least, fastest), (most, slowest) = ratios[0], ratios[-1]
    text = (ROOT / "docs/performance.md").read_text()
    assert f"{said} bits per byte held out" in text
    assert f"{least:.2f} ({fastest}) to {most:.2f} ({slowest}) of dense's step time" in text


def test_the_numbers_of_the_sweep_on_a_cpu_are_those_of_its_files():
    folder = ROOT / "docs/results/patterns_cpu"
    with open(folder / "report/pareto.csv") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    jobs = json.loads((folder / "manifest.json").read_text())["jobs"]
    minutes = {seed: sum(job["seconds"] for job in jobs if job["seed"] == seed) / 60 for seed in (1, 2)}
    quality = {name: f"{float(row['bits_per_byte']):.3f}" for name, row in rows.items()}
    ratio = float(rows["window"]["step_seconds"]) / float(rows["dense"]["step_seconds"])
    assert {job["state"] for job in jobs} == {"done"} and len(jobs) == 2 * len(rows) == 18
    assert f"windows {quality['window']}, dense {quality['dense']} bits per byte held out, at {ratio:.2f} of" in TEXT
    assert f"{minutes[1]:.0f} minutes a seed" in TEXT
    assert f"took {minutes[1]:.1f} and {minutes[2]:.1f} minutes" in (ROOT / "docs/sweeps.md").read_text()
