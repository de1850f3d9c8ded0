"""Wrong settings on the command line: one line with the key, exit status 2, and no folder."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

import scripts.evaluate
import scripts.generate
import scripts.preflight
import scripts.probe
import scripts.show_pattern
import train
from scripts import console
from tests.commands import run_forked

A_FILE = f"checkpoint={__file__}"
"""Names a file that exists: other settings are refused before it is opened."""

COMMANDS = {
    "train.py": train.command,
    "scripts/evaluate.py": scripts.evaluate.main,
    "scripts/generate.py": scripts.generate.main,
    "scripts/preflight.py": scripts.preflight.main,
    "scripts/probe.py": scripts.probe.main,
    "scripts/show_pattern.py": scripts.show_pattern.main,
}


@pytest.mark.parametrize(
    ("command", "overrides", "key"),
    [
        ("train.py", ["trainer.strategy=foo"], "trainer.strategy=foo"),
        ("train.py", ["trainer.devices=0"], "trainer.devices=0"),
        ("train.py", ["data.batch_size=2.5"], "data.batch_size=2.5"),
        ("train.py", ["optimizer.betas=0.9"], "optimizer.betas=0.9"),
        ("train.py", ["logger=wandb", "logger.mode=offlin"], "logger.mode=offlin"),
        ("train.py", ["evaluation.long_document=x"], "evaluation.long_document=x"),
        ("train.py", ["name=null"], "name=null"),
        ("train.py", ["resume=5"], "resume=5"),
        ("train.py", ["init_from=5"], "init_from=5"),
        ("train.py", ["~optimizer.epsilon"], "optimizer.epsilon: missing"),
        ("train.py", ["sede=3"], "sede: no such key; ... seed"),
        ("train.py", ["data.tokenizer=bytes"], "data.tokenizer=bytes: must be data/tokenizer=bytes"),
        ("train.py", ["logger.mode=offline"], "logger.mode: no such key; the keys here are name; logger=wandb has it"),
        (
            "train.py",
            ["resume=outputs/run", "data.source.streams=4"],
            "data.source.streams=4: must not be set with resume, which may change only data.path, ... init_",
        ),
        (
            "train.py",
            ["resume=outputs/run", "logger.mode=offline"],
            "logger.mode: no such key; ... logger=wandb has it",
        ),
        ("train.py", ["resume=outputs/run", "data=files"], "data=files: must not be set with resume"),
        (
            "train.py",
            ["init_from=nowhere", "data=tokens", "data.path=x"],
            "init_from=nowhere: no checkpoint at nowhere",
        ),
        ("train.py", ["attention=windw"], "attention=windw: must be one of ... window"),
        ("train.py", ["data=files"], "data.path: must be set: books/ or"),
        ("train.py", ["data=tokens", "data.path=x"], "data.tokenizer.path: must be set: a run's folder, or a"),
        (
            "train.py",
            ["data.tokenizer.path=tokenizer.json"],
            "data.tokenizer.path: no such key; the keys here are _target_, vocabulary; data/tokenizer=saved has it",
        ),
        ("train.py", ["data.source.time_column=t"], "data.source.time_column: no such key; ... data=timeseries has it"),
        ("train.py", ["preflight=maybe"], "preflight=maybe: must be warn, refuse or off"),
        ("train.py", ["-m", "sweep=widths"], "sweep=widths: must be one of extend, extend_32k, extend_64k, lengths, "),
        ("train.py", ["model.hidden=64"], "model.hidden: no such key; it is model.mlp_width now"),
        ("train.py", ["+model.hidden=64"], "model.hidden=64: must be model.mlp_width"),
        ("train.py", ["-m", "sweep=patterns", "model.hidden=64"], "it is model.mlp_width now"),
        ("train.py", ["-m", "sweep=patterns", "sweep.isolate=maybe"], "sweep.isolate=maybe"),
        ("train.py", ["-m", "sweep=search", "sweep.search.trials=0"], "sweep.search.trials=0"),
        ("scripts/evaluate.py", ["checkpoint=x", "evaluation.tokens_at_once=null"], "evaluation.tokens_at_once=null"),
        ("scripts/evaluate.py", [], "checkpoint: must be set: a run's folder"),
        ("scripts/evaluate.py", ["checkpoint=5"], "checkpoint=5"),
        ("scripts/evaluate.py", ["checkpoint=nowhere", "accelerator=cpu"], "at nowhere: give a run folder"),
        ("scripts/evaluate.py", ["checkpoint=x", "suite=speed"], "suite=speed"),
        ("scripts/evaluate.py", ["checkpoint=x", "data=tokens"], "data=tokens: must be a source of texts"),
        ("scripts/evaluate.py", ["checkpoint=x", "data=tokens", "data/tokenizer=token_ids"], "data=tokens: must be"),
        (
            "scripts/evaluate.py",
            ["checkpoint=x", "data=mixture", "data.source.sources=[{data:tokens,weight:1,path:x}]"],
            "data.source.sources: tokens: data=tokens: must be a source of texts",
        ),
        ("scripts/evaluate.py", ["checkpoint=x", "data=hub", "data.source.streaming=true"], "streaming=true: must be"),
        (
            "scripts/evaluate.py",
            ["checkpoint=x", "data=files", "data.path=.", "data/tokenizer=bytes"],
            "data/tokenizer=bytes: must be left out",
        ),
        ("scripts/evaluate.py", [A_FILE, "data=files", "data.path=nowhere"], "data.path=nowhere: must be a file"),
        ("scripts/evaluate.py", [A_FILE, f"output={__file__}/x"], f"output={__file__}/x: must be a path that can"),
        ("scripts/evaluate.py", ["checkpoint=x", "suite=recall", "recall.samples=a"], "recall.samples=a"),
        ("scripts/generate.py", ["checkpoint=x", "temperature=nan"], "temperature=nan"),
        ("scripts/generate.py", ["checkpoint=x", "accelerator=tpu"], "accelerator=tpu"),
        ("scripts/preflight.py", ["output=5"], "output=5"),
        ("scripts/preflight.py", ["attention.backend=reference"], "attention.backend=reference"),
        ("scripts/probe.py", [], "checkpoint"),
        ("scripts/probe.py", ["checkpoint=nowhere", "accelerator=cpu"], "at nowhere: give a run folder"),
        ("scripts/probe.py", ["checkpoint=x", "measure=some"], "measure=some: must be octaves or all"),
        ("scripts/probe.py", ["checkpoint=x", "length=0"], "length=0"),
        ("scripts/probe.py", ["data=tokens"], "data=tokens: must be a source of texts"),
        ("scripts/probe.py", [A_FILE, "data=files", "data.path=nowhere"], "data.path=nowhere: must be a file"),
        ("scripts/probe.py", ["checkpoint=x", "attention=windw"], "attention=windw: must be one of ... window"),
        (
            "scripts/probe.py",
            [A_FILE, "attention.patterns.local.width=0"],
            "attention.patterns.local.width=0",
        ),
        ("scripts/probe.py", [A_FILE, "attention=growing_window"], "attention.patterns=[window_128,"),
        ("scripts/probe.py", ["checkpoint=x", "attention.schedule=[local]"], "attention.schedule=[local]: must be"),
        ("scripts/show_pattern.py", ["length=null"], "length=null"),
        ("train.py", ["max_steps=3"], "max_steps: no such key; ... similar: trainer.max_steps"),
        ("train.py", ["data.pth=x"], "data.pth: no such key; ... similar: data.path"),
        ("train.py", ["--max_steps", "3"], "--max_steps: no such option; settings are written max_steps=VALUE"),
        ("train.py", ["seed=1", "-m", "sweep=patterns"], "sweep=patterns: must stand beside the other settings"),
        ("train.py", ["data=books/"], "data=books/: must be one of books, code, files"),
        (
            "train.py",
            ["data/tokenizer=../tokenizer.json"],
            "data/tokenizer=../tokenizer.json: must be one of bins, bpe",
        ),
        ("train.py", ["data=files,books"], "data=files,books: must be one value; ... a sweep needs -m"),
        (
            "scripts/evaluate.py",
            ["checkpoint=a,b"],
            "checkpoint=a,b: must be one value; a list is 'checkpoint=[a,b]', a",
        ),
        (
            "scripts/generate.py",
            ["prompt=a, b"],
            "prompt=a, b: must be one value; ... a text with a comma 'prompt=\"a, b\"'",
        ),
        ("scripts/generate.py", ["prompt=What's up"], "prompt=What's up: must be key=value, ... 'prompt=\"...\"'"),
    ],
)
def test_a_wrong_setting_is_one_line_before_a_folder_exists(command, overrides, key, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, *overrides])
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        console.run(COMMANDS[command])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(("error: ", "error: trainer.accelerator=cpu trainer.devices=1 "))
    assert all(words in lines[0] for words in key.split("... "))
    assert not list(tmp_path.iterdir())


def test_a_process_of_its_own_ends_in_the_same_line(tmp_path):
    result = run_forked("train.py", "trainer.strategy=foo", f"outputs={tmp_path / 'outputs'}", check=False)
    assert result.returncode == 2 and "trainer.strategy=foo" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()
