"""One training step, rehearsed: the run's own model, loss and optimizer on tensors without contents, and a ledger.

What is rehearsed is a model of few layers, one of each pattern; a deeper model has more layers that are alike, and each
phase of a step holds a known share of what they add:

    update      weights, optimizer state, gradients
    forward     the same (the gradients are those of the step before, dropped behind it), and the activations
    backward    weights, optimizer state, and either the activations of the layers below, while the last layer is under
                way, or the gradients of the layers above, while the first one is; under accumulation all gradients
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.patterns import Pattern
from model import Transformer, loss
from model.attention import View
from model.training.optimizer import build_optimizer
from scripts.forecasting.fused import compile_rehearsed
from scripts.forecasting.ledger import Ledger
from scripts.forecasting.workspace import workspace_bytes
from scripts.loading import AUTOCAST, DTYPES

WEIGHTS, COPIES, GRADIENTS, OPTIMIZER = "weights", "weights, copies in low precision", "gradients", "optimizer state"
BATCH, LAYOUTS, EMBEDDING = "batch", "layouts", "embedding and positions"
LOSS, BACKWARD, UPDATE = "logits and loss", "workspace of the backward pass", "workspace of the update"
LAYER, COPIES_OF = "activations of ", "copies of "

GRANULARITY = {"cpu": 64, "cuda": 512}
"""Bytes to which PyTorch's allocators round."""

Kind = Pattern | tuple[Pattern, ...]
"""What a layer attends by: layers of one kind are alike."""


@dataclass(frozen=True)
class Step:
    """What one training step holds at its peak: bytes by part, and the phase of the peak. `layer`: of these, what one
    layer's activations take in a CPU's heap, at most (ledger.HEAP_BLOCK)."""

    parts: dict[str, int]
    phase: str
    layer: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def rehearse(
    model: Transformer, views: list[View], batch: int, length: int, config: Mapping[str, Any], device: torch.device
) -> Step:
    """The peak of a training step of `model` (which may be on the meta device: only its sizes are looked at).

    views: one a layer, of a batch of `batch` sequences of `length`, in the sizes that they have in training. config: a
    composed training config.
    """
    layers = [model.patterns.index(kind) for kind in dict.fromkeys(model.patterns)]
    rehearsal = _Rehearsal(model, views, layers, batch, length, config, device)
    rehearsal.run()
    return rehearsal.of_depth(Counter(model.patterns))


class _Rehearsal:
    """Of a model with just these `layers`: one of each kind, or all."""

    def __init__(
        self,
        model: Transformer,
        views: Sequence[View],
        layers: Sequence[int],
        batch: int,
        length: int,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger(GRANULARITY[device.type], workspace_bytes)
        self.kinds = [model.patterns[layer] for layer in layers]
        self.names = _names(model)
        shared = {id(views[layer]): views[layer] for layer in layers}
        schedule = [model.plan.schedule[layer % len(model.plan.schedule)] for layer in layers]
        with self._running(WEIGHTS), torch.device(device):
            plan = dataclasses.replace(model.plan, schedule=schedule)
            with _default_dtype(DTYPES.get(config["trainer"]["precision"], torch.float32)):
                self.model = Transformer(dataclasses.replace(model.config, layers=len(layers)), plan).train()
        with self._running(LAYOUTS):
            storages = {t.untyped_storage()._cdata: t.untyped_storage() for v in shared.values() for t in _tensors(v)}
            # Those of the batch before are let go of only behind the forward pass.
            self.earlier = torch.empty(sum(s.nbytes() for s in storages.values()), dtype=torch.uint8, device=device)
            fakes = {key: _map_tensors(view, self.mode.from_tensor) for key, view in shared.items()}
            for tensor in _tensors(list(fakes.values())):
                self.ledger.book(tensor)
            self.views = [fakes[id(views[layer])] for layer in layers]
        with self._running(BATCH):
            new = lambda dtype: torch.zeros(batch, length, dtype=dtype, device=device)  # noqa: E731
            self.tokens, self.targets, self.position = new(torch.int64), new(torch.int64), new(torch.int32)
        self._label_births()

    @contextmanager
    def _running(self, label: str) -> Iterator[None]:
        with self.mode, self.ledger, self.ledger.labelled(label):
            yield

    def _label_births(self) -> None:
        """What a layer, the loss or a gradient makes is booked under its own name."""
        ledger = self.ledger
        for parameter in self.model.parameters():
            ledger.label_copies(parameter, COPIES)
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.relabel(p.grad, GRADIENTS))
        for kind, layer in zip(self.kinds, self.model.layers, strict=True):
            if self.config["trainer"]["compile"]:
                compile_rehearsed(layer, ledger)
            layer.forward = _labelled(ledger, LAYER + self.names[kind], layer.forward)
            for parameter in layer.parameters():
                ledger.label_copies(parameter, COPIES_OF + self.names[kind])
        norm = self.model.norm.forward

        def norm_and_loss(x: Tensor) -> Tensor:
            ledger.label = LOSS  # until the forward pass is over
            return norm(x)

        self.model.norm.forward = norm_and_loss

    def run(self) -> None:
        """An update, then the step behind it; under accumulation one micro-batch more."""
        ledger, trainer = self.ledger, self.config["trainer"]
        if trainer["compile"]:
            with self.mode:
                self._forward()  # traces what is compiled: what tracing leaves behind is not the step's
        with self._running(GRADIENTS):
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        settings = {key: value for key, value in self.config["optimizer"].items() if key != "schedule"}
        with self._running(UPDATE):
            self.optimizer = optimizer = build_optimizer(self.model, **settings)
            ledger.phase = "first update"  # it makes the state
            optimizer.step()
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        ledger.relabel(value, OPTIMIZER)
            ledger.phase = "update"
            optimizer.step()
        for micro_batch in range(min(2, trainer["accumulate"])):
            ledger.phase = "forward"
            with self._running(EMBEDDING):
                total = self._forward()
                if micro_batch == 0:
                    # As Lightning's closure: gradients are dropped behind the forward pass.
                    self.held = dict(ledger.held)
                    self.earlier = None
                    optimizer.zero_grad()
            ledger.phase = "backward"
            with self._running(BACKWARD):
                total.backward()
            del total

    def _forward(self) -> Tensor:
        dtype = AUTOCAST.get(self.config["trainer"]["precision"])
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None), _few_chunks():
            out = self.model.loss(self.tokens, self.targets, self.position, self.views)
            total = out.total if out.auxiliary is None else out.total + out.auxiliary
        return total / self.tokens.numel()

    def of_depth(self, layers: Mapping[Kind, int]) -> Step:
        """The peak where there are so many layers of each kind."""
        fixed, gradients, activations, copies_in_forward, copies_kept = (Counter[str]() for _ in range(5))
        for kind, layer in zip(self.kinds, self.model.layers, strict=True):
            more, name = layers[kind] - 1, self.names[kind]
            weights = sum(self._rounded(p.numel() * p.element_size()) for p in layer.parameters())
            states = (value for p in layer.parameters() for value in self.optimizer.state[p].values())
            state = sum(self._rounded(t.numel() * t.element_size()) for t in states if isinstance(t, Tensor))
            fixed.update({WEIGHTS: more * weights, OPTIMIZER: more * state})
            gradients.update({GRADIENTS: more * weights})
            activations.update({LAYER + name: more * self.held.get(LAYER + name, 0)})
            copies_in_forward.update({COPIES: more * self.ledger.at_peak["forward"].get(COPIES_OF + name, 0)})
            copies_kept.update({COPIES: more * self.held.get(COPIES_OF + name, 0)})
        accumulated = gradients if self.config["trainer"]["accumulate"] > 1 else Counter[str]()
        moments = [
            ("update", fixed + gradients),
            ("forward", fixed + gradients + activations + copies_in_forward),
            ("backward", fixed + accumulated + activations + copies_kept),
            ("backward", fixed + gradients),
        ]
        layer = max(self.ledger.most_in_heap[LAYER + name] for name in self.names.values())
        steps = [Step(dict(self._at_peak(phase) + more), phase, layer) for phase, more in moments]
        return max(steps, key=lambda step: step.total)

    def _at_peak(self, phase: str) -> Counter[str]:
        held = Counter[str]()
        for label, size in self.ledger.at_peak[phase].items():
            held[COPIES if label.startswith(COPIES_OF) else label] += size
        return held

    def _rounded(self, size: int) -> int:
        return -(-size // self.ledger.granularity) * self.ledger.granularity


def _names(model: Transformer) -> dict[Kind, str]:
    """What the plan calls each kind of layer; of one pattern a KV head, all names."""
    schedule = model.plan.schedule
    entries = {pattern: schedule[layer % len(schedule)] for layer, pattern in reversed([*enumerate(model.patterns)])}
    return {pattern: entry if isinstance(entry, str) else "+".join(entry) for pattern, entry in entries.items()}


@contextmanager
def _few_chunks() -> Iterator[None]:
    """The loss of the first chunks of tokens alone: the others hold no more than these, one after another."""
    chunks = loss._chunks
    loss._chunks = lambda *sizes: chunks(*sizes)[:4]
    try:
        yield
    finally:
        loss._chunks = chunks


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _labelled(ledger: Ledger, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with ledger.labelled(label):
            return function(*arguments)

    return run


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of a view, however deep."""
    found: list[Tensor] = []
    _map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same view with other tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(each, function) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, Pattern):
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            object.__setattr__(copy, field.name, _map_tensors(getattr(value, field.name), function))
        return copy
    return value
