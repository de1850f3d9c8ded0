"""scripts/show_pattern.py: its table, its masks in characters, and its picture."""

import numpy as np
import torch

from scripts.show_pattern import terminal_picture
from tests.commands import run_forked


def test_a_mask_in_characters_is_darker_where_more_pairs_are_visible():
    lines = terminal_picture(torch.ones(32, 32).tril().bool(), rows=8).split("\n")
    assert len(lines) == 8 and lines[-1][:2] == "██" and lines[0][-2:] == "  " and lines[0][:2] == "▓▓"


def test_a_mask_that_fills_no_whole_number_of_cells_is_as_dark_at_its_end():
    lines = terminal_picture(torch.ones(256, 256).tril().bool()).split("\n")
    assert len(lines) == 24
    for row, line in enumerate(lines):
        assert line == "██" * row + "▓▓" + "  " * (23 - row), "no cell above the diagonal looks visible"


def test_the_command_prints_density_masks_and_reach(tmp_path):
    arguments = ("attention=window", "attention.patterns.local.width=32", "length=512", "reach_length=256", "zoom=64")
    result = run_forked("scripts/show_pattern.py", *arguments, "layers=3", f"output={tmp_path}/w.png")
    text = " ".join(result.stdout.split())
    for words in (
        "reach by depth",
        "local, 256 tokens",
        "local, the last 64",
        "seen by some layer",
        "warning: after 3",
    ):
        assert words in text, words
    import matplotlib.image

    picture = matplotlib.image.imread(tmp_path / "w.png")
    assert picture.shape[0] > 1.5 * picture.shape[1], "whole above, zoomed below"
    assert np.ptp(picture[..., 0]) > 0.5
    dense = run_forked(
        "scripts/show_pattern.py", "attention=dense", "length=256", "reach_length=128", f"output={tmp_path}/d.png"
    )
    assert "warning" not in dense.stdout
