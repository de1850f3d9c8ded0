"""Draws docs/tiles.png: the tiles of two patterns' layouts.  PYTHONPATH=. python docs/tiles.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from kernels import Axis, build_layout, patterns

BLOCK, LENGTH = 128, 2048
COLORS = {"full": "#1f4e79", "partial": "#8fb0cf"}
PATTERNS = {
    "window of 400": patterns.Window(width=400),
    "window, global and random blocks": patterns.BlockSparse(
        block_size=128, window_blocks=3, global_blocks=1, random_blocks=1
    ),
}


def main() -> None:
    figure, panels = plt.subplots(1, len(PATTERNS), figsize=(8, 4.3))
    for panel, (title, pattern) in zip(panels, PATTERNS.items(), strict=True):
        draw(panel, title, pattern)
    handles = [Patch(color=color, label=f"{kind} tile") for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
    figure.subplots_adjust(left=0.03, right=0.97, top=0.92, bottom=0.14)
    figure.savefig(Path(__file__).with_name("tiles.png"), dpi=110)


def draw(panel: plt.Axes, title: str, pattern: patterns.Pattern) -> None:
    """Draws one rectangle per tile that the layout lists; rows are blocks of queries."""
    rows = build_layout(pattern, Axis.tokens(LENGTH), block=BLOCK).rows
    start, count, partial = (np.asarray(x[0, 0]) for x in (rows.start, rows.count, rows.partial))
    for row in range(LENGTH // BLOCK):
        for index in range(count[row]):
            kind = "partial" if index < partial[row] else "full"
            column = int(rows.blocks[start[row] + index])
            panel.add_patch(Rectangle((column, row), 1, 1, facecolor=COLORS[kind], edgecolor="white"))
    panel.set(xlim=(0, LENGTH // BLOCK), ylim=(LENGTH // BLOCK, 0), xticks=[], yticks=[], aspect="equal")
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("blocks of keys", fontsize=9)
    panel.set_ylabel("blocks of queries", fontsize=9)


if __name__ == "__main__":
    main()
