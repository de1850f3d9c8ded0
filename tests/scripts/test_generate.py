"""scripts/generate.py as a whole."""

import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from model.decoding.streaming import TextStream
from scripts.generate import write
from tests.commands import compose, run_forked
from tests.scripts.runs import make_run, write_books


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    books = write_books(folder / "books")
    return make_run(folder / "outputs", books, "attention.patterns.local.width=24", name="window")


def generate(checkpoint: Path, *overrides: str) -> list[str]:
    return write(compose(f"checkpoint={checkpoint}", "accelerator=cpu", *overrides, config_name="generate"))


def test_the_command_prints_the_text_and_nothing_else_to_standard_output(trained):
    arguments = [f"checkpoint={trained}", "prompt='the river'", "new_tokens=30", "accelerator=cpu"]
    result = run_forked("scripts/generate.py", *arguments)
    assert result.stdout.startswith("the river") and len(result.stdout) > 30
    (expected,) = generate(trained, "prompt='the river'", "new_tokens=30")
    assert result.stdout == f"the river{expected}\n"
    assert "first token after" in result.stderr and "stored" in result.stderr


def test_several_prompts_are_continued_as_each_alone(trained, capsys):
    several = generate(trained, "prompt=[the,'of the wind and']", "new_tokens=20", "temperature=0")
    for prompt, text in zip(("the", "'of the wind and'"), several, strict=True):
        assert generate(trained, f"prompt={prompt}", "new_tokens=20", "temperature=0") == [text]
    printed = capsys.readouterr().out
    assert printed.startswith(f"the{several[0]}\n\nof the wind and{several[1]}\n\n")


def test_a_stop_string_ends_the_text(trained):
    (whole,) = generate(trained, "new_tokens=60")
    stop = whole[10:12]
    (cut,) = generate(trained, "new_tokens=60", f"stop=['{stop}']")
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("override", "stop"),
    [
        (r'stop=["\n\n"]', ["\n\n"]),  # as docs/evaluation.md writes it
        (r"stop='\n'", ["\n"]),
        (r"stop=['a\tb','\r']", ["a\tb", "\r"]),
        (r'stop=["\\n"]', ["\\n"]),
        ("stop=null", []),
    ],
)
def test_escapes_of_a_stop_string_are_read(trained, monkeypatch, override, stop):
    given = []

    class Recorded(TextStream):
        def __init__(self, decode, stop):
            given.append(stop)
            super().__init__(decode, stop)

    monkeypatch.setattr("model.decoding.streaming.TextStream", Recorded)
    generate(trained, "new_tokens=1", override)
    assert given == [stop]


def test_a_run_speaks_without_its_documents(trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    checkpoint = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["data"]["path"] = "/no/such/folder"
    torch.save(checkpoint, moved / "checkpoints/last.ckpt")
    assert generate(moved, "new_tokens=10") == generate(trained, "new_tokens=10")


def test_a_prompt_may_be_a_file(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("the river")
    from_file = generate(trained, f"prompt_file={tmp_path / 'prompt.txt'}", "new_tokens=10")
    assert from_file == generate(trained, "prompt='the river'", "new_tokens=10")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt_file=/no/such.txt"], r"prompt_file=/no/such.txt: no such file"),
        (["prompt_file=/no/such.txt", "prompt=a"], "prompt must then be empty"),
        (["prompt=[]"], r"prompt=\[\]: must be a text"),
        (["prompt=true"], "prompt=true: must be a text"),
        (["prompt=null"], "prompt=null: must be a text"),
        (["prompt=5"], "prompt=5: must be a text"),
        (["prompt=[a,5]"], r"prompt=\[a,5\]: must be a text"),
        (["stop=5"], "stop=5: must be a text"),
        (["stop=true"], "stop=true: must be a text"),
        (["stop=0"], "stop=0: must be a text"),
        (["stop=['']"], r"stop=\[''\]: must be a text"),
        ([r"stop=['\d']"], r"stop=.*: must have .*has .d$"),
        (["temperature=-1"], "temperature=-1: must be a number >= 0"),
        (["cuda_graph=true"], "cuda_graph=true: the model is on cpu, and must be on cuda"),
        (["cuda_graph=maybe"], "cuda_graph=maybe: must be auto, true or false"),
        (["new_tokens=0"], "new_tokens=0: must be an integer >= 1"),
        (["new_tokens=2000000"], "new_tokens=2000000: prompt and continuation would be"),
    ],
)
def test_what_cannot_be_is_one_line(trained, overrides, message):
    with pytest.raises(ConfigError, match=message):
        generate(trained, *overrides)
