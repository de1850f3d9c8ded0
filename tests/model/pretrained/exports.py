"""Small models, exported and read back through transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.patterns import Dense, Window
from model import AttentionPlan, Transformer
from model.pretrained.export import export
from tests.model.small import config, lively, plan

LENGTH, WIDTH, BOS, VOCABULARY = 100, 24, 3, 60
HYBRID = plan({"local": Window(WIDTH), "full": Dense()}, ["local", "full", "local"])
PLANS = {"dense": plan(Dense()), "window": plan(Window(WIDTH)), "window_dense": HYBRID}


def build(attention: AttentionPlan, **changes: Any) -> Transformer:
    """Its logits are below 2, so that rounding in float32 stays well below the tolerance."""
    model = lively(Transformer(config(layers=3, **changes), attention))
    torch.nn.init.constant_(model.norm.weight, 0.25)
    return model.eval()


def exported(folder: Path, model: Transformer, dtype: torch.dtype = torch.float32, **arguments: Any) -> Path:
    export(folder / "exported", model, {}, BOS, VOCABULARY, dtype, **arguments)
    return folder / "exported"


def tokens_of(length: int = LENGTH) -> Tensor:
    tokens = torch.randint(4, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = BOS
    return tokens


@torch.no_grad()
def our_logits(model: Transformer, tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    position = torch.arange(length).expand(tokens.shape)
    return model.logits(model(tokens, position, model.build_layouts(None, length)))


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor, **arguments: Any) -> Tensor:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()(tokens).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
