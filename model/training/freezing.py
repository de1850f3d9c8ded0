"""Frozen parameters, chosen by the names that `model.named_parameters()` gives them.

A frozen parameter does not change by a single bit: it has no gradient, no optimizer state and no weight decay.
Gradients still flow through it to the layers below.

`IndexersFirst` freezes all but the indexers for the first optimizer steps.
"""

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

log = logging.getLogger(__name__)

INDEXERS = "*.indexer.*"
"""Names of the parameters of indexers."""

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


class IndexersFirst:
    """Trains the indexers alone in the first `model.indexers_alone` optimizer steps, and all parameters after them.

    Until then the others have no gradient when the optimizer steps: no update, no momentum, no weight decay. The
    optimizer holds all parameters from the start, so that a checkpoint of either stage has the same groups.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps = model, model.indexers_alone
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and self.steps}
        self.others = {name for name in trained if not fnmatchcase(name, INDEXERS)}
        self.indexers = sum(trained[name] for name in trained.keys() - self.others)
        """Number of values that train in the first stage."""
        self.alone: bool | None = None
        """Whether the present step trains indexers alone; None before the first step of a session."""

    def set_step(self, step: int, ranks: int) -> None:
        """Sets the number of optimizer steps done. Logs a line where a stage begins.

        On one device the gradients of the others are not computed. On several `ranks` they are, and `drop_gradients`
        drops them: DDP and FSDP2 read only once which parameters have gradients.
        """
        alone = step < self.steps
        if not self.steps or alone is self.alone:
            return
        if alone:
            text = "only the indexers train (%s parameters), and routed layers attend densely, up to step %s"
            log.info(text, f"{self.indexers:,}", f"{self.steps:,}")
        elif step == self.steps:
            log.info(
                "step %s: from now on all parameters train, and routed layers attend to chosen blocks", f"{step:,}"
            )
        if ranks == 1:
            for parameter in self._parameters():
                parameter.requires_grad_(not alone)
        self.alone = alone

    def drop_gradients(self) -> None:
        """Removes the gradients of all parameters that do not train yet."""
        if self.alone:
            for parameter in self._parameters():
                parameter.grad = None

    def _parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that do not train in the first stage. FSDP2 replaces the objects of a model."""
        return (parameter for name, parameter in self.model.named_parameters() if name in self.others)


def _kinds(names: Sequence[str]) -> list[str]:
    """Returns the names of all parameters, those of equal layers once."""
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join("*" if part.isdecimal() else part for part in each) for each in parts))
