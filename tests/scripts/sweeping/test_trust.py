"""A stranger's sweep folder runs no code when the sweep is launched again."""

import json

from scripts.reporting.manifest import read_manifest
from tests.configs.attacks import MODULE, PATTERN, Traps
from tests.scripts.sweeping.conftest import run_sweep


def test_a_manifest_sets_nothing_of_what_runs(tmp_path, monkeypatch, quick, reports):
    traps = Traps(tmp_path, monkeypatch)
    jobs = ("sweep=patterns", "sweep.baseline=null", "attention=window", "seed=1,2")
    assert run_sweep(tmp_path, *jobs) == 0
    file = tmp_path / "patterns" / "manifest.json"
    manifest = json.loads(file.read_text())
    own = [job["overrides"] for job in manifest["jobs"]]
    for job, override in zip(
        manifest["jobs"],
        (f"+hydra.callbacks.trap={{_target_: os.mkdir, path: {traps.ran}}}", f"{PATTERN}._target_={MODULE}.MyPattern"),
        strict=True,
    ):
        job["state"], job["overrides"], job["command"] = "waiting", [*job["overrides"], override], "rm"
        job["folder"] = str(traps.victim)
    file.write_text(json.dumps(manifest))
    assert run_sweep(tmp_path, *jobs) == 0
    traps.check()
    after = read_manifest(tmp_path / "patterns").jobs
    assert [(job.state, job.overrides) for job in after] == [("done", overrides) for overrides in own]
