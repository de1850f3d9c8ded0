"""Saves which blocks a trained router chooses on held-out documents, for `benchmark.py routed --kinds file`.

    python scripts/save_selection.py outputs/routed/2026-01-31_12-00-00_000000 --output outputs/selection.pt

The file holds `chosen` int32 [layers, selectors, tokens, slots], one layer a sequence of the benchmark's batch,
`first_key` int32 [layers, tokens] and `block`; read with torch.load(weights_only=True).
"""

import argparse
from pathlib import Path


def main() -> None:
    from scripts.console import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder (then its last checkpoint) or a .ckpt file")
    parser.add_argument("--split", default="test", help="documents of the run's corpus")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens, of documents one behind the other")
    parser.add_argument("--output", type=Path, default=Path("outputs/selection.pt"))
    with user_errors():
        save(parser.parse_args())


def save(arguments: argparse.Namespace) -> None:
    """Runs the model once and writes what each routed layer chose."""
    import numpy as np
    import torch

    from configs.build import ConfigError, build_data, build_model
    from model.attention.routed import RoutedAttend
    from model.training.checkpoints import load_weights, read_checkpoint
    from model.training.run_folder import find_checkpoint

    checkpoint = find_checkpoint(arguments.checkpoint, prefer="last")
    run = read_checkpoint(checkpoint)["hyper_parameters"]
    data = build_data(run["data"])
    data.setup()
    model = build_model(run, data.vocabulary)
    load_weights(model, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    routed = [attend for attend in model.attends if isinstance(attend, RoutedAttend)]
    if not routed:
        raise ConfigError(f"checkpoint={arguments.checkpoint}: no layer of it routes; accepted is a run with a router")

    documents = data.corpus.splits[arguments.split]
    pieces, length = [], 0
    for index in range(len(documents)):
        if length >= arguments.tokens:
            break
        pieces.append(np.asarray(documents.tokens(index)).astype(np.int64))
        length += len(pieces[-1])
    if length < arguments.tokens:
        raise ConfigError(f"--tokens {arguments.tokens}: the split {arguments.split} has {length}; accepted is fewer")
    tokens = torch.from_numpy(np.concatenate(pieces)[: arguments.tokens])[None].to(device)
    document = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(p) for p in pieces]))
    document = document[None, : arguments.tokens].to(device)
    views = model.build_layouts(document, arguments.tokens)
    view = next(v for v, attend in zip(views, model.attends, strict=True) if attend is routed[0])
    position = torch.arange(arguments.tokens, device=device)[None] - view.first_key

    chosen: list[torch.Tensor] = []
    for attend in routed:
        attend.register_forward_pre_hook(lambda module, call: chosen.append(module.choose(*call)[0].chosen.cpu()))
    mixed = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        model(tokens, position, views)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    first_key = view.first_key.int().cpu().expand(len(chosen), -1).contiguous()
    torch.save(
        {"chosen": torch.cat(chosen), "first_key": first_key, "block": routed[0].pattern.block}, arguments.output
    )
    print(f"{len(chosen)} layers, {arguments.tokens:,} tokens: written to {arguments.output}")


if __name__ == "__main__":
    main()
