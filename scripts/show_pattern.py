"""Draws the patterns of an attention choice, and prints their density and how far information travels by depth.

python scripts/show_pattern.py attention=strided length=4096
python scripts/show_pattern.py attention=window attention.patterns.local.width=1024 output=window.png
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from kernels.patterns import Pattern
    from model import AttentionPlan


@hydra.main(version_base="1.3", config_path="../configs", config_name="show_pattern")
def main(config: DictConfig) -> None:
    from configs.trust import trust_named
    from scripts.console import user_errors

    with user_errors():
        show(trust_named(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))


def show(config: dict) -> None:
    """Writes a PNG with all patterns of the plan, and prints a table of their densities and their reach by depth."""
    from configs.checks import check_show_pattern

    check_show_pattern(config)
    from rich.console import Console
    from rich.table import Table

    from configs.build import build_plan
    from kernels import Axis
    from kernels.layout.cost import causal_pairs
    from model.attention import build_attention_layout
    from scripts.reporting.pictures import draw_patterns

    length, block = config["length"], config["attention"]["block"]
    patterns = _all_patterns() if config["all"] else build_plan(config["attention"]).patterns
    table = Table(
        "pattern", "visible pairs", "computed in tiles", title=f"share of dense attention's pairs, {length:,} tokens"
    )
    for name, pattern in patterns.items():
        layout = build_attention_layout(pattern, Axis.tokens(length), block)
        cost = layout.cost(batch=1, heads=1, head_dim=1)
        table.add_row(name, f"{cost.density_pairs:.2%}", f"{cost.density_tiles:.2%}")
        for part, pairs in layout.parts().items():
            table.add_row(f"  {part}", f"{pairs / causal_pairs(length, length):.2%}", "")
    console = Console()
    console.print(table)
    output = Path(config["output"])
    draw_patterns(patterns, length, output, block, zoom=config["zoom"])
    console.print(f"drawn in {output}")
    if not config["all"]:
        _show_reach(console, build_plan(config["attention"]), config)


def _show_reach(console: "Console", plan: "AttentionPlan", config: dict) -> None:
    """Prints the mask of each layer in characters, whole and near the diagonal, and its reach by depth."""
    from rich.table import Table

    from model.attention.reach import layer_mask, reach_by_depth, union_density, unreached

    length, layers = min(config["reach_length"], config["length"]), config["layers"]
    masks = dict(layer_mask(plan, layer, length) for layer in range(len(plan.schedule)))
    zoom = min(config["zoom"], length)
    for name, mask in masks.items():
        for title, part in ((f"{length:,} tokens", mask), (f"the last {zoom:,}", mask[-zoom:, -zoom:])):
            console.print(f"{name}, {title}", highlight=False)
            console.print(terminal_picture(part), highlight=False, soft_wrap=True)
    depths, known = reach_by_depth(plan, layers, length)
    table = Table("layers", "pattern", "pairs that a path connects", "past tokens that reach the last one",
                  "furthest", title=f"reach by depth, one document of {length:,} tokens")  # fmt: skip
    for depth in depths:
        cells = (str(depth.layers), depth.pattern, f"{depth.share:.2%}", f"{depth.influences:,}", f"{depth.furthest:,}")
        table.add_row(*cells)
    console.print(table)
    console.print(f"seen by some layer or head: {union_density(list(masks.values())):.2%} of the pairs")
    missing = unreached(known)
    if missing:
        share = missing / (length * (length + 1) // 2)
        console.print(
            f"warning: after {layers} layers no path connects {share:.2%} of the pairs of a token and an earlier one "
            f"({missing:,} pairs)",
            soft_wrap=True,
        )


def terminal_picture(mask: "Tensor", rows: int = 24) -> str:
    """Draws a mask `[length, length]` in `rows` lines of characters. A cell has two equal characters, darker for a
    larger share of visible pairs."""
    import numpy as np

    length, rows = len(mask), min(rows, len(mask))
    first = np.arange(rows) * length // rows  # tokens; cells differ by one token where the length is no multiple
    sums = np.add.reduceat(np.add.reduceat(mask.numpy(), first, 0, dtype=np.int64), first, 1)
    size = np.diff(first, append=length)
    cells = sums / np.outer(size, size)
    shades = " ░▒▓█"
    darkness = np.ceil(cells * (len(shades) - 1)).astype(int).tolist()
    return "\n".join("".join(shades[cell] * 2 for cell in line) for line in darkness)


def _all_patterns() -> "dict[str, Pattern]":
    """Returns the pattern of each attention choice that has a single one, by the name of the choice."""
    from configs.build import build_plan

    files = sorted((Path(__file__).parent.parent / "configs" / "attention").glob("*.yaml"))
    plans = {
        file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files if file.stem not in ("base", "hf")
    }
    built = {name: build_plan(plan | {"block": 128, "backend": "auto"}).patterns for name, plan in plans.items()}
    return {name: next(iter(patterns.values())) for name, patterns in built.items() if len(patterns) == 1}


if __name__ == "__main__":
    from scripts.console import run

    run(main)
