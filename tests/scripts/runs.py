"""Run folders as train.py leaves them, made in a second: random weights, a corpus of a few files."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.build import build_data, build_model
from data.tokenizers import Tokenizer
from model.training.run_folder import RunFolder
from tests.commands import compose
from tests.model.small import lively

SMALL = (
    *(
        "model.width=32",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=2",
        "model.head_dim=8",
        "model.mlp_width=64",
    ),
    *("data.tokenizer.vocabulary=300", "data.sequence_length=64", "attention.block=16", "optimizer=adamw"),
)
SHORT = ("trainer.max_steps=2", "trainer.validate_every=2", "evaluation=chunked", "evaluation.baselines=false")
WORDS = ("the", "and", "of", "river", "stone", "light", "walked", "under", "night", "seven", "over", "quiet", "wind")


def write_books(folder: Path, documents: int = 12, words: int = 150) -> Path:
    """Train, validation and test folders of text files of about 2 to 8 kB."""
    folder.mkdir(parents=True)
    for split, count in (("train", documents), ("valid", 2), ("test", 4)):
        (folder / split).mkdir()
        for number in range(count):
            generator = random.Random(f"{split}{number}")
            text = " ".join(generator.choices(WORDS, k=words + 40 * number))
            (folder / split / f"{number:02}.txt").write_text(text + "\n")
    return folder


def make_run(
    outputs: Path, books: Path | None, *overrides: str, name: str = "run", seed: int = 0, small: Sequence[str] = SMALL
) -> Path:
    """An untrained run in `outputs`/`name`/first. `books`: data.path; None for a mixture."""
    config: dict[str, Any] = compose(*small, "data=files", "data.path=books", *overrides)
    config["data"] |= {"path": books and str(books), "cache": str(outputs / "cache")}
    config["name"] = name
    data = build_data(config["data"])
    data.setup()
    model = lively(build_model(config, data.vocabulary), seed)
    folder = RunFolder.create(outputs / name / "first", config)
    data.tokenizer.save(folder.path / "tokenizer.json")
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    checkpoint = {"state_dict": weights, "hyper_parameters": config, "DataModule": data.state_dict()}
    torch.save(checkpoint, folder.checkpoints / "last.ckpt")
    return folder.path


def add_file(books: Path, split: str = "train") -> None:
    """A document whose words are others, so that a tokenizer that learns from it is another."""
    (books / split / "added.txt").write_text("zebra quartz vexing jukebox " * 80)


def build_tokenizer(config: dict) -> Tokenizer:
    """The tokenizer of a composed training config, trained on its corpus if it must be."""
    data = build_data(config["data"])
    data.setup()
    return data.tokenizer
