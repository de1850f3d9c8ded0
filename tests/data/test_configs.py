"""Every configs/data/*.yaml has a comment with a command, parses, and builds its data module."""

import inspect
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from data import DataModule

FOLDER = Path(__file__).parents[2] / "configs" / "data"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem not in ("base", "mixture"))
"""All but the group that configs/mixture.py builds."""


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        return compose(None, [f"+data={name}", "+seed=5", *overrides]).data


@pytest.mark.parametrize("name", NAMES)
def test_its_comment_ends_with_a_command(name):
    comment = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert f"# Try: python train.py data={name}" in comment[-1]


@pytest.mark.parametrize("name", NAMES)
def test_its_keys_are_the_constructors(name, tmp_path):
    for file in ("a.txt", "a.fa", "a.csv", "train.bin", "val.bin"):
        (tmp_path / file).write_text("a")
    (tmp_path / "tokenizer.json").write_text('{"tokenizer": "bytes"}')
    tokenizer = [f"data.tokenizer.path={tmp_path}"] if name == "tokens" else []
    config = composed(name, f"data.path={tmp_path if name != 'stdlib' else 'null'}", *tokenizer)
    assert set(config) - {"_target_"} == set(inspect.signature(DataModule).parameters)
    defaults = [parameter.default for parameter in inspect.signature(DataModule).parameters.values()]
    assert set(defaults) == {inspect.Parameter.empty}  # the YAML owns them
    datamodule = instantiate(config)
    assert (datamodule.seed, datamodule.sequence_length) == (5, 4096)


def test_files_from_the_command_line(books, tmp_path):
    datamodule = instantiate(
        composed("files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "data.sequence_length=128")
    )
    datamodule.setup()
    batch = next(iter(datamodule.train_dataloader()))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        name: (datamodule.batch_size, 128) for name in ("tokens", "targets", "document", "position")
    }


def test_a_local_dataset_by_the_hubs_loader(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"body": f"document {number} " * 30} for number in range(200)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datamodule = instantiate(
        composed(
            "hub",
            f"data.path={folder}",
            f"data.cache={tmp_path / 'cache'}",
            "data.source.text_column=body",
            "data.sequence_length=64",
            "data.tokenizer={_target_: data.tokenizers.Bytes}",
            "~data.tokenizer.vocabulary",
        )
    )
    datamodule.setup()
    assert datamodule.vocabulary == 257
    assert sum(len(split) for split in datamodule.corpus.splits.values()) == 200


def test_a_genome_is_read_by_bases_unless_a_tokenizer_is_chosen():
    assert composed("genome", "data.path=x").tokenizer._target_ == "data.tokenizers.Bytes"
    assert composed("genome", "data.path=x", "data/tokenizer=bpe_512").tokenizer.vocabulary == 512
