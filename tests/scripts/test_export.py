"""scripts/export.py as a whole: the folder that it writes, the tokenizer in it, and wrong settings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.runs import open_run
from data.tokenizers import load
from scripts.export import export_run
from tests.commands import compose, run_forked
from tests.scripts.runs import make_run, write_books

transformers = pytest.importorskip("transformers")

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TEXTS = (
    "the river walked",
    "  seven\n\n\tstones,  over;",
    "naïve café 東京 \U0001f600",
    "<|bos|>the <|bos|>",
    "don't , stop .",
    "",
)
RUNS = {
    "bpe": ("attention.patterns.local.width=24",),
    "bytes": (
        "data.tokenizer._target_=data.tokenizers.Bytes",
        "~data.tokenizer.vocabulary",
        "attention=window_dense",
        "model.layers=6",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    books = write_books(folder / "books")
    return {name: make_run(folder / "outputs", books, *settings, name=name) for name, settings in RUNS.items()}


def export(checkpoint: Path | str, output: Path, *overrides: str) -> list[Path]:
    return export_run(compose(f"checkpoint={checkpoint}", f"output={output}", *overrides, config_name="export"))


def test_the_command_writes_a_folder_and_prints_how_to_load_it(runs, tmp_path):
    output = tmp_path / "exported"
    result = run_forked(
        "scripts/export.py", f"checkpoint={runs['bpe']}", "format=hf", f"output={output}", "dtype=bfloat16"
    )
    assert {file.name for file in output.iterdir()} == FILES
    assert all(str(output / file) in result.stdout for file in FILES)
    assert [file.name for file in tmp_path.iterdir()] == ["exported"]
    names: dict = {}
    exec(result.stdout[result.stdout.index("from transformers") :], names)
    assert names["model"].dtype == torch.bfloat16
    assert names["tokenizer"].bos_token == "<|bos|>"


@pytest.mark.parametrize("name", RUNS)
def test_the_tokenizer_encodes_and_decodes_as_ours(runs, tmp_path, name):
    export(runs[name], tmp_path / "exported")
    ours = open_run(runs[name], "cpu", "32-true").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    again = load(tmp_path / "exported" / "tokenizer.json")
    assert (again.bos, again.vocabulary) == (ours.bos, ours.vocabulary)
    for text in TEXTS:
        tokens = [int(token) for token in ours.encode(text)]
        assert theirs.encode(text, add_special_tokens=False) == tokens
        assert theirs.encode(text) == [ours.bos, *tokens]
        assert again.encode(text).tolist() == tokens
        assert theirs.decode(tokens) == text
        assert theirs.decode([ours.bos, *tokens], skip_special_tokens=True) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.bos
    batch = theirs(["the river", "the"], padding=True)
    assert [sum(mask) for mask in batch["attention_mask"]] == [len(ours.encode(t)) + 1 for t in ("the river", "the")]


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_a_text_has_the_same_loss_in_both(runs, tmp_path, name):
    export(runs[name], tmp_path / "exported")
    ours = open_run(runs[name], "cpu", "32-true")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "the quiet river walked under the stone and seven light wind over night " * 4
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    own = torch.from_numpy(np.array([ours.tokenizer.bos, *ours.tokenizer.encode(text)], dtype=np.int64))[None]
    targets = torch.cat([own[:, 1:], torch.full((1, 1), -100)], 1)
    position = torch.arange(own.shape[1])[None]
    loss = ours.model.loss(own, targets, position, ours.model.build_layouts(None, own.shape[1]))
    assert theirs(tokens, labels=tokens).loss.item() == pytest.approx((loss.total / loss.count).item(), abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_an_exported_folder_that_is_exported_again_is_the_same(runs, tmp_path, name):
    export(runs[name], tmp_path / "once")
    export(f"hf:{tmp_path / 'once'}", tmp_path / "twice")
    assert {file.name for file in (tmp_path / "twice").iterdir()} == FILES
    for file in FILES:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


def test_a_whole_folder_is_not_overwritten(runs, tmp_path):
    (tmp_path / "exported").mkdir()
    export(runs["bpe"], tmp_path / "exported")  # an empty folder may be there
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "exported").iterdir()}
    with pytest.raises(ConfigError, match=r"^output=.*exported: must be a folder that does not exist yet, or an empty"):
        export(runs["bpe"], tmp_path / "exported")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "exported").iterdir()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=gguf"], "format=gguf: must be hf"),
        (["dtype=float16"], "dtype=float16: must be float32 or bfloat16"),
        (["output=null"], "output=null: must be a text"),
    ],
)
def test_wrong_settings_are_one_line(runs, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        export(runs["bpe"], tmp_path / "exported", *overrides)


def test_a_run_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^checkpoint=.*missing: no checkpoint at .*missing"):
        export(tmp_path / "missing", tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_transformers_lacks_is_loaded_with_our_file(runs, tmp_path, capsys):
    strided = make_run(tmp_path, runs["bpe"].parents[2] / "books", "attention=strided", name="strided")
    export(strided, tmp_path / "exported")
    printed = capsys.readouterr().out
    names: dict = {}
    exec(printed[printed.index("import sys") :], names)
    assert type(names["model"]).__name__ == "FarsightForCausalLM"


def test_a_run_whose_pattern_does_not_fit_is_one_line(runs, tmp_path):
    routed = make_run(tmp_path, runs["bpe"].parents[2] / "books", "attention=routed", name="routed")
    with pytest.raises(ConfigError) as error:
        export(routed, tmp_path / "exported")
    line = str(error.value)
    assert line.startswith(f"checkpoint={routed}: attention.patterns.routed: must be a mask") and "\n" not in line
    assert not (tmp_path / "exported").exists()
