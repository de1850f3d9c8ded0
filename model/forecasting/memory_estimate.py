"""The peak memory of one training step, from a run of the real model, loss and optimizer on fake tensors.

The model that runs has one layer of each pattern. A deeper model has more layers of the same kinds, and each phase of a
step holds a known share of what they add:

    update      weights, optimizer state, gradients, and the stacks of Muon's matrices of one shape
    forward     the same (the previous step's gradients are freed after the forward pass), and the activations
    backward    weights, optimizer state, and either the activations of all lower layers (while the last layer runs) or
                the gradients of all upper layers (while the first one runs); with accumulation, and in the buckets of
                DDP, all gradients

Steps that are replayed from a CUDA graph keep the graph's memory, that of the forward and backward pass, all the time.
What runs outside of the graph, an update or a validation, is added to it.
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

from .. import loss
from ..attention import AttentionLayout, SequenceShard
from ..parallel.ranges import take
from ..precision import AUTOCAST, DTYPES, SHARDED, devices_of
from ..training.muon import MuonWithAdamW
from ..training.optimizer import build_optimizer
from ..transformer import Transformer
from .compiled import trace_compiled
from .fake_layouts import map_tensors, tensors_of
from .memory_tracker import WORKSPACE, MemoryTracker
from .muon_workspace import muon_workspace
from .workspace import workspace_bytes

WEIGHTS, COPIES, GRADIENTS, OPTIMIZER = "weights", "weights, copies in low precision", "gradients", "optimizer state"
BATCH, LAYOUTS, EMBEDDING = "batch", "layouts", "embedding and positions"
LOSS, BACKWARD, UPDATE = "logits and loss", "workspace of the backward pass", "workspace of the update"
VALIDATION = "validation outside of the CUDA graph"
GATHERED = "gathered weights and gradients"  # of a model that FSDP2 shards
LAYER, COPIES_OF = "activations of ", "copies of "  # prefixes of a pattern's name

GRANULARITY = {"cpu": 64, "cuda": 512}
"""Bytes to which PyTorch's allocators round, by device type."""

Kind = str | tuple[str, ...]
"""The name of the pattern of a layer, or of one per KV head. Layers of one kind have equal costs."""


@dataclass(frozen=True)
class StepMemory:
    """Memory at the peak of one training step.

    parts: bytes by part
    phase: the phase of the peak; with a CUDA graph, the phase of the graph's peak
    layer_heap_bytes: the largest size that one layer's activations reach in a CPU's heap (memory_tracker.HEAP_BLOCK)
    """

    parts: dict[str, int]
    phase: str
    layer_heap_bytes: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate_step(
    model: Transformer,
    layouts: list[AttentionLayout],
    batch: int,
    length: int,
    config: Mapping[str, Any],
    device: torch.device,
) -> StepMemory:
    """Returns the peak memory of a training step of `model`, of which only the sizes are used (it may be on meta).

    layouts: one per layer, for a batch of `batch` sequences of `length` tokens, with the tensor sizes of training.
        Where ranks share the sequences, they are a rank's, and so is the memory
    config: a composed training config
    """
    kinds = [model.plan.entry(layer) for layer in range(model.config.layers)]
    # Of layers with one pattern, that with the fewest frozen parameters: the peak is never forecast too low.
    trained = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in model.layers]
    numbers = range(len(kinds))
    layers = [max((n for n in numbers if kinds[n] == kind), key=lambda n: trained[n]) for kind in dict.fromkeys(kinds)]
    step = FakeStep(model, layouts, layers, batch, length, config, device)
    step.run()
    return step.at_depth(Counter(kinds))


class FakeStep:
    """A training step on fake tensors, of a model that has the given `layers` of `model` alone."""

    def __init__(
        self,
        model: Transformer,
        layouts: Sequence[AttentionLayout],
        layers: Sequence[int],
        batch: int,
        length: int,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        trainer = config["trainer"]
        self.ranks, sharded = devices_of(trainer), trainer["strategy"] == SHARDED
        self.shards = self.ranks if sharded else 1
        self.keeps_gradients = trainer["accumulate"] > 1 or (self.ranks > 1 and not sharded)
        self.in_graph = bool(trainer["cuda_graph"])
        self.validates_beside_graph = self.in_graph and trainer["validate_every"] is not None
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = MemoryTracker(GRANULARITY[device.type], workspace_bytes)
        self.kinds = [model.plan.entry(layer) for layer in layers]
        self.names = {kind: kind if isinstance(kind, str) else "+".join(kind) for kind in self.kinds}
        shared = {id(layouts[layer]): layouts[layer] for layer in layers}
        schedule = [model.plan.schedule[layer % len(model.plan.schedule)] for layer in layers]
        with self._running(WEIGHTS), torch.device(device):
            plan = dataclasses.replace(model.plan, schedule=schedule)
            with _default_dtype(DTYPES.get(config["trainer"]["precision"], torch.float32)):
                self.model = Transformer(dataclasses.replace(model.config, layers=len(layers)), plan).train()
        self.model.train_in_fp8(trainer["fp8"])
        # The layouts are those of the stage in which all parameters train.
        self.model.set_step(self.model.indexers_alone)
        originals = [model.embed_tokens, *(model.layers[layer] for layer in layers), model.norm, model.lm_head]
        fakes = [self.model.embed_tokens, *self.model.layers, self.model.norm, self.model.lm_head]
        for original, fake in zip(originals, fakes, strict=True):
            for parameter, own in zip(original.parameters(), fake.parameters(), strict=True):
                own.requires_grad_(parameter.requires_grad)
        with self._running(LAYOUTS):
            storages = {t.untyped_storage()._cdata: t.untyped_storage() for v in shared.values() for t in tensors_of(v)}
            self.layout_bytes = sum(s.nbytes() for s in storages.values())
            # The previous batch's layouts are freed only after the forward pass.
            self.previous_layouts = torch.empty(self.layout_bytes, dtype=torch.uint8, device=device)
            fakes = {key: map_tensors(layout, self.mode.from_tensor) for key, layout in shared.items()}
            for tensor in tensors_of(list(fakes.values())):
                self.tracker.track(tensor)
            self.layouts = [fakes[id(layouts[layer])] for layer in layers]
        with self._running(BATCH):
            new = lambda dtype: torch.zeros(batch, length, dtype=dtype, device=device)  # noqa: E731
            self.batch = new(torch.int64), new(torch.int64), new(torch.int32)
            first = self.layouts[0]
            own = first.context.own if isinstance(first, SequenceShard) else (range(length),)
            self.tokens, self.targets, self.position = (take(x, own) for x in self.batch)
        self._label_tensors()

    @contextmanager
    def _running(self, label: str) -> Iterator[None]:
        with self.mode, self.tracker, self.tracker.labelled(label):
            yield

    def _label_tensors(self) -> None:
        """Labels the tensors that each layer, the loss and the gradients create."""
        tracker = self.tracker
        for parameter in self.model.parameters():
            tracker.label_copies(parameter, COPIES)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, GRADIENTS))
        for kind, layer in zip(self.kinds, self.model.layers, strict=True):
            if self.config["trainer"]["compile"]:
                trace_compiled(layer, tracker)
            layer.compute = _labelled(tracker, LAYER + self.names[kind], layer.compute)
            for parameter in layer.parameters():
                tracker.label_copies(parameter, COPIES_OF + self.names[kind])
        norm = self.model.norm.forward

        def norm_and_loss(x: Tensor) -> Tensor:
            tracker.label = LOSS  # until the end of the forward pass
            return norm(x)

        self.model.norm.forward = norm_and_loss

    def run(self) -> None:
        """Runs an update, then forward and backward passes: one micro-batch, or two with accumulation."""
        tracker, trainer = self.tracker, self.config["trainer"]
        if trainer["compile"]:
            with self.mode:
                self._forward()  # traces the compiled modules, outside the tracker
        with self._running(GRADIENTS):
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        kept = ("schedule", "freeze")
        settings = {key: value for key, value in self.config["optimizer"].items() if key not in kept}
        with self._running(UPDATE):
            self.optimizer = optimizer = build_optimizer(self.model, **settings)
            tracker.phase = "first update"  # creates the optimizer's state
            optimizer.step()
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        tracker.relabel(value, OPTIMIZER)
            tracker.phase = "update"
            optimizer.step()
        for micro_batch in range(min(2, trainer["accumulate"])):
            tracker.phase = "forward"
            with self._running(EMBEDDING):
                total = self._forward()
                if micro_batch == 0:
                    # As in Lightning's closure, gradients are freed after the forward pass.
                    self.held = dict(tracker.held)
                    self.previous_layouts = None
                    if self.shards == self.ranks:
                        optimizer.zero_grad()
            tracker.phase = "backward"
            with self._running(BACKWARD):
                total.backward()
            del total
        if self.validates_beside_graph:
            self._validate()

    def _validate(self) -> None:
        """Runs the forward pass of a validation: not compiled, and without gradients."""
        model = self.model.eval()
        model.collect_diagnostics(True)
        for layer in model.layers:
            del layer.compute  # restores that of the class
        del model.norm.forward
        self.tracker.phase = "validation"
        with self._running(VALIDATION), torch.no_grad():
            # Its layouts have no fixed sizes and take at most as much memory as those of training.
            batch = (
                [x.clone() for x in self.batch],
                torch.empty(self.layout_bytes, dtype=torch.uint8, device=self.device),
            )
            self._forward()
            del batch

    def _forward(self) -> Tensor:
        dtype = AUTOCAST.get(self.config["trainer"]["precision"])
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None), _few_chunks():
            out = self.model.loss(self.tokens, self.targets, self.position, self.layouts)
            total = out.total if out.auxiliary is None else out.total + out.auxiliary
        return total / self.tokens.numel()

    def at_depth(self, layers: Mapping[Kind, int]) -> StepMemory:
        """Returns the peak of a model with the given number of layers of each kind."""
        fixed, gradients, activations, copies_in_forward, copies_kept = (Counter[str]() for _ in range(5))
        for kind, layer in zip(self.kinds, self.model.layers, strict=True):
            more, name = layers[kind] - 1, self.names[kind]
            sizes = {p: self._rounded(p.numel() * p.element_size()) for p in layer.parameters()}
            weights, trained = sum(sizes.values()), sum(size for p, size in sizes.items() if p.requires_grad)
            states = (value for p in layer.parameters() for value in self.optimizer.state[p].values())
            state = sum(self._rounded(t.numel() * t.element_size()) for t in states if isinstance(t, Tensor))
            fixed.update({WEIGHTS: more * weights, OPTIMIZER: more * state})
            gradients.update({GRADIENTS: more * trained})
            activations.update({LAYER + name: more * self.held.get(LAYER + name, 0)})
            copies_in_forward.update({COPIES: more * self.tracker.peak_by_label["forward"].get(COPIES_OF + name, 0)})
            copies_kept.update({COPIES: more * self.held.get(COPIES_OF + name, 0)})
        accumulated = gradients if self.keeps_gradients else Counter[str]()
        stacks = self._stacks(layers)
        phases = [
            ("update", fixed + gradients + stacks),
            ("forward", fixed + gradients + activations + copies_in_forward),
            ("backward", fixed + accumulated + activations + copies_kept),
            ("backward", fixed + gradients),
        ]
        if self.in_graph:  # nothing else can use its memory: neither updates, validations nor sums of its gradients
            if self.keeps_gradients:
                own = sum(
                    self._rounded(p.numel() * p.element_size()) for p in self.model.parameters() if p.requires_grad
                )
                phases[-1] = ("backward", fixed + gradients + gradients + Counter({GRADIENTS: own}))
            outside = max(stacks, self._validation(layers), key=Counter.total)
            phases[1:] = [(phase, more + outside) for phase, more in phases[1:]]
        layer = max(self.tracker.heap_peak[LAYER + name] for name in self.names.values())
        steps = [
            StepMemory(self._of_one_rank(self._at_peak(phase) + more, phase), phase, layer) for phase, more in phases
        ]
        return max(steps, key=lambda step: step.total)

    def _of_one_rank(self, parts: Counter[str], phase: str) -> dict[str, int]:
        """Returns what one rank holds where FSDP2 shards the model: its share, and what is gathered around a layer."""
        ranks = self.shards
        if ranks == 1:
            return dict(parts)
        share = {label: -(-parts[label] // ranks) for label in (WEIGHTS, OPTIMIZER, GRADIENTS)}
        bytes_of = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())  # noqa: E731
        layer = max(map(bytes_of, self.model.layers))
        root = bytes_of(self.model) - sum(map(bytes_of, self.model.layers))
        if AUTOCAST.get(self.config["trainer"]["precision"]) is not None:
            layer //= 2  # layers are gathered in bf16 and not copied for autocast
            share[COPIES] = self.tracker.peak_by_label[phase].get(COPIES, 0)
        # The next layer is gathered while one runs; gradients of two layers wait for their reduction.
        gathered = {"update": 0, "forward": root + 2 * layer, "backward": 2 * root + 4 * layer}[phase]
        return dict(parts) | share | {GATHERED: gathered}

    def _stacks(self, layers: Mapping[Kind, int]) -> Counter[str]:
        """What one rank's update of Muon allocates, with the given number of layers of each kind."""
        if not isinstance(self.optimizer, MuonWithAdamW):
            return Counter()
        copies = {
            id(p): layers[kind]
            for kind, layer in zip(self.kinds, self.model.layers, strict=True)
            for p in layer.parameters()
        }
        size = muon_workspace(
            self.optimizer.muon, copies, self.shards, self.device, self.mode, self.tracker.granularity
        )
        return Counter({UPDATE: size})

    def _validation(self, layers: Mapping[Kind, int]) -> Counter[str]:
        """What a validation allocates, with the given number of layers of each kind. Layers run one after another; the
        copies of all their weights stay until the end."""
        if not self.validates_beside_graph:
            return Counter()
        held = Counter(self.tracker.peak_by_label["validation"])
        copies = sum(layers[kind] * held[COPIES_OF + name] for kind, name in self.names.items())
        return Counter({VALIDATION: held[VALIDATION] + held[WORKSPACE] + held[COPIES] + copies})

    def _at_peak(self, phase: str) -> Counter[str]:
        """What is held at a phase's peak, without the stacks of the few matrices that this model has."""
        held = Counter[str]()
        for label, size in self.tracker.peak_by_label[phase].items():
            if label == UPDATE and isinstance(self.optimizer, MuonWithAdamW):
                continue
            held[COPIES if label.startswith(COPIES_OF) else label] += size
        return held

    def _rounded(self, size: int) -> int:
        return -(-size // self.tracker.granularity) * self.tracker.granularity


@contextmanager
def _few_chunks() -> Iterator[None]:
    """Runs the loss on its first chunks of tokens alone: chunks run one after another and have equal sizes."""
    chunks = loss.token_chunks
    loss.token_chunks = lambda *sizes: chunks(*sizes)[:4]
    try:
        yield
    finally:
        loss.token_chunks = chunks


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _labelled(tracker: MemoryTracker, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with tracker.labelled(label):
            return function(*arguments)

    return run
