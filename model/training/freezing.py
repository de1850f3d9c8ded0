"""Frozen parameters, chosen by the names that `model.named_parameters()` gives them.

A frozen parameter keeps its bits: it has no gradient and no optimizer state, and no weight decay pulls on it. It still
passes gradients on to the layers below it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

EXCEPT = "!"
"""Begins a pattern whose parameters train, though an earlier pattern freezes them."""


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freezes the parameters whose names match `patterns`. Returns the number of frozen values.

    Args:
        patterns: patterns of fnmatch, applied in order: `layers.*.mlp.*` freezes, and `!layers.0.*` trains again.

    Raises:
        ValueError: a pattern matches no parameter, or all parameters are frozen.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern.removeprefix(EXCEPT))]
        if not matching:
            raise ValueError(f"{pattern!r} matches no parameter; parameters are called {', '.join(_kinds(parameters))}")
        for name in matching:
            parameters[name].requires_grad_(pattern.startswith(EXCEPT))
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    if frozen == sum(p.numel() for p in parameters.values()):
        raise ValueError("no parameter is left to train")
    return frozen


def _kinds(names: Sequence[str]) -> list[str]:
    """Returns the names of all parameters, those of equal layers once."""
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join("*" if part.isdecimal() else part for part in each) for each in parts))
