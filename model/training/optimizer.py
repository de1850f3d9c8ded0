"""Optimizers and learning-rate schedules.

Parameter groups follow GPT-3 and OLMo 2: weight decay applies to matrices only. Norm gains, biases and sink
logits have no scale for decay to control, and a token table is excluded because decay shrinks the rows of rare tokens
step after step although no gradient reaches them, and smaller embeddings mean larger gradients in the first layers
(OLMo 2, arXiv:2501.00656). A tied output head is that same table, so it is excluded with it.

`muon` (Jordan et al. 2024; scaled as in Moonlight, arXiv:2502.16982) orthogonalizes the momentum of the hidden
matrices; its update is given AdamW's root mean square, so both share one learning rate and one weight decay.

Every setting comes from configs/optimizer/*.yaml; nothing here has a default.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from model.training.freezing import INDEXERS
from model.training.muon import MuonWithAdamW

TIMED_SCHEDULE_STEPS = 1_000_000
"""Steps into which a schedule divides a run that ends by time."""


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: Iterable[float],
    epsilon: float,
    momentum: float | None = None,
    indexer_learning_rate: float | None = None,
    compile: bool = False,
) -> Optimizer:
    """AdamW over all parameters, or Muon over the hidden matrices and AdamW over the rest.

    Args:
        name: `adamw` or `muon`.
        weight_decay: per step, times the learning rate (decoupled); on matrices only.
        betas, epsilon: of AdamW.
        momentum: of Muon; needed (and allowed) only with `muon`.
        indexer_learning_rate: of the parameters of indexers; None for `learning_rate`.
        compile: compile Muon's orthogonalization.

    Raises:
        ValueError: an unknown name, or a momentum that does not belong.
    """
    hidden, head, rest = split_parameters(model)
    adamw = {"lr": learning_rate, "betas": tuple(betas), "eps": epsilon, "fused": _can_fuse(model)}
    rates = {}
    if indexer_learning_rate is not None:
        rates = {id(p): indexer_learning_rate for name, p in model.named_parameters() if fnmatchcase(name, INDEXERS)}
    if name == "adamw":
        if momentum is not None:
            raise ValueError(f"optimizer.momentum={momentum} belongs to optimizer=muon; adamw has optimizer.betas")
        return AdamW(_groups(rates, (hidden + head, weight_decay), (rest, 0.0)), **adamw)
    if name == "muon":
        if momentum is None:
            raise ValueError("optimizer=muon needs optimizer.momentum, a number in [0, 1), for example 0.95")
        if not hidden:
            raise ValueError("optimizer=muon: the model has no hidden matrices; use optimizer=adamw")
        muon = {"lr": learning_rate, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw", "compile": compile}
        others = _groups(rates, (head, weight_decay), (rest, 0.0))
        return MuonWithAdamW(_groups(rates, (hidden, weight_decay)), muon, others, adamw)
    raise ValueError(f"optimizer.name={name!r} is unknown; choose adamw or muon")


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Trainable parameters as (hidden matrices, untied output head, everything that is not decayed)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "lm_head", None)
    heads = {id(output.weight)} if isinstance(output, nn.Linear) else set()
    hidden, head, rest = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in tables:
            rest.append(parameter)
        elif id(parameter) in heads or parameter.ndim > 2:  # Muon is defined on matrices
            head.append(parameter)
        else:
            hidden.append(parameter)
    return hidden, head, rest


def _groups(rates: Mapping[int, float], *pairs: tuple[list[Tensor], float]) -> list[dict[str, Any]]:
    """Parameter groups of lists of parameters and their weight decay. rates: id of a parameter -> its learning rate,
    where it is not the optimizer's."""
    groups = []
    for parameters, decay in pairs:
        for rate in (None, *dict.fromkeys(rates.values())):
            own = [p for p in parameters if rates.get(id(p)) == rate]
            if own:
                groups.append({"params": own, "weight_decay": decay} | ({} if rate is None else {"lr": rate}))
    return groups


def _can_fuse(model: nn.Module) -> bool:
    """One fused kernel for the whole update exists on CUDA and CPU, for floating-point parameters."""
    return all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in model.parameters())


def build_schedule(
    optimizer: Optimizer,
    max_steps: int,
    progress: Callable[[], float] | None = None,
    first: int = 0,
    *,
    name: str,
    **settings: float,
) -> LambdaLR:
    """Returns a scheduler that multiplies the learning rate of every group by a factor.

    The factor depends on the step alone; with `progress`, on the share of the run that is done. The `first` steps are a
    stage with a schedule of its own, and the steps after them have another one. With `progress` there is one schedule
    for all steps, since no step is a known share of such a run."""
    factor = SCHEDULES[name]
    if progress is not None:
        return LambdaLR(
            optimizer,
            lambda _: factor(round(min(1.0, progress()) * TIMED_SCHEDULE_STEPS), TIMED_SCHEDULE_STEPS, **settings),
        )

    def factor_of(step: int) -> float:
        start, end = (0, first) if step < first else (first, max_steps)
        return factor(step - start, end - start, **settings)

    return LambdaLR(optimizer, factor_of)


def set_rates(scheduler: LambdaLR) -> None:
    """Sets the learning rates of the next step to those of `scheduler`; a checkpoint may hold other ones."""
    factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
    for group, base, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=True):
        group["lr"] = base * factor
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def cosine(step: int, max_steps: int, *, warmup_fraction: float, final_fraction: float) -> float:
    """Linear warm-up, then half a cosine down to `final_fraction` (SGDR, arXiv:1608.03983).

    Args:
        step: steps done so far; the factor is for the next one.
        max_steps: steps of the whole run, at the end of which the factor is `final_fraction`.
        warmup_fraction: share of `max_steps` spent warming up.
        final_fraction: the last learning rate as a share of the highest.
    """
    warmup = round(warmup_fraction * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, max_steps: int, *, warmup_fraction: float, decay_fraction: float, final_fraction: float
) -> float:
    """Linear warm-up, a plateau, and a linear decay over the last steps (MiniCPM, arXiv:2404.06395; linear decay as in
    arXiv:2405.18392). On the plateau nothing depends on `max_steps`, so a run can be extended from there.

    Args:
        step, max_steps, warmup_fraction, final_fraction: as in `cosine`.
        decay_fraction: share of `max_steps` spent decaying.
    """
    warmup = round(warmup_fraction * max_steps)
    decay = round(decay_fraction * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    left = max(0, max_steps - step)
    if left >= decay:
        return 1.0
    return final_fraction + (1 - final_fraction) * left / decay


def constant(step: int, max_steps: int, *, warmup_fraction: float) -> float:
    """Linear warm-up, then a plateau to the end."""
    warmup = round(warmup_fraction * max_steps)
    return (step + 1) / warmup if step < warmup else 1.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
    "constant": constant,
}
