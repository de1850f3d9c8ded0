"""init_from=hf:FOLDER: sizes, attention, weights and tokenizer of a model in Hugging Face's format."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from configs import pretrained
from configs.build import ConfigError, build_model, build_plan
from configs.checks import check
from configs.pretrained import patterns_of, schedule_of
from configs.runs import open_run, start_from
from data.tokenizers import load
from kernels.patterns import Window
from model.pretrained.config_file import Architecture
from model.pretrained.errors import PretrainedError
from model.pretrained.names import from_hugging_face
from scripts.sweeping.composer import Composer
from scripts.sweeping.plan import Plan
from tests.commands import compose, resolved
from tests.model.pretrained.folders import TEXT, weights_in, write_folder
from tests.scripts.runs import write_books
from train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "mistral")


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    return write_books(tmp_path_factory.mktemp("text") / "books")


def start(folder: Path, books: Path, *overrides: str) -> list[str]:
    """A command line that starts from `folder`."""
    cache = f"data.cache={books.parent / 'cache'}"
    return [
        *("model=hf", f"init_from=hf:{folder}", "data=files", f"data.path={books}", cache, "data.sequence_length=64"),
        *("attention.block=16", "trainer=cpu", "trainer.max_steps=2", "evaluation.baselines=false"),
        *overrides,
    ]


def test_sizes_attention_and_tokenizer_are_those_of_the_folder(folder, books):
    config = resolved(*start(folder, books))
    sizes = {key: config["model"][key] for key in ("width", "layers", "kv_heads", "vocabulary", "max_length")}
    assert sizes == {"width": 32, "layers": 2, "kv_heads": 2, "vocabulary": 320, "max_length": 128}
    assert (config["model"]["rope_theta"], config["model"]["qk_norm"]) == (500.0, False)
    assert config["attention"]["schedule"] == ["local"]
    assert build_plan(config["attention"]).patterns == {"local": Window(24)}
    checked = check(config)
    assert checked.data.tokenizer.identity() == load(folder / "tokenizer.json").identity()


def test_settings_of_the_command_line_replace_those_of_the_folder(folder, books):
    changes = ["attention=window_dense", "model.max_length=4096", "model.rope_theta=1e6", "model.sink_logits=false"]
    config = resolved(*start(folder, books, *changes))
    assert config["attention"] == compose("attention=window_dense", "attention.block=16")["attention"]
    assert (config["model"]["max_length"], config["model"]["rope_theta"]) == (4096, 1e6)
    extended = resolved(*start(folder, books, "model.rope_scaling=yarn_hf", "model.rope_factor=4"))["model"]
    assert {key: value for key, value in extended.items() if key.startswith(("rope", "max"))} == {
        "max_length": 512,
        "rope_theta": 500.0,
        "rope_scaling": "yarn_hf",
        "rope_factor": 4,
        "rope_original_length": 128,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_attention_factor": None,
        "rope_truncate": True,
    }


def test_another_scaling_replaces_that_of_the_folder_as_a_whole(tmp_path, books):
    yarn = dict(rope_type="yarn", factor=4.0, beta_fast=8, attention_factor=0.5, original_max_position_embeddings=32)
    folder = write_folder(tmp_path / "yarn", rope_scaling=yarn)
    kept = resolved(*start(folder, books, "model.rope_factor=16"))["model"]
    assert (kept["rope_scaling"], kept["rope_beta_fast"], kept["rope_attention_factor"]) == ("yarn_hf", 8.0, 0.5)
    assert (kept["rope_original_length"], kept["max_length"]) == (32, 512)
    linear = resolved(*start(folder, books, "model.rope_scaling=linear", "model.rope_factor=2"))["model"]
    assert (linear["rope_factor"], linear["rope_attention_factor"], linear["rope_original_length"]) == (2, None, 32)


def test_a_model_starts_with_the_weights_of_the_folder(folder, books):
    config = resolved(*start(folder, books, "attention=dense"))
    model = build_model(config, 300)
    start_from(config["init_from"], model, SimpleNamespace(tokenizer=load(folder / "tokenizer.json")))
    own = dict(model.named_parameters())
    stored = weights_in(folder)
    assert {from_hugging_face(name) for name in stored} == own.keys()
    assert all(torch.equal(own[from_hugging_face(name)], value) for name, value in stored.items())


def test_another_tokenizer_is_a_warning(folder, books, caplog):
    config = resolved(*start(folder, books, "data/tokenizer=bytes"))
    start_from(config["init_from"], build_model(config, 257), check(config).data)
    assert any("another tokenizer" in message and str(folder) in message for message in caplog.messages)


def test_a_run_trains_from_the_folder_and_opens_without_it(folder, books, tmp_path):
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        summary = train(resolved(*start(moved, books, f"outputs={tmp_path / 'outputs'}", "preflight=off")))
    finally:
        moved.rename(folder)
    (run,) = (tmp_path / "outputs" / "hf").iterdir()
    assert summary["state"] == "finished"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["init_from"] == f"hf:{moved}" and saved["model"]["width"] == 32
    opened = open_run(run, "cpu", "32-true")
    assert opened.model.plan.patterns == {"local": Window(24)}
    assert opened.tokenizer.identity() == load(folder / "tokenizer.json").identity()
    assert resolved(f"resume={run}")["model"] == saved["model"]
    assert opened.start == ["model=hf", f"init_from={run / 'checkpoints/last.ckpt'}"]
    continued = resolved(*start(folder, books, *opened.start, "attention=window_dense", "model.rope_theta=900"))
    assert continued["model"] == saved["model"] | {"rope_theta": 900}
    build_model(continued, opened.tokenizer.vocabulary)
    with pytest.raises(ConfigError, match=r"^attention=hf: "):
        resolved(*start(folder, books, *opened.start))
    with pytest.raises(ConfigError, match=r"^init_from=/no/such/run: "):
        resolved(*start(folder, books, "init_from=/no/such/run", "attention=dense"))


def test_jobs_of_a_sweep_start_from_the_folder(folder, books):
    overrides = start(folder, books, "sweep=patterns", "sweep.match=null", "sweep.vary={attention:[dense,hf]}")
    with Composer(overrides) as composer:
        drafts = Plan(composer).drafts()
    assert [draft.config["attention"]["schedule"] for draft in drafts] == [["full"], ["local"]]
    assert all(draft.config["model"]["width"] == 32 for draft in drafts)


def test_the_control_of_a_sweep_has_the_rotary_embeddings_of_the_folder(tmp_path, books):
    """Not a scaling that extends the others; that of config.json stays."""
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    folder = write_folder(tmp_path / "llama3", rope_parameters=rope | dict(original_max_position_embeddings=32))
    longer = ["model.rope_scaling=yarn_hf", "model.rope_factor=2", "model.rope_original_length=32"]
    settings = ["sweep.match=null", "sweep.control=32", "sweep.vary={attention:[dense]}", *longer]
    with Composer(start(folder, books, "sweep=patterns", *settings)) as composer:
        dense, control = Plan(composer).drafts()
    assert dense.config["model"]["rope_scaling"] == "yarn_hf" and control.config["model"]["rope_scaling"] == "llama3"
    assert control.config["model"]["rope_factor"] == 8


@pytest.mark.parametrize(
    ("windows", "schedule"),
    [
        ([None] * 4, ["full"]),
        ([8, 8, None] * 3, ["local", "local", "full"]),
        ([8, None, 8, None, 8], ["local", "full"]),
        ([8, 8, None, 8], ["local", "local", "full"]),
        ([None, 8, 8, 8], ["full", "local", "local", "local"]),
    ],
)
def test_the_schedule_is_the_shortest_that_gives_every_layer_its_window(windows, schedule):
    assert schedule_of(Architecture({}, tuple(windows))) == schedule


def test_layers_of_the_folder_without_rotary_embeddings_have_none(tmp_path, books, caplog):
    """Under another attention, which may rotate them, a warning names them."""
    smol = dict(model_type="smollm3", architectures=["SmolLM3ForCausalLM"], sliding_window=None, no_rope_layers=[1, 0])
    folder = write_folder(tmp_path / "smollm3", **smol)
    plan = build_plan(resolved(*start(folder, books))["attention"])
    assert [plan.rope_of(layer) for layer in range(2)] == ["model", "none"] and not caplog.records
    plan = build_plan(resolved(*start(folder, books, "attention=dense"))["attention"])
    assert plan.rope_of(1) == "model" and f"layers 1 of hf:{folder}" in caplog.text


def test_layers_without_rotary_embeddings_have_a_pattern_of_their_own():
    found = Architecture({}, (None, 8, None, 8), frozenset({0, 2}))
    assert schedule_of(found) == ["full_unrotated", "local"]
    entries = {name: entry.get("rope") for name, entry in patterns_of(found).items()}
    assert entries == {"full_unrotated": "none", "local": None}


# Evaluation and generation without a run


def test_a_folder_is_opened_as_a_run(folder):
    run = open_run(f"hf:{folder}", "cpu", "32-true")
    assert run.model.patterns == [Window(24)] * 2 and not run.model.training
    assert torch.equal(run.model.lm_head.weight, weights_in(folder)["lm_head.weight"])
    assert run.tokenizer.decode(run.tokenizer.encode(TEXT)) == TEXT
    assert run.label == "hf/mistral" and run.sequence_length == 128


def test_a_folder_is_evaluated_and_continues_a_text(folder, books, tmp_path, capsys):
    from scripts.evaluate import evaluate
    from scripts.generate import write

    output = tmp_path / "evaluation.json"
    command = ["accelerator=cpu", "data=files", f"data.path={books / 'test'}", f"output={output}"]
    row = evaluate(compose(f"checkpoint=hf:{folder}", *command, config_name="evaluate"))
    (written,) = json.loads(output.read_text())["rows"]
    assert row["bits_per_byte"] > 0 and written["loss"] == row["loss"]
    generated = ["prompt=the river", "temperature=0", "new_tokens=4", "accelerator=cpu"]
    (text,) = write(compose(f"checkpoint=hf:{folder}", *generated, config_name="generate"))
    assert text and "the river" + text in capsys.readouterr().out


# What is refused, before anything is written


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        check(resolved(*overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["model=nano"], ["model=nano", "hf with init_from=hf:"]),
        (["init_from=null"], ["model=hf", "init_from=hf:FOLDER"]),
        (["init_from=3"], ["model=hf", "init_from=hf:FOLDER"]),
        (["init_from=null", "model=nano", "attention=hf"], ["attention=hf", "init_from=hf:FOLDER"]),
        (["init_from=hf:/no/such/folder"], ["hf:/no/such/folder", "config.json", "OWNER/NAME"]),
        (["model.width=64"], ["model.embed_tokens.weight", "[320, 32]", "[320, 64]"]),
        (["model.qk_norm=true"], ["q_norm.weight"]),
        (["model.sink_logits=true"], ["sink_logits"]),
        (["model.vocabulary=290"], ["model.vocabulary=290", "tokenizer.json"]),
        (["data.sequence_length=256"], ["data.sequence_length=256", "model.max_length=128"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_settings_that_do_not_fit_the_folder_are_one_line(folder, books, changes, named):
    line = refused(*start(folder, books, *changes))
    assert all(words in line for words in named), line


def test_a_folder_that_cannot_be_read_is_one_line_before_any_corpus_is_prepared(tmp_path, books):
    folder = write_folder(tmp_path / "a")
    tensors = weights_in(folder)
    save_file({**tensors, "model.norm.weight": torch.ones(31)}, folder / "model.safetensors")
    assert "model.norm.weight has the shape [31]: must be [32]" in refused(*start(folder, books))
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: must be a whole safetensors file" in refused(*start(folder, books))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors.index.json" in refused(*start(folder, books))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(PretrainedError, match=r"adapter_config\.json"):
        resolved(*start(folder, books))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, books):
    folder = write_folder(tmp_path / "a", vocab_size=260)
    line = refused(*start(folder, books))
    size = load(folder / "tokenizer.json").vocabulary
    assert size > 260 and f"model.vocabulary=260: must be at least {size}" in line and "tokenizer.json" in line


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, books):
    folder = write_folder(tmp_path / "a")
    (folder / "tokenizer.json").unlink()
    line = refused(*start(folder, books))
    assert f"init_from=hf:{folder}" in line and "tokenizer.json" in line
    check(resolved(*start(folder, books, "data/tokenizer=bytes")))
    with pytest.raises(ValueError, match=r"checkpoint=hf:\S+: must have a tokenizer\.json"):
        open_run(f"hf:{folder}", "cpu", "32-true")


def test_a_name_of_the_hub_is_downloaded_without_other_formats(folder, monkeypatch):
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "no/model":
            raise OSError("no network\nand a long story")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert pretrained.pretrained_folder("hf:owner/name") == folder
    ((name, patterns),) = asked
    assert name == "owner/name" and {"*.json", "model*.safetensors"} <= set(patterns)
    with pytest.raises(ValueError, match=r"^hf:no/model: must be .*no network$"):
        pretrained.pretrained_folder("hf:no/model")
