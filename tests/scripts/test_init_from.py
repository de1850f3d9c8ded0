"""A run that starts from another run's weights: its tokenizer, its sizes, and what it needs of the other run."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.build import ConfigError
from configs.checks import check
from data import CorpusError
from data.tokenizers import Bytes, load
from tests.commands import compose, resolved
from tests.scripts.runs import SHORT, SMALL, add_file, build_tokenizer, make_run, write_books
from train import train


@pytest.fixture
def run(tmp_path, books) -> Path:
    return make_run(tmp_path / "outputs", books, "attention.patterns.local.width=24")


@pytest.fixture
def others(tmp_path) -> Path:
    """Another corpus, whose tokenizer would be another one of the same size."""
    books = write_books(tmp_path / "others")
    for split in ("train", "valid", "test"):
        add_file(books, split)
    return books


def heir(run: Path, corpus: Path, tmp_path: Path, *overrides: str) -> dict:
    place = (f"outputs={tmp_path}", f"data.path={corpus}", f"data.cache={tmp_path / 'cache'}", "name=heir")
    small = [setting for setting in SMALL if "vocabulary" not in setting]
    return resolved(*small, "data=files", *place, *SHORT, f"init_from={run}", *overrides)


@pytest.mark.parametrize("start", ["", "/last", "/checkpoints/last.ckpt"])
def test_a_run_that_starts_from_anothers_weights_has_its_tokenizer(run, others, tmp_path, start):
    config = heir(Path(f"{run}{start}"), others, tmp_path)
    assert build_tokenizer(config).identity() == load(run / "tokenizer.json").identity()


def test_weights_and_tokenizer_are_trained_on_together(run, others, tmp_path):
    train(heir(run, others, tmp_path))
    (folder,) = (tmp_path / "heir").iterdir()
    assert (folder / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    shutil.rmtree(run)  # and the heir resumes without its source
    assert train(resolved(f"resume={folder}", "trainer.max_steps=3"))["step"] == 3


def test_an_heir_of_a_tokenizer_of_bytes(books, others, tmp_path):
    run = make_run(
        tmp_path / "outputs",
        books,
        "data.tokenizer={_target_: data.tokenizers.Bytes}",
        "~data.tokenizer.vocabulary",
        name="bytes",
    )
    assert build_tokenizer(heir(run, others, tmp_path)).identity() == {"tokenizer": "bytes"}


@pytest.mark.parametrize(
    "choice", ["data/tokenizer=bpe", "data.tokenizer={_target_: data.tokenizers.BPE, vocabulary: 9}"]
)
def test_another_tokenizer_is_one_that_is_named(run, others, tmp_path, choice):
    settings = heir(run, others, tmp_path, choice, "data.tokenizer.vocabulary=300")["data"]["tokenizer"]
    assert settings == {"_target_": "data.tokenizers.BPE", "vocabulary": 300}


def test_a_vocabulary_alone_chooses_no_tokenizer(run, others, tmp_path):
    with pytest.raises(ConfigError, match=rf"data\.tokenizer\.vocabulary=280: .*init_from={run}.*data/tokenizer=bpe"):
        heir(run, others, tmp_path, "data.tokenizer.vocabulary=280")
    config = heir(run, others, tmp_path, "data.tokenizer.vocabulary=300")  # the one that the run was given
    assert build_tokenizer(config).identity() == load(run / "tokenizer.json").identity()


def test_no_setting_of_a_tokenizer_that_is_replaced_is_ignored(run, others, tmp_path):
    """Files of tokens name no tokenizer under init_from; one that is named without data/tokenizer is the run's."""
    (tmp_path / "tokens").mkdir()
    np.zeros(99, "<u2").tofile(tmp_path / "tokens/tokens.bin")
    tokens = ("data=tokens", f"data.path={tmp_path / 'tokens'}")
    config = heir(run, others, tmp_path, *tokens)
    assert config["data"]["tokenizer"]["path"] == str(run / "tokenizer.json")
    assert heir(run, others, tmp_path, *tokens, f"data.tokenizer.path={run}") == config
    Bytes().save(tmp_path / "bytes.json")
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer\.path={tmp_path}/bytes\.json: must be left out"):
        heir(run, others, tmp_path, *tokens, f"data.tokenizer.path={tmp_path}/bytes.json")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer\.lossy=allow: must be left out"):
        heir(run, others, tmp_path, *tokens, "data.tokenizer.lossy=allow")


def test_an_experiments_vocabulary_chooses_none_either(run, others, tmp_path):
    config = heir(run, others, tmp_path, "experiment=gpu_32k", "trainer=cpu")
    assert build_tokenizer(config).identity() == load(run / "tokenizer.json").identity()


def test_weights_without_a_tokenizer_need_one_by_name(run, others, tmp_path):
    lone = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lone.ckpt")
    with pytest.raises(ConfigError, match=rf"init_from={lone}: must have a tokenizer\.json .*data/tokenizer="):
        heir(lone, others, tmp_path)
    named = ("data/tokenizer=saved", f"data.tokenizer.path={run}")
    assert build_tokenizer(heir(lone, others, tmp_path, *named)).identity() == load(run / "tokenizer.json").identity()


def test_a_tokenizer_may_be_saved_for_any_run(run, others, tmp_path):
    place = (f"data.path={others}", f"data.cache={tmp_path / 'cache'}", "data.sequence_length=64")
    for path in (run, run / "tokenizer.json"):
        settings = compose("data=files", *place, "data/tokenizer=saved", f"data.tokenizer.path={path}")
        assert build_tokenizer(settings).identity() == load(run / "tokenizer.json").identity()
    with pytest.raises(CorpusError, match=rf"data\.tokenizer\.path={others}: must be "):
        build_tokenizer(compose("data=files", *place, "data/tokenizer=saved", f"data.tokenizer.path={others}"))


@pytest.mark.parametrize(
    "overrides, error",
    [
        (["model.width=48"], r"must be a run with the sizes of this model: model\.width=48, there \d+; model=hf "),
        (["model.vocabulary=512"], r"must have an embedding of 512 rows, and has 320; .* model\.vocabulary=320$"),
    ],
)
def test_weights_of_other_sizes_are_refused_by_key(run, books, tmp_path, overrides, error):
    with pytest.raises(ConfigError, match=f"^init_from={run}: {error}"):
        train(heir(run, books, tmp_path, *overrides))
    assert not (tmp_path / "heir").exists(), "no run folder"


def test_other_sizes_are_refused_before_documents_are_read(run, books, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.layers=3, there "):
        check(heir(run, books, tmp_path, "model.layers=3"))
    assert not (tmp_path / "cache").exists(), "no corpus"
