"""Saves which blocks a trained router chooses on held-out documents, for `benchmark.py routed --kinds file`.

    python scripts/save_selection.py outputs/routed/2026-01-31_12-00-00_000000 --output outputs/selection.pt

The file holds `chosen` int32 [layers, selectors, tokens, slots], one layer a sequence of the benchmark's batch,
`document_start` int32 [layers, tokens] and `block`; read with torch.load(weights_only=True).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = (2, 4, 8, 32, 128)
"""Numbers of consecutive queries whose choices are compared."""


def main() -> None:
    from scripts.console import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder (then its last checkpoint) or a .ckpt file")
    parser.add_argument("--split", default="test", help="documents of the run's corpus")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens, of documents one behind the other")
    parser.add_argument("--output", type=Path, default=Path("outputs/selection.pt"))
    parser.add_argument("--trust", action="append", help="a class outside this repository whose code may run")
    parser.add_argument("--sharing", type=Path, help="a JSON file for how alike neighbouring queries choose, by layer")
    with user_errors():
        save(parser.parse_args())


def save(arguments: argparse.Namespace) -> None:
    """Runs the model once and writes the blocks that each routed layer chose."""
    import numpy as np
    import torch

    from configs.errors import ConfigError
    from configs.runs import open_run
    from configs.trust import trust
    from model.attention.routed.core import RoutedAttention
    from model.training.run_folder import check_writable
    from model.training.storage import make_folder, replacing, write_json
    from scripts.benchmarks.results import markdown, surroundings

    trust(arguments.trust)
    run = open_run(arguments.checkpoint, "auto", "32-true")
    model, device = run.model, run.model.embed_tokens.weight.device
    routed = [core for core in model.cores if isinstance(core, RoutedAttention)]
    if not routed:
        raise ConfigError(f"checkpoint={arguments.checkpoint}: must be a run with a router in one of its layers")

    check_writable(arguments.output.parent, str(arguments.output))
    splits = run.data.corpus.splits
    if arguments.split not in splits:
        raise ConfigError(f"--split {arguments.split}: must be one of {', '.join(splits)}")
    documents = splits[arguments.split]
    pieces, length = [], 0
    for index in range(len(documents)):
        if length >= arguments.tokens:
            break
        pieces.append(np.asarray(documents.tokens(index)).astype(np.int64))
        length += len(pieces[-1])
    if length < arguments.tokens:
        raise ConfigError(f"--tokens {arguments.tokens}: must be at most {length}, the split {arguments.split}")
    tokens = torch.from_numpy(np.concatenate(pieces)[: arguments.tokens])[None].to(device)
    document = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(p) for p in pieces]))
    document = document[None, : arguments.tokens].to(device)
    layouts = model.build_layouts(document, arguments.tokens)
    layout = next(each for each, core in zip(layouts, model.cores, strict=True) if core is routed[0])
    position = torch.arange(arguments.tokens, device=device)[None] - layout.document_start

    chosen: list[torch.Tensor] = []
    for attend in routed:
        attend.register_forward_pre_hook(lambda module, call: chosen.append(module.choose(*call)[0].chosen.cpu()))
    mixed = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        model(tokens, position, layouts)
    document_start = layout.document_start.int().cpu().expand(len(chosen), -1).contiguous()
    selection = {"chosen": torch.cat(chosen), "document_start": document_start, "block": routed[0].pattern.block}
    make_folder(arguments.output.parent)
    with replacing(arguments.output, selection["chosen"].nbytes + document_start.nbytes) as file:
        torch.save(selection, file)
    print(f"{len(chosen)} layers, {arguments.tokens:,} tokens: written to {arguments.output}")
    rows = sharing(torch.cat(chosen))
    print("Different blocks that so many queries in a row choose, over their choices (1: nothing is shared):\n")
    print(markdown(rows))
    if arguments.sharing:
        make_folder(arguments.sharing.parent)
        write_json(arguments.sharing, surroundings() | {"rows": rows})


def sharing(chosen: "Tensor") -> list[dict[str, Any]]:
    """Returns a row for each layer of `chosen`: for several numbers of consecutive queries, how many different blocks
    they choose, over the number of their choices."""
    from kernels.selection.routing_health import union_of_neighbours

    return [
        {"layer": layer} | {f"{n} queries": round(float(union_of_neighbours(choice, n)), 3) for n in NEIGHBOURS}
        for layer, choice in enumerate(chosen)
    ]


if __name__ == "__main__":
    from scripts.standard_output import output_may_close

    with output_may_close():
        main()
