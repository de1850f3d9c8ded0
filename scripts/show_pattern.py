"""Draws the patterns of an attention choice and says how dense they are.

python scripts/show_pattern.py attention=strided length=4096
python scripts/show_pattern.py attention=window attention.patterns.local.width=1024 output=window.png
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="../configs", config_name="show_pattern")
def main(config: DictConfig) -> None:
    from scripts.console import user_errors

    with user_errors():
        show(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def show(config: dict) -> None:
    """One PNG with all patterns of the plan, and a table of their densities."""
    from rich.console import Console
    from rich.table import Table

    from configs.build import build_plan
    from kernels import Axis, build_layout
    from kernels.cost import attention_cost
    from scripts.pictures import draw_patterns

    plan, length = build_plan(config["attention"]), config["length"]
    table = Table(
        "pattern", "visible pairs", "computed in tiles", title=f"{length:,} tokens, of dense causal attention's pairs"
    )
    for name, pattern in plan.patterns.items():
        cost = attention_cost(
            build_layout(pattern, Axis.tokens(length), block=plan.block), batch=1, heads=1, head_dim=1
        )
        table.add_row(name, f"{cost.density_pairs:.2%}", f"{cost.density_tiles:.2%}")
    console = Console()
    console.print(table)
    output = Path(config["output"])
    draw_patterns(plan.patterns, length, output, plan.block)
    console.print(f"drawn in {output}")


if __name__ == "__main__":
    from scripts.console import run

    run(main)
