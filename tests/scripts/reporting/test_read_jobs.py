"""What is read from folders: every state, and whatever is missing or broken."""

import json
import platform
import shutil

import pytest
import yaml

from model.training.run_folder import RunFolderError
from scripts.reporting import read_jobs
from scripts.reporting.aggregate import make_rows
from scripts.reporting.cautions import cautions
from scripts.reporting.curves import curve_of, positions_of, routing_of
from scripts.reporting.jobs import STATES
from scripts.reporting.read_jobs import read_sweeps
from scripts.sweeping.locks import lock
from tests.scripts.reporting.sweeps import SAMPLE, make_config, make_job, make_sweep, write_manifest

SUMMARY = json.loads((SAMPLE / "summary.json").read_text())


def read_one(folder, label="window", seed=1):
    (sweep,) = read_sweeps([folder])
    return next(job for job in sweep.jobs if (job.label, job.seed) == (label, seed))


def make_run(folder, attention="window", seed=1, **settings):
    """A run without a manifest, of the sample run's files."""
    folder.mkdir(parents=True)
    config = make_config(attention, seed)
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("summary.json", "metrics.csv", "evaluation.json"):
        shutil.copy(SAMPLE / name, folder / name)
    return folder


def test_a_sweep_is_read_whole(tmp_path):
    labels, states = ("dense", "window"), {("window", seed): state for seed, state in enumerate(STATES)}
    folder = make_sweep(tmp_path / "patterns", labels, range(len(STATES)), states)
    (sweep,) = read_sweeps([folder])
    assert (sweep.name, sweep.match, sweep.budget) == ("patterns", "tokens", {"tokens": 1720320})
    assert [job.state for job in sweep.jobs if job.label == "window"] == list(STATES)
    assert [job.counted for job in sweep.jobs if job.label == "window"] == [True, *[False] * (len(STATES) - 1)]
    assert all(job.counted and job.baseline and not job.problems for job in sweep.jobs if job.label == "dense")
    assert "RunOutOfMemoryError" in read_one(folder, seed=STATES.index("out of memory")).traceback


def test_a_job_of_an_earlier_default_is_no_second_run_of_its_seed(tmp_path):
    """A default in a YAML file that changed gives a job another hash, and the same overrides."""
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1, 2])
    manifest = json.loads((folder / "manifest.json").read_text())
    again = manifest["jobs"][0] | {"hash": "0" * 12, "folder": "0" * 12, "state": "waiting"}
    changed = manifest["jobs"][1] | {"hash": "1" * 12, "overrides": [*manifest["jobs"][1]["overrides"], "data=code"]}
    manifest["jobs"] += [again, changed]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (sweep,) = read_sweeps([folder])
    assert sweep.replaced == (manifest["jobs"][0]["hash"],)
    assert [job.hash for job in sweep.jobs] == [job["hash"] for job in manifest["jobs"][1:]]
    told = cautions([sweep], make_rows([sweep]))
    assert "1 job of earlier settings left out: later jobs have the same overrides." in told


@pytest.fixture
def running(tmp_path):
    """A sweep with a job that is running on this machine by its manifest."""
    folder = make_sweep(tmp_path / "s", ["dense", "window"], [1], {("window", 1): "running"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["jobs"][1]["host"] = platform.node()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_job_that_was_killed_is_interrupted_and_one_that_runs_is_not(running):
    job = read_one(running)
    assert job.state == "running", "a copy without locks"
    with lock(running, job.hash):
        assert read_one(running).state == "running"
    before = (running / "manifest.json").read_bytes()
    killed = read_one(running)
    assert (killed.state, killed.exit_reason) == ("interrupted", read_jobs.KILLED)
    assert (running / "manifest.json").read_bytes() == before, "a report writes into no manifest"
    assert read_one(running, "dense").state == "done"


def test_a_job_on_another_machine_is_running_as_far_as_one_can_see(running):
    (hash,) = {read_one(running).hash}
    with lock(running, hash):
        pass
    for host in ("another machine", None):  # None: a manifest that tells no machine
        file = running / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["jobs"][1]["host"] = host
        file.write_text(json.dumps(manifest))
        assert read_one(running).state == "running"


def test_a_job_that_ends_while_one_looks_is_done(running, monkeypatch):
    def ends(*_):
        file = running / "manifest.json"
        file.write_text(file.read_text().replace('"running"', '"failed"'))
        return True

    monkeypatch.setattr(read_jobs, "was_killed", ends)
    assert read_one(running).state == "failed"


@pytest.mark.parametrize(("match", "equal"), [("flops", True), (None, False)])
def test_steps_that_a_match_sets_are_not_part_of_a_jobs_context(tmp_path, match, equal):
    entries = [make_job(tmp_path, label, 1) for label in ("dense", "window")]
    for entry, steps in zip(entries, (100, 300), strict=True):
        entry["overrides"] += [f"trainer.max_steps={steps}", "data.sequence_length=64"]
    write_manifest(tmp_path, entries, match=match)
    dense, window = read_sweeps([tmp_path])[0].jobs
    assert (dense.context == window.context) == equal and "data.sequence_length=64" in dense.context


def test_sweeps_of_one_name_stay_two(tmp_path):
    folders = [make_sweep(tmp_path / place / "s", ["window"], [1]) for place in ("one", "other")]
    labels = [row.label for row in make_rows(read_sweeps(folders))]
    assert labels == [f"{folder}: window" for folder in folders]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "evaluation.json", "metrics.csv"])
@pytest.mark.parametrize("content", [None, "", "{", "\0\xff not text"], ids=["missing", "empty", "cut off", "bytes"])
def test_a_file_that_cannot_be_read_is_named_and_nothing_stops(tmp_path, name, content):
    folder = make_sweep(tmp_path / "s", ["window"], [1])
    file = read_one(folder).folder / name
    file.unlink()
    if content is not None:
        file.write_text(content, encoding="latin-1")
    job = read_one(folder)
    counted = name not in ("evaluation.json",)
    assert job.counted == counted
    if name in ("summary.json", "evaluation.json") or content is None:
        assert any(name in problem for problem in job.problems), job.problems
    (row,) = make_rows(read_sweeps([folder]))
    curve_of(row, "train/bits_per_byte"), positions_of(row), routing_of(row)


def test_a_done_job_without_a_folder_is_not_counted(tmp_path):
    folder = make_sweep(tmp_path / "s", ["window"], [1])
    shutil.rmtree(read_one(folder).folder)
    job = read_one(folder)
    assert not job.counted and "evaluation.json is missing" in job.problems


def test_numbers_that_are_none_are_left_out(tmp_path):
    folder = make_sweep(tmp_path / "s", ["window"], [1])
    run = read_one(folder).folder
    (run / "summary.json").write_text(
        '{"state": "finished", "step_seconds": NaN, "peak_memory_bytes": null, "step": 2}'
    )
    (run / "metrics.csv").write_text("step,train/loss,extra\n1,nan,inf\n2,1.5,-inf\n3,2.")
    job = read_one(folder)
    assert job.number("step_seconds") is None and job.number("peak_memory_bytes") is None
    assert job.metrics == [{"step": 1.0}, {"step": 2.0, "train/loss": 1.5}, {"step": 3.0, "train/loss": 2.0}]
    (run / "evaluation.json").write_text('{"rows": [{"bits_per_byte": null}]}')
    assert not read_one(folder).counted


def test_the_evaluation_is_the_runs_own_and_not_one_that_was_added(tmp_path):
    folder = make_sweep(tmp_path / "s", ["window"], [1])
    job = read_one(folder)
    own = dict(job.evaluation)
    other = own | {"documents_from": "books", "bits_per_byte": 0.5}
    for rows in ([other, own], [own, other]):
        (job.folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
        assert read_one(folder).number("bits_per_byte") == own["bits_per_byte"]
    again = own | {"bits_per_byte": own["bits_per_byte"] + 1e-9}  # scored again, which replaced the run's own row
    (job.folder / "evaluation.json").write_text(json.dumps({"rows": [other, again]}))
    assert read_one(folder).number("bits_per_byte") == again["bits_per_byte"]


def test_runs_without_a_manifest_are_named_by_what_differs(tmp_path):
    runs = [
        make_run(tmp_path / "dense" / "first", "dense"),
        make_run(tmp_path / "window" / "one", seed=1),
        make_run(tmp_path / "window" / "two", seed=2),
        make_run(tmp_path / "window" / "long", trainer__max_steps=900),
    ]
    (sweep,) = read_sweeps(runs)
    assert (sweep.name, sweep.match) == ("", None)
    assert [job.label for job in sweep.jobs] == ["dense", "window max_steps=420", "window max_steps=420",
                                                 "window max_steps=900"]  # fmt: skip
    assert [job.baseline for job in sweep.jobs] == [True, False, False, False]
    rows = {row.label: row for row in make_rows([sweep])}
    assert len(rows["window max_steps=420"].counted) == 2 and rows["window max_steps=420"].against.label == "dense"
    assert read_sweeps([tmp_path / "window"])[0].jobs[0].folder == runs[3], "a folder of runs does as well"


@pytest.mark.parametrize(
    ("state", "expected"),
    [("finished", "done"), ("running", "running"), ("failed", "failed"), ("out of memory", "out of memory")],
)
def test_a_run_says_its_own_state(tmp_path, state, expected):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"state": state}))
    assert read_sweeps([run])[0].jobs[0].state == expected


def test_a_run_that_has_not_begun_is_waiting(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("summary.json", "metrics.csv", "evaluation.json"):
        (run / name).unlink()
    (job,) = read_sweeps([run])[0].jobs
    assert job.state == "waiting" and not job.problems


@pytest.mark.parametrize(
    "manifest", ["", "[]", '{"jobs": 3}', '{"jobs": [{"hash": "a", "state": "gone"}]}', '{"jobs": [{}]}']
)
def test_a_broken_manifest_is_one_line(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(RunFolderError, match=r"manifest\.json: cannot be read") as error:
        read_sweeps([tmp_path])
    assert "\n" not in str(error.value)


def test_a_folder_that_is_neither_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"nowhere: must be a sweep, a run, or a folder of runs"):
        read_sweeps([tmp_path / "nowhere"])


def test_the_same_folder_twice_counts_once(tmp_path):
    folder = make_sweep(tmp_path / "s", ["window"], [1])
    assert len(read_sweeps([folder, folder / ".." / "s"])) == 1


def test_curves_go_by_tokens_and_by_measured_time(tmp_path):
    entry = make_job(tmp_path, "window", 1)
    run = tmp_path / entry["folder"]
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"train_tokens": 3000, "step": 30}))
    (run / "metrics.csv").write_text(
        "step,train/loss,step_seconds,validation/loss\n10,4,,\n20,3,0.5,\n20,,,9\n30,2,0.25,\n"
    )
    write_manifest(tmp_path, [entry])
    (row,) = make_rows(read_sweeps([tmp_path]))
    curve = curve_of(row, "train/loss")
    assert curve.tokens == (1000, 2000, 3000) and curve.values == (4, 3, 2)
    assert curve.seconds == (5.0, 10.0, 12.5), "the first steps, unmeasured, at the pace of the next"
    assert curve_of(row, "validation/loss") is None, "a single point is no curve"


def test_seeds_are_averaged_at_the_steps_that_all_logged(tmp_path):
    entries = [make_job(tmp_path, "window", seed) for seed in (1, 2)]
    for entry, text in zip(entries, ("10,4\n20,3\n30,2\n", "10,6\n20,5\n"), strict=True):
        (tmp_path / entry["folder"] / "metrics.csv").write_text("step,train/loss\n" + text)
    write_manifest(tmp_path, entries)
    (row,) = make_rows(read_sweeps([tmp_path]))
    assert curve_of(row, "train/loss").values == (5, 4)


def test_routing_health_is_the_last_that_was_logged(tmp_path):
    folder = make_sweep(tmp_path / "s", ["routed"], [1, 2])
    (row,) = make_rows(read_sweeps([folder]))
    assert routing_of(row) == pytest.approx({"entropy": 0.89, "never_chosen": 0.013, "age": 812.5})
