"""How far decoding with a cache is from one pass over the whole text: the largest difference of two logits, by pattern
and dtype, over chunks of one token, of a few, around a block and of many windows.

`float32, of one pass`: how far one pass in float32 is from one in float64, which a cache cannot be held to beat.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from model import Transformer

SIZES = {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 128, "max_length": 4096}
"""Of the models: the default patterns of the configs, made small enough to meet their edges in a short text."""

BLOCK = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=400, help="tokens of the text")
    parser.add_argument("--output", type=Path, default=Path("docs/results/decode_parity.json"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table, writes the JSON."""
    from scripts.benchmarks.results import markdown, write

    rows = [measure(name, arguments.length) for name in patterns()]
    write(arguments, rows)
    print(markdown(rows))
    print(f"\nwritten to {arguments.output}")


def patterns() -> dict[str, Mapping]:
    """A schedule of patterns by name, of every family."""
    from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, Hierarchical, NativeSparse, Routed, Strided, Window

    router = dict(window=40, block=BLOCK, top_k=3, share="group", first_block=False, strategy="by_block")
    router |= dict(router="mean_key", indexer_dim=16, indexer_loss=1.0, indexer_warmup=0, indexer_gradient=False)
    branches = dict(summary_span=16, pooling="learned", combine="lse")
    alone = {
        "dense": Dense(),
        "window": Window(50, 4),
        "dilated": Dilated(20, 4),
        "strided": Strided(40, 64, 8),
        "fixed": Fixed(64, 8),
        "block_sparse": BlockSparse(BLOCK, 2, 1, 2),
        "hierarchical": Hierarchical(window=40, spans=(8, 32), reaches=(120,), pooling="learned"),
        "routed, mean key": Routed(**router),
        "routed, mean key, by head": Routed(**router | {"share": "head", "first_block": True}),
        "routed, indexer": Routed(**router | {"router": "indexer"}),
        "routed, indexer, by head": Routed(**router | {"router": "indexer", "share": "head"}),
        "routed, more than all blocks": Routed(**router | {"top_k": 99}),
        "native_sparse, lse": NativeSparse(**router, **branches),
        "native_sparse, gates": NativeSparse(**router | branches | {"router": "indexer", "combine": "gates"}),
    }
    mixed = {name: alone[name] for name in ("window", "routed, mean key", "hierarchical", "native_sparse, lse")}
    return {name: {name: pattern} for name, pattern in alone.items()} | {"four of them by depth": mixed}


def measure(name: str, length: int) -> dict[str, object]:
    """One row: random weights, two random texts."""
    import torch

    tokens = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(0))
    exact = one_pass(build(name).double(), tokens)
    row: dict[str, object] = {"pattern": name, "length": length}
    for dtype, short in ((torch.float64, "float64"), (torch.float32, "float32")):
        model = build(name).to(dtype)
        whole = one_pass(model, tokens)
        found = [in_chunks(model, tokens, chunk) for chunk in (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 230)]
        row[short] = float(f"{max(float((each - whole).abs().max()) for each in found):.1e}")
        if dtype == torch.float32:
            row["float32, of one pass"] = float(f"{float((whole - exact).abs().max()):.1e}")
    row["largest logit"] = round(float(exact.abs().max()), 2)
    return row


def build(name: str) -> "Transformer":
    """Weights so large that every layer and head makes a difference."""
    import torch

    from model import AttentionPlan, ModelConfig, Transformer

    chosen = patterns()[name]
    plan = AttentionPlan(patterns=chosen, schedule=list(chosen), block=BLOCK, backend="auto")
    fixed = dict(rope_theta=10000.0, rope_scaling="none", rope_factor=1.0, rope_original_length=64)
    fixed |= dict(tie_embeddings=True, sink_logits=True, norm_epsilon=1e-6, activation_checkpointing=False)
    model = Transformer(ModelConfig(vocabulary=256, **SIZES, **fixed), plan).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.dim() == 3:  # the queries of learned pools
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def one_pass(model: "Transformer", tokens: "Tensor") -> "Tensor":
    """Logits in float64."""
    import torch

    length = tokens.shape[1]
    with torch.no_grad():
        hidden = model(tokens, torch.arange(length).expand(tokens.shape), model.build_layouts(None, length))
        return model.logits(hidden).double()


def in_chunks(model: "Transformer", tokens: "Tensor", chunk: int) -> "Tensor":
    """Logits in float64."""
    import torch

    from model import Cache

    cache = Cache(model, len(tokens))
    with torch.no_grad():
        return torch.cat([model.logits(cache.extend(part)) for part in tokens.split(chunk, 1)], 1).double()
